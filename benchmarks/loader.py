"""Does the loader keep up with training? Images/s of decoding and augmentation by --workers processes, and of the
smallest, a middle and the full step of stage 2 without a loader, in turns. Mixup is part of the step. The images are
JPEGs of ImageNet's usual size, made here of noise. Prints a Markdown table."""

import tempfile
from pathlib import Path

import common
import numpy as np
import torch
from PIL import Image

import datasets
import main_train
import utils

SIZE = (500, 375)  # the most frequent one in ImageNet


def make_images(folder, count):
    """``count`` JPEGs in the layout of ImageNet, of coarse and fine noise. Returns their mean size in kB."""
    generator = np.random.default_rng(0)
    (folder / "train" / "class").mkdir(parents=True)
    for index in range(count):
        coarse = Image.fromarray(generator.integers(256, size=(12, 16, 3), dtype=np.uint8)).resize(SIZE, Image.BICUBIC)
        pixels = np.asarray(coarse) + generator.normal(scale=12, size=(*SIZE[::-1], 3))
        path = folder / "train" / "class" / f"{index}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return sum(path.stat().st_size for path in folder.rglob("*.jpg")) / count / 1000


def loading(folder, supernet, device, workers, batch_size):
    """The function () -> images/s of one pass through stage 2's loader, whose processes stay."""
    words = ["--data-path", folder, "--num-workers", workers, "--batch-size", batch_size, "--device", device]
    args = main_train.get_args(["--no-repeated-aug", *map(str, words)])
    loader = datasets.train_loader(datasets.load_images(args, train=True), supernet, args)

    def rate():
        watch = utils.Stopwatch(device)
        count = sum(len(images) for images, _, _ in loader)
        return count / watch.seconds()

    return rate


def main(args):
    torch.set_num_threads(args.threads)
    device = utils.choose_device(args.device, "--device")
    amp = utils.resolve_amp("auto", device)
    supernet, costs, table = common.random_table(args.model)
    many = [costs.full, *common.at_shares(table, costs, [0.5]), table.steps[-1]]
    with tempfile.TemporaryDirectory() as folder:
        size = make_images(Path(folder), args.images)
        load = loading(folder, supernet, device, args.workers, args.batch_size)
        _, step = common.training(supernet, device, args.batch_size, args.updates, amp)
        loads, *steps = common.in_turns([load, *(lambda w=w: step(w) for w in many)], args.rounds)
    cpu = utils.machine_name(torch.device("cpu"))
    print(
        f"{args.model}, batches of {args.batch_size}, {args.images} JPEGs of {SIZE[0]} x {SIZE[1]} pixels and "
        f"{size:.0f} kB; {args.workers} loader processes on {cpu}, steps ({amp}) on {utils.machine_name(device)}, "
        f"{args.threads} thread(s); medians of {args.rounds} rounds\n"
    )
    shares = [costs.macs(widths) / costs.macs(costs.full) for widths in many]
    rows = [
        [f"step at {share:.2f} of the MACs", f"{rate:.0f}", f"{loads / rate:.1f}"]
        for share, rate in zip(shares, steps, strict=True)
    ]
    head = ["", "images/s", "the loader's, over it"]
    print("\n".join(common.markdown(head, [["loader", f"{loads:.0f}", "1"], *rows])))


if __name__ == "__main__":
    flags = {"model": "vit_tiny", "workers": 2, "threads": 1, "device": "auto", "images": 256, "batch_size": 64}
    utils.run_stage(main, common.arguments(__doc__, **flags, updates=4, rounds=5))
