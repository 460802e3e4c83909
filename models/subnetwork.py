"""Load a saved sub-network, a folder with model.safetensors and config.json, as a network of stock timm modules.

Needs torch, timm (1.0.23 or newer) and safetensors, and nothing else of this repository: the file may be copied.
"""

import copy
import json
from collections import OrderedDict
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.layers import Attention, Mlp
from timm.models.convmixer import Residual
from timm.models.vision_transformer import Block
from torch import nn

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"
# What timm.data.resolve_data_config reads off a network.
DATA_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def load_subnetwork(folder):
    """The network that was saved in ``folder``, in eval mode on the CPU; ``network.pretrained_cfg`` holds its input
    size, mean and std, for ``timm.data.resolve_data_config``. Raises ValueError if config.json is not one of ours.
    """
    config = read_config(folder)
    # Without memory until the weights come: nothing is initialised in vain.
    with torch.device("meta"):
        network = timm.create_model(
            config["architecture"],
            num_classes=config["num_classes"],
            pretrained_cfg_overlay={key: config[key] for key in DATA_KEYS},
            **config["architecture_args"],
        )
        narrow(network, config["widths"]["attn"], config["widths"]["mlp"])
    network.load_state_dict(load_file(Path(folder) / WEIGHTS_NAME), assign=True)
    return network.eval()


def read_config(folder):
    """config.json of a saved sub-network as a dict. Raises ValueError if it is not one."""
    path = Path(folder) / CONFIG_NAME
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    wanted = {"architecture", "architecture_args", "num_classes", "widths", *DATA_KEYS}
    missing = sorted(wanted - set(config)) if isinstance(config, dict) else sorted(wanted)
    if missing:
        raise ValueError(f"{path}: not the config.json of a sub-network: it has no {', '.join(missing)}")
    return config


def narrow(network, attn, mlp):
    """Give the blocks of a timm VisionTransformer, in place, ``attn[b]`` dimensions per head and ``mlp[b]`` hidden
    units, 0 for no such branch. The attention and MLP layers are new, on the default device; all else is kept."""
    network.blocks = nn.Sequential(*(narrow_block(*each) for each in zip(network.blocks, attn, mlp, strict=True)))


def narrow_block(block, attn_width, mlp_width):
    """What stands for one block: timm's Block, for a single branch timm's Residual around it, for none an Identity.

    The linear layers are new and on the default device; norms, LayerScale and drop path are copies of the block's.
    """
    branches = []
    if attn_width:
        branches.append(_branch(block, 1, "attn", _attention(block.attn, attn_width)))
    if mlp_width:
        branches.append(_branch(block, 2, "mlp", _mlp(block.mlp, mlp_width)))
    if len(branches) < 2:
        return Residual(nn.Sequential(branches[0])) if branches else nn.Identity()
    with torch.device("meta"):
        whole = Block(block.norm1.weight.numel(), block.attn.num_heads)
    for name, module in (branches[0] | branches[1]).items():
        setattr(whole, name, module)
    return whole


def _branch(block, number, name, layers):
    """The modules of one residual branch by their names in a Block, in the order in which they are run."""
    norm, scale, drop = (copy.deepcopy(getattr(block, f"{part}{number}")) for part in ("norm", "ls", "drop_path"))
    return OrderedDict({f"norm{number}": norm, name: layers, f"ls{number}": scale, f"drop_path{number}": drop})


def _attention(full, width):
    return Attention(
        full.qkv.in_features,
        num_heads=full.num_heads,
        attn_head_dim=width,
        qkv_bias=full.qkv.bias is not None,
        proj_bias=full.proj.bias is not None,
        attn_drop=full.attn_drop.p,
        proj_drop=full.proj_drop.p,
    )


def _mlp(full, width):
    layers = Mlp(full.fc1.in_features, width, bias=full.fc1.bias is not None)
    layers.act, layers.drop1, layers.drop2 = (copy.deepcopy(m) for m in (full.act, full.drop1, full.drop2))
    return layers
