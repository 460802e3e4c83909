"""Multiply-accumulates and parameters of a network at any widths, computed from its shapes."""

from collections import Counter
from dataclasses import dataclass
from itertools import chain

import torch
from timm.layers import AttentionPoolLatent
from torch import nn
from torch.func import functional_call

from models.kinds import ATTENTION, MLPS
from models.supernet import BRANCHES, blocks_of, full_widths, present_widths, set_widths
from models.vit import image_shape
from models.width_table import Widths

# What one of each counts. The paper's convention counts, besides the products of every linear layer, one operation for
# each bias added and each GELU (in a gated MLP: for each activation and each product of a pair), and two for each
# element of an affine LayerNorm; the two attention matmuls are not counted. These weights are the ones that reproduce
# the published sub-networks' figures to the printed digit.
PAPER = {"products": 1, "elementwise": 1, "norm": 2, "matmul": 0}
# fvcore's convention: products of linear layers and of both attention matmuls, five operations for each element of
# an affine LayerNorm and four of another (of LayerNorm, not of RMSNorm), nothing for biases and activations.
MATMULS = {"products": 1, "layer_norm": 5, "bare_layer_norm": 4, "matmul": 1}


@dataclass(frozen=True)
class Branch:
    """What one branch of a block costs: ``each`` for every dimension per head or hidden unit, ``present`` once.

    Counters of products, elementwise, norm, layer_norm, bare_layer_norm, matmul (per image) and parameters. width: the
    full width; ``whole``: whether it can only be kept whole.
    """

    each: Counter
    present: Counter
    width: int
    whole: bool

    def count(self, width):
        """Everything at ``width``."""
        total = Counter(self.present) if width else Counter()
        for name, number in self.each.items():
            total[name] += width * number
        return total


def _weigh(counter, convention):
    return sum(weight * counter[name] for name, weight in convention.items())


@dataclass(frozen=True)
class Shapes:
    """What the costs of a network follow from, per image: ``fixed`` for all that is in no branch, and the 2L branches
    in the order of Widths.flat."""

    fixed: Counter
    branches: tuple[Branch, ...]

    @classmethod
    @torch.no_grad()
    def of(cls, supernet):
        """Count one image through a super-network, at full width and on tensors without memory."""
        full, before = full_widths(supernet), present_widths(supernet)
        set_widths(supernet, full)
        counts = _Counts(supernet)
        training = supernet.training
        try:
            named = chain(supernet.named_parameters(), supernet.named_buffers())
            empty = {name: tensor.detach().to("meta") for name, tensor in named}
            functional_call(supernet.eval(), empty, (_images(supernet, 1, "meta"),))
        finally:
            counts.remove()
            supernet.train(training)
            set_widths(supernet, before)
        return cls(counts.fixed, counts.branches)

    @property
    def depth(self):
        """L."""
        return len(self.branches) // 2

    @property
    def full(self):
        """The Widths of the full network."""
        return Widths.from_flat([branch.width for branch in self.branches])

    @property
    def whole(self):
        """Which of the 2L branches can only be kept whole or dropped whole."""
        return [branch.whole for branch in self.branches]

    def unit_costs(self, convention=PAPER):
        """MACs of one dimension of all heads or one hidden unit of each of the 2L branches; of a branch that goes as a
        whole, its share of them."""
        return [
            _weigh(b.count(b.width), convention) / b.width if b.whole else _weigh(b.each, convention)
            for b in self.branches
        ]

    def _total(self, widths):
        pairs = zip(self.branches, widths.flat, strict=True)
        return sum((branch.count(width) for branch, width in pairs), Counter(self.fixed))

    def macs(self, widths, convention=PAPER):
        """MACs of one image through the network at ``widths`` (Widths), in the given convention."""
        return _weigh(self._total(widths), convention)

    def parameters(self, widths):
        """Parameters of the extracted network at ``widths``; a removed branch takes its norm and LayerScale along."""
        return self._total(widths)["parameters"]


def _images(model, count, device):
    return torch.zeros(count, *image_shape(model), dtype=next(model.parameters()).dtype, device=device)


class _Counts:
    """What one forward pass costs, added up by hooks on every layer: outside of all branches (``fixed``) and, for each
    of the 2L branches, by ``each`` unit of its width and once (``present``)."""

    def __init__(self, supernet):
        self.fixed, self.handles, self.called, self.mlps = Counter(), [], set(), set()
        self.parts = [part for block in blocks_of(supernet) for part in block.parts]
        self.each, self.present = ([Counter() for _ in self.parts] for _ in range(2))
        self.owner = {}  # id of a module: the branch that it is in, and what a smaller width cuts of it
        self.gammas = {}  # (id of a block, parameter): the branch that it scales
        for index, block in enumerate(blocks_of(supernet)):
            for branch, names in enumerate(BRANCHES.values()):
                self._own(block, 2 * index + branch, names)
        for module in supernet.modules():
            for name in module._parameters:
                self._count_parameter(module, name)
            self.handles.append(module.register_forward_hook(self._on_call))

    def _own(self, block, branch, names):
        module = (block.attn, block.mlp)[branch % 2]
        self.mlps.add(id(block.mlp))
        layers = {id(getattr(module, layer.name)): layer for layer in self.parts[branch].layers}
        for top in (getattr(block, name) for name in names if hasattr(block, name)):
            self.owner |= {id(child): (branch, layers.get(id(child))) for child in top.modules()}
        self.gammas[id(block), f"gamma_{branch % 2 + 1}"] = branch

    def remove(self):
        for handle in self.handles:
            handle.remove()

    @property
    def branches(self):
        rows = zip(self.each, self.present, self.parts, strict=True)
        return tuple(Branch(each, present, part.width, part.whole) for each, present, part in rows)

    def add(self, module, name, number, of_bias=False):
        """``number`` of what ``name`` says, in ``module``; ``of_bias``: in adding its bias."""
        branch, layer = self.owner.get(id(module), (None, None))
        if branch is None:
            self.fixed[name] += number
        elif layer is None or (of_bias and layer.side == "in"):
            self.present[branch][name] += number
        else:
            self.each[branch][name] += number // self.parts[branch].width

    def _count_parameter(self, module, name):
        parameter, branch = module._parameters[name], self.gammas.get((id(module), name))
        if parameter is None:
            return
        if branch is not None:
            self.present[branch]["parameters"] += parameter.numel()
        else:
            self.add(module, "parameters", parameter.numel(), of_bias=name == "bias")

    def _on_call(self, module, inputs, output):
        branch, _ = self.owner.get(id(module), (None, None))
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            self._linear(module, output.numel() // len(module._parameters["weight"]))
        elif getattr(module, "normalized_shape", None):
            affine, layer_norm = module.weight is not None, isinstance(module, nn.LayerNorm)
            self.add(module, "norm", output.numel() * affine)
            self.add(module, "layer_norm" if affine else "bare_layer_norm", output.numel() * layer_norm)
        elif isinstance(module, tuple(ATTENTION)):
            self._attention(module, branch, inputs[0])
        elif isinstance(module, tuple(MLPS)):
            hidden = output.numel() // output.shape[-1] * module.fc2.in_features
            operations = MLPS[_stock(module)](module).elementwise * hidden
            if id(module) in self.mlps:
                self.each[branch]["elementwise"] += operations // self.parts[branch].width
            else:  # one in the pooling, or in a position bias
                self.add(module, "elementwise", operations)
        elif isinstance(module, AttentionPoolLatent):
            self.fixed["matmul"] += 2 * module.latent_len * inputs[0].shape[1] * module.q.out_features

    def _linear(self, layer, positions):
        self.called.add(id(layer))
        weight, bias = layer._parameters["weight"], layer._parameters.get("bias")
        self.add(layer, "products", positions * weight.numel())
        if bias is not None:
            self.add(layer, "elementwise", positions * len(weight), of_bias=True)

    def _attention(self, attn, branch, tokens):
        """tokens: [images or windows, T, D]."""
        part, (windows, count, _) = self.parts[branch], tokens.shape
        matmuls = 2 * windows * part.heads * count**2
        if part.whole:
            self.present[branch]["matmul"] += matmuls * part.width
        else:
            self.each[branch]["matmul"] += matmuls
        for layer in (getattr(attn, name) for name in part.inputs):
            if id(layer) not in self.called:  # some classes use the weights without calling the layer
                self._linear(layer, windows * count)
                if getattr(attn, "q_bias", None) is not None:
                    self.add(layer, "elementwise", windows * count * layer.out_features, of_bias=True)


def _stock(module):
    return next(cls for cls in type(module).__mro__ if cls in MLPS)


@torch.inference_mode()
def measured_unit_costs(supernet, batch, device):
    """Seconds of one dimension of all heads or of one hidden unit of each of the 2L branches, where Shapes count MACs.

    The slope between the full width of a branch and half of it (none, where it goes as a whole), medians of repeated
    calls of its block for ``batch`` images on ``device``; blocks of one shape are measured once. Leaves all blocks at
    full width.
    """
    set_widths(supernet, full_widths(supernet))
    slopes, costs = {}, []
    for block, (inputs, context) in zip(blocks_of(supernet), _block_inputs(supernet, batch, device), strict=True):
        shape = (type(block), block.full, inputs[0].shape, sum(p.numel() for p in block.parameters()))
        if shape not in slopes:
            slopes[shape] = [_slope(block, branch, inputs, context) for branch in (0, 1)]
        costs += slopes[shape]
    return costs


def _block_inputs(supernet, batch, device):
    """(positional, keyword) arguments of every block for ``batch`` images of zeros."""
    seen, handles = [], []
    for block in blocks_of(supernet):
        hook = block.register_forward_pre_hook(lambda _m, *arguments: seen.append(arguments), with_kwargs=True)
        handles.append(hook)
    try:
        supernet(_images(supernet, batch, device))
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _slope(block, branch, inputs, context):
    from torch.utils.benchmark import Timer  # looks for a CUDA compiler when imported, and complains

    part, seconds = block.parts[branch], []
    less = 0 if part.whole else part.width // 2
    names = {"block": block, "inputs": inputs, "context": context}
    for width in (part.width, less):
        block.set_widths(*(width if index == branch else 0 for index in (0, 1)))
        timer = Timer("block(*inputs, **context)", globals=names, num_threads=torch.get_num_threads())
        seconds.append(timer.blocked_autorange(min_run_time=0.5).median)
    block.set_widths(*block.full)
    return max(seconds[0] - seconds[1], 1e-9) / (part.width - less)
