"""Creating and loading a pre-trained Vision Transformer of timm's."""

import argparse
import pickle
import re
import sys
import zipfile
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub.utils import get_session
from torch import nn

import utils
from models.vit import weights
from models.vit.supernet import check_supported
from utils import InputError, ModelError, SizeError, first_line, nearest

# Short names for the networks of the paper and for the two small ones that the data sets at hand can train.
ALIASES = {
    "vit_tiny": ("deit_tiny_patch16_224", {}),
    "vit_small": ("deit_small_patch16_224", {}),
    "vit_base": ("deit_base_patch16_224", {}),
    "vit_digits": (
        "vit_tiny_patch16_224",
        {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4},
    ),
    "vit_fashion": (
        "vit_tiny_patch16_224",
        {"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 4, "num_heads": 4},
    ),
}
# Those that timm builds, but has no weights of.
OWN_SHAPES = {name for name, (_, arguments) in ALIASES.items() if arguments}
# Centre crop / resized image at evaluation, of the aliases: DeiT's own, where timm has 0.9.
DEIT_CROP = 0.875


@dataclass(frozen=True)
class ModelSpec:
    """What is needed to build a stock network. name: an alias above or a timm name; num_classes: 0 for no classifier;
    img_size: in pixels (default: the model's own); crop_ratio: centre crop / resized image at evaluation (default: the
    model's own)."""

    name: str
    num_classes: int
    img_size: int | None = None
    crop_ratio: float | None = None

    def timm_call(self):
        """(name, keyword arguments) with which timm.create_model builds it, the number of classes apart."""
        timm_name, fixed = ALIASES.get(self.name, (self.name, {}))
        return timm_name, fixed if self.img_size is None else fixed | {"img_size": self.img_size}

    def build(self, pretrained=False, **kwargs):
        """timm's model, whose ``pretrained_cfg`` says how its images are made. Raises ModelError for an unknown name, a
        model that cannot be cut, or a size it cannot have."""
        timm_name, arguments = self.timm_call()
        check_known(self.name)
        arguments = {"pretrained": pretrained, "num_classes": self.num_classes} | arguments | kwargs
        try:
            model = timm.create_model(timm_name, **arguments)
        except (TypeError, ValueError, AssertionError) as error:
            if pretrained:
                raise
            _, at_own_size = replace(self, img_size=None).timm_call()
            with torch.device("meta"):  # what cannot be cut at any size is told so, and not that its size is wrong
                _check_supported(timm.create_model(timm_name, **at_own_size), self.name)
            if self.img_size is None:
                raise ModelError(f"{self.name}: timm does not build it ({first_line(error)})") from None
            raise SizeError(f"{self.img_size}: timm does not build {self.name} ({first_line(error)})") from None
        _check_supported(model, self.name)
        patch = model.patch_embed.feat_ratio(as_scalar=True)
        if self.img_size is not None and self.img_size % patch:
            raise SizeError(f"{self.img_size}: not a multiple of the patches of {self.name}, {patch} pixels")
        model.pretrained_cfg |= centre_crop(self.crop_ratio or (DEIT_CROP if self.name in ALIASES else None))
        return model

    def next_smaller(self):
        """The ModelSpec of the next smaller DeiT or ViT of the same kind (base, small, tiny); None if timm has none."""
        name = self.name.partition(".")[0]  # the tag says which weights, and timm may have none of that kind
        size = re.match(r"(vit|deit3?)_(base|small)", name)
        if not size:
            return None
        smaller = name.replace(size[2], {"base": "small", "small": "tiny"}[size[2]], 1)
        return replace(self, name=smaller) if smaller in ALIASES or timm.is_model(smaller) else None


def centre_crop(ratio):
    """What a crop at evaluation is in timm's ``pretrained_cfg``; nothing without a ``ratio``."""
    return {"crop_pct": ratio, "crop_mode": "center"} if ratio else {}


def uncropped(height, width):
    """The same for images of up to 32 pixels, which are only resized; nothing for larger ones."""
    return {"crop_pct": 1.0, "crop_mode": "squash"} if max(height, width) <= 32 else {}


def check_known(name):
    """Raise ModelError unless ``name`` is an alias or a name of timm's."""
    if name not in ALIASES and not timm.is_model(name):
        close = nearest(name, [*ALIASES, *timm.list_models()])
        raise ModelError(f"{name}: neither one of {', '.join(ALIASES)} nor a name of timm's{close}")
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:  # the name is known, and not the tag
        architecture = name.partition(".")[0]
        tags = ", ".join(timm.list_pretrained(f"{architecture}.*")) or f"{architecture}, without a tag"
        raise ModelError(f"{name}: timm knows no such weights; it has {tags}") from None


def _check_supported(model, name):
    try:
        check_supported(model)
    except InputError as error:
        raise ModelError(f"{name}: {error}") from None


def image_shape(model):
    """(channels, height, width) of the images that a model takes."""
    first = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    return (first.in_channels, *model.patch_embed.img_size)


def default_num_classes(name):
    """The number of classes of the published weights of ``name``."""
    timm_name, _ = ALIASES.get(name, (name, {}))
    return timm.get_pretrained_cfg_value(timm_name, "num_classes") if timm.is_model(timm_name) else None


def read_checkpoint(path):
    """Read a .safetensors or torch.save file, weights-only. Returns its dict; a bare state dict becomes {'model': it}.

    Raises InputError if the file is missing, damaged, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file; expected a checkpoint (.pth with a 'model' member, or .safetensors)")
    try:
        if path.suffix == ".safetensors":
            content, _ = weights.read_safetensors(path)
        else:
            _check_sums(path)
            # Published checkpoints hold their argparse.Namespace, which a weights-only load does not know by itself.
            with torch.serialization.safe_globals([argparse.Namespace]):
                content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        # torch's advice, to load it regardless, is left out.
        reason = re.search(r"GLOBAL \S+|Unsupported operand \d+", str(error))
        raise InputError(
            f"{path}: refused, it holds more than weights and plain values ({reason[0] if reason else 'a pickle'})"
        ) from None
    except Exception as error:  # safetensors and torch raise a dozen kinds for a damaged file
        reason = f"{type(error).__name__} {error}".split("\n")[0].split(". ")[0].strip()
        raise InputError(
            f"{path}: not a readable checkpoint ({reason}); expected a file of torch.save, or .safetensors"
        ) from None
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; expected a dict of tensors")
    if "model" not in content:
        content = {"model": content.get("state_dict", content)}
    for member in ("model", "model_ema"):
        if member == "model" or content.get(member) is not None:
            content[member] = _state_dict(content[member], member, path)
    return content


def save_checkpoint(content, path):
    """torch.save of a dict to ``path``, complete or not at all. Main rank only; the others return at once.

    Raises InputError if it cannot be written, and FloatingPointError rather than write NaN or infinite values.
    """
    if not utils.is_main():
        return
    try:
        weights.check_finite(content)
    except ValueError as error:
        raise FloatingPointError(f"{path}: not written, {error}") from None
    # Through a file of ours: torch's own reports a full disk as an error of its archive.
    with utils.atomic_file(path) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(content, file)
        except RuntimeError as error:
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None


def _state_dict(state, member, path):
    """``state`` without the prefixes of wrapped and of compiled models. Raises InputError if it is none."""
    if (
        not isinstance(state, dict)
        or not state
        or not all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())
    ):
        raise InputError(f"{path}: no state dict found; expected a '{member}' member or a bare dict of tensors")
    for name, value in state.items():
        if not _is_plain(value):
            raise InputError(f"{path}: {name} is no plain tensor (sparse, nested, quantised, or without its values)")
    plain = {name.replace("_orig_mod.", "").removeprefix("module."): value for name, value in state.items()}
    if len(plain) < len(state):
        raise InputError(f"{path}: holds tensors with and without the prefix 'module.' or '_orig_mod.'")
    return plain


def _is_plain(tensor):
    """Whether a tensor has all its values in memory, and not one that stands for a billion."""
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized or tensor.is_nested:
        return False
    return tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _check_sums(path):
    """Raise InputError if a checksum in a torch.save archive does not hold: torch.load itself does not look at them.

    torch.save can be told to leave them out (set_crc32_options), and files of torch before 1.6 are no archives.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip() if any(info.CRC for info in archive.infolist()) else None
        if damaged:
            raise InputError(f"{path}: damaged, the checksum of its member {damaged} is wrong; fetch or copy it again")


def classes_of(state):
    """The number of classes of a state dict's classifier, 0 without one."""
    weight = state.get("head.weight", state.get("head.fc.weight"))
    return len(weight) if weight is not None and weight.ndim else 0


def load_weights(model, state, source, replace_head=False):
    """Load ``state`` strictly into ``model``. What depends on the image size is resampled, as timm does.

    replace_head: leave a classifier of another size at its fresh initialisation. source: the name in errors. Returns
    a list of remarks for the user. Raises InputError if names or shapes do not fit, or a value is not finite.
    """
    own, given, remarks = model.state_dict(), state, []
    # Weights that fit are left alone: timm's filters guess at older layouts, and a missing classifier misleads some.
    if _shapes(state) != _shapes(own):
        try:
            state = _timms_filter(model)(dict(state), model)
        except Exception as error:  # the filter reshapes by name: another network's tensors raise anything
            raise InputError(f"{source}: does not fit the model ({type(error).__name__}: {error})") from None
    head, own_head = ({n: v for n, v in s.items() if n.startswith(("head.", "head_dist."))} for s in (state, own))
    if replace_head and _shapes(head) != _shapes(own_head):
        was = f"has {classes_of(head)} classes" if classes_of(head) else "is not there"
        now = f"replaced by a new one for {model.num_classes}" if own_head else "left out"
        remarks.append(f"the classifier of {source} {was}: {now}")
        state = {name: value for name, value in state.items() if name not in head} | own_head
    there, here = _shapes(state), _shapes(own)
    both = [name for name in here if name in there]
    wrong = [f"{n} is {there[n]} there and {here[n]} in the model" for n in both if there[n] != here[n]]
    wrong += [f"{name} is missing" for name in here if name not in there]
    wrong += [f"{name} is unknown to the model" for name in there if name not in here]
    if wrong:
        more = f" (and {len(wrong) - 2} more)" if len(wrong) > 2 else ""
        raise InputError(f"{source}: does not fit the model: {'; '.join(wrong[:2])}{more}{_owner(given)}")
    try:
        model.load_state_dict(weights.converted(state, own))
    except ValueError as error:
        raise InputError(f"{source}: {error}") from None
    return remarks


def _shapes(state):
    return {name: tuple(value.shape) for name, value in state.items()}


def _owner(state):
    """'; these are weights of ...' if ``state`` has the shapes of an alias, else nothing."""
    for name in ALIASES:
        with torch.device("meta"):
            own = ModelSpec(name, classes_of(state)).build().state_dict()
        any_size = {"pos_embed": None}  # of images
        if _shapes(own) | any_size == _shapes(state) | any_size:
            return f"; these are weights of {name}"
    return ""


def _timms_filter(model):
    """timm's function (state dict, model) -> state dict for the family of ``model``: older names, other image sizes."""
    modules = (sys.modules[cls.__module__] for cls in type(model).__mro__)
    found = (getattr(module, "checkpoint_filter_fn", None) for module in modules)
    # What timm gives it, where it makes these models: the names of DeiT III, the resampling of FlexiViT.
    family = model.pretrained_cfg.get("architecture", "").partition("_")[0]
    bound = {"deit3": {"adapt_layer_scale": True}, "flexivit": {"interpolation": "bilinear", "antialias": False}}
    return partial(next(filter(None, found), lambda state, _model: state), **bound.get(family, {}))


def load_pretrained(spec, path=None, **kwargs):
    """Build ``spec`` with pre-trained weights: those of the file ``path``, or else those of timm's hub.

    Returns (model, remarks for the user). Raises ModelError if there are no published weights or they cannot be
    downloaded, and what ``ModelSpec.build``, ``read_checkpoint`` and ``load_weights`` raise.
    """
    if path:
        model = spec.build(**kwargs)
        return model, load_weights(model, read_checkpoint(path)["model"], path, replace_head=True)
    with torch.device("meta"):
        spec.build()  # refuses what cannot be cut before anything is downloaded
    timm_name, _ = ALIASES.get(spec.name, (spec.name, {}))
    published, cfg = default_num_classes(spec.name), timm.get_pretrained_cfg(timm_name)
    if spec.name in OWN_SHAPES or cfg is None or not (cfg.hf_hub_id or cfg.url):
        raise ModelError(f"{spec.name}: there are no published weights", needs_file=True)
    with downloading(timm_name):
        model = spec.build(pretrained=True, **kwargs)
    changed = published != spec.num_classes
    return model, [f"the published classifier has {published} classes: replaced"] if changed else []


@contextmanager
def downloading(timm_name):
    """Within, timm loads published weights. The hub's client retries for a minute where there is no network: so the hub
    is asked once, and if it does not answer, its cache is all there is. Raises ModelError that says what to fetch."""
    offline = hub.HF_HUB_OFFLINE
    try:
        get_session().head(hub.ENDPOINT, timeout=5)
    except Exception:  # of its HTTP library, which depends on its version
        hub.HF_HUB_OFFLINE = True
    try:
        yield
    except Exception as error:  # the hub client, its HTTP library and the file system each have their own kinds
        cfg = timm.get_pretrained_cfg(timm_name)
        raise ModelError(
            f"{timm_name}: the published weights could not be downloaded ({type(error).__name__}); fetch "
            f"'{(cfg and cfg.hf_hub_id) or timm_name}' (model.safetensors, or DeiT's .pth) on a machine with a network",
            needs_file=True,
        ) from None
    finally:
        hub.HF_HUB_OFFLINE = offline
