"""What a GPU makes of this code: stage 1 in bf16 and fp32, training steps eager and compiled, which widths extracted
networks are fast at, the attention kernel that PyTorch takes, and what one NCCL rank costs. Random weights and images.
Writes Markdown tables to --output. Without a GPU it runs its smallest case, prints the tables and writes nothing."""

import copy
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import common
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import utils
from models.subnet import latency
from models.vit.supernet import compile_branches, current_widths
from models.vit.widths import Widths
from models.wpac.density import densities
from models.wpac.rewrite import reparameterise
from models.wpac.statistics import OBJECTIVES, collect_statistics

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True)
class Case:
    """models: for stage 1 and the steps; subject: the network that is cut; images: a proxy set; amps: to train in;
    compiler and ranks: the backends of torch.compile and torch.distributed."""

    models: tuple[str, ...] = ("vit_tiny", "vit_small", "vit_base")
    subject: str = "vit_small"
    images: int = 1024
    batch_size: int = 128
    updates: int = 20
    rounds: int = 5
    shares: tuple[float, ...] = (1, 2 / 3, 1 / 2, 1 / 3, 1 / 6)
    amps: tuple[str, ...] = ("bf16", "fp16")
    compiler: str = "inductor"
    ranks: str = "nccl"


SMALLEST = Case(("vit_digits",), "vit_digits", 8, 4, 1, 1, (1 / 2,), ("bf16",), "aot_eager", "gloo")


def with_peak(device, work):
    """(result of ``work()``, its seconds, its peak memory in MB on a GPU, or '-')."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    watch = utils.Stopwatch(device)
    result = work()
    seconds = watch.seconds()
    return result, seconds, utils.peak_memory_mb(device) if device.type == "cuda" else "-"


def stage1(case, device):
    """Rows: seconds and memory of measuring and rewriting each model in fp32 and in bf16, and what bf16's bases lose.

    The last is the largest difference, over heads and MLPs, of the share of the expected loss, measured in fp32, that
    the first half of the dimensions hold.
    """
    rows = []
    for name in case.models:
        original = common.random_supernet(name).to(device)
        batches = common.random_batches(original, case.images, 64)
        reference, held = None, {}
        for amp in ("none", "bf16"):
            supernet = copy.deepcopy(original)
            measure = partial(collect_statistics, supernet, batches, OBJECTIVES["label"], hidden=True, amp=amp)
            measure()  # the first pass warms up
            sums, seconds, peak = with_peak(device, measure)
            rewrites, solving, _ = with_peak(device, partial(reparameterise, supernet, sums, "balanced", "greedy"))
            reference = reference or sums
            after = [after for _, after in densities(supernet, reference, rewrites).values()]
            held[amp] = torch.cat([curve[:, curve.shape[1] // 2] for curve in after])
            lost = (held["none"] - held[amp]).abs().max().item()
            rows.append([name, amp, f"{seconds:.2f}", f"{solving:.2f}", peak, f"{lost:.1e}"])
    return ["", "autocast", "s to measure", "s to solve", "MB", "difference of the shares held"], rows


def variants(case):
    """(words, autocast, change of the TrainingRun) of each way to run a step."""

    def compiled(run):
        compile_branches(run.model, case.compiler)

    def channels_last(run):
        run.model.to(memory_format=torch.channels_last)  # the patch embedding is the one convolution

    yield "eager, fp32", "none", lambda run: None
    for amp in case.amps:
        yield f"eager, {amp}", amp, lambda run: None
        yield f"compiled, {amp}", amp, compiled
    yield f"eager, {case.amps[0]}, channels last", case.amps[0], channels_last


def steps(case, device):
    """Rows: images/s of stage 2's steps at shares of the MACs, and the peak memory of all of them."""
    rows = []
    for name in case.models:
        _, costs, table = common.random_table(name)
        many = common.at_shares(table, costs, case.shares)
        for words, amp, change in variants(case):
            torch.compiler.reset()
            run, rate = common.training(common.random_supernet(name), device, case.batch_size, case.updates, amp)
            change(run)
            works = [partial(rate, widths) for widths in many]
            rates, _, peak = with_peak(device, partial(common.in_turns, works, case.rounds))
            rows.append([name, words, *(f"{rate:.0f}" for rate in rates), peak])
    return ["", "", *(f"{share:.2f} of the MACs" for share in case.shares), "MB"], rows


def shapes(case, device):
    """Rows: images/s of extracted networks by head width, by hidden width, and uniform against ragged."""
    supernet, costs, table = common.random_table(case.subject)
    depth, head, hidden = len(costs.full.attn), costs.full.attn[0], costs.full.mlp[0]
    many = {f"heads of {d}": Widths((d,) * depth, costs.full.mlp) for d in range(8, head + 1, 8)}
    for unit in (8, 32, 64, 128):
        width = hidden // 2 + unit
        many[f"MLPs of {width}, a multiple of {unit}"] = Widths(costs.full.attn, (width,) * depth)
    many["uniform, half of each width"] = common.scaled(costs.full, 0.5, 0.5)
    (many["ragged, as a table has it"],) = common.at_shares(table, costs, [0.5])
    conditions = latency.Conditions.of(supernet, device, case.batch_size, case.amps[0])
    networks = [network.to(device) for network in common.cut(supernet, many.values())]
    rows = []
    for (name, widths), ms in zip(many.items(), latency.measure(networks, device, conditions), strict=True):
        rate, macs = 1e3 * case.batch_size / ms, costs.macs(widths)
        rows.append([name, f"{macs / costs.macs(costs.full):.3f}", f"{rate:.0f}", f"{rate * macs / 1e12:.2f}"])
    return [str(conditions), "share of the MACs", "images/s", "TMAC/s"], rows


def attention(case, device):
    """Rows: which of PyTorch's kernels computes attention at each head width, and milliseconds of those that can."""
    supernet, rows = common.random_supernet(case.subject), []
    heads, tokens = supernet.blocks[0].attn.num_heads, supernet.pos_embed.shape[1]
    for width in range(8, current_widths(supernet).attn[0] + 1, 8):
        q, k, v = torch.randn(3, case.batch_size, heads, tokens, width, device=device, dtype=torch.bfloat16)

        def milliseconds(backend, q=q, k=k, v=v):
            watch = utils.Stopwatch(device)
            with sdpa_kernel(backend):
                F.scaled_dot_product_attention(q, k, v)
            return 1e3 * watch.seconds()

        found = []
        for backend in BACKENDS:
            try:
                (ms,) = common.in_turns([partial(milliseconds, backend)], 10 * case.rounds)
                found.append(f"{ms:.3f}")
            except RuntimeError:  # this kernel does not take these shapes here
                found.append("-")
        rows.append([width, SDPBackend(torch._fused_sdp_choice(q, k, v)).name, *found])
    return ["head width", "chosen", *(f"{backend.name}, ms" for backend in BACKENDS)], rows


def ranks(case, device):
    """Rows: images/s of steps at full and at a quarter of all widths, without ranks, with one, and without again."""
    rows = []
    ways = {"none": None, "one": {}, "one, find_unused": {"find_unused": True}, "none, again": None}
    for words, options in ways.items():
        if options is not None:
            dist.init_process_group(case.ranks, store=dist.HashStore(), rank=0, world_size=1)
        supernet, how = common.random_supernet(case.subject), options or {}
        full = current_widths(supernet)
        _, rate = common.training(supernet, device, case.batch_size, case.updates, case.amps[0], **how)
        rates = common.in_turns([partial(rate, common.scaled(full, s, s)) for s in (1, 1 / 4)], case.rounds)
        if options is not None:
            dist.destroy_process_group()
        rows.append([words, *(f"{rate:.0f}" for rate in rates)])
    return [f"ranks ({case.ranks})", "full widths, images/s", "a quarter, images/s"], rows


PARTS = {"Stage 1": stage1, "Training steps, images/s": steps, "Extracted networks": shapes}
PARTS |= {"Attention kernels": attention, "One rank against none": ranks}


def main(args):
    device = utils.choose_device(args.device, "--device")
    case = Case() if device.type == "cuda" else SMALLEST
    if device.index is not None:
        torch.cuda.set_device(device)
    about = f"`python benchmarks/gpu.py` on {utils.machine_name(device)}, torch {torch.__version__}, random weights"
    lines = ["# On a GPU", "", f"{about}; batches of {case.batch_size}, {case.images} images for stage 1."]
    for title, measure in PARTS.items():
        utils.seed_all(0)
        part = ["", f"## {title}", "", *common.markdown(*measure(case, device))]
        print("\n".join(part), flush=True)
        lines += part
    if device.type == "cuda":
        utils.save_text("\n".join(lines) + "\n", Path(args.output))
        print(f"wrote {args.output}")


if __name__ == "__main__":
    utils.run_stage(main, common.arguments(__doc__, device="auto", output="docs/gpu.md"))
