"""Stage 2: PIAD against other dropouts, and its options against plain PIAD, at equal compute.

Every variant starts from the same pre-trained network of a seed and trains until its forward and backward passes have
spent the same MACs (importance passes and teachers included); then one network is cut for each share of the MACs. What
has been measured lies in --work, so a run that was stopped goes on. Writes <output>.json, .md and .png.
"""

import argparse
import copy
import functools
import json
import sys
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import matplotlib
import torch
from torch.nn import functional as F

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import main_train
import utils
from benchmarks.truncation import sort_unrotated, spread
from checkpoints import Run
from engine import branch_removal, make_criterion, train_one_epoch
from models import peel, piad
from models.calibration import calibrate
from models.compensation import compensate
from models.cost import Shapes
from models.statistics import OBJECTIVES, collect_statistics
from models.supernet import as_supernet, full_widths, set_widths
from models.vit import ModelSpec, load_weights, read_checkpoint
from models.width_table import Widths, WidthTable
from models.wpac import reparameterise

SHARES = (6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)
BATCHES_PER_EPOCH = 94  # of 128 images: the list grows, and the rate falls, after every 12,032 images
BATCH = 128
# The shared recipe: rate by the share of the compute spent, growth over the first GROWTH per cent of it.
GROWTH = 35
RECIPE = "--opt adamw --unscale_lr --min_lr 1e-5 --warmup_epochs 0 --epochs 100 --drop_path 0 --smoothing 0.1 --mixup 0"
RECIPE += f" --cutmix 0 --no_model_ema --batch_size {BATCH} --device cpu --recipe paper --grow_epochs {GROWTH}"

# name -> (start, how it is trained, flags of main_train.py)
MAIN = {
    "no training, plain": ("balanced", None, ""),
    "no training, compensated": ("greedy", None, ""),
    "original network, trained on": ("taylor", "full", ""),
    "uniform channel dropout": ("random", "uniform", ""),
    "weighted channel dropout": ("taylor", "weighted", ""),
    "LayerDrop": ("taylor", "layers", ""),
    "PIAD, unrotated": ("taylor", "piad", ""),
    "PIAD, pca": ("pca", "piad", ""),
    "PIAD, balanced": ("balanced", "piad", ""),
}
OPTIONS = {
    "importance per latency": ("balanced", "piad", "--importance_per latency"),
    "sampling by MACs": ("balanced", "piad", "--sampling macs"),
    "sampling towards the ends": ("balanced", "piad", "--sampling ends"),
    "largest always, in-place": ("balanced", "piad", "--always largest --distillation_type inplace"),
    "sandwich": ("balanced", "piad", "--always largest smallest"),
    "sandwich, in-place": ("balanced", "piad", "--always largest smallest --distillation_type inplace"),
    "soft teacher": ("balanced", "piad", "--distillation_type soft"),
    "whole table from stage 1": ("balanced", "table", ""),
    "whole table, sampling by MACs": ("balanced", "table", "--sampling macs"),
    "whole table, towards the ends": ("balanced", "table", "--sampling ends"),
    "averaged start": ("averaged", "piad", ""),
}
BEST = "whole table from stage 1"  # the default recipe
VARIANTS = MAIN | OPTIONS
# The paper's DeiT-S on ImageNet at 4/12 and 8/12 of the MACs: not measured here.
PAPER_DEIT_S = {
    "channel dropout": (7.3, 34.4),
    "weighted channel dropout": (34.2, 64.7),
    "LayerDrop": (39.7, 68.6),
    "PIAD": (70.6, 78.2),
}


def get_args():
    parser = utils.StageParser(description=__doc__)
    parser.add_argument("--model", default="vit_fashion")
    parser.add_argument("--data_set", default="FASHION_MNIST")
    parser.add_argument("--data_path", default="/usr/share/datasets/fashion-mnist")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--pretrain_passes", type=float, default=12, help="passes over the training set")
    parser.add_argument(
        "--passes", type=float, default=3, help="compute of each variant, in passes of the full network"
    )
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--workers", type=utils.positive_int, default=2, help="processes, of one thread each")
    parser.add_argument("--work", type=Path, default=Path("output/dropout"), help="folder of what has been measured")
    parser.add_argument(
        "--output", type=Path, default=Path("docs/dropout_fashion"), help="path without suffix of the files to write"
    )
    return parser.parse_args()


# ------------------------------------------------------------------------------------------ data


class Batches:
    """Training batches from memory: images of all channels alike, shifted by up to two pixels and mirrored."""

    def __init__(self, images, labels, seed):
        self.images, self.labels, self.seed, self.epoch = images, labels, seed, 0

    def __len__(self):
        return BATCHES_PER_EPOCH

    def __iter__(self):
        for position in range(BATCHES_PER_EPOCH):
            generator = utils.keyed_generator(self.seed, self.epoch, position)
            chosen = torch.randint(len(self.labels), (BATCH,), generator=generator)
            down, right = torch.randint(5, (2,), generator=generator).tolist()
            mirrored = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
            images = self.images[chosen]
            height, width = images.shape[-2:]
            images = F.pad(images, (2, 2, 2, 2), mode="replicate")[..., down : down + height, right : right + width]
            yield torch.where(mirrored, images.flip(-1), images), self.labels[chosen], chosen


@functools.cache
def load_tensors(spec, data_set, data_path, train):
    """All images [N, 3, h, w], with the evaluation transform, and labels [N]; read once in a process."""
    args = argparse.Namespace(data_set=data_set, data_path=data_path, eval_crop_ratio=0.875)
    images = datasets.load_images(args, train)
    transform = datasets.eval_transform(args, datasets.data_config(spec.build()))
    pairs = [images[index] for index in range(len(images))]
    return torch.stack([transform(image) for image, _ in pairs]), torch.tensor([label for _, label in pairs])


class Bench:
    """The data and the pre-trained network of one seed."""

    def __init__(self, args, seed):
        torch.set_num_threads(1)
        self.args, self.seed, self.device = args, seed, torch.device("cpu")
        self.folder = args.work / f"seed{seed}"
        self.spec = ModelSpec(args.model, 10)
        self.model = self.spec.build()
        self.batches = Batches(*load_tensors(self.spec, args.data_set, args.data_path, True), seed)
        self.test = load_tensors(self.spec, args.data_set, args.data_path, False)
        order = torch.randperm(len(self.batches.labels), generator=utils.keyed_generator(seed))[:1024]
        images, labels = self.batches.images[order], self.batches.labels[order]
        self.proxy = list(zip(images.split(BATCH), labels.split(BATCH), order.split(BATCH), strict=True))
        self.shapes = Shapes.of(self.model)
        self.full = full_widths(as_supernet(copy.deepcopy(self.model)))

    def flags(self, more=""):
        flags = f"--model {self.args.model} --seed {self.seed} --lr {self.args.lr} {RECIPE} {more}"
        args = main_train.get_args(flags.split())
        args.amp, args.mask_table = "none", None
        return args

    @torch.inference_mode()
    def top1(self, network):
        network.eval()
        guesses = torch.cat([network(images).argmax(1) for images in self.test[0].split(500)])
        return 100 * (guesses == self.test[1]).double().mean().item()

    def weights(self):
        """The pre-trained network of this seed, trained if it is not there yet."""
        path = self.folder / "pretrained.pth"
        if not path.is_file():
            utils.seed_all(self.seed)
            model = as_supernet(self.spec.build())
            budget = self.args.pretrain_passes * len(self.batches.labels) * 3 * self.shapes.macs(self.full)
            train(self, model, self.flags("--lr 2e-3"), budget, lambda _: [self.full])
            utils.save_torch(model.state_dict(), path)
        load_weights(self.model, read_checkpoint(path)["model"], path)


# ------------------------------------------------------------------------------------------ starts


def starting_network(bench, start):
    """(super-network, memory): unrotated in random or Taylor order, or stage 1's."""
    model = as_supernet(copy.deepcopy(bench.model))
    sums = collect_statistics(model, bench.proxy, OBJECTIVES["label"], bench.device, hidden=True)
    if start in ("random", "taylor"):
        sort_unrotated(model, sums, start, bench.seed)
        return model, None
    basis, order = {"pca": ("pca", "taylor"), "greedy": ("balanced", "greedy")}.get(start, ("balanced", "taylor"))
    memory = reparameterise(model, sums, basis, order)
    if start == "averaged":
        average_over_widths(model, memory)
    return model, memory


@torch.no_grad()
def average_over_widths(model, memory, groups=32, full_weight=0.5):
    for block, sums in zip(model.blocks, memory, strict=True):
        fc2, factor, mean = block.mlp.fc2, sums.factor, sums.hidden_mean
        second = factor @ factor.T + torch.outer(mean, mean)
        size = len(mean)
        second = torch.cat((torch.cat((second, mean[:, None]), 1), torch.cat((mean, mean.new_ones(1)))[None]))
        weights = [(1 - full_weight) / (groups - 1)] * (groups - 1) + [full_weight]
        left, right = torch.zeros_like(second), torch.zeros_like(second)
        for index, weight in enumerate(weights):
            keep = torch.zeros(size + 1, dtype=second.dtype)
            keep[: size // groups * (index + 1)] = 1
            keep[-1] = 1
            left += weight * second * keep
            right += weight * second * keep * keep[:, None]
        whole = torch.cat((fc2.weight.double(), fc2.bias.double()[:, None]), 1)
        right.diagonal().add_(1e-5 * right.diagonal().mean())
        new = torch.linalg.solve(right, (whole @ left).T).T
        fc2.weight.copy_(new[:, :-1])
        fc2.bias.copy_(new[:, -1])


# ------------------------------------------------------------------------------------------ other dropouts


class ChannelDropout:
    """Every step drops units of all branches at random, by a mask: each kept with the same probability ('uniform'), or
    as many kept, the important ones more often ('weighted'). The share kept is uniform over 1/8 ... 1."""

    def __init__(self, bench, model, kind):
        self.bench, self.kind, self.masks, self.share = bench, kind, {}, 1.0
        sums = collect_statistics(model, bench.proxy, OBJECTIVES["label"], bench.device, moments=False)
        groups = piad.Groups.of(bench.full)
        self.modules = []
        for block, s in zip(model.blocks, sums, strict=True):
            for module, scores, size in (
                (block.attn.qkv, s.taylor_attn.sum((0, 1)), groups.sizes[0]),
                (block.mlp.fc1, s.taylor_mlp, groups.sizes[1]),
            ):
                self.modules.append((module, scores.unflatten(0, (-1, size)).sum(1), size))
        self.handles = [m.register_forward_hook(self._hook) for m, _, _ in self.modules]

    def _hook(self, module, _inputs, output):
        return output * self.masks[module]

    def __call__(self, step):
        generator = utils.keyed_generator(self.bench.seed, step)
        self.share = 1 / 8 + 7 / 8 * torch.rand((), generator=generator).item()
        for module, scores, size in self.modules:
            if self.kind == "uniform":
                kept = (torch.rand(len(scores), generator=generator) < self.share).float()
            else:
                count = max(round(self.share * len(scores)), 1)
                chosen = torch.multinomial(scores.clamp(min=1e-12 * scores.max()), count, generator=generator)
                kept = torch.zeros(len(scores)).scatter_(0, chosen, 1.0)
            self.masks[module] = kept.repeat_interleave(size).repeat(module.layer.groups)
        return [self.bench.full]

    def macs(self, _widths):
        """Only what is kept is counted, though masking computes everything."""
        empty = self.bench.shapes.macs(Widths.from_flat([0] * len(self.bench.full.flat)))
        return empty + self.share * (self.bench.shapes.macs(self.bench.full) - empty)

    def remove(self):
        for handle in self.handles:
            handle.remove()


def even_table(bench):
    """The same share of every branch, in units: for dropouts that do not say what goes first."""
    groups = piad.Groups.of(bench.full)
    steps = []
    for kept in range(piad.MLP_GROUPS, -1, -1):
        attn = -(-kept * piad.ATTN_GROUPS // piad.MLP_GROUPS) * groups.sizes[0]
        steps.append(Widths((attn,) * bench.shapes.depth, (kept * groups.sizes[1],) * bench.shapes.depth))
    return WidthTable(steps)


def draw_layers(bench):
    """LayerDrop: every branch is kept with the same probability, uniform over 1/8 ... 1."""

    def draw(step):
        generator = utils.keyed_generator(bench.seed, step)
        share = 1 / 8 + 7 / 8 * torch.rand((), generator=generator)
        kept = torch.rand(len(bench.full.flat), generator=generator) < share
        return [Widths.from_flat([w if k else 0 for w, k in zip(bench.full.flat, kept.tolist(), strict=True)])]

    return draw


def layer_table(bench, model):
    """Whole branches go, the one of least sensitivity per MAC among those left first, measured again after each."""
    table = WidthTable([bench.full])
    while any(table.steps[-1].flat):
        widths = table.steps[-1]
        set_widths(model, widths)
        gammas = piad.sensitivity(*branch_removal(model, bench.proxy, bench.device))
        costs = bench.shapes.unit_costs()
        branch = min((b for b, w in enumerate(widths.flat) if w), key=lambda b: gammas[b] / (widths.flat[b] * costs[b]))
        flat = list(widths.flat)
        flat[branch] = 0
        table.steps.append(Widths.from_flat(flat))
    return table


# ------------------------------------------------------------------------------------------ training


def train(bench, model, args, budget, draw=None, table=None, teacher=None, macs=None):
    """Train until ``budget`` MACs are spent. With a ``table`` and no ``draw`` PIAD: the table grows on the way."""
    run, criterion = Run(model, args, bench.device, BATCHES_PER_EPOCH), make_criterion(args)
    macs, full = macs or bench.shapes.macs, bench.shapes.macs(bench.full)
    costs = draw is None and main_train.measure_unit_costs(args, model, bench.shapes, bench.device)
    spent, epoch = 0.0, 0
    while spent < budget:
        if draw is None:
            share, before = min(spent / budget * 100, 99), table.last
            growth = (bench.proxy[:4], int(share), costs, piad.Groups.of(bench.full), args, bench.device)
            main_train.grow_table(model, table, bench.shapes, *growth)
            if table.last > before:
                # 1 forward pass, 1 for each block from its start, 3 for the statistics.
                spent += 4 * BATCH * (bench.shapes.depth + 5) * bench.shapes.macs(table.steps[before])
        drawing = draw or main_train.make_draw(table, bench.shapes, args)
        counter = {"macs": 0.0}

        def counted(step, drawing=drawing, counter=counter):
            subnets = drawing(step)
            counter["macs"] += BATCH * (3 * sum(map(macs, subnets)) + (full if teacher and teacher.network else 0))
            return subnets

        bench.batches.epoch = epoch
        train_one_epoch(run, bench.batches, criterion, epoch, draw=counted, teacher=teacher)
        spent, epoch = spent + counter["macs"], epoch + 1
        run.scheduler.step(min(spent / budget, 1) * args.epochs)
    return spent


def measure(args, seed, name):
    """One variant on one seed: {'top1': per share, 'macs': obtained, 'spent': MACs, 'seconds': ...}."""
    bench, (start, how, flags) = Bench(args, seed), VARIANTS[name]
    bench.weights()
    started = time.perf_counter()
    (model, memory), options = starting_network(bench, start), bench.flags(flags)
    teacher = main_train.make_teacher(options, bench.model, [])
    budget = args.passes * len(bench.batches.labels) * 3 * bench.shapes.macs(bench.full)
    table, spent = WidthTable([bench.full]), 0.0
    if how in (None, "table"):
        table = WidthTable(piad.steps_by_error(memory, piad.Groups.of(bench.full), bench.shapes, options.drop_ratio))
        options.mask_table = "stage 1's"  # complete: nothing is measured while training
    if how in ("piad", "table"):
        spent = train(bench, model, options, budget, table=table, teacher=teacher)
    elif how == "full":
        spent, table = train(bench, model, options, budget, lambda _: [bench.full]), even_table(bench)
    elif how == "layers":
        spent = train(bench, model, options, budget, draw_layers(bench))
        table = layer_table(bench, model)
    elif how in ("uniform", "weighted"):
        dropout = ChannelDropout(bench, model, how)
        spent, table = train(bench, model, options, budget, dropout, macs=dropout.macs), even_table(bench)
        dropout.remove()
    seconds = time.perf_counter() - started
    return {
        **score(bench, model, table, memory if start == "greedy" else None, calibrated=how in (None, "piad", "table")),
        **{"spent": spent, "steps": table.last, "seconds": seconds, "pretrained": bench.top1(bench.model)},
    }


def score(bench, model, table, memory, calibrated):
    """Top-1 at each share of the MACs, plain or with ``memory`` compensated; if asked for, ``calibrated`` as well."""
    result = {"top1": [], "macs": [], "calibrated": []}
    for share in SHARES:
        widths = table.steps[table.first_within(bench.shapes.macs, share * bench.shapes.macs(bench.full))]
        network = peel.extract(model, widths)
        if memory:
            compensate(network, model, widths, memory)
        result["top1"].append(bench.top1(network))
        result["macs"].append(bench.shapes.macs(widths))
        if calibrated:
            calibrate(network, model, bench.proxy, OBJECTIVES["feature"], bench.device)
            result["calibrated"].append(bench.top1(network))
    return result


# ------------------------------------------------------------------------------------------ reports


def job(args, seed, name):
    """Measure unless it has been, with these settings; a run that is stopped in between starts this variant again."""
    path = args.work / f"seed{seed}" / f"{name}.json"
    settings = [args.model, args.data_set, args.pretrain_passes, args.passes, args.lr, *VARIANTS[name]]
    if not path.is_file() or json.loads(path.read_text())["settings"] != settings:
        utils.save_text(json.dumps(measure(args, seed, name) | {"settings": settings}), path)
    return json.loads(path.read_text())


def pretrain(args, seed):
    Bench(args, seed).weights()


def run_all(args):
    """{variant: [result of each seed]}, measured in ``--workers`` processes."""
    args.work.mkdir(parents=True, exist_ok=True)
    results = {name: {} for name in args.variants}
    with ProcessPoolExecutor(args.workers) as pool:
        for future in [pool.submit(pretrain, args, seed) for seed in args.seeds]:
            future.result()
        jobs = {pool.submit(job, args, seed, name): (name, seed) for name in args.variants for seed in args.seeds}
        for future in as_completed(jobs):
            name, seed = jobs[future]
            results[name][seed] = future.result()
            top1 = " ".join(f"{value:5.2f}" for value in future.result()["top1"])
            print(f"seed {seed} {name:32s} {top1}  {future.result()['seconds']:.0f} s", flush=True)
    return {name: [results[name][seed] for seed in args.seeds] for name in args.variants}


def row(name, runs, member="top1"):
    cells = [spread([run[member][index] for run in runs]) for index in range(len(SHARES))]
    spent = sum(run["spent"] for run in runs) / len(runs) / 1e12
    seconds = sum(run["seconds"] for run in runs) / len(runs)
    return f"| {name} | " + " | ".join(f"{m:.2f}±{d:.2f}" for m, d in cells) + f" | {spent:.1f} | {seconds:.0f} |"


def calibrated_rows(results):
    """Variants whose extracted networks were refitted on the proxy images as well."""
    for name in ("no training, compensated", "PIAD, balanced", BEST):
        yield row(f"{name}; calibrated", results[name], "calibrated")


def gains(runs, base):
    """Differences in top-1 seed by seed: [(mean, sample standard deviation) of each share]."""
    pairs = list(zip(runs, base, strict=True))
    return [spread([run["top1"][i] - other["top1"][i] for run, other in pairs]) for i in range(len(SHARES))]


def clear(mean, deviation):
    return "**" if mean > deviation else ""


def option_rows(results):
    for name in OPTIONS:
        cells = gains(results[name], results["PIAD, balanced"])
        yield f"| {name} | " + " | ".join(f"{clear(m, d)}{m:+.2f}±{d:.2f}{clear(m, d)}" for m, d in cells) + " |"


def claims(results):
    """What the figures must show, decided from the figures: lines of Markdown."""
    others = ("uniform channel dropout", "weighted channel dropout", "LayerDrop")
    for index, share in enumerate(SHARES[2:], 2):
        lead = min(gains(results["PIAD, balanced"], results[o])[index][0] for o in others)
        yield f"- {share:.2f} of the MACs: PIAD above the best other dropout by {lead:.2f} points: {verdict(lead > 0)}"
    best = gains(results[BEST], results["PIAD, balanced"])
    for index in (3, 4, 5):
        mean, spread_ = best[index]
        yield (
            f"- {SHARES[index]:.2f} of the MACs: best recipe minus plain PIAD {mean:.2f} ± {spread_:.2f}; "
            f"clear of zero: {verdict(mean > spread_)}"
        )
    mean, spread_ = best[0]
    yield f"- all MACs: best recipe minus plain PIAD {mean:.2f} ± {spread_:.2f}; not below: {verdict(mean >= 0)}"
    for name in ("PIAD, balanced", BEST):
        mean, spread_ = gains(results[name], results["original network, trained on"])[0]
        yield (
            f"- all MACs: {name} minus the original trained on {mean:.2f} ± {spread_:.2f}; "
            f"at most 0.3 under it: {verdict(mean >= -0.3)}"
        )


def verdict(holds):
    return "yes" if holds else "no"


def report(results, args):
    columns = " | ".join(f"{share:.2f}" for share in SHARES)
    before = spread([run["pretrained"] for run in results["PIAD, balanced"]])
    minutes = sum(run["seconds"] for runs in results.values() for run in runs) / 60
    head = f"| top-1 at this share of the MACs | {columns} |"
    lines = [
        f"# Dropout training at equal compute: {args.model} on {args.data_set}\n",
        f"`python benchmarks/dropout.py`; {len(args.seeds)} seeds. Each variant trains for what {args.passes:g} "
        f"passes over the training set through the full network cost, from networks of top-1 {before[0]:.2f} ± "
        f"{before[1]:.2f}. "
        f"{minutes:.0f} minutes of one thread in all, pre-training apart, in {args.workers} processes on "
        f"{utils.machine_name(torch.device('cpu'))}. Mean ± sample standard deviation over seeds.\n",
        "10^12 MACs: what forward passes, backward passes (counted twice), importance passes and teachers came to; for "
        "channel dropout only the kept channels. Seconds: one thread, training only.\n",
        head + " 10^12 MACs | s |",
        "|---" * (len(SHARES) + 3) + "|",
        *(row(name, results[name]) for name in [*MAIN, BEST]),
        *calibrated_rows(results),
        "\n## Options against plain PIAD\n",
        "Difference to `PIAD, balanced`, seed by seed; bold where the mean gain is above its spread.\n",
        head,
        "|---" * (len(SHARES) + 1) + "|",
        *option_rows(results),
        "\n## What it shows\n",
        *claims(results),
        "\n## The paper's DeiT-S on ImageNet (its figures, not measured here)\n",
        "| share of the MACs | 4/12 | 8/12 |\n|---|---|---|",
        *(f"| {name} | {low} | {high} |" for name, (low, high) in PAPER_DEIT_S.items()),
    ]
    return "\n".join(lines) + "\n"


def draw_chart(results, path, title):
    """All variants, the upper end again on a scale of its own, and the paper's figures."""
    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), width_ratios=(1.4, 1.4, 1), layout="constrained")
    for name in [*MAIN, BEST]:
        means, deviations = zip(
            *(spread([r["top1"][i] for r in results[name]]) for i in range(len(SHARES))), strict=True
        )
        style = {"marker": "o", "markersize": 4, "capsize": 2, "linestyle": "--" if name.startswith("no") else "-"}
        for axis in axes[:2]:
            axis.errorbar(SHARES, means, yerr=deviations, label=name, **style)
    axes[0].set(xlabel="share of the full network's MACs", ylabel="top-1, %", title=title)
    top = max(r["top1"][0] for runs in results.values() for r in runs)
    axes[1].set(xlabel="share of the full network's MACs", ylim=(top - 6, top + 0.3), title="the same, upper end")
    for name, values in PAPER_DEIT_S.items():
        axes[2].plot((4 / 12, 8 / 12), values, marker="o", markersize=4, label=name)
    axes[2].set(xlabel="share of the MACs", ylabel="top-1, %", title="DeiT-S on ImageNet\n(the paper's figures)")
    for axis in axes:
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    axes[2].legend(fontsize=8)
    with utils.whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def main(args):
    results = run_all(args)
    if set(args.variants) == set(VARIANTS):
        utils.save_text(json.dumps(results, indent=1), args.output.with_suffix(".json"))
        text = report(results, args)
        utils.save_text(text, args.output.with_suffix(".md"))
        draw_chart(results, args.output.with_suffix(".png"), f"{args.model} on {args.data_set}, equal compute")
        print(text)


if __name__ == "__main__":
    utils.run_stage(main, get_args())
