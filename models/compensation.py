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
    LayerScale; attn_error [d] and mlp_error [M]: expected loss of the objective when a dimension or unit goes.
    """

    factor: torch.Tensor
    hidden_mean: torch.Tensor
    attn_mean: torch.Tensor
    mlp_mean: torch.Tensor
    attn_error: torch.Tensor
    mlp_error: torch.Tensor


def remember(block, hidden_mean, covariance, mlp_gram, attn_mean, attn_error):
    """BlockMemory of a rewritten PrefixBlock; covariance [M, M] and mean [M] in the order of its hidden units."""
    factor = factorise(covariance)
    weight = block.mlp.fc2.weight.detach().double()
    bias = 0 if block.mlp.fc2.bias is None else block.mlp.fc2.bias.detach().double()
    return BlockMemory(
        factor=factor,
        hidden_mean=hidden_mean,
        attn_mean=attn_mean,
        mlp_mean=weight @ hidden_mean + bias,
        attn_error=attn_error,
        mlp_error=unit_errors(weight, factor, mlp_gram),
    )


def remember_as_is(model, statistics):
    """BlockMemory of every block of a super-network whose weights stay as they are, a trained one for example.

    statistics: L BlockStatistics with moments and hidden moments, at full width. The errors of attention dimensions
    are left at zero: they are for making a width table, which such a network has.
    """
    memory = []
    for block, sums in zip(model.blocks, statistics, strict=True):
        mean, proj = sums.hidden.weighted_mean, block.attn.proj
        attn_mean = proj.weight.detach().double() @ sums.grad_z.mean.flatten()
        attn_mean = attn_mean if proj.bias is None else attn_mean + proj.bias.detach().double()
        gram, no_errors = sums.mean_gram("mlp"), torch.zeros(block.attn_width)
        memory.append(remember(block, mean[0], sums.hidden.about(mean)[0], gram, attn_mean, no_errors))
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
    last kept branch before it, or into the embedding where there is none: nothing reads the residual stream in
    between, so that is exact. ``memory``: list of L BlockMemory measured on ``supernet`` at full width.
    """
    output = _Embedding(network)
    for index, (block, sums) in enumerate(zip(supernet.blocks, memory, strict=True)):
        if widths.attn[index]:
            output = _Linear(_part(network.blocks[index], "attn").proj, block.ls1)
        else:
            output.add(_scaled(sums.attn_mean, block.ls1))
        if widths.mlp[index]:
            fc2 = _part(network.blocks[index], "mlp").fc2
            _fold(fc2, block.mlp.fc2, sums, widths.mlp[index])
            output = _Linear(fc2, block.ls2)
        else:
            output.add(_scaled(sums.mlp_mean, block.ls2))
    return network


def _fold(fc2, full, sums, kept):
    if full.bias is None:
        return
    device = full.weight.device
    weight, bias, factor, mean = (
        tensor.to(device=device, dtype=torch.float64)
        for tensor in (full.weight, full.bias, sums.factor, sums.hidden_mean)
    )
    weight, bias = compensated(weight, bias, factor, mean, kept)
    fc2.weight.copy_(weight)
    fc2.bias.copy_(bias)


def _part(block, name):
    """The branch ``name`` of a peeled block, which is a Block or a Residual around a Sequential."""
    return getattr(block if hasattr(block, name) else block.fn, name)


def _scaled(vector, layer_scale):
    return vector if isinstance(layer_scale, nn.Identity) else vector * layer_scale.gamma.detach().to(vector)


class _Linear:
    """The output of a kept branch, as a place where a constant can be added to the residual stream."""

    def __init__(self, linear, layer_scale):
        self.linear, self.layer_scale = linear, layer_scale

    def add(self, constant):
        if self.linear.bias is None:
            return
        gamma = 1.0 if isinstance(self.layer_scale, nn.Identity) else self.layer_scale.gamma.detach()
        change = constant.to(self.linear.bias) / gamma
        self.linear.bias += torch.where(torch.isfinite(change), change, torch.zeros_like(change))


class _Embedding:
    """The residual stream before the first block, as a place where a constant can be added to every token."""

    def __init__(self, network):
        self.network = network

    def add(self, constant):
        network = self.network
        if not isinstance(network.norm_pre, nn.Identity):
            network.norm_pre.bias += constant.to(network.norm_pre.bias)
            return
        network.pos_embed += constant.to(network.pos_embed)
        if network.no_embed_class:
            for token in (network.cls_token, network.reg_token):
                if token is not None:
                    token += constant.to(token)


# ------------------------------------------------------------------------------------------ files


def _digest(model):
    """A fingerprint of the output layers of all MLPs, which the statistics belong to."""
    digest = hashlib.sha256()
    for block in model.blocks:
        digest.update(block.mlp.fc2.weight.detach().float().cpu().contiguous().numpy())
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
        return [_block_memory(tensors, index, block) for index, block in enumerate(model.blocks)]
    except KeyError as error:
        raise InputError(f"{path}: member {error} is missing; run stage 1 again") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}; run stage 1 again") from None


def _block_memory(tensors, index, block):
    """The BlockMemory of one block. Raises ValueError for a tensor of another shape or with NaN in it."""
    dim, hidden = block.mlp.fc2.weight.shape
    shapes = {"factor": (hidden, hidden), "hidden_mean": (hidden,), "attn_mean": (dim,), "mlp_mean": (dim,)}
    shapes |= {"attn_error": (block.attn.qkv.width,), "mlp_error": (hidden,)}
    found = {name: tensors[f"blocks.{index}.{name}"] for name in shapes}
    for name, tensor in found.items():
        if tensor.shape != shapes[name] or not torch.isfinite(tensor).all():
            raise ValueError(f"blocks.{index}.{name} is not {shapes[name]} finite numbers")
    return BlockMemory(**found)
