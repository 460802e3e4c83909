"""mask_table.json: round trip, what is refused, and budgets."""

import json
import random

import pytest
from conftest import tiny_supernet

import main_test
from models.piad.width_table import WidthTable
from models.subnet.budget import Budget, widen
from models.vit.cost import Costs
from models.vit.widths import Widths
from utils import InputError, fraction, quantity

COSTS = Costs.of(tiny_supernet())
TABLE = WidthTable(
    [Widths((16,) * 3, (192,) * 3), Widths((16, 16, 14), (192,) * 3), Widths((16, 16, 14), (192, 96, 192)),
     Widths((8, 0, 14), (192, 96, 0)), Widths((2, 0, 0), (6, 0, 0))]
)  # fmt: skip


def test_round_trip_in_the_published_layout_of_which_not_all_is_needed():
    content = json.loads(TABLE.to_json())
    assert set(content) == {"meta"} | {f"{b}.{k}" for b in range(3) for k in ("attn", "mlp")}
    assert content["0.attn"] == {"0": 16, "1": 16, "2": 16, "3": 8, "4": 2, "-1": 2}
    assert WidthTable.from_json(TABLE.to_json(), "x").steps == TABLE.steps
    del content["meta"]
    for member in content.values():
        del member["-1"]
    shuffled = {name: dict(reversed(content[name].items())) for name in reversed(content)}
    assert WidthTable.from_json(json.dumps(shuffled), "x").steps == TABLE.steps


def test_true_is_no_width():
    """What else is wrong with a table: docs/bad_input.md and test_properties.py."""
    content = json.loads(TABLE.to_json())
    content["0.attn"]["4"] = True
    with pytest.raises(InputError, match="step 4 is True; widths are integers"):
        WidthTable.from_json(json.dumps(content), "x")


@pytest.mark.parametrize(("kind", "cost"), [("macs", COSTS.macs), ("params", COSTS.parameters)])
def test_a_budget_takes_the_largest_step_within_it_and_finer_widths_use_more_of_it(kind, cost):
    costs, generator = [cost(widths) for widths in TABLE.steps], random.Random(0)
    edges = [*costs, *(c + 1 for c in costs[1:]), *(c - 1 for c in costs[:-1])]
    for budget in edges + [generator.randint(costs[-1], costs[0]) for _ in range(50)]:
        coarse, fine = (Budget(kind, budget).choose(TABLE, COSTS, finer) for finer in (False, True))
        step = coarse.step
        assert step == fine.step and coarse.widths == TABLE.steps[step]
        assert costs[step] <= cost(fine.widths) <= budget and (step == 0 or costs[step - 1] > budget)
        assert fine.finer == (fine.widths != coarse.widths) and str(fine) == f"{step}{'+' * fine.finer}"
        before = TABLE.steps[step - 1].flat if step else coarse.widths.flat
        for branch, (low, width, high) in enumerate(zip(coarse.widths.flat, fine.widths.flat, before, strict=True)):
            assert low <= width <= high and width % 2 == 0
            more = [*fine.widths.flat[:branch], width + 2, *fine.widths.flat[branch + 1 :]]
            assert width == high or cost(Widths.from_flat(more)) > budget


def test_finer_widths_are_multiples_of_8_where_the_tables_are():
    table = WidthTable([Widths((64,), (1536,)), Widths((64,), (768,)), Widths((24,), (768,))])
    assert widen(table, 1, lambda widths: widths.mlp[0], 1003, [False] * 2) == Widths((64,), (1000,))
    assert widen(table, 2, lambda widths: widths.attn[0], 47, [False] * 2) == Widths((40,), (768,))
    assert widen(table, 2, lambda widths: widths.attn[0], 31, [False] * 2) == Widths((24,), (768,))
    gone = WidthTable([Widths((64,), (1536,)), Widths((0,), (1536,))])
    assert widen(gone, 1, lambda widths: widths.attn[0], 63, [True, False]) == gone.steps[1], "all of it or nothing"
    assert widen(gone, 1, lambda widths: widths.attn[0], 63, [False, False]) == Widths((56,), (1536,))


def test_quantities_have_human_units():
    texts = ("8.44G", "40M", "12k", "7", "46.53 M", "8.44GMac", "897.00 MMAC")
    assert [quantity(text) for text in texts] == [8.44e9, 40e6, 12e3, 7, 46.53e6, 8.44e9, 897e6]
    assert fraction("50%") == 0.5 and Budget("macs", "300M") == Budget("macs", 300e6)
    args = main_test.get_args(["--macs", "46.53", "M", "8.44G", "--macs-ratio", "50%", "0.3"])
    assert args.macs == [46.53e6, 8.44e9] and args.macs_ratio == [0.5, 0.3]
