"""What survives truncation without any training: stage 1 against unrotated orders and the paper's basis.

Every method cuts the same trained networks to the same widths and is scored on the same test images. Writes
<output>.json, .md and .png.
"""

import functools
import time
from pathlib import Path

import common
import torch
from common import UNROTATED, agreement, spread
from torch.nn import functional as F

import datasets
import utils
from models.vit.pretrained import ModelSpec, load_pretrained
from models.vit.widths import BRANCH_NAMES
from options import add_proxy_options, stage_parser

RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
SHARES = (5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)
# The paper's figures for DeiT-B on ImageNet, attention truncated to 1/4, 2/4, 3/4: not measured here.
PAPER_DEIT_B = {"random": (0.9, 24.4, 74.0), "magnitude": (1.7, 29.2, 71.9), "taylor": (6.0, 52.4, 78.1)}
PAPER_DEIT_B |= {"hessian": (5.1, 52.0, 78.2), "pca": (41.8, 76.9, 81.2)}
# Basis, order of hidden units, objective, how it is cut: 'calibrated' is compensated first.
PLAIN = {score: (score, None, "label", "plain") for score in UNROTATED}
PAPER, PAPER_COMPENSATED = (("pca", "hessian", "label", how) for how in ("plain", "compensated"))
GREEDY, CALIBRATED = (("balanced", "greedy", "label", how) for how in ("compensated", "calibrated"))
FEATURE = ("balanced", "greedy", "feature", "compensated")
METHODS = {
    "attn": {
        **PLAIN,
        "pca": ("pca", "taylor", "label", "plain"), "balanced": ("balanced", "taylor", "label", "plain"),
        "balanced, feature objective": ("balanced", "taylor", "feature", "plain"),
        "balanced, compensated": GREEDY, "balanced, calibrated": CALIBRATED,
    },
    "mlp": {
        **PLAIN,
        "hessian, compensated": ("balanced", "hessian", "label", "compensated"),
        "taylor, compensated": ("balanced", "taylor", "label", "compensated"), "greedy, compensated": GREEDY,
        "greedy, compensated, feature objective": FEATURE, "greedy, calibrated": CALIBRATED,
    },
    "both": {
        **PLAIN,
        "pca + hessian (paper)": PAPER, "pca + hessian, compensated": PAPER_COMPENSATED,
        "balanced + hessian": ("balanced", "hessian", "label", "plain"), "balanced + greedy, compensated": GREEDY,
        "the same, feature objective": FEATURE, "the same, calibrated": CALIBRATED,
    },
    "whole": {
        "paper's stage 1 (pca + hessian), table by sensitivity": PAPER, "the same, compensated": PAPER_COMPENSATED,
        "balanced + greedy, compensated, table by sensitivity": GREEDY,
        "balanced + greedy, compensated, table by error": GREEDY,
        "the same, feature objective": FEATURE, "the same, calibrated": CALIBRATED,
    },
}  # fmt: skip
BY_SENSITIVITY = list(METHODS["whole"])[:3]
SHOWN = {
    "attn": (*UNROTATED, "pca", "balanced", "balanced, compensated"),
    "mlp": ("random", "taylor", "hessian", "hessian, compensated", "greedy, compensated"),
    "both": ("hessian", "pca + hessian (paper)", "balanced + greedy, compensated", "the same, calibrated"),
}
TITLES = ("Attention only", "MLP only", "Attention and MLP", "Whole networks from a width table")


def get_args():
    parser = stage_parser(__doc__)
    add_proxy_options(parser)
    parser.add_argument("--pretrained", nargs="+", required=True, help="one trained network for each seed")
    parser.add_argument("--test-images", type=utils.positive_int, default=10000)
    parser.add_argument("--output", type=Path, required=True, help="path without suffix of the files to write")
    return parser.parse_args()


class Bench(common.Bench):
    def __init__(self, args, device, seed, path):
        train = datasets.load_images(args, train=True)
        model, _ = load_pretrained(
            ModelSpec(args.model, train.num_classes, args.input_size, args.eval_crop_ratio), path
        )
        proxy = list(datasets.proxy_loader(train, model, args, "proxy_samples"))
        test = common.load_tensors(args, model, train=False, count=args.test_images)
        super().__init__(model.eval().to(device), proxy, test, seed)
        self.statistics, self.start = functools.cache(self.statistics), functools.cache(self.start)
        self.reference = self.logits(self.supernet).log_softmax(1)

    def widths(self, setting, by_sensitivity, supernet, compensation):
        """The Widths to cut to. Whole networks are of stage 1's table, or of one grown by PIAD's importance at once."""
        if setting != "whole":
            shares = [[ratio if setting in (branch, "both") else 1 for branch in BRANCH_NAMES] for ratio in RATIOS]
            return [common.scaled(self.full, *pair) for pair in shares]
        dropout = self.dropout(1, None if by_sensitivity else compensation)
        dropout.grow(supernet, self.proxy, 0)
        return common.at_shares(dropout.table, self.costs, SHARES)

    def scores(self, setting, name):
        """{size: top-1 and agreement with the full network in per cent, KL(full || truncated) in nats} of a method."""
        *method, how = METHODS[setting][name]
        (supernet, compensation), result = self.start(*method), {}
        many = self.widths(setting, name in BY_SENSITIVITY, supernet, compensation)
        folded, proxy = None if how == "plain" else compensation, self.proxy if how == "calibrated" else None
        networks = common.cut(supernet, many, folded, proxy)
        for size, network in zip(SHARES if setting == "whole" else RATIOS, networks, strict=True):
            logs = self.logits(network).log_softmax(1)
            kl = F.kl_div(logs, self.reference, log_target=True, reduction="batchmean").item()
            same = agreement(logs, self.reference.argmax(1))
            result[f"{size:.4f}"] = {"top1": agreement(logs, self.labels), "kl": kl, "agreement": same}
        return result


def values(runs, setting, name, size, of):
    return [run[setting][name][size][of] for run in runs]


def row(runs, setting, name):
    yield name
    for size in runs[0][setting][name]:
        top1, kl, same = (values(runs, setting, name, size, of) for of in ("top1", "kl", "agreement"))
        yield f"{common.cell(top1, '.1f', '.1f')} / {common.cell(kl, '.2g', '.1g')} / {spread(same)[0]:.1f}"


def claims(runs):
    """What the figures must show, decided from the figures: lines of Markdown."""

    def lost(*at):
        return spread([run["full"]["top1"] for run in runs])[0] - spread(values(runs, *at, "top1"))[0]

    for setting, ours, theirs in (
        ("attn", "balanced", "pca"),
        ("both", "balanced + hessian", "pca + hessian (paper)"),
        ("both", "balanced + greedy, compensated", "pca + hessian, compensated"),
    ):
        for size in runs[0][setting][ours]:
            pairs = zip(*(values(runs, setting, name, size, "kl") for name in (theirs, ours)), strict=True)
            gains = [other - own for other, own in pairs]
            mean, deviation = spread(gains)
            text = f"{setting}, keep {float(size):.3g}: KL of `{theirs}` minus `{ours}` {mean:.2e} ± {deviation:.1e}; "
            text += "positive for every seed and above its spread"
            yield common.claim(text, mean > deviation and min(gains) > 0)
    for size in ("0.2500", "0.5000"):
        for plain, folded in (("hessian", "hessian"), ("taylor", "taylor"), ("hessian", "greedy")):
            before, after = lost("mlp", plain, size), lost("mlp", f"{folded}, compensated", size)
            text = f"MLP, keep {float(size):.3g}: points lost {before:.2f} plain in {plain} order, {after:.2f} "
            yield common.claim(f"{text}compensated in {folded} order; at least halved", after <= before / 2)
    ours, paper = (lost("both", n, "0.5000") for n in ("balanced + greedy, compensated", "pca + hessian (paper)"))
    text = f"both, keep 0.5: points lost {ours:.2f} ours, {paper:.2f} paper's; at most a fifth"
    yield common.claim(text, ours <= paper / 5)


def report(runs, images, args, device, seconds):
    top1, deviation = spread([run["full"]["top1"] for run in runs])
    yield (
        f"# Truncation without training: {args.model} on {args.data_set}\n\n"
        f"`benchmarks/truncation.sh`; {len(runs)} seed(s), {args.proxy_samples} proxy images, {images} test images, "
        f"{seconds / 60:.0f} minutes on {torch.get_num_threads()} thread(s) of {utils.machine_name(device)}. The full "
        f"networks: top-1 {top1:.2f} ± {deviation:.2f}.\n\n"
        "Each cell: top-1 in % / KL to the full network in nats / agreement with its prediction in %; mean ± sample "
        "standard deviation over seeds."
    )
    for title, (setting, names) in zip(TITLES, METHODS.items(), strict=True):
        words = "{:.3g} of MACs" if setting == "whole" else "keep {:.3g}"
        columns = [words.format(float(size)) for size in runs[0][setting][next(iter(names))]]
        lines = common.markdown(["", *columns], [row(runs, setting, name) for name in names])
        yield from [f"\n## {title}\n", *lines]
    yield from ["\n## What it shows\n", *claims(runs)]
    paper = common.markdown(["attention kept", "1/4", "2/4", "3/4"], [[n, *v] for n, v in PAPER_DEIT_B.items()])
    yield from ["\n## The paper's DeiT-B on ImageNet (its figures, not measured here)\n", *paper]


def charts(runs):
    """KL against the kept share for the main methods, and the paper's DeiT-B figures beside them."""
    x_label = {"xlabel": "kept share of the width"}
    for title, (setting, names) in zip(TITLES, SHOWN.items(), strict=False):
        curves = {name: [values(runs, setting, name, f"{ratio:.4f}", "kl") for ratio in RATIOS] for name in names}
        yield RATIOS, curves, {"title": title, "ylabel": "KL to the full network", "yscale": "log"} | x_label
    title = "DeiT-B on ImageNet, attention only\n(the paper's figures)"
    yield (0.25, 0.5, 0.75), PAPER_DEIT_B, {"title": title, "ylabel": "top-1, %"} | x_label


def main(args):
    device, started, runs = utils.start_up(args), time.time(), []
    for seed, path in enumerate(args.pretrained):
        bench = Bench(args, device, seed, path)
        runs.append({"full": {"top1": agreement(bench.reference, bench.labels)}})
        for setting, names in METHODS.items():
            runs[-1][setting] = {name: bench.scores(setting, name) for name in utils.progress(names, setting)}
        print(f"seed {seed}: {time.time() - started:.0f} s", flush=True)
    title, seconds = f"Truncation without training, {args.model} on {args.data_set}", time.time() - started
    common.write(args.output, runs, report(runs, len(bench.labels), args, device, seconds), title, charts(runs))


if __name__ == "__main__":
    utils.run_stage(main, get_args())
