"""A real pre-trained ViT, cut without any training: top-1, agreement with the full network, and KL to it.

A linear classifier is fitted on the frozen features (scikit-learn); nothing else is trained. Every method cuts to the
same widths: those of our width table at shares of the MACs, and, where it is compared with others' ridge compensation,
the same share of all widths, at which that is measured alone. --every-size measures all methods at both. What has been
measured lies in --work, so a run that was stopped goes on, and the methods can be measured in several runs; seconds are
added up. Writes <output>.json, .md and .png.
"""

import functools
import json
import time
from pathlib import Path

import common
import torch
from common import agreement
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

import datasets
import utils
from models.vit.pretrained import ModelSpec, load_pretrained
from options import add_proxy_options, stage_parser

SHARES, UNIFORM = (5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6), (3 / 4, 1 / 2, 3 / 8)
CALIBRATION_IMAGES = 128
# name -> (basis or score, order, objective, how it is cut: 'calibrated' is compensated first)
METHODS = {
    "original, truncated": ("untouched", None, "label", "plain"),
    "Taylor order, ridge compensation": ("taylor", "ridge", "label", "compensated"),
    "paper's stage 1 (pca + hessian)": ("pca", "hessian", "label", "plain"),
    "ours, plain": ("balanced", "greedy", "label", "plain"),
    "ours, compensated": ("balanced", "greedy", "label", "compensated"),
    "the same, feature objective": ("balanced", "greedy", "feature", "compensated"),
    f"ours, calibrated on {CALIBRATION_IMAGES} images": ("balanced", "greedy", "label", "calibrated"),
}
OURS, RIDGE, OTHERS = "ours, compensated", "Taylor order, ridge compensation", list(METHODS)[1:3]
COMPARED = (OURS, *OTHERS)  # at the same share of all widths too


def get_args():
    parser = stage_parser(__doc__)
    add_proxy_options(parser)
    # Images: on a CPU a quarter faster than 64, activations stay in its caches. Crop: one for all models.
    parser.set_defaults(batch_size=8, eval_crop_ratio=0.875)
    parser.add_argument("--pretrained", help="file of weights (default: timm's hub)")
    parser.add_argument("--fit-images", type=utils.positive_int, default=1024, help="for the classifier")
    parser.add_argument("--test-images", type=utils.positive_int, default=512)
    words = f"rows to print beside '{OURS}', with which they are compared"
    parser.add_argument("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help=words)
    words = "measure all rows at the same share of all widths too"
    parser.add_argument("--every-size", action="store_true", help=words)
    parser.add_argument("--work", type=Path, default=Path("output/real_vit"))
    parser.add_argument("--output", type=Path, default=Path("docs/real_vit"), help="path without suffix")
    return parser.parse_args()


def stored(path, make):
    """What ``make`` returns, read from ``path`` if it has been made before."""
    if not path.is_file():
        made = make()
        with utils.atomic_file(path) as temporary:
            torch.save(made, temporary)
    return torch.load(path, weights_only=False)


class Bench(common.Bench):
    def __init__(self, args, device):
        train, self.args, self.images_at_once = datasets.load_images(args, train=True), args, args.batch_size
        self.file = args.work / "results.json"
        self.results = json.loads(self.file.read_text()) if self.file.is_file() else {}
        spec = ModelSpec(args.model, train.num_classes, args.input_size, args.eval_crop_ratio)
        model = load_pretrained(spec, args.pretrained)[0].eval().to(device)
        self.timed("features and classifier", lambda: fit_classifier(model, args))
        proxy = list(datasets.proxy_loader(train, model, args, "proxy_samples"))
        super().__init__(model, proxy, common.load_tensors(args, model, False, args.test_images), args.seed)
        full = functools.partial(self.logits, self.supernet)
        logits = self.timed("testing the full network", lambda: stored(args.work / "logits.pth", full))
        self.reference = logits.log_softmax(1)
        self.start, self.statistics = functools.cache(self.start), functools.cache(self.statistics)

    def statistics(self, objective):
        return self.timed(f"statistics, {objective} objective", lambda: super(Bench, self).statistics(objective))

    def timed(self, key, make):
        """What ``make`` returns; the result ``key`` is how long it took the first time, in seconds."""
        started, made = time.time(), make()
        self.keep(key, lambda: time.time() - started)
        return made

    def keep(self, key, make):
        """The result ``key``, made and saved at once if it is not there."""
        if key not in self.results:
            self.results[key] = make()
            utils.save_text(json.dumps(self.results), self.file)
        return self.results[key]

    def start(self, basis, order, objective):
        """(super-network, its Compensation) of one way of stage 1, in a file."""

        def make():
            if basis == "untouched":
                return self.supernet, None
            self.statistics(objective)
            begin = functools.partial(super(Bench, self).start, basis, order, objective)
            return self.timed(f"solving and rewriting, {basis}, {order}", begin)

        return stored(self.args.work / f"{basis} {order} {objective}.pth", make)

    def sizes(self, objective):
        """{name: Widths} that are measured, in a file."""

        def make():
            table = self.dropout(1, self.start("balanced", "greedy", objective)[1]).table
            shares = zip(SHARES, common.at_shares(table, self.costs, SHARES), strict=True)
            found = {f"{share:.2f} of the MACs": widths for share, widths in shares}
            return found | {f"{s:.3g} of all widths": common.scaled(self.full, s, s) for s in UNIFORM}

        return stored(self.args.work / f"sizes {objective}.pth", make)

    def scores(self, name):
        """{size: what ``score`` gives} of a method, each measured unless it has been."""
        *start, way = METHODS[name]
        uniform, shares = self.args.every_size or name in COMPARED, name != RIDGE
        sizes = {size: w for size, w in self.sizes(start[-1]).items() if (uniform if is_uniform(size) else shares)}
        missing = [widths for size, widths in sizes.items() if f"{name}, {size}" not in self.results]
        if missing:
            supernet, compensation = self.start(*start)
            proxy = self.proxy[: -(-CALIBRATION_IMAGES // self.args.batch_size)] if way == "calibrated" else None
            how = None if way == "plain" else compensation, proxy
            cut = functools.partial(common.cut, supernet, missing, *how)
            networks = iter(self.timed(f"cutting to {len(missing)} sizes, {name}", cut))
        rows = utils.progress(sizes.items(), name, unit="sizes")
        return {size: self.keep(f"{name}, {size}", lambda w=w: self.score(next(networks), w)) for size, w in rows}

    def score(self, subnet, widths):
        started, logs = time.time(), self.logits(subnet).log_softmax(1)
        seconds = time.time() - started
        kl = F.kl_div(logs, self.reference, log_target=True, reduction="batchmean").item()
        same, top1 = agreement(logs, self.reference.argmax(1)), agreement(logs, self.labels)
        return {"top1": top1, "agreement": same, "kl": kl, "seconds": seconds, "widths": widths.as_dict()}


def is_uniform(size):
    """Whether a size is the same share of all widths."""
    return size.endswith("widths")


@torch.inference_mode()
def fit_classifier(model, args):
    """Give ``model`` the logistic regression of its pooled features, which are divided by their mean deviation."""

    def fit():
        images, labels = common.load_tensors(args, model, train=True, count=args.fit_images)
        batches = utils.progress(images.split(args.batch_size), "features")
        features = torch.cat([model.forward_head(model.forward_features(x), pre_logits=True) for x in batches])
        scale = features.std(0).mean()
        found = LogisticRegression(max_iter=2000, C=0.1).fit((features / scale).numpy(), labels.numpy())
        return torch.tensor(found.coef_) / scale, torch.tensor(found.intercept_)

    for parameter, value in zip(model.head.parameters(), stored(args.work / "head.pth", fit), strict=True):
        parameter.copy_(value)


def cell(row):
    return f"{row['top1']:.1f} / {row['agreement']:.1f} / {row['kl']:.2g}" if row else ""


def claims(full, found):
    """What the figures must show, decided from the figures: lines of Markdown."""
    for size, limit in zip(list(found[OURS])[1:4], (1, 2, 8), strict=True):
        lost = full - found[OURS][size]["top1"]
        yield common.claim(f"{size}: {-lost:+.1f} points from the full network; at most {limit} below", lost <= limit)
    for name in (name for name in OTHERS if name in found):
        worse = [size for size, row in found[name].items() if row["kl"] <= found[OURS][size]["kl"]]
        yield common.claim(f"`{OURS}` has a lower KL than `{name}` at every size of it", not worse)


def report(bench, found, args, device):
    full = agreement(bench.reference, bench.labels)
    weights = f" --pretrained {Path(args.pretrained).name}" if args.pretrained else ""
    yield (
        f"# {args.model} on {args.data_set}, cut without training\n\n`python benchmarks/real_vit.py --model "
        f"{args.model}{weights} --data-set {args.data_set} --proxy-samples {args.proxy_samples} --test-images "
        f"{args.test_images}{' --every-size' * args.every_size}`, {len(found)} of {len(METHODS)} rows (`--methods`); "
        f"{torch.get_num_threads()} thread(s) of {utils.machine_name(device)}. The full network: top-1 {full:.1f}.\n\n"
        "Each cell: top-1 in % / agreement with the full network in % / KL to it in nats. One network, one seed: one "
        f"image is {100 / len(bench.labels):.2f} points, so read the KL.\n"
    )
    lines = [[name, *(cell(rows.get(size)) for size in found[OURS])] for name, rows in found.items()]
    yield from common.markdown(["", *found[OURS]], lines)
    yield from ["\n## What it shows\n", *claims(full, found), "\n## Seconds\n"]
    seconds = {name: value for name, value in bench.results.items() if isinstance(value, float)}
    for name, rows in found.items():
        seconds[f"testing at {len(rows)} sizes, {name}"] = sum(row["seconds"] for row in rows.values())
    total, more = sum(seconds.values()), 0.0
    for name, rows in found.items():
        if name not in COMPARED:  # cut by themselves, if a first run was without --every-size
            more += sum(row["seconds"] for size, row in rows.items() if is_uniform(size))
            more += seconds.get(f"cutting to {len(UNIFORM)} sizes, {name}", 0)
    seconds |= {"all together": total} | ({"without what --every-size adds": total - more} if more else {})
    yield from common.markdown(["", "s"], [[name, f"{value:.0f}"] for name, value in seconds.items()])


def main(args):
    device = utils.start_up(args)
    bench, found = Bench(args, device), {}
    for name in METHODS:
        if name in (OURS, *args.methods):
            found[name] = bench.scores(name)
    curves = {
        of: {n: [row[of] for row in list(rows.values())[: len(SHARES)]] for n, rows in found.items() if n != RIDGE}
        for of in ("kl", "top1")
    }
    labels = {"kl": {"ylabel": "KL to the full network", "yscale": "log"}, "top1": {"ylabel": "top-1, %"}}
    charts = [(SHARES, curves[of], {"xlabel": "share of the MACs"} | labels[of]) for of in curves]
    common.write(
        args.output, bench.results, report(bench, found, args, device), f"{args.model} on {args.data_set}", charts
    )


if __name__ == "__main__":
    utils.run_stage(main, get_args())
