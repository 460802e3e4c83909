"""Closed-form compensation of what truncation drops (docs/stage1.md, 6): no data, no training, one solve per block.

The hidden units that a narrower MLP keeps predict the dropped ones linearly; folding the prediction into fc2 loses only
what they cannot predict. With the covariance C of the hidden vector a factored once as C = F F^T, F lower triangular,
the leading k x k part of F is the factor of the leading part of C, so one factor serves every width:

    W2' = W2[:, :k] + (W2[:, k:] F[k:, :k]) F[:k, :k]^-1       b2' = b2 + W2 mu - W2' mu[:k]

and the error left at width k, in the metric G of the gradient at the MLP's output, is a sum over the dropped units of
e_j = |G^(1/2) (W2 F)_j|^2. Attention needs no solve: its dimensions are uncorrelated in the balanced basis.
"""

import hashlib
from dataclasses import dataclass

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

import utils
from models.peel import branch_of, holder_of
from models.supernet import blocks_of, named_blocks
from utils import InputError

MEMORY_NAME = "statistics.safetensors"
# Added to the diagonal of C, relative to its mean: units that are never active have no variance of their own.
RIDGE = 1e-5
# The share of an MLP's error at which the greedy order has done its work.
GREEDY_TAIL = 1e-3


@dataclass
class BlockMemory:
    """What is remembered of one block at full width, for compensation and for the width table.

    factor: [M, M] lower triangular F; hidden_mean: [M] mu; attn_mean, mlp_mean: [D] mean output of each branch, before
    LayerScale and after a norm that follows it; attn_error [d] and mlp_error [M]: expected loss of the objective when a
    dimension or unit goes.
    """

    factor: torch.Tensor
    hidden_mean: torch.Tensor
    attn_mean: torch.Tensor
    mlp_mean: torch.Tensor
    attn_error: torch.Tensor
    mlp_error: torch.Tensor


def remember(block, sums, attn_mean, attn_error, order=None):
    """BlockMemory of a PrefixBlock from its BlockStatistics with hidden moments.

    order: the permutation [M] in which its hidden units now stand, if they have been sorted since. attn_mean [D] is its
    attention's mean output, attn_error [d] the errors of its dimensions.
    """
    mean, output = sums.hidden.weighted_mean, block.output("mlp")
    covariance, hidden_mean = sums.hidden.about(mean)[0], mean[0]
    if order is not None:
        covariance, hidden_mean = covariance[order][:, order], hidden_mean[order]
    factor = factorise(covariance)
    weight = output.weight.detach().double()
    mlp_mean = weight @ hidden_mean + (0 if output.bias is None else output.bias.detach().double())
    if block.kind.post_norm:
        attn_mean, mlp_mean = (total[:-1] / total[-1].clamp(min=1) for total in (sums.attn_mean, sums.mlp_mean))
    if block.parts[1].can("compensation"):
        mlp_error = unit_errors(weight, factor, sums.mean_gram("mlp"))
    else:  # nothing takes over what a unit did: to first order the objective changes by -g a
        mlp_error = sums.hessian_mlp / sums.hidden.count
        mlp_error = mlp_error if order is None else mlp_error[order]
    return BlockMemory(
        factor=factor,
        hidden_mean=hidden_mean,
        attn_mean=attn_mean,
        mlp_mean=mlp_mean,
        attn_error=attn_error,
        mlp_error=mlp_error,
    )


def remember_as_is(model, statistics):
    """BlockMemory of every block of a super-network whose weights stay as they are, a trained one for example.

    statistics: L BlockStatistics with moments and hidden moments, at full width. The errors of attention dimensions
    are left at zero: they are for making a width table, which such a network has.
    """
    memory = []
    for block, sums in zip(blocks_of(model), statistics, strict=True):
        proj = block.output("attn")
        attn_mean = proj.weight.detach().double() @ sums.grad_z.mean.flatten()
        attn_mean = attn_mean if proj.bias is None else attn_mean + proj.bias.detach().double()
        memory.append(remember(block, sums, attn_mean, torch.zeros(block.attn_width)))
    return memory


# ------------------------------------------------------------------------------------------ solvers


def factorise(covariance):
    """Lower triangular F with F F^T = C + ridge, float64. Raises InputError if C is not finite.

    The ridge starts at RIDGE and grows tenfold until the factorisation exists.
    """
    if not torch.isfinite(covariance).all():
        raise InputError("the hidden activations of an MLP are NaN or infinite on the proxy set")
    ridge = _ridge(covariance)
    while True:
        factor, failed = torch.linalg.cholesky_ex(covariance + ridge * torch.eye(len(covariance)).to(covariance))
        if not failed:
            return factor
        # Fewer tokens than units leave negative eigenvalues of the size of float32 rounding.
        ridge = 10 * ridge


def _ridge(covariance):
    return RIDGE * covariance.diagonal().mean().clamp(min=torch.finfo(torch.float32).tiny)


def unit_errors(weight, factor, gram):
    """e_j = |G^(1/2) (W2 F)_j|^2, [M]: weight [D, M], factor [M, M], gram [D, D]."""
    carried = weight @ factor
    return (carried * (gram @ carried)).sum(0).clamp(min=0)


def compensated(weight, bias, factor, mean, kept):
    """fc2 of width ``kept`` with the prediction of the dropped units folded in: (W2' [D, k], b2' [D])."""
    if kept == weight.shape[1]:
        return weight, bias
    dropped = weight[:, kept:] @ factor[kept:, :kept]
    folded = torch.linalg.solve_triangular(factor[:kept, :kept], dropped, upper=False, left=False)
    new = weight[:, :kept] + folded
    return new, bias + weight @ mean - new @ mean[:kept]


def greedy_order(covariance, weight, gram, importance):
    """The order of hidden units in which each next one removes the most of the error that compensation leaves.

    Pivoted Cholesky of C where the pivot is chosen by its weighted error |G^(1/2) W2 R_j|^2 / R_jj, R being what the
    units chosen so far cannot predict. An MLP of more than 256 units takes several pivots at a time, M / 256. Once all
    but GREEDY_TAIL of the error is gone, what is left of R is little more than rounding: the other units follow by
    ``importance``, so that the order does not depend on how the proxy set was split.
    covariance [M, M], weight [D, M], gram [D, D], importance [M]. Returns a permutation [M].
    """
    count, ridge = len(covariance), _ridge(covariance)
    values, vectors = torch.linalg.eigh(gram)
    weighted = (vectors * values.clamp(min=0).sqrt()).mT @ weight
    carried, left = weighted @ covariance, covariance.diagonal() + ridge
    factor, order = torch.zeros_like(covariance), torch.empty(count, dtype=torch.long, device=covariance.device)
    at_once = max(count // 256, 1)
    remaining = total = (weighted * carried).sum()
    for done in range(0, count, at_once):
        score = torch.linalg.vector_norm(carried, dim=0).square() / left.clamp(min=ridge)
        score[order[:done]] = -torch.inf
        if remaining <= GREEDY_TAIL * total:
            free = torch.isfinite(score)
            rest = importance.argsort(descending=True, stable=True)
            order[done:] = rest[free[rest]]
            break
        pivots = score.topk(min(at_once, count - done)).indices
        span = slice(done, done + len(pivots))
        columns = covariance[:, pivots] - factor[:, :done] @ factor[pivots, :done].mT
        root = factorise(columns[pivots])
        factor[:, span] = torch.linalg.solve_triangular(root, columns.mT, upper=False).mT
        carried.addmm_(weighted @ factor[:, span], factor[:, span].mT, alpha=-1)
        left -= factor[:, span].square().sum(1)
        remaining = (weighted * carried).sum()
        order[span] = pivots
    return order


# ------------------------------------------------------------------------------------------ at extraction


@torch.no_grad()
def compensate(network, supernet, widths, memory):
    """Fold into an extracted network what its truncation drops, in place (docs/stage1.md, 6).

    Narrower MLPs get the closed-form fc2. The mean output of a branch that is gone goes into the output bias of the
    last kept branch before it (the bias of its norm, where one follows), or into the embedding where there is none:
    nothing reads the residual stream in between, so that is exact. What merges patches does read it: a mean of the next
    stage has no place before it, and is lost, as is one that finds no bias. ``memory``: list of L BlockMemory measured
    on ``supernet`` at full width.
    """
    place, stage = _Embedding(network), None
    for (path, block), sums, kept in zip(named_blocks(supernet), memory, widths.mlp, strict=True):
        peeled, parent = network.get_submodule(path), path.rpartition(".")[0]
        if stage not in (None, parent):
            place = _Nowhere()
        stage = parent
        for branch, number, mean in (("attn", 1, sums.attn_mean), ("mlp", 2, sums.mlp_mean)):
            module, part, scale = branch_of(peeled, branch), block.parts[number - 1], block.scale_of(branch)
            if module is None:
                place.add(_on(scale, mean) * scale)
                continue
            if branch == "mlp" and part.can("compensation"):
                _fold(getattr(module, part.output), block.output("mlp"), sums, kept)
            last = getattr(holder_of(peeled), f"norm{number}") if block.kind.post_norm else getattr(module, part.output)
            place = _Bias(last, scale)
    return network


def _on(scale, mean):
    """``mean`` on the device of a LayerScale."""
    return mean.to(scale.device) if isinstance(scale, torch.Tensor) else mean


def _fold(fc2, full, sums, kept):
    device, weight = full.whole("weight").device, full.whole("weight")
    weight, bias, factor, mean = (
        tensor.to(device=device, dtype=torch.float64) for tensor in (weight, full.bias, sums.factor, sums.hidden_mean)
    )
    weight, bias = compensated(weight, bias, factor, mean, kept)
    fc2.weight.copy_(weight)
    fc2.bias.copy_(bias)


class _Bias:
    """The bias of the last module of a kept branch, as a place where a constant can be added to the residual stream.
    ``scale``: the LayerScale that follows."""

    def __init__(self, module, scale):
        self.module, self.scale = module, scale

    def add(self, constant):
        bias = getattr(self.module, "bias", None)  # an RMSNorm has none
        if bias is None:
            return
        change = constant.to(bias) / self.scale
        bias += torch.where(torch.isfinite(change), change, torch.zeros_like(change))


class _Nowhere:
    """After patches have been merged: the norm there reads the stream."""

    def add(self, constant):
        pass


class _Embedding:
    """The residual stream before the first block, as a place where a constant can be added to every token."""

    def __init__(self, network):
        self.network = network

    def add(self, constant):
        network, norm = self.network, getattr(self.network, "norm_pre", None)
        if not isinstance(norm, (nn.Identity, type(None))):
            if getattr(norm, "bias", None) is not None:
                norm.bias += constant.to(norm.bias)
            return
        positions, tokens = getattr(network, "pos_embed", None), ("cls_token", "reg_token", "dist_token")
        place = positions if positions is not None else getattr(_end_of(network.patch_embed), "bias", None)
        places = [place]
        if positions is None or getattr(network, "no_embed_class", False):
            places += [token for name in tokens if (token := getattr(network, name, None)) is not None]
        for each in places if place is not None else ():
            each += constant.to(each)


def _end_of(patch_embed):
    """The layer of a patch embedding that has the last word: its norm, or its projection."""
    norm = getattr(patch_embed, "norm", None)
    return patch_embed.proj if isinstance(norm, (nn.Identity, type(None))) else norm


# ------------------------------------------------------------------------------------------ files


def _digest(model):
    """A fingerprint of the output layers of all MLPs, which the statistics belong to."""
    digest = hashlib.sha256()
    for block in blocks_of(model):
        digest.update(block.output("mlp").whole("weight").detach().float().cpu().contiguous().numpy())
    return digest.hexdigest()


def save_memory(memory, model, path):
    """Write a list of BlockMemory of ``model`` as safetensors, float32, whole or not at all. Main rank only."""
    if utils.is_main():
        tensors = {
            f"blocks.{index}.{name}": value.float().cpu().contiguous()
            for index, sums in enumerate(memory)
            for name, value in vars(sums).items()
        }
        with utils.whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={"fc2": _digest(model)})


def load_memory(path, model):
    """Read what ``save_memory`` wrote for ``model``. Raises InputError if it is not there or of other weights."""
    try:
        with safe_open(path, framework="pt") as file:
            owner = (file.metadata() or {}).get("fc2")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except FileNotFoundError:
        raise InputError(f"{path}: no such file; main_reparam.py writes it beside the weights") from None
    except SafetensorError as error:
        raise InputError(f"{path}: not a readable statistics file ({error})") from None
    if owner != _digest(model):
        raise InputError(f"{path}: measured on other weights than these; use --no_compensate, or run stage 1 again")
    try:
        return [_block_memory(tensors, index, block) for index, block in enumerate(blocks_of(model))]
    except KeyError as error:
        raise InputError(f"{path}: member {error} is missing; run stage 1 again") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}; run stage 1 again") from None


def _block_memory(tensors, index, block):
    """The BlockMemory of one block. Raises ValueError for a tensor of another shape or with NaN in it."""
    dim, hidden = block.output("mlp").whole("weight").shape
    shapes = {"factor": (hidden, hidden), "hidden_mean": (hidden,), "attn_mean": (dim,), "mlp_mean": (dim,)}
    shapes |= {"attn_error": (block.parts[0].width,), "mlp_error": (hidden,)}
    found = {name: tensors[f"blocks.{index}.{name}"] for name in shapes}
    for name, tensor in found.items():
        if tensor.shape != shapes[name] or not torch.isfinite(tensor).all():
            raise ValueError(f"blocks.{index}.{name} is not {shapes[name]} finite numbers")
    return BlockMemory(**found)
