"""What a GPU makes of this code: stage 1 in bf16 and fp32, training steps eager and compiled, plain and compensated,
which widths extracted networks are fast at, the attention kernel that PyTorch takes, what one NCCL rank costs, and how
long a width table grows. --parts measures some of it, into a file of its own.
Random weights and images. Writes Markdown tables to --output. Without a GPU it runs its smallest case, prints the
tables and writes nothing."""

import copy
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import common
import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import utils
from models.piad.dropout import DropoutList, Growth
from models.piad.importance import Units
from models.subnet import latency
from models.vit.cost import Costs
from models.vit.supernet import compile_branches, current_widths
from models.vit.widths import Widths
from models.wpac.compensation import attach, measure_compensation
from models.wpac.density import densities
from models.wpac.rewrite import reparameterise
from models.wpac.statistics import OBJECTIVES, collect_statistics
from options import words_of
from utils import InputError

BACKENDS = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH)


@dataclass(frozen=True)
class Case:
    """models: for stage 1 and the steps; subject: the network of the other parts; images: a proxy set; amps: to train
    in; compiler and ranks: the backends of torch.compile and torch.distributed."""

    models: tuple[str, ...] = ("vit_tiny", "vit_small", "vit_base")
    subject: str = "vit_small"
    images: int = 1024
    batch_size: int = 128
    updates: int = 5
    rounds: int = 3
    shares: tuple[float, ...] = (1, 2 / 3, 1 / 2, 1 / 3, 1 / 6)
    amps: tuple[str, ...] = ("none", "bf16", "fp16")
    compiler: str = "inductor"
    ranks: str = "nccl"

    @property
    def main_amp(self):
        """The first autocast type, or 'none' if there is no other."""
        return next((amp for amp in self.amps if amp != "none"), "none")


SMALLEST = Case(("vit_digits",), "vit_digits", 8, 4, 1, 1, (1 / 2,), ("none", "bf16"), "aot_eager", "gloo")


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
    yield ["", "autocast", "s to measure", "s to solve", "MB", "difference of the shares held"]
    for name in case.models:
        original = common.random_supernet(name).to(device)
        batches = common.random_batches(original, case.images, 64)
        reference, held = None, {}
        for amp in ("none", "bf16"):
            supernet = copy.deepcopy(original)
            measure = partial(collect_statistics, supernet, objective=OBJECTIVES["label"], hidden=True, amp=amp)
            measure(batches[:1])  # to warm up
            sums, seconds, peak = with_peak(device, partial(measure, batches))
            rewrites, solving, _ = with_peak(device, partial(reparameterise, supernet, sums, "balanced", "greedy"))
            reference = reference or sums
            after = [after for _, after in densities(supernet, reference, rewrites).values()]
            held[amp] = torch.cat([curve[:, curve.shape[1] // 2] for curve in after])
            lost = (held["none"] - held[amp]).abs().max().item()
            yield [name, amp, f"{seconds:.2f}", f"{solving:.2f}", peak, f"{lost:.1e}"]


def compensated(supernet, count):
    """Let a super-network train compensated slices, measured on ``count`` random images."""
    batches = common.random_batches(supernet, count, count)
    attach(supernet, measure_compensation(supernet, batches, OBJECTIVES["label"]))


def variants(case):
    """(words, autocast, change of the super-network) of each way to run a step; slices are plain if nothing is said."""
    main = case.main_amp
    for amp in case.amps:
        yield "fp32" if amp == "none" else amp, amp, lambda supernet: None
    # The patch embedding is the one convolution.
    yield f"{main}, channels last", main, lambda supernet: supernet.to(memory_format=torch.channels_last)
    yield f"{main}, compensated slices (the default)", main, partial(compensated, count=case.batch_size)


def steps(case, device):
    """Rows: images/s of stage 2's steps at shares of the MACs, and the peak memory of all of them."""
    yield ["", "", *(f"{share:.2f} of the MACs" for share in case.shares), "MB"]
    for name in case.models:
        original, costs, table = common.random_table(name)
        many = common.at_shares(table, costs, case.shares)
        for words, amp, change in variants(case):
            supernet = copy.deepcopy(original).to(device)
            _, rate = common.training(supernet, device, case.batch_size, case.updates, amp)
            change(supernet)
            works = [partial(rate, widths) for widths in many]
            rates, _, peak = with_peak(device, partial(common.in_turns, works, case.rounds))
            yield [name, words, *(f"{rate:.0f}" for rate in rates), peak]


def compiled_steps(case, device):
    """Rows: images/s of steps of compensated slices, eager and compiled, smallest first, and the seconds until that
    compiled step had run for the first time."""
    yield [case.subject, "eager, images/s", "compiled, images/s", "s to the first compiled step"]
    original, costs, table = common.random_table(case.subject)
    rates = []
    for change in (lambda supernet: None, partial(compile_branches, backend=case.compiler)):
        supernet = copy.deepcopy(original).to(device)
        compensated(supernet, case.batch_size)
        rates.append(common.training(supernet, device, case.batch_size, case.updates, case.main_amp)[1])
        change(supernet)
    for share, widths in zip(case.shares[::-1], common.at_shares(table, costs, case.shares[::-1]), strict=True):
        eager, compiled = (partial(rate, widths) for rate in rates)
        _, seconds, _ = with_peak(device, compiled)
        both = common.in_turns([eager, compiled], case.rounds)
        yield [f"{share:.2f} of the MACs", *(f"{rate:.0f}" for rate in both), f"{seconds:.1f}"]


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
    conditions = latency.Conditions.of(supernet, device, case.batch_size, case.main_amp)
    yield [str(conditions), "share of the MACs", "images/s", "TMAC/s"]
    networks = [network.to(device) for network in common.cut(supernet, many.values())]
    for (name, widths), ms in zip(many.items(), latency.measure(networks, device, conditions), strict=True):
        rate, macs = 1e3 * case.batch_size / ms, costs.macs(widths)
        yield [name, f"{macs / costs.macs(costs.full):.3f}", f"{rate:.0f}", f"{rate * macs / 1e12:.2f}"]


def attention(case, device):
    """Rows: which of PyTorch's kernels computes attention at each head width, and milliseconds of those that can."""
    yield ["head width", "chosen", *(f"{backend.name}, ms" for backend in BACKENDS)]
    supernet = common.random_supernet(case.subject)
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
        yield [width, SDPBackend(torch._fused_sdp_choice(q, k, v)).name, *found]


def ranks(case, device):
    """Rows: images/s of steps at full and at a quarter of all widths, without ranks, with one, and without again."""
    yield [f"ranks ({case.ranks})", "full widths, images/s", "a quarter, images/s"]
    ways = {"none": None, "one": {}, "one, find_unused": {"find_unused": True}, "none, again": None}
    for words, options in ways.items():
        if options is not None:
            dist.init_process_group(case.ranks, store=dist.HashStore(), rank=0, world_size=1)
        supernet, how = common.random_supernet(case.subject), options or {}
        full = current_widths(supernet)
        _, rate = common.training(supernet, device, case.batch_size, case.updates, case.main_amp, **how)
        rates = common.in_turns([partial(rate, common.scaled(full, s, s)) for s in (1, 1 / 4)], case.rounds)
        if options is not None:
            dist.destroy_process_group()
        yield [words, *(f"{rate:.0f}" for rate in rates)]


def growth(case, device):
    """Rows: seconds in which a width table grows, from the full network and from half of its way, by the importance of
    all units on the proxy set, in fp32."""
    yield ["", "s", "MB"]
    for name in case.models:
        supernet = common.random_supernet(name).to(device)
        costs, batches = Costs.of(supernet), common.random_batches(supernet, case.images, case.batch_size)
        first, dropout = (DropoutList(Units.of(costs.full), costs, growth=Growth(2)) for _ in range(2))
        first.grow(supernet, batches[:1], 0)  # to warm up
        for epoch, words in enumerate(("from the full network", "from half of the way")):
            _, seconds, peak = with_peak(device, partial(dropout.grow, supernet, batches, epoch))
            yield [f"{name}, {words}", f"{seconds:.2f}", peak]


PARTS = {"Stage 1": stage1, "Training steps, images/s": steps, "Extracted networks": shapes}
PARTS |= {"Attention kernels": attention, "One rank against none": ranks, "Compiled steps": compiled_steps}
PARTS |= {"A growing table": growth}
NAMES = [measure.__name__ for measure in PARTS.values()]
FLAGS = {"device": "auto", "output": "docs/gpu.md", "parts": NAMES}
CASE_FLAGS = {"models": list(Case.models), "amps": list(Case.amps), "batch_size": Case.batch_size}


def main(args):
    device = utils.choose_device(args.device, "--device")
    on_gpu = device.type == "cuda"
    case = replace(Case(), **{name: getattr(args, name) for name in CASE_FLAGS}) if on_gpu else SMALLEST
    if device.index is not None:
        torch.cuda.set_device(device)
    given = [name for name in (*CASE_FLAGS, "parts") if name in args.given]
    if on_gpu and given and "output" not in args.given:
        raise InputError(f"--{given[0].replace('_', '-')}: give --output too, for {args.output} is of all there is")
    if not on_gpu and any(name in CASE_FLAGS for name in given):
        raise InputError(f"--{given[0].replace('_', '-')}: without a GPU there is the smallest case alone")
    command = " ".join(map(str, ["python benchmarks/gpu.py", *words_of(args, *given)]))
    about = f"`{command}` on {utils.machine_name(device)}, torch {torch.__version__}, random weights"
    lines = ["# On a GPU", "", f"{about}; batches of {case.batch_size}, {case.images} images for stage 1."]
    print("\n".join(lines))
    for title, measure in PARTS.items():
        if measure.__name__ not in args.parts:
            continue
        utils.seed_all(0)
        for index, row in enumerate(measure(case, device)):
            more = [common.table_row(row)] if index else ["", f"## {title}", "", *common.markdown(row, [])]
            print("\n".join(more), flush=True)
            lines += more
            if on_gpu:  # after every row: what has been measured is kept if it is stopped
                utils.save_text("\n".join(lines) + "\n", Path(args.output))


if __name__ == "__main__":
    utils.run_stage(main, common.arguments(__doc__, **FLAGS, **CASE_FLAGS))
