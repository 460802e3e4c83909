"""What can be cut in timm's Vision Transformers, where it lies in the weights, and what may be done to it.

There is one entry for each class of attention, of MLP and of block. Statistics, bases, slicing, costs and extraction
read these entries and know no family by name. docs/families.md gives the reason for each yes and no. The file needs
torch and timm alone: with subnet/load.py and weights.py beside it, it may be copied.
"""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from functools import cached_property, partial

import torch
from timm.layers import Attention, AttentionRope, GluMlp, Mlp, SwiGLU
from timm.models import beit, eva, swin_transformer, swin_transformer_v2, vision_transformer, vision_transformer_relpos
from timm.models.convmixer import Residual
from torch import nn
from torch.nn import functional as F


class Transform(Enum):
    """What stages 1 and 3 do to a branch. The values are the words that users read."""

    HEAD_WIDTH = "head width"
    VO_BASIS = "V/O basis"
    QK_BASIS = "Q/K basis"
    MEAN_FOLDING = "mean folding"
    COMPENSATION = "compensation"
    CALIBRATION = "calibration"


class UnsupportedPart(Exception):
    """A block, an attention or an MLP for which there is no entry."""


@dataclass(frozen=True)
class Layer:
    """How the width of a branch shows in one of its layers.

    The layer's entries are ``groups`` runs of the full width, e.g. q, k, v x heads. Cutting to k keeps the first k of
    every group. side: 'out' if the entries are rows of a Linear, 'in' if columns, 'norm' if elements of a norm.
    queries: the number of groups, from the first, that make queries (``supernet.scale_queries``). whole: the number of
    groups, from the first, that are never cut. padded: the module goes on with the full width (``PaddedLinear``).
    """

    name: str
    side: str
    groups: int
    queries: int = 0
    whole: int = 0
    padded: bool = False


@dataclass(frozen=True)
class Part:
    """What may be cut of one attention or MLP module.

    width: the full width, d per head or M hidden units.
    layers: the layers that a smaller width cuts. Empty if the module is indivisible: kept as it is, or dropped.
    output: the name of the Linear whose output goes to the residual stream.
    left_out: {Transform: why it would not be exact, or is not possible}.
    """

    width: int
    layers: tuple[Layer, ...]
    output: str
    left_out: dict[Transform, str] = field(default_factory=dict)

    @property
    def indivisible(self):
        return not self.layers

    def can(self, transform):
        return transform not in self.left_out

    def set_width(self, module, width):
        """Tell a timm module its width: most do not know it."""


@dataclass(frozen=True)
class AttentionPart(Part):
    """inputs: the names of the Linears that make q, k and v. One Linear makes all three, with rows in that order and
    head-major within each; or there is one for each. keys: whether q and k get narrower together with v. separate:
    timm's ``qkv_bias_separate``."""

    heads: int = 1
    inputs: tuple[str, ...] = ("qkv",)
    keys: bool = True
    separate: bool = False

    def set_width(self, module, width):
        """Tell a timm module its head width.

        The scale is timm's 1 / sqrt(k); ``supernet.scale_queries`` makes up for its difference from 1 / sqrt(d). Where
        v alone is narrower, timm's forward is made to call ``qkv`` in place of reading its weight.
        """
        told = {"head_dim": width, "attn_dim": self.heads * width, "scale": width**-0.5}
        told = told if self.keys else {"qkv_bias_separate": self.separate or width < self.width}
        for name, value in told.items():
            if hasattr(module, name):  # not every class has all of them
                setattr(module, name, value)


@dataclass(frozen=True)
class MlpPart(Part):
    """inputs: the names of the Linears before the nonlinearity. hidden: function (module, *their outputs) -> input of
    the output layer [..., M]. gated: a hidden unit is the product of a pair, of which the activation takes one."""

    inputs: tuple[str, ...] = ("fc1",)
    hidden: Callable = None
    gated: bool = False


@dataclass(frozen=True)
class BlockFamily:
    """A residual block with branches ``attn`` and ``mlp``, norms ``norm1`` and ``norm2``, ``drop_path1`` and
    ``drop_path2``, and LayerScales ``ls1`` and ``ls2`` or ``gamma_1`` and ``gamma_2`` if it has any.

    post_norm: the norm follows the branch. self_contained: the branches that need nothing from the block around them
    (no windows, no rotary embedding, no position bias).
    """

    post_norm: bool = False
    self_contained: tuple[str, ...] = ()


def _acts(module, name):
    """Whether ``module`` has a child ``name`` that does something."""
    return not isinstance(getattr(module, name, None), (nn.Identity, type(None)))


# ------------------------------------------------------------------------------------------ attention


def _attention(module, only_v=None):
    """q, k, v, softmax(anything that v has no part in) v, then proj. only_v: why q and k are not cut, in a class whose
    forward has one width for q, k and v; v is padded there."""
    heads = module.num_heads
    inputs = ("qkv",) if getattr(module, "qkv", None) is not None else ("q_proj", "k_proj", "v_proj")
    width = module.proj.in_features // heads
    separate, reason = getattr(module, "qkv_bias_separate", False), _indivisible(module, only_v)
    if reason:
        transforms = [transform for transform in Transform if transform is not Transform.CALIBRATION]
        return AttentionPart(width, (), "proj", dict.fromkeys(transforms, reason), heads, inputs, False, separate)
    left_out, source = {}, getattr(module, inputs[-1])
    if only_v:
        left_out[Transform.QK_BASIS] = only_v
        whole = 2 * heads if inputs == ("qkv",) else 0
        layers = [Layer(inputs[-1], "out", whole + heads, whole=whole, padded=True)]
        layers += [Layer("proj", "in", heads, padded=True)]
    elif _acts(module, "q_norm"):
        left_out[Transform.QK_BASIS] = (
            "q and k are normalised per dimension: only an order common to all heads is exact"
        )
        layers = [Layer("qkv", "out", 3 * heads), Layer("proj", "in", heads)]
        layers += [Layer("q_norm", "norm", 1, 1), Layer("k_norm", "norm", 1)]
    else:
        layers = [Layer("qkv", "out", 3 * heads, heads), Layer("proj", "in", heads)]
    if (source.bias is None and getattr(module, "v_bias", None) is None) or module.proj.bias is None:
        left_out[Transform.MEAN_FOLDING] = "there is no bias of v, or none in proj, to fold means into"
    if module.proj.bias is None:
        left_out[Transform.COMPENSATION] = "proj has no bias to fold means into"
    return AttentionPart(width, tuple(layers), "proj", left_out, heads, inputs, not only_v, separate)


def _indivisible(module, only_v):
    """Why no head of an attention module can be narrower, or None."""
    for name, what in (("norm", "a norm"), ("gate", "a gate")):
        if _acts(module, name):
            return f"{what} stands between the heads and proj, and mixes or weighs their dimensions"
    if getattr(module, "num_kv_heads", module.num_heads) != module.num_heads:
        return "several heads share one k and v"
    if not only_v and _acts(module, "q_norm") and getattr(module.q_norm, "weight", None) is None:
        return "the q/k norm has no weight that could take up the scale of a narrower head"
    return None


_rotary_attention = partial(_attention, only_v="rotary positions, where there are any, turn pairs of their dimensions")
_biased_attention = partial(_attention, only_v="timm's forward has one head width, which v alone can be padded to")
_cosine_attention = partial(_attention, only_v="q and k are normalised to unit length, of all their dimensions")

ATTENTION = {
    Attention: _attention,
    swin_transformer.WindowAttention: _attention,
    beit.Attention: _biased_attention,
    eva.EvaAttention: _rotary_attention,
    swin_transformer_v2.WindowAttention: _cosine_attention,
    vision_transformer_relpos.RelPosAttention: _biased_attention,
    AttentionRope: _rotary_attention,
}


# ------------------------------------------------------------------------------------------ MLPs


def _mlp(module, inputs, groups, hidden, gated=False):
    """inputs, hidden, gated: of MlpPart. groups: in each of the ``inputs``."""
    if not isinstance(module.fc2, nn.Linear):
        raise UnsupportedPart("an MLP of convolutions")
    layers, left_out = [Layer(name, "out", groups) for name in inputs], {}
    if _acts(module, "norm"):
        layers.append(Layer("norm", "norm", 1))
        if getattr(module.norm, "bias", None) is None:
            left_out[Transform.COMPENSATION] = "the norm over the hidden units is not a LayerNorm with a bias"
    if module.fc2.bias is None:
        left_out[Transform.COMPENSATION] = "fc2 has no bias to fold means into"
    layers.append(Layer("fc2", "in", 1))
    return MlpPart(module.fc2.in_features, tuple(layers), "fc2", left_out, inputs, hidden, gated)


def _plain_hidden(mlp, x):
    return mlp.norm(mlp.act(x))


def _packed_gated_hidden(mlp, x):
    """fc1 makes both halves of each pair. Its rows are [gate; value], or the other way round."""
    first, second = x.chunk(2, dim=-1)
    return mlp.norm(first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second)


def _gated_hidden(mlp, gate, x):
    return mlp.norm(mlp.act(gate) * x)


MLPS = {
    Mlp: partial(_mlp, inputs=("fc1",), groups=1, hidden=_plain_hidden),
    GluMlp: partial(_mlp, inputs=("fc1",), groups=2, hidden=_packed_gated_hidden, gated=True),
    SwiGLU: partial(_mlp, inputs=("fc1_g", "fc1_x"), groups=1, hidden=_gated_hidden, gated=True),
}


# ------------------------------------------------------------------------------------------ blocks and models

BLOCKS = {
    vision_transformer.Block: BlockFamily(self_contained=("attn", "mlp")),
    vision_transformer.ResPostBlock: BlockFamily(post_norm=True, self_contained=("attn", "mlp")),
    beit.Block: BlockFamily(),
    eva.EvaBlock: BlockFamily(),
    eva.EvaBlockPostNorm: BlockFamily(post_norm=True),
    swin_transformer.SwinTransformerBlock: BlockFamily(self_contained=("mlp",)),
    swin_transformer_v2.SwinTransformerV2Block: BlockFamily(post_norm=True, self_contained=("mlp",)),
    vision_transformer_relpos.RelPosBlock: BlockFamily(),
    vision_transformer_relpos.ResPostRelPosBlock: BlockFamily(post_norm=True),
}

# Models that run their blocks one after the other, with nothing but the merging of patches in between.
MODELS = (
    vision_transformer.VisionTransformer,
    beit.Beit,
    eva.Eva,
    swin_transformer.SwinTransformer,
    swin_transformer_v2.SwinTransformerV2,
    vision_transformer_relpos.VisionTransformerRelPos,
)


def entry_of(module, table):
    """The entry of ``table`` for a module of timm's, also where a super-network has given it a class of its own."""
    return table.get(getattr(type(module), "stock", type(module)))


def named_blocks(model):
    """[(dotted name, block)] of a stock model or a super-network, in the order in which the blocks run."""
    return [(name, module) for name, module in model.named_modules() if entry_of(module, BLOCKS)]


# ------------------------------------------------------------------------------------------ branches


class Branch:
    """One residual branch of a block: x + drop_path(scale * module(norm(x))), or with the norm after the module.

    The branch is the unit of the whole method. path: the dotted name of the block; name: 'attn' or 'mlp'; block: the
    module whose attributes are the modules of the branch; gamma: the name of a LayerScale that is a parameter of the
    block itself.
    """

    def __init__(self, path, block, name):
        self.path, self.block, self.name, self.number = path, block, name, {"attn": 1, "mlp": 2}[name]
        self.gamma = f"gamma_{self.number}"

    def __str__(self):
        return f"{self.path}.{self.name}"

    @property
    def module(self):
        """The attention or MLP, or None if the branch has been removed."""
        module = getattr(self.block, self.name, None)
        return None if isinstance(module, ZeroBranch) else module

    @property
    def norm(self):
        return getattr(self.block, f"norm{self.number}")

    @property
    def drop_path(self):
        return getattr(self.block, f"drop_path{self.number}")

    @property
    def helpers(self):
        """{name: module} of norm, LayerScale and DropPath, in this order, those that the block has."""
        names = [f"{helper}{self.number}" for helper in ("norm", "ls", "drop_path")]
        return {name: getattr(self.block, name) for name in names if hasattr(self.block, name)}

    @property
    def scale(self):
        """The LayerScale, [D], or 1.0 if there is none."""
        gamma = getattr(getattr(self.block, f"ls{self.number}", None), "gamma", None)
        gamma = self.block._parameters.get(self.gamma) if gamma is None else gamma
        return 1.0 if gamma is None else gamma.detach()

    @property
    def output(self):
        """The Linear whose output goes to the residual stream."""
        return getattr(self.module, self.part.output)

    @property
    def layers(self):
        """[(Layer, module)] of the layers that a smaller width cuts."""
        return [(layer, getattr(self.module, layer.name)) for layer in self.part.layers]

    @property
    def family(self):
        return entry_of(self.block, BLOCKS)

    @cached_property
    def part(self):
        """What may be cut, a Part. Raises UnsupportedPart if there is no entry for the module's class."""
        entry = entry_of(self.module, ATTENTION if self.name == "attn" else MLPS)
        if entry is None:
            raise UnsupportedPart(f"a {type(self.module).__name__}")
        part = entry(self.module)
        if self.family.post_norm:
            reason = "a norm follows the output layer: no linear least squares"
            part = replace(part, left_out=part.left_out | {Transform.CALIBRATION: reason})
        return part


def stock_branches(model):
    """The 2L branches of a stock model, in the order of Widths.flat."""
    return [Branch(path, block, name) for path, block in named_blocks(model) for name in ("attn", "mlp")]


def branch_in(subnet, branch):
    """The Branch of an extracted network that stands where ``branch`` stands in its super-network."""
    block = subnet.get_submodule(branch.path)
    return Branch(branch.path, getattr(block, "fn", block), branch.name)


# ------------------------------------------------------------------------------------------ narrower networks


def narrow(network, attn, mlp):
    """Give a stock timm model ``attn[b]`` dimensions per head and ``mlp[b]`` hidden units in block b, in place.

    A width of 0 removes the branch. The layers that are cut are new, on the default device, and not initialised; the
    others stay. Raises ValueError if a width is not possible.
    """
    for (path, block), *widths in zip(named_blocks(network), attn, mlp, strict=True):
        network.set_submodule(path, _narrow_block(path, block, *widths))


def _narrow_block(path, block, attn_width, mlp_width):
    """The replacement of one stock block. timm's Residual around norm and branch, if the only branch left is
    self-contained; an Identity, if none is left in a block with self-contained branches; else the block itself, with
    ``ZeroBranch`` for a removed branch."""
    branches = [(Branch(path, block, "attn"), attn_width), (Branch(path, block, "mlp"), mlp_width)]
    left = [branch for branch, width in branches if width]
    for branch, width in branches:
        if width:
            _narrow_module(branch, width)
    self_contained = entry_of(block, BLOCKS).self_contained
    if self_contained and not left:
        return nn.Identity()
    if len(left) == 1 and left[0].name in self_contained:
        return Residual(_in_sequence(left[0]))
    for branch, width in branches:
        if not width:
            _remove(branch)
    return block


def _narrow_module(branch, width):
    part, module = branch.part, branch.module
    if width == part.width:
        return
    if not 0 < width < part.width:
        raise ValueError(f"{branch}: width {width} is not between 0 and {part.width}")
    if part.indivisible:
        raise ValueError(
            f"{branch}: width {width} of a {type(module).__name__}, which can only be kept at {part.width}"
        )
    for layer, full in branch.layers:
        setattr(module, layer.name, _resized(full, layer, width, part.width))
    part.set_width(module, width)


def _resized(full, layer, width, full_width):
    size = layer.whole * full_width + (layer.groups - layer.whole) * width
    if layer.side == "norm":
        for name, parameter in list(full.named_parameters()):
            setattr(full, name, nn.Parameter(torch.empty(size, dtype=parameter.dtype)))
        full.normalized_shape = (size,)
        return full
    rows, columns = (size, full.in_features) if layer.side == "out" else (full.out_features, size)
    linear = partial(PaddedLinear, layer, full_width) if layer.padded else nn.Linear
    return linear(columns, rows, bias=full.bias is not None, dtype=full.weight.dtype)


def _in_sequence(branch):
    """The modules of one branch by their names in the block, in the order in which they run."""
    (norm, *others), module = branch.helpers.items(), (branch.name, branch.module)
    return nn.Sequential(OrderedDict([*((module, norm) if branch.family.post_norm else (norm, module)), *others]))


def _remove(branch):
    """Take a branch out of a block whose forward goes on calling it."""
    setattr(branch.block, branch.name, ZeroBranch())
    for name in branch.helpers:
        setattr(branch.block, name, nn.Identity())
    if branch.block._parameters.pop(branch.gamma, None) is not None:
        setattr(branch.block, branch.gamma, 1.0)


class ZeroBranch(nn.Module):
    """Stands for a removed attention or MLP in a block that goes on calling it. Returns zeros."""

    def forward(self, x, *_args, **_kwargs):
        return torch.zeros_like(x)


class PaddedLinear(nn.Linear):
    """The Linear before or after the heads of attention whose forward has one width for q, k and v.

    Before: v of narrower heads is filled up with zeros to the full ``width``. After: of every head's z the dimensions
    that are there are taken. So timm's forward stays as it is, and nothing is computed in the Linears of what is gone.
    layer: its Layer.
    """

    def __init__(self, layer, width, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.layer, self.width = layer, width

    def forward(self, x):
        return padded_linear(x, self.weight, self.bias, self.layer, self.width)


def padded_linear(x, weight, bias, layer, width):
    """``F.linear`` with the ``weight`` and ``bias`` that are left of a padded ``layer`` of full ``width``."""
    if layer.side == "in":
        return F.linear(leading(x, layer.groups, weight.shape[1]), weight, bias)
    out, whole = F.linear(x, weight, bias), layer.whole * width
    v = out[..., whole:].unflatten(-1, (layer.groups - layer.whole, -1))
    v = F.pad(v, (0, width - v.shape[-1])).flatten(-2)
    return torch.cat((out[..., :whole], v), -1) if whole else v


def leading(x, groups, size):
    """The first entries of each of ``groups`` runs of x [..., n], [..., size]."""
    return x if x.shape[-1] == size else x.unflatten(-1, (groups, -1))[..., : size // groups].flatten(-2)


# What an extracted network may have besides timm's and torch's modules.
OWN_MODULES = (PaddedLinear, ZeroBranch)
