"""Stage 1 on a small network of each family of docs/families.md: trained on scikit-learn's digits, then cut to shares
of its MACs without training: the same widths of the original weights, of the paper's stage 1, and of ours. Writes a
Markdown table."""

import argparse
import contextlib
import io
import json
import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import main_reparam
import main_test
import utils
from models.vit import ALIASES
from tools import pretrain

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
NETWORKS = {
    "DeiT": ("deit_tiny_patch16_224", SMALL),
    "distilled DeiT": ("deit_tiny_distilled_patch16_224", SMALL),
    "DINOv2-giant (SwiGLU)": ("vit_giant_patch14_dinov2", SMALL | {"mlp_ratio": 4}),
    "q/k norm": ("vit_small_patch16_224", SMALL | {"qk_norm": True}),
    "Swin": (
        "swin_tiny_patch4_window7_224",
        {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 48, "depths": (2, 2), "num_heads": (3, 6)},
    ),
    "Swin V2": (
        "swinv2_tiny_window8_256",
        {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 48, "depths": (2, 2), "num_heads": (3, 6)},
    ),
    "BEiT": ("beit_base_patch16_224", SMALL),
    "EVA-02 B": ("eva02_base_patch14_224", SMALL),
    "DINOv3": ("vit_small_patch16_dinov3", SMALL),
}
SHARES = (2 / 3, 1 / 2, 1 / 3)
RECIPE = [
    "--no_repeated_aug", "--no_model_ema", "--aa=", "--hflip", "0", "--color_jitter", "0", "--reprob", "0",
    "--mixup", "0", "--cutmix", "0", "--drop_path", "0", "--warmup_epochs", "5", "--lr", "8e-3", "--eval_period", "99",
]  # fmt: skip


def get_args():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--seeds", type=utils.positive_int, default=3)
    parser.add_argument("--epochs", type=utils.positive_int, default=60)
    parser.add_argument("--work", type=Path, default=Path("output/families"), help="folder of networks and results")
    parser.add_argument("--output", type=Path, default=Path("docs/families_digits.md"), help="the table to write")
    return parser.parse_args()


def stage(script, *options):
    """One stage as its command would run it, quietly."""
    with contextlib.redirect_stdout(io.StringIO()):
        script.main(script.get_args([str(option) for option in options]))


def cut(folder, common, *options):
    """Top-1 of the full network and of the shares of its MACs."""
    ladder = ["--macs_ratio", 1, *SHARES]
    stage(main_test, *common, *ladder, *options, "--output_dir", folder)
    return [row["top1"] for row in json.loads((folder / "results.json").read_text())["rows"]]


def measure(name, seed, args):
    """{column: top-1 at full width and at the shares} of one network."""
    ALIASES["family"] = NETWORKS[name]
    work = args.work / name.replace("/", " ") / f"seed{seed}"
    if (work / "done.json").is_file():
        return json.loads((work / "done.json").read_text())
    common = ["--data_set", "DIGITS", "--device", "cpu", "--num_workers", 0, "--model", "family", "--seed", seed]
    start = work / "start" / "pretrained.pth"
    if not start.is_file():
        stage(pretrain, *common, *RECIPE, "--epochs", args.epochs, "--output_dir", start.parent, "--resume", "auto")
    stage(main_reparam, *common, "--pretrained", start, "--output_dir", work / "ours")
    paper = ["--basis", "pca", "--mlp_order", "taylor", "--no_compensation"]
    stage(main_reparam, *common, "--pretrained", start, *paper, "--output_dir", work / "paper")
    same = ["--mask_table", work / "ours" / "mask_table.json", "--no_compensate"]
    results = {
        "original": cut(work / "test_original", common, "--checkpoint", start, *same),
        "paper's": cut(work / "test_paper", common, "--checkpoint", work / "paper", *same),
        "ours": cut(work / "test_ours", common, "--checkpoint", work / "ours"),
    }
    utils.save_text(json.dumps(results), work / "done.json")
    return results


def cell(values):
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def main(args):
    columns = [f"{variant}, {share}" for share in ("2/3", "1/2", "1/3") for variant in ("original", "paper's", "ours")]
    lines = ["| | full | " + " | ".join(columns) + " |", "|---" * (len(columns) + 2) + "|"]
    for name in NETWORKS:
        runs = [measure(name, seed, args) for seed in range(args.seeds)]
        cells = [cell([run["ours"][0] for run in runs])]
        cells += [cell([run[v][1 + i] for run in runs]) for i in range(len(SHARES)) for v in runs[0]]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    machine = utils.machine_name(utils.choose_device("cpu", "--device"))
    head = (
        f"Top-1 in % on 599 digits, mean and standard deviation of {args.seeds} seeds; sub-networks of one set of "
        f"widths (ours), cut without training; {machine}. `python benchmarks/families.py`\n"
    )
    utils.save_text("\n".join([head, *lines]) + "\n", args.output)


if __name__ == "__main__":
    main(get_args())
