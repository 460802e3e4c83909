"""Whatever goes in: a clear error, or a valid result. Width tables, budgets and growth under generated input."""

import itertools
import json
import math

import pytest
import torch
from conftest import TINY_WIDTHS, tiny_supernet
from hypothesis import example, given, settings
from hypothesis import strategies as st

from models.piad.dropout import grow
from models.piad.importance import Units, drop_order, sensitivity, unit_importance
from models.piad.width_table import WidthTable
from models.subnet.budget import Budget
from models.vit.cost import Costs
from models.vit.widths import Widths
from models.wpac.statistics import AttentionStatistics, BranchStatistics
from utils import InputError

# Derandomised: the same examples everywhere, so that a failure is no accident.
modest = settings(max_examples=150, deadline=None, derandomize=True, database=None)
COSTS, FULL, NOTHING = Costs.of(tiny_supernet()), TINY_WIDTHS[0], TINY_WIDTHS[-1]
UNITS = Units.of(FULL)


def refused_in_one_line(call):
    """The result of ``call``, or None if it was refused with an InputError of one line."""
    try:
        return call()
    except InputError as error:
        assert str(error) and "\n" not in str(error)
        return None


# ------------------------------------------------------------------------------------------ mask_table.json


@st.composite
def columns(draw, most, steps):
    """Widths of one branch that never grow."""
    return sorted((draw(st.integers(0, most)) for _ in range(steps)), reverse=True)


@st.composite
def tables(draw):
    """Any valid table of up to four blocks."""
    depth, steps = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    flat = [draw(columns(most, steps)) for _ in range(depth) for most in (16, 192)]
    return WidthTable([Widths.from_flat(row) for row in zip(*flat, strict=True)])


@modest
@given(tables(), st.dictionaries(st.text(max_size=5), st.integers(), max_size=2))
def test_every_valid_table_survives_the_file(table, meta):
    table.meta = meta
    again = WidthTable.from_json(table.to_json(), "x")
    assert again.steps == table.steps
    assert {k: v for k, v in meta.items() if k != "format_version"}.items() <= again.meta.items()


def assert_valid(table):
    assert table.steps and len({len(w.attn) for w in table.steps} | {len(w.mlp) for w in table.steps}) == 1
    for widths in table.steps:
        assert all(type(width) is int and width >= 0 for width in widths.flat)
    for before, after in itertools.pairwise(table.steps):
        assert all(a >= b for a, b in zip(before.flat, after.flat, strict=True))


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
names = st.sampled_from(["0.attn", "0.mlp", "1.attn", "1.mlp", "00.attn", "-1.mlp", "x.attn", "meta", ".mlp", ""])
step_names = st.sampled_from(["0", "1", "2", "-1", "01", "+1", " 1", "-2", "x", ""])
widths_or_not = st.integers(-1, 20) | st.integers(10**30, 10**31) | anything
members = st.dictionaries(step_names, widths_or_not, max_size=4) | anything


@modest
@given(st.dictionaries(names, members, max_size=5) | anything)
def test_any_json_is_a_valid_table_or_refused(content):
    table = refused_in_one_line(lambda: WidthTable.from_json(json.dumps(content), "mask_table.json"))
    if table:
        assert_valid(table)
        assert WidthTable.from_json(table.to_json(), "x").steps == table.steps
        refused_in_one_line(lambda: table.check_fits(COSTS, "x"))


@modest
@given(tables(), st.data())
def test_a_valid_table_with_one_thing_changed_is_valid_or_refused(table, data):
    content = json.loads(table.to_json())
    name = data.draw(st.sampled_from([name for name in content if name != "meta"]))
    step = data.draw(st.sampled_from(list(content[name])))
    if data.draw(st.booleans()):
        content[name][step] = data.draw(widths_or_not)
    else:
        del content[name][step]
    again = refused_in_one_line(lambda: WidthTable.from_json(json.dumps(content), "x"))
    if again:
        assert_valid(again)


@modest
@given(
    st.text(max_size=40) | st.sampled_from(["[" * 50_000, '{"0.attn": {"0": ' + "9" * 5000 + "}}", "\ufeff{}", "NaN"])
)
def test_any_text_is_refused(text):
    assert refused_in_one_line(lambda: WidthTable.from_json(text, "x")) is None


# ------------------------------------------------------------------------------------------ budgets

TABLE = WidthTable([
    FULL, Widths((16, 16, 14), (192,) * 3), Widths((8, 0, 14), (192, 96, 0)), Widths((2, 0, 0), (6, 0, 0)),
])  # fmt: skip
COST_OF = {
    "macs": COSTS.macs,
    "params": COSTS.parameters,
    "macs_ratio": lambda widths: COSTS.macs(widths) / COSTS.macs(FULL),
}
numbers = (
    st.floats() | st.floats(0, 1.01) | st.integers(-(10**9), 10**9)
    | st.sampled_from([cost(w) + d for cost in COST_OF.values() for w in TABLE.steps for d in (-1, 0, 1)])
)  # fmt: skip


@modest
@given(st.sampled_from(list(COST_OF)), numbers)
@example("macs", math.nan)
def test_a_budget_gives_the_largest_network_within_it_or_is_refused(kind, value):
    budget, cost = Budget(kind, value), COST_OF[kind]
    choice = refused_in_one_line(lambda: budget.choose(TABLE, COSTS))
    costs = [cost(widths) for widths in TABLE.steps]
    assert str(budget)
    if choice is None:
        assert not costs[-1] <= value or value > costs[0], "refused though a network fits"
    else:
        # A share is turned into MACs, which rounds once.
        step, most = choice.step, value * (1 + 1e-12)
        assert costs[step] <= most and (step == 0 or costs[step - 1] > value * (1 - 1e-12))
        finer = budget.choose(TABLE, COSTS, finer=True)
        assert finer.step == step and costs[step] <= cost(finer.widths) <= most


@modest
@given(st.sampled_from(["op_code", "flops", "", None]), st.integers(-3, 6) | anything)
def test_a_step_is_one_of_the_table_or_refused(kind, value):
    choice = refused_in_one_line(lambda: Budget(kind, value).choose(TABLE, COSTS))
    if choice is not None:
        step = choice.step
        assert kind == "op_code" and type(step) is int
        assert step == value or (value == -1 and step == TABLE.last)
    else:
        assert kind != "op_code" or type(value) is not int or value not in range(-1, 4)


# ------------------------------------------------------------------------------------------ growth

values = st.floats() | st.sampled_from([0.0, 1.0, -1.0, 5e-324, 1e308])


@st.composite
def importances(draw):
    """2L lists of numbers for the widths FULL, many of them equal, some of them no numbers."""
    pattern = draw(st.lists(values, min_size=1, max_size=9))
    stride = draw(st.integers(1, 7))
    endless = itertools.cycle(pattern[::stride] + pattern)
    return [[next(endless) for _ in range(count)] for count in UNITS.counts(FULL)]


@modest
@given(importances(), st.floats(-0.2, 1.2))
def test_growth_reaches_the_target_by_whole_units_or_is_refused(importance, ratio):
    steps, target = [FULL], COSTS.macs(FULL) * (1 - ratio)
    finite = all(math.isfinite(value) for branch in importance for value in branch)
    reachable = COSTS.macs(NOTHING) <= target
    if refused_in_one_line(lambda: grow(steps, importance, UNITS, COSTS.macs, target) or True):
        assert finite and reachable
        assert COSTS.macs(steps[-1]) <= target
        assert len(steps) == 1 or COSTS.macs(steps[-2]) > target
    else:
        assert not (finite and reachable), "refused though nothing was wrong"
        assert steps == [FULL], "refused after it had begun"
    assert_valid(WidthTable(steps))
    for before, after in itertools.pairwise(steps):
        (branch,) = (b for b in range(6) if before.flat[b] != after.flat[b])
        assert after.flat[branch] % UNITS.sizes[branch] == 0


@modest
@given(st.lists(values, max_size=12))
def test_the_order_of_a_branch_lets_every_unit_go_once(importance):
    pools = drop_order(importance)
    assert sum(size for _, size in pools) == len(importance) and all(size > 0 for _, size in pools)


@modest
@given(st.tuples(*[st.integers(0, 20)] * 3), st.tuples(*[st.integers(0, 200)] * 3))
def test_a_list_goes_on_from_any_table_of_a_user_or_is_refused(attn, mlp):
    """A table read from a file may hold widths that are not made of whole units."""
    widths = Widths(attn, mlp)
    whole = all(width % UNITS.sizes[branch] == 0 for branch, width in enumerate(widths.flat))
    statistics = []
    for a, m in zip(attn, mlp, strict=True):
        statistics += [AttentionStatistics(torch.ones(3, 3, a), None), BranchStatistics(torch.ones(m), None)]
    importance = refused_in_one_line(lambda: unit_importance([1.0] * 6, statistics, widths, UNITS, COSTS.units()))
    assert (importance is not None) == whole
    if importance:
        steps = [widths]
        grow(steps, importance, UNITS, COSTS.macs, COSTS.macs(NOTHING))
        assert steps[-1] == NOTHING


@modest
@given(st.integers(-1, 200), st.integers(-1, 5000), st.booleans(), st.floats(0, 1))
def test_units_of_any_widths_are_sensible_or_refused(head_width, hidden, indivisible, share):
    """At most 8 and 32 units that cover the width; equal ones where they divide it; and multiples of 8 once large."""
    full = Widths((head_width,), (hidden,))
    least = Widths((math.ceil(share * max(head_width, 0)),), (0,))
    units = refused_in_one_line(lambda: Units.of(full, [indivisible, False], least))
    if units is None:
        assert head_width <= 0 or hidden <= 0
        return
    for width, size, most in zip(full.flat, units.sizes, (1 if indivisible else 8, 32), strict=True):
        count = math.ceil(width / size)
        assert size >= 1 and count <= most and (count - 1) * size < width
        assert size * most == width if width % most == 0 else size < 8 or size % 8 == 0
    assert units.counts(full) == [math.ceil(width / size) for width, size in zip(full.flat, units.sizes, strict=True)]
    kept = units.least.attn[0]
    assert least.attn[0] <= kept <= head_width and (kept % units.sizes[0] == 0 or kept == head_width)


@modest
@given(st.integers(1, 100), st.integers(1, 400), st.floats(0, 1))
def test_growth_covers_uneven_widths_and_stops_at_the_least(head_width, hidden, share):
    full = Widths((head_width,), (hidden,))
    least = Widths((math.ceil(share * head_width),), (math.ceil(share * hidden),))
    units = Units.of(full, None, least)
    steps = [full]
    importance = [list(range(count, 0, -1)) for count in units.counts(full)]
    grow(steps, importance, units, lambda widths: sum(widths.flat), sum(units.least.flat))
    assert steps[-1] == units.least
    for before, after in itertools.pairwise(steps):
        assert sum(after.flat) < sum(before.flat)
        units.counts(after)


@modest
@given(st.lists(st.floats(-1, 10), min_size=6, max_size=6), st.floats(0, 10))
def test_sensitivity_is_never_negative(without, cost):
    gammas = sensitivity(cost, without)
    assert all(gamma >= 0 for gamma in gammas)
    assert [gamma > 0 for gamma in gammas] == [value - max(cost, 0) > 0 for value in without] or cost < 1e-11


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_cost_that_is_no_number_does_not_pass_for_an_importance(bad):
    gammas = sensitivity(1.0, [bad, *[2.0] * 5])
    importance = [[gamma] * count for gamma, count in zip(gammas, UNITS.counts(FULL), strict=True)]
    with pytest.raises(InputError, match="block 0"):
        grow([FULL], importance, UNITS, COSTS.macs, COSTS.macs(FULL) / 2)
