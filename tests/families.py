"""One small network with random weights of every family that docs/families.md has a row for, built by timm."""

from dataclasses import dataclass, field

import timm
import torch

PLAIN = {"embed_dim": 48, "depth": 3, "num_heads": 3}


@dataclass(frozen=True)
class Family:
    """name, kwargs: of timm's model; size: pixels; heads: whether their width can be cut; classes: 0 for none."""

    name: str
    kwargs: dict = field(default_factory=dict)
    size: int = 32
    heads: bool = True
    classes: int = 7

    def build(self):
        """The stock network in eval mode, all its weights random."""
        torch.manual_seed(0)
        model = timm.create_model(self.name, img_size=self.size, num_classes=self.classes, **self.kwargs).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2 or parameter.ndim == 4:
                    parameter.normal_(std=1.2 * parameter[0].numel() ** -0.5)
                else:
                    parameter.add_(0.2 * torch.randn_like(parameter))
        return model


INNER_NORMS = {"scale_attn_norm": True, "scale_mlp_norm": True}
# No MLP: what one computes for all blocks together, a tracer drops once no attention is left to use it.
TABLE = {"rel_pos_type": "bias"}
SWIN = {"patch_size": 2, "embed_dim": 24, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
FAMILIES = {
    "DeiT": Family("deit_tiny_patch16_224", PLAIN),
    "AugReg": Family("vit_small_patch16_224", PLAIN | {"qkv_bias": False}),
    "MAE": Family("vit_base_patch16_224.mae", PLAIN | {"global_pool": "avg"}),
    "distilled DeiT": Family("deit_tiny_distilled_patch16_224", PLAIN),
    "DeiT-III": Family("deit3_small_patch16_224", PLAIN),
    "DINOv2": Family("vit_small_patch14_dinov2", PLAIN, 28),
    "DINOv2 with registers": Family("vit_small_patch14_reg4_dinov2", PLAIN, 28),
    "DINOv2-giant": Family("vit_giant_patch14_dinov2", PLAIN, 28),
    "CLIP": Family("vit_base_patch16_clip_quickgelu_224", PLAIN),
    "SigLIP": Family("vit_base_patch16_siglip_224", PLAIN, classes=0),
    "SigLIP SO400M": Family("vit_so400m_patch14_siglip_224", PLAIN | {"embed_dim": 60, "num_heads": 3}, 28),
    "q/k norm": Family("vit_small_patch16_224", PLAIN | {"qk_norm": True}),
    "inner norms": Family("vit_small_patch16_224", PLAIN | INNER_NORMS, heads=False),
    "res-post-norm": Family("vit_base_patch16_rpn_224", PLAIN),
    "ViT with relative positions": Family("vit_relpos_small_patch16_224", PLAIN),
    "the same, res-post-norm": Family("vit_relpos_small_patch16_rpn_224", PLAIN),
    "the same, shared by all blocks": Family("vit_srelpos_small_patch16_224", PLAIN | TABLE),
    "Swin": Family("swin_tiny_patch4_window7_224", SWIN),
    "Swin, padded": Family("swin_tiny_patch4_window7_224", SWIN | {"window_size": 3}),
    "Swin V2": Family("swinv2_tiny_window8_256", SWIN),
    "BEiT": Family("beit_base_patch16_224", PLAIN),
    "BEiT v2": Family("beitv2_base_patch16_224", PLAIN | {"use_shared_rel_pos_bias": True}),
    "EVA": Family("eva_giant_patch14_224", PLAIN, 28),
    "EVA-02 Ti": Family("eva02_tiny_patch14_224", PLAIN, 28),
    "EVA-02 B": Family("eva02_base_patch14_224", PLAIN, 28),
    "EVA-02 post-norm": Family("eva02_enormous_patch14_clip_224", PLAIN, 28),
    "DINOv3": Family("vit_small_patch16_dinov3", PLAIN),
    "RoPE ViT": Family("vit_base_patch16_rope_reg1_gap_256", PLAIN),
    "Perception Encoder": Family("vit_pe_core_tiny_patch16_384", PLAIN),
}  # fmt: skip
