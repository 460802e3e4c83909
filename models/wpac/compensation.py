"""Closed-form compensation of what truncation drops (docs/method.md, 2): no data, no training, a solve per branch.

What a narrower branch keeps of the input of its last Linear predicts linearly what it drops. Folding the prediction
into that Linear loses only what cannot be predicted. The input x is a, the hidden vector, for an MLP, and z of all
heads for attention, sorted by dimension first and head second: then the first k dimensions of every head are a prefix
too. The covariance C of x is factored once as C = F F^T, F lower triangular; the leading part of F is the factor of
the leading part of C, so one factor serves every width. For W, b of the full Linear, the mean mu of x, and n kept
entries:

    W' = W[:, :n] + (W[:, n:] F[n:, :n]) F[:n, :n]^-1       b' = b + W mu - W' mu[:n]

The error that is left, in the metric G of the gradient at the branch's output, is a sum over the dropped entries of
e_j = |G^(1/2) (W F)_j|^2.

``compensate`` does this to an extracted network, ``attach`` to the slices of a super-network that is trained.
"""

import copy
from dataclasses import dataclass

import torch
from einops import rearrange
from torch import nn

import utils
from models.vit.families import Transform, branch_in
from models.vit.supernet import branches
from models.vit.weights import as_safetensors, read_safetensors
from models.wpac.bases import at, choose_shrinkage, factorise, shrunk
from models.wpac.rewrite import centred, reparameterise
from models.wpac.statistics import collect_statistics
from utils import InputError

COMPENSATION_NAME = "compensation.safetensors"


@dataclass
class Compensation:
    """What is measured on a branch at full width so that it can be cut to any width, and to build the width table.

    errors: [width], what the objective is expected to lose when a dimension of all heads, or a hidden unit, goes
    (without what a norm over the hidden units adds to it).
    output_mean: [D], mean output of the branch before LayerScale, and after a norm that follows the branch.
    factor, input_mean: [n, n] lower triangular F and [n] mu of the input of the last Linear, n = H d in the order
    (d H), or M. inverse: F^-1, once it is needed; it is not saved.
    """

    errors: torch.Tensor
    output_mean: torch.Tensor
    factor: torch.Tensor
    input_mean: torch.Tensor
    inverse: torch.Tensor | None = None

    @classmethod
    def of(cls, branch, sums, rewrite):
        """Compensation of a branch of a super-network from its statistics, measured before it was rewritten.

        rewrite: what ``reparameterise`` did to it.
        """
        errors, weight, factor, mean = (_of_attention if branch.name == "attn" else _of_mlp)(branch, sums, rewrite)
        output_mean = weight @ mean + (0 if branch.output.bias is None else branch.output.bias.detach().double())
        if sums.output_sum is not None:
            output_mean = sums.output_sum[:-1] / sums.output_sum[-1].clamp(min=1)
        return cls(errors, output_mean, factor, mean)


def _of_attention(branch, sums, rewrite):
    """(errors [d], weight of the last Linear [D, n], F, mu)."""
    heads, weight = branch.part.heads, _dimension_first(branch.output.weight.detach().double(), branch.part.heads)

    def mapped(rows):
        return (rewrite.maps @ rows.unflatten(0, (heads, -1))).flatten(0, 1)

    def rewritten(moments):
        mean, covariance = centred(moments)
        both = mapped(mapped(covariance).mT)
        mean = mapped((mean - rewrite.shift.flatten())[:, None]).mT[0]
        return _dimension_first(mean, heads), _dimension_first(_dimension_first(both, heads).mT, heads)

    mean, covariance = rewritten(sums.inputs.together)
    halves, as_it_is = [rewritten(half) for half in sums.inputs.apart], torch.arange(len(mean), device=mean.device)
    shrinkage = choose_shrinkage(halves, weight, sums.mean_gram, as_it_is)
    factor = factorise(shrunk(covariance, shrinkage))
    if branch.part.can(Transform.COMPENSATION) or branch.indivisible:  # which goes as a whole, and leaves its mean
        errors = unit_errors(weight, factor, sums.mean_gram)
    else:
        errors = plain_errors(weight, covariance + mean.outer(mean), sums.mean_gram)
    return errors.unflatten(0, (-1, heads)).sum(1) + rewrite.lost, weight, factor, mean


def _of_mlp(branch, sums, rewrite):
    weight, order = branch.output.weight.detach().double(), rewrite.order
    mean, covariance = centred(sums.inputs.together)
    mean, factor = mean[order], factorise(shrunk(at(covariance, order, order), rewrite.shrinkage))
    if branch.part.can(Transform.COMPENSATION):
        errors = unit_errors(weight, factor, sums.mean_gram)
    else:  # No compensation: dropping a unit changes the objective by -g a (first order). The error is E[(g a)^2].
        errors = (sums.hessian / sums.images)[order]
    return errors, weight, factor, mean


def _dimension_first(columns, heads):
    """[..., (h d)] -> [..., (d h)]."""
    return rearrange(columns, "... (h d) -> ... (d h)", h=heads)


def compensation_of(supernet, statistics, rewrites):
    """2L Compensation of a super-network, from its statistics before it was rewritten and what was rewritten."""
    return [Compensation.of(*row) for row in zip(branches(supernet), statistics, rewrites, strict=True)]


def measure_compensation(supernet, batches, objective, amp="none"):
    """2L Compensation of a super-network whose weights stay as they are, a trained one for example.

    The arguments are those of ``collect_statistics``.
    """
    statistics = collect_statistics(supernet, batches, objective, hidden=True, amp=amp)
    untouched = reparameterise(supernet, statistics, untouched=range(len(statistics)))
    return compensation_of(supernet, statistics, untouched)


def unit_errors(weight, factor, gram):
    """e_j = |G^(1/2) (W F)_j|^2, [n]: weight [D, n], factor [n, n] lower triangular, gram [D, D]."""
    parts = torch.arange(len(factor), device=factor.device).chunk(8)
    # Above the diagonal F holds nothing.
    carried = torch.cat([weight[:, part[0] :] @ factor[part[0] :, part] for part in parts], 1)
    return (carried * (gram @ carried)).sum(0).clamp(min=0)


def plain_errors(weight, moment, gram):
    """What entry j adds to E|G^(1/2) W[:, j:] x[j:]|^2, [n], if nothing makes up for it: weight [D, n], moment E x x^T
    [n, n], gram [D, D]. Negative ones, of entries that cancel others, count nothing."""
    losses = (weight.mT @ gram @ weight) * moment
    return (2 * losses.triu().sum(1) - losses.diagonal()).clamp(min=0)


def fold(weight, bias, factor, mean, kept, inverse=None):
    """The last Linear with ``kept`` inputs and the prediction of the dropped ones folded in: (W' [D, kept], b' [D]).

    inverse: F^-1, whose leading part is the inverse of the leading part of F. With it nothing is solved, which takes a
    GPU far longer than products do.
    """
    if kept == weight.shape[1]:
        return weight, bias
    if inverse is None:
        dropped = weight[:, kept:] @ factor[kept:, :kept]
        folded = torch.linalg.solve_triangular(factor[:kept, :kept], dropped, upper=False, left=False)
        new = weight[:, :kept] + folded
        return new, bias + weight @ mean - new @ mean[:kept]
    first, dropped = weight.split((kept, weight.shape[1] - kept), 1)
    predict = factor[kept:, :kept] @ inverse[:kept, :kept]  # x[kept:] is about mu[kept:] + predict (x - mu)[:kept]
    return torch.addmm(first, dropped, predict), torch.addmv(bias, dropped, mean[kept:] - predict @ mean[:kept])


@torch.no_grad()
def compensate(subnet, supernet, compensation):
    """Fold into an extracted network what its truncation drops, in place (docs/method.md, 2).

    The last Linear of a narrower branch gets the closed form. The mean output of a removed branch goes into the output
    bias of the last kept branch before it (the bias of its norm, if one follows), or into the embedding if there is
    none. Nothing reads the residual stream in between, so that is exact. A constant cannot be moved across patch
    merging, because the norm inside reads the stream: there the mean is lost, as it is where no bias is found.

    compensation: 2L Compensation, measured on ``supernet`` at full width. Returns ``subnet``.
    """
    # Parameters that can take up a mean, and the module that holds the block before (in Swin, its stage).
    place, last_parent = _embedding_of(subnet), None
    for branch, known in zip(branches(supernet), compensation, strict=True):
        cut, parent = branch_in(subnet, branch), branch.path.rpartition(".")[0]
        if last_parent not in (None, parent):
            place = []
        last_parent = parent
        if cut.module is None:
            _add(known.output_mean, branch.scale, place)
            continue
        last = getattr(cut.module, branch.part.output)
        _fold_into(last, branch, known)
        bias = getattr(cut.norm if branch.family.post_norm else last, "bias", None)  # an RMSNorm has none
        place = [] if bias is None else [(bias, branch.scale)]
    return subnet


def inverse_of(factor):
    """F^-1 for lower triangular F [n, n], as precise as F."""
    identity = torch.eye(len(factor), dtype=torch.float64, device=factor.device)
    return torch.linalg.solve_triangular(factor.double(), identity, upper=False).to(factor)


class Folding:
    """Makes the last Linear of one branch, at any width below its own, of the full one (docs/method.md, 2).

    heads: groups of columns that are cut alike. factor, mean, inverse: F, mu and maybe F^-1 of the Compensation, in the
    precision in which is folded. norm: the LayerNorm over the hidden units, if there is one.
    """

    def __init__(self, branch, factor, mean, inverse):
        self.heads, self.factor, self.mean = getattr(branch.part, "heads", 1), factor, mean
        self.inverse = inverse
        self.norm = next((module for layer, module in branch.layers if layer.name == "norm"), None)

    @classmethod
    def of(cls, branch, known, dtype, inverse=None):
        """None if the branch cannot be compensated."""
        if not branch.part.can(Transform.COMPENSATION):
            return None
        tensors = known.factor, known.input_mean, inverse
        return cls(branch, *(t if t is None else t.to(branch.output.weight.device, dtype) for t in tensors))

    def __deepcopy__(self, memo):
        copied = copy.copy(self)  # what never changes is shared, as by the averaged weights
        copied.norm = copy.deepcopy(self.norm, memo)
        return copied

    def __call__(self, last, kept):
        """(weight [D, H kept], bias [D]) of the full Linear ``last`` at a width below its own, differentiable."""
        if self.factor.device != last.weight.device:  # a network that is moved leaves behind what is no parameter
            tensors = self.factor, self.mean, self.inverse
            self.factor, self.mean, self.inverse = (t if t is None else t.to(last.weight.device) for t in tensors)
        n, factor, mean, inverse = kept * self.heads, self.factor, self.mean, self.inverse
        with torch.autocast(factor.device.type, enabled=False):
            full = _dimension_first(last.weight, self.heads).to(factor)
            weight, bias = fold(full, last.bias.to(factor), factor, mean, n, inverse)
            if self.norm is not None:
                affine = (parameter[:n].to(factor) for parameter in (self.norm.weight, self.norm.bias))
                inverse = inverse if inverse is None else inverse[:n, :n]
                weight, bias = through_norm(weight, bias, factor[:n, :n], mean[:n], *affine, inverse)
        return rearrange(weight, "c (d h) -> c (h d)", h=self.heads), bias


def attach(supernet, compensation):
    """Let a super-network compute compensated slices from now on, differentiably; plain ones if there is no
    ``compensation`` (2L Compensation). What a removed branch adds on average is not made up for."""
    own = branches(supernet)
    for branch, known in zip(own, compensation or [None] * len(own), strict=True):
        if known and branch.part.can(Transform.COMPENSATION):
            # In place, so that attaching it again, or to the averaged weights too, makes no second copy on a GPU.
            device = branch.output.weight.device
            known.factor, known.input_mean = known.factor.to(device), known.input_mean.to(device)
            if device.type != "cuda":
                known.inverse = None
            elif known.inverse is None:
                known.inverse = inverse_of(known.factor)
        dtype = branch.output.weight.dtype
        branch.output.folding = Folding.of(branch, known, dtype, known.inverse) if known else None


def _fold_into(cut, branch, known):
    """cut: the last Linear of what ``branch`` has become."""
    folding, heads = Folding.of(branch, known, torch.float64), getattr(branch.part, "heads", 1)
    if not folding or cut.in_features == branch.output.in_features:
        return
    weight, bias = folding(branch.output, cut.in_features // heads)
    if not (torch.isfinite(weight).all() and torch.isfinite(bias).all()):
        raise InputError("the compensation of these weights has no finite solution; cut without it")
    cut.weight.copy_(weight)
    cut.bias.copy_(bias)


def through_norm(weight, bias, factor, mean, gamma, beta, known_inverse=None):
    """W' [D, n], b' [D] for n inputs of the last Linear, as they leave a LayerNorm (gamma, beta) over all hidden units
    -> the same for inputs that leave a LayerNorm over these n units.

    factor, mean: F and mu of these inputs x. known_inverse: F^-1, as in ``fold``. With x^ = (x - beta) / gamma, which
    for every token is an affine map of the hidden vector, the narrower norm returns gamma (x^ - mean_n x^) / sqrt(var_n
    x^) + beta. Two things follow. The mean over the units is gone: of all W' with W' gamma = 0, which do not read it,
    the one nearest in C is taken. The variance is taken as constant, with its expectation: tr(M) / n - 1^T M 1 / n^2, M
    the second moment of x^.
    """
    inverse = torch.where(gamma == 0, 0, 1 / torch.where(gamma == 0, 1, gamma))  # twice, for the gradient's sake
    root, center = inverse[:, None] * factor, inverse * (mean - beta)
    variance = (root.square().mean(0).sum() - root.mean(0).square().sum()) + center.var(correction=0)
    if known_inverse is None:
        direction = torch.cholesky_solve(gamma[:, None], factor)  # C^-1 gamma
    else:
        direction = known_inverse.mT @ (known_inverse @ gamma[:, None])
    without_mean = weight - (weight @ gamma)[:, None] * direction.T / (gamma @ direction)
    new = without_mean * variance.sqrt()
    return new, bias + (weight - without_mean) @ mean + (without_mean - new) @ beta


def _add(mean, scale, place):
    """Add ``scale`` * ``mean`` [D] to the residual stream, through the parameters in ``place``.

    place: [(parameter, the LayerScale between it and the stream)], empty if no parameter can take the mean up.
    """
    constant = mean.to(scale.device) * scale if isinstance(scale, torch.Tensor) else mean * scale
    for parameter, own_scale in place:
        change = constant.to(parameter) / own_scale
        parameter += torch.where(torch.isfinite(change), change, torch.zeros_like(change))


def _embedding_of(network):
    """The place where a constant can be added to every token before the first block."""
    norm = getattr(network, "norm_pre", None)
    if not isinstance(norm, (nn.Identity, type(None))):
        places = [getattr(norm, "bias", None)]
    else:
        positions, embed = getattr(network, "pos_embed", None), network.patch_embed
        last = embed.proj if isinstance(getattr(embed, "norm", None), (nn.Identity, type(None))) else embed.norm
        places = [getattr(last, "bias", None) if positions is None else positions]
        if places[0] is not None and (positions is None or getattr(network, "no_embed_class", False)):
            places += [getattr(network, name, None) for name in ("cls_token", "reg_token", "dist_token")]
    return [(place, 1.0) for place in places if place is not None]


def save_compensation(compensation, supernet, path, weights):
    """Write 2L Compensation of ``supernet`` as safetensors, float32, complete or not at all. Main rank only.

    weights: the digest of the state dict that the compensation belongs to.
    """
    if utils.is_main():
        tensors = {
            f"{branch}.{name}": value.float().cpu().contiguous()
            for branch, known in zip(branches(supernet), compensation, strict=True)
            for name, value in vars(known).items()
            if name != "inverse"
        }
        with utils.atomic_file(path) as temporary:
            # Not save_file, which makes files that their owner alone can read.
            temporary.write_bytes(as_safetensors(tensors, weights=weights, img_size=_pixels(supernet)))


def load_compensation(path, supernet, weights):
    """Read what ``save_compensation`` wrote for ``supernet`` and the digest ``weights``, 2L Compensation.

    Raises InputError if the file is not there, damaged, or was measured on other weights.
    """
    try:
        tensors, metadata = read_safetensors(path)
    except ValueError as error:
        raise InputError(f"{path}: not a readable compensation file ({error}); stage 1 writes it") from None
    if metadata.get("weights") != weights:
        raise InputError(
            f"{path}: measured on other weights than these; cut without compensation, or run stage 1 again"
        )
    measured, own = metadata.get("img_size"), _pixels(supernet)
    if measured not in (None, own):
        utils.print_once(f"note: {path}: measured on images of {measured} pixels, and these are of {own}")
    return [_read_one(tensors, branch, path) for branch in branches(supernet)]


def _pixels(supernet):
    return "x".join(map(str, supernet.patch_embed.img_size))


def _read_one(tensors, branch, path):
    size = branch.output.in_features
    shapes = {"errors": (branch.full,), "output_mean": (branch.output.out_features,)}
    shapes |= {"factor": (size, size), "input_mean": (size,)}
    for name, shape in shapes.items():
        tensor = tensors.get(f"{branch}.{name}")
        if tensor is None:
            raise InputError(f"{path}: member '{branch}.{name}' is missing; run stage 1 again")
        if tensor.shape != shape or not torch.isfinite(tensor).all():
            raise InputError(f"{path}: {branch}.{name} is not {shape} finite numbers; run stage 1 again")
    if not (tensors[f"{branch}.factor"].diagonal() > 0).all():
        raise InputError(f"{path}: {branch}.factor has a diagonal that is not positive; run stage 1 again")
    return Compensation(**{name: tensors[f"{branch}.{name}"] for name in shapes})
