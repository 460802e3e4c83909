"""How much of the expected loss the first dimensions of a branch hold, before and after stage 1 has rewritten it."""

import torch

from models.vit.supernet import branches
from models.wpac.bases import at
from models.wpac.rewrite import head_columns


@torch.no_grad()
def densities(supernet, statistics, rewrites):
    """{branch that can be cut: (before, after)} from what was measured before ``reparameterise`` and what that did.

    Both are [rows, width + 1], the share of the expected loss that the first 0, 1, ... width dimensions hold: a row for
    each head's output z, and one for q and k of all heads if they are cut; one for the hidden units. The loss is that
    of plain slices, E|G^(1/2) W[:, k:] x[k:]|^2 for x = z or the hidden vector, E[(g f)^2] for q and k.
    """
    rows = zip(branches(supernet), statistics, rewrites, strict=True)
    return {str(row[0]): tuple(map(_held, _losses(*row))) for row in rows if not row[0].indivisible}


def _losses(branch, sums, rewrite):
    """[rows, width, width] before and after: what sums to the loss. The branch's weights are rewritten already."""
    gram = sums.mean_gram
    if branch.name == "mlp":
        weight, order = branch.output.weight.double(), rewrite.order
        loss = (weight.mT @ gram @ weight) * at(sums.inputs.together.second_moment[0], order, order)
        back = order.argsort()
        return at(loss, back, back)[None], loss[None]
    after, maps = head_columns(branch.output, branch.part.heads), rewrite.maps
    before, moment = after @ maps, maps @ sums.grad_z.about(rewrite.shift) @ maps.mT
    losses = [before.mT @ gram @ before * sums.grad_z.second_moment, after.mT @ gram @ after * moment]
    if branch.part.keys:
        queries = (sums.hessian[0].sum(0), rewrite.lost)
        losses = [torch.cat((loss, lost.diag()[None])) for loss, lost in zip(losses, queries, strict=True)]
    return losses


def _held(loss):
    lost = loss.flip(1, 2).cumsum(1).cumsum(2).diagonal(dim1=1, dim2=2).flip(1)
    lost = torch.cat((lost, torch.zeros_like(lost[:, :1])), dim=1)
    return 1 - lost / lost[:, :1].clamp(min=torch.finfo(lost.dtype).tiny)
