"""Super-networks on disk: a folder with checkpoint_N.pth and mask_table.json, published ones and our own alike."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from models.cost import MATMULS, Shapes
from models.vit import ALIASES, ModelSpec, as_supernet, full_widths, load_weights
from models.width_table import WidthTable
from utils import InputError

TABLE_NAME = "mask_table.json"


@dataclass
class SuperNet:
    """A loaded super-network: the model (stock timm with PrefixBlocks), how it was built, its table and its costs."""

    model: nn.Module
    spec: ModelSpec
    table: WidthTable
    shapes: Shapes
    source: Path


def newest_checkpoint(folder):
    """The checkpoint_N.pth of ``folder`` with the highest N. Raises InputError if there is none."""
    found = {int(m[1]): path for path in Path(folder).glob("checkpoint_*.pth") if (m := _NUMBERED.fullmatch(path.name))}
    if not found:
        raise InputError(f"{folder}: no checkpoint_N.pth in it; expected checkpoint_N.pth and {TABLE_NAME}")
    return found[max(found)]


_NUMBERED = re.compile(r"checkpoint_(\d+)\.pth")


def resolve(args):
    """The checkpoint file that ``--checkpoint`` (folder or file) or ``--model`` point to. Raises InputError."""
    if not args.checkpoint and not args.model:
        raise InputError("give --checkpoint FOLDER, or --model for output/peelable/<model>/")
    path = Path(args.checkpoint or f"output/peelable/{args.model}")
    if not path.exists():
        raise InputError(f"{path}: no such folder or file; expected checkpoint_N.pth and {TABLE_NAME} in it")
    return newest_checkpoint(path) if path.is_dir() else path


def load_supernet(path, content, args, **kwargs):
    """Build the super-network of the checkpoint ``content`` (``read_checkpoint``) that was found at ``path``.

    The model's name comes from --model, else from the table's meta, the checkpoint's args or the folder's name.
    ``kwargs`` go to timm, e.g. drop_path_rate. Raises InputError if weights, table and model do not belong together.
    """
    table_path = Path(args.mask_table) if args.mask_table else path.parent / TABLE_NAME
    table = WidthTable.load(table_path)
    if args.use_ema and not content.get("model_ema"):
        raise InputError(f"--use_ema: {path} has no averaged weights (member 'model_ema')")
    state = content["model_ema"] if args.use_ema else content["model"]
    spec = ModelSpec(
        name=_model_name(args, table, content, path),
        num_classes=_num_classes(state, path),
        img_size=args.input_size or table.meta.get("img_size"),
    )
    model = spec.build(**kwargs)
    load_weights(model, state, path)
    as_supernet(model)
    table.check_fits(full_widths(model), table_path)
    return SuperNet(model, spec, table, Shapes.of(model), path)


def _model_name(args, table, content, path):
    saved = content.get("args")
    folder = path.parent.name if path.parent.name in ALIASES else None
    name = args.model or table.meta.get("model") or (isinstance(saved, argparse.Namespace) and saved.model) or folder
    if not name:
        raise InputError(f"{path}: does not say which model it is; give --model")
    return name


def _num_classes(state, path):
    if "head.weight" not in state:
        raise InputError(f"{path}: has no classifier (head.weight)")
    return state["head.weight"].shape[0]


def table_meta(spec, shapes, table):
    """The meta member of mask_table.json: the model, and the costs of every step."""
    return {
        "model": spec.name,
        "img_size": spec.img_size,
        "num_classes": spec.num_classes,
        "macs": [shapes.macs(widths) for widths in table.steps],
        "macs_with_attention_matmuls": [shapes.macs(widths, MATMULS) for widths in table.steps],
        "parameters": [shapes.parameters(widths) for widths in table.steps],
    }
