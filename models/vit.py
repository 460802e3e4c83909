"""Creating and loading a pre-trained ViT, and turning it into a network whose branches can be any prefix wide."""

import argparse
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.layers import Attention, Mlp
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import nn
from torch.nn import functional as F

from models.width_table import Widths
from utils import InputError

# Short names for the networks of the paper and for the two small ones that the data sets at hand can train.
ALIASES = {
    "vit_tiny": ("deit_tiny_patch16_224", {}),
    "vit_small": ("deit_small_patch16_224", {}),
    "vit_base": ("deit_base_patch16_224", {}),
    "vit_digits": (
        "vit_tiny_patch16_224",
        {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4},
    ),
    "vit_fashion": (
        "vit_tiny_patch16_224",
        {"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 4, "num_heads": 4},
    ),
}


@dataclass(frozen=True)
class ModelSpec:
    """What is needed to build a network of stock modules: a name, the number of classes and the image size.

    ``name`` is an alias above or any timm name; ``img_size`` is in pixels, None for the model's own.
    """

    name: str
    num_classes: int
    img_size: int | None = None

    def timm_call(self):
        """(name, keyword arguments) with which timm.create_model builds it, the number of classes apart."""
        timm_name, fixed = ALIASES.get(self.name, (self.name, {}))
        return timm_name, fixed if self.img_size is None else fixed | {"img_size": self.img_size}

    def build(self, pretrained=False, **kwargs):
        """The timm VisionTransformer. Raises InputError for an unknown name or one that is no VisionTransformer."""
        timm_name, arguments = self.timm_call()
        if not timm.is_model(timm_name):
            raise InputError(
                f"--model {self.name}: neither one of {', '.join(ALIASES)} nor a timm name; "
                "timm.list_models('vit*') lists those"
            )
        arguments = {"pretrained": pretrained, "num_classes": self.num_classes} | arguments | kwargs
        model = timm.create_model(timm_name, **arguments)
        if not isinstance(model, VisionTransformer):
            raise InputError(f"--model {self.name}: a {type(model).__name__}; supported is timm's VisionTransformer")
        patch = model.patch_embed.feat_ratio(as_scalar=True)
        if self.img_size is not None and self.img_size % patch:
            raise InputError(f"--input_size {self.img_size}: not a multiple of the model's patches of {patch} pixels")
        return model


def default_num_classes(name):
    """The number of classes of the published weights of ``name``."""
    timm_name, _ = ALIASES.get(name, (name, {}))
    return timm.get_pretrained_cfg_value(timm_name, "num_classes") if timm.is_model(timm_name) else None


# ------------------------------------------------------------------------------------------ weights


def read_checkpoint(path):
    """Read a .safetensors or torch.save file, weights-only. Returns its dict; a bare state dict becomes {'model': it}.

    Raises InputError if the file is missing, damaged, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a checkpoint (.pth with a 'model' member, or .safetensors)")
    try:
        if path.suffix == ".safetensors":
            content = load_file(path)
        else:
            _check_sums(path)
            # Published checkpoints hold their argparse.Namespace, which a weights-only load does not know by itself.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        # torch's advice, to load it regardless, is left out.
        reason = re.search(r"GLOBAL \S+|Unsupported operand \d+", str(error))
        raise InputError(
            f"{path}: refused, it holds more than weights and plain values ({reason[0] if reason else 'a pickle'})"
        ) from None
    except Exception as error:  # safetensors and torch raise a dozen kinds for a damaged file
        reason = f"{type(error).__name__} {error}".split("\n")[0].split(". ")[0].strip()
        raise InputError(
            f"{path}: not a readable checkpoint ({reason}); expected a file of torch.save, or .safetensors"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; expected a dict of tensors")
    if "model" not in content:
        content = {"model": content.get("state_dict", content)}
    for member in ("model", "model_ema"):
        if member == "model" or content.get(member) is not None:
            content[member] = _state_dict(content[member], member, path)
    return content


def _state_dict(state, member, path):
    """``state`` without the prefix of a wrapped model. Raises InputError if it is none."""
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())
    ):
        raise InputError(f"{path}: no state dict found; expected a '{member}' member or a bare dict of tensors")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _check_sums(path):
    """Raise InputError if a checksum in a torch.save archive does not hold: torch.load itself does not look at them.

    torch.save can be told to leave them out (set_crc32_options), and files of torch before 1.6 are no archives.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if any(info.CRC for info in archive.infolist()) else None
        if damaged:
            raise InputError(f"{path}: damaged, the checksum of its member {damaged} is wrong; fetch or copy it again")


def classes_of(state):
    """The number of classes of a state dict's classifier, 0 without one."""
    weight = state.get("head.weight")
    return len(weight) if weight is not None and weight.ndim else 0


def load_weights(model, state, source, replace_head=False):
    """Load ``state`` strictly into ``model``; positional embeddings are resampled to its image size, as timm does.

    With ``replace_head`` a classifier of another size is left at its fresh initialisation. ``source`` is named in
    errors. Returns a list of remarks for the user. Raises InputError if names or shapes do not fit.
    """
    if isinstance(model, VisionTransformer):
        try:
            state = checkpoint_filter_fn(dict(state), model)
        except Exception as error:  # it reshapes by name, and fails in whatever way another network's tensors make it
            raise InputError(f"{source}: does not fit the model ({type(error).__name__}: {error})") from None
    own, remarks = model.state_dict(), []
    head, own_head = ({n: v for n, v in s.items() if n.startswith(("head.", "head_dist."))} for s in (state, own))
    if replace_head and {n: v.shape for n, v in head.items()} != {n: v.shape for n, v in own_head.items()}:
        was = f"has {classes_of(head)} classes" if "head.weight" in head else "is not there"
        now = f"replaced by a new one for {model.num_classes}" if own_head else "left out"
        remarks.append(f"the classifier of {source} {was}: {now}")
        state = {name: value for name, value in state.items() if name not in head} | own_head
    wrong = [
        f"{name} is {tuple(state[name].shape)} there and {tuple(own[name].shape)} in the model"
        for name in own
        if name in state and state[name].shape != own[name].shape
    ]
    wrong += [f"{name} is missing" for name in own if name not in state]
    wrong += [f"{name} is unknown to the model" for name in state if name not in own]
    if wrong:
        more = f" (and {len(wrong) - 2} more)" if len(wrong) > 2 else ""
        raise InputError(f"{source}: does not fit the model: {'; '.join(wrong[:2])}{more}")
    bad = next((name for name, value in state.items() if not torch.isfinite(value).all()), None)
    if bad:
        raise InputError(f"{source}: {bad} holds NaN or infinite values")
    model.load_state_dict(state)
    return remarks


def load_pretrained(spec, path=None, **kwargs):
    """Build ``spec`` with pre-trained weights: from the file ``path``, else from timm's hub.

    Returns (model, remarks). Raises InputError with what to download, and where to put it, if there is no network.
    """
    if path:
        model = spec.build(**kwargs)
        return model, load_weights(model, read_checkpoint(path)["model"], path, replace_head=True)
    with torch.device("meta"):
        spec.build()  # refuses what is no VisionTransformer before anything is downloaded
    timm_name, changes = ALIASES.get(spec.name, (spec.name, {}))
    published, cfg = default_num_classes(spec.name), timm.get_pretrained_cfg(timm_name)
    if changes or cfg is None or not (cfg.hf_hub_id or cfg.url):
        raise InputError(f"--model {spec.name}: there are no published weights; give --pretrained FILE")
    try:
        model = spec.build(pretrained=True, **kwargs)
    except Exception as error:  # the hub client, its HTTP library and the file system each have their own kinds
        raise not_downloaded("--model", timm_name, "--pretrained", error) from None
    changed = published != spec.num_classes
    return model, [f"the published classifier has {published} classes: replaced"] if changed else []


def not_downloaded(flag, timm_name, instead, error):
    """The InputError that says what to fetch, and how to give it, where timm's hub cannot be reached."""
    cfg = timm.get_pretrained_cfg(timm_name)
    return InputError(
        f"{flag} {timm_name}: the published weights could not be downloaded ({type(error).__name__}). Fetch "
        f"'{(cfg and cfg.hf_hub_id) or timm_name}' (model.safetensors, or DeiT's .pth) on a machine with a network and "
        f"give it with {instead} FILE"
    )


# ------------------------------------------------------------------------------------------ prefix slicing


class PrefixLinear(nn.Linear):
    """A Linear whose rows (``side='out'``) or columns (``'in'``) come in ``groups`` of ``width``, of which only the
    first ``kept`` of each take part. Parameters and state-dict names are those of the Linear it is made from.

    qkv has 3H groups of d rows, proj H groups of d columns, fc1 and fc2 one group of M.

    ``scaled_groups``: the first so many groups of rows are multiplied by sqrt(kept / width). The queries need it:
    a stock attention module of head width k divides the logits by sqrt(k), while the network was trained with
    sqrt(d). The factor makes the two equal, here and in the extracted network alike.
    """

    def __init__(self, linear, side, groups, scaled_groups=0):
        super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        self.weight, self.bias = linear.weight, linear.bias
        self.side, self.groups, self.scaled_groups = side, groups, scaled_groups
        self.width = (self.out_features if side == "out" else self.in_features) // groups
        self.kept = self.width

    def prefix(self):
        """(weight, bias) of the kept part, differentiable in the full parameters."""
        if self.kept == self.width:
            return self.weight, self.bias
        if self.side == "in":
            weight = self.weight.unflatten(1, (self.groups, self.width))[:, :, : self.kept].flatten(1)
            return weight, self.bias
        weight = self._kept_rows(self.weight)
        return weight, None if self.bias is None else self._kept_rows(self.bias)

    def _kept_rows(self, tensor):
        rows = tensor.unflatten(0, (self.groups, self.width))[:, : self.kept]
        if self.scaled_groups:
            scale = (self.kept / self.width) ** 0.5
            rows = torch.cat((rows[: self.scaled_groups] * scale, rows[self.scaled_groups :]))
        return rows.flatten(0, 1)

    def forward(self, x):
        return F.linear(x, *self.prefix())


class PrefixBlock(nn.Module):
    """A timm Block that keeps the first ``attn_width`` dimensions of each head and the first ``mlp_width`` hidden
    units; a width of 0 removes the residual branch and its norm. State-dict names are the Block's."""

    def __init__(self, block):
        super().__init__()
        for name, child in block.named_children():
            self.add_module(name, child)
        attn, mlp = self.attn, self.mlp
        self.num_heads = attn.num_heads
        attn.qkv = PrefixLinear(attn.qkv, "out", 3 * attn.num_heads, scaled_groups=attn.num_heads)
        attn.proj = PrefixLinear(attn.proj, "in", attn.num_heads)
        mlp.fc1 = PrefixLinear(mlp.fc1, "out", 1)
        mlp.fc2 = PrefixLinear(mlp.fc2, "in", 1)
        self.set_widths(attn.qkv.width, mlp.fc1.width)

    def set_widths(self, attn_width, mlp_width):
        """From now on keep ``attn_width`` dimensions per head and ``mlp_width`` hidden units."""
        self.attn_width, self.mlp_width = attn_width, mlp_width
        if attn_width:
            # What timm's Attention(attn_head_dim=attn_width) would have; its own forward does the rest.
            self.attn.head_dim, self.attn.attn_dim = attn_width, attn_width * self.num_heads
            self.attn.scale = attn_width**-0.5
            self.attn.qkv.kept = self.attn.proj.kept = attn_width
        if mlp_width:
            self.mlp.fc1.kept = self.mlp.fc2.kept = mlp_width

    def forward(self, x, **attn_kwargs):
        """x: [B, T, D] -> [B, T, D]."""
        if self.attn_width:
            x = x + self.drop_path1(self.ls1(self.attn(self.norm1(x), **attn_kwargs)))
        if self.mlp_width:
            x = x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))
        return x


def as_supernet(model):
    """Make every block of a timm VisionTransformer a PrefixBlock, in place; parameters and names stay.

    Raises InputError if a block is of a kind whose dimensions cannot be cut this way.
    """
    for index, block in enumerate(model.blocks):
        unsupported = _unsupported_part(block)
        if unsupported:
            raise InputError(
                f"block {index} of {type(model).__name__} has {unsupported}; supported are pre-norm blocks of "
                "timm's Attention (no q/k norm, no gate) and Mlp (no inner norm)"
            )
    model.blocks = nn.Sequential(*(PrefixBlock(block) for block in model.blocks))
    return model


def _unsupported_part(block):
    """The first part of ``block`` that prefix slicing does not cover, in words, or None."""
    if type(block) is not Block:
        return f"a {type(block).__name__}"
    if type(block.attn) is not Attention:
        return f"a {type(block.attn).__name__}"
    if type(block.mlp) is not Mlp:
        return f"a {type(block.mlp).__name__}"
    plain = {"q/k norm": block.attn.q_norm, "an attention norm": block.attn.norm, "an MLP norm": block.mlp.norm}
    return next((name for name, module in plain.items() if not isinstance(module, nn.Identity)), None) or (
        "gated attention" if getattr(block.attn, "gate", None) is not None else None
    )


def set_widths(model, widths):
    """Set the kept widths of every block of a super-network. Raises ValueError if a width does not fit."""
    if len(widths.attn) != len(model.blocks):
        raise ValueError(f"widths for {len(widths.attn)} blocks, the model has {len(model.blocks)}")
    full = full_widths(model)
    if any(not 0 <= kept <= most for kept, most in zip(widths.flat, full.flat, strict=True)):
        raise ValueError(f"widths {widths} exceed the model's {full}")
    for block, attn, mlp in zip(model.blocks, widths.attn, widths.mlp, strict=True):
        block.set_widths(attn, mlp)


def full_widths(model):
    """The Widths at which nothing is cut, of a super-network."""
    blocks = model.blocks
    return Widths(tuple(b.attn.qkv.width for b in blocks), tuple(b.mlp.fc1.width for b in blocks))
