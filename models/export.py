"""Saving a sub-network where others can use it: safetensors and config.json, ONNX, torch.export and int8.

Everything is written into a folder beside the target first and checked there; only what is whole and passes moves in.
"""

import copy
import importlib.util
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors.torch import save as to_safetensors
from torch import nn

import utils
from models.cost import MATMULS
from models.peel import describe
from models.subnetwork import CONFIG_NAME, WEIGHTS_NAME
from models.vit import image_shape
from utils import InputError, say

ONNX_NAME, PT2_NAME, INT8_NAME = "model.onnx", "model.pt2", "model.int8.onnx"
# Largest difference of an exported network's logits from PyTorch's, relative to the largest logit.
TOLERANCE = 1e-4
# Batches on which an export is compared: neither is the size that it was traced with.
CHECKED_BATCHES = (1, 5)
TRACED_BATCH = 2
# The largest batch of an export: without a limit torch 2.6 takes its own largest integer for one that fails.
MOST_IMAGES = 2**20


def require(formats):
    """Raise InputError if packages that the export formats need are not installed, or ranks would write alike."""
    needed = () if set(formats) <= {"pt2"} else ("onnx", "onnxscript", "onnxruntime")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"--export {' '.join(formats)} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if formats and utils.world_size() > 1:
        raise InputError("--export runs in one process: start it without torchrun")


def save(network, spec, widths, shapes, folder, origin, crop_ratio, formats=()):
    """Write ``network`` to ``folder``: model.safetensors, config.json and the exports in ``formats`` (onnx, pt2, int8).

    origin: dict that says where it came from; crop_ratio: centre crop / resized image at evaluation. Raises
    InputError, and leaves the folder as it was, if an export differs from PyTorch. Main rank only.
    """
    if utils.is_main():
        network = copy.deepcopy(network).cpu().eval()
        with _whole_folder(Path(folder)) as place:
            config = config_of(network, spec, widths, shapes, crop_ratio) | {"origin": origin}
            lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in config.items())
            (place / CONFIG_NAME).write_text("{\n" + ",\n".join(lines) + "\n}\n")
            # Not save_file, which makes files that their owner alone can read.
            (place / WEIGHTS_NAME).write_bytes(to_safetensors(network.state_dict()))
            if "pt2" in formats:
                _export_pt2(network, place / PT2_NAME)
            if "onnx" in formats or "int8" in formats:
                _export_onnx(network, place / ONNX_NAME)
            if "int8" in formats:
                _quantise(network, place / ONNX_NAME, place / INT8_NAME)
            names = sorted(file.name for file in place.iterdir())
        say(f"wrote {folder}: {', '.join(names)}")
    utils.barrier()


def config_of(network, spec, widths, shapes, crop_ratio):
    """config.json: all that is needed to rebuild the network without this repository, and to know what it is."""
    architecture, arguments = spec.timm_call()
    channels, height, width = image_shape(network)
    # What datasets.eval_transform does, in timm's words: small images are resized alone, without a crop.
    crop = {"crop_pct": 1.0, "crop_mode": "squash"} if height <= 32 else {"crop_pct": crop_ratio, "crop_mode": "center"}
    data = {"mean": list(network.pretrained_cfg["mean"]), "std": list(network.pretrained_cfg["std"])}
    return {
        "architecture": architecture,
        "architecture_args": arguments,
        **describe(spec, widths),
        "full_widths": shapes.full.as_dict(),
        "attention_scale": "1 / sqrt(head width), as in any timm Attention: the query weights hold the rest",
        "input_size": [channels, height, width],
        **data,
        "interpolation": "bicubic",
        **crop,
        "macs": shapes.macs(widths),
        "macs_with_attention_matmuls": shapes.macs(widths, MATMULS),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }


@contextmanager
def _whole_folder(folder):
    """Yield an empty folder beside ``folder``; on success its files move in, on failure nothing does."""
    folder.mkdir(parents=True, exist_ok=True)
    place = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    place.mkdir()
    try:
        yield place
        for file in place.iterdir():
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(place)


# ------------------------------------------------------------------------------------------ formats


def _example(network, batch):
    return torch.randn(batch, *image_shape(network), generator=torch.Generator().manual_seed(batch))


def _export_pt2(network, path):
    """torch.export with a dynamic batch; ``torch.export.load(path).module()`` runs it."""
    batch = {0: torch.export.Dim("batch", max=MOST_IMAGES)}
    program = torch.export.export(network, (_example(network, TRACED_BATCH),), dynamic_shapes=(batch,))
    torch.export.save(program, path)
    _check(network, torch.export.load(path).module(), path.name)


def _export_onnx(network, path):
    """ONNX with a dynamic batch: images [batch, 3, height, width] -> logits [batch, classes]."""
    batch = {0: torch.export.Dim("batch", max=MOST_IMAGES)}
    program = torch.onnx.export(
        network, (_example(network, TRACED_BATCH),), input_names=["images"], output_names=["logits"],
        dynamic_shapes=(batch,), dynamo=True, verbose=False,
    )  # fmt: skip
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces of this machine
    program.save(path, external_data=False)
    _check(network, OnnxNetwork(path), path.name)


def _quantise(network, source, path):
    """Weights of the linear layers in int8 per output channel, activations in uint8 by each input's own range."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_name("prepared.onnx")
    try:
        quant_pre_process(source, prepared)
        quantize_dynamic(prepared, path, per_channel=True, weight_type=QuantType.QInt8)
    except Exception as error:  # versions of torch, onnx and ONNX Runtime that do not go together, in many ways
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"--export int8: ONNX Runtime does not quantise what torch has exported ({reason})") from None
    prepared.unlink()
    _difference(network, OnnxNetwork(path), path.name)


class OnnxNetwork(nn.Module):
    """An ONNX file as something to call with images [B, 3, h, w] on the CPU, by ONNX Runtime."""

    def __init__(self, path):
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def forward(self, images):
        (logits,) = self.session.run(None, {"images": images.cpu().numpy()})
        return torch.from_numpy(logits).to(images.device)


def _check(network, exported, name):
    """Raise InputError if an export's logits are further from PyTorch's than TOLERANCE."""
    difference = _difference(network, exported, name)
    if not difference <= TOLERANCE:
        raise InputError(f"{name}: its logits differ by {difference:.1e} from PyTorch's: nothing is written")


@torch.inference_mode()
def _difference(network, exported, name):
    """The largest difference of an export's logits from PyTorch's, relative to the largest logit; it is printed."""
    difference = 0.0
    for batch in CHECKED_BATCHES:
        images = _example(network, batch)
        expected, got = network(images), exported(images)
        if expected.shape != got.shape:
            raise InputError(f"{name}: gives {tuple(got.shape)} where PyTorch gives {tuple(expected.shape)}")
        difference = max(difference, ((expected - got).abs().max() / expected.abs().max()).item())
    say(f"{name}: largest difference from PyTorch {difference:.1e} of the largest logit")
    return difference
