"""PIAD, progressive importance-aware dropout: what each unit is worth, and the list of what goes first.

A unit is the smallest thing that can be dropped: 1/8 of the head width (in all heads of a block together) or 1/32
of the hidden width; or a whole branch, where nothing less can go. Paper, section on PIAD.
"""

import heapq
import math
from dataclasses import dataclass

import torch

from models.width_table import Widths, branch_names
from utils import InputError, keyed_generator

ATTN_GROUPS, MLP_GROUPS = 8, 32


@dataclass(frozen=True)
class Groups:
    """The droppable units of a network of full Widths ``full``.

    sizes: dimensions per head, or hidden units, of one unit of each of the 2L branches. The last unit of a branch, the
    first to go, is smaller where the size does not divide the width. least: the Widths below which nothing goes.
    """

    full: Widths
    sizes: tuple[int, ...]
    least: Widths

    @classmethod
    def of(cls, full, whole=None, least=None):
        """The groups of a network of full Widths ``full``.

        whole: for each of the 2L branches whether it goes as one unit (none does). least: Widths to keep everywhere
        (none are); they are rounded up to a whole unit. Raises InputError if a full width is not positive.
        """
        if not full.flat or min(full.flat) < 1:
            raise InputError(f"the widths {list(full.flat)} of the full network must all be positive")
        whole = whole or [False] * len(full.flat)
        units = (ATTN_GROUPS, MLP_GROUPS)
        sizes = [
            w if one else _unit_size(w, units[b % 2]) for b, (w, one) in enumerate(zip(full.flat, whole, strict=True))
        ]
        floor = least.flat if least else [0] * len(sizes)
        floor = [min(math.ceil(f / size) * size, w) for f, size, w in zip(floor, sizes, full.flat, strict=True)]
        return cls(full, tuple(sizes), Widths.from_flat(floor))

    def counts(self, widths):
        """The units that ``widths`` keeps of each of the 2L branches. Raises InputError if it keeps part of one, as
        the table of another tool may."""
        for branch, (width, size, full) in enumerate(zip(widths.flat, self.sizes, self.full.flat, strict=True)):
            if width % size and width != full:
                raise InputError(
                    f"the width {width} of '{branch_names(len(widths.attn))[branch]}' is not a multiple of "
                    f"{size}, the dimensions that are dropped together"
                )
        return [math.ceil(width / size) for width, size in zip(widths.flat, self.sizes, strict=True)]

    def shares(self, branch, values):
        """Sums of ``values`` [width] over each unit of a branch, [units]."""
        return torch.stack([unit.sum() for unit in values.split(self.sizes[branch])]) if len(values) else values


def _unit_size(width, units):
    """The size of ``units`` equal units; where they do not divide ``width``, a larger one that hardware likes."""
    size = math.ceil(width / units)
    return size if width % units == 0 or size < 8 else math.ceil(size / 8) * 8


def sensitivity(cost, costs_without):
    """gamma_m = (cost without branch m - cost) / cost, not below 0, for the 2L branches in Widths.flat order.

    By accuracy in place of cost the same with both signs turned: gamma_m = (accuracy - accuracy without) / accuracy.
    """
    return [max((without - cost) / max(abs(cost), 1e-12), 0.0) for without in costs_without]


def unit_importance(gammas, statistics, widths, groups, unit_costs):
    """Importance per cost of the units that ``widths`` still keeps: I_u = gamma_m * sum of alpha in u / cost(u).

    Args:
        gammas: 2L module sensitivities, order of Widths.flat.
        statistics: L BlockStatistics measured at ``widths``; alpha is the share of their Taylor sums.
        unit_costs: what one dimension of all heads or one hidden unit of each branch costs, [2L]: MACs, or seconds.
    Returns 2L lists, first unit first; empty where the branch is gone. Raises InputError as ``Groups.counts``.
    """
    importance = []
    groups.counts(widths)
    for branch, gamma in enumerate(gammas):
        sums = statistics[branch // 2]
        taylor = sums.taylor_attn.sum((0, 1)) if branch % 2 == 0 else sums.taylor_mlp
        alpha = taylor / taylor.sum().clamp(min=torch.finfo(taylor.dtype).tiny)
        importance.append(_per_cost(gamma * alpha, branch, groups, unit_costs))
    return importance


def _per_cost(values, branch, groups, unit_costs):
    """The importance per cost of each unit of a branch, from that of its dimensions: a list, first unit first."""
    sizes = groups.shares(branch, torch.ones_like(values))
    return (groups.shares(branch, values) / (sizes * unit_costs[branch])).tolist()


def error_importance(memory, widths, groups, unit_costs):
    """Importance per MAC of all units without any training: the closed-form error that dropping a unit leaves.

    memory: list of L BlockMemory, whose errors of attention dimensions and hidden units are in one currency, the
    expected square of what the objective loses. Returns 2L lists, first unit first.
    """
    importance = []
    for branch, width in enumerate(widths.flat):
        sums = memory[branch // 2]
        errors = sums.attn_error if branch % 2 == 0 else sums.mlp_error
        importance.append(_per_cost(errors[:width], branch, groups, unit_costs))
    return importance


def steps_by_error(memory, groups, shapes, drop_ratio):
    """The complete list of a training-free super-network, grown in one go from ``error_importance``.

    drop_ratio: share of the full network's MACs that the last step has lost. Returns a list of Widths.
    """
    full = groups.full
    steps, importance = [full], error_importance(memory, full, groups, shapes.unit_costs())
    grow(steps, importance, groups, shapes.macs, shapes.macs(full) * (1 - drop_ratio))
    return steps


def drop_order(importance):
    """The order in which one branch gives up its units: tails of least mean importance, again and again.

    ``importance``: list of n numbers, first unit first. Of the units still kept the tail [j:] with the smallest mean
    leaves together, the shortest such tail if several are equal; then the same on what is left. This is
    pool-adjacent-violators read from the tail: each pool leaves whole. Returns [(mean, number of units), ...],
    means ascending.
    """
    pools = []  # from the front of the branch to its tail: means strictly fall
    for value in importance:
        total, size = value, 1
        # A pool that is worth less than what stands behind it leaves together with it. The sums are compared
        # crosswise, so that equal means stay equal.
        while pools and pools[-1][0] * size < total * pools[-1][1]:
            previous_total, previous_size = pools.pop()
            total, size = total + previous_total, size + previous_size
        pools.append((total, size))
    return [(total / size, size) for total, size in reversed(pools)]


def check_reachable(groups, cost, target):
    """Raise InputError if even the smallest network that ``groups`` allow costs more than ``target``."""
    left, full = cost(groups.least), cost(groups.full)
    if left > target:
        raise InputError(
            f"--drop_ratio leaves {target / full:.3f} of the MACs; the smallest network that can be cut has "
            f"{left / full:.3f} of them, so it must be below {1 - left / full:.3f}"
        )


def grow(steps, importance, groups, cost, target):
    """Append steps to the dropout list until ``cost`` of the last one is at most ``target``.

    Args:
        steps: list of Widths, extended in place; what it holds already never changes.
        importance: 2L lists from ``unit_importance`` at ``steps[-1]``.
        cost: function of Widths, in MACs.
    Raises InputError if even the smallest network costs more than the target, or if an importance is not finite;
    ValueError if the importance is not that of the last step.
    """
    check_reachable(groups, cost, target)
    if [len(units) for units in importance] != groups.counts(steps[-1]):
        raise ValueError(f"importance of {[len(units) for units in importance]} units for the widths {steps[-1]}")
    for branch, units in enumerate(importance):
        if not all(math.isfinite(value) for value in units):
            raise InputError(f"block {branch // 2}: the importance of a unit is NaN or infinite")
    kept = groups.counts(groups.least)
    queues = [drop_order(units[least:]) for units, least in zip(importance, kept, strict=True)]
    heap = [(queue[0][0], branch, 0) for branch, queue in enumerate(queues) if queue]
    heapq.heapify(heap)
    while cost(steps[-1]) > target:
        _, branch, at = heapq.heappop(heap)
        flat, units = list(steps[-1].flat), groups.counts(steps[-1])[branch]
        flat[branch] = (units - queues[branch][at][1]) * groups.sizes[branch]
        steps.append(Widths.from_flat(flat))
        if at + 1 < len(queues[branch]):
            heapq.heappush(heap, (queues[branch][at + 1][0], branch, at + 1))


def target_cost(full_cost, ratio, epoch, grow_epochs):
    """MACs that the smallest network may have at the start of ``epoch``: r (e + 1) / P_e of the total are removed."""
    return full_cost * (1 - ratio * min(epoch + 1, grow_epochs) / grow_epochs)


def step_weights(sampling, macs):
    """How likely each step of the dropout list is drawn, given the MACs of every step: numbers [steps], not normalised.

    'uniform': every step alike (paper). 'macs': every amount of MACs alike, so a step counts by the gap around it.
    'ends': half of the draws go to the largest and the smallest in equal parts, the others are uniform.
    """
    macs = torch.tensor(macs, dtype=torch.float64)
    weights = torch.ones_like(macs)
    if sampling == "macs" and len(macs) > 1:
        weights[1:-1] = (macs[:-2] - macs[2:]) / 2
        weights[0], weights[-1] = (macs[0] - macs[1]) / 2, (macs[-2] - macs[-1]) / 2
    elif sampling == "ends":
        weights[0] += len(macs) / 2
        weights[-1] += len(macs) / 2
    return weights


def draw_step(weights, seed, global_step, *stream):
    """The step of the dropout list that a training step trains, drawn by ``weights`` [steps].

    Keyed by (seed, global step): every rank draws the same, and so does a run that was stopped and resumed. Further
    integers in ``stream``, such as the rank, give draws of their own.
    """
    return int(torch.multinomial(weights, 1, generator=keyed_generator(seed, global_step, *stream)))
