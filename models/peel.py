"""Peeling: widths -> a stand-alone network of stock timm modules that knows nothing of the super-network."""

import copy
from dataclasses import asdict, replace

import torch
from torch import nn

from models.subnetwork import narrow, narrow_block
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
    with torch.device("meta"):
        stock = narrow_block(block, block.attn_width, block.mlp_width)
    branches = getattr(stock, "fn", stock)
    if block.attn_width:
        _copy_prefix(block.attn.qkv, branches.attn.qkv)
        _copy_prefix(block.attn.proj, branches.attn.proj)
    if block.mlp_width:
        _copy_prefix(block.mlp.fc1, branches.mlp.fc1)
        _copy_prefix(block.mlp.fc2, branches.mlp.fc2)
    return stock


def _copy_prefix(source, target):
    weight, bias = source.prefix()
    target.weight = nn.Parameter(_own(weight, source.weight))
    target.bias = None if bias is None else nn.Parameter(_own(bias, source.bias))


def _own(tensor, original):
    """``tensor`` contiguous in memory of its own; one that is not a view of ``original`` has been copied already."""
    copied = tensor.untyped_storage().data_ptr() != original.untyped_storage().data_ptr()
    return tensor if copied else tensor.clone(memory_format=torch.contiguous_format)


# ------------------------------------------------------------------------------------------ description


def describe(spec, widths):
    """The plain dict that, with its state dict, is a peeled network: model name, classes, image size, widths."""
    return asdict(spec) | {"widths": widths.as_dict()}


def build(description, source, input_size=None, **kwargs):
    """The peeled network of ``describe`` without its weights, for images of ``input_size`` pixels if that is given.

    Returns (network, spec, widths). Raises InputError, with the name ``source``, if it describes none.
    """
    try:
        widths = Widths.from_dict(description["widths"])
        spec = ModelSpec(description["name"], description["num_classes"], description["img_size"])
        spec = replace(spec, img_size=input_size or spec.img_size)
        network = as_supernet(spec.build(**kwargs))
        set_widths(network, widths)  # refuses widths that do not fit
        narrow(network, widths.attn, widths.mlp)
    except InputError:
        raise
    except Exception as error:  # whatever stands there goes through timm and torch
        raise InputError(f"{source}: member 'peeled' describes no network ({type(error).__name__}: {error})") from None
    return network, spec, widths


def load_peeled(content, source, input_size=None, **kwargs):
    """The network of a checkpoint that ``main_finetune_peeled.py`` wrote, or of a saved sub-network.

    ``content``: its weights as ``model``, its description as ``peeled``. Returns (network, spec, widths).
    """
    network, spec, widths = build(content["peeled"], source, input_size, **kwargs)
    load_weights(network, content["model"], source)
    return network, spec, widths
