"""WPAC, weighted PCA for attention contraction: bases in which the first dimensions hold most of the knowledge.

Solvers are pure functions on float64 tensors, batched over heads; ``reparameterise`` rewrites the weights with them.
Every rewrite preserves the network's function at full width.
"""

import itertools

import torch
from einops import rearrange

from models.compensation import greedy_order, remember
from models.supernet import blocks_of

# Eigenvalues below this share of the largest are raised to it before an inverse root is taken.
EIGENVALUE_FLOOR = 1e-9
# How the joint refinement of the V/O bases weighs narrow against wide prefixes, and its L-BFGS steps per block.
JOINT_BALANCE = 0.5
JOINT_STEPS = 60


# ------------------------------------------------------------------------------------------ solvers


def symmetric_power(matrix, power):
    """matrix^power for symmetric positive semi-definite [..., d, d], eigenvalues clamped from below.

    A matrix that is zero (a dead head) counts as the identity, so that its basis is still invertible.
    """
    values, vectors = torch.linalg.eigh(matrix)
    largest = values[..., -1:]
    values = torch.where(largest > 0, values.clamp(min=EIGENVALUE_FLOOR * largest), torch.ones_like(values))
    return vectors * values.pow(power).unsqueeze(-2) @ vectors.mT


def _fix_signs(columns):
    """Columns [..., d, d] with signs such that the entry of largest magnitude of each is positive."""
    at = columns.abs().argmax(-2, keepdim=True)
    return columns * torch.where(columns.gather(-2, at) < 0, -1.0, 1.0)


def pca_basis(covariance):
    """Eigenvectors of [H, d, d] as columns, in descending order of eigenvalue (paper, section on WPAC)."""
    return _fix_signs(torch.linalg.eigh(covariance).eigenvectors.flip(-1))


def output_basis(covariance_z, output_gram, proj):
    """Maps of v and proj that sort the head's dimensions by what survives in W_o z (docs/stage1.md, 2).

    Args:
        covariance_z: [H, d, d] of the attention output z.
        output_gram: [D, D], E[go go^T] for go the gradient at the output of proj.
        proj: [H, D, d], the columns of W_o of each head.
    Returns (to, back), both [H, d, d] with to @ back = I: z <- to z, W_o <- W_o back.
    """
    root, inverse_root = symmetric_power(covariance_z, 0.5), symmetric_power(covariance_z, -0.5)
    # Right singular vectors of G^(1/2) W_o Sigma_z^(1/2), from its d x d Gram matrix: no root of G is needed.
    v = pca_basis(root @ (proj.mT @ output_gram @ proj) @ root)
    return v.mT @ inverse_root, root @ v


def prefix_errors(change, kept, output_gram, moment_z):
    """Expected squared error at proj's output, all heads together, of keeping the first ``kept`` dimensions of each.

    Args, in coordinates where nothing is changed yet, (h d) for the dimensions of all heads:
        change: [H, d, d] maps of z, whose inverses map the columns of proj.
        kept: list of K widths.
        output_gram: [H d, H d], W_o^T G W_o. moment_z: [H d, H d], the joint second moment of all heads' z.
    Returns [K].
    """
    back, (heads, width, _) = torch.linalg.inv(change), change.shape
    gram = output_gram.view(heads, width, heads, width)
    moment = moment_z.view(heads, width, heads, width)
    errors = []
    for k in kept:
        lost = back[..., k:] @ change[:, k:]
        carried = torch.einsum("hia,higj,gjb->hagb", lost, gram, lost)
        errors.append((carried * moment).sum())
    return torch.stack(errors)


def joint_basis(to, back, proj, output_gram, moment_z):
    """Refine the maps of ``output_basis`` so that what the heads drop cancels where it can (docs/stage1.md, 2).

    Heads share directions of the output, which ``output_basis`` does not see: it treats each head alone. L-BFGS on the
    error of all heads together at 1/16, 1/8, 1/4 and 1/2 of the width, each weighted by its own start to the power
    -JOINT_BALANCE: 0 would serve the smallest width alone, 1 all alike.

    Args: to, back: [H, d, d]; proj: [H, D, d]; output_gram: [D, D]; moment_z: [H d, H d], of z of all heads.
    Returns (to, back), again inverse to each other.
    """
    width = to.shape[-1]
    kept = sorted({width >> shift for shift in (1, 2, 3, 4)} - {0})
    carried = rearrange(proj @ back, "h c d -> c (h d)")
    gram = carried.mT @ output_gram @ carried
    maps = torch.block_diag(*to)
    moment = maps @ moment_z @ maps.mT
    identity = torch.eye(width).to(to)
    change = torch.zeros_like(to).requires_grad_()
    start = prefix_errors(identity + change.detach(), kept, gram, moment)
    if not kept or not (start > 0).all():
        return to, back
    weight = start.pow(-JOINT_BALANCE)
    weight = weight / (weight * start).sum()
    optimiser = torch.optim.LBFGS([change], max_iter=JOINT_STEPS, line_search_fn="strong_wolfe")

    def loss():
        optimiser.zero_grad()
        value = (weight * prefix_errors(identity + change, kept, gram, moment)).sum()
        value.backward()
        return value

    with torch.enable_grad():
        optimiser.step(loss)
    change = identity + change.detach()
    if not (weight * prefix_errors(change, kept, gram, moment)).sum() < 1:
        return to, back
    refined = _sort_between(kept, change @ to, back @ torch.linalg.inv(change), proj, output_gram, moment_z)
    # Too few tokens, or all alike, say nothing of what heads share, and leave maps that float32 weights cannot hold.
    if not (torch.linalg.cond(refined[0]) < EIGENVALUE_FLOOR**-0.5).all():
        return to, back
    return refined


def _sort_between(bounds, to, back, proj, output_gram, moment_z):
    """Sort the dimensions between one bound and the next as ``output_basis`` does; prefixes up to a bound stay."""
    heads, width, _ = to.shape
    own = torch.einsum("hihj->hij", moment_z.view(heads, width, heads, width))
    to, back = to.clone(), back.clone()
    for start, end in itertools.pairwise((0, *bounds, width)):
        rows, columns = to[:, start:end], back[..., start:end]
        sort, unsort = output_basis(rows @ own @ rows.mT, output_gram, proj @ columns)
        to[:, start:end], back[..., start:end] = sort @ rows, columns @ unsort
    return to, back


def output_errors(variance_z, proj, gram):
    """Expected loss when one dimension of all heads goes: sum over heads of var(z_j) |G^(1/2) W_o,j|^2.

    variance_z [H, d], proj [H, D, d], gram [D, D]. Returns [d].
    """
    return torch.einsum("hd,hcd,ce,hed->d", variance_z, proj, gram, proj)


def query_key_basis(moment_q, covariance_k):
    """Maps of q and k that sort the head's dimensions by what survives in q^T k (docs/stage1.md, 3).

    Args: second moment of q and covariance of the centred k, both [H, d, d].
    Returns (map_q, map_k), [H, d, d] each, with map_q^T map_k = I, so that q^T k is exact.
    """
    root_q, root_k = symmetric_power(moment_q, 0.5), symmetric_power(covariance_k, 0.5)
    u, s, _ = torch.linalg.svd(root_q @ root_k)
    u = _fix_signs(u)
    scale = s.clamp(min=EIGENVALUE_FLOOR * s[..., :1].clamp(min=EIGENVALUE_FLOOR)).sqrt().unsqueeze(-1)
    map_q = scale * u.mT @ symmetric_power(moment_q, -0.5)
    # S^(1/2) V^T Sigma_k^(-1/2), written as the inverse transpose of map_q, which it also is where S is clamped.
    map_k = u.mT @ root_q / scale
    return map_q, map_k


def equalising_scale(first, second):
    """Factors c [H, d] for which the rows c * first and second / c have equal norms; [H, d, n] each.

    Of all per-dimension scales this one has the smallest sum of squared weights, which is what weight decay
    penalises, and it leaves neither side with rows far larger than AdamW's step is made for. Zero rows get 1.
    """
    ratio = second.norm(dim=-1) / first.norm(dim=-1)
    return torch.where(torch.isfinite(ratio) & (ratio > 0), ratio, torch.ones_like(ratio)).sqrt()


# ------------------------------------------------------------------------------------------ rewriting


def reparameterise(model, statistics, basis="balanced", mlp_order="taylor", alone=()):
    """Rewrite the weights of a super-network, in place, so that every prefix keeps as much as possible. What is not
    exact for a kind of attention or MLP is left out (``models.kinds``).

    Args:
        statistics: list of BlockStatistics from ``collect_statistics`` with moments, at full width.
        basis: 'pca' (paper) or 'balanced' (mean folding, output-aware V/O basis, balanced Q/K basis).
        mlp_order: order of the hidden units by 'taylor' (mean |g a|), 'hessian' (mean (g a)^2), or 'greedy': by what
            compensation cannot predict from the units before (needs hidden moments; 'taylor' where there is none).
        alone: the branches, by their index in Widths.flat, whose weights stay as they are.
    Returns a list of L BlockMemory for compensation, or of None where the statistics have no hidden moments.
    """
    results = []
    for index, (block, sums) in enumerate(zip(blocks_of(model), statistics, strict=True)):
        attn_mean, attn_error = _rewrite_attention(block, sums, basis, 2 * index in alone)
        if 2 * index + 1 in alone:
            order = torch.arange(block.mlp_width, device=sums.taylor_mlp.device)
        else:
            # The greedy order is one for compensation.
            kind = "taylor" if mlp_order == "greedy" and not block.parts[1].can("compensation") else mlp_order
            order = hidden_order(block.output("mlp"), sums, kind)
            _permute_hidden(block, order)
        results.append(remember(block, sums, attn_mean, attn_error, order) if sums.hidden else None)
    return results


def _rewrite_attention(block, sums, basis, alone):
    """Rewrite one block's heads. Returns the mean of its attention's output, [D], and the errors of dimensions, [d]."""
    part, proj = block.parts[0], block.output("attn")
    columns = rearrange(proj.weight.detach().double(), "c (h d) -> h c d", h=part.heads)
    mean = torch.einsum("hcd,hd->c", columns, sums.grad_z.mean)
    mean = mean if proj.bias is None else mean + proj.bias.detach().double()
    if part.whole or alone:
        # Only the sum is of use: what is lost with all dimensions of a head, their correlations included.
        carried = columns.mT @ sums.mean_gram("attn") @ columns
        return mean, (carried * sums.grad_z.about(sums.grad_z.mean)).sum((0, 1))
    weights = HeadWeights.read(block.attn, part)
    errors = {"balanced": _rewrite_balanced, "pca": _rewrite_pca}[basis](weights, sums)
    weights.write(block.attn)
    if not weights.can_turn_keys:
        errors = errors + _permute_queries_and_keys(block, sums)
    return mean, errors


def hidden_order(output, sums, kind):
    """The permutation [M] of an MLP's hidden units that ``kind`` asks for, most important first; ``output``: its last
    Linear."""
    if kind == "greedy":
        mean = sums.hidden.weighted_mean
        weight = output.weight.detach().double()
        return greedy_order(sums.hidden.about(mean)[0], weight, sums.mean_gram("mlp"), sums.taylor_mlp)
    importance = {"taylor": sums.taylor_mlp, "hessian": sums.hessian_mlp}[kind]
    return importance.argsort(descending=True, stable=True)


class HeadWeights:
    """Float64 copies of one attention module's weights by head, biases as zeros where there are none.

    q, k, v: [H, d, D]; q_bias, k_bias, v_bias: [H, d]; proj: [H, D, d]; proj_bias: [D].
    """

    @classmethod
    def read(cls, attn, part):
        self, heads = cls(), part.heads
        weight = rearrange(attn.qkv.weight.detach().double(), "(three h d) c -> three h d c", three=3, h=heads)
        self.q, self.k, self.v = weight.unbind()
        if attn.qkv.bias is None:
            biases = torch.zeros_like(weight[..., 0])
        else:
            biases = rearrange(attn.qkv.bias.detach().double(), "(three h d) -> three h d", three=3, h=heads)
        self.q_bias, self.k_bias, self.v_bias = biases.unbind()
        self.proj = rearrange(attn.proj.weight.detach().double(), "c (h d) -> h c d", h=heads)
        bias = attn.proj.bias
        self.proj_bias = torch.zeros_like(self.proj[0, :, 0]) if bias is None else bias.detach().double()
        self.can_fold, self.can_turn_keys = part.can("mean folding"), part.can("Q/K basis")
        return self

    @torch.no_grad()
    def write(self, attn):
        """Copy back, in the module's own dtype."""
        attn.qkv.weight.copy_(rearrange(torch.stack((self.q, self.k, self.v)), "three h d c -> (three h d) c"))
        attn.proj.weight.copy_(rearrange(self.proj, "h c d -> c (h d)"))
        if attn.qkv.bias is not None:
            biases = torch.stack((self.q_bias, self.k_bias, self.v_bias))
            attn.qkv.bias.copy_(rearrange(biases, "three h d -> (three h d)"))
        if attn.proj.bias is not None:
            attn.proj.bias.copy_(self.proj_bias)

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


def _rewrite_pca(weights, sums):
    """The paper's basis: orthogonal, one for v and o, one shared by q and k. Returns errors, [d]."""
    basis_v = pca_basis(sums.theta_v.about(sums.theta_v.mean))
    weights.map("v", basis_v.mT)
    weights.proj = weights.proj @ basis_v
    if weights.can_turn_keys:
        moments = (sums.theta_q, sums.theta_k)
        basis_qk = pca_basis(sum(m.about(m.mean) * m.s0[:, None, None] for m in moments))
        weights.map("q", basis_qk.mT)
        weights.map("k", basis_qk.mT)
    variance_z = (basis_v.mT @ sums.grad_z.about(sums.grad_z.mean) @ basis_v).diagonal(dim1=-2, dim2=-1)
    return output_errors(variance_z, weights.proj, sums.mean_gram("attn"))


def _rewrite_balanced(weights, sums):
    """Mean folding, then the output-aware V/O and the balanced Q/K basis. Returns errors, [d]."""
    mean_z, mean_k = sums.grad_z.mean, sums.theta_k.mean
    if weights.can_fold:
        # Attention rows sum to one: a constant of v passes straight through to proj's bias. A constant of every
        # key shifts all logits of a query alike, which the softmax ignores.
        weights.proj_bias = weights.proj_bias + torch.einsum("hcd,hd->c", weights.proj, mean_z)
        weights.v_bias = weights.v_bias - mean_z
        if weights.can_turn_keys:
            weights.k_bias = weights.k_bias - mean_k
    # A mean that cannot be folded, for want of a bias, is lost with the dimensions that carry it: it counts as signal.
    covariance_z = sums.grad_z.about(mean_z) if weights.can_fold else sums.grad_z.second_moment
    gram = sums.mean_gram("attn")
    to, back = output_basis(covariance_z, gram, weights.proj)
    lost_mean = mean_z if weights.can_fold else torch.zeros_like(mean_z)
    joint = sums.joint_z.about(lost_mean.view(1, -1))[0]
    to, back = joint_basis(to, back, weights.proj, gram, joint)
    weights.map("v", to)
    weights.proj = weights.proj @ back
    variance_z = (to @ covariance_z @ to.mT).diagonal(dim1=-2, dim2=-1)
    errors = output_errors(variance_z, weights.proj, gram)
    scale = equalising_scale(weights.rows("v"), weights.proj.mT)
    weights.scale("v", scale)
    weights.proj = weights.proj / scale.unsqueeze(1)
    if weights.can_turn_keys:
        _balance_queries_and_keys(weights, sums)
    return errors


def _balance_queries_and_keys(weights, sums):
    map_q, map_k = query_key_basis(sums.grad_q.second_moment, sums.grad_k.second_moment)
    weights.map("q", map_q)
    weights.map("k", map_k)
    scale = equalising_scale(weights.rows("q"), weights.rows("k"))
    weights.scale("q", scale)
    weights.scale("k", 1 / scale)


def _permute_queries_and_keys(block, sums):
    """Where q and k pass a norm: sort their dimensions by what they carry, alike in all heads, which share the norm.

    Returns what the objective loses with each, [d]: without a basis that gathers it in the first dimensions it counts
    beside the error at proj's output. To first order, dropping a dimension of q (or of k) changes it by -g f.
    """
    order = sums.taylor_attn[:2].sum((0, 1)).argsort(descending=True, stable=True)
    for layer in block.parts[0].layers:
        module = getattr(block.attn, layer.name)
        if layer.name == "qkv":
            _permute(module, layer, order, slice(0, 2 * block.num_heads))
        elif layer.side == "norm":
            _permute(module, layer, order)
    return sums.hessian_attn[:2].mean(0).sum(0)[order] / sums.grad_z.count


def _permute_hidden(block, order):
    """Sort the hidden units in all layers that have them; order: [M]."""
    for layer in block.parts[1].layers:
        _permute(getattr(block.mlp, layer.name), layer, order)


@torch.no_grad()
def _permute(module, layer, order, groups=slice(None)):
    """Sort the entries of each of some groups of ``layer`` (of models.kinds), in place; order: [width]."""
    for name, parameter in module.named_parameters(recurse=False):
        if layer.side == "in" and name == "weight":
            grouped = parameter.unflatten(1, (layer.groups, -1))
            grouped[:, groups] = grouped[:, groups][..., order]
        elif layer.side != "in":
            grouped = parameter.unflatten(0, (layer.groups, -1))
            grouped[groups] = grouped[groups][:, order]
