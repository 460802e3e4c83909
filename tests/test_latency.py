"""Latency budgets: what is asked of the clock, what is remembered, and that a budget is never exceeded as measured."""

import json
from argparse import Namespace

import pytest
import torch
from conftest import tiny_supernet

import options
from models.piad.width_table import WidthTable
from models.subnet import latency
from models.subnet.budget import Budget
from models.subnet.latency import LatencyTable
from models.subnet.store import SuperNetwork
from models.vit.cost import Costs
from models.vit.pretrained import ModelSpec
from models.vit.supernet import full_widths
from models.vit.widths import Widths
from utils import InputError

CPU = torch.device("cpu")


@pytest.fixture
def net(tmp_path):
    """A super-network whose table has 21 steps of falling MLP width."""
    supernet = tiny_supernet()
    table = WidthTable([Widths((16,) * 3, (width,) * 3) for width in range(192, -1, -9)])
    assert table.steps[0] == full_widths(supernet)
    return SuperNetwork(
        supernet, ModelSpec("vit_tiny", 7), table, Costs.of(supernet), tmp_path / "checkpoint_0.pth", ""
    )


def milliseconds(mlp_width):
    return 1 + 0.1 * mlp_width


@pytest.fixture
def counted(monkeypatch):
    """Instead of a clock: a latency of 1 ms and 0.1 ms per hidden unit. Returns the list of measured widths."""
    measured = []

    def fake(networks, device, conditions):
        widths = [network.blocks[0].mlp.fc1.out_features for network in networks]
        measured.extend(widths)
        return [milliseconds(width) for width in widths]

    monkeypatch.setattr(latency, "measure", fake)
    return measured


def beside(net, batch_size=2):
    return LatencyTable.beside(net, CPU, batch_size, "none")


def choose(net, value):
    return beside(net).choose(Budget("latency_ms", value), net.table)


def test_the_largest_step_within_the_budget_is_found_with_few_measurements(net, counted):
    net.table.steps.pop()  # the last one has no MLP
    for value in (4.0, 10.05, 19.3, 20.2):
        counted.clear()
        choice = choose(net, value)
        assert choice.latency_ms == milliseconds(choice.widths.mlp[0]) <= value
        assert choice.step == 0 or milliseconds(net.table.steps[choice.step - 1].mlp[0]) > value
        assert len(counted) <= 8
        counted.clear()
        assert choose(net, value) == choice and not counted, "remembered in the file"
    for value in (0.5, 25):
        with pytest.raises(InputError, match=r"^latency_ms .*networks from 2.2 to 20.2"):
            choose(net, value)


def test_the_file_says_what_it_holds_for_and_serves_that_elsewhere(net, counted, tmp_path):
    beside(net).measure(net.table.steps[0:20:5])
    (path,) = tmp_path.glob("latency_*_batch2_16px_none.json")
    conditions = json.loads(path.read_text())["conditions"]
    assert conditions["batch_size"] == 2 and conditions["img_size"] == 16 and conditions["threads"] == 1
    args = Namespace(latency_device=str(path), latency_batch_size=1, finer=False, amp="none", given=[])
    counted.clear()
    asked = Namespace(**vars(args) | {"given": ["latency_batch_size"]})
    with pytest.raises(InputError, match=r"measured at batch 2, 16 px on .*, and not at batch 1, 16 px"):
        options.choose(net, [Budget("latency_ms", 16.0)], asked, CPU)
    within, exact = options.choose(net, [Budget("latency_ms", 16.0), Budget("op_code", 2)], args, CPU)
    assert (within.step, exact.step) == (5, 2) and within.latency_ms <= 16 and not counted
    assert args.latency_batch_size == 2, "images/s are of these batches"
    assert not beside(net, batch_size=4).points, "of another batch size"
    net.table.steps = net.table.steps[1:4]
    assert not beside(net).known(net.table), "of other networks"


def test_another_model_s_latencies_are_not_taken(net, tmp_path):
    beside(net).measure(net.table.steps[:2])
    (path,) = tmp_path.glob("latency_*.json")
    content = json.loads(path.read_text())
    assert beside(net).points
    content["conditions"]["model"] = None  # a file that is older than this entry
    path.write_text(json.dumps(content))
    assert beside(net).points
    content["conditions"]["model"] = "vit_large_patch16_224"
    path.write_text(json.dumps(content))
    assert not beside(net).points
    args = Namespace(latency_device=str(path), latency_batch_size=2, finer=False, amp="none", given=[])
    with pytest.raises(InputError, match="measured of vit_large_patch16_224, which is another model"):
        options.choose(net, [Budget("latency_ms", 16.0)], args, CPU)


NO_SIZE = {"device": "x", "threads": 1, "batch_size": "2", "img_size": 16, "amp": "none"}
DAMAGED = ["{", "[]", '{"points": [], "conditions": {"device": 1}}', '{"points": [{"ms": 1}]}']
DAMAGED += [json.dumps({"points": [], "conditions": NO_SIZE})]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_file_is_refused(content, tmp_path):
    (tmp_path / "latency_x.json").write_text(content)
    with pytest.raises(InputError, match=r"latency_x\.json: not (JSON|a file of latencies)"):
        LatencyTable.load(tmp_path / "latency_x.json")


def test_every_network_gets_as_many_turns_and_the_median_counts(monkeypatch):
    turns, seconds = [], iter([9.0] * 2 * latency.WARM_UP + [0.5, 2.0, 0.1, 1.0] * latency.REPEATS)
    monkeypatch.setattr("utils.Stopwatch", lambda device: Namespace(seconds=lambda: next(seconds)))
    networks = [lambda images, name=name: turns.append((name, tuple(images.shape))) for name in "ab"]
    figures = latency.measure(networks, CPU, latency.Conditions("cpu", 1, 3, 8, "none"))
    assert turns == [("a", (3, 3, 8, 8)), ("b", (3, 3, 8, 8))] * (latency.WARM_UP + latency.REPEATS)
    assert figures == [500.0, 2000.0]


def test_exports_are_timed_as_pytorch_is(net, monkeypatch):
    """The same batch, in the same turns: one call, with all of them."""
    monkeypatch.setattr("models.subnet.export.OnnxNetwork", lambda file: file)
    monkeypatch.setattr(
        latency,
        "measure",
        lambda networks, device, conditions: [2.0 * conditions.batch_size + i for i, _ in enumerate(networks)],
    )
    widths = net.table.steps[3].as_dict()
    rows = [{"file": None, "widths": widths}, {"file": "a.onnx", "widths": widths}, {"file": None, "widths": widths}]
    options.benchmark(net, rows, Namespace(latency_device=None, latency_batch_size=4, amp="none"), CPU)
    assert [row["latency_ms"] for row in rows] == [8, 10, 9] and rows[1]["images_per_s"] == 400
    assert list(beside(net, batch_size=4).points) == [net.table.steps[3]]


def test_real_figures_are_saved_as_they_are_returned(net):
    figures = beside(net).measure([net.table.steps[0], Widths((2, 0, 0), (9, 0, 0))])
    assert all(ms > 0 for ms in figures)
    assert list(beside(net).points.values()) == figures
