"""Multiply-accumulates and parameters of a network at any widths, computed from its shapes."""

from collections import Counter
from dataclasses import dataclass
from itertools import chain

import torch
from timm.layers import AttentionPoolLatent
from torch import nn
from torch.func import functional_call

from models.vit.families import ATTENTION, MLPS, entry_of
from models.vit.pretrained import image_shape
from models.vit.supernet import Prefix, at_widths, branches, frozen, full_widths, hooks
from models.vit.widths import Widths

# The MACs of one of each. The paper's convention: the products of every linear layer, one operation for each bias added
# (in a gated MLP, for each product of a pair too), two for each activation of a hidden unit, one for each element of a
# norm, and nothing for the two attention matmuls. These weights give every published sub-network's figures to the
# printed digit.
PAPER = {"products": 1, "elementwise": 1, "activation": 2, "norm": 1, "matmul": 0}
# fvcore's convention: products of linear layers and of both attention matmuls, five operations for each element of an
# affine LayerNorm and four of another (of LayerNorm, not of RMSNorm), nothing for biases and activations.
MATMULS = {"products": 1, "layer_norm": 5, "bare_layer_norm": 4, "matmul": 1}


def _weigh(counter, convention):
    return sum(weight * counter[name] for name, weight in convention.items())


@dataclass(frozen=True)
class BranchCost:
    """What one branch costs: ``per_unit`` for every dimension per head or hidden unit, ``fixed`` once if it is kept.
    Both count products, elementwise, activation, norm, layer_norm, bare_layer_norm, matmul (all per image) and
    parameters. full, indivisible: as in PrefixBranch."""

    per_unit: Counter
    fixed: Counter
    full: int
    indivisible: bool

    def at(self, width, convention):
        """MACs at ``width``."""
        return _weigh(self.fixed, convention) + width * _weigh(self.per_unit, convention) if width else 0

    def unit(self, convention):
        """MACs of one dimension of all heads or of one hidden unit; of an indivisible branch, its share of them."""
        return self.at(self.full, convention) / self.full if self.indivisible else _weigh(self.per_unit, convention)


@dataclass(frozen=True)
class Costs:
    """What a network costs per image: ``fixed`` for all that is in no branch, and a BranchCost for each of the 2L
    branches, in the order of Widths.flat."""

    fixed: Counter
    branches: tuple[BranchCost, ...]

    @classmethod
    def of(cls, supernet):
        """Count one image through a super-network, at its full widths and at half of them: costs are linear in both."""
        own, full = branches(supernet), full_widths(supernet)
        half = Widths.from_flat([b.full if b.indivisible or b.full == 1 else b.full // 2 for b in own])
        (*most, fixed), (*less, _) = _count(supernet, full), _count(supernet, half)
        costs = []
        for branch, width, at_full, at_half in zip(own, half.flat, most, less, strict=True):
            removed = branch.full - width
            per_unit = Counter({name: (at_full[name] - at_half[name]) // removed for name in at_full if removed})
            once = Counter({name: at_full[name] - branch.full * per_unit[name] for name in at_full})
            costs.append(BranchCost(per_unit, once, branch.full, branch.indivisible))
        return cls(fixed, tuple(costs))

    @property
    def full(self):
        """The Widths of the full network."""
        return Widths.from_flat([branch.full for branch in self.branches])

    @property
    def indivisible(self):
        """[2L]: which branches can only be kept at their full width or dropped."""
        return [branch.indivisible for branch in self.branches]

    def units(self, convention=PAPER):
        """[2L]: MACs of one dimension of all heads, or of one hidden unit, of each branch."""
        return [branch.unit(convention) for branch in self.branches]

    def macs(self, widths, convention=PAPER):
        """MACs of one image through the network at ``widths`` (Widths), in the given convention."""
        pairs = zip(self.branches, widths.flat, strict=True)
        return _weigh(self.fixed, convention) + sum(branch.at(width, convention) for branch, width in pairs)

    def parameters(self, widths):
        """Parameters of the extracted network at ``widths``. A removed branch takes its norm and LayerScale along."""
        return self.macs(widths, {"parameters": 1})


@torch.no_grad()
def _count(supernet, widths):
    """One image through a super-network at ``widths``, on tensors without memory: 2L Counters of what is in each
    branch, and one of what is in none."""
    named = chain(supernet.named_parameters(), supernet.named_buffers())
    empty = {name: tensor.detach().to("meta") for name, tensor in named}
    image = torch.zeros(1, *image_shape(supernet), dtype=next(supernet.parameters()).dtype, device="meta")
    with at_widths(supernet, widths), frozen(supernet):
        counts = _Counts(supernet)
        with hooks([module.register_forward_hook(counts.on_call) for module in supernet.modules()]):
            functional_call(supernet, empty, (image,))
    return counts.counters


class _Counts:
    """Adds up what a forward pass costs, by a hook on every module. ``counters``: as ``_count`` returns them."""

    def __init__(self, supernet):
        self.branches, self.called = branches(supernet), set()
        self.counters = [Counter() for _ in (*self.branches, supernet)]
        self.owner, gammas = {}, {}  # id of a module, or of a block and the name of its parameter: index of the branch
        for index, branch in enumerate(self.branches):
            tops = (branch.module, *branch.helpers.values())
            self.owner |= {id(child): index for top in tops for child in top.modules()}
            gammas[id(branch.block), branch.gamma] = index
        for module in supernet.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    index = gammas.get((id(module), name), self.owner.get(id(module), -1))
                    taking_part = module.prefix(name) if isinstance(module, Prefix) else parameter
                    self.counters[index]["parameters"] += taking_part.numel()

    def on_call(self, module, inputs, output):
        index = self.owner.get(id(module), -1)
        branch, counter = self.branches[index], self.counters[index]
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            channels = 1 if isinstance(module, nn.Conv2d) else -1
            self._linear(module, counter, output.numel() // output.shape[channels])
        elif getattr(module, "normalized_shape", None):
            counter["norm"] += output.numel()
            if isinstance(module, nn.LayerNorm):
                counter["bare_layer_norm" if module.weight is None else "layer_norm"] += output.numel()
        elif entry_of(module, ATTENTION):
            self._attention(branch, counter, *inputs[0].shape[:2])
        elif entry := entry_of(module, MLPS):
            part = entry(module)
            width = branch.width if branch.module is module else part.width
            hidden = output.numel() // output.shape[-1] * width
            counter["activation"] += hidden
            counter["elementwise"] += hidden * part.gated
        elif isinstance(module, AttentionPoolLatent):
            counter["matmul"] += 2 * module.latent_len * inputs[0].shape[1] * module.q.out_features

    def _linear(self, layer, counter, places):
        """places: the number of tokens or of positions in an image."""
        self.called.add(id(layer))
        weight = layer.prefix("weight") if isinstance(layer, Prefix) else layer.weight
        counter["products"] += places * weight.numel()
        counter["elementwise"] += places * len(weight) * (layer.bias is not None)

    def _attention(self, branch, counter, windows, tokens):
        """windows: images, or windows of all images; tokens: T of each."""
        part, module = branch.part, branch.module
        counter["matmul"] += 2 * windows * part.heads * tokens**2 * (branch.width if part.keys else part.width)
        for layer in (getattr(module, name) for name in part.inputs):
            if id(layer) not in self.called:  # some classes use the weights without calling the layer
                self._linear(layer, counter, windows * tokens)
        if getattr(module, "q_bias", None) is not None:
            counter["elementwise"] += 3 * windows * tokens * module.q_bias.numel()
