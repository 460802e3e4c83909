"""Measure a super-network of any origin, so that main_test.py can compensate what it cuts from it.

Writes compensation.safetensors beside the checkpoint. Stage 1 does this by itself for the weights it writes.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import utils
from models.subnet.store import load_supernet
from models.vit.pretrained import read_checkpoint
from models.wpac.compensation import COMPENSATION_NAME, measure_compensation, save_compensation
from models.wpac.statistics import OBJECTIVES
from options import add_proxy_options, checkpoint_path, stage_parser
from utils import InputError, print_once


def get_args():
    parser = stage_parser(__doc__)
    add_proxy_options(parser)
    parser.add_argument("--checkpoint", help="super-network folder or file (default: output/peelable/<model>)")
    parser.add_argument("--use-ema", action="store_true", help="measure the averaged weights")
    parser.add_argument(
        "--output", type=Path, help=f"file to write (default: {COMPENSATION_NAME} beside the checkpoint)"
    )
    return parser.parse_args()


def main(args):
    device = utils.start_up(args)
    path = checkpoint_path(args)
    if read_checkpoint(path).get("compensation"):
        raise InputError(f"{path}: was trained with the compensation of stage 1, and is cut with it")
    loaded = load_supernet(path, model=args.model, input_size=args.input_size, use_ema=args.use_ema, compensate=False)
    supernet = loaded.supernet.to(device)
    proxy = datasets.proxy_loader(datasets.load_images(args, train=True), supernet, args, "proxy_samples")
    compensation = measure_compensation(supernet, proxy, OBJECTIVES[args.objective], args.amp)
    output = args.output or path.parent / COMPENSATION_NAME
    save_compensation(compensation, supernet, output, loaded.weights)
    print_once(f"wrote {output}; main_test.py and main_finetune_peeled.py now compensate what they cut from {path}")


if __name__ == "__main__":
    utils.run_stage(main, get_args())
