"""Super-networks on disk: a folder with checkpoint_N.pth and mask_table.json, published ones and our own alike."""

import argparse
import re
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from models import peel, subnetwork
from models.compensation import MEMORY_NAME, compensate, load_memory
from models.cost import MATMULS, Shapes
from models.supernet import as_supernet
from models.vit import ALIASES, ModelSpec, classes_of, load_weights, read_checkpoint
from models.width_table import WidthTable
from utils import InputError

TABLE_NAME = "mask_table.json"
WEIGHTS_NAME = "reparamed.pth"


@dataclass
class SuperNet:
    """A loaded super-network: the model (stock timm with PrefixBlocks), how it was built, its table and its costs."""

    model: nn.Module
    spec: ModelSpec
    table: WidthTable
    shapes: Shapes
    source: Path
    memory: list | None = None  # of BlockMemory, if what is cut is to be compensated

    def cut(self, widths):
        """The stand-alone network of ``widths``, compensated if there is something to do it with."""
        network = peel.extract(self.model, widths)
        return compensate(network, self.model, widths, self.memory) if self.memory else network


def numbered_checkpoints(folder):
    """{N: path} of every checkpoint_N.pth in ``folder``."""
    return {int(m[1]): path for path in Path(folder).glob("checkpoint_*.pth") if (m := _NUMBERED.fullmatch(path.name))}


def newest_checkpoint(folder):
    """The checkpoint_N.pth of ``folder`` with the highest N, else the weights of stage 1 or of a saved sub-network.

    Raises InputError if there is none of them.
    """
    folder = Path(folder)
    found = numbered_checkpoints(folder)
    if found:
        return found[max(found)]
    others = [path for name in (WEIGHTS_NAME, subnetwork.WEIGHTS_NAME) if (path := folder / name).is_file()]
    if not others:
        raise InputError(
            f"{folder}: no checkpoint_N.pth (or {WEIGHTS_NAME}) in it; expected that and {TABLE_NAME}, or a saved "
            f"sub-network's {subnetwork.WEIGHTS_NAME} and {subnetwork.CONFIG_NAME}"
        )
    return others[0]


_NUMBERED = re.compile(r"checkpoint_(\d+)\.pth")


def resolve(args):
    """The checkpoint file that ``--checkpoint`` (folder or file) or ``--model`` point to. Raises InputError."""
    if not args.checkpoint and not args.model:
        raise InputError("give --checkpoint FOLDER, or --model for output/peelable/<model>/")
    path = Path(args.checkpoint or f"output/peelable/{args.model}")
    if not path.exists():
        raise InputError(f"{path}: no such folder or file; expected checkpoint_N.pth and {TABLE_NAME} in it")
    return newest_checkpoint(path) if path.is_dir() else path


def read(path):
    """The checkpoint at ``path``; a saved sub-network has its config.json in member ``peeled``, as a fine-tuned one."""
    content, beside = read_checkpoint(path), path.with_name(subnetwork.CONFIG_NAME)
    if path.name == subnetwork.WEIGHTS_NAME and beside.is_file() and not path.with_name(TABLE_NAME).is_file():
        try:
            content["peeled"] = subnetwork.read_config(path.parent)
        except ValueError as error:
            raise InputError(str(error)) from None
    return content


def load_supernet(
    path,
    content=None,
    *,
    model=None,
    input_size=None,
    mask_table=None,
    use_ema=False,
    statistics=None,
    compensate=None,
    **kwargs,
):
    """Load a super-network from a folder or checkpoint file; the options are those of ``main_test.py``.

    ``content``: the checkpoint, if it has been read already. The model's name comes from ``model``, else from the
    table's meta, the checkpoint's args or the folder's name. ``compensate``: True, False, or None for whenever there
    are statistics, or ``statistics`` names them. ``kwargs`` go to timm, e.g. drop_path_rate. Raises InputError if the
    files do not belong together.
    """
    path = newest_checkpoint(path) if Path(path).is_dir() else Path(path)
    content = content or read_checkpoint(path)
    table_path = Path(mask_table) if mask_table else path.parent / TABLE_NAME
    table = WidthTable.load(table_path)
    if "mask_table" in content and not mask_table:
        table = _agreed(table, WidthTable.from_json(content["mask_table"], path), table_path, path)
    state = chosen_weights(content, use_ema, path)
    spec = ModelSpec(
        name=model or _model_name(table, content, path),
        num_classes=classes_of(state),
        img_size=input_size or _image_size(table),
    )
    network = spec.build(**kwargs)
    load_weights(network, state, path)
    as_supernet(network)
    shapes = Shapes.of(network)
    table.check_fits(shapes.full, shapes.whole, table_path)
    if statistics and compensate is None:
        compensate = True
    memory = _memory(network, Path(statistics or path.parent / MEMORY_NAME), compensate)
    return SuperNet(network, spec, table, shapes, path, memory)


def chosen_weights(content, use_ema, path):
    """The averaged weights of a checkpoint, or its last ones. Raises InputError if it has none of the kind."""
    if use_ema and not content.get("model_ema"):
        raise InputError(f"--use_ema: {path} has no averaged weights (member 'model_ema')")
    return content["model_ema"] if use_ema else content["model"]


def loading_options(args):
    """The command-line options that ``load_supernet`` takes."""
    names = ("model", "input_size", "mask_table", "use_ema", "statistics", "compensate")
    return {name: getattr(args, name) for name in names}


def _agreed(beside, inside, table_path, path):
    """The table inside a checkpoint; that beside it may be longer or shorter by what a stopped run had not yet saved.

    Raises InputError if they are of different runs.
    """
    common = min(beside.last, inside.last) + 1
    if beside.steps[:common] != inside.steps[:common]:
        raise InputError(
            f"{table_path}: not the table that {path.name} was trained with; to use it all the same say --mask_table"
        )
    return beside if beside.last == inside.last else inside


def _memory(network, path, wanted):
    """What compensation needs, unless it is declined or, not being asked for, not there."""
    if wanted is False or (wanted is None and not path.is_file()):
        return None
    return load_memory(path, network)


def _model_name(table, content, path):
    saved = content.get("args")
    folder = path.parent.name if path.parent.name in ALIASES else None
    said = (table.meta.get("model"), isinstance(saved, argparse.Namespace) and getattr(saved, "model", None), folder)
    name = next((name for name in said if name and isinstance(name, str)), None)
    if not name:
        raise InputError(f"{path}: does not say which model it is; give --model")
    return name


def _image_size(table):
    """The image size in the table's meta, which is the user's to edit: None if it is no size."""
    size = table.meta.get("img_size")
    return size if type(size) is int and size > 0 else None


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
