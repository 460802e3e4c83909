"""docs/bad_input.md, walked through: every row is run in this process and must print its line, exit with 2 and write
nothing."""

import importlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, tiny_vit
from PIL import Image
from runs import mount, unmount
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import utils
from models.vit.pretrained import ModelSpec

DOCUMENT = ROOT / "docs/bad_input.md"
# What the document says every command is run with; flags of the row come later, and win.
COMMON = ["--data-set", "DIGITS", "--device", "cpu", "--num-workers", "0"]
SCRIPTS = ("main_reparam", "main_train", "main_test", "main_finetune_peeled", "tools.pretrain")


def read_rows():
    """[(command, line)] of all tables of the document."""
    rows = re.findall(r"^\| `(\S+\.py.*?)` \| (.+) \|$", DOCUMENT.read_text(), re.MULTILINE)
    return [(command, line.replace("\\|", "|")) for command, line in rows]


ROWS = read_rows()


# ------------------------------------------------------------------------------------------ the files of the rows


class Attack:
    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def make_checkpoints(state):
    """Damaged and foreign checkpoints in the working folder, made from a good state dict."""
    torch.save({"model": state}, "weights.pth")
    content = Path("weights.pth").read_bytes()
    Path("empty.pth").touch()
    Path("empty.safetensors").touch()
    Path("truncated.pth").write_bytes(content[: len(content) // 2])
    middle = len(content) // 2
    Path("flipped.pth").write_bytes(content[:middle] + bytes([content[middle] ^ 16]) + content[middle + 1 :])
    Path("text.pth").write_text("these are no weights")
    torch.save({"model": Attack()}, "pickle.pth")
    torch.save([1, 2], "list.pth")
    torch.save({"epoch": 3}, "no_weights.pth")
    torch.save({"model": [1, 2]}, "no_dict.pth")
    torch.save({"model": {"conv1.weight": torch.zeros(64, 3, 7, 7)}}, "resnet.pth")
    torch.save({"model": tiny_vit().state_dict()}, "wider.pth")
    for name, value in (("nan", float("nan")), ("huge", 1e38)):
        damaged = {key: tensor.clone() for key, tensor in state.items()}
        damaged["blocks.1.mlp.fc1.weight"][3, 4] = value
        torch.save(damaged, f"{name}.pth")
    torch.save({"model": state, "config": {"model": "vit_digits", "num_classes": 10, "img_size": None}}, "subnet.pth")


def make_tables(good):
    """Tables with one fault each, made from the text of a good one."""

    def damaged(name, change):
        content = json.loads(good)
        change(content)
        Path(f"tables/{name}.json").write_text(json.dumps(content))

    def add_to_all(content, amount, branch):
        for name in (name for name in content if name.endswith(branch)):
            content[name] = {step: width + amount for step, width in content[name].items()}

    Path("tables").mkdir()
    Path("tables/no_json.json").write_text("{")
    Path("tables/brackets.json").write_text("[" * 100_000)
    Path("tables/list.json").write_text("[]")
    damaged("no_block", lambda c: c.pop("1.mlp"))
    damaged("no_step", lambda c: c["0.mlp"].pop("2"))
    damaged("steps_differ", lambda c: [c["2.attn"].pop(step) for step in (max(c["2.attn"], key=int), "-1")])
    damaged("grows", lambda c: c["0.attn"].update({"1": 17}))
    damaged("negative", lambda c: c["0.attn"].update({max(c["0.attn"], key=int): -2}))
    damaged("half", lambda c: c["0.attn"].update({"1": 15.5}))
    damaged("no_widths", lambda c: c.update({"0.attn": 5}))
    damaged("last_step", lambda c: c["0.attn"].update({"-1": 16}))
    damaged("wider", lambda c: add_to_all(c, 64, ".mlp"))
    damaged("deeper", lambda c: c.update({"4.attn": c["0.attn"], "4.mlp": c["0.mlp"]}))


def make_compensation(path):
    """Damaged and foreign compensation files, made from the good one at ``path``."""
    tensors = load_file(path)
    Path("cut.safetensors").write_bytes(path.read_bytes()[:5000])
    save_file(tensors, "other.safetensors", metadata={"fc2": "of another network"})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors["blocks.2.mlp.factor"][3, 1] = float("nan")
    save_file(tensors, "nan.safetensors", metadata=metadata)


def jpeg(color):
    file = io.BytesIO()
    noise = np.random.default_rng(color).integers(0, 255, (40, 40, 3), np.uint8)
    Image.fromarray(noise).save(file, "JPEG")
    return file.getvalue()


def make_images(root, classes=("cat", "dog"), evaluation=None, count=3):
    """An ImageNet-like folder of small JPEG files."""
    for split, names in (("train", classes), ("val", classes if evaluation is None else evaluation)):
        for index, name in enumerate(names):
            folder = Path(root) / split / name
            folder.mkdir(parents=True)
            for number in range(count):
                (folder / f"{number}.JPEG").write_bytes(jpeg(10 * index + number))


def make_data():
    """Folders of images with one fault each."""
    for name in ("images", "truncated", "text", "no_val", "empty_class", "unreadable"):
        make_images(name)
    shutil.rmtree("no_val/val")
    for file in Path("empty_class/train/dog").iterdir():
        file.unlink()
    make_images("other_classes", evaluation=("cat", "eel"))
    make_images("fewer_classes", evaluation=("dog",))
    for split in ("train", "val"):
        Path(f"truncated/{split}/dog/1.JPEG").write_bytes(jpeg(3)[:700])
        Path(f"text/{split}/cat/2.JPEG").write_text("no picture")
    for file in Path("unreadable").rglob("*.JPEG"):
        file.write_bytes(b"")
    Path("fashion").mkdir()
    for part in ("images-idx3", "labels-idx1"):
        Path(f"fashion/train-{part}-ubyte.gz").write_bytes(b"no gzip")
    Path("no_classes/train").mkdir(parents=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A working folder with every file that the rows name; mounts are made when a row needs them."""
    folder, before = tmp_path_factory.mktemp("bad_input"), Path.cwd()
    os.chdir(folder)
    try:
        torch.manual_seed(0)
        make_checkpoints(ModelSpec("vit_digits", 10).build().state_dict())
        torch.save(ModelSpec("vit_digits", 2).build().state_dict(), "two.pth")
        run_stage("main_reparam.py --model vit_digits --pretrained weights.pth --proxy-samples 32 --output-dir net")
        two = "--pretrained two.pth --data-set IMNET --data-path images --proxy-samples 4 --output-dir net_two"
        make_data()
        run_stage(f"main_reparam.py --model vit_digits {two}")
        make_tables(Path("net/mask_table.json").read_text())
        make_compensation(Path("net/compensation.safetensors"))
        Path("file").touch()
        Path("nothing").mkdir()
        yield folder
    finally:
        for name in MOUNTS:
            unmount(folder / name)
        os.chdir(before)


# The options of a mount that holds too little, one that is full and one that cannot be written to.
MOUNTS = {"small": "size=64k", "full": "size=64k", "readonly": "ro"}


# ------------------------------------------------------------------------------------------ the walk


def module_of(script):
    return importlib.import_module(script.removesuffix(".py").replace("/", "."))


def run_stage(command):
    """Run a command line of a stage in this process, as its ``__main__`` does."""
    script, *flags = shlex.split(command)
    module = module_of(script)
    utils.run_stage(module.main, module.get_args([*COMMON, *flags]))


def files_below(folder):
    return {path: path.stat().st_mtime_ns for path in Path(folder).rglob("*") if path.is_file()}


def assert_the_line(printed, line):
    """What a stage printed as its error is the ``line`` of the document, where ``...`` is anything."""
    (found,) = (words for words in printed.splitlines() if words.startswith("error: "))
    found = found.removeprefix("error: ").removesuffix("; --help explains every flag")
    pattern = ".*".join(re.escape(part) for part in line.split("..."))
    # Python versions differ in whether they quote the choices of a flag.
    assert re.fullmatch(pattern.replace("'", ""), found.replace("'", "")), found


@pytest.mark.parametrize(("command", "line"), ROWS, ids=[command for command, _ in ROWS])
def test_a_row_of_the_document(command, line, folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    for name, options in MOUNTS.items():
        if f"{name}/" in command and not (folder / name).is_mount():
            mount(folder / name, options)
            if name == "full":
                (folder / "full/filler").write_bytes(bytes(64 * 1024))
    before = files_below(folder)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        run_stage(command)
    printed = capfd.readouterr()
    assert stop.value.code == 2
    assert_the_line(printed.err, line)
    assert "Traceback" not in printed.err + printed.out and "error: " not in printed.out
    assert files_below(folder) == before, "something was written"
    assert not Path("it-ran").exists(), "the pickle ran"


def test_the_document_has_many_rows_and_every_flag_that_can_be_wrong(monkeypatch):
    """All flags of all stages with a type or choices; a flag that is new there needs a row."""
    assert len(ROWS) >= 40 and len({command for command, _ in ROWS}) == len(ROWS)
    parsers = []
    monkeypatch.setattr(utils.StageParser, "parse_args", lambda self, argv=None: parsers.append(self))
    for script in SCRIPTS:
        module_of(script).get_args([])
    flags = {a.option_strings[0] for p in parsers for a in p._actions if a.type or a.choices}
    named = {utils.dashed(word) for command, _ in ROWS for word in command.split() if word.startswith("--")}
    assert len(flags) > 40 and not flags - named


@pytest.mark.parametrize("command", [
    "main_train.py --epochs 0", "main_test.py --checkpoint nowhere", "main_test.py --checkpoint pickle.pth",
])  # fmt: skip
def test_in_a_process_of_its_own_it_is_one_line_and_exit_code_2(command, folder):
    script, *flags = command.split()
    result = subprocess.run(
        [sys.executable, ROOT / script, *COMMON, *flags], cwd=folder, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 2 and "Traceback" not in result.stderr
    assert_the_line(result.stderr, dict(ROWS)[command])
    assert not (folder / "it-ran").exists()
