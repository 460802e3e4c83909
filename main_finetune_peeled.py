"""Stage 4: cut one sub-network out of a super-network and fine-tune it by itself."""

from dataclasses import replace
from pathlib import Path

import datasets
import utils
from engine import evaluate, mixup_and_criterion, train_one_epoch
from models.subnet.store import subnet_config
from models.vit.cost import Costs
from models.vit.supernet import as_supernet
from options import add_budget_options, add_training_options, budgets, choose, cut, load, print_command, stage_parser
from training import TrainingRun
from utils import InputError, print_once, with_unit


def get_args(argv=None):
    parser = stage_parser(__doc__)
    add_budget_options(parser)
    add_training_options(parser, epochs=30, lr=5e-5, min_lr=1e-6, warmup_epochs=0)
    add = parser.add_argument_group("files").add_argument
    add("--output-dir", help="folder of checkpoints and log (default: output/finetune/<model>)")
    return parser.parse_args(argv)


def main(args):
    device = utils.start_up(args)
    loaded = load(args, drop_path_rate=args.drop_path)
    widths = chosen_widths(loaded, args, device)
    (subnet,) = cut(loaded, [widths], args, device)
    images = datasets.load_images(args, train=True)
    spec = fit_classifier(subnet, loaded.spec, images, args.nb_classes)
    subnet.to(device)
    output = utils.output_folder(args.output_dir or Path("output/finetune") / spec.name)
    train = datasets.train_loader(images, subnet, args)
    test = datasets.test_loader(subnet, args)
    mixup, criterion = mixup_and_criterion(args, spec.num_classes)
    run = TrainingRun(subnet, args, device, len(train))
    costs = loaded.costs if spec == loaded.spec else Costs.of(as_supernet(spec.build()))
    description = subnet_config(subnet, spec, widths, costs)
    checkpoint, content = run.resume(output)
    if checkpoint and content.get("config", {}).get("widths") != description["widths"]:
        raise InputError(f"--resume {checkpoint}: it holds another sub-network than the one asked for")

    with run.files(output, lambda: {"config": description}):
        before = evaluate(subnet, test, device, args.amp)["top1"]
        when = "so far" if checkpoint else "before fine-tuning"
        print_once(f"{when}: top-1 {before:.2f}, learning rate {run.lr:.2e}")
        for epoch in run.epochs():
            train.sampler.set_epoch(epoch, run.images_done())
            figures, top1 = train_one_epoch(run, train, criterion, epoch, mixup), None
            if run.evaluates(epoch):
                top1 = evaluate(subnet, test, device, args.amp)["top1"]
                figures["test_top1"] = top1
            run.finish_epoch(figures, top1)
    print_once(f"the last checkpoint is {run.last}; next:")
    print_command(args, "main_test.py", "--checkpoint", run.last)


def chosen_widths(loaded, args, device):
    """The Widths that the budget asks for; those of a sub-network that is cut already. Raises InputError."""
    if loaded.one_size:
        return loaded.table.steps[0]
    asked = budgets(args)
    if len(asked) != 1:
        raise InputError("give exactly one budget: --op-code, --macs, --macs-ratio, --params or --latency-ms")
    (choice,) = choose(loaded, asked, args, device)
    measured = f", {choice.latency_ms:.2f} ms" if choice.latency_ms else ""
    print_once(
        f"asked {asked[0]}: step {choice} of {loaded.table.last}, {with_unit(loaded.costs.macs(choice.widths))} MACs, "
        f"{with_unit(loaded.costs.parameters(choice.widths))} parameters{measured}"
    )
    return choice.widths


def fit_classifier(subnet, spec, images, classes):
    """Replace the classifier if it has not as many ``classes`` (default: those of the data set). Returns the ModelSpec
    that then holds."""
    classes = classes or images.num_classes or spec.num_classes
    datasets.fit_classes(images, classes)
    if classes != spec.num_classes:
        print_once(f"note: the classifier has {spec.num_classes} classes: replaced by a new one for {classes}")
        subnet.reset_classifier(classes)
    subnet.pretrained_cfg["label_names"] = datasets.class_names(images)
    return replace(spec, num_classes=classes)


if __name__ == "__main__":
    utils.run_stage(main, get_args())
