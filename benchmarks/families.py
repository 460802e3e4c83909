"""Stage 1 on a small network of each family of docs/families.md: trained on scikit-learn's digits, then cut to shares
of its MACs without training: the same widths of the original weights, of the paper's stage 1, and of ours. Writes a
Markdown table."""

import contextlib
import io
import json
from pathlib import Path

import common
import torch

import main_reparam
import main_test
import utils
from models.vit.pretrained import ALIASES
from tools import pretrain

SMALL = {"img_size": 16, "patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
SWIN = {"img_size": 16, "patch_size": 2, "window_size": 4, "embed_dim": 48, "depths": (2, 2), "num_heads": (3, 6)}
NETWORKS = {
    "DeiT": ("deit_tiny_patch16_224", SMALL),
    "distilled DeiT": ("deit_tiny_distilled_patch16_224", SMALL),
    "DINOv2-giant (SwiGLU)": ("vit_giant_patch14_dinov2", SMALL | {"mlp_ratio": 4}),
    "q/k norm": ("vit_small_patch16_224", SMALL | {"qk_norm": True}),
    "Swin": ("swin_tiny_patch4_window7_224", SWIN),
    "Swin V2": ("swinv2_tiny_window8_256", SWIN),
    "BEiT": ("beit_base_patch16_224", SMALL),
    "EVA-02 B": ("eva02_base_patch14_224", SMALL),
    "DINOv3": ("vit_small_patch16_dinov3", SMALL),
}
SHARES = {"2/3": 2 / 3, "1/2": 1 / 2, "1/3": 1 / 3}
COMMON = "--data-set DIGITS --device cpu --num-workers 0 --model family"
RECIPE = "--no-repeated-aug --no-model-ema --aa= --hflip 0 --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0"
RECIPE += " --drop-path 0 --warmup-epochs 5 --lr 8e-3 --eval-period 99 --resume auto"


def measure(name, seed, args):
    """{variant: top-1 at full width and at the shares} of one network. A stage that has been run is not run again."""
    ALIASES["family"], work = NETWORKS[name], args.work / name.replace("/", " ") / f"seed{seed}"

    def stage(script, folder, written, flags, *paths):
        """The file that a stage writes, run as its command would run it, quietly. paths: the words after the flags."""
        words = [*COMMON.split(), "--seed", seed, "--output-dir", work / folder, *flags.split(), *paths]
        if not (work / folder / written).is_file():
            with contextlib.redirect_stdout(io.StringIO()):
                script.main(script.get_args([str(word) for word in words]))
        return work / folder / written

    def top1(folder, flags, *paths):
        ladder = f"--macs-ratio 1 {' '.join(map(str, SHARES.values()))} {flags}"
        results = stage(main_test, folder, "results.json", ladder, *paths)
        return [row["top1"] for row in json.loads(results.read_text())["rows"]]

    start = stage(pretrain, "start", "pretrained.pth", f"{RECIPE} --epochs {args.epochs}")
    ours = stage(main_reparam, "ours", "report.json", "--pretrained", start).parent
    flags = "--basis pca --mlp-order taylor --no-compensation --pretrained"
    paper = stage(main_reparam, "paper", "report.json", flags, start).parent
    same = ("--mask-table", ours / "mask_table.json")
    return {
        "original": top1("test_original", "--no-compensation --checkpoint", start, *same),
        "paper's": top1("test_paper", "--no-compensation --checkpoint", paper, *same),
        "ours": top1("test_ours", "--checkpoint", ours),
    }


def main(args):
    columns, rows = [f"{kind}, {share}" for share in SHARES for kind in ("original", "paper's", "ours")], []
    for name in NETWORKS:
        runs = [measure(name, seed, args) for seed in range(args.seeds)]
        top1 = [[run["ours"][0] for run in runs]]
        top1 += [[run[kind][1 + at] for run in runs] for at in range(len(SHARES)) for kind in runs[0]]
        rows.append([name, *(common.cell(values, ".1f", ".1f") for values in top1)])
        print(*rows[-1], flush=True)
    text = (
        f"Top-1 in % on 599 digits, mean ± standard deviation of {args.seeds} seeds; sub-networks of one set of widths"
        f" (ours), cut without training; {torch.get_num_threads()} thread(s) of"
        f" {utils.machine_name(torch.device('cpu'))}. `python benchmarks/families.py`\n"
    )
    utils.save_text("\n".join([text, *common.markdown(["", "full", *columns], rows)]) + "\n", args.output)


if __name__ == "__main__":
    paths = {"work": Path("output/families"), "output": Path("docs/families_digits.md")}
    main(common.arguments(__doc__, seeds=3, epochs=60, **paths))
