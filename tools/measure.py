"""Measure a super-network of any origin, so that main_test.py can compensate what it cuts: writes
statistics.safetensors beside its checkpoint. Stage 1 does this by itself for the weights it writes."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import utils
from models import store
from models.compensation import MEMORY_NAME, remember_as_is, save_memory
from models.statistics import OBJECTIVES, collect_statistics
from options import add_proxy_options, stage_parser
from utils import say


def get_args():
    parser = stage_parser(__doc__)
    add_proxy_options(parser)
    parser.add_argument("--checkpoint", default=None, help="super-network folder or file; output/peelable/<model>")
    parser.add_argument("--use_ema", action="store_true", help="measure the averaged weights")
    parser.add_argument("--output", type=Path, default=None, help="statistics.safetensors beside the checkpoint")
    return parser.parse_args()


def main(args):
    device = utils.start_up(args)
    args.amp = utils.resolve_amp(args.amp, device)
    path = store.resolve(args)
    net = store.load_supernet(
        path, model=args.model, input_size=args.input_size, use_ema=args.use_ema, compensate=False
    )
    net.model.to(device)
    transform = datasets.eval_transform(args, datasets.data_config(net.model))
    loader = datasets.proxy_loader(datasets.load_images(args, train=True), transform, args, args.proxy_samples)
    statistics = collect_statistics(net.model, loader, OBJECTIVES[args.objective], device, hidden=True, amp=args.amp)
    output = args.output or path.parent / MEMORY_NAME
    save_memory(remember_as_is(net.model, statistics), net.model, output)
    say(f"wrote {output}; main_test.py and main_finetune_peeled.py now compensate what they cut from {path}")


if __name__ == "__main__":
    utils.run_stage(main, get_args())
