"""The published sub-networks, and widths that have their MACs and parameters."""

import csv
from functools import cache
from pathlib import Path

import common
import numpy as np
import torch

from models.vit.cost import PAPER, Costs
from models.vit.widths import Widths
from utils import quantity, with_unit

DOCS = Path(__file__).parents[1] / "docs"
ROWS = list(csv.DictReader((DOCS / "results.csv").open()))  # MACs and parameters as printed, accuracies of the paper


@cache
def deit_costs(model):
    with torch.device("meta"):
        return Costs.of(common.random_supernet(model))


def widths_of(row):
    """Widths that have the MACs and the parameters of a row to the printed digit; None if no widths have both.

    Both are linear in the numbers of kept branches and units. So for every number of attentions, MLPs and attention
    units the MACs leave one number of units of the MLPs.
    """
    costs = deit_costs(row["model"])
    if row["step"] == "0":
        return costs.full
    depth, (attn, mlp) = len(costs.full.attn), (costs.full.attn[0] // 8, costs.full.mlp[0] // 32)
    attns, mlps, kept = np.ogrid[1 : depth + 1, 1 : depth + 1, 1 : 8 * depth + 1]

    def rest(convention):
        """All that does not grow with the MLPs' units, [attns, mlps, kept], and one such unit."""
        of_attn, of_mlp = costs.units(convention)[:2]
        base, *ones = (
            costs.macs(Widths.from_flat([index == one for index in range(2 * depth)]), convention) for one in (-1, 0, 1)
        )
        once_attn, once_mlp = ones[0] - base - of_attn, ones[1] - base - of_mlp
        return base + attns * once_attn + mlps * once_mlp + kept * attn * of_attn, mlp * of_mlp

    def spread(units, branches):
        return [(units + i) // branches if i < branches else 0 for i in range(depth)]

    macs, parameters = (quantity(row[name].replace(" ", "")) for name in ("macs", "parameters"))
    (fixed, unit), (fixed_parameters, unit_parameters) = rest(PAPER), rest({"parameters": 1})
    units = np.rint((macs - fixed) / unit).astype(int)
    near = abs(fixed_parameters + units * unit_parameters - parameters) < 1e4
    near &= (kept >= attns) & (kept <= 8 * attns) & (units >= mlps) & (units <= 32 * mlps)
    for a, m, k in np.argwhere(near)[::-1]:
        heads, hidden = spread(k + 1, a + 1), spread(units[a, m, k], m + 1)
        widths = Widths(tuple(attn * n for n in heads), tuple(mlp * n for n in hidden))
        if printed(row["model"], widths) == (row["macs"], row["parameters"]):
            return widths


def printed(model, widths):
    """MACs and parameters of ``widths`` as the paper prints them."""
    costs = deit_costs(model)
    return with_unit(costs.macs(widths)), with_unit(costs.parameters(widths))
