"""Several ranks, one of which dies or goes its own way."""

import json
import os
import socket
from argparse import Namespace

import pytest
import torch
import torch.distributed as dist
from runs import CONTEXT, OPTIONS, child, log_of, torchrun

import utils
from models.piad import dropout
from models.vit.pretrained import read_checkpoint

# The requirement, and with it the one bound on time in these tests: seconds from a rank's death to the end of the rest.
DEATH_IS_NOTICED_IN = 60

# Rank 1 dies twice: before the process group is there, and in the second epoch. It is late each time it starts again,
# so that rank 0 meets nothing but what the life before has left behind.
DIES_TWICE = """
import json, os, signal, sys, time

rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])

def note(event, **more):
    with open(sys.argv[1], "a") as file:
        file.write(json.dumps({"rank": rank, "life": life, "event": event, "time": time.time()} | more) + "\\n")

def die():
    note("dies")
    os.kill(os.getpid(), signal.SIGKILL)

note("begins")
import main_train, utils
from runs import once

epochs = main_train.TrainingRun.epochs
def noted(run):
    note("trains", epoch=run.epoch)
    return epochs(run)
main_train.TrainingRun.epochs = noted
if rank == 1 and life == 0:
    die()
if rank == 1:
    time.sleep(3)
if rank == 1 and life == 1:
    once([("engine", "_backward")], 13, die)
utils.run_stage(main_train.main, main_train.get_args(sys.argv[2:]))
"""


@pytest.mark.slow
def test_a_dead_rank_ends_the_others_and_a_restart_goes_on(start, tmp_path):
    script, notes = tmp_path / "script.py", tmp_path / "notes.txt"
    script.write_text(DIES_TWICE)
    options = [*OPTIONS, "--pretrained", start, "--resume", "auto", "--epochs", "2", "--batch-size", "64"]
    output, code = torchrun(script, notes, *options, "--output-dir", tmp_path / "out", restarts=2, timeout=400)
    assert code == 0, output
    events = [json.loads(line) for line in notes.read_text().splitlines()]

    def found(event, life):
        return sorted((e for e in events if (e["event"], e["life"]) == (event, life)), key=lambda e: e["rank"])

    assert [len(found("begins", life)) for life in range(4)] == [2, 2, 2, 0]
    assert [[e["epoch"] for e in found("trains", life)] for life in range(3)] == [[], [0, 0], [1, 1]]
    for life in range(2):
        # torchrun starts a life when nobody of the one before is left.
        (death,) = found("dies", life)
        assert min(e["time"] for e in found("begins", life + 1)) - death["time"] < DEATH_IS_NOTICED_IN
    assert [record["epoch"] for record in log_of(tmp_path / "out")] == [0, 1]


# Rank 1 alone is told to stop, in the second batch of the first evaluation. Rank 0 is the slower one.
IS_STOPPED = """
import os, signal, sys, time
import main_train, utils
from runs import once, signal_self, wrap

rank, life = int(os.environ["RANK"]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
print(f"life {life} of rank {rank}", flush=True)
if rank == 1:
    signal_self(("engine", "accuracy"), 8, signal.SIGTERM)
else:
    wrap("engine", "accuracy", lambda: time.sleep(0.2))
utils.run_stage(main_train.main, main_train.get_args(sys.argv[1:]))
"""


def test_one_rank_told_to_stop_stops_all_and_torchrun_does_not_start_them_again(start, tmp_path):
    script, folder = tmp_path / "script.py", tmp_path / "out"
    script.write_text(IS_STOPPED)
    options = [*OPTIONS, "--pretrained", start, "--batch-size", "64", "--output-dir", folder]
    output, code = torchrun(script, *options, restarts=2)
    assert code == 0 and output.count("stopped by a signal, saved") == 1, output
    assert "life 0 of rank 1" in output and "life 1" not in output and "rror" not in output
    content = read_checkpoint(folder / "mid_epoch.pth")
    assert content["epoch"] == -1 and content["position"]["updates"] == content["position"]["losses"] > 0
    assert {path.name for path in folder.iterdir()} == {"mid_epoch.pth", "mask_table.json"}


@pytest.fixture
def joined(monkeypatch):
    """A function that joins the ranks as torchrun's environment says and returns the store that they would use."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    stores = []
    monkeypatch.setattr(dist, "init_process_group", lambda *_, store, **__: stores.append(store))

    def join(restarts, shared="True", machines="1", allowed="3"):
        environment = {
            "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": str(server.port),
            "TORCHELASTIC_USE_AGENT_STORE": shared, "TORCHELASTIC_RESTART_COUNT": str(restarts),
            "TORCHELASTIC_MAX_RESTARTS": allowed, "GROUP_WORLD_SIZE": machines,
        }  # fmt: skip
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        utils._join_ranks("gloo", 0, 1)
        return stores[-1]

    return join


def test_a_life_does_not_see_what_the_one_before_has_stored(joined):
    joined(0).set("address", "old")
    assert joined(0).check(["address"])
    assert not joined(1).check(["address"])


def test_restarts_on_several_machines_need_a_store_for_each_life(joined):
    with pytest.raises(utils.InputError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        joined(0, machines="2")
    joined(0, machines="2", allowed="0")


@pytest.mark.parametrize(
    ("device", "ranks", "chosen", "current"),
    [
        ("auto", "1", "cuda", []),
        ("cuda:0", "1", "cuda:0", ["cuda:0"]),
        ("auto", "2", "cuda:1", ["cuda:1"]),
        ("cuda:0", "2", "cuda:1", ["cuda:1"]),
    ],
)
def test_every_rank_takes_its_own_gpu(device, ranks, chosen, current, monkeypatch):
    backends, set_to, args = [], [], Namespace(device=device, seed=0)
    monkeypatch.setenv("WORLD_SIZE", ranks)
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: set_to.append(str(device)))
    monkeypatch.setattr(utils, "machine_name", lambda device: "a GPU")
    monkeypatch.setattr(utils, "_join_ranks", lambda *arguments: backends.append(arguments))
    assert str(utils.start_up(args)) == args.device == chosen
    assert set_to == current
    assert backends == ([("nccl", 1, 2)] if ranks == "2" else [])
    assert (args.rank, args.world_size) == ((1, 2) if ranks == "2" else (0, 1))


STEP = {"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_ID": "2"}


@pytest.mark.parametrize(("environment", "ranks", "address"), [
    ({"SLURM_NTASKS": "8"}, (0, 0, 1), None),  # a shell of salloc, and a process that it starts
    ({"SLURM_NTASKS": "8", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}, (0, 0, 1), None),  # a batch script
    (STEP | {"SLURM_STEP_NODELIST": "gpu[07-08,11]"}, (1, 3, 4), "gpu07:25542"),
    (STEP | {"SLURM_STEP_NODELIST": "a-1,b-2", "MASTER_ADDR": "b-2", "MASTER_PORT": "5"}, (1, 3, 4), "b-2:5"),
    (STEP | {"SLURM_STEP_NODELIST": "a", "WORLD_SIZE": "1", "RANK": "0", "LOCAL_RANK": "0"}, (0, 0, 1), None),
])  # fmt: skip
def test_ranks_are_torchrun_s_or_those_of_a_step_of_slurm(environment, ranks, address, monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in ({"SLURM_JOB_ID": "1554"} | environment).items():
        monkeypatch.setenv(name, value)
    assert utils.ranks_in_environment() == ranks
    assert address in (None, f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}")


@pytest.mark.parametrize(("known", "missing"), [((), "RANK and LOCAL_RANK"), (("RANK",), "LOCAL_RANK")])
def test_a_launcher_that_does_not_say_which_rank_this_is_is_named(known, missing, monkeypatch):
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "1")
        if name not in known:
            monkeypatch.delenv(name)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(utils.InputError, match=f"^WORLD_SIZE is 2 in the environment, without {missing}; start"):
        utils.start_up(Namespace(device="cpu", seed=0))


def test_more_ranks_than_gpus_is_one_line_on_every_rank(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    for rank in ("0", "3"):
        for name in ("RANK", "LOCAL_RANK"):
            monkeypatch.setenv(name, rank)
        with pytest.raises(utils.InputError, match=r"^4 ranks on this machine, and 2 GPU\(s\) visible"):
            utils.start_up(Namespace(device="auto", seed=0))


def test_a_task_of_slurm_that_sees_its_own_gpu_alone_takes_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(utils, "machine_name", lambda _: "a GPU")
    monkeypatch.setattr(utils, "_join_ranks", lambda *_: None)
    for name, value in ({"SLURM_JOB_ID": "1", "SLURM_STEP_NODELIST": "a"} | STEP).items():
        monkeypatch.setenv(name, value)
    for name in ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE"):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    with pytest.raises(utils.InputError, match=r"^2 ranks on this machine, and 1 GPU\(s\) visible"):
        utils.start_up(Namespace(device="auto", seed=0))
    monkeypatch.setenv("SLURM_GPUS_PER_TASK", "1")
    assert str(utils.start_up(Namespace(device="auto", seed=0))) == "cuda:0"


def test_gpus_of_several_kinds_scale_their_gradients_alike(monkeypatch):
    monkeypatch.setattr(utils, "resolve_amp", lambda *_: "bf16")
    for others, chosen in ((["bf16", "bf16"], "bf16"), (["bf16", "fp16"], "fp16")):
        monkeypatch.setattr(utils, "gather", lambda _, others=others: others)
        args = Namespace(device="cpu", amp="auto", seed=0)
        utils.start_up(args)
        assert args.amp == chosen


def test_a_bug_on_one_of_several_ranks_is_a_traceback_at_once(monkeypatch, capsys):
    """And not after the other ranks' collectives, in which the end of the process group may wait for it."""
    ends = []

    def ended(code):
        ends.append(code)
        raise SystemExit(code)

    def main(args):
        raise (KeyError if args == "bug" else MemoryError)("here")

    monkeypatch.setattr(utils, "is_distributed", lambda: True)
    monkeypatch.setattr(utils.os, "_exit", ended)
    monkeypatch.setenv(utils.TRACEBACK, "1")
    for kind in ("bug", "known"):
        with pytest.raises(SystemExit):
            utils.run_stage(main, kind)
        assert "Traceback" in (words := capsys.readouterr().err) and "here" in words
    assert ends == [1, 1]


def test_a_signal_before_training_begins_says_that_nothing_is_saved(capsys):
    def stopped(_):
        raise utils.Interrupted

    with pytest.raises(SystemExit, match=str(utils.STOPPED)):
        utils.run_stage(stopped, Namespace())
    assert capsys.readouterr().err == "stopped by a signal, before there was anything to save\n"


def test_ctrl_c_while_ranks_start_is_no_failure_that_torchrun_restarts(tmp_path, monkeypatch, capsys):
    def pressed(_):
        raise KeyboardInterrupt

    with pytest.raises(SystemExit, match="130"):
        utils.run_stage(pressed, Namespace())
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv(utils.STOPPED_FILE, str(tmp_path / "stopped"))
    utils.run_stage(pressed, Namespace())
    assert (tmp_path / "stopped").exists() and capsys.readouterr().err == "stopped by Ctrl-C\n" * 2


def as_rank(rank, port):
    """Be one of two ranks, with statistics of its own."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    measured = dropout.branch_removal

    def skewed(*args):
        value, without = measured(*args)
        return value, without[::-1] if rank else without

    dropout.branch_removal = skewed


def run_as_ranks(commands, patch, folder):
    """What each of two ranks prints, which run main_train.py by a command of their own and must be refused."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    files = [folder / f"words{rank}.txt" for rank in range(2)]
    of_rank = [("main_train.py", commands[rank], (patch, rank, port), files[rank]) for rank in range(2)]
    ranks = [CONTEXT.Process(target=child, args=args) for args in of_rank]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join(200)
        process.kill()
    assert [process.exitcode for process in ranks] == [2, 2]
    return [[line for line in file.read_text().splitlines() if "error" in line] for file in files]


def test_ranks_that_grow_different_tables_stop_before_anything_is_written(start, tmp_path):
    command = [*OPTIONS, "--pretrained", start, "--output-dir", tmp_path / "out", "--batch-size", "64"]
    for (line,) in run_as_ranks([command] * 2, as_rank, tmp_path):
        assert line == "error: epoch 0: the ranks grew different width tables; their data or weights must differ"
    assert not list((tmp_path / "out").iterdir())


def test_ranks_that_read_different_weights_stop(start, tmp_path):
    """As on machines with disks of their own, of which one has the weights of another day."""
    content = read_checkpoint(start)
    content["model"]["head.bias"] += 1
    (tmp_path / "other").mkdir()
    torch.save(content, tmp_path / "other" / start.name)
    paths = [start, tmp_path / "other" / start.name]
    commands = [
        [*OPTIONS, "--pretrained", path, "--output-dir", tmp_path / "out", "--batch-size", "64"] for path in paths
    ]
    for (line,), path in zip(run_as_ranks(commands, as_rank, tmp_path), paths, strict=True):
        assert line.startswith(f"error: --pretrained {path} and what lies beside it: not every rank reads the same")
