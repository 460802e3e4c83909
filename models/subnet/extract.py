"""Extraction: widths -> a network of stock timm modules that knows nothing of the super-network."""

import copy

import torch
from torch import nn

from models.vit.families import branch_in, narrow_block
from models.vit.supernet import as_stock, at_widths, branches


@torch.no_grad()
def extract(supernet, widths):
    """Cut the sub-network of ``widths`` (Widths) out of a super-network. The super-network stays as it is.

    A block and an attention keep timm's class; ``PaddedLinear`` makes and reads v where only v is cut. In a plain ViT a
    block with a single branch becomes timm's Residual around norm and branch, and one with none nn.Identity. The factor
    sqrt(k / d) of narrower attention (``supernet.scale_queries``) is folded into the queries' weights, so that stock
    attention computes the same. Returns the network in eval mode.
    Raises ValueError if the widths do not fit.
    """
    with at_widths(supernet, widths):
        own = branches(supernet)
        # What is cut is not copied first: in the copy its parameters have no memory, until their prefixes replace them.
        cut = [parameter for branch in own for _, layer in branch.layers for parameter in layer.parameters()]
        memo = {id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta")) for parameter in cut}
        subnet = as_stock(copy.deepcopy(supernet, memo))
        for attn, mlp in zip(own[::2], own[1::2], strict=True):
            with torch.device("meta"):
                block = narrow_block(attn.path, subnet.get_submodule(attn.path), attn.width, mlp.width)
            subnet.set_submodule(attn.path, block)
        for branch in own:
            _fill(branch, branch_in(subnet, branch).module)
    return subnet.eval()


def _fill(branch, target):
    """Give the narrower layers of an extracted attention or MLP the prefixes of a PrefixBranch at its present width."""
    for layer, source in branch.layers if target else ():
        for name, parameter in list(source.named_parameters()):
            setattr(getattr(target, layer.name), name, nn.Parameter(_in_own_memory(source.prefix(name), parameter)))


def _in_own_memory(tensor, original):
    """``tensor``, contiguous and without a share in the memory of ``original``."""
    copied = tensor.untyped_storage().data_ptr() != original.untyped_storage().data_ptr()
    return tensor if copied else tensor.clone(memory_format=torch.contiguous_format)
