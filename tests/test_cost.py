"""MACs and parameters against the paper's printed figures, fvcore, and the published sub-networks."""

import sys
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, fused_attention, macs_by_fvcore, random_images

import options
from models.vit.cost import MATMULS
from models.vit.pretrained import ModelSpec
from models.vit.widths import Widths

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


@pytest.mark.parametrize("row", published.ROWS, ids=lambda row: f"{row['model']}-{row['step']}")
def test_published_sub_networks_are_reachable_and_documented(row):
    """One set of widths gives both printed figures of a row, which docs/results.md has as they are."""
    assert published.widths_of(row) is not None
    cells = (row["model"], row["step"], row["macs"], row["parameters"], row["top1"] or "-", "not run")
    assert f"\n| {' | '.join(cells)} |\n" in (ROOT / "docs/results.md").read_text()


NOTES = {"vit_base": "below 4.26 G MACs, those of the whole vit_small", "vit_small": "1.08 G", "vit_tiny": ""}


@pytest.mark.parametrize(
    "name", ["vit_base_patch16_224.mae", "vit_small_patch16_224.augreg_in1k", "deit3_base_patch16_224"]
)
def test_the_next_smaller_model_is_built_whatever_weights_the_larger_one_has(name):
    smaller = ModelSpec(name, 1000).next_smaller()
    sizes = {"base": "small", "small": "tiny"}
    assert smaller.name == name.partition(".")[0].replace(*next(pair for pair in sizes.items() if pair[0] in name))
    with torch.device("meta"):
        assert smaller.build().embed_dim < ModelSpec(name, 1000).build().embed_dim


@pytest.mark.parametrize(("name", "words"), [*NOTES.items(), ("vit_base_patch16_clip_224", "")])
def test_a_budget_below_the_whole_next_smaller_model_is_noted(name, words, capsys):
    costs = published.deit_costs(name)
    loaded = Namespace(spec=ModelSpec(name, 1000), costs=costs)
    least = Widths((8,) * 12, (96,) * 12)
    options.note_smaller_model(loaded, [Namespace(widths=costs.full)])
    assert not capsys.readouterr().out
    options.note_smaller_model(loaded, [Namespace(widths=costs.full), Namespace(widths=least)])
    printed = capsys.readouterr().out
    assert words in printed and bool(words) == bool(printed)
