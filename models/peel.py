"""Peeling: widths -> a stand-alone network of stock timm modules that knows nothing of the super-network."""

import copy
from dataclasses import asdict, replace

import torch
from torch import nn

from models.kinds import block_paths
from models.subnetwork import Gone, narrow, narrow_block
from models.supernet import BRANCHES, as_stock, as_supernet, blocks_of, present_widths, set_widths
from models.vit import ModelSpec, load_weights
from models.width_table import Widths
from utils import InputError


@torch.no_grad()
def extract(supernet, widths):
    """Cut the sub-network of ``widths`` (Widths) out of a super-network; the super-network stays as it is.

    A block keeps timm's class; in a plain ViT one with a single branch is timm's Residual around norm and branch, and
    one with none nn.Identity. The square root of d that the logits are divided by is folded into the queries, so that
    stock attention of the smaller head width computes the same. Raises ValueError if the widths do not fit.
    """
    before = present_widths(supernet)
    set_widths(supernet, widths)
    blocks = blocks_of(supernet)
    # What is cut is not copied first: in the copy its parameters have no memory, until their prefixes replace them.
    cut = [parameter for block in blocks for layer in _cut_layers(block) for parameter in layer.parameters()]
    memo = {id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in cut}
    network = as_stock(copy.deepcopy(supernet, memo))
    for block, path in zip(blocks, block_paths(network), strict=True):
        with torch.device("meta"):
            peeled = narrow_block(network.get_submodule(path), block.attn_width, block.mlp_width)
        network.set_submodule(path, peeled)
        _fill(block, peeled)
    set_widths(supernet, before)
    return network.eval()


def _cut_layers(block):
    """All layers of a PrefixBlock of which a smaller width keeps a part."""
    branches = zip((block.attn, block.mlp), block.parts, strict=True)
    return [getattr(module, layer.name) for module, part in branches for layer in part.layers]


def _fill(block, peeled):
    """Give the narrower layers of a peeled block the prefixes of a PrefixBlock at its present widths."""
    for branch, part in zip(BRANCHES, block.parts, strict=True):
        target = branch_of(peeled, branch)
        for layer in part.layers if target else ():
            source, new = (getattr(module, layer.name) for module in (getattr(block, branch), target))
            for name, parameter in list(source.named_parameters()):
                setattr(new, name, nn.Parameter(_own(getattr(source, name), parameter)))


def _own(tensor, original):
    """``tensor`` contiguous in memory of its own; one that is not a view of ``original`` has been copied already."""
    copied = tensor.untyped_storage().data_ptr() != original.untyped_storage().data_ptr()
    return tensor if copied else tensor.clone(memory_format=torch.contiguous_format)


def holder_of(peeled):
    """The module that has norm, branch and LayerScale of a peeled block as attributes."""
    return getattr(peeled, "fn", peeled)


def branch_of(peeled, name):
    """The attention ('attn') or MLP ('mlp') of a peeled block, or None where it is gone."""
    module = getattr(holder_of(peeled), name, None)
    return None if isinstance(module, Gone) else module


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
        narrow(as_stock(network), widths.attn, widths.mlp)
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
