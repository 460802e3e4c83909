"""Latency and throughput of extracted networks, measured, and kept as JSON beside the super-network."""

import json
import re
import statistics
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import utils
from models import peel
from models.width_table import Choice, Widths
from utils import InputError, say

WARM_UP, REPEATS = 3, 15


@dataclass(frozen=True)
class Conditions:
    """What a latency holds for: the device by name, CPU threads (None on a GPU), images per batch, pixels, autocast."""

    device: str
    threads: int | None
    batch_size: int
    img_size: int
    amp: str

    @classmethod
    def of(cls, model, device, batch_size, amp):
        threads = torch.get_num_threads() if device.type == "cpu" else None
        return cls(utils.machine_name(device), threads, batch_size, model.patch_embed.img_size[0], amp)

    def __str__(self):
        on = f", {self.threads} threads" if self.threads else ""
        amp = "" if self.amp == "none" else f", {self.amp}"
        return f"batch {self.batch_size}, {self.img_size} px{amp} on {self.device}{on}"

    @property
    def file_name(self):
        words = re.sub(r"[^\w.]+", "-", self.device).strip("-")
        threads = f"_{self.threads}threads" if self.threads else ""
        return f"latency_{words}{threads}_batch{self.batch_size}_{self.img_size}px_{self.amp}.json"


@torch.inference_mode()
def measure(networks, device, conditions):
    """The median milliseconds per batch of each network, over REPEATS rounds after WARM_UP rounds.

    The networks take turns, so that whatever else the machine does slows all of them alike. Under several ranks the
    main one measures while the others wait, and all return its figures.
    """
    return utils.from_main(lambda: _measure(networks, device, conditions))


def _measure(networks, device, conditions):
    images = torch.randn(conditions.batch_size, 3, conditions.img_size, conditions.img_size, device=device)
    seconds = [[] for _ in networks]
    with utils.autocast(device, conditions.amp):
        for _ in range(WARM_UP + REPEATS):
            for network, times in zip(networks, seconds, strict=True):
                watch = utils.Stopwatch(device)
                network(images)
                times.append(watch.seconds())
    return [1e3 * statistics.median(times[WARM_UP:]) for times in seconds]


class LatencyTable:
    """Measured milliseconds per batch by the widths of a sub-network, on one device; one JSON file.

    ``points``: {Widths: milliseconds}.
    """

    def __init__(self, path, conditions, points):
        self.path, self.conditions, self.points = Path(path), conditions, points

    @classmethod
    def load(cls, path):
        """Read a file of measurements. Raises InputError if it is not one."""
        try:
            content = json.loads(Path(path).read_text())
            points = {Widths.from_dict(point["widths"]): float(point["ms"]) for point in content["points"]}
            return cls(path, Conditions(**content["conditions"]), points)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: not a file of latencies that main_test.py --benchmark wrote ({error!r})"
            ) from None

    @classmethod
    def beside(cls, checkpoint, conditions):
        """The measurements for these conditions beside a checkpoint; without any, an empty table to be saved there."""
        path = Path(checkpoint).parent / conditions.file_name
        return cls.load(path) if path.is_file() else cls(path, conditions, {})

    def save(self):
        points = [{"widths": widths.as_dict(), "ms": ms} for widths, ms in self.points.items()]
        content = {"conditions": asdict(self.conditions), "torch": torch.__version__, "points": points}
        try:
            utils.save_text(json.dumps(content), self.path)
        except OSError as error:
            raise InputError(f"{self.path}: cannot be written ({error.strerror})") from None

    def known(self, table):
        """{step: milliseconds} of the steps of a WidthTable that have been measured."""
        return {step: self.points[widths] for step, widths in enumerate(table.steps) if widths in self.points}


class Stopclock:
    """Measures sub-networks of one super-network on one device and remembers the figures beside it."""

    def __init__(self, net, device, batch_size, amp):
        self.net, self.device = net, device
        self.conditions = Conditions.of(net.model, device, batch_size, amp)
        # What is known decides what is measured: all ranks must know the same.
        self.latencies = utils.from_main(lambda: LatencyTable.beside(net.source, self.conditions))

    def measure(self, many_widths):
        """Milliseconds per batch at each of several Widths, measured now, side by side, and saved."""
        # How fast a network is does not depend on its weights: plain slices do.
        networks = [peel.extract(self.net.model, widths).to(self.device) for widths in many_widths]
        milliseconds = measure(networks, self.device, self.conditions)
        self.latencies.points |= dict(zip(many_widths, milliseconds, strict=True))
        self.latencies.save()
        return milliseconds

    def choose(self, budget):
        """The largest step measured within a 'latency_ms' Budget, a Choice: what the file does not know yet is
        measured, first both ends of the table, then by bisection. Raises InputError with the reachable range."""
        table = self.net.table
        missing = [step for step in (0, table.last) if step not in self.latencies.known(table)]
        if missing:
            self.measure([table.steps[step] for step in missing])
        while True:
            known = self.latencies.known(table)
            step, too_slow = bracket(known, budget)
            if step - too_slow <= 1:
                return Choice(step, table.steps[step], latency_ms=known[step])
            self.measure([table.steps[(step + too_slow) // 2]])


def bracket(known, budget):
    """(the largest step of {step: milliseconds} within a Budget, the next larger known step or -1 if there is none).

    Raises InputError with the reachable range if no known step is within it, or the slowest far below it.
    """
    step = min((step for step, ms in known.items() if ms <= budget.value), default=None)
    budget.check_reach(step, min(known.values()), max(known.values()))
    return step, max((other for other in known if other < step), default=-1)


def choose_from_file(path, table, budget):
    """The largest step within a 'latency_ms' Budget of those that a file, measured elsewhere, knows; a Choice."""
    known = LatencyTable.load(path).known(table)
    if not known:
        raise InputError(f"{path}: holds no measurement of a sub-network of this table")
    step, _ = bracket(known, budget)
    return Choice(step, table.steps[step], latency_ms=known[step])


# ------------------------------------------------------------------------------------------ from the command line


def choose(net, budgets, args, device):
    """The Choice of every Budget: computed, or for a 'latency_ms' one measured on ``--latency_device``."""
    clock = None
    if any(budget.kind == "latency_ms" for budget in budgets) and not _is_file(args):
        clock = stopclock(net, args, device)
    return [_choose_one(net, budget, args, clock) for budget in budgets]


def _choose_one(net, budget, args, clock):
    if budget.kind != "latency_ms":
        return budget.choose(net.table, net.shapes, args.finer)
    return clock.choose(budget) if clock else choose_from_file(args.latency_device, net.table, budget)


def benchmark(net, choices, args, device):
    """The same Choices with their latencies, measured in turns."""
    if _is_file(args):
        raise InputError(f"--benchmark measures: --latency_device {args.latency_device} must be cpu or cuda")
    milliseconds = stopclock(net, args, device).measure([choice.widths for choice in choices])
    return [replace(choice, latency_ms=ms) for choice, ms in zip(choices, milliseconds, strict=True)]


def stopclock(net, args, device):
    """A Stopclock for the command line's device, batch size and autocast; says what it measures on."""
    place = utils.choose_device(args.latency_device or str(device), "--latency_device")
    amp = args.amp if place.type == device.type else utils.resolve_amp("auto", place)
    clock = Stopclock(net, place, args.latency_batch_size, amp)
    say(f"latencies: {clock.conditions}; median of {REPEATS} after {WARM_UP}; kept in {clock.latencies.path}")
    return clock


def _is_file(args):
    return (args.latency_device or "").endswith(".json")
