"""Stage 2: train the super-network with progressive importance-aware dropout (PIAD)."""

import json
import time
from pathlib import Path

import datasets
import utils
from engine import Run, branch_costs, evaluate, make_criterion, train_one_epoch
from models import piad, store
from models.cost import PAPER, Shapes
from models.statistics import OBJECTIVES, collect_statistics
from models.vit import ModelSpec, as_supernet, full_widths, load_weights, read_checkpoint, set_widths
from models.width_table import WidthTable
from options import add_proxy_options, add_training_options, stage_parser
from utils import InputError, human, say


def get_args():
    parser = stage_parser(__doc__)
    add_proxy_options(parser)
    add_training_options(parser, epochs=300, lr=5e-4, min_lr=1e-5, warmup_epochs=5)
    group = parser.add_argument_group("progressive importance-aware dropout")
    group.add_argument("--pretrained", default=None, help="weights of stage 1; output/reparam/<model>/reparamed.pth")
    group.add_argument("--grow_epochs", type=utils.positive_int, default=50, help="epochs in which the list grows")
    group.add_argument("--drop_ratio", type=utils.fraction, default=0.875, help="share of MACs gone at the last step")
    group.add_argument("--output_dir", default=None, help="output/peelable/<model>")
    return parser.parse_args()


def build(args, device):
    """The super-network with its starting weights, its spec and the training images."""
    if not args.model:
        raise InputError("--model is required: vit_tiny, vit_small, vit_base, or any timm VisionTransformer")
    path = Path(args.pretrained or f"output/reparam/{args.model}/reparamed.pth")
    if not path.is_file():
        raise InputError(f"--pretrained {path}: no such file; main_reparam.py --model {args.model} writes it")
    images = datasets.load_images(args, train=True)
    state = read_checkpoint(path)["model"]
    classes = args.nb_classes or datasets.count_classes(images) or len(state.get("head.weight", ()))
    if not classes:
        raise InputError(f"{path}: has no classifier, and the data set does not say its classes: give --nb_classes")
    spec = ModelSpec(args.model, classes, args.input_size)
    model = spec.build(drop_path_rate=args.drop_path)
    for remark in load_weights(model, state, path, replace_head=True):
        say(f"note: {remark}")
    return as_supernet(model).to(device), spec, images


def grow_table(model, table, shapes, loader, epoch, args, device):
    """Append to the dropout list what this epoch's target asks for, by importance at its present last step."""
    target = piad.target_cost(shapes.macs(table.steps[0]), args.drop_ratio, epoch, args.grow_epochs)
    if shapes.macs(table.steps[-1]) <= target:
        return
    set_widths(model, table.steps[-1])
    cost, without = branch_costs(model, loader, device, args.amp)
    statistics = collect_statistics(model, loader, OBJECTIVES[args.objective], device, moments=False, amp=args.amp)
    groups = piad.Groups.of(table.steps[0])
    gammas = piad.sensitivity(cost, without)
    importance = piad.unit_importance(gammas, statistics, table.steps[-1], groups, shapes, PAPER)
    piad.grow(table.steps, importance, groups, shapes.macs, target)


def restore_table(content, path, full):
    """The table of the checkpoint ``content``, or beside it if it holds none, as published ones. Raises InputError."""
    beside = path.parent / store.TABLE_NAME
    table = WidthTable.from_json(content["mask_table"], path) if "mask_table" in content else WidthTable.load(beside)
    table.check_fits(full, path)
    return table


def evaluate_ends(model, table, loader, device, amp):
    """Top-1 of the largest, the middle and the smallest sub-network."""
    accuracies = {}
    for name, step in (("largest", 0), ("middle", table.last // 2), ("smallest", table.last)):
        set_widths(model, table.steps[step])
        accuracies[name] = evaluate(model, loader, device, amp)["top1"]
    return accuracies


def main(args):
    device = utils.start_up(args)
    args.amp = utils.resolve_amp(args.amp, device)
    model, spec, images = build(args, device)
    output = utils.output_folder(args.output_dir or Path("output/peelable") / args.model)
    config = datasets.data_config(model)
    evaluation = datasets.eval_transform(args, config)
    proxy = datasets.proxy_loader(images, evaluation, args, args.proxy_samples)
    train = datasets.train_loader(images, datasets.train_transform(args, config), args)
    test = datasets.eval_loader(datasets.load_images(args, train=False), evaluation, args)
    mixup, criterion = datasets.make_mixup(args, spec.num_classes), make_criterion(args)
    run, shapes, table = Run(model, args, device, len(train)), Shapes.of(model), WidthTable([full_widths(model)])
    if args.resume:
        table = restore_table(run.restore(args.resume), Path(args.resume), table.steps[0])
        say(f"resuming from {args.resume} at epoch {run.start_epoch} with {table.last} steps")
    say(
        f"{spec.name}: {human(shapes.macs(table.steps[0]))} MACs, batch {args.batch_size} x {utils.world_size()} ranks,"
        f" learning rate {run.lr:.2e}, {args.amp} autocast on {device}"
    )

    for epoch in range(run.start_epoch, args.epochs):
        started = time.time()
        grow_table(model, table, shapes, proxy, epoch, args, device)
        train.sampler.set_epoch(epoch)
        figures = train_one_epoch(
            run.parallel, train, criterion, run.optimizer, run.scaler, epoch, device, args, table, mixup, run.ema
        )
        run.scheduler.step(epoch + 1)
        record = {"epoch": epoch, "train_loss": figures["loss"], "train_lr": figures["lr"], "steps": table.last}
        if (epoch + 1) % args.eval_period == 0 or epoch + 1 == args.epochs:
            record |= {f"test_{k}": v for k, v in evaluate_ends(model, table, test, device, args.amp).items()}
            run.max_accuracy = max(run.max_accuracy, record["test_largest"])
        table.meta = store.table_meta(spec, shapes, table)
        utils.save_text(table.to_json(), output / store.TABLE_NAME)
        run.save(epoch, output, mask_table=table.to_json())
        record["seconds"] = round(time.time() - started, 1)
        utils.append_json_line(record, output / "log.txt")
        say(json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in record.items()}))
    say(f"wrote {output}/checkpoint_{args.epochs - 1}.pth and {store.TABLE_NAME}; next:")
    say(f"  python main_test.py --checkpoint {output} --data_set {args.data_set} --data_path {args.data_path}")


if __name__ == "__main__":
    utils.run_stage(main, get_args())
