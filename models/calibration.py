"""Sequential refit of one extracted network on proxy images (docs/stage1.md, ``--calibrate``).

Block by block, the output layers of the truncated branches (proj and fc2) are refitted so that the residual stream
after the branch matches the full network's, given what the already refitted blocks before it deliver.
"""

import torch
from torch import nn

import utils
from models.vit import full_widths, set_widths

# Strength of the pull towards the weights before the refit, relative to the mean square of the inputs.
RIDGE = 1e-3


def calibrate(network, supernet, batches, objective, device):
    """Refit ``network`` (extracted, changed in place) to the full-width ``supernet``.

    batches: list of (images, labels, positions), this rank's share; kept on ``device`` with their activations, so a few
    hundred images are meant. objective: of ``models.statistics``, gives the token weights |dC/dx|^2.
    """
    set_widths(supernet, full_widths(supernet))
    weights = [token_weights(supernet, batch, objective, device) for batch in batches]
    with torch.no_grad():
        teacher = [_embedding(supernet, images.to(device)) for images, _, _ in batches]
        student = [_embedding(network, images.to(device)) for images, _, _ in batches]
        for index, (whole, cut) in enumerate(zip(supernet.blocks, network.blocks, strict=True)):
            for branch in ("attn", "mlp"):
                teacher = [_advance(whole, branch, x) for x in teacher]
                if _has(cut, branch):
                    omegas = [w[f"{index}.{branch}"] for w in weights]
                    _refit(cut, branch, student, teacher, omegas)
                    student = [_advance(cut, branch, x) for x in student]
    return network


def token_weights(supernet, batch, objective, device):
    """|dC/dx|^2 of the residual stream after every branch of the full network: {'b.attn' or 'b.mlp': [B, T]}."""
    found, handles = {}, []

    def watch(name):
        def hook(_module, _inputs, output):
            output.register_hook(lambda gradient: found.update({name: gradient.float().square().sum(-1)}))

        return hook

    for index, block in enumerate(supernet.blocks):
        # The gradient at a branch's output equals the one at the residual stream that it is added to.
        handles.append(block.drop_path1.register_forward_hook(watch(f"{index}.attn")))
        handles.append(block.drop_path2.register_forward_hook(watch(f"{index}.mlp")))
    images, labels, positions = batch
    try:
        with torch.enable_grad():
            objective(supernet.eval(), images.to(device).requires_grad_(), labels.to(device), positions).backward()
    finally:
        supernet.zero_grad(set_to_none=True)
        for handle in handles:
            handle.remove()
    return found


class _Capture(nn.Module):
    def forward(self, x):
        self.captured = x
        return x


def _embedding(model, images):
    """The residual stream before the first block, [B, T, D]."""
    blocks, capture = model.blocks, _Capture()
    model.blocks = nn.Sequential(capture)
    try:
        model.forward_features(images)
    finally:
        model.blocks = blocks
    return capture.captured


def _holder(block):
    """The module that has norm, branch and LayerScale as attributes: a block, or the Sequential inside a Residual."""
    return getattr(block, "fn", block)


def _has(block, branch):
    return hasattr(_holder(block), branch)


def _layers(block, branch):
    holder, number = _holder(block), {"attn": 1, "mlp": 2}[branch]
    return getattr(holder, f"norm{number}"), getattr(holder, branch), getattr(holder, f"ls{number}")


def _advance(block, branch, x):
    norm, module, scale = _layers(block, branch)
    return x + scale(module(norm(x)))


def _refit(block, branch, student, teacher, omegas):
    """Weighted ridge regression of the branch's output layer towards its present weights, float64, all ranks' sums."""
    norm, module, scale = _layers(block, branch)
    linear = module.proj if branch == "attn" else module.fc2
    gamma = 1.0 if isinstance(scale, nn.Identity) else scale.gamma.double()
    if linear.bias is None or bool((torch.as_tensor(gamma) == 0).any()):
        return
    inputs = []
    handle = linear.register_forward_pre_hook(lambda _m, args: inputs.append(args[0]))
    width = linear.in_features + 1
    gram = torch.zeros(width, width, dtype=torch.float64, device=linear.weight.device)
    cross = gram.new_zeros(width, linear.out_features)
    present = torch.cat((linear.weight, linear.bias[:, None]), 1).double()
    for x, target, omega in zip(student, teacher, omegas, strict=True):
        module(norm(x))
        a = inputs.pop().double().flatten(0, 1)
        a = torch.cat((a, torch.ones_like(a[:, :1])), 1)
        left = ((target - x).double() / gamma).flatten(0, 1) - a @ present.mT
        weighted = a * omega.double().flatten()[:, None]
        gram += weighted.mT @ a
        cross += weighted.mT @ left
    handle.remove()
    gram, cross = utils.all_reduce_sum(gram), utils.all_reduce_sum(cross)
    pull = RIDGE * gram.diagonal().mean() * torch.eye(width).to(gram)
    change = torch.linalg.solve(gram + pull, cross).mT
    linear.weight += change[:, :-1].to(linear.weight)
    linear.bias += change[:, -1].to(linear.bias)
