"""What stage 1 costs: time and memory of the statistics pass against plain forward and backward passes over the same
images, and the time of cutting and compensating sub-networks. Random weights; prints one JSON object for each part.

Seconds are compared with a training step's pass (`plain`), peak memory with the same pass without weight gradients
(`frozen`), in which the statistics are collected. Several parts are measured in processes of their own, each twice:
the second time glibc returns every freed tensor at once, so that the peak counts what is alive.
"""

import itertools
import json
import os
import resource
import subprocess
import sys

import common
import torch

import utils
from models.subnet.extract import extract
from models.vit.supernet import full_widths
from models.wpac.compensation import compensate, compensation_of
from models.wpac.rewrite import reparameterise
from models.wpac.statistics import OBJECTIVES, collect_statistics

CPU = torch.device("cpu")
PARTS = ["plain", "frozen", "bases", "hidden", "cut"]
ENVIRONMENTS = ({}, {"MALLOC_MMAP_THRESHOLD_": "65536"})


def measure_pass(part, supernet, batches):
    """Seconds of a pass, and peak memory (Linux); the first batch is run once before the clock starts."""
    supernet.requires_grad_(part == "plain")
    for some in (batches[:1], batches):
        watch = utils.Stopwatch(CPU)
        if part in ("bases", "hidden"):
            collect_statistics(supernet, some, OBJECTIVES["label"], hidden=part == "hidden")
            continue
        for images, labels, positions in some:
            OBJECTIVES["label"](supernet, images.requires_grad_(), labels, positions).backward()
            supernet.zero_grad()
            images.grad = None
    return {"seconds": watch.seconds(), "peak_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def measure_cut(supernet, batches):
    """Seconds to solve stage 1 (greedy order included), and to cut with and without compensation at several widths."""
    statistics = collect_statistics(supernet, batches[:1], OBJECTIVES["label"], hidden=True)
    watch = utils.Stopwatch(CPU)
    compensation = compensation_of(supernet, statistics, reparameterise(supernet, statistics, "balanced", "greedy"))
    figures = {"solve_seconds": watch.seconds()}
    for share in (0.125, 0.25, 0.5, 0.75, 0.96875):
        watch = utils.Stopwatch(CPU)
        subnet = extract(supernet, common.scaled(full_widths(supernet), share, share))
        figures[f"extract_{share}_seconds"] = extracted = watch.seconds()
        compensate(subnet, supernet, compensation)
        figures[f"compensate_{share}_seconds"] = watch.seconds() - extracted
    return figures


def main(args):
    torch.set_num_threads(args.threads)
    part, *others = args.part
    if others:
        for part, more in itertools.product(args.part, ENVIRONMENTS):
            subprocess.run([sys.executable, *sys.argv, "--part", part], check=True, env=os.environ | more)
        return
    torch.manual_seed(0)
    supernet = common.random_supernet(args.model)
    batches = common.random_batches(supernet, args.images, args.batch_size)
    figures = measure_cut(supernet, batches) if part == "cut" else measure_pass(part, supernet, batches)
    about = {"machine": utils.machine_name(CPU), "mmap_threshold": os.environ.get("MALLOC_MMAP_THRESHOLD_")}
    print(json.dumps(vars(args) | about | figures), flush=True)


if __name__ == "__main__":
    main(common.arguments(__doc__, model="vit_base", images=16, batch_size=4, threads=2, part=PARTS))
