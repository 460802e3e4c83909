"""MACs and parameters against the paper's printed figures, fvcore, and the published sub-networks."""

import itertools

import numpy as np
import pytest
import timm
import torch
from conftest import TINY_WIDTHS, tiny_supernet
from fvcore.nn import FlopCountAnalysis

from models import peel
from models.cost import MATMULS, PAPER, Shapes
from models.supernet import as_supernet, full_widths
from models.vit import ModelSpec
from models.width_table import Widths


def deit_shapes(name):
    with torch.device("meta"):
        model = as_supernet(ModelSpec(name, 1000).build())
    return Shapes.of(model), full_widths(model)


# name, MACs (paper), MACs with the attention matmuls, parameters: each as printed
FULL = [
    ("vit_base", "16.88 G", "17.58 G", "86.57 M"),
    ("vit_small", "4.26 G", "4.61 G", "22.05 M"),
    ("vit_tiny", "1.08 G", "1.26 G", "5.72 M"),
]


@pytest.mark.parametrize(("name", "macs", "with_matmuls", "parameters"), FULL)
def test_full_size_figures_equal_the_papers_to_the_printed_digit(name, macs, with_matmuls, parameters):
    shapes, full = deit_shapes(name)
    assert f"{shapes.macs(full) / 1e9:.2f} G" == macs
    assert f"{shapes.macs(full, MATMULS) / 1e9:.2f} G" == with_matmuls
    assert f"{shapes.parameters(full) / 1e6:.2f} M" == parameters


def count_with_fvcore(network, size):
    timm.layers.set_fused_attn(False)
    try:
        network = network()
    finally:
        timm.layers.set_fused_attn(True)
    analysis = FlopCountAnalysis(network.eval(), torch.zeros(1, 3, size, size))
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).total()


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small"])
def test_macs_with_matmuls_equal_fvcores(name):
    shapes, full = deit_shapes(name)
    assert count_with_fvcore(lambda: ModelSpec(name, 1000).build(), 224) == shapes.macs(full, MATMULS)


@pytest.mark.parametrize("widths", TINY_WIDTHS)
def test_macs_and_parameters_of_extracted_networks(widths):
    supernet = tiny_supernet()
    shapes = Shapes.of(supernet)
    assert count_with_fvcore(lambda: peel.extract(tiny_supernet(), widths), 16) == shapes.macs(widths, MATMULS)
    assert sum(p.numel() for p in peel.extract(supernet, widths).parameters()) == shapes.parameters(widths)


@pytest.mark.parametrize(
    "kwargs",
    [{"qkv_bias": False}, {"global_pool": "avg"}, {"class_token": False, "global_pool": "avg"}, {"init_values": 0.1},
     {"pre_norm": True}, {"reg_tokens": 2}],
)  # fmt: skip
def test_costs_of_other_vits(kwargs):
    supernet = tiny_supernet(**kwargs)
    shapes, widths = Shapes.of(supernet), TINY_WIDTHS[2]
    # fvcore counts LayerScale's product as nothing, like us
    assert count_with_fvcore(lambda: peel.extract(tiny_supernet(**kwargs), widths), 16) == shapes.macs(widths, MATMULS)
    assert sum(p.numel() for p in peel.extract(supernet, widths).parameters()) == shapes.parameters(widths)


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
    shapes, _ = deit_shapes(name)
    empty = Widths((0,) * 12, (0,) * 12)
    unit_attn, unit_mlp = shapes.branches[0].width // 8, shapes.branches[1].width // 32

    def parts(cost):
        """What is always there, one attention unit, one MLP unit, the fixed part of one branch of each kind."""
        base = cost(empty)
        one, two = (cost(Widths((k * unit_attn, *[0] * 11), empty.mlp)) - base for k in (1, 2))
        one_m, two_m = (cost(Widths(empty.attn, (k * unit_mlp, *[0] * 11))) - base for k in (1, 2))
        return base, two - one, two_m - one_m, 2 * one - two, 2 * one_m - two_m

    attn, mlp = np.meshgrid(np.arange(97), np.arange(385), indexing="ij")
    reached = False
    for branches_a, branches_m in itertools.product(range(5, 13), repeat=2):
        fits = (attn <= 8 * branches_a) & (attn >= branches_a) & (mlp <= 32 * branches_m) & (mlp >= branches_m)
        figures = []
        for base, a, m, fixed_a, fixed_m in (parts(lambda w: shapes.macs(w, PAPER)), parts(shapes.parameters)):
            figures.append(base + attn * a + mlp * m + branches_a * fixed_a + branches_m * fixed_m)
        fits &= np.abs(figures[0] - macs) <= tolerance
        fits &= np.abs(figures[1] / 1e6 - parameters) <= 0.005
        reached |= bool(fits.any())
    assert reached
