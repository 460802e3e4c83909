"""Saving a sub-network where others can use it: safetensors, config.json and a model card, ONNX, torch.export, int8.

Everything is written into a folder inside the target first and checked there. Only what is complete and passes moves
in.
"""

import copy
import json
import os
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

import utils
from models.subnet.load import CONFIG_NAME, WEIGHTS_NAME
from models.vit.pretrained import image_shape
from models.vit.weights import as_safetensors
from utils import InputError

FORMATS = ("onnx", "pt2", "int8")
ONNX_NAME, PT2_NAME, INT8_NAME = "model.onnx", "model.pt2", "model.int8.onnx"
# Largest difference of an exported network's logits from PyTorch's, relative to the largest logit.
TOLERANCE = 1e-4
# Batches on which an export is compared: neither is the size that it was traced with.
CHECKED_BATCHES = (1, 5)
TRACED_BATCH = 2
# The largest batch of an export: without a limit torch 2.6 takes its own largest integer for one that fails.
MOST_IMAGES = 2**20


def packages(formats):
    """The packages that some of FORMATS need."""
    return () if set(formats) <= {"pt2"} else ("onnx", "onnxscript", "onnxruntime")


def save(subnet, config, folder, formats=()):
    """Write a sub-network to ``folder``: model.safetensors, config.json, README.md and the exports of ``formats``.

    formats: of FORMATS. config: of ``subnet_config``, and if wanted ``origin``, for the model card. Returns {file name:
    largest difference of its logits from PyTorch's, relative to the largest logit, or None if it is no export}. Raises
    InputError, and leaves the folder as it was, if an export differs by more than TOLERANCE; int8 may. Main rank only;
    the others wait and return {}.
    """
    files = {}
    if utils.is_main():
        subnet = copy.deepcopy(subnet).cpu().eval()
        with _atomic_folder(Path(folder)) as place:
            lines = (f" {json.dumps(key)}: {json.dumps(value)}" for key, value in config.items())
            (place / CONFIG_NAME).write_text("{\n" + ",\n".join(lines) + "\n}\n")
            (place / "README.md").write_text(model_card(config))
            # Not save_file, which makes files that their owner alone can read.
            (place / WEIGHTS_NAME).write_bytes(as_safetensors(subnet.state_dict()))
            if "pt2" in formats:
                files[PT2_NAME] = _export_pt2(subnet, place / PT2_NAME)
            if "onnx" in formats or "int8" in formats:
                files[ONNX_NAME] = _export_onnx(subnet, place / ONNX_NAME)
            if "int8" in formats:
                files[INT8_NAME] = _quantise(subnet, place / ONNX_NAME, place / INT8_NAME)
            files = {file.name: files.get(file.name) for file in sorted(place.iterdir())}
    utils.barrier()
    return files


MODEL_CARD = """---
library_name: timm
pipeline_tag: image-{task}
license: {license}
---
# {model}, cut to {macs} MACs

| | |
|---|---|
{rows}

`load_subnetwork("this folder")` of skd's `models/subnet/load.py` loads it. That file may be copied, with `families.py`
and `weights.py` of `models/vit` beside it; they need torch, timm and safetensors alone.
{timm}

Licence of timm's weights of {architecture}: {license}. If it was cut from others, theirs holds.
"""


def model_card(config):
    """The text of README.md, in the layout of model hubs. config: the content of config.json."""
    origin, widths, full = config.get("origin", {}), config["widths"], config["full_widths"]
    tested = origin if origin.get("images") else {}
    rows = {
        "cut from": config["model"],
        **{name: origin.get(name) for name in ("checkpoint", "asked", "compensated", "calibrated")},
        "MACs with the attention matmuls": utils.with_unit(config["macs_with_attention_matmuls"]),
        "parameters": utils.with_unit(config["parameters"]),
        "input": " x ".join(map(str, config["pretrained_cfg"]["input_size"])),
        "head width of each block": f"{widths['attn']} of {full['attn']}",
        "hidden units of each block": f"{widths['mlp']} of {full['mlp']}",
        "tested on": tested.get("data_set"),
        "images": tested.get("images"),
        "classifier of the features": tested.get("probe"),
        "top-1, %": tested.get("top1"),
        "top-5, %": tested.get("top5"),
    }
    known = {name: f"{value:.2f}" if isinstance(value, float) else value for name, value in rows.items() if value}
    with_timm = 'timm.create_model("local-dir:this folder", pretrained=True)'
    return MODEL_CARD.format(
        task="classification" if config["num_classes"] else "feature-extraction",
        model=config["model"],
        architecture=config["architecture"],
        macs=utils.with_unit(config["macs"]),
        license=config["pretrained_cfg"].get("license", "unknown"),
        rows="\n".join(f"| {name} | {value} |" for name, value in known.items()),
        timm=f"So does `{with_timm}`."
        if widths == full
        else "timm alone does not: its models have no arguments for these widths.",
    )


@contextmanager
def _atomic_folder(folder):
    """Yield an empty folder inside ``folder``; on success its files move up, on failure nothing does. Raises InputError
    if the file system refuses."""
    place = utils.temporary_path(folder, "files")  # inside: another folder may be on another disk
    try:
        utils.remove_left_overs(folder)
        place.mkdir(parents=True)
        yield place
        for name in {PT2_NAME, ONNX_NAME, INT8_NAME} - {file.name for file in place.iterdir()}:
            (folder / name).unlink(missing_ok=True)  # of another network that was saved here
        for file in place.iterdir():
            os.replace(file, folder / file.name)
    except OSError as error:
        raise utils.unwritable(folder, error) from None
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _example(subnet, batch):
    return torch.randn(batch, *image_shape(subnet), generator=torch.Generator().manual_seed(batch))


def _export_pt2(subnet, path):
    """torch.export with a dynamic batch; ``torch.export.load(path).module()`` runs it."""
    batch = {0: torch.export.Dim("batch", max=MOST_IMAGES)}
    program = torch.export.export(subnet, (_example(subnet, TRACED_BATCH),), dynamic_shapes=(batch,))
    torch.export.save(program, path)
    return _difference(subnet, torch.export.load(path).module(), path.name, TOLERANCE)


def _export_onnx(subnet, path):
    """ONNX with a dynamic batch: images [batch, 3, height, width] -> logits [batch, classes], or features."""
    batch = {0: torch.export.Dim("batch", max=MOST_IMAGES)}
    program = torch.onnx.export(
        subnet, (_example(subnet, TRACED_BATCH),), input_names=["images"],
        output_names=["logits" if subnet.num_classes else "features"],
        dynamic_shapes=(batch,), dynamo=True, verbose=False,
    )  # fmt: skip
    for node in program.model.graph:
        node.metadata_props.clear()  # stack traces of this machine
    program.save(path, external_data=False)
    return _difference(subnet, OnnxNetwork(path), path.name, TOLERANCE)


def _quantise(subnet, source, path):
    """Weights of the linear layers in int8 per output channel, activations in uint8 by each input's own range."""
    from onnxruntime.quantization import QuantType, quantize_dynamic
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = path.with_name("prepared.onnx")
    try:
        quant_pre_process(source, prepared)
        # Seven bits: the products of eight saturate on CPUs without VNNI.
        quantize_dynamic(prepared, path, per_channel=True, reduce_range=True, weight_type=QuantType.QInt8)
    except Exception as error:  # versions of torch, onnx and ONNX Runtime that do not go together, in many ways
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path.name}: ONNX Runtime does not quantise what torch has exported ({reason})") from None
    prepared.unlink()
    return _difference(subnet, OnnxNetwork(path), path.name)


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


@torch.inference_mode()
def _difference(subnet, exported, name, tolerance=float("inf")):
    """The largest difference of an export's logits from PyTorch's, relative to the largest logit. Raises InputError if
    it is more than ``tolerance``, or not a number."""
    differences = []
    for batch in CHECKED_BATCHES:
        images = _example(subnet, batch)
        expected, got = subnet(images), exported(images)
        if expected.shape != got.shape:
            raise InputError(f"{name}: gives {tuple(got.shape)} where PyTorch gives {tuple(expected.shape)}")
        differences.append((expected - got).abs().max() / expected.abs().max())
    difference = torch.stack(differences).max().item()
    if not difference <= tolerance:
        raise InputError(f"{name}: its logits differ by {difference:.1e} from PyTorch's: nothing is written")
    return difference
