"""Runs that are killed, told to stop, or lose a rank, against one that is left alone: equal to the bit."""

import contextlib
import importlib
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

import checkpoints
import engine
import main_train
import utils
from models.store import load_supernet
from models.vit import ModelSpec, read_checkpoint
from models.width_table import Widths, WidthTable

ROOT = Path(__file__).parents[1]
# All of DeiT's randomness, averaged weights, a list that grows, and checkpoints within epochs.
OPTIONS = [
    "--model", "vit_digits", "--data-set", "DIGITS", "--device", "cpu", "--num-workers", "0", "--batch-size", "128",
    "--proxy-samples", "128", "--epochs", "3", "--grow-epochs", "2", "--lr", "1e-3", "--warmup-epochs", "0",
    "--save-every-steps", "2", "--model-ema-decay", "0.9", "--always", "largest",
]  # fmt: skip
# Children start from a server that has imported everything once.
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["torch", "timm", "sklearn.datasets", "main_train"])


def child(options, patch):
    """main_train.py in a process of its own, after ``patch`` = (function, arguments)."""
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere), contextlib.redirect_stderr(nowhere):
        if patch:
            patch[0](*patch[1:])
        utils.run_stage(main_train.main, main_train.get_args([str(option) for option in options]))


def train(output, *options, start, patch=None):
    """The exit code of a run; negative for the signal that ended it."""
    command = [*OPTIONS, "--pretrained", start, "--output-dir", output, "--resume", "auto", *options]
    process = CONTEXT.Process(target=child, args=(command, patch))
    process.start()
    process.join(300)
    return process.exitcode


def wrap(module, name, before):
    """Call ``before()`` each time before ``module.name`` runs."""
    module = importlib.import_module(module)
    original = getattr(module, name)

    def wrapped(*args, **kwargs):
        before()
        return original(*args, **kwargs)

    setattr(module, name, wrapped)


def kill_after(events, delay):
    """SIGKILL this process ``delay`` seconds after it has done so many things."""
    left = [events]

    def count():
        left[0] -= 1
        if left[0] == 0:
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    for module, name in (
        ("engine", "_backward"), ("engine", "_finish_update"), ("main_train", "evaluate"),
        ("main_train", "branch_removal"), ("torch", "save"), ("os", "replace"),
    ):  # fmt: skip
        wrap(module, name, count)


def signal_self(where, times, number):
    """Send a signal to this process as it enters the ``times``-th call of a function."""
    left = [times]

    def count():
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), number)

    wrap(*where, count)


def die_while_writing(times):
    """SIGKILL this process when half of the ``times``-th checkpoint is on disk."""
    original, left = torch.save, [times]

    def save(content, file):
        left[0] -= 1
        original(content, file)
        if left[0] == 0:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """Random starting weights: what a run learns does not matter here."""
    path = tmp_path_factory.mktemp("start") / "start.pth"
    utils.seed_all(3)
    torch.save(ModelSpec("vit_digits", 10).build().state_dict(), path)
    return path


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, start=start) == 0
    return folder


def log_of(folder):
    records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k != "seconds"} for record in records]


def assert_same_run(folder, whole):
    """Weights, averages, optimiser, schedule, best checkpoint, table and log, but for the seconds, equal to the bit."""
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}, "a file is missing or left over"
    for name in ("checkpoint_2.pth", checkpoints.BEST_NAME):
        one, other = read_checkpoint(folder / name), read_checkpoint(whole / name)
        del one["args"], other["args"]
        assert one.keys() == other.keys()
        assert_equal(one, other, name)
    assert (folder / "mask_table.json").read_text() == (whole / "mask_table.json").read_text()
    assert log_of(folder) == log_of(whole)


def assert_equal(one, other, where):
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_equal(one[key], other[key], f"{where} {key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_equal(*pair, f"{where} {index}")
    else:
        assert one == other, where


def test_the_whole_run_is_worth_comparing(whole):
    assert [record["epoch"] for record in log_of(whole)] == [0, 1, 2]
    assert not list(whole.glob(".*")) and not (whole / checkpoints.MID_EPOCH_NAME).exists()
    moved = read_checkpoint(whole / "checkpoint_2.pth")["model"], read_checkpoint(whole / "checkpoint_1.pth")["model"]
    assert any(not torch.equal(moved[0][name], moved[1][name]) for name in moved[0])
    assert load_supernet(whole).table.last > 20


@pytest.mark.parametrize(
    ("name", "patch"),
    [
        ("in the importance pass", (signal_self, ("main_train", "branch_removal"), 2, signal.SIGKILL)),
        ("in evaluation", (signal_self, ("main_train", "evaluate"), 8, signal.SIGKILL)),
        ("before the rename", (signal_self, ("os", "replace"), 4, signal.SIGKILL)),
        ("half a checkpoint", (die_while_writing, 3)),
        ("half a best checkpoint", (die_while_writing, 10)),
    ],
)
def test_killed_at_the_worst_moments(name, patch, whole, start, tmp_path):
    assert train(tmp_path, start=start, patch=patch) == -signal.SIGKILL
    assert train(tmp_path, "--num-workers", "2", start=start) == 0
    assert_same_run(tmp_path, whole)


def lives(kills, folder, start, seed):
    """A run that is killed so many times at random moments, then left alone."""
    draw = random.Random(seed)
    for _ in range(kills):
        patch = (kill_after, draw.randint(4, 25), draw.random() * 0.2)
        if train(folder, start=start, patch=patch) == 0:
            break
    assert train(folder, start=start) == 0


def test_killed_at_random_moments(whole, start, tmp_path):
    lives(4, tmp_path, start, seed=0)
    assert_same_run(tmp_path, whole)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_killed_at_twenty_random_moments(seed, whole, start, tmp_path):
    """Five kills in each of four runs."""
    lives(5, tmp_path, start, seed=10 + seed)
    assert_same_run(tmp_path, whole)


@pytest.mark.parametrize(
    ("number", "where"),
    [
        (signal.SIGTERM, (("engine", "_backward"), 7)),
        (signal.SIGUSR1, (("main_train", "evaluate"), 9)),
        (signal.SIGUSR1, (("main_train", "branch_removal"), 2)),
    ],
)
def test_a_signal_ends_the_step_saves_and_says_so_by_its_exit_code(number, where, whole, start, tmp_path):
    assert train(tmp_path, "--save-every-steps", "0", start=start, patch=(signal_self, *where, number)) == utils.STOPPED
    assert (tmp_path / checkpoints.MID_EPOCH_NAME).exists()
    assert train(tmp_path, start=start) == 0
    assert_same_run(tmp_path, whole)


# ------------------------------------------------------------------------------------------ which checkpoint


def test_auto_passes_over_what_is_damaged(whole, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    assert checkpoints.to_resume("auto", folder) == folder / "checkpoint_2.pth"
    content = (folder / "checkpoint_2.pth").read_bytes()
    (folder / "checkpoint_2.pth").write_bytes(content[: len(content) // 2])
    assert checkpoints.to_resume("auto", folder) == folder / "checkpoint_1.pth"
    assert "passed over" in capsys.readouterr().out
    assert checkpoints.to_resume("auto", tmp_path / "empty") is None
    with pytest.raises(utils.InputError, match="--resume auto"):
        checkpoints.to_resume(None, folder)


def test_a_mid_epoch_file_counts_by_its_position(whole, tmp_path):
    content = read_checkpoint(whole / "checkpoint_1.pth")
    for epoch, updates, newest in ((1, 3, True), (1, 0, False), (0, 5, False)):
        content["epoch"], content["position"]["updates"] = epoch, updates
        torch.save(content, tmp_path / checkpoints.MID_EPOCH_NAME)
        shutil.copy(whole / "checkpoint_1.pth", tmp_path)
        expected = checkpoints.MID_EPOCH_NAME if newest or (epoch, updates) == (1, 0) else "checkpoint_1.pth"
        assert checkpoints.to_resume("auto", tmp_path).name == expected


def test_a_table_of_another_run_is_noticed(whole, tmp_path):
    """A table that is shorter or longer by what a stopped run had not saved is not."""
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    table = WidthTable.load(folder / "mask_table.json")
    inside, full = table.steps, table.steps[0]
    for beside in (inside[:-3], [*inside, Widths.from_flat([0] * len(full.flat))]):
        (folder / "mask_table.json").write_text(WidthTable(beside).to_json())
        assert load_supernet(folder, model="vit_digits").table.steps == inside
    other = [full, Widths(full.attn, (8, *full.mlp[1:]))]
    (folder / "mask_table.json").write_text(WidthTable(other).to_json())
    with pytest.raises(utils.InputError, match="not the table that checkpoint_2"):
        load_supernet(folder, model="vit_digits")
    assert load_supernet(folder, model="vit_digits", mask_table=folder / "mask_table.json").table.steps == other


def test_the_log_is_trimmed_to_what_was_saved(tmp_path):
    log = tmp_path / "log.txt"
    checkpoints.trim_log(log, 3)
    log.write_text('{"epoch": 0, "a": 1}\n{"epoch": 1}\n{"epoch": 2, "b')
    checkpoints.trim_log(log, 1)
    assert log.read_text() == '{"epoch": 0, "a": 1}\n'


# ------------------------------------------------------------------------------------------ ranks


def test_a_dead_rank_ends_the_others_and_a_restart_goes_on(start, tmp_path):
    """Two gloo ranks; rank 1 kills itself once, in the second epoch. torchrun starts both again."""
    script = tmp_path / "script.py"
    script.write_text(
        f"import json, os, signal, sys; sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / 'tests')!r}]\n"
        "import main_train, utils\n"
        "from test_resume import signal_self\n"
        "if os.environ['RANK'] == '1' and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "    signal_self(('engine', '_backward'), 13, signal.SIGKILL)\n"
        "fit = main_train.fit\n"
        "def noted(run, *rest):\n"
        f"    open({str(tmp_path / 'lives.txt')!r}, 'a').write(json.dumps([utils.rank(), run.epoch]) + chr(10))\n"
        "    fit(run, *rest)\n"
        "main_train.fit = noted\n"
        "utils.run_stage(main_train.main, main_train.get_args())\n"
    )
    options = [*OPTIONS, "--pretrained", start, "--resume", "auto", "--epochs", "2", "--batch-size", "64"]
    result = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--max-restarts=3",
         script, *options, "--output-dir", tmp_path / "out"],
        capture_output=True, text=True, timeout=500, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert result.returncode == 0, result.stdout + result.stderr
    lives = [json.loads(line) for line in (tmp_path / "lives.txt").read_text().splitlines()]
    assert sorted(rank for rank, _ in lives) == [0, 0, 1, 1], "both ranks start twice"
    began = {epoch for _, epoch in lives[2:]}
    assert began == {1}, "the second life goes on in the epoch in which the first ended"
    assert [record["epoch"] for record in log_of(tmp_path / "out")] == [0, 1]


def test_bad_losses_are_skipped_and_counted_up_to_the_allowed_number(start, tmp_path):
    code = train(tmp_path / "one", "--skip-nonfinite", "1", start=start, patch=(poison, 5))
    assert code == 0
    assert [record.get("train_skipped", 0) for record in log_of(tmp_path / "one")] == [1, 1, 1]
    assert train(tmp_path / "none", start=start, patch=(poison, 5)) == 2
    assert read_checkpoint(tmp_path / "none" / checkpoints.MID_EPOCH_NAME)["position"]["updates"] == 4


def poison(times):
    """Make the ``times``-th loss of this process infinite."""
    original, left = engine._backward, [times]

    def backward(*args):
        left[0] -= 1
        return original(*args) * (float("inf") if left[0] == 0 else 1.0)

    engine._backward = backward
