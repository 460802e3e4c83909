"""Sequential refit of one extracted network on proxy images (docs/stage1.md, ``--calibrate``).

Block by block, the output layers of the truncated branches (proj and fc2) are refitted so that the residual stream
after the branch matches the full network's, given what the already refitted blocks before it deliver.
"""

import torch
from torch import nn

import utils
from models.peel import branch_of, holder_of
from models.supernet import Replay, full_widths, named_blocks, replaced, set_widths

# Strength of the pull towards the weights before the refit, relative to the mean square of the inputs.
RIDGE = 1e-3


def calibrate(network, supernet, batches, objective, device):
    """Refit ``network`` (extracted, changed in place) to the full-width ``supernet``. Branches that end in a norm stay.

    Both are put into eval mode. batches: list of (images, labels, positions), this rank's share; kept on ``device``
    with their activations, so a few hundred images are meant. objective: of ``models.statistics``, gives the token
    weights |dC/dx|^2.
    """
    set_widths(supernet, full_widths(supernet))
    supernet.eval(), network.eval()
    weights = [token_weights(supernet, batch, objective, device) for batch in batches]
    images, blocks = [batch[0].to(device) for batch in batches], named_blocks(supernet)
    paths = [path for path, _ in blocks]
    with torch.no_grad():
        contexts = [_contexts(supernet, each) for each in images]
        teacher, student = [None] * len(images), [None] * len(images)
        for index, (path, whole) in enumerate(blocks):
            teacher = [_input_of(supernet, paths, index, *each) for each in zip(images, teacher, strict=True)]
            student = [_input_of(network, paths, index, *each) for each in zip(images, student, strict=True)]
            context = [each[index] for each in contexts]
            targets = [_run(whole, x, *each) for x, each in zip(teacher, context, strict=True)]
            cut = network.get_submodule(path)
            for branch, part in zip(("attn", "mlp"), whole.parts, strict=True):
                if branch_of(cut, branch) and part.can("calibration"):
                    omegas = [each[f"{index}.{branch}"] for each in weights]
                    _refit(cut, branch, part, whole.scale_of(branch), student, targets, context, omegas)
            student = [_run(cut, x, *each)["mlp"] for x, each in zip(student, context, strict=True)]
            teacher = [target["mlp"] for target in targets]
    return network


def token_weights(supernet, batch, objective, device):
    """|dC/dx|^2 of the residual stream after every branch of the full network: {'b.attn' or 'b.mlp': [B, ...]}."""
    found, handles = {}, []

    def watch(name):
        def hook(_module, _inputs, output):
            output.register_hook(lambda gradient: found.update({name: gradient.float().square().sum(-1)}))

        return hook

    for index, (_, block) in enumerate(named_blocks(supernet)):
        # The gradient at a branch's output equals the one at the residual stream that it is added to.
        handles.append(block.drop_path1.register_forward_hook(watch(f"{index}.attn")))
        handles.append(block.drop_path2.register_forward_hook(watch(f"{index}.mlp")))
    images, labels, positions = batch
    wanted = [parameter.requires_grad for parameter in supernet.parameters()]
    supernet.requires_grad_(False)
    try:
        with torch.enable_grad():
            objective(supernet, images.to(device).requires_grad_(), labels.to(device), positions).backward()
    finally:
        for parameter, flag in zip(supernet.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)
        for handle in handles:
            handle.remove()
    return found


# ------------------------------------------------------------------------------------------ the residual stream


def _contexts(supernet, images):
    """What every block is called with besides the residual stream: [(arguments, keyword arguments), ...]."""
    seen, handles = [], []
    for _, block in named_blocks(supernet):
        hook = block.register_forward_pre_hook(
            lambda _m, args, kwargs: seen.append((args[1:], kwargs)), with_kwargs=True
        )
        handles.append(hook)
    try:
        supernet.forward_features(images)
    finally:
        for handle in handles:
            handle.remove()
    return seen


class _Captured(Exception):
    """Ends a forward pass as soon as it has what is wanted."""


class _Capture(nn.Module):
    def forward(self, x, *_args, **_kwargs):
        raise _Captured(x)


def _captured(function, *arguments):
    try:
        function(*arguments)
    except _Captured as found:
        return found.args[0]


def _input_of(model, paths, index, images, given):
    """The residual stream before block ``index``, where the block before it gave out ``given``."""
    stages = [path.rpartition(".")[0] for path in paths]
    if index and stages[index - 1] == stages[index]:
        return given
    # Another stage: patches are merged in between. And before the first block they are embedded.
    modules = {path: Replay() for path in paths[:index]} | {paths[index]: _Capture()}
    if index:
        modules[paths[index - 1]] = Replay(given)
    with replaced(model, modules):
        return _captured(model.forward_features, images)


def _layout(block, branch, tensor):
    """``tensor`` [B, ..., n] of the residual stream as the tokens of a branch: those of its windows, if it has any."""
    if branch_of(block, branch) is None or holder_of(block) is not block or branch == "mlp":
        return tensor.flatten(0, -2)
    with replaced(block, {"norm1": nn.Identity(), "attn": _Capture()}):
        return _captured(block, tensor).flatten(0, -2)


def _run(block, x, args, kwargs, tapped=None):
    """{'attn', 'mlp': the residual stream after each branch of a block, 'tapped': what goes into layer ``tapped``}."""
    found, holder = {"attn": x}, holder_of(block)
    handles = []
    if hasattr(holder, "drop_path1"):
        hook = holder.drop_path1.register_forward_hook(lambda _m, _i, added: found.update(attn=x + added))
        handles.append(hook)
    if tapped:
        handles.append(tapped.register_forward_pre_hook(lambda _m, given: found.update(tapped=given[0])))
    try:
        found["mlp"] = block(x, *args, **kwargs)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _refit(block, branch, part, gamma, student, targets, context, omegas):
    """Weighted ridge regression of the branch's output layer towards its present weights, float64, all ranks' sums."""
    linear = getattr(branch_of(block, branch), part.output)
    gamma = torch.as_tensor(gamma, dtype=torch.float64, device=linear.weight.device)
    if linear.bias is None or bool((gamma == 0).any()):
        return
    width = linear.in_features + 1
    gram = torch.zeros(width, width, dtype=torch.float64, device=linear.weight.device)
    cross = gram.new_zeros(width, linear.out_features)
    present = torch.cat((linear.weight, linear.bias[:, None]), 1).double()
    for x, target, (args, kwargs), omega in zip(student, targets, context, omegas, strict=True):
        run = _run(block, x, args, kwargs, linear)
        left = target[branch] - (x if branch == "attn" else run["attn"])
        a = run["tapped"].double().flatten(0, -2)
        a = torch.cat((a, torch.ones_like(a[:, :1])), 1)
        residual = _layout(block, branch, left).double() / gamma - a @ present.mT
        weighted = a * _layout(block, branch, omega.view(*left.shape[:-1], 1)).double()
        gram += weighted.mT @ a
        cross += weighted.mT @ residual
    gram, cross = utils.all_reduce_sum(gram), utils.all_reduce_sum(cross)
    pull = RIDGE * gram.diagonal().mean() * torch.eye(width).to(gram)
    change = torch.linalg.solve(gram + pull, cross).mT
    linear.weight += change[:, :-1].to(linear.weight)
    linear.bias += change[:, -1].to(linear.bias)
