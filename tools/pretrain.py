"""Train a small ViT from scratch, the network that stage 1 starts from where no published weights exist."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import datasets
import utils
from checkpoints import Run
from engine import evaluate, fit, make_criterion
from models.vit import ModelSpec
from options import add_training_options, stage_parser
from utils import InputError, say


def get_args(argv=None):
    parser = stage_parser(__doc__)
    add_training_options(parser, epochs=60, lr=5e-4, min_lr=1e-5, warmup_epochs=5)
    parser.add_argument_group("output").add_argument("--output_dir", default=None, help="output/pretrain/<model>")
    return parser.parse_args(argv)


def main(args):
    device = utils.start_up(args)
    args.amp = utils.resolve_amp(args.amp, device)
    if not args.model:
        raise InputError("--model is required, for example vit_digits or vit_fashion")
    images = datasets.load_images(args, train=True)
    spec = ModelSpec(args.model, args.nb_classes or datasets.count_classes(images), args.input_size)
    datasets.check_classes(images, spec.num_classes, f"--nb_classes {args.nb_classes}")
    model = spec.build(drop_path_rate=args.drop_path).to(device)
    output = utils.output_folder(args.output_dir or Path("output/pretrain") / args.model)
    config = datasets.data_config(model)
    train = datasets.train_loader(images, datasets.train_transform(args, config), args)
    test_images = datasets.load_images(args, train=False)
    test = datasets.eval_loader(test_images, datasets.eval_transform(args, config), args)
    mixup, criterion = datasets.make_mixup(args, spec.num_classes), make_criterion(args)
    run = Run(model, args, device, len(train))
    run.resume(output)

    def score():
        top1 = evaluate(model, test, device, args.amp)["top1"]
        return {"test_top1": top1}, top1

    fit(run, train, criterion, output, score, mixup)
    weights = output / "pretrained.pth"
    utils.save_torch({"model": {name: value.cpu() for name, value in model.state_dict().items()}}, weights)
    say(f"wrote {weights}; next:")
    say(f"  python main_reparam.py --model {args.model} --pretrained {weights} --data_set {args.data_set}")


if __name__ == "__main__":
    utils.run_stage(main, get_args())
