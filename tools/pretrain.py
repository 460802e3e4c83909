"""Train a small ViT from scratch, the network that stage 1 starts from if there are no published weights."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import utils
from engine import evaluate, mixup_and_criterion, train_one_epoch
from models.vit.pretrained import ModelSpec, save_checkpoint
from options import add_training_options, model_flags, print_command, required_model, stage_parser
from training import TrainingRun
from utils import print_once


def get_args(argv=None):
    parser = stage_parser(__doc__)
    add_training_options(parser, epochs=60, lr=5e-4, min_lr=1e-5, warmup_epochs=5)
    add = parser.add_argument_group("files").add_argument
    add("--output-dir", help="folder of checkpoints and log (default: output/pretrain/<model>)")
    return parser.parse_args(argv)


def main(args):
    device = utils.start_up(args)
    required_model(args)
    images = datasets.load_images(args, train=True)
    classes = args.nb_classes or images.num_classes
    spec = ModelSpec(args.model, classes, args.input_size, args.eval_crop_ratio)
    datasets.fit_classes(images, spec.num_classes)
    with utils.name_flag("--model"):
        model = spec.build(drop_path_rate=args.drop_path).to(device)
    output = utils.output_folder(args.output_dir or Path("output/pretrain") / args.model)
    train = datasets.train_loader(images, model, args)
    test = datasets.test_loader(model, args)
    mixup, criterion = mixup_and_criterion(args, spec.num_classes)
    run = TrainingRun(model, args, device, len(train))
    run.resume(output)

    with run.files(output):
        for epoch in run.epochs():
            train.sampler.set_epoch(epoch, run.images_done())
            figures, top1 = train_one_epoch(run, train, criterion, epoch, mixup), None
            if run.evaluates(epoch):
                top1 = evaluate(model, test, device, args.amp)["top1"]
                figures["test_top1"] = top1
            run.finish_epoch(figures, top1)
    weights = output / "pretrained.pth"
    save_checkpoint({"model": {name: value.cpu() for name, value in model.state_dict().items()}}, weights)
    print_once(f"wrote {weights}; next:")
    print_command(args, "main_reparam.py", *model_flags(args), "--pretrained", weights)


if __name__ == "__main__":
    utils.run_stage(main, get_args())
