"""Latency of extracted networks, measured, and kept as JSON beside the super-network."""

import json
import re
import statistics
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

import utils
from models.subnet.budget import Choice
from models.vit.widths import Widths
from utils import InputError

WARM_UP, REPEATS = 3, 15


@dataclass(frozen=True)
class Conditions:
    """What a latency holds for: the device by name, CPU threads (None on a GPU), images per batch, pixels, autocast,
    timm's name of the model (None in files that are older than this entry), and the width of images that are not
    square."""

    device: str
    threads: int | None
    batch_size: int
    img_size: int
    amp: str
    model: str | None = None
    img_width: int | None = None

    @classmethod
    def of(cls, model, device, batch_size, amp):
        threads = torch.get_num_threads() if device.type == "cpu" else None
        height, width = model.patch_embed.img_size
        size = utils.machine_name(device), threads, batch_size, height, amp, _name_of(model)
        return cls(*size, width if width != height else None)

    def same_model(self, model):
        """Whether ``model`` may be the one that was measured: of the same architecture, or not known."""
        return self.model in (None, _name_of(model))

    def __str__(self):
        on = f", {self.threads} threads" if self.threads else ""
        amp = "" if self.amp == "none" else f", {self.amp}"
        return f"batch {self.batch_size}, {self.img_size} px{amp} on {self.device}{on}"

    @property
    def file_name(self):
        words = re.sub(r"[^\w.]+", "-", self.device).strip("-")
        threads = f"_{self.threads}threads" if self.threads else ""
        return f"latency_{words}{threads}_batch{self.batch_size}_{self.img_size}px_{self.amp}.json"


def _name_of(model):
    return (getattr(model, "pretrained_cfg", None) or {}).get("architecture")


@torch.inference_mode()
def measure(networks, device, conditions):
    """The median milliseconds per batch of each network, over REPEATS rounds after WARM_UP rounds.

    The networks take turns, so that whatever else the machine does slows all of them alike. With several ranks the
    main one measures while the others wait, and all return its figures.
    """
    return utils.from_main(lambda: _measure(networks, device, conditions))


def _measure(networks, device, conditions):
    height, width = conditions.img_size, conditions.img_width or conditions.img_size
    images = torch.randn(conditions.batch_size, 3, height, width, device=device)
    seconds = [[] for _ in networks]
    with utils.autocast(device, conditions.amp):
        for _ in range(WARM_UP + REPEATS):
            for network, times in zip(networks, seconds, strict=True):
                watch = utils.Stopwatch(device)
                network(images)
                times.append(watch.seconds())
    return [1e3 * statistics.median(times[WARM_UP:]) for times in seconds]


@dataclass
class LatencyTable:
    """Measured milliseconds per batch by Widths, under one set of Conditions; one JSON file. With a SuperNetwork
    ``loaded`` and a ``device`` it measures what it does not know yet, and keeps it."""

    path: Path
    conditions: Conditions
    points: dict[Widths, float] = field(default_factory=dict)
    loaded: object = None
    device: torch.device | None = None

    @classmethod
    def load(cls, path):
        """Read a file of measurements. Raises InputError if it is not one."""
        content = utils.parse_json(utils.read_text(path, "stage 3 writes it with --benchmark"), path)
        try:
            points = {Widths.from_dict(point["widths"]): float(point["ms"]) for point in content["points"]}
            conditions = Conditions(**content["conditions"])
            if not (type(conditions.batch_size) is type(conditions.img_size) is int):
                raise ValueError(f"{conditions}")
            return cls(Path(path), conditions, points)
        except (ValueError, KeyError, TypeError, OverflowError) as error:
            raise InputError(f"{path}: not a file of latencies that stage 3 wrote ({error!r})") from None

    @classmethod
    def beside(cls, loaded, device, batch_size, amp):
        """The table for these conditions beside the checkpoint of a SuperNetwork, with what it holds already."""
        conditions = Conditions.of(loaded.supernet, device, batch_size, amp)
        path = Path(loaded.source).parent / conditions.file_name
        # What is known decides what is measured: all ranks must know the same.
        found = utils.from_main(lambda: cls.load(path) if path.is_file() else None)
        known = found.points if found and found.conditions.same_model(loaded.supernet) else {}
        return cls(path, conditions, known, loaded, device)

    def known(self, table):
        """{step: milliseconds} of the steps of a WidthTable that have been measured."""
        return {step: self.points[widths] for step, widths in enumerate(table.steps) if widths in self.points}

    def measure(self, many_widths, others=()):
        """Milliseconds per batch at each of several Widths, and of ``others``, networks to call with images; measured
        now, side by side. Those of the Widths are saved."""
        # How fast a network is does not depend on its weights: plain slices do.
        networks = [self.loaded.slice(widths).to(self.device) for widths in many_widths]
        milliseconds = measure([*networks, *others], self.device, self.conditions)
        self.points |= dict(zip(many_widths, milliseconds, strict=False))
        points = [{"widths": widths.as_dict(), "ms": ms} for widths, ms in self.points.items()]
        content = {"conditions": asdict(self.conditions), "torch": torch.__version__, "points": points}
        utils.save_text(json.dumps(content), self.path)
        return milliseconds

    def choose(self, budget, table):
        """The largest step of a WidthTable within a 'latency_ms' Budget, a Choice.

        What is not known yet is measured, first both ends of the table, then by bisection. A table without a
        super-network chooses among the steps that it knows. Raises BudgetError with the reachable range.
        """
        missing = [step for step in (0, table.last) if step not in self.known(table)]
        if self.loaded and missing:
            self.measure([table.steps[step] for step in missing])
        if not self.known(table):
            raise InputError(f"{self.path}: holds no measurement of a sub-network of this table")
        while True:
            known = self.known(table)
            step = min((step for step, ms in known.items() if ms <= budget.value), default=None)
            budget.check_reach(step, min(known.values()), max(known.values()))
            too_slow = max((other for other in known if other < step), default=-1)
            if not self.loaded or step - too_slow <= 1:
                return Choice(step, table.steps[step], latency_ms=known[step])
            self.measure([table.steps[(step + too_slow) // 2]])
