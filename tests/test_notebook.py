"""Super-networks as a notebook user handles them, and the page that shows it."""

import doctest
import re
from argparse import Namespace

import pytest
import torch
from conftest import ROOT, difference, measured, random_images, rewritten

import utils
from models.piad.width_table import WidthTable
from models.subnet import load_supernet
from models.subnet.budget import Budget
from models.subnet.store import WEIGHTS_NAME
from models.vit.cost import Costs
from models.vit.pretrained import ModelSpec, save_checkpoint
from models.vit.supernet import as_supernet, current_widths, full_widths
from models.vit.weights import digest
from models.vit.widths import Widths
from models.wpac.compensation import COMPENSATION_NAME, save_compensation
from tools import measure
from utils import InputError

IMAGES = random_images(3)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """output/reparam/vit_digits in the working directory: random weights, compensation, a table of eight sizes."""
    monkeypatch.chdir(tmp_path)
    spec, folder = ModelSpec("vit_digits", 10), tmp_path / "output/reparam/vit_digits"
    folder.mkdir(parents=True)
    utils.seed_all(0)
    supernet = as_supernet(spec.build())
    compensation = rewritten(supernet, measured(supernet, hidden=True))
    save_checkpoint(supernet.state_dict(), folder / WEIGHTS_NAME)
    save_compensation(compensation, supernet, folder / COMPENSATION_NAME, digest(supernet.state_dict()))
    table = WidthTable([Widths((2 * n,) * 4, (32 * n,) * 4) for n in range(8, 0, -1)])
    table.describe(spec, Costs.of(supernet))
    table.save(folder / "mask_table.json")
    return folder


def test_the_page_says_what_happens(folder):
    page = re.sub("^```.*", "", (ROOT / "docs/notebook.md").read_text(), flags=re.MULTILINE)
    test = doctest.DocTestParser().get_doctest(page, {}, "notebook.md", "docs/notebook.md", 0)
    result = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(test)
    assert result.attempted > 15 and not result.failed
    assert list(folder.glob("latency_*_batch8_16px_none.json"))


def test_a_network_is_not_measured_by_labels_of_other_classes(folder, monkeypatch):
    monkeypatch.setattr("datasets.load_images", lambda args, train: Namespace(num_classes=3))
    with pytest.raises(InputError, match=r"^--objective label: .* has 10 classes, the data set 3; use"):
        measure.main(measure.get_args(["--checkpoint", str(folder), "--device", "cpu"]))


def test_a_network_is_measured_from_one_reading_of_its_checkpoint(folder, monkeypatch):
    (folder / COMPENSATION_NAME).unlink()
    read, load = [], torch.load
    monkeypatch.setattr(torch, "load", lambda file, **kwargs: read.append(file) or load(file, **kwargs))
    flags = f"--checkpoint {folder} --data-set DIGITS --device cpu --num-workers 0 --proxy-samples 16"
    measure.main(measure.get_args(flags.split()))
    assert read == [folder / WEIGHTS_NAME] and load_supernet(folder).compensation


@torch.no_grad()
def test_a_live_network_switches_sizes_and_back_without_copying(folder):
    supernet = load_supernet(folder)
    full, pointers = supernet.supernet.eval()(IMAGES), [p.data_ptr() for p in supernet.supernet.parameters()]
    for step in (5, 2, 7):
        network = supernet.use(op_code=step)
        assert network is supernet.supernet and current_widths(network) == supernet.table.steps[step]
        assert 0 not in supernet.table.steps[step].flat, "the mean of a removed branch is in what is cut alone"
        assert difference(supernet.cut(op_code=step)(IMAGES), network(IMAGES)) < 1e-5
        assert current_widths(network) == supernet.table.steps[step], "cutting leaves the live size as it is"
    again = load_supernet(folder).cut(op_code=3)
    assert torch.equal(supernet.cut(op_code=3)(IMAGES), again(IMAGES)), "and does not depend on it"
    assert torch.equal(supernet.use(op_code=0)(IMAGES), full)
    assert [p.data_ptr() for p in supernet.supernet.parameters()] == pointers
    assert current_widths(supernet.supernet) == full_widths(supernet.supernet)


@torch.no_grad()
def test_cuts_are_those_of_the_budget_and_compensated_if_that_is_known(folder):
    supernet, plain = load_supernet(folder), load_supernet(folder, compensate=False)
    widths = Budget("macs_ratio", 0.5).choose(supernet.table, supernet.costs).widths
    assert supernet.widths(macs_ratio=0.5) == widths == supernet.table.steps[5]
    assert torch.equal(supernet.cut(macs_ratio=0.5)(IMAGES), supernet.cut(widths)(IMAGES))
    assert torch.equal(plain.cut(widths)(IMAGES), supernet.slice(widths)(IMAGES))
    assert difference(plain.cut(widths)(IMAGES), supernet.cut(widths)(IMAGES)) > 1e-3
    sizes = supernet.budgets()
    assert [size.params for size in sizes] == [
        sum(p.numel() for p in plain.cut(op_code=s).parameters()) for s in range(8)
    ]
    assert supernet.widths(macs=sizes[3].macs) == supernet.widths(params=sizes[3].params) == supernet.table.steps[3]
    with pytest.raises(InputError, match="give one budget of op_code, macs"):
        supernet.cut(macs_ratio=0.5, params="10M")
    with pytest.raises(InputError, match="a budget of kind 'mac': choose from op_code"):
        supernet.cut(mac="1M")
    with pytest.raises(InputError, match="params 'ten' is not a number such as"):
        supernet.cut(params="ten")
    with pytest.raises(InputError, match=r"^macs_ratio 0\.01: out of reach"):
        supernet.cut(macs_ratio=0.01)


@torch.no_grad()
def test_a_saved_sub_network_has_one_size_and_the_same_methods(folder, tmp_path):
    supernet = load_supernet(folder)
    supernet.save(tmp_path / "half", macs_ratio=0.5)
    saved = load_supernet(tmp_path / "half")
    assert [size.macs_ratio for size in saved.budgets()] == [1] and "1 sizes" in repr(saved)
    assert torch.equal(saved.use(op_code=0)(IMAGES), supernet.cut(macs_ratio=0.5)(IMAGES))
    assert len(repr(supernet.budgets()).splitlines()) == 9
