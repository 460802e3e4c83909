"""Turning a timm model into a super-network: the same modules and names, whose branches can be any prefix wide."""

from contextlib import contextmanager
from functools import cache, partial

import torch
from torch import nn

from models.kinds import BLOCKS, MODELS, UnsupportedPart, parts_of
from models.width_table import Widths
from utils import InputError

# The modules of each branch by their names in a block; what a branch that is off gives out is zero.
BRANCHES = {"attn": ("norm1", "attn", "ls1", "drop_path1"), "mlp": ("norm2", "mlp", "ls2", "drop_path2")}
GAMMAS = {"gamma_1": "attn", "gamma_2": "mlp"}


# ------------------------------------------------------------------------------------------ prefixes


class Prefixed:
    """Mixin for a layer of a super-network: its parameters read as the kept prefix of themselves, so that timm's own
    forward computes the sub-network. Optimiser, state dict and ``whole`` have all of them.

    ``layer``: of ``models.kinds``; ``width``: the full width of a group; ``kept``: the width at present.
    """

    def whole(self, name):
        """The parameter with nothing cut, or None."""
        return self._parameters[name]

    def keep(self, kept):
        self.kept = kept or self.width
        if self.layer.side == "norm":
            self.normalized_shape = (self.layer.groups * self.kept,)


def _prefix(name, module):
    """The kept part of parameter ``name``, differentiable in all of it."""
    tensor, layer, kept, width = module.whole(name), module.layer, module.kept, module.width
    if tensor is None or kept == width:
        return tensor
    if layer.side == "in":
        return tensor if name == "bias" else tensor.unflatten(1, (layer.groups, width))[:, :, :kept].flatten(1)
    rows = tensor.unflatten(0, (layer.groups, width))[:, :kept]
    if layer.scaled:
        rows = torch.cat((rows[: layer.scaled] * (kept / width) ** 0.5, rows[layer.scaled :]))
    return rows.flatten(0, 1)


class Switched:
    """Mixin for a module of a branch that can be off: then it gives out zeros, or what goes in if it is no more than
    a norm or a scale on the way. ``on``: whether it computes."""


@cache
def _prefixed(stock):
    members = {name: property(partial(_prefix, name)) for name in ("weight", "bias")}
    return type(stock.__name__, (Prefixed, stock), members)


@cache
def _switched(stock, computes):
    def forward(self, x, *args, **kwargs):
        if self.on:
            return stock.forward(self, x, *args, **kwargs)
        return torch.zeros_like(x) if computes else x

    return type(stock.__name__, (Switched, stock), {"forward": forward})


# ------------------------------------------------------------------------------------------ blocks


class PrefixBlock:
    """Mixin for a block of a super-network: timm's own, of which ``attn_width`` dimensions per head and ``mlp_width``
    hidden units take part; a width of 0 removes the residual branch with its norm.

    ``parts``: the AttentionPart and MlpPart of ``models.kinds``; ``kind``: the BlockKind.
    """

    @property
    def num_heads(self):
        return self.parts[0].heads

    @property
    def full(self):
        """The widths at which nothing is cut, (attention, MLP)."""
        return tuple(part.width for part in self.parts)

    def set_widths(self, attn_width, mlp_width):
        """From now on keep ``attn_width`` dimensions per head and ``mlp_width`` hidden units."""
        self.attn_width, self.mlp_width = attn_width, mlp_width
        for part, (branch, names), width in zip(self.parts, BRANCHES.items(), (attn_width, mlp_width), strict=True):
            for name in names:
                if hasattr(self, name):
                    getattr(self, name).on = width > 0
            module = getattr(self, branch)
            for layer in part.layers:
                getattr(module, layer.name).keep(width)
            for name, value in part.attributes(width).items() if width else ():
                if hasattr(module, name):
                    setattr(module, name, value)

    def scale_of(self, branch):
        """The LayerScale of a branch, [D], or 1.0 without one."""
        number = 1 if branch == "attn" else 2
        gamma = getattr(getattr(self, f"ls{number}", None), "gamma", None)
        gamma = self._parameters.get(f"gamma_{number}") if gamma is None else gamma
        return 1.0 if gamma is None else gamma.detach()

    def output(self, branch):
        """The Linear of a branch whose output goes to the residual stream, at the present width."""
        return getattr(getattr(self, branch), self.parts[0 if branch == "attn" else 1].output)


def _gamma(name, block):
    """gamma_1 or gamma_2; a branch that is off is not scaled, and gives it no gradient."""
    return block._parameters[name] if getattr(block, GAMMAS[name]).on else 1.0


@cache
def _prefix_block(stock, gammas):
    members = {name: property(partial(_gamma, name)) for name in gammas}
    return type(stock.__name__, (PrefixBlock, stock), members)


def _adopt(block):
    """Make a stock block, in place, one of a super-network. Raises UnsupportedPart."""
    parts, kind, stock = parts_of(block), BLOCKS[type(block)], type(block)
    for part, (branch, names) in zip(parts, BRANCHES.items(), strict=True):
        module = getattr(block, branch)
        for layer in part.layers:
            child = getattr(module, layer.name)
            child.__class__ = _prefixed(type(child))
            child.layer, child.width = layer, part.width
        for name in names:
            if hasattr(block, name):
                child = getattr(block, name)
                child.__class__ = _switched(type(child), computes=name == branch)
    gammas = tuple(name for name in GAMMAS if block._parameters.get(name) is not None)
    block.__class__ = _prefix_block(stock, gammas)
    block.parts, block.kind = parts, kind
    block.set_widths(*block.full)


def as_stock(model):
    """Undo ``as_supernet``, in place, at the full widths."""
    for block in blocks_of(model):
        block.set_widths(*block.full)
    for module in model.modules():
        if isinstance(module, (Prefixed, Switched, PrefixBlock)):
            module.__class__ = type(module).__mro__[2]
            for name in ("layer", "width", "kept", "on", "parts", "kind", "attn_width", "mlp_width"):
                vars(module).pop(name, None)
    return model


# ------------------------------------------------------------------------------------------ models


def check_supported(model, who=""):
    """Raise InputError, with what is supported, if there is no entry for ``model``, its blocks, or a part of them."""
    blocks = [module for module in model.modules() if type(module) in BLOCKS]
    if blocks_of(model):
        raise InputError(f"{who}this {type(model).__name__} is a super-network already")
    if not isinstance(model, MODELS) or not blocks:
        own = sorted({type(module).__name__ for module in model.modules() if "Block" in type(module).__name__})
        of = f" of {', '.join(own[:3])}" if own else ""
        raise InputError(f"{who}a {type(model).__name__}{of} cannot be cut; {supported()}")
    try:
        for block in blocks:
            parts_of(block)
    except UnsupportedPart as error:
        raise InputError(f"{who}the blocks of this {type(model).__name__} have {error}; {supported()}") from None


def as_supernet(model):
    """Make every block of a timm model one whose width can be set, in place; parameters and names stay. It can be
    copied (deepcopy) but not pickled: save its state dict.

    Raises InputError as ``check_supported``.
    """
    check_supported(model)
    for block in [module for module in model.modules() if type(module) in BLOCKS]:
        _adopt(block)
    return model


def supported():
    """What can be cut, in one line."""
    return (
        f"supported are timm's {', '.join(cls.__name__ for cls in MODELS)}, of the parts that 'python -m models' lists"
    )


def class_name(cls):
    module = cls.__module__.split(".")[-1]
    return cls.__name__ if module in ("vision_transformer", "attention", "mlp") else f"{module}.{cls.__name__}"


def blocks_of(model):
    """The blocks of a super-network, in the order in which they run."""
    return [block for _, block in named_blocks(model)]


def named_blocks(model):
    """(dotted name, block) of each block of a super-network, in the order in which they run."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, PrefixBlock)]


class Replay(nn.Module):
    """Stands for a block: takes the stored activation, without one what goes in, through ``block``, if there is one."""

    def __init__(self, activation=None, block=None):
        super().__init__()
        self.activation, self.block = activation, block

    def forward(self, x, *args, **kwargs):
        x = x if self.activation is None else self.activation
        return self.block(x, *args, **kwargs) if self.block else x


@contextmanager
def replaced(model, modules):
    """With ``modules``, {dotted name: module}, in the places of a model's own."""
    own = {name: model.get_submodule(name) for name in modules}
    try:
        for name, module in modules.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)


def set_widths(model, widths):
    """Set the kept widths of every block of a super-network. Raises ValueError if a width does not fit."""
    blocks = blocks_of(model)
    if len(widths.attn) != len(blocks):
        raise ValueError(f"widths for {len(widths.attn)} blocks, the model has {len(blocks)}")
    parts = [part for block in blocks for part in block.parts]
    for kept, part in zip(widths.flat, parts, strict=True):
        if not 0 <= kept <= part.width or (part.whole and 0 < kept < part.width):
            raise ValueError(f"widths {widths} do not fit the model's {full_widths(model)}")
    for block, attn, mlp in zip(blocks, widths.attn, widths.mlp, strict=True):
        block.set_widths(attn, mlp)


def full_widths(model):
    """The Widths at which nothing is cut, of a super-network."""
    return Widths(*(tuple(each) for each in zip(*(block.full for block in blocks_of(model)), strict=True)))


def present_widths(model):
    """The Widths that a super-network computes with now."""
    return Widths(*zip(*((block.attn_width, block.mlp_width) for block in blocks_of(model)), strict=True))
