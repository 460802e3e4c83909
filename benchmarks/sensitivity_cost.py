"""What measuring the sensitivity of all 2L branches costs, against running the whole network without each of them."""

from statistics import median_high

import common
import torch

import utils
from models.piad.importance import branch_removal
from models.vit.pretrained import image_shape
from models.vit.supernet import branches


@torch.inference_mode()
def one_by_one(supernet, images):
    """One forward pass at full width, and one without each branch."""
    supernet(images)
    for branch in branches(supernet):
        branch.keep(0)
        supernet(images)
        branch.keep(branch.full)


def main(args):
    device, plain, replayed = torch.device(args.device), [], []
    supernet = common.random_supernet(args.model).to(device)
    images = torch.randn(args.images, *image_shape(supernet), device=device)
    for _ in range(args.repeats):
        watch = utils.Stopwatch(device)
        one_by_one(supernet, images)
        plain.append(watch.seconds())
        branch_removal(supernet, [(images, torch.zeros(args.images, dtype=torch.long), None)])
        replayed.append(watch.seconds() - plain[-1])
    one, other = median_high(plain), median_high(replayed)
    on = f"{torch.get_num_threads()} thread(s) of {utils.machine_name(device)}, medians of {args.repeats}"
    print(f"{args.model}, {args.images} images, {on}")
    print(f"{len(branches(supernet)) + 1} forward passes {one:.2f} s, replayed {other:.2f} s, ratio {other / one:.2f}")


if __name__ == "__main__":
    main(common.arguments(__doc__, model="vit_small", images=8, repeats=3, device="cpu"))
