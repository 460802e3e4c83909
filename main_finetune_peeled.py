"""Stage 4: peel one sub-network off a super-network and fine-tune it by itself."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import utils
from engine import Run, evaluate, make_criterion, train_one_epoch
from main_test import budgets, cut
from models import peel, store
from models.vit import read_checkpoint
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
        return peel.load_peeled(content, path, drop_path_rate=args.drop_path)
    asked = budgets(args)
    if len(asked) != 1:
        raise InputError("give exactly one budget: --op_code, --macs, --macs_ratio or --params")
    net = store.load_supernet(path, content, **store.loading_options(args), drop_path_rate=args.drop_path)
    step = asked[0].step(net.table, net.shapes)
    widths = net.table.steps[step]
    say(
        f"asked {asked[0]}: step {step} of {net.table.last}, {human(net.shapes.macs(widths))} MACs, "
        f"{human(net.shapes.parameters(widths))} parameters"
    )
    return cut(net, step, args, device), net.spec, widths


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
    network, spec, widths = peel_one(path, read_checkpoint(path), args, device)
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
    if args.resume and run.restore(args.resume).get("peeled") != description:
        raise InputError(f"--resume {args.resume}: it holds another sub-network than the one asked for")
    say(
        f"before fine-tuning: top-1 {evaluate(network, test, device, args.amp)['top1']:.2f}, learning rate {run.lr:.2e}"
    )

    for epoch in range(run.start_epoch, args.epochs):
        train.sampler.set_epoch(epoch)
        figures = train_one_epoch(run, train, criterion, epoch, mixup)
        run.scheduler.step(epoch + 1)
        record = {"epoch": epoch, "train_loss": figures["loss"], "train_lr": figures["lr"]}
        if (epoch + 1) % args.eval_period == 0 or epoch + 1 == args.epochs:
            record["test_top1"] = evaluate(network, test, device, args.amp)["top1"]
            run.max_accuracy = max(run.max_accuracy, record["test_top1"])
        run.save(epoch, output, peeled=description)
        utils.append_json_line(record, output / "log.txt")
        say(json.dumps({k: round(v, 6) for k, v in record.items()}))
    checkpoint = output / f"checkpoint_{args.epochs - 1}.pth"
    say(f"wrote {checkpoint}; next:")
    say(f"  python main_test.py --checkpoint {checkpoint} --data_set {args.data_set} --data_path {args.data_path}")


if __name__ == "__main__":
    utils.run_stage(main, get_args())
