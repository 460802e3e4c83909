"""Multiply-accumulates and parameters of a ViT at any widths, computed from shapes alone."""

from dataclasses import dataclass

import torch
from torch import nn

# The paper's convention counts, besides the products of every linear layer, one operation for each bias added and
# each GELU, and two for each element of an affine LayerNorm; the two attention matmuls are not counted. These
# weights are the ones that reproduce the published sub-networks' figures to the printed digit.
PAPER = {"elementwise": 1, "norm": 2, "matmul": 0}
# fvcore's convention: products of linear layers and of both attention matmuls, five operations for each element of
# an affine LayerNorm, nothing for biases and activations.
MATMULS = {"elementwise": 0, "norm": 5, "matmul": 1}


@dataclass(frozen=True)
class Shapes:
    """The sizes of a ViT that its costs follow from. Per image; T counts all tokens, ``patches`` those of patches.

    ``pooled`` is the number of tokens that the classifier's norm sees (T, or 1 where it comes after pooling).
    """

    depth: int  # L
    dim: int  # D
    heads: int  # H
    head_width: int  # d
    hidden: int  # M
    tokens: int  # T
    patches: int
    patch_inputs: int  # values of one patch: channels x height x width
    patch_bias: int  # 0 or 1, like the next three
    qkv_bias: int
    proj_bias: int
    mlp_bias: int
    pre_norm: int
    norm_tokens: int
    layer_scale: int
    classes: int
    heads_out: int  # classifiers: 2 for a distilled DeiT
    embedding_parameters: int  # class and register tokens, positions

    @classmethod
    def of(cls, model):
        """Read the shapes off a timm VisionTransformer, stock or super-network, at full width."""
        block, projection = model.blocks[0], model.patch_embed.proj
        heads, tokens = block.attn.num_heads, model.patch_embed.num_patches + model.num_prefix_tokens
        embeddings = [getattr(model, name, None) for name in ("cls_token", "reg_token", "dist_token", "pos_embed")]
        return cls(
            depth=len(model.blocks),
            dim=model.embed_dim,
            heads=heads,
            head_width=block.attn.qkv.out_features // (3 * heads),
            hidden=block.mlp.fc1.out_features,
            tokens=tokens,
            patches=model.patch_embed.num_patches,
            patch_inputs=projection.weight[0].numel(),
            patch_bias=int(projection.bias is not None),
            qkv_bias=int(block.attn.qkv.bias is not None),
            proj_bias=int(block.attn.proj.bias is not None),
            mlp_bias=int(block.mlp.fc1.bias is not None),
            pre_norm=int(not isinstance(model.norm_pre, nn.Identity)),
            norm_tokens=1 if isinstance(model.norm, nn.Identity) else tokens,
            layer_scale=int(not isinstance(block.ls1, nn.Identity)),
            classes=model.num_classes,
            heads_out=1 + int(getattr(model, "head_dist", None) is not None),
            embedding_parameters=sum(e.numel() for e in embeddings if e is not None),
        )

    # What one kept dimension of every head, one kept hidden unit, and the existence of a branch cost.

    def macs_per_attn_width(self, convention):
        """MACs of one dimension of all H heads: rows of q, k and v, a column of proj, its share of the matmuls."""
        linear = self.tokens * self.heads * (4 * self.dim + 3 * self.qkv_bias * convention["elementwise"])
        return linear + 2 * convention["matmul"] * self.heads * self.tokens**2

    def macs_per_mlp_width(self, convention):
        """MACs of one hidden unit: a row of fc1, an activation, a column of fc2."""
        return self.tokens * (2 * self.dim + (1 + self.mlp_bias) * convention["elementwise"])

    def unit_costs(self, convention=PAPER):
        """MACs of one dimension of all heads and of one hidden unit, (attention, MLP)."""
        return self.macs_per_attn_width(convention), self.macs_per_mlp_width(convention)

    def _branch_macs(self, bias, convention):
        return self.tokens * self.dim * (convention["norm"] + bias * convention["elementwise"])

    def macs(self, widths, convention=PAPER):
        """MACs of one image through the network at ``widths`` (Widths), in the given convention."""
        one, norm = convention["elementwise"], convention["norm"]
        fixed = self.patches * self.dim * (self.patch_inputs + self.patch_bias * one)
        fixed += self.heads_out * self.classes * (self.dim + one)
        fixed += norm * self.dim * (self.norm_tokens + self.pre_norm * self.tokens)
        blocks = sum(widths.attn) * self.macs_per_attn_width(convention)
        blocks += sum(widths.mlp) * self.macs_per_mlp_width(convention)
        blocks += sum(w > 0 for w in widths.attn) * self._branch_macs(self.proj_bias, convention)
        blocks += sum(w > 0 for w in widths.mlp) * self._branch_macs(self.mlp_bias, convention)
        return fixed + blocks

    def parameters(self, widths):
        """Parameters of the extracted network at ``widths``; a removed branch takes its norm and LayerScale along."""
        fixed = self.embedding_parameters + self.dim * (self.patch_inputs + self.patch_bias)
        fixed += self.heads_out * self.classes * (self.dim + 1) + 2 * self.dim * (1 + self.pre_norm)
        per_attn = self.heads * (4 * self.dim + 3 * self.qkv_bias)
        per_mlp = 2 * self.dim + self.mlp_bias
        branch = 2 * self.dim + self.layer_scale * self.dim
        kept = sum(widths.attn) * per_attn + sum(widths.mlp) * per_mlp
        kept += sum(w > 0 for w in widths.attn) * (branch + self.proj_bias * self.dim)
        kept += sum(w > 0 for w in widths.mlp) * (branch + self.mlp_bias * self.dim)
        return fixed + kept


@torch.inference_mode()
def measured_unit_costs(supernet, batch, device):
    """Seconds of one dimension of all heads and of one hidden unit, (attention, MLP), where the Shapes count MACs.

    The slope between the full and half the width of a branch of block 0, medians of repeated forward passes of
    ``batch`` images on ``device``. Leaves the block at full width.
    """
    from torch.utils.benchmark import Timer  # looks for a CUDA compiler when imported, and complains

    block, shapes = supernet.blocks[0], Shapes.of(supernet)
    tokens = torch.zeros(batch, shapes.tokens, shapes.dim, device=device)
    slopes = []
    for full in ((shapes.head_width, 0), (0, shapes.hidden)):
        seconds = []
        for part in (1, 2):
            block.set_widths(*(width // part for width in full))
            timer = Timer(
                "block(tokens)", globals={"block": block, "tokens": tokens}, num_threads=torch.get_num_threads()
            )
            seconds.append(timer.blocked_autorange(min_run_time=0.5).median)
        slopes.append(max(seconds[0] - seconds[1], 1e-9) / (sum(full) / 2))
    block.set_widths(shapes.head_width, shapes.hidden)
    return tuple(slopes)
