"""Stage 1 rewrites the weights: WPAC, weighted PCA for attention contraction, and what goes past it.

Every rewrite preserves the network's function at full width. The solvers are in ``bases.py``.
"""

from dataclasses import dataclass

import torch
from einops import rearrange

from models.vit.families import Transform
from models.vit.supernet import branches
from models.wpac import bases


@dataclass
class AttentionRewrite:
    """What became of z, the output of the heads before proj: each head's is now maps (z - shift).

    maps: [H, d, d]; shift: [H, d]. lost: [d], the expected loss of the objective when q and k lose this dimension in
    all heads; the loss at proj is not in it.
    """

    maps: torch.Tensor
    shift: torch.Tensor
    lost: torch.Tensor


@dataclass
class MlpRewrite:
    """order: [M], the permutation in which the hidden units now stand. shrinkage: of their correlations, if known."""

    order: torch.Tensor
    shrinkage: float | None


def reparameterise(supernet, statistics, basis="balanced", mlp_order="taylor", untouched=()):
    """Rewrite the weights of a super-network, in place, so that every prefix keeps as much as possible.

    What is not exact for a kind of attention or MLP is left out (``families``).

    Args:
        statistics: from ``collect_statistics`` with moments, at full width.
        basis: 'pca' (paper) or 'balanced' (mean folding, output-aware V/O basis, balanced Q/K basis).
        mlp_order: order of the hidden units: by 'taylor' (mean |g a|), 'hessian' (mean (g a)^2), or 'greedy', by what
            compensation cannot predict from the units before. 'greedy' needs hidden moments, and is 'taylor' for an MLP
            that cannot be compensated.
        untouched: the branches, by their index in Widths.flat, whose weights stay as they are.
    Returns 2L AttentionRewrite and MlpRewrite, in the order of Widths.flat.
    """
    rewrites = []
    for index, (branch, sums) in enumerate(zip(branches(supernet), statistics, strict=True)):
        if branch.name == "attn":
            rewrites.append(_rewrite_attention(branch, sums, basis, index in untouched))
        else:
            rewrites.append(_rewrite_mlp(branch, sums, mlp_order, index in untouched))
    return rewrites


def _rewrite_mlp(branch, sums, order_by, untouched):
    shrinkage = hidden_shrinkage(branch, sums) if sums.inputs else None
    if untouched:
        return MlpRewrite(torch.arange(branch.full, device=sums.taylor.device), shrinkage)
    order = hidden_order(branch, sums, order_by, shrinkage)
    for layer, module in branch.layers:
        _permute(module, layer, order)
    return MlpRewrite(order, shrinkage)


def hidden_shrinkage(branch, sums):
    """By how much to shrink the correlations of an MLP's hidden units, chosen with them in the order of ``taylor``."""
    order = sums.taylor.argsort(descending=True, stable=True)
    halves = [centred(half) for half in sums.inputs.apart]
    return bases.choose_shrinkage(halves, branch.output.weight.detach().double(), sums.mean_gram, order)


def centred(moments):
    """(weighted mean [n], covariance about it [n, n]) of one group."""
    mean = moments.weighted_mean
    return mean[0], moments.about(mean)[0]


def hidden_order(branch, sums, order_by, shrinkage):
    """The permutation [M] of an MLP's hidden units, most important first. order_by: as in ``reparameterise``."""
    if order_by == "greedy" and branch.part.can(Transform.COMPENSATION):
        covariance = bases.shrunk(centred(sums.inputs.together)[1], shrinkage)
        return bases.greedy_order(covariance, branch.output.weight.detach().double(), sums.mean_gram, sums.taylor)
    importance = sums.hessian if order_by == "hessian" else sums.taylor
    return importance.argsort(descending=True, stable=True)


@torch.no_grad()
def _permute(module, layer, order, groups=slice(None)):
    """Sort the entries of each of some groups of ``layer`` (of families), in place; order: [width]."""
    for name, parameter in module.named_parameters(recurse=False):
        if layer.side == "in" and name == "weight":
            grouped = parameter.unflatten(1, (layer.groups, -1))
            grouped[:, groups] = grouped[:, groups][..., order]
        elif layer.side != "in":
            grouped = parameter.unflatten(0, (layer.groups, -1))
            grouped[groups] = grouped[groups][:, order]


def _rewrite_attention(branch, sums, basis, untouched):
    mean_z, map_q = sums.grad_z.mean, None
    identity = torch.eye(branch.full).to(mean_z).expand(len(mean_z), -1, -1)
    rewrite = AttentionRewrite(identity, torch.zeros_like(mean_z), torch.zeros_like(mean_z[0]))
    if not (untouched or branch.indivisible):
        weights = HeadWeights(branch)
        solve = {"balanced": _rewrite_balanced, "pca": _rewrite_pca}[basis]
        rewrite.maps, rewrite.shift, map_q = solve(weights, sums)
        weights.write()
    if branch.part.keys:
        rewrite.lost = _lost_with_queries(sums, map_q)
        if map_q is None and not untouched:
            rewrite.lost = rewrite.lost[_permute_queries_and_keys(branch, sums)]
    return rewrite


def head_columns(proj, heads):
    """W_o by head, [H, D, d], float64."""
    return rearrange(proj.weight.detach().double(), "c (h d) -> h c d", h=heads)


def _lost_with_queries(sums, map_q):
    """The expected loss of the objective for each dimension of q and k, summed over heads, [d].

    map_q: the map of q, [H, d, d], if there is one. Dropping a dimension of q changes the objective by -g f, to first
    order, and dropping it of k changes it no further. E[(g f)^2] is measured in the old basis; in the new one it is
    taken for E[g^2] E[f^2].
    """
    if map_q is None:
        return sums.hessian[0].sum(0) / sums.images
    inverse = torch.linalg.inv(map_q)
    features = map_q @ sums.grad_q.second_moment @ map_q.mT
    gradients = inverse.mT @ (sums.gram_q.dense() / sums.images) @ inverse
    return (features * gradients).diagonal(dim1=-2, dim2=-1).sum(0)


class HeadWeights:
    """Float64 copies of one attention module's weights by head, with zeros for biases that it does not have.

    q, k, v: [H, d, D + 1], the bias in the last column, so that a map of q, k or v is one product; proj: [H, D, d];
    proj_bias: [D].
    """

    def __init__(self, branch):
        self.proj_layer, heads = branch.output, branch.part.heads
        self.can_fold = branch.part.can(Transform.MEAN_FOLDING)
        self.can_map_keys = branch.part.can(Transform.QK_BASIS)
        self.parameters = _query_key_value(branch.module, branch.part.inputs)
        for name, (weight, bias) in self.parameters.items():
            bias = torch.zeros_like(weight[:, 0]) if bias is None else bias
            rows = torch.cat((weight, bias[:, None]), 1).double()
            setattr(self, name, rearrange(rows, "(h d) c -> h d c", h=heads))
        self.proj = head_columns(self.proj_layer, heads)
        bias = self.proj_layer.bias
        self.proj_bias = torch.zeros_like(self.proj[0, :, 0]) if bias is None else bias.detach().double()

    @torch.no_grad()
    def write(self):
        """Copy back, in the module's own dtype."""
        for name, (weight, bias) in self.parameters.items():
            rows = getattr(self, name).flatten(0, 1)
            weight.copy_(rows[:, :-1])
            if bias is not None:
                bias.copy_(rows[:, -1])
        self.proj_layer.weight.copy_(rearrange(self.proj, "h c d -> c (h d)"))
        if self.proj_layer.bias is not None:
            self.proj_layer.bias.copy_(self.proj_bias)


def _query_key_value(attention, inputs):
    """{'q', 'k', 'v': (weight [H d, D], bias [H d] or None)}, views of the parameters. inputs: of AttentionPart."""
    parts, weights, biases = 3 // len(inputs), [], []
    for layer in (getattr(attention, name) for name in inputs):
        weights += layer.weight.detach().chunk(parts)
        biases += [None] * parts if layer.bias is None else layer.bias.detach().chunk(parts)
    apart = [getattr(attention, f"{name}_bias", None) for name in "qkv"]  # some classes keep biases beside the layer
    biases = [bias if own is None else own.detach() for bias, own in zip(biases, apart, strict=True)]
    return dict(zip("qkv", zip(weights, biases, strict=True), strict=True))


def _rewrite_pca(weights, sums):
    """The paper's basis (WPAC): orthogonal, one for v and o, one shared by q and k.

    W_v <- U^T W_v, b_v <- U^T b_v, W_o <- W_o U, and the same for q and k with the basis of Sigma_q + Sigma_k.
    Returns maps and shift of z, and the map of q, [H, d, d], or None if q and k stay.
    """
    basis_v = bases.pca_basis(sums.theta_v.covariance)
    weights.v, weights.proj = basis_v.mT @ weights.v, weights.proj @ basis_v
    map_q = None
    if weights.can_map_keys:
        # covariance is divided by sum theta, of which the sum of both must have none.
        map_q = bases.pca_basis(sum(m.covariance * m.s0[:, None, None] for m in (sums.theta_q, sums.theta_k))).mT
        weights.q, weights.k = map_q @ weights.q, map_q @ weights.k
    return basis_v.mT, torch.zeros_like(sums.grad_z.mean), map_q


def _rewrite_balanced(weights, sums):
    """Our basis: mean folding, output-aware V/O basis, balanced Q/K basis. Returns what ``_rewrite_pca`` does."""
    shift, map_q = torch.zeros_like(sums.grad_z.mean), None
    # A mean that cannot be folded, for want of a bias, is lost with the dimensions that carry it: it counts as signal.
    moment_z = sums.grad_z.second_moment
    if weights.can_fold:
        shift, moment_z = sums.grad_z.mean, sums.grad_z.covariance
        _fold_means(weights, sums)
    map_v, map_o = bases.output_basis(moment_z, sums.mean_gram, weights.proj)
    v, proj = map_v @ weights.v, weights.proj @ map_o
    scale_v = bases.equalising_scale(v, proj.mT).unsqueeze(-1)
    weights.v, weights.proj = scale_v * v, proj / scale_v.mT
    if weights.can_map_keys:
        map_q, map_k = bases.query_key_basis(sums.grad_q.second_moment, sums.grad_k.second_moment)
        q, k = map_q @ weights.q, map_k @ weights.k
        scale_q = bases.equalising_scale(q, k).unsqueeze(-1)
        weights.q, weights.k, map_q = scale_q * q, k / scale_q, scale_q * map_q
    return scale_v * map_v, shift, map_q


def _fold_means(weights, sums):
    """Subtract the means of z and k where that changes nothing.

    Attention rows sum to one: a constant of v passes straight through to proj's bias. A constant of every key shifts
    all logits of a query alike, which the softmax ignores.
    """
    mean_z = sums.grad_z.mean
    weights.proj_bias = weights.proj_bias + torch.einsum("hcd,hd->c", weights.proj, mean_z)
    weights.v[..., -1] -= mean_z
    if weights.can_map_keys:
        weights.k[..., -1] -= sums.theta_k.mean


def _permute_queries_and_keys(branch, sums):
    """Where q and k pass a norm: sort their dimensions by what they carry, alike in all heads, which share the norm.
    Returns the order, [d]."""
    order = sums.taylor[:2].sum((0, 1)).argsort(descending=True, stable=True)
    for layer, module in branch.layers:
        if layer.name == "qkv":
            _permute(module, layer, order, slice(0, 2 * branch.part.heads))
        elif layer.side == "norm":
            _permute(module, layer, order)
    return order
