"""run_train.slurm and run_train.sh as a cluster runs them: a shell, tools/launch.py and two gloo ranks."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT
from runs import OPTIONS, log_of

import utils

# srun with one task: it leaves out its own options, and says that it is a step. scontrol notes how it was called.
COMMANDS = {
    "srun": """while [ "${1#--}" != "$1" ]; do shift; done
export SLURM_STEP_NUM_NODES=1 SLURM_STEP_NUM_TASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0
exec "$@"
""",
    "scontrol": """echo "$@" >> "$OUTPUT/scontrol.txt"\n""",
}


class Script:
    """A script of the repository on the digits, with a blank in every path. The job has more tasks than the step."""

    def __init__(self, folder, start, name, *options):
        self.folder, self.words = folder / "an output", folder / "words.txt"
        weights = self.folder / "reparam/vit_digits/reparamed.pth"
        if not weights.exists():
            weights.parent.mkdir(parents=True)
            weights.write_bytes(start.read_bytes())
            for command, text in COMMANDS.items():
                (folder / command).write_text(f"#!/bin/sh\n{text}")
                (folder / command).chmod(0o755)
        environment = {
            "PATH": f"{folder}:{os.environ['PATH']}", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "GPUS": "2",
            "MODELS": "vit_digits", "DATA": "no data", "OUTPUT": str(self.folder), "BATCH": "64",
            "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7", "SLURM_NTASKS": "8", "SLURM_NNODES": "4",
        }  # fmt: skip
        self.process = subprocess.Popen(
            ["sh", ROOT / name, *OPTIONS[2:], "--epochs", "60", "--num-workers", "1", *map(str, options)],
            env=os.environ | environment, stdout=self.words.open("w"), stderr=subprocess.STDOUT, cwd=folder,
            start_new_session=True,
        )  # fmt: skip

    @property
    def output(self):
        return self.folder / "peelable/vit_digits"

    def wait_for(self, condition, seconds=300):
        end = time.monotonic() + seconds
        while not condition():
            assert self.process.poll() is None and time.monotonic() < end, self.words.read_text()
            time.sleep(0.1)

    def end(self):
        """(exit code, last line that is on the screen), when no process is left."""
        running = descendants(self.process.pid)
        code, end = self.process.wait(300), time.monotonic() + 30
        while [pid for pid in running if Path(f"/proc/{pid}").exists()]:
            assert time.monotonic() < end, "processes are left"
            time.sleep(0.1)
        return code, self.words.read_text().splitlines()[-1]


def descendants(pid):
    """All processes below one, parents first."""
    files = Path(f"/proc/{pid}/task").glob("*/children")
    children = [int(child) for file in files for child in file.read_text().split()]
    return children + [below for child in children for below in descendants(child)]


def ranks_below(pid):
    """The processes that torchrun has started, which may still be importing."""
    return [child for child in descendants(pid) if b"\0-u\0" in Path(f"/proc/{child}/cmdline").read_bytes()]


STOPPED = "stopped by a signal, saved; the same command with --resume auto goes on"


def test_slurm_stops_a_run_and_puts_it_back_and_it_goes_on(start, tmp_path):
    """USR1 reaches every process of the step, as Slurm sends it; in the second life, Ctrl-C those of a terminal."""
    script = Script(tmp_path, start, "run_train.slurm")
    script.wait_for((script.output / "checkpoint_0.pth").exists)
    for pid in descendants(script.process.pid):
        os.kill(pid, signal.SIGUSR1)
    assert script.end() == (utils.STOPPED, STOPPED)
    assert (script.output / "mid_epoch.pth").exists()
    assert (script.folder / "scontrol.txt").read_text() == "requeue 7\n"
    epochs = len(log_of(script.output))
    script = Script(tmp_path, start, "run_train.sh")
    script.wait_for(lambda: len(log_of(script.output)) > epochs)
    os.killpg(script.process.pid, signal.SIGINT)
    assert script.end() == (utils.STOPPED, STOPPED)
    words = script.words.read_text()
    assert words.startswith("CPU, 2 rank(s) of 1 thread(s), torch ") and f"going on from epoch {epochs}, " in words
    assert [record["epoch"] for record in log_of(script.output)] == list(range(len(log_of(script.output))))


def test_a_signal_to_the_shell_alone_while_ranks_start_is_obeyed(start, tmp_path):
    script = Script(tmp_path, start, "run_train.sh")
    script.wait_for(lambda: len(ranks_below(script.process.pid)) == 2)
    script.process.terminate()
    assert script.end() == (utils.STOPPED, STOPPED)
    assert (script.output / "mid_epoch.pth").exists()


@pytest.mark.parametrize(("options", "line"), [
    (["--lr", "nan"], "argument --lr: 'nan' is not a number in (0, inf); --help explains every flag"),
    (["--pretrained", "nowhere.pth"], "--pretrained nowhere.pth: no such file; main_reparam.py ... writes it"),
])  # fmt: skip
def test_an_error_of_all_ranks_is_one_line_and_the_last(options, line, start, tmp_path):
    script = Script(tmp_path, start, "run_train.sh", *options)
    assert script.end() == (2, f"error: {line}".replace("...", "--model vit_digits"))
    assert script.words.read_text().count("error") == 1


def test_a_recipe_that_is_none_is_refused(tmp_path):
    result = subprocess.run(
        ["sh", ROOT / "run_test.sh"], env=os.environ | {"RECIPE": "theirs"}, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (2, "error: RECIPE=theirs: choose ours or paper\n")
