"""What stage 2 on ImageNet takes by run_train.sh: updates, disk, and memory of each GPU, computed from shapes and from
what PyTorch keeps for the backward pass of an image at full width (bf16, on the CPU). Prints a Markdown table."""

import common
import torch
from timm.data.distributed_sampler import RepeatAugSampler

import utils
from models.vit.pretrained import image_shape
from models.vit.supernet import branches

IMAGES, EPOCHS = 1281167, {"vit_tiny": 300, "vit_small": 300, "vit_base": 150}


def kept_bytes(supernet):
    """Bytes that the forward pass of one image more keeps for the backward pass."""
    totals = []
    for count in (1, 2):
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        images = torch.randn(count, *image_shape(supernet))
        hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, utils.autocast(torch.device("cpu"), "bf16"):
            output = supernet.train()(images)
        totals.append(sum(kept.values()))
        del output  # only now: what is freed could be kept at the same address again
    return totals[1] - totals[0]


def main(args):
    rows = []
    for name, epochs in EPOCHS.items():
        supernet = common.random_supernet(name)
        updates = len(RepeatAugSampler(range(IMAGES), num_replicas=args.gpus, rank=0)) // args.batch_size
        numbers = sum(parameter.numel() for parameter in supernet.parameters())
        checkpoint, state = 4 * 4 * numbers, 6 * 4 * numbers
        activations = args.batch_size * kept_bytes(supernet)
        factors = 4 * sum(branch.output.in_features**2 for branch in branches(supernet))
        gigabytes = [f"{size / 1e9:.2f}" for size in (checkpoint, 4 * checkpoint, state, factors, activations)]
        rows.append([name, epochs, f"{updates:,}", f"{epochs * updates:,}", *gigabytes])
    head = ["", "epochs", "updates an epoch", "updates", "a checkpoint", "checkpoints at most", "state", "compensation"]
    head += ["activations"]
    print(f"{args.gpus} GPUs, {args.batch_size} images on each; disk and memory in GB\n")
    print("\n".join(common.markdown(head, rows)))


if __name__ == "__main__":
    utils.run_stage(main, common.arguments(__doc__, gpus=8, batch_size=128))
