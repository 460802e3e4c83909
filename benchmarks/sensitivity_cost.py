"""What measuring the sensitivity of all 2L branches costs, against running the whole network without each of them."""

from functools import partial

import common
import torch

import utils
from models.piad.importance import branch_removal
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
    device = torch.device(args.device)
    supernet = common.random_supernet(args.model).to(device)
    batches = common.random_batches(supernet, args.images, args.images)

    def seconds(work, subject):
        watch = utils.Stopwatch(device)
        work(supernet, subject)
        return watch.seconds()

    works = [partial(seconds, one_by_one, batches[0][0].to(device)), partial(seconds, branch_removal, batches)]
    one, other = common.in_turns(works, args.repeats)
    on = f"{torch.get_num_threads()} thread(s) of {utils.machine_name(device)}, medians of {args.repeats}"
    print(f"{args.model}, {args.images} images, {on}")
    print(f"{len(branches(supernet)) + 1} forward passes {one:.2f} s, replayed {other:.2f} s, ratio {other / one:.2f}")


if __name__ == "__main__":
    main(common.arguments(__doc__, model="vit_small", images=8, repeats=3, device="cpu"))
