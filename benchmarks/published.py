"""Prints the published sub-networks, with MACs and parameters computed here, and draws their accuracy against MACs."""

import csv
from functools import cache
from pathlib import Path

import common
import numpy as np
import torch
from matplotlib.figure import Figure

from models.vit.cost import PAPER, Costs
from models.vit.widths import Widths
from utils import quantity, with_unit

DOCS = Path(__file__).parents[1] / "docs"
ROWS = list(csv.DictReader((DOCS / "results.csv").open()))  # MACs and parameters as printed, accuracies of the paper
TITLES = {"budget": "budget in the paper", "model": "super-network", "step": "step", "macs": "MACs"}
TITLES |= {"parameters": "parameters", "top1": "top-1, the paper's", "tuned": "fine-tuned, the paper's", "here": "here"}
# The paper's two tables and that of all rows: {column that a row must have: columns that are not shown}.
TABLES = {"budget": ["tuned"], "tuned": ["budget", "top1"], "step": ["budget", "tuned"]}


@cache
def deit_costs(model):
    with torch.device("meta"):
        return Costs.of(common.random_supernet(model))


def printed(row, widths):
    """MACs and parameters of ``widths`` as the paper prints them."""
    costs = deit_costs(row["model"])
    return {"macs": with_unit(costs.macs(widths)), "parameters": with_unit(costs.parameters(widths))}


def widths_of(row):
    """Widths that have the MACs and the parameters of a row to the printed digit; None if no widths have both.

    Both are linear in the numbers of kept branches and units. So for every number of attentions, MLPs and attention
    units the MACs leave one number of units of the MLPs, or one more or less by the rounding.
    """
    costs = deit_costs(row["model"])
    if row["step"] == "0":
        return costs.full
    depth, (attn, mlp) = len(costs.full.attn), (costs.full.attn[0] // 8, costs.full.mlp[0] // 32)
    attns, mlps, kept, more = np.ogrid[1 : depth + 1, 1 : depth + 1, 1 : 8 * depth + 1, -1:2]

    def rest(convention):
        """All that does not grow with the MLPs' units, [attns, mlps, kept, 1], and one such unit."""
        of_attn, of_mlp = costs.units(convention)[:2]
        flats = ([index == one for index in range(2 * depth)] for one in (-1, 0, 1))
        base, one_attn, one_mlp = (costs.macs(Widths.from_flat(flat), convention) for flat in flats)
        branches = attns * (one_attn - base - of_attn) + mlps * (one_mlp - base - of_mlp)
        return base + branches + kept * attn * of_attn, mlp * of_mlp

    def spread(units, branches, size):
        return tuple(size * ((units + i) // branches) if i < branches else 0 for i in range(depth))

    (fixed, unit), (fixed_parameters, unit_parameters) = rest(PAPER), rest({"parameters": 1})
    units = np.rint((quantity(row["macs"]) - fixed) / unit).astype(int) + more
    near = abs(fixed_parameters + units * unit_parameters - quantity(row["parameters"])) < 1e4
    near &= (kept >= attns) & (kept <= 8 * attns) & (units >= mlps) & (units <= 32 * mlps)
    for a, m, k, i in np.argwhere(near)[::-1]:
        widths = Widths(spread(k + 1, a + 1, attn), spread(units[a, m, k, i], m + 1, mlp))
        if printed(row, widths).items() <= row.items():
            return widths


def tables():
    """The lines of the tables in Markdown."""
    for wanted, hidden in TABLES.items():
        names = [name for name in TITLES if name not in hidden]
        yield from ("| " + " | ".join(TITLES[name] for name in names) + " |", "|---" * len(names) + "|")
        for row in (row | printed(row, widths_of(row)) | {"here": "not run"} for row in ROWS if row[wanted]):
            yield "| " + " | ".join(row[name] or "-" for name in names) + " |"
        yield ""


def draw(path):
    axes = (figure := Figure(figsize=(7.5, 4.6), layout="constrained")).subplots()
    for model, style in (("vit_base", "o-"), ("vit_small", "s-"), ("vit_tiny", "^-")):
        rows = [row for row in ROWS if row["model"] == model and row["top1"]]
        points = [(quantity(row["macs"]) / 1e9, float(row["top1"])) for row in rows]
        axes.plot(*zip(*points, strict=True), style, label=model)
    axes.set(xlabel="MACs per image, G (the paper's convention)", ylabel="top-1 on ImageNet-1k, %, the paper's")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


if __name__ == "__main__":
    print("\n".join(tables()))
    draw(DOCS / "results.png")
