"""What survives truncation without any training: stage 1 against unrotated orders and the paper's basis.

Every method cuts the same trained networks to the same widths and is scored on the same test images. Writes
<output>.json, .md and .png.
"""

import copy
import json
import sys
import time
from pathlib import Path

import matplotlib
import torch
from torch.nn import functional as F
from tqdm import tqdm

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import utils
from engine import branch_removal
from models import peel, piad
from models.calibration import calibrate
from models.compensation import compensate
from models.cost import Shapes
from models.statistics import OBJECTIVES, collect_statistics
from models.supernet import as_supernet, full_widths, set_widths
from models.vit import ModelSpec, load_pretrained
from models.width_table import Widths, WidthTable
from models.wpac import reparameterise
from options import add_proxy_options, stage_parser

RATIOS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 3 / 4)
DROP_RATIO = 0.875
SHARES = (5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)
UNROTATED = ("random", "magnitude", "taylor", "hessian")
# The paper's figures for DeiT-B on ImageNet, attention truncated to 1/4, 2/4, 3/4: not measured here.
PAPER_DEIT_B = {
    "random": (0.9, 24.4, 74.0),
    "magnitude": (1.7, 29.2, 71.9),
    "taylor": (6.0, 52.4, 78.1),
    "hessian": (5.1, 52.0, 78.2),
    "pca": (41.8, 76.9, 81.2),
}


def get_args():
    parser = stage_parser(__doc__)
    add_proxy_options(parser)
    parser.add_argument("--pretrained", nargs="+", required=True, help="one trained network for each seed")
    parser.add_argument("--test_images", type=utils.positive_int, default=10000)
    parser.add_argument("--output", type=Path, required=True, help="path without suffix of the files to write")
    return parser.parse_args()


# ------------------------------------------------------------------------------------------ methods


@torch.no_grad()
def sort_unrotated(model, sums, kind, seed):
    """Permute the dimensions of every head (q with k, v with o) and the hidden units by a plain score, in place."""
    generator = torch.Generator().manual_seed(seed)
    for block, s in zip(model.blocks, sums, strict=True):
        heads, width = block.num_heads, block.attn.qkv.width
        qkv = block.attn.qkv.weight.view(3, heads, width, -1)
        proj = block.attn.proj.weight.view(-1, heads, width)
        fc1, fc2 = block.mlp.fc1, block.mlp.fc2
        if kind == "random":
            qk, vo = torch.rand(2, heads, width, generator=generator)
            hidden = torch.rand(len(fc1.weight), generator=generator)
        elif kind == "magnitude":
            qk, vo = qkv[0].norm(dim=-1) * qkv[1].norm(dim=-1), qkv[2].norm(dim=-1) * proj.norm(dim=0)
            hidden = fc1.weight.norm(dim=1) * fc2.weight.norm(dim=0)
        else:
            q, k, vo = s.taylor_attn if kind == "taylor" else s.hessian_attn
            qk, hidden = q + k, s.taylor_mlp if kind == "taylor" else s.hessian_mlp
        for head in range(heads):
            for score, rows in ((qk, (0, 1)), (vo, (2,))):
                order = score[head].argsort(descending=True)
                for row in rows:
                    qkv[row, head] = qkv[row, head][order]
                    bias = block.attn.qkv.bias.view(3, heads, width)
                    bias[row, head] = bias[row, head][order]
                if rows == (2,):
                    proj[:, head] = proj[:, head][:, order]
        order = hidden.argsort(descending=True)
        fc1.weight.copy_(fc1.weight[order])
        fc1.bias.copy_(fc1.bias[order])
        fc2.weight.copy_(fc2.weight[:, order])


class Bench:
    """One trained network, its statistics and its test images; variants of it are made once and kept."""

    def __init__(self, model, proxy, images, labels, device, seed):
        self.model, self.proxy, self.device, self.seed = model, proxy, device, seed
        self.images, self.labels = images, labels
        self.shapes, self.full = Shapes.of(model), full_widths(model)
        self.sums = {
            name: collect_statistics(model, proxy, OBJECTIVES[name], device, hidden=True) for name in OBJECTIVES
        }
        self.variants = {}
        self.reference = self.logits(model).log_softmax(1)

    def variant(self, basis, order="taylor", objective="label"):
        """(super-network, memory) of an unrotated order or of a basis with an order of the hidden units."""
        key = (basis, order, objective)
        if key not in self.variants:
            model, memory = copy.deepcopy(self.model), None
            if basis in UNROTATED:
                sort_unrotated(model, self.sums[objective], basis, self.seed)
            else:
                memory = reparameterise(model, self.sums[objective], basis, order)
            self.variants[key] = (model, memory)
        return self.variants[key]

    @torch.inference_mode()
    def logits(self, network):
        return torch.cat([network(images.to(self.device)).double().cpu() for images in self.images.split(500)])

    def score(self, network):
        """top-1 and agreement with the full network in per cent, and KL(full || truncated) in nats."""
        logs = self.logits(network).log_softmax(1)
        divergence = F.kl_div(logs, self.reference, log_target=True, reduction="batchmean").item()
        agreement = (logs.argmax(1) == self.reference.argmax(1)).double().mean().item()
        return {"top1": 100 * self.accuracy(logs), "kl": divergence, "agreement": 100 * agreement}

    def accuracy(self, logs):
        return (logs.argmax(1) == self.labels).double().mean().item()

    def cut(self, variant, widths, how="plain"):
        """An extracted network: plain, compensated, or compensated and calibrated on the proxy images."""
        model, memory = variant
        network = peel.extract(model, widths)
        if how != "plain":
            compensate(network, model, widths, memory)
        if how == "calibrated":
            calibrate(network, model, self.proxy, OBJECTIVES["feature"], self.device)
        return network


def widths_at(full, ratio, setting):
    """All blocks' attention, MLP or both at ``ratio`` of their width."""
    attn = tuple(max(int(w * ratio), 1) for w in full.attn) if setting != "mlp" else full.attn
    mlp = tuple(int(w * ratio) for w in full.mlp) if setting != "attn" else full.mlp
    return Widths(attn, mlp)


# setting -> [(name in the tables, arguments of Bench.variant, how it is cut)]
SETTINGS = {
    "attn": [(kind, (kind,), "plain") for kind in UNROTATED]
    + [("pca", ("pca",), "plain"), ("balanced", ("balanced",), "plain")]
    + [("balanced, feature objective", ("balanced", "taylor", "feature"), "plain")]
    + [("balanced, calibrated", ("balanced", "greedy"), "calibrated")],
    "mlp": [(kind, (kind,), "plain") for kind in UNROTATED]
    + [(f"{o}, compensated", ("balanced", o), "compensated") for o in ("hessian", "taylor", "greedy")]
    + [("greedy, compensated, feature objective", ("balanced", "greedy", "feature"), "compensated")]
    + [("greedy, calibrated", ("balanced", "greedy"), "calibrated")],
    "both": [(kind, (kind,), "plain") for kind in UNROTATED]
    + [("pca + hessian (paper)", ("pca", "hessian"), "plain")]
    + [("pca + hessian, compensated", ("pca", "hessian"), "compensated")]
    + [("balanced + hessian", ("balanced", "hessian"), "plain")]
    + [("balanced + greedy, compensated", ("balanced", "greedy"), "compensated")]
    + [("the same, feature objective", ("balanced", "greedy", "feature"), "compensated")]
    + [("the same, calibrated", ("balanced", "greedy"), "calibrated")],
}


def truncations(bench):
    """{setting: {method: {ratio: scores}}}."""
    results = {}
    for setting, methods in SETTINGS.items():
        for name, variant, how in tqdm(methods, desc=setting, leave=False, disable=None):
            for ratio in RATIOS:
                network = bench.cut(bench.variant(*variant), widths_at(bench.full, ratio, setting), how)
                results.setdefault(setting, {}).setdefault(name, {})[f"{ratio:.4f}"] = bench.score(network)
    return results


# ------------------------------------------------------------------------------------------ whole networks


def error_table(bench, variant):
    """The table that stage 1 writes, by the closed-form errors."""
    return WidthTable(piad.steps_by_error(variant[1], piad.Groups.of(bench.full), bench.shapes, DROP_RATIO))


def sensitivity_table(bench, variant):
    """A table grown in one go by PIAD's importance, measured on the full network."""
    model = variant[0]
    set_widths(model, bench.full)
    gammas = piad.sensitivity(*branch_removal(model, bench.proxy, bench.device))
    sums = collect_statistics(model, bench.proxy, OBJECTIVES["label"], bench.device, moments=False)
    groups, steps = piad.Groups.of(bench.full), [bench.full]
    importance = piad.unit_importance(gammas, sums, bench.full, groups, bench.shapes.unit_costs())
    piad.grow(steps, importance, groups, bench.shapes.macs, bench.shapes.macs(bench.full) * (1 - DROP_RATIO))
    return WidthTable(steps)


WHOLE = [
    ("paper's stage 1 (pca + hessian), table by sensitivity", ("pca", "hessian"), sensitivity_table, "plain"),
    ("the same, compensated", ("pca", "hessian"), sensitivity_table, "compensated"),
    ("balanced + greedy, compensated, table by sensitivity", ("balanced", "greedy"), sensitivity_table, "compensated"),
    ("balanced + greedy, compensated, table by error", ("balanced", "greedy"), error_table, "compensated"),
    ("the same, feature objective", ("balanced", "greedy", "feature"), error_table, "compensated"),
    ("the same, calibrated", ("balanced", "greedy"), error_table, "calibrated"),
]


def whole_networks(bench):
    """{method: {share of the MACs: scores}}, widths taken from each method's own table."""
    results, full_macs = {}, bench.shapes.macs(bench.full)
    for name, key, make_table, how in WHOLE:
        variant = bench.variant(*key)
        table = make_table(bench, variant)
        for share in SHARES:
            step = table.first_within(bench.shapes.macs, share * full_macs)
            results.setdefault(name, {})[f"{share:.4f}"] = bench.score(bench.cut(variant, table.steps[step], how))
    return results


# ------------------------------------------------------------------------------------------ reports


def spread(values):
    """Mean and sample standard deviation."""
    values = torch.tensor(values, dtype=torch.float64)
    return values.mean().item(), values.std().item() if len(values) > 1 else 0.0


def cell(runs):
    """top-1 +- spread / KL +- spread of one method at one size, over seeds."""
    top1, kl, agreement = (spread([run[name] for run in runs]) for name in ("top1", "kl", "agreement"))
    return f"{top1[0]:.1f}±{top1[1]:.1f} / {kl[0]:.2g}±{kl[1]:.1g} / {agreement[0]:.1f}"


def as_rows(runs, title, columns):
    """A Markdown table of {method: {size: scores}} over seeds."""
    lines = [f"\n## {title}\n", "| | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name in runs[0]:
        cells = [cell([run[name][size] for run in runs]) for size in runs[0][name]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def claims(runs):
    """What the figures must show, decided from the figures: lines of Markdown."""
    lines = ["\n## What it shows\n"]
    for setting, ours, theirs in (
        ("attn", "balanced", "pca"),
        ("both", "balanced + hessian", "pca + hessian (paper)"),
        ("both", "balanced + greedy, compensated", "pca + hessian, compensated"),
    ):
        for ratio in runs[0][setting][ours]:
            gains = [r[setting][theirs][ratio]["kl"] - r[setting][ours][ratio]["kl"] for r in runs]
            mean, deviation = spread(gains)
            verdict = "yes" if mean > deviation and min(gains) > 0 else "no"
            lines.append(
                f"- {setting}, keep {float(ratio):.3g}: KL of `{theirs}` minus `{ours}` {mean:.2e} ± {deviation:.1e}; "
                f"positive for every seed and above its spread: {verdict}"
            )
    for ratio in ("0.2500", "0.5000"):
        lost = {
            name: spread([r["full"]["top1"] - r["mlp"][name][ratio]["top1"] for r in runs])[0]
            for name in runs[0]["mlp"]
        }
        for plain, folded in (("hessian",) * 2, ("taylor",) * 2, ("hessian", "greedy")):
            before, after = lost[plain], lost[f"{folded}, compensated"]
            lines.append(
                f"- MLP, keep {float(ratio):.3g}: points lost {before:.2f} plain in {plain} order, {after:.2f} "
                f"compensated in {folded} order; at least halved: {'yes' if after <= before / 2 else 'no'}"
            )
    ours, theirs = "balanced + greedy, compensated", "pca + hessian (paper)"
    ratio = "0.5000"
    lost, paper = (spread([r["full"]["top1"] - r["both"][n][ratio]["top1"] for r in runs])[0] for n in (ours, theirs))
    verdict = "yes" if lost <= paper / 5 else "no"
    lines.append(f"- both, keep 0.5: points lost {lost:.2f} ours, {paper:.2f} paper's; at most a fifth: {verdict}")
    return lines


def draw(runs, path, title):
    """KL and top-1 against the kept share for the main methods; the paper's DeiT-B figures beside them."""
    figure, axes = plt.subplots(1, 4, figsize=(17, 4.3), layout="constrained")
    shown = {
        "attn": ("random", "magnitude", "taylor", "hessian", "pca", "balanced"),
        "mlp": ("random", "taylor", "hessian", "hessian, compensated", "greedy, compensated"),
        "both": ("hessian", "pca + hessian (paper)", "balanced + greedy, compensated", "the same, calibrated"),
    }
    names = {"attn": "attention only", "mlp": "MLP only", "both": "attention and MLP"}
    for axis, (setting, methods) in zip(axes, shown.items(), strict=False):
        for method in methods:
            means, spreads = zip(
                *(spread([r[setting][method][s]["kl"] for r in runs]) for s in runs[0][setting][method]), strict=True
            )
            axis.errorbar(RATIOS, means, yerr=spreads, marker="o", markersize=4, capsize=2, label=method)
        axis.set(yscale="log", xlabel="kept share of the width", ylabel="KL to the full network", title=names[setting])
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    for method, values in PAPER_DEIT_B.items():
        axes[3].plot((0.25, 0.5, 0.75), values, marker="o", markersize=4, label=method)
    axes[3].set(
        xlabel="kept share of the width",
        ylabel="top-1, %",
        title="DeiT-B on ImageNet, attention only\n(the paper's figures)",
    )
    axes[3].grid(alpha=0.3)
    axes[3].legend(fontsize=8)
    figure.suptitle(title)
    with utils.whole_file(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")


def report(runs, args, seconds):
    tops = spread([run["full"]["top1"] for run in runs])
    lines = [
        f"# Truncation without training: {args.model} on {args.data_set}\n",
        f"`benchmarks/truncation.sh`; {len(runs)} seed(s), {args.proxy_samples} proxy images, {args.test_images} test "
        f"images, {seconds / 60:.0f} minutes on {torch.get_num_threads()} thread(s) of {args.machine}. The full "
        f"networks: top-1 {tops[0]:.2f} ± {tops[1]:.2f}.\n",
        "Each cell: top-1 in % / KL to the full network in nats / agreement with its prediction in %; mean ± sample "
        "standard deviation over seeds.",
    ]
    columns = [f"keep {r:.3g}" for r in RATIOS]
    for setting, title in (("attn", "Attention only"), ("mlp", "MLP only"), ("both", "Attention and MLP")):
        lines += as_rows([run[setting] for run in runs], title, columns)
    lines += as_rows(
        [run["whole"] for run in runs], "Whole networks from a width table", [f"{s:.3g} of MACs" for s in SHARES]
    )
    lines += claims(runs)
    lines += [
        "\n## The paper's DeiT-B on ImageNet (its figures, not measured here)\n",
        "| attention kept | 1/4 | 2/4 | 3/4 |",
    ]
    lines += ["|---|---|---|---|", *(f"| {m} | " + " | ".join(map(str, v)) + " |" for m, v in PAPER_DEIT_B.items())]
    return "\n".join(lines) + "\n"


def main(args):
    device = utils.start_up(args)
    args.machine = utils.machine_name(device)
    started, runs = time.time(), []
    for seed, path in enumerate(args.pretrained):
        train, test = (datasets.load_images(args, train=split) for split in (True, False))
        spec = ModelSpec(args.model, datasets.count_classes(train), args.input_size)
        model = as_supernet(load_pretrained(spec, path)[0].eval().to(device))
        transform = datasets.eval_transform(args, datasets.data_config(model))
        args.test_images = min(args.test_images, len(test))
        pairs = [test[index] for index in range(args.test_images)]
        images, labels = torch.stack([transform(image) for image, _ in pairs]), torch.tensor([y for _, y in pairs])
        bench = Bench(
            model, list(datasets.proxy_loader(train, transform, args, args.proxy_samples)), images, labels, device, seed
        )
        run = {"full": {"top1": 100 * bench.accuracy(bench.reference)}} | truncations(bench)
        runs.append(run | {"whole": whole_networks(bench)})
        print(f"seed {seed}: {time.time() - started:.0f} s", flush=True)
    text = report(runs, args, time.time() - started)
    utils.save_text(json.dumps(runs, indent=1), args.output.with_suffix(".json"))
    utils.save_text(text, args.output.with_suffix(".md"))
    draw(runs, args.output.with_suffix(".png"), f"Truncation without training, {args.model} on {args.data_set}")
    print(text)


if __name__ == "__main__":
    utils.run_stage(main, get_args())
