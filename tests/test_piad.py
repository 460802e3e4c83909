"""Importance, pool-adjacent-violators, the growth of the dropout list, and the sampler."""

import itertools
import random
from fractions import Fraction

import pytest
import torch
from conftest import proxy_batches, tiny_supernet
from torch.nn import functional as F

from engine import branch_removal
from models import piad
from models.cost import PAPER, Shapes, measured_unit_costs
from models.statistics import OBJECTIVES, collect_statistics
from models.supernet import full_widths, set_widths
from models.width_table import Widths
from utils import InputError

CPU = torch.device("cpu")


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
        got = piad.drop_order(values)
        assert [size for _, size in got] == [size for _, size in expected], values
        assert [mean for mean, _ in got] == pytest.approx([float(mean) for mean, _ in expected])


def test_a_weak_unit_in_front_of_a_strong_one_leaves_together_with_it():
    assert piad.drop_order([5, 0, 3]) == [(1.5, 2), (5, 1)]
    assert piad.drop_order([0, 0, 0]) == [(0, 1)] * 3
    assert piad.drop_order([]) == []


FULL = Widths((16,) * 3, (192,) * 3)
GROUPS = piad.Groups.of(FULL)


def grown(importance_of, ratio=0.875, epochs=4):
    shapes, steps = Shapes.of(tiny_supernet()), [FULL]
    history = []
    for epoch in range(epochs):
        target = piad.target_cost(shapes.macs(FULL), ratio, epoch, epochs)
        piad.grow(steps, importance_of(steps[-1]), GROUPS, shapes.macs, target)
        assert shapes.macs(steps[-1]) <= target
        assert shapes.macs(steps[-2]) > target, "grew further than asked"
        assert history == steps[: len(history)], "an earlier entry has changed"
        history = list(steps)
    return steps, shapes


def importance_by(draw):
    return lambda widths: [[draw() for _ in range(w // GROUPS.sizes[b])] for b, w in enumerate(widths.flat)]


@pytest.mark.parametrize("kind", ["random", "zero", "equal", "ties"])
def test_the_list_is_monotone_valid_and_ends_at_the_target(kind):
    generator = random.Random(1)
    draw = {"random": generator.random, "zero": lambda: 0.0, "equal": lambda: 1.0,
            "ties": lambda: float(generator.randint(0, 2))}[kind]  # fmt: skip
    steps, shapes = grown(importance_by(draw))
    assert steps[0] == FULL
    for before, after in itertools.pairwise(steps):
        changed = [b for b in range(6) if before.flat[b] != after.flat[b]]
        assert len(changed) == 1 and after.flat[changed[0]] < before.flat[changed[0]]
        assert after.flat[changed[0]] % GROUPS.sizes[changed[0]] == 0 and after.flat[changed[0]] >= 0
    assert shapes.macs(steps[-1]) <= 0.125 * shapes.macs(FULL)


def test_the_least_important_leaves_first():
    shapes, steps = Shapes.of(tiny_supernet()), [FULL]
    importance = [[float(1 + b)] * (w // GROUPS.sizes[b]) for b, w in enumerate(FULL.flat)]
    importance[3] = [0.5] * 32
    piad.grow(steps, importance, GROUPS, shapes.macs, shapes.macs(FULL) - 1)
    assert steps[-1] == Widths(FULL.attn, (192, 186, 192))


def test_an_unreachable_target_is_refused():
    shapes = Shapes.of(tiny_supernet())
    with pytest.raises(InputError, match="must be below"):
        piad.grow([FULL], importance_by(lambda: 1.0)(FULL), GROUPS, shapes.macs, 1)


def test_a_frozen_list_stays():
    assert piad.target_cost(1000, 0.875, 60, 50) == piad.target_cost(1000, 0.875, 49, 50) == pytest.approx(125)


def test_branch_removal_equal_a_direct_computation():
    """With activations replayed, the costs are those of running the whole network without the branch."""
    model = tiny_supernet().double()
    set_widths(model, Widths((16, 0, 8), (192, 96, 192)))
    batches = proxy_batches(12, 4, dtype=torch.float64)

    @torch.no_grad()
    def cost():
        return sum(F.cross_entropy(model(x), y, reduction="sum").item() for x, y, _ in batches) / 12

    got, without = branch_removal(model, batches, CPU)
    assert got == pytest.approx(cost(), rel=1e-12)
    for branch in range(6):
        block = model.blocks[branch // 2]
        widths = (block.attn_width, block.mlp_width)
        block.set_widths(*((0, widths[1]) if branch % 2 == 0 else (widths[0], 0)))
        assert without[branch] == pytest.approx(cost(), rel=1e-12)
        block.set_widths(*widths)
    assert without[2] == got, "a branch that is gone already costs nothing more"


def test_sensitivity_by_accuracy_counts_right_answers():
    model, batches = tiny_supernet(), proxy_batches(12, 4)
    with torch.no_grad():
        labels = torch.cat([model(images).argmax(1) for images, _, _ in batches])
    batches = [(x, y, i) for (x, _, i), y in zip(batches, labels.split(4), strict=True)]
    value, without = branch_removal(model, batches, CPU, "accuracy")
    assert value == 1.0 and min(without) < 1.0
    assert all((12 * accuracy) == pytest.approx(round(12 * accuracy)) for accuracy in without)
    gammas = piad.sensitivity(-value, [-v for v in without])
    assert gammas == pytest.approx([1 - accuracy for accuracy in without])
    assert piad.sensitivity(-0.0, [-0.0, -0.5]) == [0.0, 0.0], "no right answer at all"


def test_measured_unit_costs_are_seconds_and_leave_the_network_as_it_was():
    model = tiny_supernet()
    costs = measured_unit_costs(model, 8, CPU)
    assert len(costs) == 6 and all(0 < seconds < 1 for seconds in costs)
    assert costs[:2] == costs[2:4] == costs[4:], "blocks of one shape are measured once"
    assert (model.blocks[0].attn_width, model.blocks[0].mlp_width) == (16, 192)


def test_unit_importance_closed_form():
    model = tiny_supernet()
    shapes, widths = Shapes.of(model), Widths((8, 16, 0), (96, 192, 192))
    set_widths(model, widths)
    statistics = collect_statistics(model, proxy_batches(), OBJECTIVES["label"], CPU, moments=False)
    gammas = piad.sensitivity(2.0, [3.0, 1.0, 2.5, 2.0, 2.0, 4.0])
    assert gammas == [0.5, 0.0, 0.25, 0.0, 0.0, 1.0]
    importance = piad.unit_importance(gammas, statistics, widths, GROUPS, shapes.unit_costs(PAPER))
    assert [len(units) for units in importance] == [4, 16, 8, 32, 0, 32]
    assert sum(importance[0]) * 2 * shapes.unit_costs(PAPER)[0] == pytest.approx(0.5)
    assert sum(importance[1]) == 0
    taylor = statistics[2].taylor_mlp
    expected = taylor[6:12].sum() / taylor.sum() / (6 * shapes.unit_costs(PAPER)[5])
    assert importance[5][1] == pytest.approx(expected.item())


def frequencies(weights, draws=5000):
    return torch.bincount(
        torch.tensor([piad.draw_step(weights, 3, step) for step in range(draws)]), minlength=len(weights)
    )


def test_the_sampler_is_uniform_and_reaches_both_ends():
    counts = frequencies(piad.step_weights("uniform", [9.0, 8.0, 4.0, 3.0, 1.0]))
    assert len(counts) == 5
    # Five standard deviations of a binomial with p = 1/5.
    assert ((counts - 1000).abs() < 5 * (5000 * 0.2 * 0.8) ** 0.5).all()
    one = piad.step_weights("uniform", [9.0])
    assert {piad.draw_step(one, 0, step) for step in range(10)} == {0}


def test_draws_are_keyed_by_seed_step_and_stream():
    weights = piad.step_weights("uniform", [1.0] * 1000)
    assert piad.draw_step(weights, 3, 77) == piad.draw_step(weights, 3, 77)
    draws = {piad.draw_step(weights, 3, 77, *stream) for stream in ((0,), (1,), (2,), (3,))}
    assert len(draws) == 4, "ranks that draw for themselves draw the same"


def test_weights_of_the_steps():
    macs = [10.0, 9.0, 5.0, 4.0]
    assert piad.step_weights("macs", macs).tolist() == [0.5, 2.5, 2.5, 0.5]
    ends = piad.step_weights("ends", macs)
    assert (ends / ends.sum()).tolist() == [0.375, 0.125, 0.125, 0.375]
    for sampling in ("uniform", "macs", "ends"):
        assert (piad.step_weights(sampling, [10.0]) > 0).all()


def test_the_mean_drawn_by_macs_is_the_middle_of_the_range():
    """However unevenly the steps lie: 40 of them close to the full network, two far below."""
    macs = [100.0 - 0.1 * step for step in range(40)] + [50.0, 0.0]
    weights = piad.step_weights("macs", macs)
    mean = sum(m * w for m, w in zip(macs, weights.tolist(), strict=True)) / weights.sum().item()
    assert mean == pytest.approx(50, abs=0.5)


def test_full_widths_of_the_tiny_vit():
    assert full_widths(tiny_supernet()) == FULL
