"""Does compensation help a super-network that was trained to be sliced plainly? Accuracy of its sub-networks plain,
compensated with statistics measured on its own weights, and calibrated. Prints a Markdown table."""

import common

import datasets
import utils
from engine import evaluate
from models.subnet.store import load_supernet
from models.wpac.compensation import measure_compensation
from models.wpac.statistics import OBJECTIVES
from options import add_proxy_options, stage_parser

SHARES = (5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 4, 1 / 6)


def get_args():
    parser = stage_parser(__doc__)
    add_proxy_options(parser)
    parser.add_argument("--checkpoints", nargs="+", required=True, help="trained super-networks, folders or files")
    return parser.parse_args()


def main(args):
    device, lines = utils.start_up(args), []
    for path in args.checkpoints:
        loaded = load_supernet(path, compensate=False)
        supernet = loaded.supernet.to(device)
        train, test = (datasets.load_images(args, train=split) for split in (True, False))
        proxy = list(datasets.proxy_loader(train, supernet, args, "proxy_samples"))
        compensation = measure_compensation(supernet, proxy, OBJECTIVES[args.objective])
        loader = datasets.eval_loader(test, supernet, args)
        sizes = common.at_shares(loaded.table, loaded.costs, SHARES)
        ways = [common.cut(supernet, sizes, *how) for how in ((), (compensation,), (compensation, proxy))]
        for share, networks in zip(SHARES, zip(*ways, strict=True), strict=True):
            top1 = [f"{evaluate(network, loader, device)['top1']:.2f}" for network in networks]
            lines.append([path, f"{share:.3f}", *top1])
    print(*common.markdown(["super-network", "share of MACs", "plain", "compensated", "calibrated"], lines), sep="\n")


if __name__ == "__main__":
    utils.run_stage(main, get_args())
