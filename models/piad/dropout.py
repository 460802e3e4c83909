"""The dropout list of PIAD: which sub-networks there are, and which of them a training step draws."""

import heapq
import math
from dataclasses import dataclass

import torch

import utils
from models.piad.importance import branch_removal, drop_order, sensitivity, unit_importance
from models.piad.width_table import WidthTable
from models.vit.supernet import set_widths
from models.vit.widths import Widths, branch_names
from models.wpac.statistics import OBJECTIVES, collect_statistics
from utils import InputError, RanksDisagree


def check_reachable(units, cost, target):
    """Raise InputError if even the smallest network that ``units`` allow costs more than ``target``."""
    least, full = cost(units.least), cost(units.full)
    if least > target:
        raise InputError(
            f"the last step is to keep {target / full:.3f} of the MACs; the smallest network that can be cut has "
            f"{least / full:.3f} of them, so the share to drop must be below {1 - least / full:.3f}"
        )


def grow(steps, importance, units, cost, target):
    """Append steps to the dropout list until ``cost`` of the last one is at most ``target`` (paper, PIAD).

    Units go in the order of increasing importance; within a branch in that of ``drop_order``.

    Args:
        steps: list of Widths, extended in place; what it holds already never changes.
        importance: one list for each of the 2L branches: importance per MAC of the units that ``steps[-1]`` keeps.
        cost: function of Widths, in MACs.
    Raises InputError if even the smallest network costs more than the target, or if an importance is not finite, and
    ValueError if the importance is not that of the last step.
    """
    check_reachable(units, cost, target)
    if [len(branch) for branch in importance] != units.counts(steps[-1]):
        raise ValueError(f"importance of {[len(branch) for branch in importance]} units for the widths {steps[-1]}")
    for name, values in zip(branch_names(len(importance) // 2), importance, strict=True):
        if not all(math.isfinite(value) for value in values):
            raise InputError(f"block {name.split('.')[0]}: the importance of a unit is NaN or infinite")
    # The units that may leave, for each branch: [(mean importance, number of units that leave together), ...].
    rows = zip(importance, units.counts(units.least), strict=True)
    queues = [drop_order(values[least:]) for values, least in rows]
    # The heap holds the next group of every branch: (mean importance, index of the branch, position in its queue).
    heap = [(queue[0][0], branch, 0) for branch, queue in enumerate(queues) if queue]
    heapq.heapify(heap)
    while cost(steps[-1]) > target:
        _, branch, at = heapq.heappop(heap)
        flat, count = list(steps[-1].flat), units.counts(steps[-1])[branch]
        flat[branch] = (count - queues[branch][at][1]) * units.sizes[branch]
        steps.append(Widths.from_flat(flat))
        if at + 1 < len(queues[branch]):
            heapq.heappush(heap, (queues[branch][at + 1][0], branch, at + 1))


def steps_by_error(compensation, units, costs, drop_ratio):
    """The complete list of a super-network that is not trained, a list of Widths, by the closed-form error per MAC that
    dropping a unit leaves.

    compensation: 2L Compensation, whose errors are in one currency, the expected square of what the objective loses.
    drop_ratio: share of the full network's MACs that the last step has lost.
    """
    rows = enumerate(zip(compensation, costs.units(), strict=True))
    steps, importance = [units.full], [units.per_cost(known.errors, branch, cost) for branch, (known, cost) in rows]
    grow(steps, importance, units, costs.macs, costs.macs(units.full) * (1 - drop_ratio))
    return steps


def target_cost(full_cost, ratio, epoch, grow_epochs):
    """The progressive target: MACs that the smallest network may have at the start of ``epoch`` (paper, PIAD).

    r (e + 1) / P_e of the total are removed, for r = ``ratio`` and P_e = ``grow_epochs``.
    """
    return full_cost * (1 - ratio * min(epoch + 1, grow_epochs) / grow_epochs)


def step_weights(sampling, macs):
    """How likely each step of the list is drawn, numbers [steps], not normalised. macs: MACs of every step.

    'uniform': every step alike (paper). 'macs': every amount of MACs alike, so a step counts by the gap around it.
    'ends': half of the draws go to the largest and the smallest in equal parts, the others are uniform. 'compute':
    every step gets the same compute, so it counts by 1 / MACs.
    """
    macs = torch.tensor(macs, dtype=torch.float64)
    weights = torch.ones_like(macs)
    if sampling == "macs" and len(macs) > 1:
        weights[1:-1] = (macs[:-2] - macs[2:]) / 2
        weights[0], weights[-1] = (macs[0] - macs[1]) / 2, (macs[-2] - macs[-1]) / 2
    elif sampling == "compute":
        weights = 1 / macs
    elif sampling == "ends":
        weights[0] += len(macs) / 2
        weights[-1] += len(macs) / 2
    return weights


def draw_step(weights, seed, global_step, *stream):
    """The index in the list of the sub-network that a training step trains, drawn by ``weights`` [len(list)].

    Keyed by (seed, global step): every rank draws the same, and so does a run that was stopped and resumed. Further
    integers in ``stream``, such as the rank, give draws of their own.
    """
    return int(torch.multinomial(weights, 1, generator=utils.keyed_generator(seed, global_step, *stream)))


@dataclass(frozen=True)
class Growth:
    """How the list grows: over ``epochs`` epochs, until ``drop_ratio`` of the MACs is gone. measure: a key of
    importance.MEASURES; objective: a key of statistics.OBJECTIVES."""

    epochs: int = 50
    drop_ratio: float = 0.875
    measure: str = "cost"
    objective: str = "label"


class DropoutList:
    """The list of sub-networks that training draws from. It grows by importance (paper, PIAD), or is given complete.

    Args:
        units, costs: Units and Costs of the super-network.
        steps: the complete list, if it is given.
        growth: how the list grows otherwise.
        sampling: a rule of ``step_weights``.
        always: the sizes, of 'largest' and 'smallest', that every training step trains in addition to the drawn one.
        seed, stream: the key of the draw; ranks with a ``stream`` of their own draw for themselves.
        per_batch: every batch of an update draws for itself.
    """

    def __init__(
        self, units, costs, steps=None, growth=None, sampling="uniform", always=(), seed=0, stream=(), per_batch=False
    ):
        self.units, self.costs, self.growth = units, costs, None if steps else growth or Growth()
        self.table = WidthTable(list(steps or [units.full]))
        self.sampling, self.always, self.key, self.per_batch = sampling, always, (seed, stream), per_batch
        self._weights = None

    @property
    def complete(self):
        """Whether the list will grow no further."""
        return self.growth is None or self._cost_of_last() <= self._target(self.growth.epochs)

    @property
    def loses_branches(self):
        """Whether a sub-network of the list lacks a branch, or may lack one when the list has grown."""
        return self.growth is not None or 0 in self.table.steps[-1].flat

    def _cost_of_last(self):
        return self.costs.macs(self.table.steps[-1])

    def _target(self, epoch):
        return target_cost(self.costs.macs(self.units.full), self.growth.drop_ratio, epoch, self.growth.epochs)

    def grow(self, supernet, proxy, epoch):
        """Append what the target of ``epoch`` asks for, by the importance of the units of the present last step.

        proxy: iterable of (images, labels, positions), this rank's share of the proxy set; it is gone through twice,
        without autocast: gradients of single activations are below what fp16 holds, and bf16 ranks less precisely.
        Raises RanksDisagree if the ranks do not arrive at the same list.
        """
        if self.growth is None or self._cost_of_last() <= self._target(epoch):
            return
        growth, last = self.growth, self.table.steps[-1]
        set_widths(supernet, last)
        value, without = branch_removal(supernet, proxy, growth.measure)
        statistics = collect_statistics(supernet, proxy, OBJECTIVES[growth.objective], moments=False)
        sign = -1 if growth.measure == "accuracy" else 1
        gammas = sensitivity(sign * value, [sign * v for v in without])
        importance = unit_importance(gammas, statistics, last, self.units, self.costs.units())
        grow(self.table.steps, importance, self.units, self.costs.macs, self._target(epoch))
        if not utils.all_the_same(self.table.to_json()):
            raise RanksDisagree(
                f"epoch {epoch}: the ranks grew different width tables; their data or weights must differ"
            )

    def draw(self, global_step, batch=0):
        """The sub-networks that a batch of the update ``global_step`` trains: a list of Widths, the largest first."""
        steps, (seed, stream) = self.table.steps, self.key
        stream = (*stream, batch) if self.per_batch and batch else stream
        if self._weights is None or len(self._weights) != len(steps):
            self._weights = step_weights(self.sampling, [self.costs.macs(widths) for widths in steps])
        always = {{"largest": 0, "smallest": self.table.last}[name] for name in self.always}
        return [steps[index] for index in sorted(always | {draw_step(self._weights, seed, global_step, *stream)})]

    def restore(self, table):
        """Go on from the list of a checkpoint, a WidthTable."""
        self.table, self._weights = WidthTable(table.steps), None

    def save(self, path, spec):
        """Write the list as ``mask_table.json`` for the model ``spec``. Returns its text, for the checkpoint."""
        self.table.describe(spec, self.costs)
        self.table.save(path)
        return self.table.to_json()
