"""The four scripts end to end on real digits: one rank, two gloo ranks, stopped and resumed, files in and out."""

import argparse
import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import datasets
import main_train
from models.cost import Shapes
from models.store import load_supernet
from models.subnetwork import load_subnetwork
from models.supernet import full_widths, set_widths
from models.vit import ModelSpec, read_checkpoint
from models.width_table import Widths, WidthTable

ROOT = Path(__file__).parents[1]
# Deterministic augmentation is not needed for one rank against two: it is keyed by position. Mixup pairs the images
# of one rank, and drop path draws per rank, so both are off here.
PLAIN = ["--data-set", "DIGITS", "--device", "cpu", "--num-workers", "0"]
TRAINING = [
    *PLAIN,
    "--model",
    "vit_digits",
    "--mixup",
    "0",
    "--cutmix",
    "0",
    "--drop-path",
    "0",
    "--warmup-epochs",
    "0",
]
TRAINING += [
    "--recipe",
    "paper",
    "--proxy-samples",
    "64",
    "--grow-epochs",
    "2",
    "--epochs",
    "3",
    "--lr",
    "1e-3",
    "--no-repeated-aug",
]
FINETUNE = [o for o in TRAINING if o not in ("--recipe", "paper", "--proxy-samples", "64", "--grow-epochs", "2")]


def run(*command, ranks=1, expect=0):
    """Run a script of the repository in a process of its own; returns its output."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    result = subprocess.run(
        [*launcher, *map(str, command)], cwd=ROOT, capture_output=True, text=True, timeout=600,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert result.returncode == expect, result.stdout + result.stderr
    return result.stdout + result.stderr


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A ViT trained on digits for three epochs."""
    folder = tmp_path_factory.mktemp("pretrained")
    run("tools/pretrain.py", *FINETUNE, "--output-dir", folder)
    return folder / "pretrained.pth"


@pytest.fixture(scope="session")
def chain(pretrained, tmp_path_factory):
    """Stages 1 and 2 with one rank and with two, at the same global batch: {ranks: folder}."""
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        run(
            "main_reparam.py", *PLAIN, "--model", "vit_digits", "--proxy-samples", "101", "--pretrained", pretrained,
            "--batch-size", 32 // ranks, "--output-dir", folder / "reparam", ranks=ranks,
        )  # fmt: skip
        run(
            "main_train.py", *TRAINING, "--batch-size", 64 // ranks, "--keep-last", "3", "--output-dir", folder,
            "--pretrained", folders[1] / "reparam/reparamed.pth", ranks=ranks,
        )  # fmt: skip
    return folders


def states(folder, name="checkpoint_2.pth", member="model"):
    return read_checkpoint(folder / name)[member]


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_two_ranks_find_the_same_bases(chain):
    one, two = (states(folder, "reparam/reparamed.pth") for folder in chain.values())
    assert largest_difference(one, two) < 1e-4


def test_two_ranks_train_the_same_table_and_weights(chain):
    tables = [WidthTable.load(folder / "mask_table.json") for folder in chain.values()]
    assert tables[0].steps == tables[1].steps
    assert tables[0].last > 20
    assert largest_difference(*(states(folder) for folder in chain.values())) < 5e-5
    assert largest_difference(*(states(folder, member="model_ema") for folder in chain.values())) < 5e-5
    moved = largest_difference(states(chain[1]), states(chain[1], "reparam/reparamed.pth"))
    assert moved > 0.002, "training must have moved the weights by far more than the ranks differ"


def test_resumed_equals_uninterrupted_to_the_bit(chain, pretrained, tmp_path):
    """With all of DeiT's randomness on: mixup, cutmix, RandAugment, erasing, drop path, repeated augmentation."""
    options = [
        *PLAIN, "--model", "vit_digits", "--proxy-samples", "64", "--grow-epochs", "3", "--epochs", "4",
        "--batch-size", "64", "--warmup-epochs", "1", "--pretrained", pretrained,
    ]  # fmt: skip
    run("main_train.py", *options, "--keep-last", "9", "--output-dir", tmp_path / "whole")
    (tmp_path / "part").mkdir()
    shutil.copy(tmp_path / "whole/checkpoint_1.pth", tmp_path / "part")
    resume = ["--resume", tmp_path / "part/checkpoint_1.pth"]
    run("main_train.py", *options, *resume, "--num-workers", "2", "--output-dir", tmp_path / "part")
    for member in ("model", "model_ema"):
        whole, part = (states(tmp_path / name, "checkpoint_3.pth", member) for name in ("whole", "part"))
        assert all(torch.equal(whole[name], part[name]) for name in whole)
    assert (tmp_path / "whole/mask_table.json").read_text() == (tmp_path / "part/mask_table.json").read_text()
    logs = [
        [json.loads(line) for line in (tmp_path / n / "log.txt").read_text().splitlines()] for n in ("whole", "part")
    ]
    for record in logs[0] + logs[1]:
        del record["seconds"]
    assert logs[0][2:] == logs[1]


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


def test_the_best_checkpoint_is_the_one_of_the_best_mean_once_the_list_is_complete(chain):
    """In ``chain`` the list grows in epochs 0 and 1: those two have larger smallest networks, and do not compete."""
    records = read_log(chain[1])
    assert {f"test_{e}{n}" for e in ("", "ema_") for n in ("largest", "middle", "smallest")} <= records[0].keys()

    def mean(record):
        return max(sum(record[f"{p}_{n}"] for n in ("largest", "middle", "smallest")) / 3 for p in ("test", "test_ema"))

    content = read_checkpoint(chain[1] / "best_checkpoint.pth")
    assert content["epoch"] == max((1, 2), key=lambda epoch: mean(records[epoch]))
    assert content["max_accuracy"] == pytest.approx(mean(records[content["epoch"]]))
    assert (
        load_supernet(chain[1] / "best_checkpoint.pth").table.steps
        == WidthTable.load(chain[1] / "mask_table.json").steps
    )


def test_every_training_option_at_once_resumes_to_the_bit(chain, tmp_path):
    """Stage 1's table, found by itself; sandwich, in-place distillation, accumulation; costs in measured seconds."""
    table = chain[1] / "reparam/mask_table.json"
    options = [
        *TRAINING, "--pretrained", chain[1] / "reparam/reparamed.pth", "--recipe", "ours",
        "--always", "largest", "smallest", "--distillation-type", "inplace",
        "--accum-iter", "2", "--sampling", "ends", "--clip-grad", "1",
        "--batch-size", "32", "--epochs", "2", "--importance-per", "latency", "--sensitivity", "accuracy",
    ]  # fmt: skip
    output = run("main_train.py", *options, "--keep-last", "2", "--output-dir", tmp_path / "whole")
    assert f"sub-networks of {table} from the start" in output
    run(
        "main_train.py", *options, "--resume", tmp_path / "whole/checkpoint_0.pth", "--output-dir", tmp_path / "part"
    )  # fmt: skip
    whole, part = (read_checkpoint(tmp_path / name / "checkpoint_1.pth") for name in ("whole", "part"))
    assert all(torch.equal(whole["model"][name], part["model"][name]) for name in whole["model"])
    assert whole["unit_costs"] == part["unit_costs"] != Shapes.of(load_supernet(tmp_path / "whole").model).unit_costs()
    assert WidthTable.load(tmp_path / "whole/mask_table.json").steps == WidthTable.load(table).steps
    assert (tmp_path / "whole/best_checkpoint.pth").exists()


def test_the_recipe_sets_defaults_and_flags_win():
    paper = main_train.get_args(["--recipe", "paper"])
    assert (paper.mask_table, paper.always, paper.distillation_type, paper.sampling) == ("none", [], "none", "uniform")
    ours = main_train.get_args([])
    assert {name: getattr(ours, name) for name in main_train.RECIPES["ours"]} == main_train.RECIPES["ours"]
    mixed = main_train.get_args(["--recipe", "paper", "--sampling", "macs", "--always", "smallest"])
    assert (mixed.always, mixed.distillation_type, mixed.sampling) == (["smallest"], "none", "macs")


def test_a_teacher_from_a_file_or_the_starting_network(chain, pretrained, tmp_path):
    start = ["--pretrained", chain[1] / "reparam/reparamed.pth", "--batch-size", "64", "--epochs", "1"]
    own = ["--distillation-type", "soft", "--distillation-tau", "2"]
    given = [*own, "--teacher-model", "vit_digits", "--teacher-path", pretrained]
    for name, options in (("own", own), ("given", given), ("none", [])):
        run("main_train.py", *TRAINING, *start, *options, "--output-dir", tmp_path / name)
    own, given, none = (states(tmp_path / name, "checkpoint_0.pth") for name in ("own", "given", "none"))
    assert largest_difference(own, given) < 3e-4, "both teachers compute the same function"
    assert largest_difference(own, none) > 1e-3


def test_main_test_walks_the_ladder_and_every_kind_of_budget(chain, tmp_path):
    results = []
    for ranks in (1, 2):
        run("main_test.py", *PLAIN, "--checkpoint", chain[1], "--output-dir", tmp_path / str(ranks), ranks=ranks)
        results.append(json.loads((tmp_path / str(ranks) / "results.json").read_text())["rows"])
    assert [row["asked"] for row in results[0]] == [
        f"macs_ratio {s}" for s in ("1", "0.8333", "0.6667", "0.5", "0.3333")
    ]
    for one, two in zip(*results, strict=True):
        assert one["macs"] <= float(one["asked"].split()[1]) * results[0][0]["macs"] + 1e3
        assert (one["step"], one["top1"], one["parameters"]) == (two["step"], two["top1"], two["parameters"])
    output = run(
        "main_test.py", *PLAIN, "--checkpoint", chain[1], "--use-ema", "--op-code", "3", "-1", "--macs", "2M",
        "--params", "100K", "--macs-ratio", "0.4", "--output-dir", tmp_path / "all",
    )  # fmt: skip
    with open(tmp_path / "all/results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["asked"] for row in rows] == [
        "op_code 3",
        "op_code -1",
        "macs 2.00 M",
        "macs_ratio 0.4",
        "params 100.00 K",
    ]
    assert rows[0]["step"] == "3" and int(rows[2]["macs"]) <= 2e6 and int(rows[4]["parameters"]) <= 100e3
    assert "main_finetune_peeled.py" in output


def test_fine_tuning_and_its_checkpoint(chain, tmp_path):
    folder = tmp_path / "tuned"
    options = ["main_finetune_peeled.py", *FINETUNE, "--checkpoint", chain[1], "--macs-ratio", "0.3"]
    output = run(*options, "--batch-size", "32", "--output-dir", folder, ranks=2)
    assert "asked macs_ratio 0.3: step" in output
    content = read_checkpoint(folder / "checkpoint_2.pth")
    widths = Widths.from_dict(content["peeled"]["widths"])
    assert widths in WidthTable.load(chain[1] / "mask_table.json").steps
    run("main_test.py", *PLAIN, "--checkpoint", folder / "checkpoint_2.pth", "--output-dir", tmp_path / "test")
    (row,) = json.loads((tmp_path / "test/results.json").read_text())["rows"]
    logged = json.loads((folder / "log.txt").read_text().splitlines()[-1])
    assert row["top1"] == pytest.approx(logged["test_top1"])
    assert Widths.from_dict(row["widths"]) == widths
    assert row["parameters"] == sum(value.numel() for value in content["model"].values())


def folder_of_images(root, data_set, classes, count):
    """Images of the first few classes of a data set in ImageNet's layout, as users keep their own."""
    for split, train in (("train", True), ("val", False)):
        images = datasets.load_images(argparse.Namespace(data_set=data_set, data_path="data"), train)
        for index in range(count):
            image, label = images[index]
            place = root / split / f"class{label}"
            if label < classes:
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / f"{index}.png")
    return root


def test_saved_sub_networks_go_through_the_stages_and_to_other_data(chain, tmp_path):
    """Saved for two budgets, tested again from their folders, then tuned on other classes at another image size."""
    options = [*PLAIN, "--checkpoint", chain[1], "--macs-ratio", "0.5", "--params", "60K", "--finer", "--benchmark"]
    output = run(
        "main_test.py",
        *options,
        "--plot",
        "--export",
        "pt2",
        "--save",
        tmp_path / "net",
        "--output-dir",
        tmp_path / "a",
    )
    rows = json.loads((tmp_path / "a/results.json").read_text())["rows"]
    assert all(row["latency_ms"] > 0 for row in rows) and rows[1]["parameters"] <= 60e3
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {"ladder.png", "widths.png", "knowledge.png"}
    assert "latencies: batch 1, 16 px on" in output and list(chain[1].glob("latency_*_batch1_16px_none.json"))
    for row, name in zip(rows, ("macs_ratio_0.5", "params_60.00K"), strict=True):
        folder = tmp_path / "net" / name
        assert {path.name for path in folder.iterdir()} == {"config.json", "model.safetensors", "model.pt2"}
        run("main_test.py", *PLAIN, "--checkpoint", folder, "--output-dir", tmp_path / name)
        (again,) = json.loads((tmp_path / name / "results.json").read_text())["rows"]
        for key in ("top1", "loss", "macs", "parameters", "widths"):
            assert again[key] == row[key]
    refused = run("main_test.py", *PLAIN, "--checkpoint", folder, "--macs-ratio", "0.5", expect=2)
    assert "is one sub-network of one size" in refused
    images = folder_of_images(tmp_path / "images", "DIGITS", classes=3, count=400)
    other = ["--data-set", "IMNET", "--data-path", images, *FINETUNE[2:], "--input-size", "24", "--batch-size", "32"]
    output = run("main_finetune_peeled.py", *other, "--checkpoint", folder, "--output-dir", tmp_path / "tuned")
    assert "has 10 classes: replaced by a new one for 3" in output
    content = read_checkpoint(tmp_path / "tuned/checkpoint_2.pth")
    assert content["model"]["head.weight"].shape == (3, 64) and content["model"]["pos_embed"].shape == (1, 37, 64)
    run(
        "main_test.py", *other[:4], *PLAIN[2:], "--checkpoint", tmp_path / "tuned", "--save", tmp_path / "last",
        "--output-dir", tmp_path / "b",
    )  # fmt: skip
    config = json.loads((tmp_path / "last/config.json").read_text())
    assert config["input_size"] == [3, 24, 24] and config["num_classes"] == 3
    assert load_subnetwork(tmp_path / "last")(torch.zeros(2, 3, 24, 24)).shape == (2, 3)


def test_a_latency_budget_is_measured_and_kept(chain, tmp_path):
    options = [*PLAIN, "--checkpoint", chain[1], "--latency-batch-size", "2", "--output-dir", tmp_path]
    run("main_test.py", *options, "--benchmark", "--op-code", "0", "-1")
    slow = max(row["latency_ms"] for row in json.loads((tmp_path / "results.json").read_text())["rows"])
    output = run("main_test.py", *options, "--latency-ms", slow)
    (row,) = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert row["latency_ms"] <= slow and "networks from" in run("main_test.py", *options, "--latency-ms", 1e6, expect=2)
    (path,) = chain[1].glob("latency_*_batch2_*.json")
    assert str(path) in output


# ------------------------------------------------------------------------------------------ published files


@pytest.mark.parametrize("name", ["vit_tiny", "vit_small", "vit_base"])
@pytest.mark.parametrize("kind", ["everything", "model only", "bare"])
def test_files_in_the_published_layout_load(name, kind, tmp_path):
    """A checkpoint and table as published: no meta, all members or just weights, the model known by its folder."""
    folder = tmp_path / name
    folder.mkdir()
    model = ModelSpec(name, 1000).build()
    state = model.state_dict()
    if kind == "everything":
        optimizer = torch.optim.AdamW(model.parameters())
        content = {
            "model": state, "optimizer": optimizer.state_dict(), "lr_scheduler": {}, "epoch": 299, "scaler": {},
            "model_ema": {key: value + 1 for key, value in state.items()}, "max_accuracy": 70.1,
            "args": argparse.Namespace(model=name, lr=5e-4, data_path="/data"),
        }  # fmt: skip
    else:
        content = {"model": state} if kind == "model only" else state
    torch.save(content, folder / "checkpoint_299.pth")
    heads = {"vit_tiny": 3, "vit_small": 6, "vit_base": 12}[name]
    table = {}
    for block in range(12):
        table[f"{block}.mlp"] = {"0": 256 * heads, "1": 128 * heads, "2": 0, "-1": 0}
        table[f"{block}.attn"] = {"0": 64, "1": 40, "2": 8, "-1": 8}
    (folder / "mask_table.json").write_text(json.dumps(table))
    net = load_supernet(folder, use_ema=kind == "everything")
    assert net.spec == ModelSpec(name, 1000, None) and net.table.last == 2
    assert net.table.steps[0] == full_widths(net.model)
    offset = 1 if kind == "everything" else 0
    assert torch.equal(net.model.blocks[3].mlp.fc2.weight, state["blocks.3.mlp.fc2.weight"] + offset)
    set_widths(net.model, net.table.steps[1])
    assert net.model.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_a_published_checkpoint_evaluates_on_imagenet_folders(tmp_path):
    """The whole of main_test.py on a folder laid out like ImageNet, with a tiny model of another class count."""
    from PIL import Image

    for split in ("train", "val"):
        for index, wnid in enumerate(("n01440764", "n01443537", "n01484850")):
            place = tmp_path / "imagenet" / split / wnid
            place.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (40 + number, 50), (80 * index, 10, 90)).save(place / f"{number}.JPEG")
    folder = tmp_path / "peelable/vit_tiny"
    folder.mkdir(parents=True)
    torch.save({"model": ModelSpec("vit_tiny", 3).build().state_dict()}, folder / "checkpoint_0.pth")
    table = {
        f"{b}.{k}": {"0": w, "1": w // 2, "-1": w // 2} for b in range(12) for k, w in (("attn", 64), ("mlp", 768))
    }
    (folder / "mask_table.json").write_text(json.dumps(table))
    options = ["--checkpoint", folder, "--data-path", tmp_path / "imagenet", "--num-workers", "0", "--device", "cpu"]
    new = ["--plot", "--save", tmp_path / "net", "--latency-ms", "100000"]
    output = run("main_test.py", *options, *new, "--output-dir", tmp_path / "out", expect=2)
    assert "out of reach; this table has networks from" in output
    output = run("main_test.py", *options, *new[:-2], "--op-code", "0", "1", "--output-dir", tmp_path / "out")
    assert "1.08 G" in output and (tmp_path / "out/knowledge.png").is_file()
    network = load_subnetwork(tmp_path / "net/op_code_1")
    assert network.pretrained_cfg["input_size"] == [3, 224, 224] and network.blocks[0].attn.head_dim == 32
    assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 3)


# ------------------------------------------------------------------------------------------ input from users


def test_a_network_without_a_classifier_is_reparameterised_without_labels(pretrained, tmp_path):
    base = ["main_reparam.py", *PLAIN, "--model", "vit_digits", "--proxy-samples", "64", "--pretrained", pretrained]
    run(*base, "--nb-classes", "0", "--objective", "feature", "--output-dir", tmp_path)
    assert not any(name.startswith("head") for name in read_checkpoint(tmp_path / "reparamed.pth")["model"])
    net = load_supernet(tmp_path)
    assert net.cut(net.table.steps[-1])(torch.zeros(2, 3, 16, 16)).shape == (2, 64)
    assert "no classifier to test" in run("main_test.py", *PLAIN, "--checkpoint", tmp_path, expect=2)


def test_a_checkpoint_with_another_head_is_refitted_and_said(pretrained, tmp_path):
    output = run(
        "main_reparam.py", *PLAIN, "--model", "vit_digits", "--proxy-samples", "16", "--pretrained", pretrained,
        "--nb-classes", "13", "--output-dir", tmp_path,
    )  # fmt: skip
    assert "has 10 classes: replaced by a new one for 13" in output
    assert read_checkpoint(tmp_path / "reparamed.pth")["model"]["head.weight"].shape == (13, 64)


def test_stage_1_alone_cuts_any_budget(pretrained, tmp_path):
    """The training-free product: two ranks write it, one process cuts it; plain, compensated and calibrated."""
    folder = tmp_path / "reparam"
    run(
        *("main_reparam.py", *PLAIN, "--model", "vit_digits", "--pretrained", pretrained, "--proxy-samples", "200"),
        *("--output-dir", folder),
        ranks=2,
    )
    table, accuracies = WidthTable.load(folder / "mask_table.json"), {}
    assert table.meta["macs"][-1] <= 0.125 * table.meta["macs"][0] < table.meta["macs"][-2]
    ladder = ["main_test.py", *PLAIN, "--checkpoint", folder, "--macs-ratio", "0.25"]
    for name, options in {"plain": ["--no-compensate"], "compensated": [], "calibrated": ["--calibrate", "64"]}.items():
        run(*ladder, *options, "--output-dir", tmp_path / name)
        (row,) = json.loads((tmp_path / name / "results.json").read_text())["rows"]
        assert row["compensated"] == (name != "plain") and row["calibrated"] == (64 if name == "calibrated" else None)
        assert row["macs"] <= 0.25 * table.meta["macs"][0]
        accuracies[name] = row["loss"]
    run(*ladder, "--calibrate", "64", "--output-dir", tmp_path / "two", ranks=2)
    (row,) = json.loads((tmp_path / "two/results.json").read_text())["rows"]
    assert row["loss"] == pytest.approx(accuracies["calibrated"], rel=1e-3)
    shutil.copy(folder / "statistics.safetensors", tmp_path)
    torch.save(read_checkpoint(pretrained), tmp_path / "checkpoint_0.pth")
    shutil.copy(folder / "mask_table.json", tmp_path)
    output = run("main_test.py", *PLAIN, "--checkpoint", tmp_path, "--macs-ratio", "0.5", expect=2)
    assert "measured on other weights" in output
