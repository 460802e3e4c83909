"""What a run says of itself: lines without a terminal, the log, TensorBoard, curves."""

import json
import re
from argparse import Namespace

import pytest
import torch
from conftest import proxy_batches, tiny_supernet
from runs import CLOCK, stage
from test_engine import CPU, training_args
from torch import nn

import main_train
import options
import utils
from engine import train_one_epoch
from models.piad.dropout import DropoutList, Growth
from models.piad.importance import Units
from models.vit.cost import Costs
from models.vit.supernet import full_widths
from models.vit.widths import Widths
from training import TrainingRun
from utils import InputError


def test_without_a_terminal_a_line_says_what_is_under_way_and_how_far(monkeypatch, capsys):
    clock = iter(range(0, 10_000, 7))  # seven seconds a batch
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    assert list(utils.progress(range(100), "epoch 3", done=90, images=14)) == list(range(100))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "epoch 3: 95 of 100 batches, 2 images/s, 00:35 left"
    assert len(lines) == 100 // 5, "one in 35 seconds, the first time after 30"


def run_of(folder, **changes):
    """Two epochs of three batches, in ``folder``."""
    batches, supernet = proxy_batches(), tiny_supernet()
    run = TrainingRun(supernet, training_args(**changes), CPU, len(batches))
    with run.files(folder):
        for epoch in run.epochs():
            figures = train_one_epoch(run, batches, nn.CrossEntropyLoss(), epoch)
            if run.board:
                run.board.add_histogram("drawn_macs", torch.tensor([1.0, 2.0, 2.0]), epoch)
            run.finish_epoch(figures | {"test_top1": 10.0 + epoch})
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_each_epoch_says_its_rate_the_time_left_the_memory_and_the_learning_rate(tmp_path):
    first, last = run_of(tmp_path)
    assert first.keys() == last.keys() > {"epoch", "train_loss", "train_lr", *CLOCK[:4]}
    assert first["images_per_s"] > 0 and first["minutes_left"] >= last["minutes_left"] == 0
    assert 100 < last["peak_memory_mb"] < 100_000
    assert first["train_lr"] > last["train_lr"] > 0


def test_tensorboard_has_the_figures_of_the_log(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    records = run_of(tmp_path, tensorboard=True)
    events = EventAccumulator(str(tmp_path), {"histograms": 0}).Reload()
    for name in records[0]:
        values = [record[name] for record in records]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(values)
    assert [histogram.histogram_value.num for histogram in events.Histograms("drawn_macs")] == [3, 3]


def test_the_drawn_sizes_are_those_that_were_trained():
    supernet = tiny_supernet()
    units, costs = Units.of(full_widths(supernet)), Costs.of(supernet)
    steps = [Widths((16,) * 3, (width,) * 3) for width in (192, 96, 48)]
    dropout, seen = DropoutList(units, costs, steps, Growth(), always=["largest"], seed=3), []
    run = TrainingRun(supernet, training_args(), CPU, 3)

    def draw(step, batch):
        seen.append(dropout.draw(step, batch))
        return seen[-1]

    train_one_epoch(run, proxy_batches(), nn.CrossEntropyLoss(), 1, draw=draw)
    expected = [costs.macs(widths) for drawn in seen for widths in drawn]
    assert main_train.drawn_macs(run, dropout, 1).tolist() == expected and len(seen) == 3


def test_a_missing_tensorboard_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match="--tensorboard needs tensorboard: pip install tensorboard"):
        options.check_training(Namespace(nb_classes=None, tensorboard=True))


def plot(folder, *flags):
    """(output, exit code)"""
    return stage("tools/plot_accuracy.py", *flags, folder / "x.png", f"one={folder}/a", f"two={folder}/b")


def test_accuracies_are_drawn_of_runs_with_different_budgets(tmp_path):
    for name, rows in (("a", {"macs 1.00 M": 90.0, "op_code 0": 98.5}), ("b", {"macs 1.00 M": 80.25})):
        (tmp_path / name).mkdir()
        found = [{"asked": asked, "macs": 1e6, "top1": top1, "file": None} for asked, top1 in rows.items()]
        (tmp_path / name / "results.json").write_text(json.dumps({"rows": found}))
    output, _ = plot(tmp_path)
    assert "op_code 0               1.00 M  98.50           -      -\n" in output and "80.25" in output
    assert (tmp_path / "x.png").stat().st_size > 10_000


def test_curves_are_drawn_of_several_runs(tmp_path):
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    run_of(tmp_path / "a")
    (tmp_path / "b/log.txt").write_text('{"epoch": 0, "train_loss": 1.0, "train_lr": 0.1}\n')
    assert "wrote" in plot(tmp_path, "--training")[0]
    assert (tmp_path / "x.png").stat().st_size > 10_000
    missing = "expected LABEL=FOLDER, a folder with log.txt in it"
    for text, message in (("{\n", "log.txt: not JSON"), ("{}\n", "log.txt: not the log of a"), (None, missing)):
        (tmp_path / "b/log.txt").write_text(text) if text else (tmp_path / "b/log.txt").unlink()
        output, code = plot(tmp_path, "--training")
        assert code == 2 and re.fullmatch(f"error: .*{message}.*\n", output)
