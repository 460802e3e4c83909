"""Weights as they come from files of any origin: what they must satisfy, and a digest of them.

The file needs torch and safetensors alone. Beside subnet/load.py and families.py, it may be copied.
"""

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def digest(state):
    """A fingerprint of a dict of tensors: of their names, types, shapes and values."""
    total = hashlib.sha256()
    for name, value in sorted(state.items()):
        total.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return total.hexdigest()


def check_finite(content):
    """Raise ValueError if a tensor in nested dicts is NaN or infinite."""
    for name, value in content.items():
        if isinstance(value, dict):
            check_finite(value)
        elif isinstance(value, torch.Tensor) and not torch.isfinite(value).all():
            raise ValueError(f"{name} holds NaN or infinite values")


def converted(state, own):
    """``state`` in the types of the state dict ``own``, which has the same names.

    Raises ValueError if a weight has another kind of type (int8 values mean nothing without their scale), or is NaN or
    infinite after the conversion.
    """
    for name, value in state.items():
        wanted = own[name].dtype
        if value.dtype not in (FLOATS if wanted.is_floating_point else (wanted,)):
            raise ValueError(f"{name} is of type {_name(value.dtype)}; expected {_name(wanted)}")
    state = {name: value.to(own[name].dtype) for name, value in state.items()}
    check_finite(state)
    return state


def _name(dtype):
    return str(dtype).removeprefix("torch.")


def as_safetensors(state, **metadata):
    """The bytes of a .safetensors file of a dict of tensors, with a checksum. Raises ValueError on NaN or infinity."""
    check_finite(state)
    return to_safetensors(state, metadata={"format": "pt", "checksum": digest(state)} | metadata)


def read_safetensors(path):
    """(dict of tensors, metadata) of a .safetensors file. Raises ValueError if it is not there, damaged, or if its
    tensors are not those of its checksum; not every file has one."""
    if not Path(path).is_file():
        raise ValueError("no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no dict
    except (SafetensorError, OSError) as error:
        raise ValueError(error) from None
    if metadata.get("checksum", "") not in ("", digest(state)):
        raise ValueError("damaged, its checksum is wrong; fetch or copy it again")
    return state, metadata
