"""Ten minutes of stopping and going on: nothing grows, nothing is left behind, and the result stays the same."""

import itertools
import json
import os
import random
import shutil
import signal
import statistics
import time
from pathlib import Path

import pytest
from runs import assert_same_run, begin

import utils
from training import TrainingRun

SECONDS = 600
EPOCHS = 60  # of a run; when it is done, the next one starts, until the time is over
LIFE = 0.5, 15.0  # seconds after which a signal comes, between these bounds
WARM_UP = 15  # epochs
SIGNALS = signal.SIGKILL, signal.SIGTERM, signal.SIGUSR1
# Resident memory may differ by so much between the first and the last third: the allocator's, not ours.
TOLERANCE = 0.05
OPTIONS = ["--epochs", str(EPOCHS), "--num-workers", "1", "--save-every-steps", "2"]


def sampled(notes):
    """Note what this process occupies after each epoch: kB of memory, now and at most, open files, processes."""
    save_epoch = TrainingRun._save_epoch

    def noted(run, best):
        save_epoch(run, best)
        lines = Path("/proc/self/status").read_text().splitlines()
        memory = {line.split(":")[0]: int(line.split()[1]) for line in lines if line.startswith(("VmRSS", "VmHWM"))}
        children = [int(pid) for file in Path("/proc/self/task").glob("*/children") for pid in file.read_text().split()]
        files = len(os.listdir("/proc/self/fd"))
        with open(notes, "a") as file:
            record = {"pid": os.getpid(), "epoch": run.epoch - 1, "files": files, "children": children}
            file.write(json.dumps(record | memory) + "\n")

    TrainingRun._save_epoch = noted


def read_notes(notes):
    return [json.loads(line) for line in notes.read_text().splitlines()]


def assert_flat(first, last, tolerance=0.0):
    assert last <= first * (1 + tolerance), f"{first} has become {last}"


def thirds(records):
    """The first and the last third."""
    count = len(records) // 3
    assert count
    return records[:count], records[-count:]


def assert_nothing_grows_within(samples):
    first, last = thirds([sample for sample in samples if sample["epoch"] >= WARM_UP])
    for name, tolerance in (("VmRSS", TOLERANCE), ("files", 0.0)):
        assert_flat(max(s[name] for s in first), max(s[name] for s in last), tolerance)
    assert_flat(max(len(s["children"]) for s in first), max(len(s["children"]) for s in last))


def lives_of(samples):
    return [list(group) for _, group in itertools.groupby(samples, key=lambda sample: sample["pid"])]


def assert_nothing_grows_over_lives(samples):
    """From one life to the next: the most memory that each had, and what was open at the end of its epochs."""
    first, last = thirds(lives_of(samples))
    assert_flat(middle_high_water(first), middle_high_water(last), TOLERANCE)
    for count in (lambda s: s["files"], lambda s: len(s["children"])):
        assert_flat(max(count(s) for life in first for s in life), max(count(s) for life in last for s in life))


def middle_high_water(lives):
    """The median over lives of the most memory that each had, in kB."""
    return statistics.median(life[-1]["VmHWM"] for life in lives)


def end_of(process, seconds, number):
    """The exit code of a run that gets the signal ``number`` after so many seconds, unless it is done by then."""
    process.join(seconds)
    if process.is_alive():
        os.kill(process.pid, number)
        process.join(60)
    code = process.exitcode
    process.kill()
    # A life that has not begun to train has nothing to save, and ends at once.
    assert code in (0, -number, utils.STOPPED), f"{number.name}: {code}"
    return code


def left_over(pids, seconds=30):
    """Which of these processes of ours are still there after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        commands = {pid: Path(f"/proc/{pid}/cmdline") for pid in pids}
        pids = [pid for pid, file in commands.items() if file.exists() and b"forkserver" in file.read_bytes()]
        if not pids or time.monotonic() > end:
            return pids
        time.sleep(1)


@pytest.mark.slow
def test_ten_minutes_of_stopping_and_going_on(start, tmp_path):
    whole, alone, disturbed = tmp_path / "whole", tmp_path / "alone.txt", tmp_path / "disturbed.txt"
    process = begin(whole, *OPTIONS, start=start, patch=(sampled, alone))
    assert end_of(process, SECONDS, signal.SIGKILL) == 0
    size = max(path.stat().st_size for path in whole.glob("*.pth"))
    draw, signals, ends, most, runs = random.Random(0), itertools.cycle(SIGNALS), [], 0, 0
    deadline = time.monotonic() + SECONDS
    while time.monotonic() < deadline:
        folder, code = tmp_path / f"run{runs}", None
        while code != 0:
            process = begin(folder, *OPTIONS, start=start, patch=(sampled, disturbed))
            seconds = draw.uniform(*LIFE) if time.monotonic() < deadline else SECONDS
            code = end_of(process, seconds, next(signals))
            ends.append(code)
            most = max(most, sum(path.stat().st_size for path in folder.glob("*")))
            assert len(list(folder.glob(utils.LEFT_OVER))) <= 1, "more than what the last life was writing"
        assert_same_run(folder, whole)
        shutil.rmtree(folder)
        runs += 1
    report(read_notes(alone), read_notes(disturbed), runs, ends, most / size)
    assert_nothing_grows_within(read_notes(alone))
    assert_nothing_grows_over_lives(read_notes(disturbed))
    # Two checkpoints and the next, the best, the one within an epoch, and small files.
    assert most < 5.5 * size
    assert not left_over({pid for sample in read_notes(disturbed) for pid in sample["children"]})


def report(alone, disturbed, runs, ends, most):
    """Print the figures (pytest -s)."""
    counts = {code: ends.count(code) for code in sorted(set(ends))}
    print(f"{runs} runs of {EPOCHS} epochs; lives by exit code {counts}; at most {most:.2f} checkpoints on disk")
    settled = thirds([sample for sample in alone if sample["epoch"] >= WARM_UP])
    resident = [f"{statistics.median(s['VmRSS'] for s in third) / 1024:.1f}" for third in settled]
    print(f"alone: median resident memory in the first and the last third: {' and '.join(resident)} MB")
    highest = [f"{middle_high_water(third) / 1024:.1f}" for third in thirds(lives_of(disturbed))]
    print(f"disturbed: median high-water mark in the first and the last third of lives: {' and '.join(highest)} MB")
    samples = alone + disturbed
    files, children = {s["files"] for s in samples}, {len(s["children"]) for s in samples}
    print(f"open files after any epoch: {sorted(files)}, processes of its own: {sorted(children)}")
