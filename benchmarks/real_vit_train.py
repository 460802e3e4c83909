"""Stages 1 and 2 of a real ViT: our default against the paper's recipe, and sub-networks trained by themselves.

The published weights are fine-tuned on the data set first, all of them, once. From there every seed goes through the
commands of the stages, with the same epochs, rate and augmentation, and each result is tested on all test images. What
has been done lies in --work, so a run that was stopped goes on; --workers commands run at once, and 0 run nothing: what
is there is reported. For a GPU. Writes <output>.json, .md and .png.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

import common
from common import claim, spread

import utils
from main_train import ENDS
from options import words_of
from utils import InputError

ROOT = Path(__file__).parents[1]
SHARES = (6 / 6, 5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6)
RECIPE = "--no-repeated-aug --no-model-ema --aa= --color-jitter 0 --reprob 0 --mixup 0 --cutmix 0 --scale 0.5 1"
RECIPE += " --drop-path 0 --min-lr 1e-6 --unscale-lr --keep-last 1 --resume auto"
STAGE1 = {"ours": "", "the paper's": "--basis pca --mlp-order hessian --no-compensation"}
OURS, PAPER, UNTRAINED = "ours, stages 1 and 2", "the paper's stages 1 and 2", "ours, stage 1 alone"
# name -> (its stage 1, options of stage 2; None: there is none)
METHODS = {UNTRAINED: ("ours", None), OURS: ("ours", ""), "ours, plain slices": ("ours", "--no-compensation")}
METHODS |= {PAPER: ("the paper's", "--mask-table none --grow-epochs {grow_epochs}")}
ALONE = "one size alone, from ours"
FLAGS = {
    "model": "vit_base_patch16_clip_quickgelu_224", "pretrained": "clip.pth", "data_set": "FASHION_MNIST",
    "data_path": "/usr/share/datasets/fashion-mnist", "input_size": 112, "batch_size": 256, "pretrain_epochs": 3,
    "pretrain_lr": 3e-5, "epochs": 6, "warmup_epochs": 0, "grow_epochs": 2, "lr": 1e-4, "seeds": [0, 10, 20],
    "methods": list(METHODS), "alone": [1 / 6, 2 / 6], "workers": 6, "loaders": 2, "device": "auto",
    "work": Path("output/real_vit_train"), "output": Path("docs/real_vit_train"),
}  # fmt: skip
REPORTED = ("model", "data_set", "input_size", "batch_size", "epochs", "warmup_epochs", "grow_epochs", "lr")
ALL_ALIKE = (*REPORTED, "pretrain_epochs", "pretrain_lr")  # of all results in --work


class NotDone(InputError):
    """A command has not been run, and none is to be run."""


def run(args, folder, script, *words, loaders=None):
    """Run a stage with its output in ``folder``, unless it has been done. Returns the folder."""
    if (folder / "seconds.txt").is_file():
        return folder
    if not args.workers:
        raise NotDone(f"--workers 0: {folder} has not been done")
    folder.mkdir(parents=True, exist_ok=True)
    flags = words_of(args, "data_set", "data_path", "input_size", "batch_size", "device")
    flags += ["--num-workers", args.loaders if loaders is None else loaders, "--output-dir", folder]
    command, started = list(map(str, [sys.executable, script, *flags, *words])), time.time()
    with open(folder / "output.txt", "a") as output:
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        code = subprocess.run(command, cwd=ROOT, stdout=output, stderr=output, env=environment).returncode
    if code:
        raise InputError(f"{folder / 'output.txt'}: {script} ended with {code}")
    print(f"{folder}: {time.time() - started:.0f} s", flush=True)
    utils.save_text(f"{time.time() - started:.0f}", folder / "seconds.txt")
    return folder


def train(args, folder, script, epochs, lr, seed, *words, **kwargs):
    """``run`` of a script that trains, with the one recipe of all of them. Returns the folder."""
    flags = ["--epochs", epochs, "--lr", lr, "--seed", seed, "--eval-period", epochs, *RECIPE.split()]
    return run(args, folder, script, *flags, *words, **kwargs)


def log_of(folder):
    """The figures of every epoch."""
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def pretrained(args):
    """The file of the fine-tuned network that everything starts from, and its top-1 in %."""
    words = ["--model", args.model, "--pretrained", args.pretrained, "--objective", "feature"]
    words = ["--checkpoint", run(args, args.work / "published", "main_reparam.py", *words), "--op-code", 0]
    tuned, loaders = args.work / "tuned", args.workers * args.loaders
    how = ("main_finetune_peeled.py", args.pretrain_epochs, args.pretrain_lr, 0, "--warmup-epochs", 0)
    train(args, tuned, *how, *words, loaders=loaders)
    return tuned / f"checkpoint_{args.pretrain_epochs - 1}.pth", log_of(tuned)[-1]["test_top1"]


def stage1(args, start, name, seed):
    folder = args.work / f"seed{seed}" / f"stage 1, {name}"
    words = ["--model", args.model, "--pretrained", start, "--seed", seed, *STAGE1[name].split()]
    return run(args, folder, "main_reparam.py", *words)


def stage2(args, start, name, seed):
    """The folder of a super-network: that of stage 1, if there is no training."""
    begin, options = METHODS[name]
    begun, folder = stage1(args, start, begin, seed), args.work / f"seed{seed}" / name
    if options is None:
        return begun
    words = ["--model", args.model, "--pretrained", begun / "reparamed.pth", "--warmup-epochs", args.warmup_epochs]
    options = options.format(grow_epochs=args.grow_epochs).split()
    return train(args, folder, "main_train.py", args.epochs, args.lr, seed, *words, *options)


def at_ends(args, start, name, seed):
    """Top-1 in % at ENDS, as training has tested it last."""
    last = log_of(stage2(args, start, name, seed))[-1]
    return [last[f"test_{end}"] for end in ENDS]


def losses(args, start, name, seed):
    """Mean loss of each epoch of training."""
    return [figures["train_loss"] for figures in log_of(stage2(args, start, name, seed))]


def stage3(args, start, name, seed):
    """Top-1 in % at each of SHARES."""
    words = ["--checkpoint", stage2(args, start, name, seed), "--macs-ratio", *SHARES]
    tested = run(args, args.work / f"seed{seed}" / name / "test", "main_test.py", *words)
    return [row["top1"] for row in json.loads((tested / "results.json").read_text())["rows"]]


def stage4(args, start, share, seed):
    """Top-1 in % of the sub-network of ``share``, trained by itself."""
    words = ["--checkpoint", stage1(args, start, "ours", seed), "--macs-ratio", share]
    folder, how = args.work / f"seed{seed}" / f"alone {share:.3f}", ("main_finetune_peeled.py", args.epochs, args.lr)
    return log_of(train(args, folder, *how, seed, "--warmup-epochs", args.warmup_epochs, *words))[-1]["test_top1"]


def measure(args, start):
    """{part: {name: {seed: figures}}} of what has been done: top-1 at SHARES ('top1'), at ENDS ('ends'), and of sizes
    'alone'; 'losses' of training, by epoch."""
    run_all(args, start, stage1, STAGE1)  # which several methods begin from
    trained = [name for name in args.methods if METHODS[name][1] is not None]
    found = {"top1": run_all(args, start, stage3, args.methods), "ends": run_all(args, start, at_ends, trained)}
    alone = run_all(args, start, stage4, args.alone)
    found["alone"] = {f"{share:.2f}": seeds for share, seeds in alone.items()}
    return found | {"losses": run_all(args, start, losses, trained)}


def run_all(args, start, how, names):
    """{name: {seed: what ``how`` returns for it}}, without what has not been done."""
    found = {name: {} for name in names}
    with ThreadPoolExecutor(args.workers or 1) as pool:
        jobs = {(name, s): pool.submit(how, args, start, name, s) for name in names for s in args.seeds}
        for (name, seed), job in jobs.items():
            try:
                found[name][seed] = job.result()
            except NotDone:
                pass
            except InputError:
                pool.shutdown(cancel_futures=True)
                raise
    return found


def row(name, seeds, args):
    """A line of a table: mean ± deviation over the seeds that there are, and how many if not all."""
    missing = f" ({len(seeds)} of {len(args.seeds)} seeds)" if len(seeds) < len(args.seeds) else ""
    return [name + missing, *map(common.cell, zip(*seeds.values(), strict=True))]


def report(args, found, top1, seconds):
    at, ends, alone = (found[part] for part in ("top1", "ends", "alone"))
    lines = (args.work / "tuned/output.txt").read_text().splitlines()
    machine = next(line for line in lines if " rank(s) of " in line)
    flags = " ".join(map(str, words_of(args, *REPORTED, "seeds")))
    yield (
        f"# {args.model} on {args.data_set}, both stages\n\n`python benchmarks/real_vit_train.py {flags}`, {machine}. "
        f"The published weights were fine-tuned for {args.pretrain_epochs} epochs first (rate {args.pretrain_lr:g}), "
        f"once for all seeds, to a top-1 of {top1:.2f}.\n\nTop-1 in % on all test images, mean ± sample standard "
        "deviation over the seeds, at shares of the MACs.\n"
    )
    singles = [alone.get(f"{share:.2f}", {}).values() for share in SHARES]
    rows = [row(name, seeds, args) for name, seeds in at.items() if seeds]
    if any(singles):
        rows.append([ALONE, *(common.cell(list(values)) if values else "" for values in singles)])
    yield from common.markdown(["", *(f"{share:.2f}" for share in SHARES)], rows)
    yield "\nNetworks of each's own table, as its training tested them last:\n"
    yield from common.markdown(["", *ENDS], [row(name, seeds, args) for name, seeds in ends.items() if seeds])
    yield "\n## What it shows\n"
    heads = ([f"{share:.2f} of the MACs" for share in SHARES], [f"the {end} of its table" for end in ENDS])
    for name, (head, part) in product((OURS, UNTRAINED), zip(heads, (at, ends), strict=True)):
        yield from compare(name, head, part, args)
    yield "\n## Seconds\n\nMeans over the seeds, of commands that ran side by side.\n"
    yield from common.markdown(["", "s"], [[name, f"{value:.0f}"] for name, value in seconds.items()])


def compare(name, head, part, args):
    """Lines: a method against the paper's, seed by seed, at each place that ``head`` names. Two seeds claim nothing."""
    own, paper = part.get(name, {}), part.get(PAPER, {})
    pairs = [zip(own[seed], paper[seed], strict=True) for seed in args.seeds if seed in own and seed in paper]
    for place, column in zip(head, zip(*pairs, strict=True), strict=True) if pairs else ():
        gain, deviation = spread([one - other for one, other in column])
        words = f"{place}: `{name}` {gain:+.2f} ± {deviation:.2f} points from `{PAPER}`, {len(pairs)} seeds"
        yield claim(f"{words}; above by more than the deviation", gain > deviation) if len(pairs) > 2 else f"- {words}"


def seconds_of(args):
    """{what: mean seconds of its last command over the seeds}."""
    files = sorted(args.work.glob("seed*/*/seconds.txt"))
    times = {}
    for file in files:
        name = file.parent.name
        times.setdefault(f"stage 2 of `{name}`" if name in METHODS else name, []).append(float(file.read_text()))
    return {name: sum(values) / len(values) for name, values in times.items()}


def check_flags(args):
    """Raise InputError if ``--work`` holds results of other flags."""
    path, flags = args.work / "flags.json", {name: getattr(args, name) for name in ALL_ALIKE}
    if path.is_file() and (before := json.loads(path.read_text())) != flags:
        raise InputError(f"--work {args.work}: holds results of {before}; give those flags, or another folder")
    args.work.mkdir(parents=True, exist_ok=True)
    utils.save_text(json.dumps(flags), path)


def main(args):
    for name in ("work", "data_path", "pretrained"):  # the stages are started in another folder
        setattr(args, name, Path(getattr(args, name)).resolve())
    check_flags(args)
    start, top1 = pretrained(args)
    found, seconds = measure(args, start), seconds_of(args)
    done = {row(name, seeds, args)[0]: seeds for name, seeds in found["top1"].items() if seeds}
    curves = {name: list(zip(*seeds.values(), strict=True)) for name, seeds in done.items()}
    charts = [(SHARES, curves, {"xlabel": "share of the MACs", "ylabel": "top-1, %"})]
    results = found | {"fine-tuned": top1, "seconds": seconds}
    lines = report(args, found, top1, seconds)
    common.write(args.output, results, lines, f"{args.model} on {args.data_set}", charts)


if __name__ == "__main__":
    utils.run_stage(main, common.arguments(__doc__, **FLAGS))
