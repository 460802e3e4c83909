"""What every stage shares: errors, command lines, signals, devices and ranks, randomness, files."""

import argparse
import difflib
import fcntl
import importlib.util
import io
import itertools
import json
import os
import platform
import random
import re
import resource
import shutil
import signal
import sys
import time
import traceback
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path

import numpy as np
import timm
import torch
import torch.distributed as dist
from tqdm import tqdm


class InputError(ValueError):
    """A file, flag or value from the user that cannot be used. The message is the one line that the user sees."""


class ModelError(InputError):
    """A model that does not exist, cannot be cut, or has no published weights. The message begins with its name.
    needs_file: a file of weights would do instead."""

    def __init__(self, message, needs_file=False):
        super().__init__(message)
        self.needs_file = needs_file


class SizeError(ModelError):
    """An image size that a model cannot have. The message begins with the size."""


class BudgetError(InputError):
    """A budget that no sub-network answers. The message begins with its kind."""


class NotNamed(InputError):
    """What can be used if the user names it; the message ends with that advice. argument: by which it is named."""

    def __init__(self, message, argument):
        super().__init__(f"{message} by {argument}=")
        self.advice, self.argument = message, argument


@contextmanager
def name_flag(flag, file_flag=None):
    """Put ``flag``, or that of the image size or the budget, in front of an error about its value, and name the flags
    that would do: that of a file of weights, or of what is to be named."""
    try:
        yield
    except NotNamed as error:
        raise InputError(f"{error.advice} by --{error.argument.replace('_', '-')}") from None
    except BudgetError as error:
        kind, _, words = str(error).partition(" ")
        raise InputError(f"--{kind.replace('_', '-')} {words}") from None
    except SizeError as error:
        raise InputError(f"--input-size {error}") from None
    except ModelError as error:
        instead = f"; give a file of weights with {file_flag}" if error.needs_file and file_flag else ""
        raise InputError(f"{flag} {error}{instead}") from None


def need(flag, packages):
    """Raise InputError, with the command that installs them, if some ``packages`` that ``flag`` needs are missing."""
    if missing := [name for name in packages if importlib.util.find_spec(name) is None]:
        raise InputError(f"{flag} needs {', '.join(missing)}: pip install {' '.join(missing)}")


def first_line(error):
    """The first line of an exception's message, or its class if there is none."""
    return str(error).split("\n")[0] or type(error).__name__


def nearest(name, names):
    """The ``names`` that ``name`` may be a misspelling of, in words to end an error with."""
    found = difflib.get_close_matches(name, names)
    return f"; the nearest: {', '.join(found)}" if found else ""


def printable(text):
    """``text`` with control characters, which a terminal would obey, as escapes."""
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


class Interrupted(Exception):
    """A signal asked the run to stop. saved: what is needed to go on has been written."""

    saved = False


class RanksDisagree(RuntimeError):
    """Ranks that must hold the same thing do not. The message is the one line that the user sees."""


# ------------------------------------------------------------------------------------------ command lines


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Adds an option's default to its help, if there is one and the help does not say it."""

    def _get_help_string(self, action):
        says_it = "(default:" in action.help or isinstance(action.default, bool) or action.default in (None, [])
        return action.help if says_it else super()._get_help_string(action)


class StageParser(argparse.ArgumentParser):
    """An ArgumentParser that reads underscores in flags as dashes.

    checks: functions of the parsed arguments that raise InputError if flags contradict each other. Whatever is wrong
    with a command line becomes one line and exit code 2. The parsed arguments have a further member ``given``: the
    names of those that the command line has.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(
            *args, formatter_class=_HelpFormatter, allow_abbrev=False, usage="%(prog)s [--option value ...]", **kwargs
        )
        self.checks = []

    def parse_args(self, args=None, namespace=None):
        words = []
        for word in sys.argv[1:] if args is None else args:
            if words and word in UNITS and re.fullmatch(r"[\d.]+", words[-1]):  # 46.53 M, as tables print it
                words[-1] += word
            else:
                words.append(re.sub("^--[^=]+", lambda flag: flag[0].replace("_", "-"), word))
        parsed, unknown = self.parse_known_args(words, namespace)
        flags = {word.partition("=")[0] for word in words}
        parsed.given = [action.dest for action in self._actions if flags.intersection(action.option_strings)]
        if unknown:
            flag = unknown[0].partition("=")[0]
            instead = nearest(flag, self._option_string_actions)
            if flag in OFFICIAL_FLAGS:
                instead = f"; {flag} of the paper's code is {OFFICIAL_FLAGS[flag]} here"
            self.error(f"unrecognized arguments: {' '.join(unknown)}{instead}")
        try:
            for check in self.checks:
                check(parsed)
        except InputError as error:
            self.error(str(error))
        return parsed

    def error(self, message):
        # All ranks have the same command line: one of them says what is wrong with it.
        words = printable(f"error: {message}; --help explains every flag\n")
        self.exit(2, words if ranks_in_environment()[1] == 0 else None)


# Flags of the paper's own code, and the flag, stage or launcher that does the same here.
OFFICIAL_FLAGS = {
    "--training-peelable": "main_train.py", "--training-peeled": "main_finetune_peeled.py",
    "--reparameterization": "main_reparam.py", "--eval": "main_test.py", "--peelable-resume": "--checkpoint",
    "--mask-table-path": "--mask-table", "--transformed-weight": "--pretrained", "--finetune": "--pretrained",
    "--target-reduction-ratio": "--drop-ratio", "--progressive-epochs": "--grow-epochs", "--start-epoch": "--resume",
    "--world-size": "tools/launch.py", "--dist-url": "tools/launch.py", "--dist-eval": "always done",
}  # fmt: skip


UNITS = {"K": "e3", "M": "e6", "G": "e9", "T": "e12", "%": "e-2"}


def number(text):
    """A number as users and our tables write it: 8.44G, 46.53 M, 8.44GMac, 50%, 1e-3. Raises ValueError."""
    found = re.fullmatch(r"\s*(.*?)\s*([KMGT%]?)\s*(macs?)?\s*", text, re.IGNORECASE)
    return float(found[1] + UNITS.get(found[2].upper(), ""))


def interval(bounds, kind=number):
    """argparse type: a number of ``kind`` within ``bounds``, written as in mathematics: '[0, 1)', '(0, inf)'."""
    low, high = (float(bound) for bound in bounds[1:-1].split(","))
    noun = "an integer" if kind is int else "a number"

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        above = value > low or (value == low and bounds[0] == "[")
        below = value < high or (value == high and bounds[-1] == "]")
        if not (above and below):
            raise argparse.ArgumentTypeError(f"{text!r} is not {noun} in {bounds}")
        return value

    return parse


# A billion is more than any count has a use for, and less than what overflows.
positive_int = interval("[1, 1e9]", int)
non_negative_int = interval("[0, 1e9]", int)
fraction = interval("(0, 1]")
probability = interval("[0, 1]")


def at_most(args, name, most, why):
    """``args.<name>``; if it is more than ``most`` and the user did not ask for it, it becomes that, with a note.

    why: where the limit comes from, in words. Raises InputError if the user asked for it.
    """
    value = getattr(args, name)
    if value <= most:
        return value
    words = f"--{name.replace('_', '-')} {value:g}: {why}"
    if name in args.given:
        raise InputError(words)
    print_once(f"note: {words}, so it is {most:g}")
    setattr(args, name, most)
    return most


def quantity(text):
    """argparse type: a positive number with an optional unit, ``8.44G``, ``46.53 M`` or ``12000``."""
    try:
        value = number(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number such as 8.44G, 40M or 12000") from None
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r} is not positive and finite")
    return value


def device_name(text):
    """argparse type: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r}: choose auto, cpu, cuda or cuda:N")
    return text


def with_unit(value):
    """A count with two decimals and a unit, as the paper prints it: 16.88 G, 897.00 M."""
    for unit, factor in (("G", 1e9), ("M", 1e6), ("K", 1e3)):
        if value >= factor:
            return f"{value / factor:.2f} {unit}"
    return f"{value:.0f}"


def table_text(lines):
    """Rows of words in columns, the first to the left and the others to the right."""
    lengths = [max(len(line[i]) for line in lines) for i in range(len(lines[0]))]
    rows = [[line[0].ljust(lengths[0]), *map(str.rjust, line[1:], lengths[1:])] for line in lines]
    return "\n".join("  ".join(row) for row in rows)


# Set in the environment, it makes a stage that fails print its traceback.
TRACEBACK = "SKD_TRACEBACK"


def run_stage(main, args):
    """Run ``main(args)``. Bad input, and what the file system, torch and timm raise, becomes one line and exit code 2.

    Errors that only a bug raises (TypeError, AttributeError, KeyError ...) stay tracebacks, and TRACEBACK in the
    environment makes all others tracebacks too. A training run that was told to stop (SIGTERM, SIGUSR1, Ctrl-C) ends
    with exit code 75, "try again".
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # a terminal may lack the letters of a path
    if hasattr(args, "resume"):
        catch_signals(signal.SIGTERM, signal.SIGUSR1)
    code, at_once = 0, False
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)  # in the ranks of tools/launch.py they wait until here
        main(args)
    except (OSError, ValueError, RuntimeError, MemoryError, FloatingPointError) as error:
        if os.environ.get(TRACEBACK):
            code = _print_traceback()
            raise
        code = 2
        if not _another_rank_says(error):
            print(printable(f"error: {_in_words(error)}"), file=sys.stderr, flush=True)
    except Interrupted as stop:
        code = _code_of_stopped(STOPPED)
        if is_main():
            saved = "saved; the same command with --resume auto goes on"
            words = saved if stop.saved else "before there was anything to save"
            print(f"stopped by a signal, {words}", file=sys.stderr, flush=True)
    except KeyboardInterrupt:
        code, at_once = _code_of_stopped(130), True
        if is_main():
            print("stopped by Ctrl-C", file=sys.stderr, flush=True)
    except Exception:
        code = _print_traceback()
        raise
    finally:
        _unlock()
        if (code or at_once) and is_distributed():
            os._exit(code)  # without the interpreter's clean-up: another rank may be inside a collective with this one
        if is_distributed():
            dist.destroy_process_group()
    if code:
        sys.exit(code)


def _print_traceback():
    """Print the traceback of the error that is handled, if the process is one of several, which ends without the
    interpreter's clean-up. Returns the exit code."""
    if is_distributed():
        traceback.print_exc()
        sys.stderr.flush()
    return 1


def _code_of_stopped(code):
    """The exit code of a process that was told to stop: ``code``, but under torchrun, which takes any code but 0 for a
    failure and starts ranks again, 0; tools/launch.py knows by a file."""
    if STOPPED_FILE in os.environ:
        Path(os.environ[STOPPED_FILE]).touch()
    return 0 if "TORCHELASTIC_RUN_ID" in os.environ else code


def _another_rank_says(error):
    """Whether another rank prints the error: torchrun then sends SIGTERM within a moment.

    A broken connection is another rank's doing. Any other error is for this rank to tell, unless rank 0 does.
    """
    broken = isinstance(error, dist.DistError) or "gloo" in str(error)
    _, own, ranks = ranks_in_environment()
    if ranks == 1 or not (broken or own):
        return False
    before, end = 0 if broken else len(_signals), time.monotonic() + 2
    while len(_signals) == before and time.monotonic() < end:
        time.sleep(0.05)
    return len(_signals) > before


def _in_words(error):
    """The one line that a user sees of an error."""
    if isinstance(error, InputError | FloatingPointError | RanksDisagree):
        return str(error)
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename}: {error.strerror}"
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in str(error):
        return f"out of memory ({first_line(error)}); take a smaller --batch-size, --input-size or model"
    return f"{type(error).__name__}: {first_line(error)}; {TRACEBACK}=1 in the environment shows where"


# ------------------------------------------------------------------------------------------ signals

STOPPED = 75  # EX_TEMPFAIL of sysexits.h
SIGNALS = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
# In the environment, by tools/launch.py: the file that its ranks make when they were told to stop.
STOPPED_FILE = "SKD_STOPPED_FILE"
_signals = []


def catch_signals(*numbers):
    """From now on these signals end nothing by themselves: they are noted, for ``stopping``."""
    for number in numbers:
        signal.signal(number, lambda number, _frame: _signals.append(number))


def ignore_signals(_worker=None):
    """For data loading processes: Slurm and torchrun signal them too, but the training run ends them."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stopping():
    """Whether a signal has asked this process to stop."""
    return bool(_signals)


def stop_if_asked():
    """Raise Interrupted on all ranks if a signal has asked one of them to stop. To be called by all ranks together."""
    if any(gather(stopping())):
        raise Interrupted


# Where there is no terminal, seconds from one line about work under way to the next.
SECONDS_BETWEEN_LINES = 30


def progress(batches, title, done=0, images=0, unit="batches"):
    """Go through ``batches`` with a progress bar on the main rank, or without a terminal a line now and then.

    done: the number of batches before these. images: the number of images in a batch, of all ranks together. unit: what
    they are, if not batches.
    """
    disable = None if is_main() else True
    bar = tqdm(batches, desc=title, disable=disable, leave=False, mininterval=1.0, initial=done)
    started, said = time.perf_counter(), 0
    for count, batch in enumerate(bar, 1):
        yield batch
        seconds = time.perf_counter() - started
        if bar.disable and seconds > said + SECONDS_BETWEEN_LINES:
            said, total = seconds, len(batches)
            rate = f", {count * images / seconds:.0f} images/s" if images else ""
            left = tqdm.format_interval((total - done - count) * seconds / count)
            print_once(f"{title}: {done + count} of {total} {unit}{rate}, {left} left")


# ------------------------------------------------------------------------------------------ devices and ranks


def start_up(args):
    """Choose device and autocast, join the process group if torchrun or srun started this process, and seed it.

    ``args.device`` is ``auto``, ``cpu`` or ``cuda[:i]``; with several ranks each takes the GPU of its local rank. Sets
    ``args.rank`` and ``args.world_size``, and resolves ``args.amp``. Prints where the stage runs. Returns the
    torch.device. Raises InputError if CUDA is asked for and absent, and what ``_join_ranks`` and ``resolve_amp`` raise.
    """
    device = choose_device(args.device, "--device")
    local_rank, args.rank, args.world_size = ranks_in_environment()
    if args.world_size > 1:
        if device.type == "cuda" and torch.cuda.device_count() == 1 and "SLURM_GPUS_PER_TASK" in os.environ:
            local_rank = 0  # srun shows every task its own GPU alone
        device = torch.device("cuda", local_rank) if device.type == "cuda" else device
        _check_ranks(device, local_rank, args.world_size)
        _join_ranks("nccl" if device.type == "cuda" else "gloo", args.rank, args.world_size)
    if device.index is not None:
        torch.cuda.set_device(device)
    args.device = str(device)
    if hasattr(args, "amp"):
        args.amp = resolve_amp(args.amp, device)
        if "fp16" in gather(args.amp):  # GPUs of several kinds: gradients that are added must be scaled alike
            args.amp = "fp16"
    seed_all(args.seed, 0, 0)  # alike on all ranks: a new classifier is drawn from it
    print_once(
        f"{machine_name(device) if device.type == 'cuda' else 'CPU'}, {args.world_size} rank(s) of "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}, timm {timm.__version__}"
    )
    return device


def ranks_in_environment():
    """(local rank, rank, number of ranks) as torchrun or srun says; (0, 0, 1) for a process by itself.

    Of Slurm's variables those of a step that srun has started count, not those of the job around it. The address of
    the first rank is derived from them.
    """
    names = ("LOCAL_RANK", "RANK", "WORLD_SIZE")
    if "WORLD_SIZE" not in os.environ:
        names = ("SLURM_LOCALID", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS")
    if int(os.environ.get(names[2], 1)) == 1:
        return 0, 0, 1
    if names[0].startswith("SLURM"):
        host = re.match(r"([^,[]+)(?:\[(\d+))?", os.environ["SLURM_STEP_NODELIST"])  # as a1,b2 or a[1-3,7]
        os.environ.setdefault("MASTER_ADDR", host[1] + (host[2] or ""))
        step = int(os.environ["SLURM_JOB_ID"] + os.environ["SLURM_STEP_ID"])
        os.environ.setdefault("MASTER_PORT", str(20000 + step % 10000))
    return tuple(int(os.environ.get(name, 0)) for name in names)


def _check_ranks(device, local_rank, world_size):
    """Raise InputError if the launcher does not say which rank this is, or started more ranks than there are GPUs."""
    missing = [name for name in ("RANK", "LOCAL_RANK") if name not in os.environ and "WORLD_SIZE" in os.environ]
    if missing:
        raise InputError(
            f"WORLD_SIZE is {world_size} in the environment, without {' and '.join(missing)}; start the ranks by "
            "tools/launch.py, torchrun or srun, or unset WORLD_SIZE for one process"
        )
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", local_rank + 1))
    if device.type == "cuda" and ranks > torch.cuda.device_count():
        raise InputError(
            f"{ranks} ranks on this machine, and {torch.cuda.device_count()} GPU(s) visible; start one for each "
            "(--nproc-per-node, or GPUS= of the scripts), or give --device cpu"
        )


def _join_ranks(backend, rank, world_size):
    """Make the process group of the ranks that torchrun or srun has started.

    torchrun's agent serves one key-value store to all lives of the ranks. A rank that starts again would find there the
    addresses of the life before, and wait for ports that nobody listens on. So each life gets a part of the store of
    its own, named by torchrun's count of restarts. The agents of several machines do not count alike (a restart for
    another machine's sake is not counted), but can be told to open a new store for each life. Raises InputError if
    several agents may restart with one store.
    """
    shared = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shared and os.environ["GROUP_WORLD_SIZE"] != "1" and os.environ["TORCHELASTIC_MAX_RESTARTS"] != "0":
        raise InputError(
            "torchrun --max-restarts on several machines: ranks that start again could wait for the old ones; give "
            "torchrun --rdzv-backend=c10d and TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment, or no restarts"
        )
    store, rank, world_size = next(dist.rendezvous("env://", rank, world_size))
    if shared:
        store = dist.PrefixStore(f"life_{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size)
    _stores.append(store)


def choose_device(name, flag):
    """The torch.device that ``flag`` names. Raises InputError if there is no such device here."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    kind, _, index = name.partition(":")
    if kind not in ("cpu", "cuda"):
        raise InputError(f"{flag} {name}: choose auto, cpu or cuda")
    visible = torch.cuda.device_count() if kind == "cuda" else 0
    if kind == "cuda" and not visible:
        raise InputError(f"{flag} {name}: no CUDA device is visible here; use {flag} cpu")
    if index and int(index) >= visible:
        raise InputError(f"{flag} {name}: cuda:0 to cuda:{visible - 1} are visible here")
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


def all_reduce(tensor, op="SUM"):
    """The sum of ``tensor`` over all ranks, or with 'MAX' its largest values, in its own dtype; the tensor itself in a
    single process."""
    if is_distributed():
        tensor = tensor.contiguous()
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, op))
    return tensor


def all_the_same(text):
    """Whether every rank has the same ``text``. To be called by all ranks."""
    return len(set(gather(text))) == 1


def check_alike(source, text):
    """Raise RanksDisagree unless ``text``, of what was read from ``source``, is that of all ranks. To be called by all
    ranks."""
    if not all_the_same(text):
        raise RanksDisagree(f"{source}: not every rank reads the same there; all machines need the same files")


_stores = []  # where the ranks of this process keep what they tell each other, once they have joined
_calls = itertools.count()


def from_main(compute):
    """The result of ``compute()``, which only the main rank calls, on every rank. It may take hours: the others wait by
    the ranks' store, for a collective would give up after its timeout."""
    name = f"from_main_{next(_calls)}"
    try:
        result = compute() if is_main() else None
    finally:  # after an error too, so that the others find the main rank gone
        for store in _stores[-1:] if is_distributed() else ():
            store.set(name, "done") if is_main() else store.wait([name], timedelta(days=7))
    return gather(result)[0]


def gather(thing):
    """A picklable ``thing`` of every rank, as a list by rank. To be called by all ranks."""
    things = [thing]
    if is_distributed():
        things = [None] * world_size()
        dist.all_gather_object(things, thing)
    return things


def barrier():
    if is_distributed():
        dist.barrier()


def print_once(*words):
    """Print on the main rank only."""
    if is_main():
        print(*(printable(str(word)) for word in words), flush=True)


# ------------------------------------------------------------------------------------------ randomness


def mixed_seed(*numbers):
    """A 63-bit seed made of all the given non-negative integers, the same on every machine and rank."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


def seed_all(*numbers):
    """Seed Python, NumPy and torch from the given integers."""
    seed = mixed_seed(*numbers)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def keyed_generator(*numbers):
    """A CPU torch.Generator seeded from the given integers."""
    return torch.Generator().manual_seed(mixed_seed(*numbers))


# ------------------------------------------------------------------------------------------ autocast


def autocast(device, amp):
    """The autocast context for ``amp`` in {none, bf16, fp16}; does nothing for none."""
    return torch.autocast(device.type, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(amp), enabled=amp != "none")


def resolve_amp(amp, device):
    """The autocast type: ``auto`` is bf16 on a GPU that has it, fp16 on an older one, and none on a CPU."""
    if amp != "auto":
        if amp == "fp16" and device.type == "cpu":
            raise InputError("--amp fp16 needs a GPU; on a CPU use none or bf16")
        return amp
    if device.type == "cpu":
        return "none"
    return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"


# ------------------------------------------------------------------------------------------ files


LEFT_OVER = ".*.skd-part"


def temporary_path(folder, name):
    """Where this process writes what is to be called ``name``. What a killed run leaves is known by LEFT_OVER."""
    return Path(folder) / f".{name}.{os.getpid()}.skd-part"


def remove_left_overs(folder):
    """Remove what killed runs were writing into ``folder``."""
    for left in folder.glob(LEFT_OVER):
        shutil.rmtree(left) if left.is_dir() else left.unlink()


@contextmanager
def atomic_file(path):
    """Yield a temporary path beside ``path``. On success it is flushed and renamed to ``path``, else removed.

    Raises InputError if the file system refuses, for example because it is full or read-only.
    """
    path = Path(path)
    temporary = temporary_path(path.parent, path.name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise unwritable(path, error) from None
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def unwritable(path, error):
    """The InputError for a file or folder that cannot be written."""
    return InputError(f"{path}: cannot be written ({error.strerror or error})")


def read_text(path, expected):
    """The text of a regular file; a pipe would keep the reader waiting. expected: the end of the error's message.

    Raises InputError if there is none, or if it cannot be read.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file; {expected}")
    try:
        return Path(path).read_text(errors="replace")
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None


def parse_json(text, source):
    """What a JSON text holds. source: the name in errors. Raises InputError if it is not JSON."""
    try:
        return json.loads(text)
    except (ValueError, TypeError, RecursionError) as error:  # no text, 5,000 digits, 10,000 brackets
        raise InputError(f"{source}: not JSON ({first_line(error)})") from None


def save_text(text, path):
    """Write ``text`` to ``path``, complete or not at all. Main rank only; the others return at once."""
    if is_main():
        with atomic_file(path) as temporary:
            temporary.write_text(text)


def output_folder(path, flag="--output-dir"):
    """Make the output folder on the main rank, for this process alone, and check that it can be written to. Removes
    what a run that was killed was writing. Raises InputError."""
    path = Path(path)
    if is_main():
        try:
            path.mkdir(parents=True, exist_ok=True)
            _lock(path, flag)
            remove_left_overs(path)
        except OSError as error:
            raise unwritable(f"{flag} {path}", error) from None
    barrier()
    return path


_locks = []


def _lock(folder, flag):
    """Keep other runs out of ``folder`` until this process ends. Raises InputError if one is in it.

    The system releases the lock of a process that dies, and file systems that machines share keep it for all of them.
    """
    while True:
        file = open(folder.absolute() / ".skd-lock", "ab+", buffering=0)  # noqa: SIM115
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.seek(0)
            raise InputError(f"{flag} {folder}: {file.read().decode()} is writing there; take another folder") from None
        except OSError as error:
            return print_once(f"note: {flag} {folder}: no locks there ({error.strerror}): keep other runs out of it")
        if os.fstat(file.fileno()).st_nlink:  # else its holder has ended, and removed it, in between
            break
    _locks.append(file)
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}".encode())


def _unlock():
    while _locks:
        with _locks.pop() as file:
            Path(file.name).unlink(missing_ok=True)


class Stopwatch:
    """Seconds since it was made. It waits for the GPU first, so that queued work counts."""

    def __init__(self, device):
        self.device = device
        self.start = self._now()

    def _now(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def seconds(self):
        return self._now() - self.start


def peak_memory_mb(device):
    """The most memory that this process has had so far: of the GPU's, what tensors took; else resident memory."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**20)
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10)


def machine_name(device):
    """The processor or GPU that figures were measured on, for reports."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpus = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in cpus.read_text().splitlines() if line.startswith("model name")]
    return f"{len(names)} x {names[0]}" if names else f"{platform.machine()} of {platform.node()}"
