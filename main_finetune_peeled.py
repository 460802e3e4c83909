"""Stage 4: peel one sub-network off a super-network and fine-tune it by itself."""

from dataclasses import replace
from pathlib import Path

import datasets
import utils
from checkpoints import Run
from engine import evaluate, fit, make_criterion
from main_test import budgets, cut, load_alone
from models import latency, peel, store
from options import add_budget_options, add_training_options, stage_parser
from utils import InputError, human, say


def get_args(argv=None):
    parser = stage_parser(__doc__)
    add_budget_options(parser, several=False)
    add_training_options(parser, epochs=30, lr=5e-5, min_lr=1e-6, warmup_epochs=0)
    parser.add_argument_group("output").add_argument("--output_dir", default=None, help="output/finetune/<model>")
    return parser.parse_args(argv)


def peel_one(path, content, args, device):
    """The network that the budget asks for, its spec and widths; one that is peeled already is taken as it is."""
    if "peeled" in content:
        return load_alone(path, content, args, drop_path_rate=args.drop_path)
    asked = budgets(args)
    if len(asked) != 1:
        raise InputError("give exactly one budget: --op_code, --macs, --macs_ratio, --params or --latency_ms")
    net = store.load_supernet(path, content, **store.loading_options(args), drop_path_rate=args.drop_path)
    (choice,) = latency.choose(net, asked, args, device)
    measured = f", {choice.latency_ms:.2f} ms" if choice.latency_ms else ""
    say(
        f"asked {asked[0]}: step {choice} of {net.table.last}, {human(net.shapes.macs(choice.widths))} MACs, "
        f"{human(net.shapes.parameters(choice.widths))} parameters{measured}"
    )
    return cut(net, choice.widths, args, device), net.spec, choice.widths


def fit_classifier(network, spec, images):
    """Replace the classifier if the data set has another number of classes. Returns the spec that then holds."""
    classes = datasets.count_classes(images) or spec.num_classes
    if classes != spec.num_classes:
        say(f"note: the classifier has {spec.num_classes} classes: replaced by a new one for {classes}")
        network.reset_classifier(classes)
    return replace(spec, num_classes=classes)


def main(args):
    device = utils.start_up(args)
    args.amp = utils.resolve_amp(args.amp, device)
    path = store.resolve(args)
    network, spec, widths = peel_one(path, store.read(path), args, device)
    images = datasets.load_images(args, train=True)
    spec = fit_classifier(network, spec, images)
    network.to(device)
    output = utils.output_folder(args.output_dir or Path("output/finetune") / spec.name)
    config = datasets.data_config(network)
    train = datasets.train_loader(images, datasets.train_transform(args, config), args)
    test_images = datasets.load_images(args, train=False)
    test = datasets.eval_loader(test_images, datasets.eval_transform(args, config), args)
    mixup, criterion = datasets.make_mixup(args, spec.num_classes), make_criterion(args)
    run, description = Run(network, args, device, len(train)), peel.describe(spec, widths)
    checkpoint, content = run.resume(output)
    if checkpoint and content.get("peeled") != description:
        raise InputError(f"--resume {checkpoint}: it holds another sub-network than the one asked for")
    say(
        f"before fine-tuning: top-1 {evaluate(network, test, device, args.amp)['top1']:.2f}, learning rate {run.lr:.2e}"
    )

    def score():
        top1 = evaluate(network, test, device, args.amp)["top1"]
        return {"test_top1": top1}, top1

    fit(run, train, criterion, output, score, mixup, extra=lambda: {"peeled": description})
    checkpoint = output / f"checkpoint_{args.epochs - 1}.pth"
    say(f"wrote {checkpoint}; next:")
    say(f"  python main_test.py --checkpoint {checkpoint} --data_set {args.data_set} --data_path {args.data_path}")


if __name__ == "__main__":
    utils.run_stage(main, get_args())
