"""Sequential refit of extracted networks on proxy images (docs/method.md, 2).

Block by block, the output layers of the truncated branches (proj and fc2) are refitted. The residual stream after each
branch is to match the full network's, given what the refitted blocks before it deliver. What the full network gives is
computed once for all of them.
"""

from dataclasses import dataclass

import torch
from torch import nn

import utils
from models.vit.families import Transform, branch_in, leading
from models.vit.supernet import Replay, at_widths, block_inputs, branches, frozen, full_widths, hooks, swapped
from models.wpac.moments import SymmetricSum, zeros

# Strength of the pull towards the weights before the refit, relative to the mean square of the inputs. With less, and
# with tokens weighted by |dC/dx|^2, which a few of them carry alone, a refit on 64 images did harm (docs/stage1.md).
RIDGE = 0.1


@dataclass
class _Batch:
    """One batch on its way through the networks. teacher, students: the residual stream before the present block, of
    the full network and of every truncated one. contexts: {path of a block: what it is called with besides that stream,
    (arguments, keyword arguments)}. weights: {str(branch): |dC/dx| of the residual stream after it}."""

    images: torch.Tensor
    contexts: dict
    weights: dict
    students: list
    teacher: torch.Tensor | None = None


def calibrate(subnets, supernet, batches, objective):
    """Refit each of ``subnets`` (extracted, changed in place) to the full-width ``supernet``. Branches that end in a
    norm stay.

    All are put into eval mode. batches: list of (images, labels, positions), this rank's share; they are kept on the
    device with their activations, so a few hundred images are meant. objective: of ``statistics``, gives the token
    weights |dC/dx|. Returns ``subnets``.
    """
    for network in (supernet, *subnets):
        network.eval()
    with at_widths(supernet, full_widths(supernet)):
        own = branches(supernet)
        state = [_begin(subnets, supernet, batch, objective) for batch in batches]
        with torch.no_grad():
            blocks = list(zip(own[::2], own[1::2], strict=True))
            for pair in utils.progress(blocks, "calibration", unit="blocks"):
                _calibrate_block(subnets, supernet, pair, state)
    return subnets


def _begin(subnets, supernet, batch, objective):
    contexts, weights = observe(supernet, batch, objective)
    images = batch[0].to(next(supernet.parameters()).device)
    return _Batch(images, contexts, weights, [None] * len(subnets))


def _calibrate_block(subnets, supernet, pair, state):
    """pair: both branches of the block."""
    path, block = pair[0].path, pair[0].block
    for batch in state:
        batch.teacher = _input_of(supernet, path, batch, batch.teacher)
    targets = [_run(block, batch.teacher, *batch.contexts[path]) for batch in state]
    for index, subnet in enumerate(subnets):
        inputs, outputs = [_input_of(subnet, path, batch, batch.students[index]) for batch in state], None
        cut = subnet.get_submodule(path)
        for branch in pair:
            if branch_in(subnet, branch).module is not None and branch.part.can(Transform.CALIBRATION):
                outputs = _refit(subnet, branch, state, inputs, targets)
        if outputs is None:
            outputs = [_run(cut, x, *batch.contexts[path])["mlp"] for batch, x in zip(state, inputs, strict=True)]
        for batch, output in zip(state, outputs, strict=True):
            batch.students[index] = output
    for batch, target in zip(state, targets, strict=True):
        batch.teacher = target["mlp"]


def observe(supernet, batch, objective):
    """({path of a block: what the full network calls it with besides the residual stream}, {str(branch): |dC/dx|, [B,
    ...], of that stream after it})."""
    found, handles, device = {}, [], next(supernet.parameters()).device

    def watch(name):
        def hook(_module, _inputs, output):
            output.register_hook(lambda gradient: found.update({name: gradient.float().norm(dim=-1)}))

        return hook

    for branch in branches(supernet):
        # The gradient at a branch's output equals the one at the residual stream that it is added to.
        handles.append(branch.drop_path.register_forward_hook(watch(str(branch))))
    images, labels, positions = batch

    def there_and_back(images):
        objective(supernet, images, labels.to(device), positions).backward()

    with frozen(supernet), hooks(handles), torch.enable_grad():
        inputs, _ = block_inputs(supernet, images.to(device).requires_grad_(), there_and_back)
    return {path: (args[1:], kwargs) for path, (args, kwargs) in inputs.items()}, found


def _input_of(model, path, batch, given):
    """The residual stream before the block at ``path``, if the block before it returned ``given``."""
    paths = list(batch.contexts)
    before = paths[paths.index(path) - 1] if path != paths[0] else None
    if before and before.rpartition(".")[0] == path.rpartition(".")[0]:
        return given
    # Another stage: patches are merged in between. And before the first block they are embedded.
    modules = {path: Replay() for path in paths}
    if before:
        modules[before] = Replay(given)
    with swapped(model, modules):
        model.forward_features(batch.images)
    return modules[path].seen


def _layout(cut, block, tensor):
    """``tensor`` [B, ..., n] of the residual stream as the tokens of a branch: those of its windows, if it has any."""
    if cut.name == "mlp" or cut.block is not block:
        return tensor.flatten(0, -2)
    attention, others = Replay(), {name: nn.Identity() for name in ("norm1", "norm2", "mlp")}
    with swapped(block, {"attn": attention} | others):
        block(tensor)
    return attention.seen.flatten(0, -2)


def _run(block, x, args, kwargs, tapped=None, whole=True):
    """{'attn', 'mlp': the residual stream after each branch of a block, 'tapped': the input of layer ``tapped``}.
    Without the ``whole`` block, its MLP is left out."""
    found, holder, handles = {"attn": x}, getattr(block, "fn", block), []
    if hasattr(holder, "drop_path1"):
        hook = holder.drop_path1.register_forward_hook(lambda _m, _i, added: found.update(attn=x + added))
        handles.append(hook)
    if tapped:
        handles.append(tapped.register_forward_pre_hook(lambda _m, given: found.update(tapped=given[0])))
    with hooks(handles), swapped(holder, {} if whole or not hasattr(holder, "mlp") else {"mlp": nn.Identity()}):
        found["mlp"] = block(x, *args, **kwargs)
    return found


def _refit(subnet, branch, state, inputs, targets):
    """Weighted ridge regression of the branch's output layer towards its present weights, float64, all ranks' sums.

    Returns the residual stream after the MLP, of every batch; None after attention, or if there is nothing to refit.
    """
    block, cut = subnet.get_submodule(branch.path), branch_in(subnet, branch)
    linear = getattr(cut.module, branch.part.output)
    gamma = torch.as_tensor(branch.scale, dtype=torch.float64, device=linear.weight.device)
    if linear.bias is None or bool((gamma == 0).any()):
        return None
    size, runs = linear.in_features + 1, []
    sums = SymmetricSum(1, size, linear.weight.device)
    cross = zeros(size, linear.out_features, device=linear.weight.device)
    present = torch.cat((linear.weight, linear.bias[:, None]), 1).double()
    for batch, given, target in zip(state, inputs, targets, strict=True):
        run = _run(block, given, *batch.contexts[branch.path], linear, whole=branch.name == "mlp")
        left = target[branch.name] - (given if branch.name == "attn" else run["attn"])
        a = leading(run["tapped"], getattr(branch.part, "heads", 1), linear.in_features).double().flatten(0, -2)
        omega = batch.weights[str(branch)].view(*left.shape[:-1], 1)
        root = _layout(cut, block, omega).double().sqrt()
        weighted = torch.cat((a, torch.ones_like(a[:, :1])), 1) * root
        sums.add(weighted[None])
        cross += weighted.mT @ (_layout(cut, block, left).double() / gamma * root)
        if branch.name == "mlp":
            runs.append(run)
    sums.all_reduce()
    gram = sums.dense()[0]
    pull = RIDGE * gram.diagonal().mean() * torch.eye(size).to(gram)
    change = torch.linalg.solve(gram + pull, utils.all_reduce(cross) - gram @ present.mT).mT
    linear.weight += change[:, :-1].to(linear.weight)
    linear.bias += change[:, -1].to(linear.bias)
    if branch.name == "attn":
        return None
    # In the shape that the block returns: some flatten it for their MLP.
    return [run["attn"] + (branch.scale * linear(run["tapped"])).view_as(run["attn"]) for run in runs]
