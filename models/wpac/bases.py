"""The solvers of stage 1: bases in which the first dimensions of a head hold the most, and orders of hidden units.

All are pure functions on float64 tensors, batched over heads. ``rewrite.py`` applies what they return.
"""

import torch

from utils import InputError

# Eigenvalues below this share of the largest are raised to it before an inverse root is taken.
EIGENVALUE_FLOOR = 1e-9
# Added to the diagonal of a covariance, relative to its mean: units that are never active have no variance.
FLOOR = 1e-5
# The shares by which correlations may be shrunk, the share of the entries that is kept where they are compared, and by
# how much a larger one may be worse than the best.
SHRINKAGES, KEPT_TO_COMPARE, TOLERATED = (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.25, 0.5, 0.75, 0.9), 1 / 4, 0.003
# The share of an MLP's error at which the greedy order has done its work.
GREEDY_TAIL = 1e-3


def symmetric_power(matrix, power):
    """matrix^power for symmetric positive semi-definite [..., d, d], eigenvalues clamped from below. A matrix that is
    zero (a dead head) counts as the identity, so that its basis is still invertible."""
    values, vectors = torch.linalg.eigh(matrix)
    largest = values[..., -1:]
    values = torch.where(largest > 0, values.clamp(min=EIGENVALUE_FLOOR * largest), torch.ones_like(values))
    return vectors * values.pow(power).unsqueeze(-2) @ vectors.mT


def _fix_signs(columns):
    """Columns [..., d, d] with signs such that the entry of largest magnitude of each is positive."""
    at = columns.abs().argmax(-2, keepdim=True)
    return columns * torch.where(columns.gather(-2, at) < 0, -1.0, 1.0)


def pca_basis(covariance):
    """The paper's basis: eigenvectors U of a weighted covariance [H, d, d] as columns, largest eigenvalue first.

    Paper, WPAC: Sigma_v = sum theta (v - mu)(v - mu)^T = U Lambda U^T for v and o; Sigma_q + Sigma_k for q and k, which
    share one basis.
    """
    return _fix_signs(torch.linalg.eigh(covariance).eigenvectors.flip(-1))


def output_basis(covariance_z, output_gram, proj):
    """Our V/O basis: maps of v and proj that sort a head's dimensions by what survives in W_o z (docs/method.md).

    SVD of G^(1/2) W_o Sigma_z^(1/2) = U S V^T; z <- (Sigma_z^(-1/2) V)^T z, W_o <- W_o Sigma_z^(1/2) V.

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


def query_key_basis(moment_q, covariance_k):
    """Our Q/K basis: maps of q and k that sort a head's dimensions by what survives in q^T k (docs/method.md).

    SVD of Sigma_q^(1/2) Sigma_k^(1/2) = U S V^T; q <- S^(1/2) U^T Sigma_q^(-1/2) q, k likewise with V.

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


def factorise(covariance):
    """Lower triangular F with F F^T = C + floor, for a covariance C [n, n]; the floor starts at FLOOR and grows tenfold
    until F exists. Raises InputError if C is not finite."""
    floor = _floor(_finite(covariance))
    while True:
        raised = covariance.clone()
        raised.diagonal().add_(floor)
        factor, failed = torch.linalg.cholesky_ex(raised)
        if not failed:
            return factor
        # Fewer tokens than units leave negative eigenvalues of the size of float32 rounding.
        floor = 10 * floor


def _finite(covariance):
    if not torch.isfinite(covariance.sum()):
        raise InputError("activations are NaN or infinite on the proxy set")
    return covariance


def _floor(covariance):
    return FLOOR * covariance.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)


def shrunk(covariance, share):
    """C [n, n] with its correlations, not its variances, smaller by ``share``: entries predict each other less."""
    smaller = (1 - share) * covariance
    smaller.diagonal().copy_(covariance.diagonal())
    return smaller


def at(matrix, rows, columns):
    """The entries of a matrix in these rows and columns, both of them indices."""
    return matrix[rows[:, None], columns]


def choose_shrinkage(halves, weight, gram, order):
    """The shrinkage with which each half of the proxy images says best what the other half loses (docs/method.md, 2).

    Where few tokens carry the weight, kept entries seem to predict dropped ones better than they do. SHRINKAGES are
    compared with the first entries of ``order`` kept; the largest counts that is as good as the best, within TOLERATED:
    it promises the least. Shrinking by s is a ridge of s / (1 - s) of every variance. For all images, which are twice
    as many, this ridge is halved.

    Args: halves: two (mean [n], covariance [n, n]) of x; weight [D, n] of the Linear that reads it; gram [D, D]; order:
        [n], indices into x.
    """
    count = max(int(KEPT_TO_COMPARE * len(order)), 1)
    kept, rest = order[:count], order[count:]
    dropped, both = weight[:, rest], halves[0][1] + halves[1][1]
    parts = [(m[kept], at(_finite(c), kept, kept), dropped @ m[rest], dropped @ at(c, rest, kept)) for m, c in halves]
    of_dropped = ((gram @ dropped) * (dropped @ at(both, rest, rest))).sum()
    lost = of_dropped + sum(_lost_elsewhere(*pair, gram) for pair in (parts, parts[::-1]))
    lost = lost.clamp(min=0)
    share = SHRINKAGES[(lost <= (1 + TOLERATED) * lost.min()).nonzero().max()]
    return share / (2 - share)


def _lost_elsewhere(here, elsewhere, gram):
    """For each of SHRINKAGES, E|G^(1/2) (W x - W' x_kept - b')|^2 elsewhere, for W' and b' fitted here, without what
    the dropped entries hold by themselves. here, elsewhere: mean and covariance of x_kept, mean of what the dropped
    entries give, and its covariance with x_kept."""
    (mean, covariance, mean_given, given), (other_mean, other, other_mean_given, other_given) = here, elsewhere
    # Where tokens hardly differ, rounding leaves variances and eigenvalues below zero.
    deviation = (covariance.diagonal().clamp(min=0) + _floor(covariance)).sqrt()
    values, vectors = torch.linalg.eigh((covariance / deviation / deviation[:, None]).fill_diagonal_(1))
    values = values.clamp(min=0)
    # y = to^T x_kept is uncorrelated here, so that shrinking scales what is folded, column by column.
    to = vectors / deviation[:, None]
    target = given @ to
    weighted = gram @ target
    linear = (weighted * (other_given @ to)).sum(0)
    quadratic = (to.mT @ other @ to) * (target.mT @ weighted)
    moved, shift, lost = to.mT @ (other_mean - mean), other_mean_given - mean_given, []
    for share in SHRINKAGES:
        scale = (1 - share) / ((1 - share) * values + share)
        mean_lost = shift - target @ (scale * moved)
        lost.append(scale @ quadratic @ scale - 2 * scale @ linear + mean_lost @ gram @ mean_lost)
    return torch.stack(lost)


def greedy_order(covariance, weight, gram, importance):
    """The order of hidden units in which each next one removes the most of the error that compensation leaves.

    Pivoted Cholesky of C where the pivot is chosen by its weighted error |G^(1/2) W2 R_j|^2 / R_jj, R being what the
    units chosen so far cannot predict. A large MLP takes M / 150 pivots at a time. Once all but GREEDY_TAIL of the
    error is gone, what is left of R is little more than rounding: the other units follow by ``importance``, so that
    the order does not depend on how the proxy set was split.
    covariance [M, M], weight [D, M], gram [D, D], importance [M]. Returns a permutation [M].
    """
    count, floor = len(covariance), _floor(covariance)
    values, vectors = torch.linalg.eigh(gram)
    weighted = weight.mT @ (vectors * values.clamp(min=0).sqrt())
    # All by unit: carried is R weighted, factor the Cholesky factor.
    carried, left = covariance @ weighted, covariance.diagonal() + floor
    factor, free = torch.empty_like(covariance), torch.arange(count, device=left.device)
    order, chosen = free[:0], torch.zeros_like(free, dtype=torch.bool)
    remaining = total = (weighted * carried).sum()
    while len(order) < count and remaining > GREEDY_TAIL * total:
        done = len(order)
        score = torch.linalg.vector_norm(carried, dim=1).square() / left.clamp(min=floor)
        pivots = score.masked_fill(chosen, -torch.inf).topk(min(max(count // 150, 1), count - done)).indices
        rows = at(covariance, free[pivots], free) - factor[pivots, :done] @ factor[:, :done].mT
        root = factorise(rows[:, pivots])
        new = torch.linalg.solve_triangular(root, rows, upper=False).mT
        explained = torch.linalg.solve_triangular(root, carried[pivots], upper=False)
        carried.addmm_(new, explained, alpha=-1)
        left -= new.square().sum(1)
        remaining = remaining - explained.square().sum()
        factor[:, done : done + len(pivots)] = new
        order, chosen[pivots] = torch.cat((order, free[pivots])), True
        if 8 * chosen.sum() > len(free):  # R is empty in their rows and columns
            carried, left, factor, free, chosen = (x[~chosen] for x in (carried, left, factor, free, chosen))
    rest = importance.argsort(descending=True, stable=True)
    return torch.cat((order, rest[~torch.isin(rest, order)]))
