"""The four scripts end to end on real digits: one rank, two gloo ranks, stopped and resumed, files in and out."""

import argparse
import csv
import json
import re

import pytest
import torch
from PIL import Image
from runs import assert_equal, log_of, stage, torchrun

import datasets
import main_train
from models.piad.width_table import WidthTable
from models.subnet.load import load_subnetwork
from models.subnet.store import load_supernet
from models.vit.pretrained import ModelSpec, read_checkpoint
from models.vit.supernet import full_widths, set_widths
from models.vit.widths import Widths
from utils import InputError

MACHINE = "--device cpu --num-workers 0"
DIGITS = f"{MACHINE} --data-set DIGITS"
# Deterministic augmentation is not needed for one rank against two: it is keyed by position. Mixup pairs the images
# of one rank, and drop path draws per rank, so both are off here.
PLAIN = "--mixup 0 --cutmix 0 --drop-path 0 --no-repeated-aug --warmup-epochs 0 --epochs 3 --lr 1e-3"
TRAINING = f"{DIGITS} --model vit_digits {PLAIN} --mask-table none --proxy-samples 64 --grow-epochs 2"
SIZES = ("largest", "middle", "smallest")


def run(command, ranks=1, expect=0):
    """Run a stage in processes of its own; returns its output."""
    words = command.split()
    output, code = stage(*words) if ranks == 1 else torchrun(*words, ranks=ranks, timeout=600)
    assert code == expect, output
    return output


def rows_of(folder):
    return json.loads((folder / "results.json").read_text())["rows"]


@pytest.fixture(scope="session")
def pretrained(tmp_path_factory):
    """A ViT trained on digits for three epochs."""
    folder = tmp_path_factory.mktemp("pretrained")
    run(f"tools/pretrain.py {DIGITS} --model vit_digits {PLAIN} --output-dir {folder}")
    return folder / "pretrained.pth"


@pytest.fixture(scope="session")
def reparam(pretrained):
    """The command of stage 1."""
    return f"main_reparam.py {DIGITS} --model vit_digits --pretrained {pretrained}"


@pytest.fixture(scope="session")
def chain(reparam, tmp_path_factory):
    """Stages 1 and 2 with one rank and with two, at the same global batch: {ranks: folder}."""
    folders = {}
    for ranks in (1, 2):
        folders[ranks] = folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        options = f"--proxy-samples 101 --batch-size {32 // ranks} --output-dir {folder}/reparam"
        run(f"{reparam} {options}", ranks=ranks)
        start = f"--pretrained {folders[1]}/reparam/reparamed.pth"
        run(
            f"main_train.py {TRAINING} {start} --batch-size {64 // ranks} --keep-last 3 --output-dir {folder}",
            ranks=ranks,
        )
    return folders


def states(folder, name="checkpoint_2.pth", member="model"):
    return read_checkpoint(folder / name)[member]


def largest_difference(one, other):
    assert one.keys() == other.keys()
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_two_ranks_find_the_same_bases_and_train_the_same_table_and_weights(chain):
    assert largest_difference(*(states(folder, "reparam/reparamed.pth") for folder in chain.values())) < 1e-4
    tables = [WidthTable.load(folder / "mask_table.json") for folder in chain.values()]
    assert tables[0].steps == tables[1].steps
    assert tables[0].last > 20
    for member in ("model", "model_ema"):
        assert largest_difference(*(states(folder, member=member) for folder in chain.values())) < 5e-5
    moved = largest_difference(states(chain[1]), states(chain[1], "reparam/reparamed.pth"))
    assert moved > 0.002, "training must have moved the weights by far more than the ranks differ"


def test_the_best_checkpoint_is_the_one_of_the_best_mean_once_the_list_is_complete(chain):
    """In ``chain`` the list grows in epochs 0 and 1: those two have larger smallest networks, and do not compete."""
    records = log_of(chain[1])
    assert {f"test_{e}{n}" for e in ("", "ema_") for n in SIZES} <= records[0].keys()

    def mean(record):
        return max(sum(record[f"{prefix}_{name}"] for name in SIZES) / 3 for prefix in ("test", "test_ema"))

    content = read_checkpoint(chain[1] / "best_checkpoint.pth")
    assert content["epoch"] == max((1, 2), key=lambda epoch: mean(records[epoch]))
    assert content["max_accuracy"] == pytest.approx(mean(records[content["epoch"]]))
    table = WidthTable.load(chain[1] / "mask_table.json")
    assert load_supernet(chain[1] / "best_checkpoint.pth").table.steps == table.steps


def test_every_training_option_at_once_resumes_to_the_bit(chain, tmp_path):
    """Stage 1's table, found by itself; sandwich, in-place distillation, accumulation."""
    table = chain[1] / "reparam/mask_table.json"
    options = (
        f"{TRAINING} --pretrained {chain[1]}/reparam/reparamed.pth --mask-table auto --always largest smallest "
        "--distillation-type inplace --accum-iter 2 --sampling ends --clip-grad 1 --batch-size 32 --epochs 2 "
        "--sensitivity accuracy --keep-last 2"
    )
    output = run(f"main_train.py {options} --output-dir {tmp_path}/whole")
    assert f"sub-networks of {table} from the start" in output
    output = run(f"main_train.py {options} --resume {tmp_path}/whole/checkpoint_0.pth --output-dir {tmp_path}/part")
    assert f"note: {tmp_path}/part gets a best_checkpoint.pth when " in output
    whole, part = (read_checkpoint(tmp_path / name / "checkpoint_1.pth") for name in ("whole", "part"))
    del whole["args"], part["args"]
    assert_equal(whole, part, "checkpoint_1.pth")
    assert WidthTable.load(tmp_path / "whole/mask_table.json").steps == WidthTable.load(table).steps
    assert (tmp_path / "whole/best_checkpoint.pth").exists()


def test_compensated_slices_are_trained_and_then_cut(chain, tmp_path):
    folder, start = tmp_path / "net", f"--pretrained {chain[1]}/reparam/reparamed.pth"
    command = f"main_train.py {TRAINING} {start} --mask-table auto --epochs 1 --output-dir {folder}"
    output = run(command)
    assert f"training compensated slices, by {chain[1]}/reparam/compensation.safetensors" in output
    last = WidthTable.load(folder / "mask_table.json").last
    run(f"main_test.py {DIGITS} --checkpoint {folder} --op-code {last} --output-dir {tmp_path}/test")
    (row,), (record,) = rows_of(tmp_path / "test"), log_of(folder)
    assert row["compensated"] and row["top1"] == pytest.approx(record["test_smallest"], abs=0.2), "one image is 0.17"
    output = run(f"{command} --no-compensation --resume {folder}/checkpoint_0.pth", expect=2)
    assert "trains compensated slices; leave it out" in output
    output = run(f"tools/measure.py {DIGITS} --checkpoint {folder} --proxy-samples 16", expect=2)
    assert "was trained with the compensation of stage 1, and is cut with it" in output
    again = f"main_train.py {TRAINING} --pretrained {folder} --mask-table auto --epochs 1 --output-dir {tmp_path}/again"
    assert f"training compensated slices, by {folder}/compensation.safetensors" in run(again)
    assert load_supernet(tmp_path / "again").began == load_supernet(folder).began
    (folder / "compensation.safetensors").unlink()
    with pytest.raises(InputError, match="not a readable compensation file"):
        load_supernet(folder)


def test_training_says_what_it_starts_from(chain, tmp_path):
    start = chain[1] / "reparam"
    last = WidthTable.load(start / "mask_table.json").last
    command = f"main_train.py {TRAINING} --pretrained {start}/reparamed.pth --mask-table auto --epochs 1"
    output = run(f"{command} --output-dir {tmp_path}/net")
    told = re.search("before training: top-1 largest (.*), middle (.*), smallest (.*)\n", output).groups()
    words = f"--op-code 0 {last // 2} {last}"
    run(f"main_test.py {DIGITS} --checkpoint {start} {words} --output-dir {tmp_path}/test")
    tops = [row["top1"] for row in rows_of(tmp_path / "test")]
    assert tops == pytest.approx(list(map(float, told)), abs=0.4), "one image is 0.17"
    path = tmp_path / "net/checkpoint_0.pth"
    content = read_checkpoint(path)
    assert content["before"] == pytest.approx(sum(map(float, told)) / 3, abs=0.01)
    output = run(f"{command} --output-dir {tmp_path}/net --resume {path}")
    assert "before training" not in output
    assert read_checkpoint(chain[1] / "checkpoint_2.pth")["before"] is None, "a table that grew starts with one size"


def test_training_that_has_made_things_worse_says_so(capsys):
    figures = {"train_loss": 1.0, "test_largest": 60.0, "test_middle": 50.0, "test_smallest": 40.0}
    main_train.note_if_worse(52.0, figures, 2000)  # whose standard error is 1.58
    words = "note: the mean top-1 of the three sizes was 52.00 before training and is 50.00 after it; try a lower --lr"
    assert words in capsys.readouterr().out
    main_train.note_if_worse(52.0, figures, 1000)  # 2.23
    main_train.note_if_worse(49.0, figures, 10**9)
    assert capsys.readouterr().out == ""


def test_a_teacher_from_a_file_or_the_starting_network(chain, pretrained, tmp_path):
    start = f"--pretrained {chain[1]}/reparam/reparamed.pth --batch-size 64 --epochs 1 --grow-epochs 1"
    own = "--distillation-type soft --distillation-tau 2"
    given = f"{own} --teacher-model vit_digits --teacher-path {pretrained}"
    for name, options in (("own", own), ("given", given), ("none", "")):
        run(f"main_train.py {TRAINING} {start} {options} --output-dir {tmp_path}/{name}")
    others = (
        f"--pretrained {pretrained} --batch-size 64 --epochs 1 --grow-epochs 1 --resume {tmp_path}/own/checkpoint_0.pth"
    )
    output = run(f"main_train.py {TRAINING} {others} {own} --output-dir {tmp_path}/own", expect=2)
    assert "its teacher had other weights" in output
    own, given, none = (states(tmp_path / name, "checkpoint_0.pth") for name in ("own", "given", "none"))
    assert largest_difference(own, given) < 3e-4, "both teachers compute the same function"
    assert largest_difference(own, none) > 1e-3


def test_main_test_walks_the_ladder_and_every_kind_of_budget(chain, tmp_path):
    results = []
    for ranks in (1, 2):
        run(f"main_test.py {DIGITS} --checkpoint {chain[1]} --output-dir {tmp_path}/{ranks}", ranks=ranks)
        results.append(rows_of(tmp_path / str(ranks)))
    shares = ("1", "0.8333", "0.6667", "0.5", "0.3333")
    assert [row["asked"] for row in results[0]] == [f"macs_ratio {share}" for share in shares]
    for one, two in zip(*results, strict=True):
        assert one["macs"] <= float(one["asked"].split()[1]) * results[0][0]["macs"] + 1e3
        assert (one["step"], one["top1"], one["parameters"]) == (two["step"], two["top1"], two["parameters"])
    budgets = "--op-code 3 -1 --macs 2M --params 100K --macs-ratio 0.4"
    output = run(f"main_test.py {DIGITS} --checkpoint {chain[1]} --use-ema {budgets} --output-dir {tmp_path}/all")
    with open(tmp_path / "all/results.csv") as file:
        rows = list(csv.DictReader(file))
    asked = ["op_code 3", "op_code -1", "macs 2.00 M", "macs_ratio 0.4", "params 100.00 K"]
    assert [row["asked"] for row in rows] == asked
    assert rows[0]["step"] == "3" and int(rows[2]["macs"]) <= 2e6 and int(rows[4]["parameters"]) <= 100e3
    assert "main_finetune_peeled.py" in output


def test_fine_tuning_and_its_checkpoint(chain, tmp_path):
    folder = tmp_path / "tuned"
    options = f"{DIGITS} {PLAIN} --checkpoint {chain[1]} --macs-ratio 0.3 --batch-size 32 --output-dir {folder}"
    assert "asked macs_ratio 0.3: step" in run(f"main_finetune_peeled.py {options}", ranks=2)
    content = read_checkpoint(folder / "checkpoint_2.pth")
    widths = Widths.from_dict(content["config"]["widths"])
    assert widths in WidthTable.load(chain[1] / "mask_table.json").steps
    loaded = load_supernet(folder)
    assert loaded.one_size and loaded.table.steps == [widths]
    run(f"main_test.py {DIGITS} --checkpoint {folder}/checkpoint_2.pth --output-dir {tmp_path}/test")
    (row,) = rows_of(tmp_path / "test")
    assert row["top1"] == pytest.approx(log_of(folder)[-1]["test_top1"])
    assert Widths.from_dict(row["widths"]) == widths
    assert row["parameters"] == sum(value.numel() for value in content["model"].values())


def folder_of_digits(root, classes, count):
    """Images of the first few classes in ImageNet's layout, as users keep their own."""
    for split in ("train", "val"):
        images = datasets.load_images(argparse.Namespace(data_set="DIGITS", data_path="data"), split == "train")
        for index, (image, label) in enumerate(images[i] for i in range(count)):
            if label < classes:
                place = root / split / f"class{label}"
                place.mkdir(parents=True, exist_ok=True)
                image.save(place / f"{index}.png")
    return root


def test_saved_sub_networks_go_through_the_stages_and_to_other_data(chain, tmp_path):
    """Saved for two budgets, tested again from their folders, then tuned on other classes at another image size."""
    options = "--macs-ratio 0.5 --params 60K --finer --benchmark --plot --export pt2"
    files = f"--checkpoint {chain[1]} --save {tmp_path}/net --output-dir {tmp_path}/a"
    output = run(f"main_test.py {DIGITS} {files} {options}")
    rows = rows_of(tmp_path / "a")
    assert all(row["latency_ms"] > 0 for row in rows) and rows[1]["parameters"] <= 60e3
    assert {path.name for path in (tmp_path / "a").iterdir()} >= {"ladder.png", "widths.png", "knowledge.png"}
    assert "latencies: batch 1, 16 px on" in output and list(chain[1].glob("latency_*_batch1_16px_none.json"))
    assert output.count("model.pt2: largest difference") == 2
    for row, name in zip(rows, ("macs_ratio_0.5", "params_60.00K"), strict=True):
        folder = tmp_path / "net" / name
        names = {path.name for path in folder.iterdir()}
        assert names == {"README.md", "config.json", "model.safetensors", "model.pt2"}
        run(f"main_test.py {DIGITS} --checkpoint {folder} --output-dir {tmp_path}/{name}")
        (again,) = rows_of(tmp_path / name)
        for key in ("top1", "loss", "macs", "parameters", "widths"):
            assert again[key] == row[key]
    for option, begin in (("--macs-ratio 0.5", "--macs-ratio 0.5: "), ("--plot", "--plot draws a super-network: ")):
        refused = run(f"main_test.py {DIGITS} --checkpoint {folder} {option} --output-dir {tmp_path}/no", expect=2)
        (line,) = (line for line in refused.splitlines() if line.startswith("error: "))
        assert line.startswith(f"error: {begin}{folder}") and "is one sub-network" in line
        assert "Traceback" not in refused and "evaluate" not in refused and not (tmp_path / "no").exists()
    assert "is one sub-network, of which nothing" in run(f"tools/measure.py {DIGITS} --checkpoint {folder}", expect=2)
    images = folder_of_digits(tmp_path / "images", classes=3, count=400)
    other, tuned = f"{MACHINE} --data-set IMNET --data-path {images}", tmp_path / "tuned"
    output = run(
        f"main_finetune_peeled.py {other} {PLAIN} --input-size 24 --batch-size 32 --checkpoint {folder} "
        f"--output-dir {tuned}"
    )
    assert "has 10 classes: replaced by a new one for 3" in output
    content = read_checkpoint(tuned / "checkpoint_2.pth")
    assert content["config"]["macs"] == load_supernet(tuned).costs.macs(load_supernet(tuned).table.steps[0])
    assert content["model"]["head.weight"].shape == (3, 64) and content["model"]["pos_embed"].shape == (1, 37, 64)
    run(f"main_test.py {other} --checkpoint {tuned} --save {tmp_path}/last --output-dir {tmp_path}/b")
    config = json.loads((tmp_path / "last/config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 24, 24] and config["num_classes"] == 3
    assert load_subnetwork(tmp_path / "last")(torch.zeros(2, 3, 24, 24)).shape == (2, 3)


def test_a_latency_budget_is_measured_and_kept(chain, tmp_path):
    command = f"main_test.py {DIGITS} --checkpoint {chain[1]} --latency-batch-size 2 --output-dir {tmp_path}"
    run(f"{command} --benchmark --op-code 0 -1")
    slow = max(row["latency_ms"] for row in rows_of(tmp_path))
    output = run(f"{command} --latency-ms {slow}")
    (row,) = rows_of(tmp_path)
    assert row["latency_ms"] <= slow and "networks from" in run(f"{command} --latency-ms 1e6", expect=2)
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
    content = {"model": state} if kind == "model only" else state
    if kind == "everything":
        content = {
            "model": state, "optimizer": torch.optim.AdamW(model.parameters()).state_dict(), "lr_scheduler": {},
            "model_ema": {key: value + 1 for key, value in state.items()}, "max_accuracy": 70.1, "epoch": 299,
            "scaler": {}, "args": argparse.Namespace(model=name, lr=5e-4, data_path="/data"),
        }  # fmt: skip
    torch.save(content, folder / "checkpoint_299.pth")
    hidden, table = 4 * model.embed_dim, {}
    for block in range(12):
        table[f"{block}.mlp"] = {"0": hidden, "1": hidden // 2, "2": 0, "-1": 0}
        table[f"{block}.attn"] = {"0": 64, "1": 40, "2": 8, "-1": 8}
    (folder / "mask_table.json").write_text(json.dumps(table))
    loaded = load_supernet(folder, use_ema=kind == "everything")
    assert loaded.spec == ModelSpec(name, 1000, None) and loaded.table.last == 2
    assert loaded.table.steps[0] == full_widths(loaded.supernet)
    offset = 1 if kind == "everything" else 0
    assert torch.equal(loaded.supernet.blocks[3].mlp.fc2.weight, state["blocks.3.mlp.fc2.weight"] + offset)
    set_widths(loaded.supernet, loaded.table.steps[1])
    assert loaded.supernet.eval()(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)


def test_a_published_checkpoint_evaluates_on_imagenet_folders(tmp_path):
    """The whole of main_test.py on a folder laid out like ImageNet with three of its classes."""
    for split in ("train", "val"):
        for index, wnid in enumerate(("n01440764", "n01443537", "n01484850")):
            place = tmp_path / "imagenet" / split / wnid
            place.mkdir(parents=True)
            for number in range(2):
                Image.new("RGB", (40 + number, 50), (80 * index, 10, 90)).save(place / f"{number}.JPEG")
    folder = tmp_path / "peelable/vit_tiny"
    folder.mkdir(parents=True)
    state = {f"module.{name}": value for name, value in ModelSpec("vit_tiny", 1000).build().state_dict().items()}
    torch.save({"state_dict": state}, folder / "checkpoint.pth")
    full = Widths((64,) * 12, (768,) * 12)
    half = Widths((32,) * 12, (384,) * 12)
    published = json.loads(WidthTable([full, half]).to_json())
    del published["meta"]
    (folder / "mask_table.json").write_text(json.dumps(published))
    command = f"main_test.py {MACHINE} --data-path {tmp_path}/imagenet --checkpoint {folder} --plot "
    command += f"--save {tmp_path}/net --output-dir {tmp_path}/out"
    output = run(f"{command} --op-code 0 1")
    assert "1.08 G" in output and (tmp_path / "out/knowledge.png").is_file()
    network = load_subnetwork(tmp_path / "net/op_code_1")
    assert network.pretrained_cfg["input_size"] == [3, 224, 224] and network.blocks[0].attn.head_dim == 32
    assert network(torch.zeros(1, 3, 224, 224)).shape == (1, 1000)
    assert network.pretrained_cfg["label_names"][2] == "n01484850"


# ------------------------------------------------------------------------------------------ input from users


def test_a_network_without_a_classifier_is_reparameterised_without_labels(reparam, tmp_path):
    run(f"{reparam} --proxy-samples 64 --nb-classes 0 --objective feature --output-dir {tmp_path}")
    assert not any(name.startswith("head") for name in states(tmp_path, "reparamed.pth"))
    loaded = load_supernet(tmp_path)
    assert loaded.cut(loaded.table.steps[-1])(torch.zeros(2, 3, 16, 16)).shape == (2, 64)
    command = f"main_test.py {DIGITS} --checkpoint {tmp_path} --macs-ratio 1 30%"
    files = f"--save {tmp_path}/net --export pt2 --plot --benchmark"
    output = run(f"{command} --output-dir {tmp_path}/costs {files}")
    assert "top-1" not in output and "costs alone" in output
    assert {row["top1"] for row in rows_of(tmp_path / "costs")} == {None}
    assert load_subnetwork(tmp_path / "net/macs_ratio_0.3")(torch.zeros(2, 3, 16, 16)).shape == (2, 64)
    assert "has no classifier" in run(f"{command} --class-map names.txt", expect=2)
    output = run(f"{command} --probe knn --output-dir {tmp_path}/knn", ranks=2)
    assert "top-1 (knn)" in output and "costs alone" not in output
    for row in rows_of(tmp_path / "knn"):
        assert row["probe"] == "knn" and row["images"] == 599 and row["top5"] > row["top1"] > 20, "chance is 10"
    tuning = f"{PLAIN} --epochs 1 --checkpoint {tmp_path} --macs-ratio 0.3 --output-dir {tmp_path}/tuned"
    assert "has 0 classes: replaced by a new one for 10" in run(f"main_finetune_peeled.py {DIGITS} {tuning}")


def test_a_checkpoint_with_another_head_is_refitted_and_said(reparam, tmp_path):
    for ranks in (1, 2):  # the new classifier is the same one on all of them
        output = run(f"{reparam} --proxy-samples 16 --nb-classes 13 --output-dir {tmp_path}/{ranks}", ranks)
        assert "has 10 classes: replaced by a new one for 13" in output
    alone, together = (states(tmp_path, f"{ranks}/reparamed.pth") for ranks in (1, 2))
    assert alone["head.weight"].shape == (13, 64)
    assert largest_difference(alone, together) < 1e-3


def test_stage_1_alone_cuts_any_budget(reparam, tmp_path):
    """The training-free product: two ranks write it, one process cuts it; plain, compensated and calibrated."""
    folder = tmp_path / "reparam"
    run(f"{reparam} --proxy-samples 200 --output-dir {folder}", ranks=2)
    table, losses = WidthTable.load(folder / "mask_table.json"), {}
    assert table.meta["macs"][-1] <= 0.125 * table.meta["macs"][0] < table.meta["macs"][-2]
    command = f"main_test.py {DIGITS} --checkpoint {folder} --macs-ratio 0.25"
    ways = {"plain": "--no-compensation", "compensated": "", "calibrated": "--calibrate 64"}
    for name, option in ways.items():
        run(f"{command} {option} --output-dir {tmp_path}/{name}")
        (row,) = rows_of(tmp_path / name)
        assert row["compensated"] == (name != "plain") and row["calibrated"] == (64 if name == "calibrated" else None)
        assert row["macs"] <= 0.25 * table.meta["macs"][0]
        losses[name] = row["loss"]
    run(f"{command} --calibrate 64 --output-dir {tmp_path}/two", ranks=2)
    assert rows_of(tmp_path / "two")[0]["loss"] == pytest.approx(losses["calibrated"], rel=1e-3)
