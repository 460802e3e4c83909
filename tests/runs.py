"""Stages in processes of their own, and training runs on the digits for tests that disturb and compare them."""

import contextlib
import importlib
import itertools
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from conftest import ROOT

import utils
from models.vit.pretrained import read_checkpoint

# All of DeiT's randomness, a warm-up, averaged weights, a list that grows, and checkpoints within epochs.
OPTIONS = [
    "--model", "vit_digits", "--data-set", "DIGITS", "--device", "cpu", "--num-workers", "0", "--batch-size", "128",
    "--proxy-samples", "128", "--epochs", "3", "--grow-epochs", "2", "--lr", "1e-3", "--warmup-epochs", "1",
    "--save-every-steps", "2", "--model-ema-decay", "0.9", "--always", "largest",
]  # fmt: skip
# What no two runs have in common.
CLOCK = ("seconds", "images_per_s", "minutes_left", "peak_memory_mb", "latency_ms")
# Children start from a server that has imported everything once.
CONTEXT = multiprocessing.get_context("forkserver")
STAGES = ["main_reparam", "main_train", "main_test", "main_finetune_peeled"]
CONTEXT.set_forkserver_preload(["torch", "timm", "sklearn.datasets", *STAGES])


def child(script, options, patch=None, words=os.devnull):
    """A stage in a process of its own, after ``patch`` = (function, arguments); it prints into ``words``."""
    torch.set_num_threads(1)
    # As of its own accord: started by the server, data workers would not notice that the run they work for is dead.
    multiprocessing.set_start_method("fork", force=True)
    with open(words, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        if patch:
            patch[0](*patch[1:])
        module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        utils.run_stage(module.main, module.get_args([str(option) for option in options]))


def begin(output, *options, start, patch=None, words=os.devnull):
    """The process of a run that goes on where the last one in ``output`` stopped."""
    command = [*OPTIONS, "--pretrained", start, "--output-dir", output, "--resume", "auto", *options]
    process = CONTEXT.Process(target=child, args=("main_train.py", command, patch, words))
    process.start()
    return process


def train(output, *options, **more):
    """The exit code of a run; negative for the signal that ended it."""
    process = begin(output, *options, **more)
    process.join(300)
    return process.exitcode


def stage(script, *options, timeout=600):
    """(output, exit code) of a stage of one rank, which need not import everything again."""
    with tempfile.NamedTemporaryFile("r") as words:
        process = CONTEXT.Process(target=child, args=(script, options, None, words.name))
        process.start()
        process.join(timeout)
        process.kill()
        return words.read(), process.exitcode


def torchrun(script, *words, ranks=2, restarts=0, timeout=300):
    """(output, exit code) of a script's ranks, under torchrun if there are several. None outlives the time limit."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    launcher = [*launcher, f"--max-restarts={restarts}"] if ranks > 1 else []
    process = subprocess.Popen(
        [sys.executable, *launcher, script, *map(str, words)], cwd=ROOT, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    try:
        return process.communicate(timeout=timeout)[0], process.returncode
    finally:
        process.terminate()  # and not killed: torchrun ends its ranks
        process.wait()


def wrap(module, name, before):
    """Call ``before()`` each time before ``module.name`` runs."""
    module = importlib.import_module(module)
    original = getattr(module, name)

    def wrapped(*args, **kwargs):
        before()
        return original(*args, **kwargs)

    setattr(module, name, wrapped)


def once(places, times, do):
    """Call ``do()`` before the ``times``-th call of the functions at ``places`` (module, name), counted together."""
    calls = itertools.count(1)
    for module, name in places:
        wrap(module, name, lambda: next(calls) == times and do())


def signal_self(where, times, number):
    """Send a signal to this process as it enters the ``times``-th call of a function."""
    once([where], times, lambda: os.kill(os.getpid(), number))


def log_of(folder):
    records = [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]
    return [{k: v for k, v in record.items() if k not in CLOCK} for record in records]


def mount(folder, options):
    """Make a file system in memory at ``folder``, or skip the test where that is not allowed."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("file systems cannot be mounted here")


def unmount(folder):
    if folder.is_mount():
        subprocess.run(["umount", folder], check=True)


def assert_same_run(folder, whole):
    """All checkpoints with all that is in them, table and log, but for the seconds, are equal to the bit."""
    assert {p.name for p in folder.iterdir()} == {p.name for p in whole.iterdir()}, "a file is missing or left over"
    for name in (path.name for path in whole.glob("*.pth")):
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
