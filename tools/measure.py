"""Measure a super-network of any origin, so that main_test.py can compensate what it cuts from it.

Writes compensation.safetensors beside the checkpoint. Stage 1 does this by itself for the weights it writes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import utils
from models.subnet.store import load_supernet
from models.wpac.compensation import COMPENSATION_NAME, measure_compensation, save_compensation
from models.wpac.statistics import OBJECTIVES
from options import add_proxy_options, checkpoint_path, stage_parser
from utils import InputError, print_once


def get_args(argv=None):
    parser = stage_parser(__doc__, classes=False)
    add_proxy_options(parser)
    parser.add_argument("--checkpoint", help="super-network folder or file (default: output/peelable/<model>)")
    parser.add_argument("--mask-table", help="width table (default: mask_table.json beside the checkpoint)")
    parser.add_argument("--use-ema", action="store_true", help="measure the averaged weights")
    words = f"file to write (default: {COMPENSATION_NAME} beside the checkpoint)"
    parser.add_argument("--output", type=Path, help=words)
    parser.set_defaults(amp="none")  # as stage 1
    return parser.parse_args(argv)


def main(args):
    device = utils.start_up(args)
    path = checkpoint_path(args)
    named = {name: getattr(args, name) for name in ("model", "input_size", "mask_table", "use_ema")}
    with utils.name_flag("--model"):
        loaded = load_supernet(path, compensate=False, crop_ratio=args.eval_crop_ratio, **named)
    if loaded.one_size:
        raise InputError(f"{path}: is one sub-network, of which nothing more is cut; expected a super-network")
    if loaded.began:
        raise InputError(f"{path}: was trained with the compensation of stage 1, and is cut with it")
    images, classes = datasets.load_images(args, train=True), loaded.spec.num_classes
    if args.objective == "label" and (not classes or images.num_classes not in (None, classes)):
        there = f"{path} has {classes} classes, the data set {images.num_classes}"
        raise InputError(f"--objective label: {there}; use --objective feature")
    supernet = loaded.supernet.to(device)
    proxy = datasets.proxy_loader(images, supernet, args, "proxy_samples")
    compensation = measure_compensation(supernet, proxy, OBJECTIVES[args.objective], args.amp)
    output = args.output or path.parent / COMPENSATION_NAME
    save_compensation(compensation, supernet, output, loaded.weights)
    print_once(f"wrote {output}; main_test.py and main_finetune_peeled.py now compensate what they cut from {path}")


if __name__ == "__main__":
    utils.run_stage(main, get_args())
