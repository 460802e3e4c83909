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

    maps: [H, d, d]; shift: [H, d]; output_mean: [D], mean output of the attention before LayerScale. lost: [d], what
    the objective is expected to lose by q and k when a dimension of all heads goes, beside what proj loses; of
    indivisible attention all that is lost, of which only the sum is of use.
    """

    maps: torch.Tensor
    shift: torch.Tensor
    output_mean: torch.Tensor
    lost: torch.Tensor


@dataclass
class MlpRewrite:
    """order: [M], the permutation in which the hidden units now stand."""

    order: torch.Tensor


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
    if untouched:
        return MlpRewrite(torch.arange(branch.full, device=sums.taylor.device))
    if order_by == "greedy" and not branch.part.can(Transform.COMPENSATION):
        order_by = "taylor"
    order = hidden_order(branch.output, sums, order_by)
    for layer, module in branch.layers:
        _permute(module, layer, order)
    return MlpRewrite(order)


def hidden_order(output, sums, order_by):
    """The permutation [M] of an MLP's hidden units, most important first. output: its last Linear."""
    if order_by == "greedy":
        covariance, weight = sums.hidden.about(sums.hidden.weighted_mean)[0], output.weight.detach().double()
        return bases.greedy_order(covariance, weight, sums.mean_gram, sums.taylor)
    importance = {"taylor": sums.taylor, "hessian": sums.hessian}[order_by]
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
    proj, mean_z = branch.output, sums.grad_z.mean
    columns = rearrange(proj.weight.detach().double(), "c (h d) -> h c d", h=branch.part.heads)
    mean = torch.einsum("hcd,hd->c", columns, mean_z)
    mean = mean if proj.bias is None else mean + proj.bias.detach().double()
    identity = torch.eye(branch.full).to(mean_z).expand(len(mean_z), -1, -1)
    rewrite = AttentionRewrite(identity, torch.zeros_like(mean_z), mean, torch.zeros_like(mean_z[0]))
    if branch.indivisible:
        # With all dimensions of a head their correlations are lost too.
        rewrite.lost = (columns.mT @ sums.mean_gram @ columns * sums.grad_z.covariance).sum((0, 1))
        return rewrite
    if untouched:
        rewrite.lost = _lost_with_queries(sums) if branch.part.keys else rewrite.lost
        return rewrite
    weights = HeadWeights(branch)
    solve = {"balanced": _rewrite_balanced, "pca": _rewrite_pca}[basis]
    rewrite.maps, rewrite.shift, *turn = solve(weights, sums)
    weights.write()
    if branch.part.keys:
        rewrite.lost = _lost_with_queries(sums, *turn)
        if not weights.can_turn_keys:
            rewrite.lost = rewrite.lost[_permute_queries_and_keys(branch, sums)]
    return rewrite


def _lost_with_queries(sums, turn=None):
    """What the objective is expected to lose with each dimension of q and k, summed over heads, [d].

    turn: the map of q, [H, d, d], if it is turned. Dropping a dimension of q changes the objective by -g f, to first
    order, and dropping it of k changes it no further. E[(g f)^2] is measured in the old basis; in the new one it is
    taken for E[g^2] E[f^2].
    """
    if turn is None:
        return sums.hessian[0].sum(0) / sums.tokens
    inverse = torch.linalg.inv(turn)
    features = turn @ sums.grad_q.second_moment @ turn.mT
    gradients = inverse.mT @ (sums.gram_q.dense() / sums.tokens) @ inverse
    return (features * gradients).diagonal(dim1=-2, dim2=-1).sum(0)


class HeadWeights:
    """Float64 copies of one attention module's weights by head, with zeros for biases that it does not have.

    q, k, v: [H, d, D]; q_bias, k_bias, v_bias: [H, d]; proj: [H, D, d]; proj_bias: [D].
    """

    def __init__(self, branch):
        self.attn, self.heads = branch.module, branch.part.heads
        self.can_fold = branch.part.can(Transform.MEAN_FOLDING)
        self.can_turn_keys = branch.part.can(Transform.QK_BASIS)
        proj, self.parameters = self.attn.proj, _parameters_of(self.attn, branch.part.inputs)
        for name in "qkv":
            weight, bias = self.parameters[name], self.parameters.get(f"{name}_bias")
            setattr(self, name, rearrange(weight.double(), "(h d) c -> h d c", h=self.heads))
            zeros = torch.zeros_like(getattr(self, name)[..., 0])
            setattr(self, f"{name}_bias", zeros if bias is None else bias.double().view_as(zeros))
        self.proj = rearrange(proj.weight.detach().double(), "c (h d) -> h c d", h=self.heads)
        self.proj_bias = torch.zeros_like(self.proj[0, :, 0]) if proj.bias is None else proj.bias.detach().double()

    @torch.no_grad()
    def write(self):
        """Copy back, in the module's own dtype."""
        proj = self.attn.proj
        for name, parameter in self.parameters.items():
            parameter.copy_(getattr(self, name).flatten(0, 1))
        proj.weight.copy_(rearrange(self.proj, "h c d -> c (h d)"))
        if proj.bias is not None:
            proj.bias.copy_(self.proj_bias)

    def map(self, name, matrix):
        """q, k or v <- matrix @ it, weights and bias; matrix: [H, d, d]."""
        setattr(self, name, matrix @ getattr(self, name))
        setattr(self, f"{name}_bias", (matrix @ getattr(self, f"{name}_bias").unsqueeze(-1)).squeeze(-1))

    def scale(self, name, factor):
        """q, k or v <- factor * it, weights and bias; factor: [H, d]."""
        setattr(self, name, getattr(self, name) * factor.unsqueeze(-1))
        setattr(self, f"{name}_bias", getattr(self, f"{name}_bias") * factor)

    def rows(self, name):
        """Weights and bias of q, k or v side by side, [H, d, D + 1]."""
        return torch.cat((getattr(self, name), getattr(self, f"{name}_bias").unsqueeze(-1)), dim=-1)


def _parameters_of(attn, inputs):
    """{'q', 'k', 'v': weight [H d, D], 'q_bias', ...: bias [H d], if there is one}, views of an attention's parameters.
    inputs: of AttentionPart."""
    layers, found = [getattr(attn, name) for name in inputs], {}
    for index, name in enumerate("qkv"):
        layer, separate = layers[index % len(layers)], getattr(attn, f"{name}_bias", None)
        for key, rows in ((name, layer.weight), (f"{name}_bias", layer.bias)):
            if rows is not None:
                found[key] = rows.detach().chunk(3 // len(layers))[index // len(layers)]
        if separate is not None:
            found[f"{name}_bias"] = separate.detach()
    return found


def _rewrite_pca(weights, sums):
    """The paper's basis (WPAC): orthogonal, one for v and o, one shared by q and k.

    Returns maps and shift of z, and the map of q if it is turned.

    W_v <- U^T W_v, b_v <- U^T b_v, W_o <- W_o U, and the same for q and k with the basis of Sigma_q + Sigma_k.
    """
    basis_v = bases.pca_basis(sums.theta_v.covariance)
    weights.map("v", basis_v.mT)
    weights.proj = weights.proj @ basis_v
    turned = basis_v.mT, torch.zeros_like(sums.grad_z.mean)
    if not weights.can_turn_keys:
        return turned
    # covariance is divided by sum theta, of which the sum of both must have none.
    basis_qk = bases.pca_basis(sum(m.covariance * m.s0[:, None, None] for m in (sums.theta_q, sums.theta_k)))
    weights.map("q", basis_qk.mT)
    weights.map("k", basis_qk.mT)
    return *turned, basis_qk.mT


def _rewrite_balanced(weights, sums):
    """Our basis: mean folding, output-aware V/O basis, balanced Q/K basis. Returns what ``_rewrite_pca`` does."""
    mean_z = sums.grad_z.mean
    if weights.can_fold:
        _fold_means(weights, sums)
    # A mean that cannot be folded, for want of a bias, is lost with the dimensions that carry it: it counts as signal.
    covariance_z = sums.grad_z.covariance if weights.can_fold else sums.grad_z.second_moment
    to, back = bases.output_basis(covariance_z, sums.mean_gram, weights.proj)
    weights.map("v", to)
    weights.proj = weights.proj @ back
    scale = bases.equalising_scale(weights.rows("v"), weights.proj.mT)
    weights.scale("v", scale)
    weights.proj = weights.proj / scale.unsqueeze(1)
    turned = scale.unsqueeze(-1) * to, mean_z if weights.can_fold else torch.zeros_like(mean_z)
    return (*turned, _balance_queries_and_keys(weights, sums)) if weights.can_turn_keys else turned


def _fold_means(weights, sums):
    """Subtract the means of z and k where that changes nothing.

    Attention rows sum to one: a constant of v passes straight through to proj's bias. A constant of every key shifts
    all logits of a query alike, which the softmax ignores.
    """
    mean_z = sums.grad_z.mean
    weights.proj_bias = weights.proj_bias + torch.einsum("hcd,hd->c", weights.proj, mean_z)
    weights.v_bias = weights.v_bias - mean_z
    if weights.can_turn_keys:
        weights.k_bias = weights.k_bias - sums.theta_k.mean


def _balance_queries_and_keys(weights, sums):
    """Returns the map of q, [H, d, d]."""
    map_q, map_k = bases.query_key_basis(sums.grad_q.second_moment, sums.grad_k.second_moment)
    weights.map("q", map_q)
    weights.map("k", map_k)
    scale = bases.equalising_scale(weights.rows("q"), weights.rows("k"))
    weights.scale("q", scale)
    weights.scale("k", 1 / scale)
    return scale.unsqueeze(-1) * map_q


def _permute_queries_and_keys(branch, sums):
    """Where q and k pass a norm: sort their dimensions by what they carry, alike in all heads, which share the norm.

    Returns the order, [d].
    """
    order = sums.taylor[:2].sum((0, 1)).argsort(descending=True, stable=True)
    for layer, module in branch.layers:
        if layer.name == "qkv":
            _permute(module, layer, order, slice(0, 2 * branch.part.heads))
        elif layer.side == "norm":
            _permute(module, layer, order)
    return order
