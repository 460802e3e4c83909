"""What stage 3 costs: the time of cutting a sub-network, at several widths and for tables of several lengths, and how
its speed follows its MACs, with uniform widths, with whole blocks gone, and with the widths of a table grown by random
importance. Random weights; prints one JSON object. Latencies of two threads on two cores need a machine with nothing
else to do."""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import utils
from models import latency, peel, piad
from models.cost import Shapes
from models.store import SuperNet
from models.supernet import as_supernet, full_widths
from models.vit import ModelSpec
from models.width_table import Budget, Widths, WidthTable
from utils import StageParser, positive_int

SHARES = (0.125, 0.25, 0.5, 0.75, 0.96875, 1)


def get_args():
    parser = StageParser(description=__doc__)
    parser.add_argument("--model", default="vit_base", help="what is cut")
    parser.add_argument("--latency_model", default="vit_small", help="what is timed")
    parser.add_argument("--threads", type=positive_int, default=2)
    parser.add_argument("--batch_sizes", type=positive_int, nargs="*", default=[1, 8], help="none for cutting alone")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


def supernet(name):
    """A random super-network with a table by random importance."""
    model = as_supernet(ModelSpec(name, 1000).build().eval())
    full, shapes = full_widths(model), Shapes.of(model)
    groups = piad.Groups.of(full)
    generator = torch.Generator().manual_seed(0)
    units = groups.counts(full)
    importance = [torch.rand(n, generator=generator).sort(descending=True).values.tolist() for n in units]
    steps = [full]
    piad.grow(steps, importance, groups, shapes.macs, 0.125 * shapes.macs(full))
    return SuperNet(model, ModelSpec(name, 1000), WidthTable(steps), shapes, Path("random"))


def uniform(full, attn, mlp):
    return Widths(tuple(int(w * attn) for w in full.attn), tuple(int(w * mlp) for w in full.mlp))


def cutting(args):
    """Milliseconds, median of five cuts, by the clock and of processor time, which other programs do not lengthen: by
    the kept share of all widths, and by the length of the table."""

    def median(work):
        times = {"ms": [], "processor_ms": []}
        for _ in range(6):
            started, used = time.perf_counter(), time.process_time()
            work()
            times["ms"].append(1e3 * (time.perf_counter() - started))
            times["processor_ms"].append(1e3 * (time.process_time() - used))
        return {name: round(statistics.median(values[1:]), 1) for name, values in times.items()}

    net = supernet(args.model)
    full = full_widths(net.model)
    figures = {
        f"keep {share}": median(lambda s=share: peel.extract(net.model, uniform(full, s, s))) for share in SHARES
    }
    half = Budget("macs_ratio", 0.5)
    for every in (1, 20):
        net.table = WidthTable(net.table.steps[::every])
        figures[f"half the MACs, table of {len(net.table.steps)} steps"] = median(
            lambda: net.cut(half.choose(net.table, net.shapes).widths)
        )
    return figures


def speed(args, batch_size):
    """Images/s of each network and its ratio to the full one, all timed in turns."""
    device, net = utils.choose_device(args.device, "--device"), supernet(args.latency_model)
    full = full_widths(net.model)
    many = {"full": full}
    for attn, mlp in ((0.5, 0.5), (0.5, 0.484375), (0.25, 0.625), (0.375, 0.3125), (0.25, 0.34375), (0.125, 0.4375)):
        many[f"uniform, {int(full.attn[0] * attn)} and {int(full.mlp[0] * mlp)}"] = uniform(full, attn, mlp)
    for every in (2, 3):
        kept = [index % every == 0 for index in range(len(full.attn))]
        many[f"whole blocks, one of {every}"] = Widths(
            *(tuple(w * k for w, k in zip(widths, kept, strict=True)) for widths in (full.attn, full.mlp))
        )
    for share in (0.5, 1 / 3):
        many[f"table, {share:.3f} of the MACs"] = Budget("macs_ratio", share).choose(net.table, net.shapes).widths
    networks = [peel.extract(net.model, widths).to(device) for widths in many.values()]
    conditions = latency.Conditions.of(net.model, device, batch_size, "none")
    times = latency.measure(networks, device, conditions)
    return {"conditions": str(conditions)} | {
        name: {
            "macs_ratio": round(net.shapes.macs(widths) / net.shapes.macs(full), 4),
            "ms": round(ms, 2),
            "times_full": round(times[0] / ms, 2),
        }
        for (name, widths), ms in zip(many.items(), times, strict=True)
    }


def main(args):
    torch.set_num_threads(args.threads)
    results = {"machine": utils.machine_name(torch.device("cpu")), "threads": args.threads}
    results[f"cutting {args.model}"] = cutting(args)
    for batch_size in args.batch_sizes:
        results[f"speed of {args.latency_model}, batch {batch_size}"] = speed(args, batch_size)
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    utils.run_stage(main, get_args())
