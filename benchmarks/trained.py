"""Does compensation help a super-network that was trained to be sliced plainly? Accuracy of its sub-networks plain,
compensated with statistics measured on its own weights, and calibrated. Prints a Markdown table."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import utils
from engine import evaluate
from models import peel
from models.calibration import calibrate
from models.compensation import compensate, remember_as_is
from models.statistics import OBJECTIVES, collect_statistics
from models.store import load_supernet
from options import add_proxy_options, stage_parser

SHARES = (5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 4, 1 / 6)


def get_args():
    parser = stage_parser(__doc__)
    add_proxy_options(parser)
    parser.add_argument("--checkpoints", nargs="+", required=True, help="trained super-networks, folders or files")
    return parser.parse_args()


def main(args):
    device = utils.start_up(args)
    print("| super-network | share of MACs | plain | compensated | calibrated |\n|---|---|---|---|---|")
    for path in args.checkpoints:
        net = load_supernet(path, compensate=False)
        net.model.to(device)
        transform = datasets.eval_transform(args, datasets.data_config(net.model))
        train, test = (datasets.load_images(args, train=split) for split in (True, False))
        proxy = list(datasets.proxy_loader(train, transform, args, args.proxy_samples))
        statistics = collect_statistics(net.model, proxy, OBJECTIVES[args.objective], device, hidden=True)
        loader, memory = datasets.eval_loader(test, transform, args), remember_as_is(net.model, statistics)
        for share in SHARES:
            step = net.table.first_within(net.shapes.macs, share * net.shapes.macs(net.table.steps[0]))
            widths, scores = net.table.steps[step], []
            network = peel.extract(net.model, widths)
            scores.append(evaluate(network, loader, device)["top1"])
            compensate(network, net.model, widths, memory)
            scores.append(evaluate(network, loader, device)["top1"])
            calibrate(network, net.model, proxy, OBJECTIVES["feature"], device)
            scores.append(evaluate(network, loader, device)["top1"])
            print(f"| {path} | {share:.3f} | " + " | ".join(f"{score:.2f}" for score in scores) + " |", flush=True)


if __name__ == "__main__":
    utils.run_stage(main, get_args())
