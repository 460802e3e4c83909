"""A super-network: a timm model with its own modules and names, of which any prefix of every branch can take part.

``as_supernet`` changes the classes of some modules in place: a layer that is cut becomes one of the Prefix classes
below, and what can be switched off becomes a Switched class. State dict, optimiser, DDP and FSDP2 see the full
parameters. A super-network can be pickled, deep-copied and compiled.
"""

from contextlib import contextmanager
from functools import cache

import torch
from timm.layers import LayerNorm, RmsNorm
from torch import nn
from torch.nn import functional as F

from models.vit.families import (
    ATTENTION,
    BLOCKS,
    MLPS,
    MODELS,
    Branch,
    UnsupportedPart,
    leading,
    named_blocks,
    padded_linear,
    stock_branches,
)
from models.vit.widths import Widths
from utils import InputError


class Prefix:
    """What the three layers below share: of every group of ``width`` entries the first ``kept`` take part. layer: the
    Layer of ``families`` that says which entries form a group."""

    def prefix(self, name):
        """The slice: the part of parameter ``name`` that takes part, differentiable in all of the parameter."""
        parameter, layer = getattr(self, name), self.layer
        if parameter is None or self.kept == self.width:
            return parameter
        if layer.side == "in":
            return parameter if name == "bias" else leading(parameter, layer.groups, layer.groups * self.kept)
        rows = parameter.unflatten(0, (layer.groups, self.width))
        whole, rows = rows[: layer.whole].flatten(0, 1), rows[layer.whole :, : self.kept]  # [groups, kept, ...]
        if layer.queries:
            rows = scale_queries(rows, layer.queries, self.kept / self.width)
        return torch.cat((whole, rows.flatten(0, 1))) if layer.whole else rows.flatten(0, 1)

    def extra_repr(self):
        return f"{super().extra_repr()}, kept={self.kept} of {self.width}"


def scale_queries(rows, queries, share):
    """The attention scale: multiply the first ``queries`` groups of ``rows`` by sqrt(k / d), where ``share`` = k / d.

    timm's attention of head width k divides q^T k by sqrt(k). The network was trained with sqrt(d):
        (sqrt(k / d) q)^T k / sqrt(k)  =  q^T k / sqrt(d)
    """
    return torch.cat((rows[:queries] * share**0.5, rows[queries:]))


class PrefixLinear(Prefix, nn.Linear):
    """A Linear of which some rows ('out') or columns ('in') take part.

    folding: function (this Linear, kept) -> (weight, bias) that makes up for what is dropped, or None: plain slices.
    """

    stock, folding = nn.Linear, None

    def forward(self, x):
        if self.folding and self.kept < self.width:
            weight, bias = self.folding(self, self.kept)
        else:
            weight, bias = self.prefix("weight"), self.prefix("bias")
        if self.layer.padded and self.kept < self.width:
            return padded_linear(x, weight, bias, self.layer, self.width)
        return F.linear(x, weight, bias)


class PrefixLayerNorm(Prefix, LayerNorm):
    """A LayerNorm over the entries that take part."""

    stock = LayerNorm

    def forward(self, x):
        return F.layer_norm(x, x.shape[-1:], self.prefix("weight"), self.prefix("bias"), self.eps)


class PrefixRmsNorm(Prefix, RmsNorm):
    """An RmsNorm over the entries that take part."""

    stock = RmsNorm

    def forward(self, x):
        return F.rms_norm(x, x.shape[-1:], self.prefix("weight"), self.eps)


PREFIX_CLASSES = {cls.stock: cls for cls in (PrefixLinear, PrefixLayerNorm, PrefixRmsNorm)}


class Switched:
    """A module that can be switched off, by ``on``. Off, attention and MLP return zeros; norms, LayerScale and DropPath
    return their input."""

    def forward(self, x, *args, **kwargs):
        if self.on:
            return super().forward(x, *args, **kwargs)
        return torch.zeros_like(x) if self.returns_zeros else x

    def extra_repr(self):
        return ", ".join(filter(None, (super().extra_repr(), "" if self.on else "off")))


class SwitchedBlock:
    """A block that has LayerScales as its own parameters ``gamma_1`` and ``gamma_2``. It does not scale a branch that
    is off, so that the scale gets no gradient, as the other parameters of the branch."""

    gamma_1 = property(lambda block: block._parameters.get("gamma_1") if block.attn.on else 1.0)
    gamma_2 = property(lambda block: block._parameters.get("gamma_2") if block.mlp.on else 1.0)


@cache
def _switched(mixin, stock):
    """The class of a timm module ``stock`` with Switched or SwitchedBlock: SwitchedAttention, SwitchedMlp, ..."""
    members = {
        "stock": stock,
        "returns_zeros": stock in ATTENTION or stock in MLPS,
        "__reduce__": lambda module: (_without_state, (mixin, stock), module.__getstate__()),
    }
    return type(f"Switched{stock.__name__}", (mixin, stock), members)


def _without_state(mixin, stock):
    """For pickle, which cannot name a class that is made at run time."""
    cls = _switched(mixin, stock)
    return cls.__new__(cls)


class PrefixBranch(Branch):
    """A branch of a super-network: a prefix of its width takes part."""

    @property
    def part(self):
        """What may be cut, as it was found when the stock model became a super-network."""
        return self.module.part

    @property
    def full(self):
        """The full width: d per head, or M hidden units."""
        return self.part.width

    @property
    def indivisible(self):
        """Whether the branch can only be kept at its full width or dropped."""
        return self.part.indivisible

    @property
    def width(self):
        """The width that takes part now, 0 if the branch is off."""
        if not self.module.on:
            return 0
        return self.full if self.indivisible else self.layers[0][1].kept

    def keep(self, width):
        """From now on let the first ``width`` dimensions of every head, or hidden units, take part; 0: none."""
        for module in (self.module, *self.helpers.values()):
            module.on = width > 0
        for _, module in self.layers:
            module.kept = width or self.full
        if width:
            self.part.set_width(self.module, width)


def branches(supernet):
    """The 2L branches of a super-network as PrefixBranch, in the order of Widths.flat."""
    return [PrefixBranch(path, block, name) for path, block in named_blocks(supernet) for name in ("attn", "mlp")]


def full_widths(supernet):
    """The Widths at which nothing is cut."""
    return Widths.from_flat([branch.full for branch in branches(supernet)])


def current_widths(supernet):
    """The Widths that take part now."""
    return Widths.from_flat([branch.width for branch in branches(supernet)])


def set_widths(supernet, widths):
    """Set the widths that take part from now on. Raises ValueError if one does not fit."""
    own = branches(supernet)
    if len(widths.flat) != len(own):
        raise ValueError(f"widths for {len(widths.attn)} blocks, the model has {len(own) // 2}")
    for branch, width in zip(own, widths.flat, strict=True):
        if not 0 <= width <= branch.full or (branch.indivisible and 0 < width < branch.full):
            raise ValueError(f"widths {widths} do not fit the model's {full_widths(supernet)}")
    for branch, width in zip(own, widths.flat, strict=True):
        branch.keep(width)


@contextmanager
def at_widths(supernet, widths):
    """Set the widths for the body of a ``with`` statement; afterwards, or after an error, those before hold again."""
    before = current_widths(supernet)
    set_widths(supernet, widths)
    try:
        yield supernet
    finally:
        set_widths(supernet, before)


_NAMES = ", ".join(cls.__name__ for cls in MODELS)
SUPPORTED = f"supported are timm's {_NAMES}, of the parts that 'python -m models' lists"


def check_supported(model):
    """Raise InputError, with what is supported, if there is no entry for ``model``, its blocks, or a part of them."""
    kind, blocks = type(model).__name__, named_blocks(model)
    if any(isinstance(module, Switched) for module in model.modules()):
        raise InputError(f"this {kind} is a super-network already")
    if not isinstance(model, MODELS) or not blocks:
        own = sorted({type(module).__name__ for module in model.modules() if "Block" in type(module).__name__})
        of = f" of {', '.join(own[:3])}" if own else ""
        raise InputError(f"a {kind}{of} cannot be cut; {SUPPORTED}")
    try:
        layers = [type(module) for branch in stock_branches(model) for _, module in branch.layers]
    except UnsupportedPart as error:
        raise InputError(f"the blocks of this {kind} have {error}; {SUPPORTED}") from None
    for cls in set(layers) - set(PREFIX_CLASSES):
        raise InputError(f"the blocks of this {kind} have a {cls.__name__} that cannot be cut; {SUPPORTED}")


def as_supernet(model):
    """Make a timm model a super-network, in place, at its full widths; parameters and names stay. Raises InputError as
    ``check_supported``."""
    check_supported(model)
    for branch in stock_branches(model):
        branch.module.part = branch.part
        for layer, module in branch.layers:
            module.__class__ = PREFIX_CLASSES[type(module)]
            module.layer, module.width = layer, branch.part.width
        for module in (branch.module, *branch.helpers.values()):
            module.__class__ = _switched(Switched, type(module))
        if branch.block._parameters.get(branch.gamma) is not None and type(branch.block) in BLOCKS:
            branch.block.__class__ = _switched(SwitchedBlock, type(branch.block))
    set_widths(model, full_widths(model))
    return model


def as_stock(supernet):
    """Undo ``as_supernet``, in place."""
    set_widths(supernet, full_widths(supernet))
    for module in supernet.modules():
        if isinstance(module, (Prefix, Switched, SwitchedBlock)):
            module.__class__ = type(module).stock
            for name in ("part", "layer", "width", "kept", "on", "folding"):
                vars(module).pop(name, None)
    return supernet


def compile_branches(supernet, backend="inductor"):
    """Let attention and MLPs run compiled from now on, in few graphs that serve every width; the state dict stays.

    What is random, as DropPath, is outside of them, and so the same as without.
    """
    torch._dynamo.config.allow_unspec_int_on_nn_module = True  # else there would be a graph for each width
    for branch in branches(supernet):
        branch.module.compile(dynamic=True, backend=backend)


class Replay(nn.Module):
    """Stands in for a block, so that blocks whose result is known are not computed again. Its input, kept as ``seen``,
    is replaced by ``activation`` if there is one, then goes through ``block`` if there is one."""

    def __init__(self, activation=None, block=None):
        super().__init__()
        self.activation, self.block = activation, block

    def forward(self, x, *args, **kwargs):
        self.seen = x
        x = x if self.activation is None else self.activation
        return self.block(x, *args, **kwargs) if self.block else x


@contextmanager
def swapped(model, replacements):
    """Temporarily swap submodules: {dotted name: replacement}."""
    own = {name: model.get_submodule(name) for name in replacements}
    try:
        for name, module in replacements.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in own.items():
            model.set_submodule(name, module)


@contextmanager
def hooks(handles):
    """Remove the hooks ``handles`` at the end of a ``with`` statement, or after an error."""
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def frozen(model):
    """Evaluation mode and no parameter gradients for the body of a ``with`` statement; afterwards all is as before."""
    training, wanted = model.training, [parameter.requires_grad for parameter in model.parameters()]
    model.eval().requires_grad_(False)
    try:
        yield
    finally:
        for parameter, flag in zip(model.parameters(), wanted, strict=True):
            parameter.requires_grad_(flag)
        model.train(training)


def block_inputs(model, images, forward=None):
    """({path: (positional, keyword arguments)} of every block's call, output) of ``forward`` (default: ``model``)."""
    inputs = {}

    def noting(path):
        return lambda _block, args, kwargs: inputs.update({path: (args, kwargs)})

    blocks = named_blocks(model)
    with hooks([block.register_forward_pre_hook(noting(path), with_kwargs=True) for path, block in blocks]):
        output = (forward or model)(images)
    return inputs, output
