"""The units of a super-network, and what each is worth by PIAD's importance, measured.

A unit is the smallest thing that can be dropped: 1/8 of the head width (in all heads of a block together) or 1/32 of
the hidden width; or all of an indivisible branch. Paper, PIAD.
"""

import math
from dataclasses import dataclass

import torch
from torch.nn import functional as F

import utils
from models.vit.supernet import Replay, block_inputs, branches, frozen, swapped
from models.vit.widths import Widths, branch_names
from utils import InputError

ATTN_UNITS, MLP_UNITS = 8, 32


@dataclass(frozen=True)
class Units:
    """The droppable units of a network of full Widths ``full``.

    sizes: [2L], dimensions per head, or hidden units, of one unit of each branch. The last unit of a branch, the first
    to go, is smaller if the size does not divide the width. least: the Widths below which nothing goes.
    """

    full: Widths
    sizes: tuple[int, ...]
    least: Widths

    @classmethod
    def of(cls, full, indivisible=None, least=None, multiple_of=None):
        """The units of a network.

        indivisible: [2L], the branches that are one unit (default: none). least: Widths to keep everywhere (default:
        none), rounded up to units. multiple_of: the size of an MLP's unit is a multiple of it, that of a head's unit a
        multiple of 8. Raises InputError if a full width is not positive.
        """
        if not full.flat or min(full.flat) < 1:
            raise InputError(f"the widths {list(full.flat)} of the full network must all be positive")
        counts = (ATTN_UNITS, MLP_UNITS) * len(full.attn)
        grains = (8, multiple_of) * len(full.attn) if multiple_of else (1,) * len(full.flat)
        indivisible = indivisible or [False] * len(full.flat)
        rows = zip(full.flat, counts, grains, indivisible, strict=True)
        sizes = [width if one else _unit_size(width, count, grain) for width, count, grain, one in rows]
        wanted = least.flat if least else [0] * len(sizes)
        rows = zip(wanted, sizes, full.flat, strict=True)
        return cls(full, tuple(sizes), Widths.from_flat([min(math.ceil(w / s) * s, most) for w, s, most in rows]))

    def counts(self, widths):
        """[2L]: the units that ``widths`` keeps. Raises InputError if it keeps part of one, as the table of another
        tool may."""
        rows = zip(branch_names(len(widths.attn)), widths.flat, self.sizes, self.full.flat, strict=True)
        for name, width, size, full in rows:
            if width % size and width != full:
                raise InputError(
                    f"the width {width} of '{name}' is not a multiple of {size}, the dimensions that are dropped "
                    "together"
                )
        return [math.ceil(width / size) for width, size in zip(widths.flat, self.sizes, strict=True)]

    def per_cost(self, values, branch, cost):
        """The sum of ``values`` [width] in each unit of a branch, divided by the unit's cost: a list, first unit first.

        cost: MACs of one dimension of all heads, or of one hidden unit.
        """
        if not len(values):
            return []
        units = values.split(self.sizes[branch])
        sizes = torch.tensor([len(unit) for unit in units]).to(values)
        return (torch.stack([unit.sum() for unit in units]) / (sizes * cost)).tolist()


def _unit_size(width, count, grain):
    """The size of ``count`` equal units; if they do not divide ``width``, a larger one that hardware likes. It is a
    multiple of ``grain``, and at most ``width``."""
    size = math.ceil(width / count)
    size = size if width % count == 0 or size < 8 else math.ceil(size / 8) * 8
    return min(math.ceil(size / grain) * grain, width)


# What the sensitivity of a branch is measured in, summed over a batch of logits and labels.
MEASURES = {
    "cost": lambda logits, labels: F.cross_entropy(logits.double(), labels, reduction="sum"),
    "accuracy": lambda logits, labels: (logits.argmax(1) == labels).double().sum(),
}


@torch.inference_mode()
def branch_removal(supernet, batches, measure="cost"):
    """Mean cross-entropy (or accuracy) of a super-network at its present widths, and with each branch removed (paper,
    PIAD). measure: a key of MEASURES.

    Removing a branch leaves everything before its block unchanged, so those activations are computed once per batch:
    about L + 1 forward passes in place of 2L + 1. Returns (value, [2L values without a branch]). Removing what is
    gone already changes nothing.
    """
    own, device = branches(supernet), next(supernet.parameters()).device
    sums, count = torch.zeros(1 + len(own), dtype=torch.float64, device=device), 0
    with frozen(supernet):
        for images, labels, _ in batches:
            images, labels = images.to(device), labels.to(device)
            sums += _branch_removal_of_batch(supernet, own, images, labels, MEASURES[measure])
            count += len(labels)
    count = utils.all_reduce(torch.tensor(float(count), dtype=torch.float64, device=device))
    value, *without = (utils.all_reduce(sums) / count).tolist()
    return value, without


def _branch_removal_of_batch(supernet, own, images, labels, measure):
    """Summed measures, [1 + 2L], of one batch. own: the branches of the super-network."""
    inputs, logits = block_inputs(supernet, images)
    values, paths = [measure(logits, labels)], list(inputs)
    for branch in own:
        width, ((stream, *_), _) = branch.width, inputs[branch.path]
        if not width:
            values.append(values[0])
            continue
        before = {path: Replay() for path in paths[: paths.index(branch.path)]}
        branch.keep(0)
        try:
            with swapped(supernet, before | {branch.path: Replay(stream, branch.block)}):
                values.append(measure(supernet(images), labels))
        finally:
            branch.keep(width)
    return torch.stack(values)


def sensitivity(cost, costs_without):
    """gamma_m = (cost without branch m - cost) / cost, not below 0, for the 2L branches (paper, PIAD).

    By accuracy in place of cost it is the same with both signs turned: (accuracy - accuracy without) / accuracy.
    """
    return [max((without - cost) / max(abs(cost), 1e-12), 0.0) for without in costs_without]


def unit_importance(gammas, statistics, widths, units, costs):
    """The importance of a unit per MAC: I_u = gamma_m * sum of alpha in u / MACs(u) (paper, PIAD).

    Args:
        gammas: [2L], sensitivity of each branch.
        statistics: 2L BranchStatistics measured at ``widths``; alpha is the share of their Taylor sums, for attention
            those of q, k and v and of all heads together.
        widths: the Widths whose units are wanted.
        costs: [2L], MACs of one dimension of all heads, or of one hidden unit.
    Returns 2L lists, first unit first, empty where the branch is gone. Raises InputError as ``Units.counts``.
    """
    units.counts(widths)
    importance = []
    for branch, (gamma, sums, cost) in enumerate(zip(gammas, statistics, costs, strict=True)):
        taylor = sums.taylor_by_width
        alpha = taylor / taylor.sum().clamp(min=torch.finfo(taylor.dtype).tiny)
        importance.append(units.per_cost(gamma * alpha, branch, cost))
    return importance


def drop_order(importance):
    """The order in which one branch gives up its units: tails of least mean importance, again and again (paper, PIAD).

    Of the units still kept the tail [j:] with the smallest mean leaves together, the shortest such tail if several are
    equal; then the same on what is left. So a weak unit in front of a strong one leaves together with it. This is
    pool-adjacent-violators read from the tail: each pool leaves at once.

    importance: list of n numbers, first unit first. Returns [(mean, number of units), ...], means ascending.
    """
    pools = []  # (total, size), from the front of the branch to its tail: means strictly fall
    for value in importance:
        total, size = value, 1
        # A pool that is worth less than what stands behind it leaves together with it. The sums are compared
        # crosswise, so that equal means stay equal.
        while pools and pools[-1][0] * size < total * pools[-1][1]:
            previous_total, previous_size = pools.pop()
            total, size = total + previous_total, size + previous_size
        pools.append((total, size))
    return [(total / size, size) for total, size in reversed(pools)]
