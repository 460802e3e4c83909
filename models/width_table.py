"""The kept widths of every block, the table of them (one entry for each step of the dropout list), and budgets."""

import json
from bisect import bisect_left
from dataclasses import dataclass, field
from math import gcd
from pathlib import Path

from utils import InputError, human

FORMAT_VERSION = 1
# A budget this little above the full network still asks for the full network: printed figures are rounded.
BUDGET_SLACK = 1.005
# Budgets that are computed; a latency is measured.
BUDGET_KINDS = ("op_code", "macs", "macs_ratio", "params")


@dataclass(frozen=True)
class Widths:
    """What one sub-network keeps: ``attn[b]`` dimensions of every head and ``mlp[b]`` hidden units of block b.

    A width of 0 means that the branch is gone.
    """

    attn: tuple[int, ...]
    mlp: tuple[int, ...]

    @property
    def flat(self):
        """All 2L widths, block by block: attn 0, mlp 0, attn 1, ..."""
        return tuple(width for pair in zip(self.attn, self.mlp, strict=True) for width in pair)

    @classmethod
    def from_flat(cls, flat):
        return cls(tuple(flat[0::2]), tuple(flat[1::2]))

    def as_dict(self):
        return {"attn": list(self.attn), "mlp": list(self.mlp)}

    @classmethod
    def from_dict(cls, content):
        return cls(tuple(content["attn"]), tuple(content["mlp"]))


@dataclass
class WidthTable:
    """Widths per step: ``steps[0]`` is the full network, ``steps[-1]`` the smallest; widths never grow.

    ``meta`` is free additional information, kept in the file's ``"meta"`` member.
    """

    steps: list[Widths]
    meta: dict = field(default_factory=dict)

    @property
    def last(self):
        """The index of the last step."""
        return len(self.steps) - 1

    def first_within(self, cost, budget):
        """The first (largest) step whose ``cost(widths)`` is at most ``budget``, or None if there is none. Widths never
        grow, and so no cost does: found by bisection."""
        step = bisect_left(self.steps, -budget, key=lambda widths: -cost(widths))
        return step if step < len(self.steps) else None

    def to_json(self):
        """The published layout of ``mask_table.json`` (one member per branch, one string key per step) plus meta."""
        members = {}
        for index, name in enumerate(branch_names(len(self.steps[0].attn))):
            widths = [step.flat[index] for step in self.steps]
            members[name] = {str(step): width for step, width in enumerate(widths)} | {"-1": widths[-1]}
        return json.dumps({"meta": {"format_version": FORMAT_VERSION} | self.meta} | members)

    @classmethod
    def from_json(cls, text, source):
        """Parse ``mask_table.json``. ``source`` is named in errors. Raises InputError if it is not a valid table."""
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:  # besides bad syntax: a number of 5,000 digits, 10,000 brackets
            raise InputError(f"{source}: not JSON ({str(error).splitlines()[0]})") from None
        if not isinstance(content, dict):
            raise InputError(f"{source}: expected one object with members '0.attn', '0.mlp', ...")
        meta = content.pop("meta", {})
        columns = [_column(content, name, source) for name in _expected_names(content, source)]
        if any(len(column) != len(columns[0]) for column in columns):
            raise InputError(f"{source}: its members do not all have the same steps")
        return cls(
            [Widths.from_flat(row) for row in zip(*columns, strict=True)], meta if isinstance(meta, dict) else {}
        )

    @classmethod
    def load(cls, path):
        """Read ``mask_table.json``. Raises InputError if it is missing or invalid."""
        path = Path(path)
        if not path.is_file():
            raise InputError(f"{path}: no such file; the width table lies beside the checkpoint as mask_table.json")
        try:
            text = path.read_text(errors="replace")
        except OSError as error:
            raise InputError(f"{path}: cannot be read ({error.strerror})") from None
        return cls.from_json(text, path)

    def check_fits(self, full, whole, source):
        """Raise InputError unless the table starts at the widths ``full`` of the model it is used with, and keeps all
        or nothing of the branches that ``whole`` [2L] says can only go as a whole."""
        if self.steps[0] != full:
            depth, own = len(self.steps[0].attn), len(full.attn)
            what = f"{depth} blocks, the model {own}"
            if depth == own:
                pairs = zip(branch_names(depth), self.steps[0].flat, full.flat, strict=True)
                name, width, expected = next(pair for pair in pairs if pair[1] != pair[2])
                what = f"width {width} for '{name}', the model {expected}"
            raise InputError(f"{source}: made for another model: its step 0 has {what}")
        for step, widths in enumerate(self.steps):
            for name, kept, most, one in zip(branch_names(len(full.attn)), widths.flat, full.flat, whole, strict=True):
                if one and kept not in (0, most):
                    raise InputError(
                        f"{source}: '{name}' step {step} keeps {kept} of {most}; in this model it can only be kept "
                        "whole or dropped"
                    )


@dataclass(frozen=True)
class Choice:
    """What a budget obtains: the widths of ``step`` of the table or, if ``finer``, wider ones up to the step before.

    ``latency_ms``: milliseconds per batch, if they have been measured.
    """

    step: int
    widths: Widths
    finer: bool = False
    latency_ms: float | None = None

    def __str__(self):
        return f"{self.step}+" if self.finer else str(self.step)


@dataclass(frozen=True)
class Budget:
    """What a user asks for. ``kind``: 'op_code' (a step), 'macs' (paper's convention), 'macs_ratio' (of the full
    network), 'params', or 'latency_ms', which is measured and not computed: models/latency.py."""

    kind: str
    value: float

    def __str__(self):
        return f"{self.kind} {human(self.value) if self.kind in ('macs', 'params') else f'{self.value:.4g}'}"

    @property
    def folder(self):
        """A name for the files of what it obtains: macs_8.44G, macs_ratio_0.5."""
        return str(self).replace(" ", "_", 1).replace(" ", "")

    def choose(self, table, shapes, finer=False):
        """The largest sub-network of ``table`` within this budget, a Choice; with ``finer`` as much of what the step
        before it keeps as still fits. Raises InputError with the reachable range."""
        if self.kind not in BUDGET_KINDS:
            raise InputError(f"a budget of kind '{self.kind}': choose from {', '.join(BUDGET_KINDS)}")
        if self.kind == "op_code":
            step = table.last if self.value == -1 else self.value
            if step not in range(table.last + 1):
                raise InputError(f"--op_code {self.value}: steps run from 0 to {table.last} (or -1 for the last)")
            return Choice(int(step), table.steps[int(step)])
        cost = shapes.parameters if self.kind == "params" else shapes.macs
        unit = cost(table.steps[0]) if self.kind == "macs_ratio" else 1
        limit = self.value * unit
        step = table.first_within(cost, limit)
        self.check_reach(step, *(cost(table.steps[end]) / unit for end in (-1, 0)))
        widths = widen(table, step, cost, limit, shapes.whole) if finer and step else table.steps[step]
        return Choice(step, widths, widths != table.steps[step])

    def check_reach(self, step, least, most):
        """Raise InputError if no step is within the budget, or the budget is above the full network's cost."""
        if step is None or self.value > most * BUDGET_SLACK:
            exact = self.kind in ("macs", "params")
            low, high = (human(x) if exact else f"{x:.4g}" for x in (least, most))
            raise InputError(f"--{self}: out of reach; this table has networks from {low} to {high}")


def widen(table, step, cost, limit, whole):
    """The widths of ``step``, branch by branch as near to those of the step before as ``cost`` of at most ``limit``
    allows. What is added comes in multiples of 8, which hardware likes, or where the table's own widths are no
    multiples of 8, of their greatest common divisor; all of it or nothing where ``whole`` [2L] says so.
    """
    present, before = list(table.steps[step].flat), table.steps[step - 1].flat
    grains = [gcd(8, *(w for widths in table.steps for w in widths.flat[branch::2])) for branch in (0, 1)]
    for branch, most in enumerate(before):
        grain = max(most, 1) if whole[branch] else grains[branch % 2]
        for width in range(most, present[branch], -grain):
            wider = [*present[:branch], width, *present[branch + 1 :]]
            if cost(Widths.from_flat(wider)) <= limit:
                present = wider
                break
    return Widths.from_flat(present)


def branch_names(depth):
    """The members of ``mask_table.json``: '0.attn', '0.mlp', '1.attn', ..."""
    return [f"{block}.{branch}" for block in range(depth) for branch in ("attn", "mlp")]


def _expected_names(content, source):
    branches = [name for name in content if name.endswith((".attn", ".mlp"))]
    names = branch_names((len(branches) + 1) // 2)
    missing = next((name for name in names if name not in content), None)
    if not names or missing:
        raise InputError(f"{source}: member '{missing or '0.attn'}' is missing")
    return names


def _column(content, name, source):
    """The widths of one branch in step order, checked."""
    member = content[name]
    if not isinstance(member, dict):
        raise InputError(f"{source}: member '{name}' must map steps to widths")
    count = len([step for step in member if step != "-1"])
    missing = next((step for step in range(max(count, 1)) if str(step) not in member), None)
    if missing is not None:
        raise InputError(f"{source}: '{name}' has no step '{missing}'; steps run from '0' without a gap")
    column = [member[str(step)] for step in range(count)]
    for step, width in enumerate(column):
        if type(width) is not int or width < 0:
            raise InputError(f"{source}: '{name}' step {step} is {width!r}; widths are integers of at least 0")
        if step and width > column[step - 1]:
            raise InputError(f"{source}: '{name}' grows from {column[step - 1]} to {width} at step {step}")
    if member.get("-1", column[-1]) != column[-1]:
        raise InputError(f"{source}: '{name}' step '-1' is {member['-1']}, its last step {column[-1]}")
    return column
