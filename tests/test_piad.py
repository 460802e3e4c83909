"""Importance, pool-adjacent-violators, the growth of the dropout list, and the sampler."""

import random
from fractions import Fraction

import pytest
import torch
from conftest import TINY_WIDTHS, measured, proxy_batches, tiny_supernet
from torch.nn import functional as F

from models.piad.dropout import DropoutList, draw_step, grow, step_weights, target_cost
from models.piad.importance import Units, branch_removal, drop_order, sensitivity, unit_importance
from models.vit.cost import PAPER, Costs
from models.vit.supernet import branches, set_widths
from models.vit.widths import Widths

FULL, COSTS = TINY_WIDTHS[0], Costs.of(tiny_supernet())
UNITS = Units.of(FULL)


def brute_force(importance):
    """The rule word for word: the tail [j:] of least mean leaves, the shortest of equals; then again."""
    kept, order = [Fraction(v) for v in importance], []
    while kept:
        means = [sum(kept[j:]) / len(kept[j:]) for j in range(len(kept))]
        least = min(means)
        j = max(j for j, mean in enumerate(means) if mean == least)
        order.append((least, len(kept) - j))
        kept = kept[:j]
    return order


def test_pool_adjacent_violators_against_brute_force():
    draw = random.Random(0)
    for _ in range(500):
        values = [draw.randint(0, 4) for _ in range(draw.randint(0, 12))]
        expected = brute_force(values)
        got = drop_order(values)
        assert [size for _, size in got] == [size for _, size in expected], values
        assert [mean for mean, _ in got] == pytest.approx([float(mean) for mean, _ in expected])


def test_a_weak_unit_in_front_of_a_strong_one_leaves_together_with_it():
    assert drop_order([5, 0, 3]) == [(1.5, 2), (5, 1)]
    assert drop_order([0, 0, 0]) == [(0, 1)] * 3
    assert drop_order([]) == []


@pytest.mark.parametrize("kind", ["random", "zero", "equal", "ties"])
def test_the_list_is_monotone_valid_and_ends_at_the_target(kind):
    generator = random.Random(1)
    draw = {"random": generator.random, "zero": lambda: 0.0, "equal": lambda: 1.0,
            "ties": lambda: float(generator.randint(0, 2))}[kind]  # fmt: skip
    steps, history = [FULL], []
    for epoch in range(4):
        target = target_cost(COSTS.macs(FULL), 0.875, epoch, 4)
        grow(steps, [[draw() for _ in range(n)] for n in UNITS.counts(steps[-1])], UNITS, COSTS.macs, target)
        assert COSTS.macs(steps[-1]) <= target < COSTS.macs(steps[-2]), "not as far as asked, or further"
        assert history == steps[: len(history)], "an earlier entry has changed"
        history = list(steps)
    assert steps[0] == FULL and COSTS.macs(steps[-1]) <= 0.125 * COSTS.macs(FULL)


def test_the_least_important_leaves_first():
    steps, importance = [FULL], [[float(1 + b)] * count for b, count in enumerate(UNITS.counts(FULL))]
    importance[3] = [0.5] * 32
    grow(steps, importance, UNITS, COSTS.macs, COSTS.macs(FULL) - 1)
    assert steps[-1] == Widths(FULL.attn, (192, 186, 192))


def test_a_frozen_list_stays():
    assert target_cost(1000, 0.875, 60, 50) == target_cost(1000, 0.875, 49, 50) == pytest.approx(125)


def test_branch_removal_equals_a_direct_computation():
    """With activations replayed, the costs are those of running the whole network without the branch."""
    supernet = tiny_supernet().double()
    set_widths(supernet, Widths((16, 0, 8), (192, 96, 192)))
    batches = proxy_batches(12, 4, dtype=torch.float64)

    @torch.no_grad()
    def cost():
        return sum(F.cross_entropy(supernet(x), y, reduction="sum").item() for x, y, _ in batches) / 12

    got, without = branch_removal(supernet, batches)
    assert got == pytest.approx(cost(), rel=1e-12)
    for branch, value in zip(branches(supernet), without, strict=True):
        width = branch.width
        branch.keep(0)
        assert value == pytest.approx(cost(), rel=1e-12)
        branch.keep(width)
    assert without[2] == got, "a branch that is gone already costs nothing more"


def test_sensitivity_by_accuracy_counts_right_answers():
    supernet, batches = tiny_supernet(), proxy_batches(12, 4)
    with torch.no_grad():
        batches = [(images, supernet(images).argmax(1), positions) for images, _, positions in batches]
    value, without = branch_removal(supernet, batches, "accuracy")
    assert value == 1.0 and min(without) < 1.0
    assert all((12 * accuracy) == pytest.approx(round(12 * accuracy)) for accuracy in without)
    gammas = sensitivity(-value, [-v for v in without])
    assert gammas == pytest.approx([1 - accuracy for accuracy in without])
    assert sensitivity(-0.0, [-0.0, -0.5]) == [0.0, 0.0], "no right answer at all"


def test_unit_importance_closed_form():
    supernet, widths, costs = tiny_supernet(), Widths((8, 16, 0), (96, 192, 192)), COSTS.units(PAPER)
    set_widths(supernet, widths)
    statistics = measured(supernet, moments=False)
    gammas = sensitivity(2.0, [3.0, 1.0, 2.5, 2.0, 2.0, 4.0])
    assert gammas == [0.5, 0.0, 0.25, 0.0, 0.0, 1.0]
    importance = unit_importance(gammas, statistics, widths, UNITS, costs)
    assert [len(units) for units in importance] == [4, 16, 8, 32, 0, 32]
    assert sum(importance[0]) * 2 * costs[0] == pytest.approx(0.5)
    assert sum(importance[1]) == 0
    taylor = statistics[5].taylor
    assert importance[5][1] == pytest.approx((taylor[6:12].sum() / taylor.sum() / (6 * costs[5])).item())


def test_the_sampler_is_uniform_and_reaches_both_ends():
    weights = step_weights("uniform", [9.0, 8.0, 4.0, 3.0, 1.0])
    counts = torch.tensor([draw_step(weights, 3, step) for step in range(5000)]).bincount()
    assert len(counts) == 5
    # Five standard deviations of a binomial with p = 1/5.
    assert ((counts - 1000).abs() < 5 * (5000 * 0.2 * 0.8) ** 0.5).all()
    one = step_weights("uniform", [9.0])
    assert {draw_step(one, 0, step) for step in range(10)} == {0}


def test_draws_are_keyed_by_seed_step_and_stream():
    weights = step_weights("uniform", [1.0] * 1000)
    assert draw_step(weights, 3, 77) == draw_step(weights, 3, 77)
    draws = {draw_step(weights, 3, 77, *stream) for stream in ((0,), (1,), (2,), (3,))}
    assert len(draws) == 4, "ranks that draw for themselves draw the same"


@pytest.mark.parametrize("stream", [(), (1,)])
def test_the_batches_of_an_update_draw_alike_or_each_for_itself(stream):
    steps = [Widths((16,) * 3, (width,) * 3) for width in range(192, 92, -1)]
    alike, apart = (DropoutList(UNITS, COSTS, steps, stream=stream, per_batch=each) for each in (False, True))
    for step in range(5):
        assert [alike.draw(step, batch) for batch in range(4)] == [alike.draw(step)] * 4
        assert apart.draw(step, 0) == alike.draw(step)
        assert len({str(apart.draw(step, batch)) for batch in range(4)}) > 2


def test_weights_of_the_steps():
    macs = [10.0, 9.0, 5.0, 4.0]
    assert step_weights("macs", macs).tolist() == [0.5, 2.5, 2.5, 0.5]
    ends = step_weights("ends", macs)
    assert (ends / ends.sum()).tolist() == [0.375, 0.125, 0.125, 0.375]
    compute = step_weights("compute", macs) * torch.tensor(macs, dtype=torch.float64)
    assert torch.allclose(compute, compute[:1].expand(4)), "every size gets the same compute"
    for sampling in ("uniform", "macs", "ends", "compute"):
        assert (step_weights(sampling, [10.0]) > 0).all()
    # However unevenly the steps lie, the mean drawn by MACs is the middle: 40 near the full network, two far below.
    macs = [100.0 - 0.1 * step for step in range(40)] + [50.0, 0.0]
    weights = step_weights("macs", macs)
    mean = torch.tensor(macs, dtype=torch.float64) @ weights / weights.sum()
    assert mean.item() == pytest.approx(50, abs=0.5)


def test_units_for_hardware_are_multiples():
    full = Widths((64, 80), (1536, 192))
    assert Units.of(full).sizes == (8, 48, 10, 6)
    units = Units.of(full, multiple_of=64)
    assert units.sizes == (8, 64, 16, 64)
    assert Units.of(full, [False, True, False, False], multiple_of=256).sizes == (8, 1536, 16, 192)
    steps = [full]
    draws = [[random.Random(b).random() for _ in range(count)] for b, count in enumerate(units.counts(full))]
    grow(steps, draws, units, lambda widths: sum(widths.flat), 100)
    assert len(steps) > 20
    assert all(w % 64 == 0 for step in steps for w in step.mlp) and all(w % 8 == 0 for step in steps for w in step.attn)
