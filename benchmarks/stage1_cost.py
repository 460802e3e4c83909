"""What stage 1 costs: time and memory of the statistics pass against plain forward and backward passes over the same
images, and the time of cutting and compensating sub-networks. Random weights; prints one JSON object.

Every measurement has a process of its own. Seconds are compared with a training step's pass (`plain`), peak memory with
the same pass without weight gradients (`frozen`), which is what the statistics are collected in. For the peaks the
allocator is told to return every freed tensor at once, so that they count what is alive and not what glibc keeps.
"""

import json
import os
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
from models.supernet import as_supernet, full_widths
from models.vit import ModelSpec
from models.width_table import Widths
from models.wpac import reparameterise
from utils import StageParser, positive_int


def get_args():
    parser = StageParser(description=__doc__)
    parser.add_argument("--model", default="vit_base")
    parser.add_argument("--images", type=positive_int, default=16)
    parser.add_argument("--batch_size", type=positive_int, default=4)
    parser.add_argument("--threads", type=positive_int, default=2)
    parser.add_argument("--runs", type=positive_int, default=2, help="processes of which the mean is taken")
    parser.add_argument(
        "--part", choices=["plain", "frozen", "bases", "hidden", "cut"], help="one measurement, in this process"
    )
    return parser.parse_args()


def batches_of(args):
    images = torch.randn(args.images, 3, 224, 224)
    labels, positions = torch.arange(args.images) % 1000, torch.arange(args.images)
    return list(zip(*(t.split(args.batch_size) for t in (images, labels, positions)), strict=True))


def plain_pass(model, batches):
    """Forward and backward of every batch; weight gradients are included, as in a training step, if they are wanted."""
    for images, labels, positions in batches:
        OBJECTIVES["label"](model, images.requires_grad_(), labels, positions).backward()
        model.zero_grad()
        images.grad = None


def peak_bytes():
    """The largest resident set of this process so far: model, data, libraries and all (Linux)."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def measure(args):
    """Seconds and peak memory of one part; the first batch is run once before the clock starts."""
    torch.manual_seed(0)
    device = torch.device("cpu")
    model, batches = as_supernet(ModelSpec(args.model, 1000).build().eval()), batches_of(args)
    if args.part == "cut":
        return measure_cut(model, batches, device)

    def work(part):
        if args.part in ("plain", "frozen"):
            plain_pass(model.requires_grad_(args.part == "plain"), part)
        else:
            collect_statistics(model, part, OBJECTIVES["label"], device, hidden=args.part == "hidden")

    work(batches[:1])
    started = time.perf_counter()
    work(batches)
    return {"seconds": time.perf_counter() - started, "peak_bytes": peak_bytes()}


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
        figures[f"extract_{share}_seconds"] = extracted - started
        figures[f"compensate_{share}_seconds"] = time.perf_counter() - extracted
    return figures


def run_part(args, part, **environment):
    """What ``measure`` finds in a process of its own, the mean over --runs of them."""
    options = [f"--{name}={value}" for name, value in vars(args).items() if value is not None]
    command = [sys.executable, __file__, *options, f"--part={part}"]
    outputs = [
        subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ | environment).stdout
        for _ in range(args.runs)
    ]
    runs = [json.loads(output) for output in outputs]
    return {name: sum(run[name] for run in runs) / len(runs) for name in runs[0]}


def main(args):
    torch.set_num_threads(args.threads)
    if args.part:
        print(json.dumps(measure(args)))
        return
    results = {"machine": utils.machine_name(torch.device("cpu"))} | vars(args)
    for part in ("plain", "frozen", "bases", "hidden"):
        seconds = run_part(args, part)["seconds"]
        # A fixed threshold: glibc would raise it by itself and then keep large blocks for later.
        peak = run_part(args, part, MALLOC_MMAP_THRESHOLD_="65536")["peak_bytes"]
        results[part] = {"seconds": seconds, "peak_bytes": peak}
    for part in ("bases", "hidden"):
        results[part]["times_plain"] = results[part]["seconds"] / results["plain"]["seconds"]
        results[part]["bytes_over_frozen"] = results[part]["peak_bytes"] - results["frozen"]["peak_bytes"]
    print(json.dumps(results | {"cut": run_part(args, "cut")}, indent=1))


if __name__ == "__main__":
    utils.run_stage(main, get_args())
