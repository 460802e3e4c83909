"""Runs that are killed or told to stop, against one that is left alone: equal to the bit."""

import itertools
import multiprocessing
import os
import platform
import random
import shutil
import signal
import threading

import pytest
import torch
from conftest import tiny_supernet
from runs import assert_same_run, log_of, mount, once, signal_self, train, unmount
from test_engine import training_args

import engine
import training
import utils
from models.piad.width_table import WidthTable
from models.subnet.store import load_supernet
from models.vit.pretrained import read_checkpoint
from models.vit.widths import Widths
from training import TrainingRun

# Where runs are disturbed: (module, function).
BACKWARD, EVALUATE, RENAME = ("engine", "_backward"), ("engine", "accuracy"), ("os", "replace")
IMPORTANCE = ("models.piad.dropout", "branch_removal")


def kill_after(events, delay):
    """SIGKILL this process ``delay`` seconds after it has done so many things."""
    places = [BACKWARD, ("engine", "_finish_update"), ("main_train", "evaluate_all"), IMPORTANCE, ("torch", "save")]
    once([*places, RENAME], events, threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start)


def die_while_writing(times):
    """SIGKILL this process when half of the ``times``-th checkpoint is on disk."""
    original, calls = torch.save, itertools.count(1)

    def save(content, file):
        original(content, file)
        if next(calls) == times:
            file.truncate(file.tell() // 2)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = save


@pytest.fixture(scope="module")
def whole(start, tmp_path_factory):
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, start=start) == 0
    return folder


def test_the_whole_run_is_worth_comparing(whole):
    assert [record["epoch"] for record in log_of(whole)] == [0, 1, 2]
    assert not list(whole.glob(".*")) and not (whole / training.MID_EPOCH_NAME).exists()
    moved = read_checkpoint(whole / "checkpoint_2.pth")["model"], read_checkpoint(whole / "checkpoint_1.pth")["model"]
    assert any(not torch.equal(moved[0][name], moved[1][name]) for name in moved[0])
    assert load_supernet(whole).table.last > 20


@pytest.mark.parametrize("patch", [
    pytest.param((signal_self, IMPORTANCE, 2, signal.SIGKILL), id="in the importance pass"),
    pytest.param((signal_self, EVALUATE, 40, signal.SIGKILL), id="in evaluation"),
    pytest.param((signal_self, RENAME, 4, signal.SIGKILL), id="before the rename"),
    pytest.param((die_while_writing, 3), id="half a checkpoint"),
    pytest.param((die_while_writing, 10), id="half a best checkpoint"),
])  # fmt: skip
def test_killed_at_the_worst_moments(patch, whole, start, tmp_path):
    assert train(tmp_path, start=start, patch=patch) == -signal.SIGKILL
    assert train(tmp_path, "--num-workers", "2", start=start) == 0
    assert_same_run(tmp_path, whole)


def lives(kills, folder, start, seed):
    """A run that is killed so many times at random moments, then left alone."""
    draw = random.Random(seed)
    for _ in range(kills):
        patch = (kill_after, draw.randint(4, 25), draw.random() * 0.05)
        assert train(folder, start=start, patch=patch) == -signal.SIGKILL
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
    ("where", "times", "number"),
    [(BACKWARD, 7, signal.SIGTERM), (EVALUATE, 41, signal.SIGUSR1), (IMPORTANCE, 2, signal.SIGINT)],
)
def test_a_signal_ends_the_step_saves_and_says_so_by_its_exit_code(where, times, number, whole, start, tmp_path):
    patch = signal_self, where, times, number
    assert train(tmp_path, "--save-every-steps", "0", start=start, patch=patch) == utils.STOPPED
    assert (tmp_path / training.MID_EPOCH_NAME).exists()
    assert train(tmp_path, start=start) == 0
    assert_same_run(tmp_path, whole)


# ------------------------------------------------------------------------------------------ which checkpoint


def test_auto_passes_over_what_is_damaged(tmp_path, capsys):
    write_checkpoints(tmp_path, 3)
    paths = [tmp_path / f"checkpoint_{n}.pth" for n in (2, 1, 0)]
    assert training.to_resume("auto", tmp_path) == paths and training.to_resume("auto", tmp_path / "empty") == []
    content = paths[0].read_bytes()
    paths[0].write_bytes(content[: len(content) // 2])
    assert new_run(tmp_path).resume(tmp_path)[0] == paths[1] and "passed over" in capsys.readouterr().out
    with pytest.raises(utils.InputError, match="--resume auto"):
        training.to_resume(None, tmp_path)
    for path in (*paths, tmp_path / training.MID_EPOCH_NAME):
        path.write_bytes(b"")
    with pytest.raises(utils.InputError) as caught:
        new_run(tmp_path).resume(tmp_path)
    tried = "checkpoint_2.pth, checkpoint_1.pth, checkpoint_0.pth, mid_epoch.pth (the notes say why)"
    advice = "give a whole copy as --resume FILE, or start anew in another --output-dir"
    assert str(caught.value) == f"--resume auto: {tmp_path} holds nothing to go on from, of {tried}; {advice}"
    said = capsys.readouterr().out
    assert f"{paths[0]}: not a readable checkpoint" in said and said.count("passed over") == 4


def test_ranks_that_read_different_checkpoints_stop(tmp_path, monkeypatch):
    write_checkpoints(tmp_path, 2)
    monkeypatch.setattr(utils, "all_the_same", lambda text: text.startswith("["))  # of the list, and not of the choice
    with pytest.raises(utils.RanksDisagree, match=r"not every rank can read .*checkpoint_1\.pth"):
        new_run(tmp_path).resume(tmp_path)


def test_a_mid_epoch_file_counts_by_its_position(whole, tmp_path):
    content = read_checkpoint(whole / "checkpoint_1.pth")
    for epoch, updates, expected in ((1, 3, "mid_epoch.pth"), (1, 0, "mid_epoch.pth"), (0, 5, "checkpoint_1.pth")):
        content["epoch"], content["position"]["updates"] = epoch, updates
        torch.save(content, tmp_path / training.MID_EPOCH_NAME)
        shutil.copy(whole / "checkpoint_1.pth", tmp_path)
        assert training.to_resume("auto", tmp_path)[0].name == expected


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
    training.trim_log(log, 3)
    log.write_bytes(b'{"epoch": 0, "a": 1}\n\xff\x00\n[]\n{"epoch": "x"}\n3\n{"epoch": 1}\n{"epoch": 2, "b')
    training.trim_log(log, 1)
    assert log.read_text() == '{"epoch": 0, "a": 1}\n'


# ------------------------------------------------------------------------------------------ full disks


@pytest.fixture
def disk(tmp_path):
    """A function that makes a file system of so many bytes, or changes its size, and returns its folder."""
    folder = tmp_path / "disk"

    def of_size(count):
        mount(folder, f"{'remount,' if folder.is_mount() else ''}size={count}")
        return folder

    yield of_size
    unmount(folder)


def test_a_disk_that_fills_up_costs_no_more_than_what_was_not_saved(whole, start, disk, tmp_path):
    size = (whole / "checkpoint_2.pth").stat().st_size
    folder, words = disk(size * 3 // 2), tmp_path / "words.txt"
    assert train(folder, "--save-every-steps", "0", start=start, words=words) == 2
    said = words.read_text().splitlines()
    assert said[-1] == f"error: {folder / training.BEST_NAME}: cannot be written (No space left on device)"
    assert "Traceback" not in " ".join(said)
    assert {path.name for path in folder.iterdir()} == {"checkpoint_0.pth", "mask_table.json", "log.txt"}
    assert training.to_resume("auto", folder) == [folder / "checkpoint_0.pth"]
    assert load_supernet(folder, model="vit_digits").table.last > 0
    disk(size * 6)
    assert train(folder, start=start) == 0
    assert_same_run(folder, whole)


# ------------------------------------------------------------------------------------------ bad losses


def test_bad_losses_are_skipped_and_counted_up_to_the_allowed_number(start, tmp_path):
    assert train(tmp_path / "one", "--skip-nonfinite", "1", start=start, patch=(poison, 5)) == 0
    assert [record.get("train_skipped", 0) for record in log_of(tmp_path / "one")] == [1, 1, 1]
    assert train(tmp_path / "none", start=start, patch=(poison, 5)) == 2
    assert read_checkpoint(tmp_path / "none" / training.MID_EPOCH_NAME)["position"]["updates"] == 4


def poison(times):
    """Make the ``times``-th loss of this process infinite."""
    original, calls = engine._backward, itertools.count(1)
    engine._backward = lambda *args: original(*args) * (float("inf") if next(calls) == times else 1.0)


# ------------------------------------------------------------------------------------------ in this process

CPU = torch.device("cpu")


def new_run(folder, **changes):
    """A run of four batches an epoch that writes into ``folder``, and goes on there as ``resume`` says."""
    args = {"resume": "auto", "keep_last": 9, "opt": "adamw", "given": [], "rank": 0, "world_size": 1}
    run = TrainingRun(tiny_supernet(), training_args(**args | changes), CPU, 4)
    run.output, run.more = folder, dict
    return run


def write_checkpoints(folder, count, **changes):
    """``count`` epochs of one update each, with gradients of zero."""
    run = new_run(folder, **changes)
    for epoch in range(count):
        for parameter in run.model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        run.update(epoch)
        run.begin_epoch(epoch)
        run._save_epoch(best=epoch == count - 1)


@pytest.mark.parametrize("member", ["optimizer", "lr_scheduler", "epoch", "max_accuracy", "position", "model"])
@pytest.mark.parametrize("value", ["text", [1], {"state": 1, "base_values": "x", "updates": "x"}, None])
def test_a_member_of_another_kind_is_refused_and_auto_goes_on_from_the_one_before(member, value, tmp_path, capsys):
    write_checkpoints(tmp_path, 2)
    newest = tmp_path / "checkpoint_1.pth"
    torch.save(read_checkpoint(newest) | {member: value}, newest)
    run = new_run(tmp_path)
    path, _ = run.resume(tmp_path)
    assert path == tmp_path / "checkpoint_0.pth" and run.epoch == 1 and "passed over" in capsys.readouterr().out
    with pytest.raises(utils.InputError, match="checkpoint_1"):
        new_run(tmp_path, resume=str(newest)).resume(tmp_path)


@pytest.mark.parametrize("opt", ["adamw", "lamb", "adafactor"])
def test_an_optimiser_takes_its_own_state_and_no_other(opt, tmp_path):
    write_checkpoints(tmp_path, 1, opt=opt)
    path = tmp_path / "checkpoint_0.pth"
    new_run(tmp_path, opt=opt).restore(path)
    content = read_checkpoint(path)
    tensors = {(i, n): v for i, s in content["optimizer"]["state"].items() for n, v in s.items() if n.startswith("exp")}
    (index, name), value = next((key, value) for key, value in tensors.items() if value.ndim)
    state = content["optimizer"]["state"][index]
    for damaged in (state | {name: value[..., :-1]}, {other: v for other, v in state.items() if other != name}):
        content["optimizer"]["state"][index] = damaged
        torch.save(content, path)
        with pytest.raises(utils.InputError, match=f"{name} of .* is missing, or of another shape"):
            new_run(tmp_path, opt=opt).restore(path)


def test_going_back_to_a_checkpoint_gives_up_what_is_later(tmp_path, capsys):
    write_checkpoints(tmp_path, 4)
    mid = new_run(tmp_path)
    mid.begin_epoch(4)
    mid.updates = 2
    mid.save_mid_epoch()
    run = new_run(tmp_path, resume=str(tmp_path / "checkpoint_1.pth"))
    run.resume(tmp_path)
    with run.files(tmp_path):
        pass
    names = {path.name for path in tmp_path.iterdir()}
    later = {f"{name}.pth.superseded" for name in ("checkpoint_2", "checkpoint_3", "mid_epoch", "best_checkpoint")}
    assert names == {"checkpoint_0.pth", "checkpoint_1.pth", "mid_epoch.pth"} | later
    assert "going on from epoch 2, update 0: " in capsys.readouterr().out
    again = new_run(tmp_path)
    again.resume(tmp_path)
    assert (again.epoch, again.updates, again.max_accuracy) == (2, 0, 0.0)


@pytest.mark.parametrize("count", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_later_life_of_a_run_that_began_at_a_file_goes_on_and_not_back(count, tmp_path, monkeypatch):
    write_checkpoints(tmp_path, 3)
    file = str(tmp_path / "checkpoint_0.pth")
    monkeypatch.setenv(count, "1")
    run = new_run(tmp_path, resume=file)  # the life before ended before it had written anything
    run.resume(tmp_path)
    with run.files(tmp_path):
        pass
    assert run.epoch == 1 and not (tmp_path / "checkpoint_2.pth").exists()
    for epoch in (1, 2):
        run.begin_epoch(epoch)
        run._save_epoch(best=False)
    again = new_run(tmp_path, resume=file)
    again.resume(tmp_path)
    with again.files(tmp_path):
        pass
    assert again.epoch == 3 and (tmp_path / "checkpoint_2.pth").exists()
    monkeypatch.delenv(count)
    by_hand = new_run(tmp_path, resume=file)
    by_hand.resume(tmp_path)
    assert by_hand.epoch == 1


def test_updates_that_overflow_in_fp16_are_counted_and_end_if_they_do_not_stop(tmp_path):
    run = new_run(tmp_path)
    run.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-12)
    before = {name: value.clone() for name, value in run.model.state_dict().items()}

    def update(value):
        for parameter in run.model.parameters():
            parameter.grad = torch.full_like(parameter, value)
        run.scaler.scale(torch.ones(()))
        run.update(0)

    update(float("inf"))
    assert run.overflowed == 1 and all(torch.equal(before[n], v) for n, v in run.model.state_dict().items())
    update(1e-6)
    assert run.overflowed == 1 and any(not torch.equal(before[n], v) for n, v in run.model.state_dict().items())
    run.save_mid_epoch()
    again = new_run(tmp_path)
    again.resume(tmp_path)
    assert again.overflowed == 1
    update(float("nan"))
    with pytest.raises(FloatingPointError, match="gradients are not finite at step 0, however small"):
        update(float("inf"))


def test_another_program_s_best_accuracy_is_of_something_else(tmp_path):
    write_checkpoints(tmp_path, 1)
    path = tmp_path / "checkpoint_0.pth"
    content = read_checkpoint(path) | {"max_accuracy": 81.8}
    torch.save(content, path)
    theirs = {name: value for name, value in content.items() if name != "position"}
    for saved, best in ((content, 81.8), (theirs, 0.0)):
        torch.save(saved, path)
        run = new_run(tmp_path)
        run.restore(path)
        assert run.max_accuracy == best


def test_flags_are_compared_with_those_of_the_checkpoint(tmp_path, capsys):
    write_checkpoints(tmp_path, 1, mask_table="a.json", grow_epochs=5)
    path = tmp_path / "checkpoint_0.pth"
    refused = [
        ({"lr": 0.5, "sched": "step"}, "--lr 0.5 (there 0.01), --sched step (there cosine)"),
        ({"epochs": 9}, "--epochs 9 (there 2)"),
        ({"batch_size": 16}, "--batch-size 16 (there 8)"),
        ({"mask_table": None}, "--mask-table None (there a.json)"),
    ]
    for changes, words in refused:
        with pytest.raises(utils.InputError) as caught:
            new_run(tmp_path, **{"mask_table": "a.json"} | changes).resume(tmp_path)
        assert str(caught.value) == f"--resume {path}: trained otherwise than {words}; give it the same flags"
    assert "passed over" not in capsys.readouterr().out
    run = new_run(tmp_path, mask_table="b.json", grow_epochs=9, batch_size=4, accum_iter=2, keep_last=3, model_ema=True)
    run.resume(tmp_path)
    words = {"--batch-size 4 (there 8)", "--accum-iter 2 (there 1)", "--model-ema True (there False)"}
    words |= {"--keep-last 3 (there 9)", "--grow-epochs 9 (there 5)"}
    assert set(capsys.readouterr().out.partition(".pth: ")[2].strip().split(", ")) > words


def test_the_official_code_s_checkpoint_is_gone_on_from(tmp_path, capsys):
    """Its schedule and averaged weights are in it or not; its arguments may be of any kind, or missing."""
    write_checkpoints(tmp_path, 1, lr=0.25)
    path = tmp_path / "checkpoint_0.pth"
    content = {name: value for name, value in read_checkpoint(path).items() if name not in ("position", "args")}
    content["model"]["head.bias"] += 1
    torch.save(content, path)
    run = new_run(tmp_path, model_ema=True)
    run.resume(tmp_path)
    assert run.epoch == 1 and run.lr == run.optimizer.param_groups[0]["initial_lr"] == 0.25
    assert torch.equal(run.ema.module.head.bias, content["model"]["head.bias"])
    assert "is of another program: its learning rate and schedule are taken over" in capsys.readouterr().out


def test_defaults_give_way_with_a_note(capsys):
    run = new_run(None, warmup_epochs=5, epochs=3, min_lr=1.0)
    assert (run.args.warmup_epochs, run.args.min_lr) == (3, 0.01)
    assert "note: --warmup-epochs 5: --epochs is 3, so it is 3\n" in capsys.readouterr().out
    run = new_run(None, lr=1e-3, unscale_lr=False, min_lr=1e-4, warmup_lr=1e-5)  # 8 images: 1.6e-5
    assert run.args.min_lr == run.lr == pytest.approx(1e-3 * 8 / 512) and run.args.warmup_lr == 1e-5
    note = "note: --min-lr 0.0001: the learning rate of 8 images an update is 1.5625e-05, so it is 1.5625e-05\n"
    assert note in capsys.readouterr().out
    with pytest.raises(utils.InputError, match=r"--min-lr 0\.0001: the learning rate of 8 images an update is"):
        new_run(None, lr=1e-3, unscale_lr=False, min_lr=1e-4, given=["min_lr"])


@pytest.mark.parametrize(("sched", "rates"), [("step", [1, 0.1, 0.01, 0.001]), ("multistep", [1, 0.1, 0.01, 0.01])])
def test_schedules_in_steps_fall_by_a_tenth_as_their_help_says(sched, rates):
    run, found = new_run(None, epochs=100, sched=sched), []
    for epoch in (0, 30, 60, 90):
        run.scheduler.step(epoch)
        found.append(run.optimizer.param_groups[0]["lr"] / run.lr)
    assert found == pytest.approx(rates)


# ------------------------------------------------------------------------------------------ one run in a folder


def enter(folder, end):
    """In a process of its own: take ``folder``, and end by a signal; or end with 0 if another run is in it."""
    try:
        utils.output_folder(folder)
        os.kill(os.getpid(), signal.SIGKILL)
    except utils.InputError as error:
        assert str(error) == f"--output-dir {folder}: {end} is writing there; take another folder"


def test_a_folder_has_one_run_at_a_time_and_only_our_leftovers_are_removed(tmp_path):
    here = f"process {os.getpid()} on {platform.node()}"
    (tmp_path / ".log.txt.1.skd-part").touch()
    (tmp_path / ".of_a_user.1.part").touch()
    utils.output_folder(tmp_path)
    for code in (0, -signal.SIGKILL):
        process = multiprocessing.get_context("fork").Process(target=enter, args=(tmp_path, here))
        process.start()
        process.join(60)
        assert process.exitcode == code
        utils._unlock()
    utils.output_folder(tmp_path)  # a dead process has no lock
    utils._unlock()
    assert [path.name for path in tmp_path.iterdir()] == [".of_a_user.1.part"]
