"""What can be cut in timm's Vision Transformers, where it lies in the weights, and what may be done to it.

One entry for each kind of attention, of MLP and of block: statistics, bases, slicing, costs and extraction read these
entries and know no family by name. docs/families.md derives each yes and no. Needs torch and timm alone: with
subnetwork.py beside it, the file may be copied.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from timm.layers import Attention, GluMlp, Mlp, SwiGLU
from timm.models import (
    beit,
    eva,
    swin_transformer,
    swin_transformer_v2,
    vision_transformer,
    vision_transformer_relpos,
)
from torch import nn

try:
    from timm.layers.attention import AttentionRope
except ImportError:  # an older timm has no model with it
    AttentionRope = None

# What stage 1 and extraction do to a branch, as they name it where it has to be left out.
TRANSFORMS = ("head width", "V/O basis", "Q/K basis", "mean folding", "hidden order", "compensation", "calibration")


class UnsupportedPart(Exception):
    """A block, an attention or an MLP of which there is no entry."""


@dataclass(frozen=True)
class Layer:
    """What a branch's width means in one of its layers: entries come in ``groups`` of the full width, of each of which
    the first so many are kept. ``side``: 'out' for the rows of a Linear, 'in' for its columns, 'norm' for the entries
    of a norm. ``scaled``: the first so many groups carry the queries, and are multiplied by sqrt(kept / width): stock
    attention of head width k divides by sqrt(k) what the network was trained to divide by sqrt(d).
    """

    name: str
    side: str
    groups: int
    scaled: int = 0


@dataclass(frozen=True)
class Part:
    """One attention or MLP module. ``width``: its full width, d per head or M.

    layers: what a smaller width cuts; empty where the branch can only be kept whole or dropped whole.
    output: the name of the Linear whose output goes to the residual stream.
    left_out: {one of TRANSFORMS: why it would not be exact, or not be possible}.
    """

    width: int
    layers: tuple[Layer, ...]
    output: str
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def whole(self):
        return not self.layers

    def can(self, transform):
        return transform not in self.left_out


@dataclass(frozen=True)
class AttentionPart(Part):
    """``inputs``: the names of the Linears that make q, k and v: one for all three, its rows in that order and
    head-major within each, or one for each."""

    heads: int = 1
    inputs: tuple[str, ...] = ("qkv",)

    def attributes(self, width):
        """What timm's module remembers of its head width, by name; not every class has all of them."""
        return {"head_dim": width, "attn_dim": self.heads * width, "scale": width**-0.5}


@dataclass(frozen=True)
class MlpPart(Part):
    """``inputs``: the names of the Linears before the nonlinearity; ``hidden``: function of the module and of their
    outputs that gives the input of the output layer [..., M]; ``elementwise``: its operations per hidden unit."""

    inputs: tuple[str, ...] = ("fc1",)
    hidden: Callable = None
    elementwise: int = 1

    def attributes(self, width):
        return {}


@dataclass(frozen=True)
class BlockKind:
    """A residual block with branches ``attn`` and ``mlp``, their ``norm1`` and ``norm2``, ``drop_path1`` and
    ``drop_path2``, and, where it has LayerScales, ``ls1`` and ``ls2`` or ``gamma_1`` and ``gamma_2``.

    post_norm: the norm follows the branch. alone: the branches that run on the residual stream by themselves, without
    the block's help (windows, rotary embedding, position bias).
    """

    post_norm: bool = False
    alone: tuple[str, ...] = ()


def _present(module, *names):
    """The first of ``names`` that ``module`` has and that does something, or None."""
    return next((n for n in names if not isinstance(getattr(module, n, None), (nn.Identity, type(None)))), None)


# ------------------------------------------------------------------------------------------ attention


def _softmax_attention(module):
    """q, k, v in one Linear, softmax(q k^T + anything that does not depend on the head's dimensions) v, then proj."""
    heads = module.num_heads
    for name, what in (("norm", "a norm"), ("gate", "a gate")):
        if _present(module, name):
            reason = f"{what} stands between the heads and proj, and mixes or weighs their dimensions"
            return _whole_attention(module, reason)
    layers, left_out = [Layer("qkv", "out", 3 * heads, heads), Layer("proj", "in", heads)], {}
    if _present(module, "q_norm"):
        if getattr(module.q_norm, "weight", None) is None:
            return _whole_attention(
                module, "the q/k norm has no weight that could take up the scale of a narrower head"
            )
        layers[0] = Layer("qkv", "out", 3 * heads)
        layers += [Layer("q_norm", "norm", 1, 1), Layer("k_norm", "norm", 1)]
        left_out["Q/K basis"] = "q and k are normalised per dimension: only an order common to all heads is exact"
    if module.qkv.bias is None or module.proj.bias is None:
        left_out["mean folding"] = "there is no bias in qkv, or none in proj, to fold means into"
    width = module.qkv.out_features // (3 * heads)
    return AttentionPart(width, tuple(layers), "proj", left_out, heads)


def _whole_attention(module, reason):
    """Attention that is kept whole or dropped whole."""
    left_out = dict.fromkeys(("head width", "V/O basis", "Q/K basis", "mean folding"), reason)
    inputs = ("qkv",) if getattr(module, "qkv", None) is not None else ("q_proj", "k_proj", "v_proj")
    width = module.proj.in_features // module.num_heads
    return AttentionPart(width, (), "proj", left_out, module.num_heads, inputs)


def _fixed_attention(module):
    return _whole_attention(
        module, "timm's module gives its heads together the width of its input: none can be narrower"
    )


def _rotary_attention(module):
    reason = "the rotation has the full head width, and in timm's module v is as wide as q and k: none can be narrower"
    return _whole_attention(module, reason)


ATTENTION = {
    Attention: _softmax_attention,
    swin_transformer.WindowAttention: _softmax_attention,
    beit.Attention: _fixed_attention,
    eva.EvaAttention: _fixed_attention,
    swin_transformer_v2.WindowAttention: _fixed_attention,
    vision_transformer_relpos.RelPosAttention: _fixed_attention,
}
if AttentionRope:
    ATTENTION[AttentionRope] = _rotary_attention


# ------------------------------------------------------------------------------------------ MLPs


def _mlp(module, inputs, groups, hidden, elementwise):
    if not isinstance(module.fc2, nn.Linear):
        raise UnsupportedPart("an MLP of convolutions")
    layers, left_out = [Layer(name, "out", groups) for name in inputs], {}
    if _present(module, "norm"):
        layers.append(Layer("norm", "norm", 1))
        left_out["compensation"] = "a norm over the hidden units sees other ones once some are gone"
    elif module.fc2.bias is None:
        left_out["compensation"] = "fc2 has no bias to fold means into"
    layers.append(Layer("fc2", "in", 1))
    return MlpPart(module.fc2.in_features, tuple(layers), "fc2", left_out, inputs, hidden, elementwise)


def _plain_mlp(module):
    return _mlp(module, ("fc1",), 1, lambda mlp, x: mlp.norm(mlp.act(x)), 1)


def _packed_gated_mlp(module):
    """fc1 makes both halves of each pair: rows [gate; value], or the other way round."""

    def hidden(mlp, x):
        first, second = x.chunk(2, dim=-1)
        return mlp.norm(first * mlp.act(second) if mlp.gate_last else mlp.act(first) * second)

    return _mlp(module, ("fc1",), 2, hidden, 2)


def _gated_mlp(module):
    return _mlp(module, ("fc1_g", "fc1_x"), 1, lambda mlp, gate, x: mlp.norm(mlp.act(gate) * x), 2)


MLPS = {Mlp: _plain_mlp, GluMlp: _packed_gated_mlp, SwiGLU: _gated_mlp}


# ------------------------------------------------------------------------------------------ blocks

BLOCKS = {
    vision_transformer.Block: BlockKind(alone=("attn", "mlp")),
    vision_transformer.ResPostBlock: BlockKind(post_norm=True, alone=("attn", "mlp")),
    beit.Block: BlockKind(),
    eva.EvaBlock: BlockKind(),
    eva.EvaBlockPostNorm: BlockKind(post_norm=True),
    swin_transformer.SwinTransformerBlock: BlockKind(alone=("mlp",)),
    swin_transformer_v2.SwinTransformerV2Block: BlockKind(post_norm=True, alone=("mlp",)),
    vision_transformer_relpos.RelPosBlock: BlockKind(),
    vision_transformer_relpos.ResPostRelPosBlock: BlockKind(post_norm=True),
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


def block_paths(model):
    """The dotted names of a stock model's blocks, in the order in which they run."""
    return [name for name, module in model.named_modules() if type(module) in BLOCKS]


def parts_of(block):
    """(AttentionPart, MlpPart) of a stock block. Raises UnsupportedPart for a module of which there is no entry."""
    kind, parts = BLOCKS[type(block)], []
    for table, module in ((ATTENTION, block.attn), (MLPS, block.mlp)):
        if type(module) not in table:
            raise UnsupportedPart(f"a {type(module).__name__}")
        parts.append(table[type(module)](module))
        if kind.post_norm:
            parts[-1].left_out["calibration"] = "a norm follows the output layer: no linear least squares"
    return tuple(parts)


# ------------------------------------------------------------------------------------------ narrower modules


def narrow(module, part, width):
    """Give a stock attention or MLP the width ``width``, in place; what is cut is new, on the default device."""
    if width == part.width:
        return
    if part.whole:
        raise ValueError(f"width {width} of a {type(module).__name__} that can only be kept whole, at {part.width}")
    for layer in part.layers:
        setattr(module, layer.name, _resized(getattr(module, layer.name), layer, width))
    for name, value in part.attributes(width).items():
        if hasattr(module, name):
            setattr(module, name, value)


def _resized(full, layer, width):
    size = layer.groups * width
    if layer.side == "norm":
        for name, parameter in list(full.named_parameters()):
            setattr(full, name, nn.Parameter(torch.empty(size, dtype=parameter.dtype)))
        full.normalized_shape = (size,)
        return full
    rows, columns = (size, full.in_features) if layer.side == "out" else (full.out_features, size)
    return nn.Linear(columns, rows, bias=full.bias is not None, dtype=full.weight.dtype)
