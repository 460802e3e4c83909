"""Load a saved sub-network, a folder with model.safetensors and config.json, as a network of stock timm modules.

Needs torch, timm (1.0.23 or newer) and safetensors, and of this repository kinds.py alone: both files may be copied.
"""

import json
from collections import OrderedDict
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file
from timm.models.convmixer import Residual
from torch import nn

try:
    from models import kinds
except ImportError:  # copied: the two files lie beside each other
    import kinds

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"
# What timm.data.resolve_data_config reads off a network.
DATA_KEYS = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")


def load_subnetwork(folder):
    """The network that was saved in ``folder``, in eval mode on the CPU; ``network.pretrained_cfg`` holds its input
    size, mean and std, for ``timm.data.resolve_data_config``. Raises ValueError if config.json is not one of ours.
    """
    config = read_config(folder)
    network = timm.create_model(
        config["architecture"],
        num_classes=config["num_classes"],
        pretrained_cfg_overlay={key: config[key] for key in DATA_KEYS},
        **config["architecture_args"],
    )
    narrow(network, config["widths"]["attn"], config["widths"]["mlp"])
    network.load_state_dict(load_file(Path(folder) / WEIGHTS_NAME))
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
    """Give the blocks of a stock timm model, in place, ``attn[b]`` dimensions per head and ``mlp[b]`` hidden units,
    0 for no such branch. The layers that are cut are new, on the default device; all else stays."""
    for path, *widths in zip(kinds.block_paths(network), attn, mlp, strict=True):
        network.set_submodule(path, narrow_block(network.get_submodule(path), *widths))


def narrow_block(block, attn_width, mlp_width):
    """What stands for one stock block, made of its own modules: the block, with ``Gone`` for a branch that is off;
    where the branch that is left runs by itself, timm's Residual around it; and for none an Identity."""
    alone, widths = kinds.BLOCKS[type(block)].alone, {"attn": attn_width, "mlp": mlp_width}
    for part, (branch, width) in zip(kinds.parts_of(block), widths.items(), strict=True):
        if width:
            kinds.narrow(getattr(block, branch), part, width)
    left = [branch for branch, width in widths.items() if width]
    if alone and not left:
        return nn.Identity()
    if len(left) == 1 and left[0] in alone:
        return Residual(_branch(block, *left))
    for branch in widths:
        if branch not in left:
            _remove(block, branch)
    return block


def _branch(block, name):
    """The modules of one residual branch, by their names in a block, in the order in which they run."""
    number = {"attn": 1, "mlp": 2}[name]
    names = [f"norm{number}", name] if not kinds.BLOCKS[type(block)].post_norm else [name, f"norm{number}"]
    names += [each for each in (f"ls{number}", f"drop_path{number}") if hasattr(block, each)]
    return nn.Sequential(OrderedDict((each, getattr(block, each)) for each in names))


def _remove(block, name):
    """Take one branch out of a block whose forward still calls it."""
    number = {"attn": 1, "mlp": 2}[name]
    setattr(block, name, Gone())
    for each in (f"norm{number}", f"ls{number}", f"drop_path{number}"):
        if hasattr(block, each):
            setattr(block, each, nn.Identity())
    if block._parameters.pop(f"gamma_{number}", None) is not None:
        setattr(block, f"gamma_{number}", 1.0)


class Gone(nn.Module):
    """In place of an attention or MLP that was removed, where timm's block insists on calling one: gives zeros."""

    def forward(self, x, *_args, **_kwargs):
        return torch.zeros_like(x)
