"""MACs and parameters against the paper's printed figures, fvcore, and the published sub-networks."""

import itertools

import numpy as np
import pytest
import torch
from conftest import TINY_WIDTHS, fused_attention, macs_by_fvcore, random_images, tiny_supernet

from models.subnet.extract import extract
from models.vit.cost import MATMULS, PAPER, Costs
from models.vit.pretrained import ModelSpec
from models.vit.supernet import as_supernet
from models.vit.widths import Widths


def deit_costs(name):
    with torch.device("meta"):
        return Costs.of(as_supernet(ModelSpec(name, 1000).build()))


# name, MACs (paper), MACs with the attention matmuls, parameters: each as printed
FULL = [
    ("vit_base", "16.88 G", "17.58 G", "86.57 M"),
    ("vit_small", "4.26 G", "4.61 G", "22.05 M"),
    ("vit_tiny", "1.08 G", "1.26 G", "5.72 M"),
]


@pytest.mark.parametrize(("name", "macs", "with_matmuls", "parameters"), FULL)
def test_full_size_figures_equal_the_papers_to_the_printed_digit_and_fvcores(name, macs, with_matmuls, parameters):
    costs = deit_costs(name)
    with fused_attention(False):
        network = ModelSpec(name, 1000).build()
    assert macs_by_fvcore(network, random_images(1, size=224)) == costs.macs(costs.full, MATMULS)
    assert f"{costs.macs(costs.full) / 1e9:.2f} G" == macs
    assert f"{costs.macs(costs.full, MATMULS) / 1e9:.2f} G" == with_matmuls
    assert f"{costs.parameters(costs.full) / 1e6:.2f} M" == parameters


@pytest.mark.parametrize("widths", TINY_WIDTHS)
def test_macs_and_parameters_of_extracted_networks(widths):
    """Without a class token; test_families.py has the others."""
    with fused_attention(False):
        supernet = tiny_supernet(class_token=False, global_pool="avg")
    costs, subnet = Costs.of(supernet), extract(supernet, widths)
    assert macs_by_fvcore(subnet, random_images(1)) == costs.macs(widths, MATMULS)
    assert sum(p.numel() for p in subnet.parameters()) == costs.parameters(widths)


# model, MACs in units of the last column's unit, parameters in M, half a unit of the last printed digit of the MACs.
# 897.0 M is printed with less precision than its neighbours: with 4.77 M parameters 896.77 M is the nearest figure
# that any widths reach.
PUBLISHED = [
    ("vit_tiny", 897.0e6, 4.77, 0.5e6), ("vit_tiny", 792.69e6, 4.25, 0.005e6), ("vit_tiny", 732.37e6, 3.94, 0.005e6),
    ("vit_tiny", 555.11e6, 3.04, 0.005e6), ("vit_tiny", 379.69e6, 2.16, 0.005e6), ("vit_tiny", 277.21e6, 1.64, 0.005e6),
    ("vit_small", 3.57e9, 18.54, 5e6), ("vit_small", 2.82e9, 14.74, 5e6), ("vit_small", 2.15e9, 11.34, 5e6),
    ("vit_small", 1.45e9, 7.83, 5e6),
    ("vit_base", 13.91e9, 71.52, 5e6), ("vit_base", 10.57e9, 54.55, 5e6), ("vit_base", 8.47e9, 43.92, 5e6),
    ("vit_base", 5.65e9, 29.6, 5e6),
]  # fmt: skip


@pytest.mark.parametrize(("name", "macs", "parameters", "tolerance"), PUBLISHED)
def test_published_sub_networks_are_reachable(name, macs, parameters, tolerance):
    """Some numbers of kept units and removed branches give both printed figures of a row."""
    costs = deit_costs(name)
    empty = Widths((0,) * 12, (0,) * 12)
    unit_attn, unit_mlp = costs.branches[0].full // 8, costs.branches[1].full // 32

    def parts(cost):
        """What is always there, one attention unit, one MLP unit, the fixed part of one branch of each kind."""
        base = cost(empty)
        one, two = (cost(Widths((k * unit_attn, *[0] * 11), empty.mlp)) - base for k in (1, 2))
        one_m, two_m = (cost(Widths(empty.attn, (k * unit_mlp, *[0] * 11))) - base for k in (1, 2))
        return base, two - one, two_m - one_m, 2 * one - two, 2 * one_m - two_m

    figures = [(parts(lambda widths: costs.macs(widths, PAPER)), macs, tolerance)]
    figures += [(parts(lambda widths: costs.parameters(widths) / 1e6), parameters, 0.005)]
    attn, mlp = np.meshgrid(np.arange(97), np.arange(385), indexing="ij")
    reached = False
    for branches_a, branches_m in itertools.product(range(5, 13), repeat=2):
        fits = (attn <= 8 * branches_a) & (attn >= branches_a) & (mlp <= 32 * branches_m) & (mlp >= branches_m)
        for (base, a, m, fixed_a, fixed_m), wanted, within in figures:
            found = base + attn * a + mlp * m + branches_a * fixed_a + branches_m * fixed_m
            fits &= np.abs(found - wanted) <= within
        reached |= bool(fits.any())
    assert reached
