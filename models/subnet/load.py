"""Load a saved sub-network, a folder with model.safetensors and config.json, as a network of timm's modules.

Where timm has none that is narrow enough, small ones of vit/families.py stand (``OWN_MODULES``).

Needs torch, timm (1.0.23 or newer) and safetensors, and of this repository vit/families.py alone: both files may be
copied.
"""

import json
from pathlib import Path

import timm
from safetensors.torch import load_file

try:
    from models.vit import families
except ImportError:  # copied: the two files lie beside each other
    import families

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"


def load_subnetwork(folder):
    """The network saved in ``folder``, in eval mode on the CPU.

    ``pretrained_cfg`` of the network holds its input size, mean and std, for ``timm.data.resolve_data_config``. Raises
    ValueError if config.json is not that of a sub-network.
    """
    config = read_config(folder)
    network = timm.create_model(
        config["architecture"],
        num_classes=config["num_classes"],
        pretrained_cfg_overlay=config["pretrained_cfg"],
        **config["model_args"],
    )
    families.narrow(network, config["widths"]["attn"], config["widths"]["mlp"])
    network.load_state_dict(load_file(Path(folder) / WEIGHTS_NAME))
    return network.eval()


def read_config(folder):
    """config.json of a saved sub-network as a dict. Raises ValueError if it is not one."""
    path = Path(folder) / CONFIG_NAME
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    wanted = {"architecture", "model_args", "num_classes", "pretrained_cfg", "widths"}
    missing = sorted(wanted - set(config)) if isinstance(config, dict) else sorted(wanted)
    if missing:
        raise ValueError(f"{path}: not the config.json of a sub-network: it has no {', '.join(missing)}")
    return config
