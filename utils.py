"""Start-up, ranks, keyed randomness, command lines and whole files: what every stage shares."""

import argparse
import hashlib
import json
import os
import platform
import random
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import timm.utils
import torch
import torch.distributed as dist


class InputError(ValueError):
    """A file, flag or value from the user that cannot be used; the message is the one line they see."""


class Interrupted(Exception):
    """A signal asked the run to stop, and what is needed to go on has been saved."""


class RanksDisagree(RuntimeError):
    """Ranks that must hold the same thing do not; the message is the one line the user sees."""


# ------------------------------------------------------------------------------------------ command lines


class StageParser(argparse.ArgumentParser):
    """An ArgumentParser that reads ``--batch-size`` (DeiT's spelling) and ``--batch_size`` alike."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        words = sys.argv[1:] if args is None else args
        return super().parse_known_args([_underscored(word) for word in words], namespace)


def _underscored(word):
    if not word.startswith("--"):
        return word
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value


def positive_int(text):
    """argparse type: an integer of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 1")
    return value


def non_negative_int(text):
    """argparse type: an integer of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0")
    return value


def fraction(text):
    """argparse type: a float in (0, 1]."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not in (0, 1]")
    return value


def quantity(text):
    """argparse type: a number with an optional unit, ``8.44G``, ``40M`` or ``12000``."""
    exponents = {"K": "e3", "M": "e6", "G": "e9", "T": "e12"}
    unit = exponents.get(text[-1:].upper())
    try:
        value = float(text[:-1] + unit if unit else text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 8.44G, 40M or 12000") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not positive and finite")
    return value


def human(value):
    """A count with three or four significant digits and a unit, as the paper prints it: 16.88 G, 897.0 M."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f}"


def say_table(lines):
    """Print rows of words in columns, the first one to the left and the others to the right."""
    lengths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    for first, *others in lines:
        words = [word.rjust(length) for word, length in zip(others, lengths[1:], strict=True)]
        say("  ".join([first.ljust(lengths[0]), *words]))


def run_stage(main, args):
    """Run ``main(args)``; bad input, a loss gone bad or ranks gone apart become one line and exit code 2.

    A run that SIGTERM or SIGUSR1 (Slurm's warning) has stopped ends with exit code 75, "try again".
    """
    try:
        main(args)
    except (InputError, FloatingPointError, RanksDisagree) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        # Without the interpreter's clean-up: another rank may be waiting inside a collective for this one.
        os._exit(2) if is_distributed() else sys.exit(2)
    except Interrupted:
        print("stopped by a signal, saved; the same command with --resume auto goes on", file=sys.stderr, flush=True)
        os._exit(STOPPED) if is_distributed() else sys.exit(STOPPED)
    finally:
        if is_distributed():
            dist.destroy_process_group()


# ------------------------------------------------------------------------------------------ signals

STOPPED = 75  # EX_TEMPFAIL of sysexits.h
_signals = []


def catch_signals():
    """From now on SIGTERM and SIGUSR1 are noted, for ``stopping``, and end nothing by themselves."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, lambda number, _frame: _signals.append(number))


def stopping():
    """Whether a signal has asked this process to stop."""
    return bool(_signals)


def restore_signals(_worker=None):
    """In a data loading process: let signals end it again."""
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


# ------------------------------------------------------------------------------------------ devices and ranks


def start_up(args):
    """Choose the device, join the process group if torchrun or Slurm started us, and seed the process.

    ``args.device`` is ``auto``, ``cpu`` or ``cuda[:i]``. Sets ``args.rank`` and ``args.world_size``.
    Returns the torch.device. Raises InputError if CUDA is asked for and absent.
    """
    args.device = str(choose_device(args.device, "--device"))
    device = timm.utils.init_distributed_device(args)
    seed_all(args.seed, 0, args.rank)
    return device


def choose_device(name, flag):
    """The torch.device that ``flag`` names. Raises InputError if there is no such device here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.split(":")[0] not in ("cpu", "cuda"):
        raise InputError(f"{flag} {name}: choose auto, cpu or cuda")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(f"{flag} {name}: no CUDA device is visible here; use {flag} cpu")
    return torch.device(name)


def is_distributed():
    return dist.is_available() and dist.is_initialized()


def rank():
    return dist.get_rank() if is_distributed() else 0


def world_size():
    return dist.get_world_size() if is_distributed() else 1


def is_main():
    """Whether this process is the one that prints and writes."""
    return rank() == 0


def all_reduce_sum(tensor):
    """The sum of ``tensor`` over all ranks, in its own dtype; the tensor itself in a single process."""
    if is_distributed():
        tensor = tensor.contiguous()
        dist.all_reduce(tensor)
    return tensor


def all_reduce_max(tensor):
    """The largest value over all ranks, element by element."""
    if is_distributed():
        dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
    return tensor


def all_the_same(text):
    """Whether every rank has the same ``text``, by a digest of it. To be called by all ranks."""
    digests = [hashlib.sha256(text.encode()).hexdigest()] * world_size()
    if is_distributed():
        dist.all_gather_object(digests, digests[0])
    return len(set(digests)) == 1


def from_main(compute):
    """What ``compute()`` gives on the main rank, on every rank; only the main one computes."""
    results = [compute() if is_main() else None]
    if is_distributed():
        dist.broadcast_object_list(results)
    return results[0]


def barrier():
    if is_distributed():
        dist.barrier()


def say(*words):
    """Print on the main rank only."""
    if is_main():
        print(*words, flush=True)


# ------------------------------------------------------------------------------------------ randomness


def key(*numbers):
    """A 63-bit seed that depends on all the given non-negative integers, the same on every machine and rank."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_all(*numbers):
    """Seed Python, NumPy and torch from the given integers."""
    seed = key(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keyed_generator(*numbers):
    """A CPU torch.Generator seeded from the given integers."""
    return torch.Generator().manual_seed(key(*numbers))


# ------------------------------------------------------------------------------------------ autocast


def autocast(device, amp):
    """The autocast context for ``amp`` in {none, bf16, fp16}; does nothing for none."""
    if amp == "none":
        return nullcontext()
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}[amp])


def resolve_amp(amp, device):
    """``auto`` is bf16 on a GPU that has it, fp16 on an older one, and none on a CPU."""
    if amp != "auto":
        if amp == "fp16" and device.type == "cpu":
            raise InputError("--amp fp16 needs a GPU; on a CPU use none or bf16")
        return amp
    if device.type == "cpu":
        return "none"
    return "bf16" if torch.cuda.is_bf16_supported() else "fp16"


# ------------------------------------------------------------------------------------------ files


@contextmanager
def whole_file(path):
    """Yield a temporary path beside ``path``; on success flush it and rename it, else remove it."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_torch(obj, path):
    """torch.save to ``path``, whole or not at all. Main rank only; the others return at once.

    Raises InputError if it cannot be written, for example because the disk is full.
    """
    if is_main():
        try:
            with whole_file(path) as temporary:
                torch.save(obj, temporary)
        except (OSError, RuntimeError) as error:  # torch's writer says RuntimeError for a full disk
            reason = str(error).splitlines()[0]
            raise InputError(f"{path}: could not be written ({reason}); what was there before is untouched") from None


def save_text(text, path):
    """Write ``text`` to ``path``, whole or not at all. Main rank only; the others return at once."""
    if is_main():
        with whole_file(path) as temporary:
            temporary.write_text(text)


def append_json_line(record, path):
    """Append one JSON object as a line, DeiT's log format. Main rank only."""
    if is_main():
        with open(path, "a") as file:
            file.write(json.dumps(record) + "\n")


def output_folder(path, flag="--output_dir"):
    """Make the output folder on the main rank and check that it can be written to. Raises InputError."""
    path = Path(path)
    if is_main():
        try:
            path.mkdir(parents=True, exist_ok=True)
            probe = path / f".write_test.{os.getpid()}"
            probe.touch()
            probe.unlink()
            for leftover in path.glob(".*.part"):  # of a run that was killed while writing
                leftover.unlink()
        except OSError as error:
            raise InputError(f"{flag} {path}: cannot be written to ({error.strerror})") from None
    barrier()
    return path


class Stopwatch:
    """Seconds since it was made; waits for the GPU first, so that queued work counts."""

    def __init__(self, device):
        self.device = device
        self.start = self._now()

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self):
        return self._now() - self.start


def machine_name(device):
    """The processor or GPU that figures were measured on, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else platform.processor()
