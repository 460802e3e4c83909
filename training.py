"""A training run: all that training changes, saved so that a stopped run goes on as if it had never been stopped."""

import json
import os
import signal
from contextlib import contextmanager, suppress
from pathlib import Path

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import utils
from models.subnet.store import numbered_checkpoints
from models.vit.pretrained import load_weights, read_checkpoint, save_checkpoint
from models.vit.weights import digest
from utils import InputError, print_once

BEST_NAME, MID_EPOCH_NAME, LOG_NAME = "best_checkpoint.pth", "mid_epoch.pth", "log.txt"
COUNTS = ("updates", "losses", "skipped", "overflowed")
# Below this loss scale no gradient is too large for fp16: they are not finite themselves.
LEAST_SCALE = 2**-14
# Arguments that may differ from those of the checkpoint that a run goes on from. Ranks and batches: if their product
# stays. Where a run starts from is in the checkpoint; main_train.py compares the tables.
MAY_DIFFER = {
    "data_path", "num_workers", "pin_mem", "skip_bad_images", "eval_crop_ratio", "device", "amp", "batch_size",
    "accum_iter", "world_size", "compile", "output_dir", "keep_last", "save_every_steps", "eval_period",
    "skip_nonfinite", "tensorboard", "use_ema", "pretrained", "checkpoint", "mask_table", "teacher_path", "model_ema",
    "compensation", "compensate", "calibrate", "op_code", "macs", "macs_ratio", "params", "latency_ms",
    "latency_device", "latency_batch_size", "finer",
}  # fmt: skip
# How a width table grows: without effect if --mask-table gives a complete one.
OF_GROWTH = {
    "grow_epochs", "sensitivity", "drop_ratio", "skip_blocks", "only", "min_width", "multiple_of", "proxy_samples",
    "objective",
}  # fmt: skip
NOT_COMPARED = {"resume", "rank", "given"}


class FlagsDiffer(InputError):
    """A run cannot go on with these flags, from any of its checkpoints."""


class TrainingRun:
    """The model, optimiser, schedule, averaged weights and position of a training run, and its files.

    Position: ``epoch`` is under way and ``updates`` of its updates are done, with a mean loss of ``loss_sum /
    losses``; ``skipped`` counts updates left out for a non-finite loss. ``last`` is the path of the last checkpoint,
    ``parallel`` the model, wrapped for several ranks. find_unused: whether a backward pass may leave parameters out, as
    that of a sub-network without a branch.

        with run.files(output, more):       # a stop by a signal is saved
            for epoch in run.epochs():      # from where the run stands
                figures = train_one_epoch(run, ...)
                run.finish_epoch(figures, score)
    """

    def __init__(self, model, args, device, batches_per_epoch, find_unused=False):
        self.model, self.args, self.device = model, args, device
        self.updates_per_epoch = batches_per_epoch // args.accum_iter
        if not self.updates_per_epoch:
            raise InputError(f"--accum-iter {args.accum_iter}: an epoch has {batches_per_epoch} batches")
        # DeiT's rule: the rate is given for 512 images a step.
        self.batch = args.batch_size * args.accum_iter * utils.world_size()
        self.lr = args.lr if args.unscale_lr else args.lr * self.batch / 512
        for name in ("min_lr", "warmup_lr"):
            utils.at_most(args, name, self.lr, f"the learning rate of {self.batch} images an update is {self.lr:g}")
        utils.at_most(args, "warmup_epochs", args.epochs, f"--epochs is {args.epochs}")
        self.optimizer = self._optimizer(model)
        self.scheduler, _ = create_scheduler_v2(
            self.optimizer, sched=args.sched, num_epochs=args.epochs, min_lr=args.min_lr, warmup_lr=args.warmup_lr,
            warmup_epochs=args.warmup_epochs, updates_per_epoch=self.updates_per_epoch, decay_epochs=30,
            decay_milestones=(30, 60),
        )  # fmt: skip
        self.ema = ModelEmaV3(model, decay=args.model_ema_decay) if args.model_ema else None
        self.scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")
        self.max_accuracy, self.skipped, self.overflowed = 0.0, 0, 0
        self.resumed = self.last = self.board = None
        self.from_file = False
        self.begin_epoch(0)
        self.parallel = model
        if utils.is_distributed():
            self.parallel = DistributedDataParallel(model, find_unused_parameters=find_unused)

    def _optimizer(self, parameters):
        return create_optimizer_v2(parameters, opt=self.args.opt, lr=self.lr, weight_decay=self.args.weight_decay)

    def update(self, step):
        """One optimiser step with the gradients that are there; ``step`` is the global one.

        In fp16 a step whose gradients overflow is left out, counted, and followed by steps of half the loss scale.
        Raises FloatingPointError if that does not help.
        """
        if self.args.clip_grad:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), self.args.clip_grad)
        scale = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        before, scale = scale, self.scaler.get_scale()
        self.overflowed += scale < before
        if scale < LEAST_SCALE:
            raise FloatingPointError(
                f"gradients are not finite at step {step}, however small the loss is scaled; the last checkpoint is "
                "from before it"
            )
        if self.ema:
            self.ema.update(self.model, step=step)

    def mean_loss(self):
        """Mean loss of this epoch's updates over all ranks, which keep it as their own. To be called by all ranks."""
        mean = utils.all_reduce(self.loss_sum / max(self.losses, 1)) / utils.world_size()
        self.loss_sum = mean * self.losses if utils.is_distributed() else self.loss_sum
        return mean.item()

    def begin_epoch(self, epoch):
        """Set the position to the start of ``epoch``."""
        self.epoch, self.updates, self.losses = epoch, 0, 0
        self.loss_sum = torch.zeros((), device=self.device)

    def epochs(self):
        """The epochs that are left; the first may be under way."""
        self.begun = utils.Stopwatch(self.device), self.epoch
        for epoch in range(self.epoch, self.args.epochs):
            self.watch = utils.Stopwatch(self.device)
            yield epoch

    def images_done(self):
        """The images of one rank that this epoch has had."""
        return self.updates * self.args.accum_iter * self.args.batch_size

    def evaluates(self, epoch):
        """Whether ``epoch`` ends with an evaluation."""
        return (epoch + 1) % self.args.eval_period == 0 or epoch + 1 == self.args.epochs

    def finish_epoch(self, figures, score=None):
        """Log the figures of the epoch that is under way, and write its checkpoint.

        score: the number by which the best checkpoint is kept, or None if nothing can be compared.
        """
        best = score is not None and score > self.max_accuracy
        self.max_accuracy = score if best else self.max_accuracy
        record = {"epoch": self.epoch} | figures | self._clock()
        if utils.is_main():
            with open(self.output / LOG_NAME, "a") as file:
                file.write(json.dumps(record) + "\n")
        if self.board:
            for name, value in record.items():
                self.board.add_scalar(name, value, self.epoch)
            self.board.flush()
        print_once(json.dumps({k: round(v, 6) if isinstance(v, float) else v for k, v in record.items()}))
        self.scheduler.step(self.epoch + 1)
        self._save_epoch(best)

    def _clock(self):
        """Times and memory of the epoch that is under way: they differ from run to run."""
        watch, first = self.begun
        left = watch.seconds() / (self.epoch + 1 - first) * (self.args.epochs - self.epoch - 1)
        clock = {"seconds": round(self.watch.seconds(), 1), "minutes_left": round(left / 60, 1)}
        return clock | {"peak_memory_mb": utils.peak_memory_mb(self.device)}

    @contextmanager
    def files(self, output, more=dict):
        """Write into the folder ``output`` from here on. A stop by a signal is saved, and raises utils.Interrupted.

        more: function without arguments that returns further members of a checkpoint.
        """
        self.output, self.more = output, more
        utils.catch_signals(signal.SIGINT)
        if self.resumed:
            print_once(f"going on from epoch {self.epoch}, update {self.updates}: {self.resumed}")
            if self.from_file and utils.is_main():
                self._give_up_what_is_later()
            best = self.max_accuracy
            if best and not (output / BEST_NAME).exists():
                print_once(f"note: {output} gets a {BEST_NAME} when {best:.2f}, the best so far, is beaten")
        if self.args.tensorboard and utils.is_main():
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and not needed by others

            self.board = SummaryWriter(output, purge_step=self.epoch)
        trim_log(output / LOG_NAME, self.epoch)
        try:
            yield
        except utils.Interrupted as stop:
            self.save_mid_epoch()  # evaluation and importance change nothing that is saved
            utils.barrier()  # no rank ends, and has the others killed, before it is written
            stop.saved = True
            raise

    def _give_up_what_is_later(self):
        """Rename checkpoints that are later than the resumed one, so that neither 'auto' nor stage 3 finds them."""
        here, found = (self.epoch, self.updates), numbered_checkpoints(self.output)
        later = [path for number, path in found.items() if number >= self.epoch]
        others = [self.output / MID_EPOCH_NAME, self.output / BEST_NAME]
        positions = {path: _position(path) for path in others if path.exists()}
        later += [path for path, position in positions.items() if position and position > here]
        if unread := [path.name for path, position in positions.items() if not position]:
            print_once(f"note: passed over, for it cannot be read: {', '.join(unread)}")
        for path in later:
            path.rename(path.with_name(f"{path.name}.superseded"))
        if self.output / BEST_NAME in later:
            self.max_accuracy = 0.0  # there is no file of it any more
        if later:
            print_once(f"note: later than that, and so renamed to *.superseded: {', '.join(p.name for p in later)}")
        self.save_mid_epoch()  # 'auto' goes on from here, whenever this life ends

    def content(self):
        """The layout of the published super-networks, whose 'epoch' is the last complete one, and the position."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "lr_scheduler": self.scheduler.state_dict(),
            "epoch": self.epoch - 1,
            "model_ema": self.ema.module.state_dict() if self.ema else None,
            "scaler": self.scaler.state_dict(),
            "args": self.args,
            "max_accuracy": self.max_accuracy,
            "position": {name: getattr(self, name) for name in (*COUNTS, "loss_sum")},
        }

    def _save_epoch(self, best):
        """Write checkpoint_<epoch>.pth after a complete epoch, and BEST_NAME if it is the ``best``. Remove old ones.

        The best is written first: a run stopped in between writes it again, and never has a record without its file.
        """
        done = self.epoch
        self.begin_epoch(done + 1)
        content = self.content() | self.more()
        if best:
            save_checkpoint(content, self.output / BEST_NAME)
        self.last = self.output / f"checkpoint_{done}.pth"
        save_checkpoint(content, self.last)
        if utils.is_main():
            (self.output / MID_EPOCH_NAME).unlink(missing_ok=True)
            for number, path in numbered_checkpoints(self.output).items():
                if number <= done - self.args.keep_last:
                    path.unlink()

    def save_mid_epoch(self):
        """Between two updates, or while evaluating after the last."""
        save_checkpoint(self.content() | self.more(), self.output / MID_EPOCH_NAME)

    def resume(self, output):
        """Go on as ``--resume`` asks for. Returns (path, content) of the checkpoint; (None, {}) for a new run.

        'auto' passes over what cannot be gone on from. Raises InputError if nothing else is there. A run that torchrun
        or Slurm starts again goes on from what it has written since it went on from a file.
        """
        tried, asked = [], self.args.resume
        asked = "auto" if asked and _goes_on_already(asked, output) else asked
        self.from_file = asked != "auto"
        for path in to_resume(asked, output):
            try:
                content = self.restore(path)
            except InputError as error:
                if self.from_file or isinstance(error, FlagsDiffer):
                    raise
                print_once(f"note: passed over: {error}")
                tried.append(path.name)
                continue
            if not utils.all_the_same(f"{path.name} {digest(content['model'])}"):
                raise utils.RanksDisagree(
                    f"--resume {self.args.resume}: not every rank can read {path}, or the same one; see the storage"
                )
            return path, content
        if tried:
            raise InputError(
                f"--resume auto: {output} holds nothing to go on from, of {', '.join(tried)} (the notes say why); give "
                "a whole copy as --resume FILE, or start anew in another --output-dir"
            )
        return None, {}

    def restore(self, path):
        """Go on from ``path``. Returns the checkpoint's content. Raises InputError if it is no checkpoint of a run."""
        content = read_checkpoint(path)
        missing = [name for name in ("optimizer", "lr_scheduler", "epoch") if name not in content]
        if missing:
            raise InputError(f"--resume {path}: cannot be resumed from, it has no {', '.join(missing)}")
        self._compare_arguments(content, path)
        load_weights(self.model, content["model"], path)
        if self.ema:
            load_weights(self.ema.module, content.get("model_ema") or content["model"], path)
        try:
            self.begin_epoch(int(content["epoch"]) + 1)
            self.scheduler.load_state_dict(content["lr_scheduler"])
            self.scheduler.step(self.epoch)  # fails if that is no schedule; the optimiser holds the rate
            self.optimizer.load_state_dict(content["optimizer"])
            self._check_optimizer_state()
            if content.get("scaler"):
                self.scaler.load_state_dict(content["scaler"])
            position = content.get("position", {})
            # Another program's is the accuracy of something else.
            self.max_accuracy = float(content.get("max_accuracy", 0.0)) if position else 0.0
            for name in COUNTS:
                setattr(self, name, int(position.get(name, 0)))
            self.loss_sum += position.get("loss_sum", 0.0)
        except Exception as error:  # each raises whatever a state of something else makes it
            raise InputError(f"--resume {path}: cannot be resumed from ({type(error).__name__}: {error})") from None
        self.lr = self.optimizer.param_groups[0].get("initial_lr", self.lr)
        self.resumed = self.last = path
        return content

    def _compare_arguments(self, content, path):
        """Say which arguments are not those of a checkpoint. Raises FlagsDiffer if the run would be another one."""
        if "position" not in content:
            return print_once(f"note: {path} is of another program: its learning rate and schedule are taken over")
        then, now = getattr(content.get("args"), "__dict__", {}), vars(self.args)
        may_differ = set(MAY_DIFFER)
        if len({a.get("batch_size", 0) * a.get("accum_iter", 0) * a.get("world_size", 0) for a in (then, now)}) > 1:
            may_differ -= {"batch_size", "accum_iter", "world_size"}
        if bool(then.get("mask_table")) != bool(now.get("mask_table")):
            may_differ -= {"mask_table"}
        if now.get("mask_table"):
            may_differ |= OF_GROWTH
        if self.args.sched in ("step", "multistep"):
            may_differ |= {"epochs"}  # these do not look ahead
        changed = [name for name in now if name in then and name not in NOT_COMPARED and now[name] != then[name]]
        words = {name: f"--{name.replace('_', '-')} {now[name]} (there {then[name]})" for name in changed}
        if refused := [words[name] for name in changed if name not in may_differ]:
            raise FlagsDiffer(f"--resume {path}: trained otherwise than {', '.join(refused)}; give it the same flags")
        if changed:
            print_once(f"note: otherwise than in {path}: {', '.join(words.values())}")

    def _check_optimizer_state(self):
        """Raise ValueError if what the optimiser has loaded is not what it keeps for parameters of these shapes."""
        own = {p.shape: nn.Parameter(torch.zeros(p.shape)) for p in self.model.parameters()}
        fresh = self._optimizer(list(own.values()))
        for parameter in own.values():
            parameter.grad = torch.zeros_like(parameter)
        fresh.step()
        for name, parameter in self.model.named_parameters():
            expected, state = fresh.state[own[parameter.shape]], self.optimizer.state.get(parameter)
            # A parameter that has had no gradient has no state.
            for entry, value in expected.items() if state else ():
                if entry not in state or getattr(state[entry], "shape", ()) != getattr(value, "shape", ()):
                    raise ValueError(f"the optimiser's {entry} of {name} is missing, or of another shape")


def to_resume(resume, output):
    """The checkpoints that ``--resume`` may go on from, the preferred first: a file, or for 'auto' those in ``output``.

    Raises InputError if a new run would overwrite the checkpoints of an earlier one.
    """
    found, mid = numbered_checkpoints(output), output / MID_EPOCH_NAME
    if not resume and (found or mid.exists()):
        raise InputError(f"--output-dir {output}: holds checkpoints; go on with --resume auto, or take another folder")
    if resume != "auto":
        return [Path(resume)] if resume else []
    # A mid-epoch file is newer than all complete epochs, unless the run was stopped before it could be removed.
    positions = {mid: _position(mid) or (-1, 0)} if mid.exists() else {}
    positions |= {path: (number + 1, 0) for number, path in found.items()}
    paths = sorted(positions, key=positions.get, reverse=True)
    if not utils.all_the_same(str(paths)):
        raise InputError(f"--resume auto: not every rank finds {paths}; --output-dir must be on shared storage")
    return paths


def _goes_on_already(resume, output):
    """Whether this is a later life of a run that has gone on from the file ``resume``: torchrun or Slurm counts it, and
    the newest checkpoint in ``output`` says so."""
    lives = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    if resume == "auto" or not any(int(os.environ.get(name, 0)) for name in lives):
        return False
    for path in to_resume("auto", output):
        with suppress(InputError):  # the next one may be whole
            return getattr(read_checkpoint(path).get("args"), "resume", None) == resume
    return False


def _position(path):
    """(epoch under way, updates done) of a checkpoint, or None if it is missing or cannot be read."""
    if not path.is_file():
        return None
    try:
        content = read_checkpoint(path)
        return content["epoch"] + 1, content.get("position", {}).get("updates", 0) + 0
    except (InputError, KeyError, TypeError, AttributeError):
        return None


def trim_log(path, epoch):
    """Drop what a log in DeiT's format holds of ``epoch`` and later, and lines that cannot be read."""
    if not path.is_file():
        return
    kept, unread = [], 0
    for line in path.read_text(errors="replace").splitlines():
        try:
            if json.loads(line)["epoch"] < epoch:
                kept.append(line + "\n")
        except (ValueError, LookupError, TypeError, RecursionError):
            unread += 1
    if unread:
        print_once(f"note: {path}: left out {unread} line(s) that cannot be read")
    utils.save_text("".join(kept), path)
