"""Load a saved sub-network, a folder with model.safetensors and config.json, as a network of timm's modules.

Where timm has none that is narrow enough, small ones of vit/families.py stand (``OWN_MODULES``).

Needs torch, timm (1.0.23 or newer) and safetensors, and of this repository vit/families.py and vit/weights.py: the
three files may be copied, into a package too. Nothing that stands in the folder is run, and nothing is downloaded.
"""

import json
from pathlib import Path

import timm

if __name__ == "models.subnet.load":
    from models.vit import families, weights
elif __package__:  # copied: the files lie beside each other, in a package
    from . import families, weights
else:  # or in none
    import families
    import weights

WEIGHTS_NAME, CONFIG_NAME = "model.safetensors", "config.json"
# What config.json may say to timm. Other arguments of timm's make it fetch or run something.
MODEL_ARGS = {"img_size", "patch_size", "embed_dim", "depth", "depths", "num_heads", "window_size"}
MODEL_ARGS |= {"qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "global_pool"}
MODEL_ARGS |= {"rel_pos_type", "use_shared_rel_pos_bias"}
TRANSFORM = ("mean", "std", "interpolation", "crop_pct", "crop_mode")  # how the images are made at evaluation
PRETRAINED_CFG = {"input_size", "fixed_input_size", *TRANSFORM, "num_classes", "first_conv", "classifier", "license"}
# Above every size of an image, a width or a number of classes that a network has.
MOST = 2**20


def load_subnetwork(folder):
    """The network saved in ``folder``, in eval mode on the CPU.

    ``pretrained_cfg`` of the network holds its input size, mean and std, for ``timm.data.resolve_data_config``, and
    ``label_names``, the names of its classes, if they are known. Raises ValueError if config.json is not that of a
    sub-network, or the weights are not those of one.
    """
    config, path = read_config(folder), Path(folder) / WEIGHTS_NAME
    network = timm.create_model(
        config["architecture"],
        num_classes=config["num_classes"],
        pretrained_cfg=config["pretrained_cfg"] | {"label_names": config.get("label_names")},
        **config["model_args"],
    )
    families.narrow(network, config["widths"]["attn"], config["widths"]["mlp"])
    try:
        state, own = weights.read_safetensors(path)[0], network.state_dict()
        if (wrong := state.keys() ^ own.keys()) or any(state[name].shape != own[name].shape for name in own):
            raise ValueError(f"its tensors are not those that {CONFIG_NAME} says {sorted(wrong)[:2] or ''}".strip())
        network.load_state_dict(weights.converted(state, own))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    return network.eval()


def read_config(folder):
    """config.json of a saved sub-network as a dict. Raises ValueError if it is not one."""
    path = Path(folder) / CONFIG_NAME
    try:
        if not path.is_file():
            raise ValueError("no such file")
        config = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read ({error})") from None
    check_config(config, path)
    return config


def check_config(config, source):
    """Raise ValueError, which names ``source``, if ``config`` does not describe a sub-network, or more than that."""
    wanted = {"architecture", "model_args", "num_classes", "pretrained_cfg", "widths"}
    missing = sorted(wanted - set(config)) if isinstance(config, dict) else sorted(wanted)
    if missing:
        raise ValueError(f"{source}: not the config.json of a sub-network: it has no {', '.join(missing)}")
    try:
        values = [x for v in config["model_args"].values() for x in (v if isinstance(v, list | tuple) else [v])]
        sizes = [config["num_classes"], *(v for v in values if not isinstance(v, bool | str))]
        sizes += [*config["widths"]["attn"], *config["widths"]["mlp"], *config["pretrained_cfg"].get("input_size", ())]
        unknown = (config["model_args"].keys() - MODEL_ARGS) | (config["pretrained_cfg"].keys() - PRETRAINED_CFG)
        unknown |= set() if timm.is_model(config["architecture"]) else {config["architecture"]}
    except (TypeError, KeyError, AttributeError) as error:  # a list where an object belongs, a number for a name
        raise ValueError(f"{source}: not the config.json of a sub-network ({error!r})") from None
    if unknown:
        raise ValueError(f"{source}: refused, it names {', '.join(sorted(unknown))} to timm; expected sizes alone")
    for size in sizes:
        if type(size) is not int or not 0 <= size <= MOST:
            raise ValueError(f"{source}: {size!r:.40} is no size; expected integers of 0 to {MOST}")
    _check_transform(config["pretrained_cfg"], source)


def _check_transform(cfg, source):
    """Raise ValueError, which names ``source``, if timm can make no transform by what ``cfg`` says of it."""
    try:
        timm.data.create_transform(**timm.data.resolve_data_config({"in_chans": 3}, cfg))
        three = all(len(cfg.get(name, "rgb")) == 3 for name in ("mean", "std"))
        if not three or not 0.1 <= cfg.get("crop_pct", 1.0) <= 1:
            raise ValueError("three numbers each in mean and std, and a crop_pct of 0.1 to 1, are expected")
    except Exception as error:  # timm looks words up, asserts, and computes with what stands there
        raise ValueError(f"{source}: its pretrained_cfg describes no transform ({error!r})") from None
