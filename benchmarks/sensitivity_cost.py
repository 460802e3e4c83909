"""What measuring the sensitivity of all 2L branches costs, against running the whole network without each of them."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import utils
from engine import branch_removal
from models.supernet import as_supernet, full_widths, set_widths
from models.vit import ModelSpec
from models.width_table import Widths


def get_args():
    parser = utils.StageParser(description=__doc__)
    parser.add_argument("--model", default="vit_small", help="random weights")
    parser.add_argument("--images", type=utils.positive_int, default=8)
    parser.add_argument("--repeats", type=utils.positive_int, default=3)
    parser.add_argument("--device", default="cpu")
    return parser.parse_args()


@torch.inference_mode()
def one_by_one(model, images, full):
    """One forward pass at full width, and one without each branch."""
    for branch in range(-1, len(full.flat)):
        set_widths(model, Widths.from_flat([0 if b == branch else width for b, width in enumerate(full.flat)]))
        model(images)
    set_widths(model, full)


def main(args):
    device, seconds = torch.device(args.device), {"one by one": [], "replayed": []}
    spec = ModelSpec(args.model, 1000)
    model = as_supernet(spec.build()).eval().to(device)
    size, full = model.patch_embed.img_size, full_widths(model)
    images = torch.randn(args.images, 3, *size, device=device)
    labels = torch.zeros(args.images, dtype=torch.long, device=device)
    for _ in range(args.repeats):
        watch = utils.Stopwatch(device)
        one_by_one(model, images, full)
        seconds["one by one"].append(watch.seconds())
        watch = utils.Stopwatch(device)
        branch_removal(model, [(images, labels, None)], device)
        seconds["replayed"].append(watch.seconds())
    plain, replayed = (sorted(values)[len(values) // 2] for values in seconds.values())
    print(f"{args.model}, {args.images} images, {torch.get_num_threads()} thread(s) of {utils.machine_name(device)}")
    print(f"{len(full.flat) + 1} forward passes {plain:.2f} s, with replayed activations {replayed:.2f} s,", end=" ")
    print(f"ratio {replayed / plain:.2f} (medians of {args.repeats})")


if __name__ == "__main__":
    main(get_args())
