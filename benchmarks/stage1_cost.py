"""What stage 1 costs: time and memory of the statistics pass against one plain forward and backward over the same
images, and the time of cutting and compensating sub-networks. Random weights; prints one JSON object."""

import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import utils
from models import peel
from models.compensation import compensate
from models.statistics import OBJECTIVES, collect_statistics
from models.vit import ModelSpec, as_supernet, full_widths
from models.width_table import Widths
from models.wpac import reparameterise
from utils import StageParser, positive_int


def get_args():
    parser = StageParser(description=__doc__)
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--images", type=positive_int, default=16)
    parser.add_argument("--batch_size", type=positive_int, default=4)
    parser.add_argument("--threads", type=positive_int, default=2)
    parser.add_argument("--part", choices=["plain", "bases", "hidden", "cut"], help="one measurement, in this process")
    return parser.parse_args()


def batches_of(args):
    images = torch.randn(args.images, 3, 224, 224)
    labels, positions = torch.arange(args.images) % 1000, torch.arange(args.images)
    return list(zip(*(t.split(args.batch_size) for t in (images, labels, positions)), strict=True))


def plain_pass(model, batches):
    """Forward and backward of every batch, weight gradients included, as a training step would."""
    for images, labels, positions in batches:
        OBJECTIVES["label"](model, images, labels, positions).backward()
        model.zero_grad()


def measure(args):
    """Seconds and peak memory of one part; the first batch is run once before the clock starts."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    model, batches = as_supernet(ModelSpec(args.model, 1000).build().eval()), batches_of(args)
    if args.part == "cut":
        return measure_cut(model, batches, device)

    def work(part):
        if args.part == "plain":
            plain_pass(model, part)
        else:
            collect_statistics(model, part, OBJECTIVES["label"], device, hidden=args.part == "hidden")

    work(batches[:1])
    started = time.perf_counter()
    work(batches)
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def measure_cut(model, batches, device):
    """Seconds to solve stage 1 (greedy order included), and to cut with and without compensation at several widths."""
    sums = collect_statistics(model, batches[:1], OBJECTIVES["label"], device, hidden=True)
    started = time.perf_counter()
    memory = reparameterise(model, sums, "balanced", "greedy")
    figures = {"solve_seconds": time.perf_counter() - started}
    full = full_widths(model)
    for share in (0.125, 0.25, 0.5, 0.75, 0.96875):
        widths = Widths(tuple(int(w * share) for w in full.attn), tuple(int(w * share) for w in full.mlp))
        started = time.perf_counter()
        network = peel.extract(model, widths)
        extracted = time.perf_counter()
        compensate(network, model, widths, memory)
        figures[f"keep_{share}"] = {
            "extract_seconds": extracted - started,
            "compensate_seconds": time.perf_counter() - extracted,
        }
    return figures


def main(args):
    torch.set_num_threads(args.threads)
    if args.part:
        print(json.dumps(measure(args)))
        return
    results = {"machine": utils.machine_name(torch.device("cpu"))} | vars(args)
    for part in ("plain", "bases", "hidden", "cut"):
        # A process each, so that one part's peak is not another's.
        options = [f"--{name}={value}" for name, value in vars(args).items() if value is not None]
        output = subprocess.run(
            [sys.executable, __file__, *options, f"--part={part}"], check=True, capture_output=True, text=True
        )
        results[part] = json.loads(output.stdout)
    for part in ("bases", "hidden"):
        results[part]["times_plain"] = results[part]["seconds"] / results["plain"]["seconds"]
        results[part]["bytes_over_plain"] = results[part]["peak_bytes"] - results["plain"]["peak_bytes"]
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    utils.run_stage(main, get_args())
