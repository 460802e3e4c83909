"""Peeling: widths -> a stand-alone network of stock timm modules that knows nothing of the super-network."""

import copy
from collections import OrderedDict
from dataclasses import asdict

import torch
from timm.layers import Attention, Mlp
from timm.models.convmixer import Residual
from timm.models.vision_transformer import Block
from torch import nn

from models.vit import ModelSpec, as_supernet, load_weights, set_widths
from models.width_table import Widths
from utils import InputError


@torch.no_grad()
def extract(supernet, widths):
    """Cut the sub-network of ``widths`` (Widths) out of a super-network; the super-network keeps its own weights.

    A block with both branches is timm's Block, one with a single branch timm's Residual around norm and branch, one
    with none nn.Identity. The square root of d that the logits are divided by is folded into the queries, so that
    stock attention of the smaller head width computes the same. Raises ValueError if the widths do not fit.
    """
    set_widths(supernet, widths)
    # Everything but the blocks is copied as it is.
    network = copy.deepcopy(supernet, {id(supernet.blocks): nn.Sequential()})
    network.blocks = nn.Sequential(*(_peel_block(block) for block in supernet.blocks))
    return network.eval()


def _peel_block(block):
    """The stock modules of one PrefixBlock at its present widths."""
    branches = []
    if block.attn_width:
        branches.append({"norm1": block.norm1, "attn": _peel_attention(block.attn, block.attn_width)})
        branches[-1] |= {"ls1": block.ls1, "drop_path1": block.drop_path1}
    if block.mlp_width:
        branches.append({"norm2": block.norm2, "mlp": _peel_mlp(block.mlp)})
        branches[-1] |= {"ls2": block.ls2, "drop_path2": block.drop_path2}
    # Cut branches are fresh; what surrounds them still belongs to the super-network.
    branches = [{k: v if k in ("attn", "mlp") else copy.deepcopy(v) for k, v in b.items()} for b in branches]
    if len(branches) == 2:
        with torch.device("meta"):
            stock = Block(block.norm1.weight.numel(), block.num_heads)
        for name, module in (branches[0] | branches[1]).items():
            setattr(stock, name, module)
        return stock
    return Residual(nn.Sequential(OrderedDict(branches[0]))) if branches else nn.Identity()


def _peel_attention(attn, width):
    with torch.device("meta"):
        stock = Attention(
            attn.qkv.in_features,
            num_heads=attn.num_heads,
            attn_head_dim=width,
            qkv_bias=attn.qkv.bias is not None,
            proj_bias=attn.proj.bias is not None,
            attn_drop=attn.attn_drop.p,
            proj_drop=attn.proj_drop.p,
        )
    _copy_prefix(attn.qkv, stock.qkv)
    _copy_prefix(attn.proj, stock.proj)
    return stock


def _peel_mlp(mlp):
    with torch.device("meta"):
        stock = Mlp(mlp.fc1.in_features, mlp.fc1.kept, bias=mlp.fc1.bias is not None)
    stock.act, stock.drop1, stock.drop2 = (copy.deepcopy(m) for m in (mlp.act, mlp.drop1, mlp.drop2))
    _copy_prefix(mlp.fc1, stock.fc1)
    _copy_prefix(mlp.fc2, stock.fc2)
    return stock


def _copy_prefix(source, target):
    weight, bias = source.prefix()
    target.weight = nn.Parameter(weight.clone(memory_format=torch.contiguous_format))
    target.bias = None if bias is None else nn.Parameter(bias.clone())


# ------------------------------------------------------------------------------------------ description and files


def describe(spec, widths):
    """The plain dict that, with its state dict, is a peeled network: model name, classes, image size, widths."""
    return asdict(spec) | {"widths": widths.as_dict()}


def build(description, source, **kwargs):
    """The peeled network of ``describe`` without its weights. Returns (network, spec, widths). Raises InputError, with
    the name ``source``, if it describes none."""
    try:
        widths = Widths.from_dict(description["widths"])
        spec = ModelSpec(description["name"], description["num_classes"], description["img_size"])
        return extract(as_supernet(spec.build(**kwargs)), widths), spec, widths
    except InputError:
        raise
    except Exception as error:  # whatever stands there goes through timm and torch
        raise InputError(f"{source}: member 'peeled' describes no network ({type(error).__name__}: {error})") from None


def load_peeled(content, source, **kwargs):
    """The network of a checkpoint that ``main_finetune_peeled.py`` wrote. Returns (network, spec, widths)."""
    network, spec, widths = build(content["peeled"], source, **kwargs)
    load_weights(network, content["model"], source)
    return network, spec, widths
