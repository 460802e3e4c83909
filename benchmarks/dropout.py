"""Stage 2: PIAD against other dropouts, its options against plain PIAD, and the ceiling, at equal compute.

The task is to name both garments of two Fashion-MNIST images side by side, 100 classes: hard enough for a small network
that narrower ones lose. (The harder one that docs/stage2.md begins with, three images without augmentation: --data-set
FASHION_TRIPLES --model vit_triples. The easy one: --data-set FASHION_MNIST --model vit_fashion.) Every variant starts
from the same pre-trained network of a seed and trains until its forward and backward passes have spent the same MACs
(importance passes and teachers included); then one network is cut for each share of the MACs. The ceiling of a size is
that sub-network, compensated, trained by itself for as many MACs. What has been measured lies in --work, so a run that
was stopped goes on. Writes <output>.json, .md and .png.
"""

import argparse
import copy
import functools
import json
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import common
import torch
from common import claim, spread
from torch.nn import functional as F

import utils
from engine import mixup_and_criterion, train_one_epoch
from models.piad.distillation import Distillation
from models.piad.dropout import DropoutList
from models.piad.importance import ATTN_UNITS, MLP_UNITS, branch_removal, sensitivity
from models.piad.width_table import WidthTable
from models.vit.pretrained import ALIASES, ModelSpec, load_weights, read_checkpoint, save_checkpoint
from models.vit.supernet import as_supernet, branches, hooks, set_widths
from models.vit.widths import Widths
from models.wpac.compensation import attach
from models.wpac.statistics import OBJECTIVES, collect_statistics
from options import add_training_options, stage_parser
from training import TrainingRun

CPU = torch.device("cpu")
SMALL = {"patch_size": 7, "in_chans": 1, "embed_dim": 32, "depth": 4, "num_heads": 2, "mlp_ratio": 2}
ALIASES["vit_pairs"] = ("vit_tiny_patch16_224", {"img_size": (28, 56)} | SMALL)
ALIASES["vit_triples"] = ("vit_tiny_patch16_224", {"img_size": (28, 84)} | SMALL)
SIDE_BY_SIDE = {"FASHION_PAIRS": 2, "FASHION_TRIPLES": 3}
SHARES = (6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)
BATCH, BATCHES_PER_EPOCH = 128, 94  # the list grows, and the rate falls, after every 12,032 images
GROWTH = 35  # the list grows over the first so many per cent of the compute
RECIPE = "--opt adamw --unscale-lr --drop-path 0 --smoothing 0.1 --mixup 0 --cutmix 0 --no-model-ema --amp none"

# name -> (basis and order of the start, how it is trained, options of DropoutList, 'teacher', 'draws' an update)
MAIN = {
    "no training, plain": ("balanced", None, {}), "no training, compensated": ("balanced greedy", None, {}),
    "original network, trained on": ("taylor", "full", {}), "uniform channel dropout": ("random", "uniform", {}),
    "weighted channel dropout": ("taylor", "weighted", {}), "LayerDrop": ("taylor", "layers", {}),
    "PIAD, unrotated": ("taylor", "piad", {}), "PIAD, pca": ("pca", "piad", {}),
    "PIAD, balanced": ("balanced", "piad", {}),
}  # fmt: skip
OPTIONS = {
    "sampling by MACs": ("balanced", "piad", {"sampling": "macs"}),
    "sampling towards the ends": ("balanced", "piad", {"sampling": "ends"}),
    "largest always, in-place": ("balanced", "piad", {"always": ["largest"], "teacher": "inplace"}),
    "sandwich": ("balanced", "piad", {"always": ["largest", "smallest"]}),
    "sandwich, in-place": ("balanced", "piad", {"always": ["largest", "smallest"], "teacher": "inplace"}),
    "soft teacher": ("balanced", "piad", {"teacher": "soft"}),
    "whole table from stage 1": ("balanced greedy", "table", {}),
    "whole table, sampling by compute": ("balanced greedy", "table", {"sampling": "compute"}),
    "compensated slices": ("balanced greedy", "compensated", {}),
    "compensated slices, Taylor order": ("balanced taylor", "compensated", {}),
    "compensated, sampling by compute": ("balanced greedy", "compensated", {"sampling": "compute"}),
    "two draws an update, by compute": ("balanced greedy", "compensated", {"sampling": "compute", "per_batch": True}),
    "eight draws an update, by compute": (
        "balanced greedy", "compensated", {"sampling": "compute", "per_batch": True, "draws": 8},
    ),
}  # fmt: skip
CEILINGS = {f"ceiling, {share:.2f}": ("balanced greedy", "ceiling", {"share": share}) for share in SHARES[3:]}
# Trained by itself for as many updates as the default has, which is less compute.
CEILINGS |= {
    f"as many updates, {share:.2f}": ("balanced greedy", "ceiling", {"share": share, "updates": True})
    for share in SHARES[3:]
}
PLAIN, BEST = "PIAD, balanced", "compensated slices"  # the paper's recipe on our bases, and the default
VARIANTS = MAIN | OPTIONS | CEILINGS
# The paper's DeiT-S on ImageNet at 4/12 and 8/12 of the MACs: not measured here.
PAPER_DEIT_S = {"channel dropout": (7.3, 34.4), "weighted channel dropout": (34.2, 64.7)}
PAPER_DEIT_S |= {"LayerDrop": (39.7, 68.6), "PIAD": (70.6, 78.2)}
# Passes are over the training set; a variant spends what --passes through the full network cost.
FLAGS = {
    "model": "vit_pairs", "data_set": "FASHION_PAIRS", "data_path": "/usr/share/datasets/fashion-mnist",
    "seeds": [0, 1, 2], "variants": list(VARIANTS), "pretrain_passes": 8.0, "passes": 2.0, "lr": 1e-3, "workers": 2,
    "work": Path("output/dropout"), "output": Path("docs/dropout_pairs"),
}  # fmt: skip


@functools.cache
def load_data(spec, data_set, data_path):
    """[(images, labels) to train on, to test on], read once in a process. What stands side by side is grey."""
    args = argparse.Namespace(data_set=data_set, data_path=data_path)
    if data_set not in SIDE_BY_SIDE:
        return [common.load_tensors(args, spec.build(), train) for train in (True, False)]
    args.data_set, single = "FASHION_MNIST", ModelSpec("vit_fashion", 10).build()
    parts = [common.load_tensors(args, single, train) for train in (True, False)]
    return [(images[:, :1].contiguous(), labels) for images, labels in parts]


def paired(left, right):
    """Two batches (images, labels, ...) side by side."""
    return torch.cat((left[0], right[0]), 3), 10 * left[1] + right[1]


def seed_folder(args, seed):
    """Where one seed's network and results lie. Every task has a model of its own."""
    return args.work / args.model / f"seed{seed}"


class Bench(common.Bench):
    """The network of one seed, which is trained if it is not there yet."""

    def __init__(self, args, seed):
        torch.set_num_threads(1)
        self.count, self.augmented = SIDE_BY_SIDE.get(args.data_set, 1), args.data_set != "FASHION_TRIPLES"
        spec = ModelSpec(args.model, 10**self.count)
        self.data, test = load_data(spec, args.data_set, args.data_path)
        train_on, test = self._beside_others(self.data, 98), self._beside_others(test, 99)
        order = torch.randperm(len(train_on[1]), generator=utils.keyed_generator(seed))[:1024]
        proxy = [part.split(BATCH) for part in (*(tensor[order] for tensor in train_on), order)]
        super().__init__(spec.build(), list(zip(*proxy, strict=True)), test, seed)
        path = seed_folder(args, seed) / f"pretrained-{args.pretrain_passes:g}.pth"
        if not path.is_file():
            utils.seed_all(seed)
            supernet = as_supernet(spec.build())
            train(self, supernet, self.dropout(GROWTH, steps=[self.full]), 2e-3, args.pretrain_passes)
            save_checkpoint(supernet.state_dict(), path)
        load_weights(self.supernet, read_checkpoint(path)["model"], path)

    def _beside_others(self, data, seed):
        """Every image of (images, labels), and as many others beside it as there are to be."""
        result = data
        for index in range(self.count - 1):
            order = torch.randperm(len(data[1]), generator=torch.Generator().manual_seed(seed + 10 * index))
            result = paired(result, [tensor[order] for tensor in data])
        return result

    def top1(self, network):
        return common.agreement(self.logits(network), self.labels)

    def batches(self, epoch):
        """Training batches of an epoch, a list."""
        columns = [self._single_batches(epoch + 100_000 * index) for index in range(self.count)]
        return [(*functools.reduce(paired, row), row[0][2]) for row in zip(*columns, strict=True)]

    def _single_batches(self, epoch):
        """Images of all channels alike, shifted by up to two pixels and mirrored, if they are to be."""
        all_images, all_labels = self.data
        for position in range(BATCHES_PER_EPOCH):
            generator = utils.keyed_generator(self.seed, epoch, position)
            chosen = torch.randint(len(all_labels), (BATCH,), generator=generator)
            down, right = torch.randint(5, (2,), generator=generator).tolist()
            mirrored = torch.rand(BATCH, 1, 1, 1, generator=generator) < 0.5
            images = all_images[chosen]
            height, width = images.shape[-2:]
            if self.augmented:
                images = F.pad(images, (2, 2, 2, 2), mode="replicate")[..., down : down + height, right : right + width]
                images = torch.where(mirrored, images.flip(-1), images)
            yield images, all_labels[chosen], chosen


class ChannelDropout(DropoutList):
    """Every step drops units of all branches at random, by a mask: each kept with the same probability, or (weighted)
    as many kept, the important ones more often. The share kept is uniform over 1/8 ... 1."""

    def mask(self, supernet, proxy, weighted):
        """Mask the layers of ``supernet`` from here on. Returns the handles of the hooks that do."""
        self.weighted, self.masks, self.share, self.modules = weighted, {}, 1.0, []
        statistics = collect_statistics(supernet, proxy, OBJECTIVES["label"], moments=False)
        for branch, sums, size in zip(branches(supernet), statistics, self.units.sizes, strict=True):
            module = getattr(branch.module, branch.part.layers[0].name)
            self.modules.append((module, sums.taylor_by_width.unflatten(0, (-1, size)).sum(1), size))
        return [m.register_forward_hook(lambda m, _, output: output * self.masks[m]) for m, _, _ in self.modules]

    def draw(self, step, batch=0):
        generator = utils.keyed_generator(self.key[0], step)
        self.share = 1 / 8 + 7 / 8 * torch.rand((), generator=generator).item()
        for module, scores, size in self.modules:
            if self.weighted:
                count = max(round(self.share * len(scores)), 1)
                chosen = torch.multinomial(scores.clamp(min=1e-12 * scores.max()), count, generator=generator)
                kept = torch.zeros(len(scores)).scatter_(0, chosen, 1.0)
            else:
                kept = (torch.rand(len(scores), generator=generator) < self.share).float()
            self.masks[module] = kept.repeat_interleave(size).repeat(module.layer.groups)
        return self.table.steps

    def macs(self, widths):
        """Only what is kept is counted, though masking computes everything."""
        full, empty = (self.costs.macs(at) for at in (widths, Widths.from_flat([0] * len(widths.flat))))
        return empty + self.share * (full - empty)


class LayerDrop(DropoutList):
    """Every branch is kept with the same probability, uniform over 1/8 ... 1."""

    def draw(self, step, batch=0):
        generator, flat = utils.keyed_generator(self.key[0], step), self.units.full.flat
        share = 1 / 8 + 7 / 8 * torch.rand((), generator=generator)
        kept = (torch.rand(len(flat), generator=generator) < share).tolist()
        return [Widths.from_flat([width * keep for width, keep in zip(flat, kept, strict=True)])]


class Alone(DropoutList):
    """A network that is cut already, by itself. steps: its widths alone."""

    def draw(self, step, batch=0):
        return [None]

    def macs(self, _):
        return self.costs.macs(self.table.steps[0])


def layer_table(bench, supernet):
    """Whole branches go, the one of least sensitivity per MAC among those left first, measured again after each."""
    steps, costs = [bench.full], bench.costs.units()
    while any(steps[-1].flat):
        set_widths(supernet, steps[-1])
        gammas, flat = sensitivity(*branch_removal(supernet, bench.proxy)), list(steps[-1].flat)
        worth = {b: gammas[b] / (width * costs[b]) for b, width in enumerate(flat) if width}
        flat[min(worth, key=worth.get)] = 0
        steps.append(Widths.from_flat(flat))
    return WidthTable(steps)


def even_table(bench):
    """The same share of every branch, in units: for dropouts that do not say what goes first."""
    depth, (attn, mlp) = len(bench.full.attn), bench.units.sizes[:2]
    kept = [(-(-count * ATTN_UNITS // MLP_UNITS), count) for count in range(MLP_UNITS, -1, -1)]
    return WidthTable([Widths((heads * attn,) * depth, (hidden * mlp,) * depth) for heads, hidden in kept])


def train(bench, network, dropout, lr, passes, teacher=None, draws=1):
    """Train until what ``passes`` over the training set through the full network cost is spent. Returns MACs spent.

    draws: parts of a batch, each with sub-networks of its own.
    """
    parser, full = stage_parser(__doc__), bench.costs.macs(bench.full)
    add_training_options(parser, epochs=100, lr=lr, min_lr=1e-5, warmup_epochs=0)
    sizes = f"--batch-size {BATCH // draws} --accum-iter {draws}"
    args = parser.parse_args(f"{RECIPE} {sizes} --seed {bench.seed}".split())
    run, (_, criterion) = TrainingRun(network, args, CPU, BATCHES_PER_EPOCH * draws), mixup_and_criterion(args, None)
    budget, spent, epoch = passes * len(bench.data[1]) * 3 * full, 0.0, 0
    macs, taught = getattr(dropout, "macs", dropout.costs.macs), full if teacher and teacher.network else 0

    def draw(step, batch):
        nonlocal spent
        subnets = dropout.draw(step, batch)
        spent += args.batch_size * (3 * sum(map(macs, subnets)) + taught)
        return subnets

    while spent < budget:
        before = dropout.table.steps[-1]
        dropout.grow(network, bench.proxy[:4], int(min(spent / budget * 100, 99)))
        if dropout.table.steps[-1] != before:
            # 1 forward pass, 1 for each block from its start, 3 for the statistics.
            spent += 4 * BATCH * (len(before.attn) + 5) * bench.costs.macs(before)
        parts = [part for batch in bench.batches(epoch) for part in zip(*(t.chunk(draws) for t in batch), strict=True)]
        train_one_epoch(run, parts, criterion, epoch, teacher=teacher, draw=draw)
        epoch += 1
        run.scheduler.step(min(spent / budget, 1) * args.epochs)
    return spent


def measure(args, seed, name):
    """One variant on one seed: {'top1': per share, 'macs': obtained, 'spent': MACs, 'seconds': ...}."""
    bench, (start, how, options) = Bench(args, seed), VARIANTS[name]
    options, handles, started = dict(options), (), time.perf_counter()
    draws = options.pop("draws", 1 + options.get("per_batch", False))
    supernet, compensation = bench.start(*start.split())
    if how == "ceiling":
        return ceiling(bench, supernet, compensation, args, **options)
    if teacher := options.pop("teacher", None):
        teacher = Distillation(teacher, 0.5, 1.0, copy.deepcopy(bench.supernet) if teacher == "soft" else None)
    classes = {"uniform": ChannelDropout, "weighted": ChannelDropout, "layers": LayerDrop, "full": DropoutList}
    given = {"steps": [bench.full], "cls": classes[how]} if how in classes else options
    dropout = bench.dropout(GROWTH, compensation if how in (None, "table", "compensated") else None, **given)
    if how == "compensated":
        attach(supernet, compensation)
    if how in ("uniform", "weighted"):
        handles = dropout.mask(supernet, bench.proxy, how == "weighted")
    with hooks(handles):
        spent = train(bench, supernet, dropout, args.lr, args.passes, teacher, draws) if how else 0.0
    table, known = dropout.table, compensation if how == "compensated" or (not how and "greedy" in start) else None
    if how in classes:
        table = layer_table(bench, supernet) if how == "layers" else even_table(bench)
    result = {"spent": spent, "steps": table.last, "seconds": time.perf_counter() - started}
    result["pretrained"] = bench.top1(bench.supernet)
    sizes = common.at_shares(table, bench.costs, SHARES)
    result["macs"] = [bench.costs.macs(widths) for widths in sizes]
    result["top1"] = [bench.top1(network) for network in common.cut(supernet, sizes, known)]
    refitted = [] if how in classes else common.cut(supernet, sizes, known, bench.proxy)
    result["calibrated"] = [bench.top1(network) for network in refitted]
    return result


def ceiling(bench, supernet, compensation, args, share, updates=False):
    """What ``measure`` gives, for one size that is trained by itself: for the same compute, or for as many ``updates``
    as the whole table gets."""
    steps, macs = bench.dropout(1, compensation).table.steps, bench.costs.macs
    (widths,) = common.at_shares(WidthTable(steps), bench.costs, [share])
    (subnet,), started = common.cut(supernet, [widths], compensation), time.perf_counter()
    passes = args.passes * macs(widths) * len(steps) / sum(map(macs, steps)) if updates else args.passes
    spent = train(bench, subnet, Alone(bench.units, bench.costs, [widths]), args.lr, passes)
    seconds = time.perf_counter() - started
    return {"top1": [bench.top1(subnet)], "macs": [macs(widths)], "spent": spent, "seconds": seconds}


def job(args, name, seed):
    """Measure a variant unless it has been, with these settings. Without a name: pre-train."""
    if not name:  # several jobs would train the same network at the same time
        return Bench(args, seed).seed
    path = seed_folder(args, seed) / f"{name}.json"
    settings = [args.model, args.data_set, args.pretrain_passes, args.passes, args.lr, *VARIANTS[name]]
    if not path.is_file() or json.loads(path.read_text())["settings"] != settings:
        utils.save_text(json.dumps(measure(args, seed, name) | {"settings": settings}), path)
    result = json.loads(path.read_text())
    top1 = [f"{value:5.2f}" for value in result["top1"]]
    print(f"seed {seed} {name:32s}", *top1, f" {result['seconds']:.0f} s", flush=True)
    return result


def row(results, name, member="top1"):
    spent, seconds = (sum(run[key] for run in results[name]) / len(results[name]) for key in ("spent", "seconds"))
    cells = [common.cell(values) for values in zip(*(run[member] for run in results[name]), strict=True)]
    return [f"{name}; calibrated" if member == "calibrated" else name, *cells, f"{spent / 1e12:.1f}", f"{seconds:.0f}"]


def accuracies(results, name):
    """[shares, seeds]; of a ceiling, which has one share, [1, seeds]."""
    return torch.tensor([run["top1"] for run in results[name]], dtype=torch.float64).T


def gains(results, name, base=PLAIN):
    """Differences in top-1 seed by seed, for each share."""
    return (accuracies(results, name) - accuracies(results, base)).tolist()


def way(results, name, ceiling):
    """Share of the way from plain PIAD to a ceiling, in %, for each seed."""
    index, top = SHARES.index(CEILINGS[ceiling][2]["share"]), accuracies(results, ceiling)[0]
    own, plain = (accuracies(results, key)[index] for key in (name, PLAIN))
    return (100 * (own - plain) / (top - plain)).tolist()


def ceiling_rows(results, ceilings):
    """Top-1 of each ceiling, and how far towards it each variant comes."""
    yield ["trained by itself, top-1", *(common.cell(accuracies(results, name)[0].tolist()) for name in ceilings)]
    for name in results:
        if name not in CEILINGS and name != PLAIN and VARIANTS[name][1] in ("table", "compensated"):
            yield [f"{name}, %", *(common.cell(way(results, name, top), ".0f", ".0f") for top in ceilings)]


def option_row(results, name):
    yield name
    for values in gains(results, name):
        mean, deviation = spread(values)
        clear = "**" if mean > deviation else ""
        yield f"{clear}{common.cell(values, '+.2f')}{clear}"


def claims(results):
    """What the figures must show, decided from the figures: lines of Markdown."""
    others = [n for n in ("uniform channel dropout", "weighted channel dropout", "LayerDrop") if n in results]
    for index, share in enumerate(SHARES[2:] if others else (), 2):
        lead = min(spread(gains(results, PLAIN, other)[index])[0] for other in others)
        yield claim(f"{share:.2f} of the MACs: PIAD above the best other dropout by {lead:.2f} points", lead > 0)
    for share, values in zip(SHARES, gains(results, BEST), strict=True):
        mean, deviation = spread(values)
        text = f"{share:.2f} of the MACs: {BEST} minus plain PIAD {mean:.2f} ± {deviation:.2f}; clear of zero"
        yield claim(text, mean > deviation)
    for ceiling in (name for name in CEILINGS if name in results and name.startswith("ceiling")):
        mean, deviation = spread(way(results, BEST, ceiling))
        text = f"{ceiling}: {BEST} come {mean:.0f} ± {deviation:.0f} % of the way; at least half, clear of the spread"
        yield claim(text, mean - deviation >= 50)
    for name in (PLAIN, BEST):
        mean, deviation = spread(gains(results, name, "original network, trained on")[0])
        text = f"1.00 of the MACs: {name} minus the original trained on {mean:.2f} ± {deviation:.2f}"
        yield claim(f"{text}; not below", mean >= 0)


def report(results, args):
    head = ["top-1 at this share of the MACs", *(f"{share:.2f}" for share in SHARES)]
    before, deviation = spread([run["pretrained"] for run in results[PLAIN]])
    minutes = sum(run["seconds"] for runs in results.values() for run in runs) / 60
    settings = ("data_set", "model", "pretrain_passes", "passes", "lr", "output")
    changed = [f" --{n.replace('_', '-')} {getattr(args, n)}" for n in settings if getattr(args, n) != FLAGS[n]]
    changed += [] if len(results) == len(VARIANTS) else [" --variants", *(f' "{name}"' for name in results)]
    yield (
        f"# Dropout training at equal compute: {args.model} on {args.data_set}\n\n"
        f"`python benchmarks/dropout.py{''.join(changed)}`; {len(args.seeds)} seeds. Each variant trains for what "
        f"{args.passes:g} passes over the training set through the full network cost, from networks of top-1 "
        f"{before:.2f} ± {deviation:.2f}. "
        f"{minutes:.0f} minutes of one thread in all, pre-training apart, in {args.workers} processes on "
        f"{utils.machine_name(CPU)}. Mean ± sample standard deviation over seeds.\n\n"
        "10^12 MACs: what forward passes, backward passes (counted twice), importance passes and teachers came to; for "
        "channel dropout only the kept channels. Seconds: one thread, training only.\n"
    )
    ceilings = [name for name in CEILINGS if name in results]
    shown = [name for name in results if name not in CEILINGS]
    refitted = [name for name in shown if results[name][0]["calibrated"]]  # on the proxy images, after extraction
    rows = [row(results, name) for name in shown] + [row(results, name, "calibrated") for name in refitted]
    yield from common.markdown([*head, "10^12 MACs", "s"], rows)
    yield "\n## Against plain PIAD\n"
    yield f"Difference to `{PLAIN}`, seed by seed; bold where the mean gain is above its spread.\n"
    yield from common.markdown(head, [option_row(results, name) for name in shown if name in OPTIONS])
    if ceilings:
        yield f"\n## Towards the ceiling\n\nShare of the way from `{PLAIN}` to the size that is trained by itself.\n"
        yield from common.markdown(["", *ceilings], ceiling_rows(results, ceilings))
    yield from ["\n## What it shows\n", *claims(results)]
    paper = common.markdown(["share of the MACs", "4/12", "8/12"], [[n, *v] for n, v in PAPER_DEIT_S.items()])
    yield from ["\n## The paper's DeiT-S on ImageNet (its figures, not measured here)\n", *paper]


def charts(results):
    """The main variants, how far their options are above plain PIAD on the same seeds, and the paper's figures."""
    shown = [name for name in [*MAIN, BEST] if name in results]
    curves = {name: list(zip(*(run["top1"] for run in results[name]), strict=True)) for name in shown}
    labels = {"xlabel": "share of the full network's MACs", "ylabel": "top-1, %"}
    yield SHARES, curves, labels
    above = {name: gains(results, name) for name in results if name in OPTIONS}
    yield SHARES, above, labels | {"ylabel": "points", "title": f"above {PLAIN}"}
    yield (4 / 12, 8 / 12), PAPER_DEIT_S, labels | {"title": "DeiT-S on ImageNet\n(the paper's figures)"}


def main(args):
    with ProcessPoolExecutor(args.workers) as pool:
        list(pool.map(functools.partial(job, args, None), args.seeds))
        wanted = {*args.variants, PLAIN, BEST, "original network, trained on"}  # which the report compares with
        names = [name for name in VARIANTS if name in wanted]
        jobs = {name: [pool.submit(job, args, name, seed) for seed in args.seeds] for name in names}
        results = {name: [future.result() for future in futures] for name, futures in jobs.items()}
    title = f"{args.model} on {args.data_set}, equal compute"
    common.write(args.output, results, report(results, args), title, charts(results))


if __name__ == "__main__":
    utils.run_stage(main, common.arguments(__doc__, **FLAGS))
