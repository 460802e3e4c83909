"""How much of the expected loss the first dimensions of a branch hold, before and after stage 1 has rewritten it."""

from dataclasses import dataclass

import torch
from einops import rearrange

from models.vit.supernet import branches


@dataclass(frozen=True)
class Density:
    """before, after: [rows, width + 1], the share of the expected loss that the first 0, 1, ... width dimensions hold.

    rows: one for each head's output z, and one for q and k of all heads if they are cut; one for the hidden units.
    """

    branch: str
    before: torch.Tensor
    after: torch.Tensor


@torch.no_grad()
def densities(supernet, statistics, rewrites):
    """The Density of every branch that can be cut, from what was measured before ``reparameterise`` and what it did.

    The loss is that of plain slices: E|G^(1/2) W[:, k:] x[k:]|^2 for z and for the hidden vector x, E[(g f)^2] for q
    and k.
    """
    rows = zip(branches(supernet), statistics, rewrites, strict=True)
    return [Density(str(row[0]), *_of(*row)) for row in rows if not row[0].indivisible]


def _of(branch, sums, rewrite):
    """(before, after) of one branch, whose weights are rewritten already."""
    weight, gram = branch.output.weight.double(), sums.mean_gram
    if branch.name == "mlp":
        moment, back = sums.hidden.second_moment[0], rewrite.order.argsort()
        loss = (weight.mT @ gram @ weight)[back][:, back] * moment
        return _held(loss[None]), _held(loss[None, rewrite.order][:, :, rewrite.order])
    after, maps = rearrange(weight, "c (h d) -> h c d", h=branch.part.heads), rewrite.maps
    before, moment = after @ maps, maps @ sums.grad_z.about(rewrite.shift) @ maps.mT
    held = [_held(before.mT @ gram @ before * sums.grad_z.second_moment), _held(after.mT @ gram @ after * moment)]
    if branch.part.keys:
        queries = (sums.hessian[0].sum(0), rewrite.lost)
        held = [torch.cat((rows, _held(lost.diag()[None]))) for rows, lost in zip(held, queries, strict=True)]
    return held


def _held(loss):
    """[rows, d + 1] of [rows, d, d], whose entries sum to what is lost with all dimensions."""
    lost = loss.flip(1, 2).cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2).flip(1)
    lost = torch.cat((lost, torch.zeros_like(lost[:, :1])), dim=1)
    return 1 - lost / lost[:, :1].clamp(min=torch.finfo(lost.dtype).tiny)
