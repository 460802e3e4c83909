"""MACs and parameters against the paper's printed figures, fvcore, and the published sub-networks."""

import sys

import pytest
from conftest import ROOT, TINY_WIDTHS, fused_attention, macs_by_fvcore, random_images, tiny_supernet

from models.subnet.extract import extract
from models.vit.cost import MATMULS, Costs
from models.vit.pretrained import ModelSpec

sys.path.insert(0, str(ROOT / "benchmarks"))
import published

# name, MACs (paper), MACs with the attention matmuls, parameters: each as printed
FULL = [
    ("vit_base", "16.88 G", "17.58 G", "86.57 M"),
    ("vit_small", "4.26 G", "4.61 G", "22.05 M"),
    ("vit_tiny", "1.08 G", "1.26 G", "5.72 M"),
]


@pytest.mark.parametrize(("name", "macs", "with_matmuls", "parameters"), FULL)
def test_full_size_figures_equal_the_papers_to_the_printed_digit_and_fvcores(name, macs, with_matmuls, parameters):
    costs = published.deit_costs(name)
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


@pytest.mark.parametrize("row", published.ROWS, ids=lambda row: f"{row['model']}-{row['step']}")
def test_published_sub_networks_are_reachable(row):
    """One set of widths gives both printed figures of a row."""
    assert published.widths_of(row) is not None
