"""What stage 3 costs: the time of cutting --model, at several widths and for tables of several lengths, and how the
speed of --latency-model follows its MACs, with uniform widths, with whole blocks gone, and with the widths of a table
grown by random importance (--batch-sizes without a number: cutting alone). Random weights; prints one JSON object.
Latencies of two threads on two cores need a machine with nothing else to do."""

import json
import statistics
import time

import common
import torch

import utils
from models.piad.width_table import WidthTable
from models.subnet import latency
from models.subnet.extract import extract
from models.vit.widths import Widths

SHARES = (0.125, 0.25, 0.5, 0.75, 0.96875, 1)
UNIFORM = ((0.5, 0.5), (0.5, 0.484375), (0.25, 0.625), (0.375, 0.3125), (0.25, 0.34375), (0.125, 0.4375))


def median(work, *arguments):
    """Milliseconds, median of five, by the clock and of processor time, which other programs do not lengthen."""
    times = []
    for _ in range(6):
        started = time.perf_counter(), time.process_time()
        work(*arguments)
        times.append((time.perf_counter() - started[0], time.process_time() - started[1]))
    medians = [round(1e3 * statistics.median(values[1:]), 1) for values in zip(*times, strict=True)]
    return dict(zip(("ms", "processor_ms"), medians, strict=True))


def cutting(supernet, costs, table):
    """Milliseconds by the kept share of all widths, and by the length of the table."""
    figures = {f"keep {s}": median(extract, supernet, common.scaled(costs.full, s, s)) for s in SHARES}
    for each in (table, WidthTable(table.steps[::20])):
        name = f"half the MACs, table of {len(each.steps)} steps"
        figures[name] = median(lambda each=each: extract(supernet, *common.at_shares(each, costs, [0.5])))
    return figures


def speed(supernet, costs, table, device, batch_size):
    """Milliseconds of each network and its speed against the full one's, all timed in turns."""
    full, many = costs.full, {"full": costs.full}
    for widths in (common.scaled(full, *shares) for shares in UNIFORM):
        many[f"uniform, {widths.attn[0]} and {widths.mlp[0]}"] = widths
    for every in (2, 3):
        kept = [width * (index // 2 % every == 0) for index, width in enumerate(full.flat)]
        many[f"whole blocks, one of {every}"] = Widths.from_flat(kept)
    for share in (0.5, 1 / 3):
        (many[f"table, {share:.3f} of the MACs"],) = common.at_shares(table, costs, [share])
    conditions = latency.Conditions.of(supernet, device, batch_size, "none")
    times = latency.measure([extract(supernet, widths).to(device) for widths in many.values()], device, conditions)
    figures = {"conditions": str(conditions)}
    for (name, widths), ms in zip(many.items(), times, strict=True):
        figures[name] = {"macs_ratio": round(costs.macs(widths) / costs.macs(full), 4), "ms": round(ms, 2)}
        figures[name]["times_full"] = round(times[0] / ms, 2)
    return figures


def main(args):
    torch.set_num_threads(args.threads)
    device = utils.choose_device(args.device, "--device")
    results = {"machine": utils.machine_name(torch.device("cpu")), "threads": args.threads}
    results[f"cutting {args.model}"] = cutting(*common.random_table(args.model))
    for size in args.batch_sizes:
        found = speed(*common.random_table(args.latency_model), device, size)
        results[f"speed of {args.latency_model}, batch {size}"] = found
    print(json.dumps(results, indent=1))


if __name__ == "__main__":
    flags = {"model": "vit_base", "latency_model": "vit_small", "threads": 2, "batch_sizes": [1, 8], "device": "auto"}
    utils.run_stage(main, common.arguments(__doc__, **flags))
