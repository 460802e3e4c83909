"""A budget, and the sub-network of a width table that it obtains."""

from argparse import ArgumentTypeError
from dataclasses import dataclass
from math import gcd
from typing import NamedTuple

from models.vit.widths import BRANCH_NAMES, Widths
from utils import BudgetError, InputError, quantity, table_text, with_unit

# A budget this little above the full network still asks for the full network: printed figures are rounded.
BUDGET_SLACK = 1.005
# Budgets that are computed; a latency is measured.
BUDGET_KINDS = ("op_code", "macs", "macs_ratio", "params")


@dataclass(frozen=True)
class Choice:
    """What a budget obtains: the widths of ``step`` of the table or, if ``finer``, wider ones up to the step before.
    latency_ms: milliseconds per batch, if they have been measured."""

    step: int
    widths: Widths
    finer: bool = False
    latency_ms: float | None = None

    def __str__(self):
        return f"{self.step}+" if self.finer else str(self.step)


@dataclass
class Budget:
    """What a user asks for. kind: 'op_code' (a step), 'macs' (paper's convention), 'macs_ratio' (of the full network),
    'params', or 'latency_ms', which is measured: ``latency.py``. value: a number, or a text such as '8.44G' or '50%';
    any other raises InputError."""

    kind: str
    value: float

    def __post_init__(self):
        try:
            if isinstance(self.value, str):
                self.value = quantity(self.value)
        except ArgumentTypeError as error:
            raise InputError(f"{self.kind} {error}") from None

    @classmethod
    def of(cls, **asked):
        """The Budget of one keyword argument, macs_ratio=0.5 or params="10M". Raises InputError if it is none."""
        if len(asked) != 1:
            raise InputError(f"give one budget of {', '.join(BUDGET_KINDS)}")
        return cls(*asked.popitem())

    def __str__(self):
        return f"{self.kind} {with_unit(self.value) if self.kind in ('macs', 'params') else f'{self.value:.4g}'}"

    @property
    def folder(self):
        """A name for the files of what it obtains: macs_8.44G, macs_ratio_0.5."""
        return str(self).replace(" ", "_", 1).replace(" ", "")

    def choose(self, table, costs, finer=False):
        """The largest sub-network of ``table`` within this budget, a Choice. costs: Costs.

        finer: keep as much of what the step before keeps as still fits. Raises BudgetError with the reachable range.
        """
        if self.kind not in BUDGET_KINDS:
            raise InputError(f"a budget of kind '{self.kind}': choose from {', '.join(BUDGET_KINDS)}")
        if self.kind == "op_code":
            step = table.last if self.value == -1 else self.value
            if step not in range(table.last + 1):
                raise BudgetError(f"op_code {self.value}: steps run from 0 to {table.last} (or -1 for the last)")
            return Choice(int(step), table.steps[int(step)])
        cost = costs.parameters if self.kind == "params" else costs.macs
        one = cost(costs.full) if self.kind == "macs_ratio" else 1
        limit = self.value * one
        step = table.first_within(cost, limit)
        self.check_reach(step, *(cost(table.steps[end]) / one for end in (-1, 0)))
        widths = widen(table, step, cost, limit, costs.indivisible) if finer and step else table.steps[step]
        return Choice(step, widths, widths != table.steps[step])

    def check_reach(self, step, least, most):
        """Raise BudgetError if no step is within the budget, or the budget is above the full network's cost."""
        if step is None or not self.value <= most * BUDGET_SLACK:
            counted = self.kind in ("macs", "params")
            low, high = (with_unit(x) if counted else f"{x:.4g}" for x in (least, most))
            raise BudgetError(f"{self}: out of reach; this table has networks from {low} to {high}")


def widen(table, step, cost, limit, indivisible):
    """The Widths of ``step``, branch by branch as near to those of the step before as ``cost`` of at most ``limit``
    allows.

    What is added comes in multiples of 8, which hardware likes, or in multiples of the greatest common divisor of the
    table's own widths if those are no multiples of 8; all of it or nothing for the branches of ``indivisible`` [2L].
    """
    present, before = list(table.steps[step].flat), table.steps[step - 1].flat
    grains = {name: gcd(8, *(w for widths in table.steps for w in getattr(widths, name))) for name in BRANCH_NAMES}
    names = table.steps[step].named
    for branch, (name, most) in enumerate(zip(names, before, strict=True)):
        grain = max(most, 1) if indivisible[branch] else grains[name.split(".")[1]]
        for width in range(most, present[branch], -grain):
            wider = [*present[:branch], width, *present[branch + 1 :]]
            if cost(Widths.from_flat(wider)) <= limit:
                present = wider
                break
    return Widths.from_flat(present)


class Size(NamedTuple):
    """What one step of a width table costs. macs: in the paper's convention."""

    op_code: int
    macs: int
    macs_ratio: float
    params: int


class Sizes(list):
    """The Size of every step, which prints as a table of a dozen of them."""

    def __repr__(self):
        gaps = min(len(self), 12) - 1
        rows = [self[round(i * (len(self) - 1) / max(gaps, 1))] for i in range(gaps + 1)]
        lines = [[str(s.op_code), with_unit(s.macs), f"{s.macs_ratio:.3f}", with_unit(s.params)] for s in rows]
        return table_text([list(Size._fields), *lines])
