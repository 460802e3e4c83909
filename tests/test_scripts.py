"""run_train.slurm and run_train.sh as a cluster runs them: a shell, tools/launch.py and two gloo ranks."""

import contextlib
import glob
import importlib
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


def readings(pattern):
    """What the files of a pattern hold, but for processes that have ended in between."""
    for file in glob.glob(pattern):
        with contextlib.suppress(OSError):
            yield Path(file).read_bytes()


def descendants(pid):
    """All processes below one, parents first."""
    children = [int(child) for words in readings(f"/proc/{pid}/task/*/children") for child in words.split()]
    return children + [below for child in children for below in descendants(child)]


def ranks_below(pid):
    """The processes that torchrun has started, which may still be importing."""
    return [child for child in descendants(pid) if b"\0-u\0" in b"".join(readings(f"/proc/{child}/cmdline"))]


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


# ------------------------------------------------------------------------------------------ commands


def commands_of(script, folder, *options, **variables):
    """The commands that a script of the repository gives to $PYTHON: lists of words."""
    python, folder = folder / "python", folder / "with blanks"
    folder.mkdir(exist_ok=True)
    python.write_text('#!/bin/sh\nfor word; do echo "$word"; done\necho END\n')
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "DATA": "my data", "OUTPUT": "my output"} | variables
    command = ["sh", ROOT / script, *options]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True, check=True)
    assert not result.stderr
    return [words.splitlines() for words in result.stdout.split("END\n")[:-1]]


def arguments_of(command):
    """(what goes to torchrun, what the stage understands) of a command."""
    place = next(index for index, word in enumerate(command) if Path(word).name.startswith("main_"))
    return command[1:place], importlib.import_module(Path(command[place]).stem).get_args(command[place + 1 :])


@pytest.mark.parametrize("script", ["run_reparam.sh", "run_train.sh", "run_test.sh", "run_train_peeled.sh"])
def test_a_script_runs_its_stage_on_every_model(script, tmp_path):
    commands = commands_of(script, tmp_path, "--seed", "3")
    stages = [arguments_of(command) for command in commands]
    assert [args.model for _, args in stages] == ["vit_tiny", "vit_small", "vit_base"]
    for launcher, args in stages:
        assert launcher == ["--standalone", "--nproc-per-node=8"]
        assert (args.data_path, args.seed) == ("my data", 3) and args.output_dir.startswith("my output/")


def test_one_switch_gives_the_paper_s_method(tmp_path):
    found = {}
    for recipe in ("ours", "paper"):
        for script in ("run_reparam.sh", "run_train.sh"):
            found[script, recipe] = arguments_of(commands_of(script, tmp_path, RECIPE=recipe, MODELS="vit_base")[0])[1]
    for recipe, expected in (("ours", ("balanced", "greedy", True)), ("paper", ("pca", "hessian", False))):
        args = found["run_reparam.sh", recipe]
        assert (args.basis, args.mlp_order, args.compensation) == expected
    ours, paper = found["run_train.sh", "ours"], found["run_train.sh", "paper"]
    assert ours.mask_table == "auto" and paper.mask_table == "none" and "grow_epochs" not in ours.given
    assert (paper.grow_epochs, paper.drop_ratio, paper.proxy_samples) == (50, 0.875, 1024)
    assert ours.epochs == paper.epochs == 150


def test_machines_are_taken_from_the_step_or_from_the_variables(tmp_path):
    (tmp_path / "scontrol").write_text("#!/bin/sh\necho first\necho second\n")
    (tmp_path / "scontrol").chmod(0o755)
    slurm = {"SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1", "SLURM_JOB_ID": "10042", "SLURM_STEP_NODELIST": "x"}
    given = {"NODES": "3", "NODE_RANK": "2", "MASTER": "here:99"}
    path = f"{tmp_path}:{os.environ['PATH']}"
    for variables, expected in ((slurm, ("2", "1", "first", "20042")), (given, ("3", "2", "here", "99"))):
        words, _ = arguments_of(commands_of("run_train.sh", tmp_path, MODELS="vit_tiny", PATH=path, **variables)[0])
        names = ("--nnodes", "--node-rank", "--master-addr", "--master-port")
        assert words == [f"{n}={v}" for n, v in zip(names, expected, strict=True)] + ["--nproc-per-node=8"]


def test_a_recipe_that_is_none_is_refused(tmp_path):
    result = subprocess.run(
        ["sh", ROOT / "run_test.sh"], env=os.environ | {"RECIPE": "theirs"}, capture_output=True, text=True
    )
    assert (result.returncode, result.stderr) == (2, "error: RECIPE=theirs: choose ours or paper\n")
