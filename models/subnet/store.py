"""Super-networks and sub-networks on disk, published ones and our own alike.

A super-network is a folder with checkpoint_N.pth and mask_table.json. A sub-network is a super-network whose table has
one step: a folder with model.safetensors and config.json, or a checkpoint with the same description inside.
"""

import copy
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from models.piad.width_table import TABLE_NAME, WidthTable
from models.subnet import export, load
from models.subnet.budget import Budget, Size, Sizes
from models.subnet.extract import extract
from models.subnet.latency import LatencyTable
from models.vit.cost import MATMULS, Costs
from models.vit.families import OWN_MODULES, narrow
from models.vit.pretrained import (
    ALIASES,
    OWN_SHAPES,
    ModelSpec,
    centre_crop,
    classes_of,
    image_shape,
    load_weights,
    read_checkpoint,
    uncropped,
)
from models.vit.supernet import as_stock, as_supernet, set_widths
from models.vit.weights import digest
from models.vit.widths import Widths
from models.wpac.compensation import COMPENSATION_NAME, attach, compensate, load_compensation
from utils import InputError, NotNamed

WEIGHTS_NAME = "reparamed.pth"
# In a folder without numbered checkpoints, the first of these; the second and the third are the paper's own code's.
OTHER_NAMES = (WEIGHTS_NAME, "checkpoint.pth", "reparamed_proxySize=*.pth", load.WEIGHTS_NAME)
_NUMBERED = re.compile(r"checkpoint_(\d+)\.pth")


@dataclass(repr=False)
class SuperNetwork:
    """A super-network as it is loaded: the module, how it was built, its width table and its costs.

    What takes ``widths`` (Widths) takes a budget in their place, one of macs_ratio=0.5, macs="8.44G", params="10M" and
    op_code=160 (a step of the table), and then the largest sub-network within it.

    weights: their digest. compensation: 2L Compensation, if what is cut is to be compensated. one_size: it is a
    sub-network already, so that ``supernet`` is a stock network and the table has one step. began: the digest of the
    weights that training began from, if it trained compensated slices.
    """

    supernet: nn.Module
    spec: ModelSpec
    table: WidthTable
    costs: Costs
    source: Path
    weights: str
    compensation: list | None = None
    one_size: bool = False
    began: str | None = None

    def __repr__(self):
        how = "compensated" if self.compensation else "as plain slices"
        return f"<SuperNetwork {self.spec.name} of {self.source}: {len(self.table.steps)} sizes, cut {how}>"

    def budgets(self):
        """What each step of the table costs, Sizes."""
        macs = [self.costs.macs(widths) for widths in self.table.steps]
        params = map(self.costs.parameters, self.table.steps)
        return Sizes(Size(i, m, m / macs[0], p) for i, (m, p) in enumerate(zip(macs, params, strict=True)))

    def widths(self, **budget):
        """The Widths that a budget obtains. Raises InputError with the reachable range."""
        return Budget.of(**budget).choose(self.table, self.costs).widths

    def slice(self, widths):
        """The stand-alone network of ``widths``, cut as it is, in eval mode. Raises InputError for widths that a
        sub-network does not have."""
        if self.one_size and widths != self.table.steps[0]:
            raise InputError(f"{self.source}: is one sub-network of one size; other widths need the super-network")
        return copy.deepcopy(self.supernet).eval() if self.one_size else extract(self.supernet, widths)

    def cut(self, widths=None, **budget):
        """The stand-alone network of ``widths``, compensated if there is something to do it with."""
        subnet = self.slice(widths or self.widths(**budget))
        return compensate(subnet, self.supernet, self.compensation) if self.compensation else subnet

    def use(self, widths=None, **budget):
        """Switch the live super-network to ``widths``, until it is switched again. Nothing is copied: compensation is
        folded in at every call, and what a removed branch adds on average is left out. Returns the network, in eval
        mode."""
        widths = widths or self.widths(**budget)
        if not self.one_size:
            attach(self.supernet, self.compensation)
            set_widths(self.supernet, widths)
        return self.supernet.eval()

    def latency_ms(self, widths=None, device="cpu", batch_size=1, amp="none", **budget):
        """Median milliseconds per batch at ``widths``, measured now and kept beside the checkpoint."""
        latencies = LatencyTable.beside(self, torch.device(device), batch_size, amp)
        return latencies.measure([widths or self.widths(**budget)])[0]

    def save(self, folder, widths=None, formats=(), *, network=None, origin=None, **budget):
        """Write a sub-network to ``folder``, as ``export.save`` does and returns it.

        network: what ``cut`` made of ``widths``, if it is there already. origin: plain values that say where it comes
        from.
        """
        widths = widths or self.widths(**budget)
        network = network or self.cut(widths)
        config = subnet_config(network, self.spec, widths, self.costs)
        return export.save(network, config | {"origin": origin or {"checkpoint": str(self.source)}}, folder, formats)


def numbered_checkpoints(folder):
    """{N: path} of every checkpoint_N.pth in ``folder``."""
    return {int(m[1]): path for path in Path(folder).glob("checkpoint_*.pth") if (m := _NUMBERED.fullmatch(path.name))}


def newest_checkpoint(folder):
    """The checkpoint_N.pth of ``folder`` with the highest N, or else the first of OTHER_NAMES that is there. Raises
    InputError if there is none of them."""
    if found := numbered_checkpoints(folder):
        return found[max(found)]
    for name in OTHER_NAMES:
        for path in sorted(Path(folder).glob(name)):
            return path
    raise InputError(
        f"{folder}: no checkpoint_N.pth (or {WEIGHTS_NAME}) in it; expected that and {TABLE_NAME}, or a saved "
        f"sub-network's {load.WEIGHTS_NAME} and {load.CONFIG_NAME}"
    )


def began_from(content):
    """The digest of the weights that the training of a checkpoint's ``content`` began from, whose compensation goes
    with the trained weights; None if it trained plain slices."""
    named = content.get("compensation")
    return named if isinstance(named, str) else None


def load_supernet(
    path, *, model=None, input_size=None, crop_ratio=None, mask_table=None, use_ema=False, compensation=None,
    compensate=None, **kwargs,
):  # fmt: skip
    """Load a super-network or a sub-network from a folder or a checkpoint file, a SuperNetwork.

    Args:
        model: its name (default: from the table's meta, the checkpoint's args or the folder's name).
        input_size: image size in pixels (default: the table's, or the model's own).
        crop_ratio: centre crop / resized image at evaluation (default: the table's, or the model's own).
        mask_table: the width table (default: mask_table.json beside the checkpoint).
        use_ema: take the averaged weights.
        compensation: the compensation file (default: compensation.safetensors beside the checkpoint).
        compensate: whether to use it (default: if it is there, ``compensation`` is given, or the weights were trained
            with one).
        kwargs: go to timm, e.g. drop_path_rate.
    Raises InputError if the files do not belong together.
    """
    path = newest_checkpoint(path) if Path(path).is_dir() else Path(path)
    content, beside = read_checkpoint(path), path.with_name(load.CONFIG_NAME)
    if path.name == load.WEIGHTS_NAME and beside.is_file() and not path.with_name(TABLE_NAME).is_file():
        try:  # a saved sub-network: this is its description
            content["config"] = load.read_config(path.parent)
        except ValueError as error:
            raise InputError(str(error)) from None
    if use_ema and not content.get("model_ema"):
        raise InputError(f"{path}: has no averaged weights (member 'model_ema')")
    state = content["model_ema" if use_ema else "model"]
    weights = digest(state)
    if "config" in content:
        return _load_one_size(path, content["config"], state, input_size, crop_ratio, weights, kwargs)
    table_path = Path(mask_table) if mask_table else path.parent / TABLE_NAME
    table = WidthTable.load(table_path)
    if not mask_table:
        table.check_made_for(weights, table_path)
        if "mask_table" in content:
            table = _agreed(table, WidthTable.from_json(content["mask_table"], path), table_path, path)
    size, crop = table.meta.get("img_size"), table.meta.get("crop_ratio")  # the user's to edit
    size = input_size or (size if type(size) is int and size > 0 else None)
    crop = crop_ratio or (crop if type(crop) in (int, float) and 0.1 <= crop <= 1 else None)
    spec = ModelSpec(model or _model_name(table, content, path), classes_of(state), size, crop)
    supernet = spec.build(**kwargs)
    load_weights(supernet, state, path)
    costs = Costs.of(as_supernet(supernet))
    table.check_fits(costs, table_path)
    file = Path(compensation or path.parent / COMPENSATION_NAME)
    began = began_from(content)
    if compensate is None:
        compensate = bool(compensation or began) or file.is_file()
    known = load_compensation(file, supernet, began or weights) if compensate else None
    return SuperNetwork(supernet, spec, table, costs, path, weights, known, began=began)


def _load_one_size(path, config, state, input_size, crop_ratio, weights, kwargs):
    """The SuperNetwork of one step that ``config`` (of ``subnet_config``) describes, for images of ``input_size``, with
    the mean, std, interpolation and crop of ``config``, which ``crop_ratio`` replaces."""
    try:
        load.check_config(config, path)
        widths = Widths.from_dict(config["widths"])
        spec = ModelSpec(config["model"], config["num_classes"], input_size or config["img_size"])
        subnet = as_supernet(spec.build(**kwargs))
        costs = Costs.of(subnet)
        set_widths(subnet, widths)  # refuses widths that do not fit
        narrow(as_stock(subnet), widths.attn, widths.mlp)
        saved = {name: value for name, value in config["pretrained_cfg"].items() if name in load.TRANSFORM}
        if uncropped(*config["pretrained_cfg"].get("input_size", (3, 0, 0))[1:]):  # that says nothing of larger images
            saved = {name: value for name, value in saved.items() if not name.startswith("crop")}
        subnet.pretrained_cfg |= saved | centre_crop(crop_ratio) | {"label_names": config.get("label_names")}
    except InputError:
        raise
    except Exception as error:  # whatever stands there goes through timm and torch
        reason = f"{type(error).__name__}: {error}"
        raise InputError(f"{path}: its description is that of no network ({reason})") from None
    load_weights(subnet, state, path)
    return SuperNetwork(subnet, spec, WidthTable([widths]), costs, path, weights, one_size=True)


def _agreed(beside, inside, table_path, path):
    """The table inside a checkpoint. The one beside it may be longer or shorter by what a stopped run had not saved.

    Raises NotNamed if they are of different runs.
    """
    common = min(beside.last, inside.last) + 1
    if beside.steps[:common] != inside.steps[:common]:
        words = f"{table_path}: not the table that {path.name} was trained with; to use it anyway, name it"
        raise NotNamed(words, "mask_table")
    return beside if beside.last == inside.last else inside


def _model_name(table, content, path):
    folder = path.parent.name if path.parent.name in ALIASES else None
    for name in (table.meta.get("model"), getattr(content.get("args"), "model", None), folder):
        if name and isinstance(name, str):
            return name
    raise NotNamed(f"{path}: does not say which model it is; name it", "model")


def subnet_config(subnet, spec, widths, costs):
    """The description of a sub-network: all that is needed to rebuild it without this repository, and to know what it
    is. It is timm's layout for model hubs, and what only a sub-network has.

    How its images are made and the names of the classes are what timm's ``pretrained_cfg`` of ``subnet`` says. Returns
    a dict of plain values.
    """
    architecture, arguments = spec.timm_call()
    # Not where timm's weights come from: these are others. Their licence is the one of timm's, if there are any.
    kept = [*load.TRANSFORM, "fixed_input_size", "first_conv", "classifier"]
    kept += ["license"] * (spec.name not in OWN_SHAPES)
    names = subnet.pretrained_cfg.get("label_names") or ()
    channels, height, width = image_shape(subnet)
    return {
        "architecture": architecture,
        "num_classes": spec.num_classes,
        "num_features": subnet.num_features,
        "pretrained_cfg": {
            **{name: subnet.pretrained_cfg[name] for name in kept if subnet.pretrained_cfg.get(name) is not None},
            "num_classes": spec.num_classes,
            "input_size": (channels, height, width),
            **uncropped(height, width),
        },
        "model_args": arguments,
        **({"label_names": names} if len(names) == spec.num_classes else {}),
        "model": spec.name,
        "img_size": spec.img_size,
        "widths": widths.as_dict(),
        "full_widths": costs.full.as_dict(),
        "attention_scale": "1 / sqrt(head width), as in any timm Attention: the query weights hold the rest",
        "modules_not_of_timm": sorted({type(m).__name__ for m in subnet.modules() if isinstance(m, OWN_MODULES)}),
        "macs": costs.macs(widths),
        "macs_with_attention_matmuls": costs.macs(widths, MATMULS),
        "parameters": sum(parameter.numel() for parameter in subnet.parameters()),
    }
