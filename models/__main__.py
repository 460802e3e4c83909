"""What can be cut in timm's models: python -m models [NAME or PATTERN ...], for example 'swin*' or 'vit_*dinov3'."""

import argparse

import timm
import torch

from models.vit.families import ATTENTION, BLOCKS, MLPS, MODELS, stock_branches
from models.vit.pretrained import ALIASES
from models.vit.supernet import check_supported
from utils import InputError, first_line


def class_name(cls):
    """The name of a timm class, with its module unless that is a plain ViT's."""
    module = cls.__module__.split(".")[-1]
    return cls.__name__ if module in ("vision_transformer", "attention", "mlp") else f"{module}.{cls.__name__}"


def describe(name):
    """One line on a timm model: its blocks and what is left out, or why it cannot be cut."""
    try:
        timm_name, arguments = ALIASES.get(name, (name, {}))
        with torch.device("meta"):
            model = timm.create_model(timm_name, **arguments)
        check_supported(model)
    except InputError as error:
        return f"no: {str(error).split(';')[0]}"
    except Exception as error:  # whatever a model's constructor raises without memory for its weights
        return f"no: timm does not build it without weights ({first_line(error)})"
    own, found = stock_branches(model), {}
    for branch in own:
        left_out = tuple(transform.value for transform in branch.part.left_out)
        found.setdefault((class_name(type(branch.module)), left_out), []).append(branch.part.width)
    words = [f"{len(own) // 2} blocks"]
    for (kind, left_out), widths in found.items():
        without = f", without {', '.join(left_out)}" if left_out else ""
        words.append(f"{kind} {'/'.join(map(str, dict.fromkeys(widths)))}{without}")
    return "; ".join(words)


def main():
    parser = argparse.ArgumentParser(prog="python -m models", description=__doc__)
    parser.add_argument("names", nargs="*", help="timm's names, or patterns of them")
    names = parser.parse_args().names
    if not names:
        for title, table in (("models", MODELS), ("blocks", BLOCKS), ("attention", ATTENTION), ("MLPs", MLPS)):
            print(f"{title}: {', '.join(map(class_name, table))}")
        print("docs/families.md says what is exact for each; python -m models NAME what that means for one model")
    for pattern in names:
        known = pattern in ALIASES or timm.is_model(pattern)
        found = [pattern] if known else timm.list_models(pattern)
        if not found:
            print(f"{pattern}: no name of timm's, and no pattern of one")
        for name in found:
            print(f"{name}: {describe(name)}", flush=True)


if __name__ == "__main__":
    main()
