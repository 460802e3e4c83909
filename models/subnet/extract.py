"""Extraction: widths -> a network of stock timm modules that knows nothing of the super-network."""

import copy

import torch
from torch import nn

from models.vit.families import branch_in, narrow
from models.vit.supernet import as_stock, at_widths, branches


@torch.no_grad()
def extract(supernet, widths):
    """Cut the sub-network of ``widths`` (Widths) out of a super-network. The super-network stays as it is.

    A block and an attention keep timm's class; ``PaddedLinear`` makes and reads v where only v is cut. In a plain ViT a
    block with a single branch becomes timm's Residual around norm and branch, and one with none nn.Identity. The factor
    sqrt(k / d) of narrower attention (``supernet.scale_queries``) is folded into the queries' weights, so that stock
    attention computes the same. Returns the network in eval mode. Raises ValueError if the widths do not fit.
    """
    with at_widths(supernet, widths):
        # What is cut is not copied first: in the copy its parameters have no memory, until their prefixes replace them.
        memo = {
            id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"))
            for branch in branches(supernet)
            for _, layer in branch.layers
            for parameter in layer.parameters()
        }
        subnet = as_stock(copy.deepcopy(supernet, memo))
        with torch.device("meta"):
            narrow(subnet, widths.attn, widths.mlp)
        for branch in branches(supernet):
            target = branch_in(subnet, branch).module
            for layer, source in branch.layers if target else ():
                for name, _ in source.named_parameters():
                    prefix = source.prefix(name).clone(memory_format=torch.contiguous_format)
                    setattr(getattr(target, layer.name), name, nn.Parameter(prefix))
    return subnet.eval()
