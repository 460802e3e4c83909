"""Stage 1: rewrite a pre-trained ViT so that every prefix of its dimensions keeps as much as possible (WPAC)."""

import copy
import json
from pathlib import Path

import torch

import datasets
import utils
from models.statistics import OBJECTIVES, collect_statistics
from models.vit import ModelSpec, as_supernet, default_num_classes, load_pretrained
from models.wpac import reparameterise
from options import add_proxy_options, stage_parser
from utils import InputError, say

# Largest difference of a full-width logit, relative to the largest logit, that float32 rounding may cause.
TOLERANCE = 1e-4


def get_args():
    parser = stage_parser(__doc__)
    add_proxy_options(parser)
    group = parser.add_argument_group("reparameterisation")
    group.add_argument("--pretrained", default=None, help="DeiT checkpoint, state dict or .safetensors; timm's hub")
    group.add_argument("--basis", default="balanced", choices=["balanced", "pca"], help="pca is the paper's")
    group.add_argument("--mlp_order", default="taylor", choices=["taylor", "hessian"], help="order of hidden units")
    group.add_argument("--output_dir", default=None, help="output/reparam/<model>")
    return parser.parse_args()


@torch.inference_mode()
def full_width_difference(original, rewritten, batches, device):
    """max |difference| / max |logit| of two networks over this rank's batches, in float32; the largest over ranks."""
    original.eval(), rewritten.eval()
    largest = torch.zeros(2, device=device)
    for images, _, _ in batches:
        before, after = original(images.to(device)), rewritten(images.to(device))
        largest = torch.maximum(largest, torch.stack(((before - after).abs().max(), before.abs().max())))
    difference, logit = utils.all_reduce_max(largest).tolist()
    return difference / max(logit, 1e-12)


def build_model(args):
    """The pre-trained network and its spec."""
    if not args.model:
        raise InputError("--model is required: vit_tiny, vit_small, vit_base, or any timm VisionTransformer")
    images = datasets.load_images(args, train=True)
    classes = args.nb_classes or datasets.count_classes(images) or default_num_classes(args.model)
    spec = ModelSpec(args.model, classes, args.input_size)
    model, remarks = load_pretrained(spec, args.pretrained)
    for remark in remarks:
        say(f"note: {remark}")
    return images, model, spec


def main(args):
    device = utils.start_up(args)
    args.amp = utils.resolve_amp(args.amp, device)
    images, model, spec = build_model(args)
    output = utils.output_folder(args.output_dir or Path("output/reparam") / args.model)
    loader = datasets.proxy_loader(images, datasets.eval_transform(args, datasets.data_config(model)), args)
    original = model.to(device)
    model = as_supernet(copy.deepcopy(original))

    say(f"measuring {args.model} on {args.proxy_samples} images ({args.objective} objective)")
    statistics = collect_statistics(model, loader, OBJECTIVES[args.objective], device, amp=args.amp)
    report = reparameterise(model, statistics, args.basis, args.mlp_order)
    difference = full_width_difference(original, model, loader, device)
    say(f"full-width logits differ by {difference:.1e} (tolerance {TOLERANCE:.0e})")
    if not difference <= TOLERANCE:
        raise InputError(f"--basis {args.basis} changes this network's output by {difference:.1e}: nothing was written")

    utils.save_torch({name: value.cpu() for name, value in model.state_dict().items()}, output / "reparamed.pth")
    summary = {
        "model": spec.name,
        "img_size": spec.img_size,
        "num_classes": spec.num_classes,
        "pretrained": args.pretrained or "timm's hub",
        "basis": args.basis,
        "mlp_order": args.mlp_order,
        "objective": args.objective,
        "proxy_samples": args.proxy_samples,
        "seed": args.seed,
        "full_width_difference": difference,
        "blocks": report,
    }
    utils.save_text(json.dumps(summary, indent=1), output / "report.json")
    for index, block in enumerate(report):
        say(f"block {index:2d}: {concentration(block)}")
    say(f"wrote {output / 'reparamed.pth'} and report.json; next:")
    weights = output / "reparamed.pth"
    say(f"  python main_train.py --model {args.model} --pretrained {weights} --data_set {args.data_set}")


def concentration(block):
    """How much of what it carries sits in the first quarter of the dimensions, in words."""
    shares = []
    for rows in (block["spectrum"], [block["mlp_importance"]]):
        rows = torch.tensor(rows).clamp(min=0)
        quarter = rows[:, : rows.shape[1] // 4].sum() / rows.sum().clamp(min=1e-30)
        shares.append(f"{100 * quarter:.0f} %")
    return f"first quarter of the dimensions holds {shares[0]} (attention), {shares[1]} (MLP)"


if __name__ == "__main__":
    utils.run_stage(main, get_args())
