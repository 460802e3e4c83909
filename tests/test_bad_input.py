"""docs/bad_input.md, walked through: every row is run in this process and must print its line, exit with 2 and write
nothing."""

import gzip
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
from models.vit.weights import as_safetensors

DOCUMENT = ROOT / "docs/bad_input.md"
# What the document says every command is run with; flags of the row come later, and win.
COMMON = ["--data-set", "DIGITS", "--device", "cpu", "--num-workers", "0"]
SCRIPTS = ("main_reparam", "main_train", "main_test", "main_finetune_peeled", "tools.pretrain")


# [(command, line)] of all tables of the document.
ROWS = re.findall(r"^\| `(\S+\.py.*?)` \| (.+) \|$", DOCUMENT.read_text(), re.MULTILINE)
ROWS = [(command, line.replace("\\|", "|")) for command, line in ROWS]


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
    name, numbers = "blocks.1.mlp.fc1.weight", torch.zeros(256, 64)
    odd = {"int8": numbers.to(torch.int8), "complex": numbers.to(torch.complex64), "sparse": numbers.to_sparse()}
    odd |= {"nan": numbers + float("nan"), "huge": numbers + 1e38, "big": numbers.double() + 1e300}
    for fault, tensor in odd.items():
        torch.save(state | {name: tensor}, f"{fault}.pth")
    torch.save(state | {"head.weight": torch.zeros(1).expand(10**9, 64)}, "stride.pth")
    content = bytearray(as_safetensors(state))
    content[-1000] ^= 16
    Path("flipped.safetensors").write_bytes(content)
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
    del metadata["checksum"]
    for name, place, value in (("nan", (3, 1), float("nan")), ("zero", (3, 3), 0.0)):
        damaged = tensors | {"blocks.2.mlp.factor": tensors["blocks.2.mlp.factor"].clone()}
        damaged["blocks.2.mlp.factor"][place] = value
        save_file(damaged, f"{name}.safetensors", metadata=metadata)
    os.mkfifo("pipe")


def make_folders():
    """A sub-network's folder that names more than sizes, and weights beside the table of others."""
    run_stage("main_test.py --checkpoint net --op-code 0 --save stranger --output-dir results")
    config = Path("stranger/config.json")
    config.write_text(config.read_text().replace('"model_args": {', '"model_args": {"checkpoint_path": "pickle.pth", '))
    for name in ("mixed", "unsaid"):
        shutil.copytree("net", name)
    path = Path("unsaid/mask_table.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"meta": {}}))
    torch.save({"model": torch.load("weights.pth")["model"]}, "mixed/reparamed.pth")


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
    for name in ("images", "truncated", "text", "no_val", "empty_class", "unreadable", "loop", "pipes"):
        make_images(name)
    Path("loop/train/cat/up").symlink_to("..")
    Path("pipes/val/cat/2.JPEG").unlink()
    os.mkfifo("pipes/val/cat/2.JPEG")
    for name, labels in (("inat_label", [7]), ("inat_empty", [])):
        Path(name).mkdir()
        Path(f"{name}/cat.jpg").write_bytes(jpeg(3))
        content = {"images": [{"id": 1, "file_name": "cat.jpg"}], "categories": [{"id": 0}, {"id": 1}]}
        content["annotations"] = [{"image_id": 1, "category_id": label} for label in labels]
        Path(f"{name}/val2018.json").write_text(json.dumps(content))
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
    bomb = gzip.compress(bytes([0, 0, 8, 3]) + np.array([65536, 256, 256], ">i4").tobytes() + bytes(10**6))
    for name, content in (("fashion", b"no gzip"), ("bomb", bomb)):
        Path(name).mkdir()
        for part in ("images-idx3", "labels-idx1"):
            Path(f"{name}/train-{part}-ubyte.gz").write_bytes(content)
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
        make_folders()
        Path("file").touch()
        Path("ten.txt").write_text("\n".join(["cat", *"abcdefghi"]))
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


def parser_of(script):
    parsers = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(utils.StageParser, "parse_args", lambda self, argv=None: parsers.append(self))
        module_of(script).get_args([])
    return parsers[0]


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_says_what_it_does_and_its_default(script):
    parser = parser_of(script)
    assert len(re.search(r"usage: .*?\n\n", parser.format_help(), re.DOTALL)[0].splitlines()) == 2
    for action in parser._actions:
        words = parser._get_formatter()._expand_help(action) if action.help else ""
        assert len(words) > 5, action.option_strings
        if action.nargs != 0 and action.default not in (None, []):
            assert "(default: " in words, action.option_strings


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_flag_with_a_type_or_choices_refuses_nonsense(script, capsys):
    flags = [a.option_strings[0] for a in parser_of(script)._actions if (a.type or a.choices) and a.type is not Path]
    for flag in flags:
        with pytest.raises(SystemExit) as stop:
            module_of(script).get_args([flag, "nonsense"])
        assert stop.value.code == 2 and f"error: argument {flag}: " in capsys.readouterr().err
    assert len(flags) > 15


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


def test_the_system_s_errors_are_one_line_and_bugs_are_tracebacks(monkeypatch, capsys):
    def fails(error):
        def main(args):
            raise error

        utils.run_stage(main, None)

    known = [
        (OSError(36, "File name too long", "x" * 300), "x" * 300 + ": File name too long"),
        (MemoryError(), "out of memory (MemoryError); take a smaller"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory (DefaultCPU"),
        (ValueError("of\x1b[2Jtimm"), "ValueError: of\\x1b[2Jtimm; SKD_TRACEBACK=1 in the environment shows where"),
        (FloatingPointError("the loss is nan"), "the loss is nan"),
    ]
    for error, line in known:
        with pytest.raises(SystemExit, match="2"):
            fails(error)
        assert capsys.readouterr().err.startswith(f"error: {line}")
    for bug in (TypeError, AttributeError, KeyError, AssertionError):
        with pytest.raises(bug):
            fails(bug())
    monkeypatch.setenv(utils.TRACEBACK, "1")
    with pytest.raises(MemoryError):
        fails(MemoryError())


def test_what_is_printed_fits_the_terminal_and_a_shell_reads_it(tmp_path, folder):
    """Blanks, quotes, control characters and letters that an ASCII terminal lacks, in the name of a folder."""
    output = tmp_path / "a 'b' \x1b[2J\u00e9"
    flags = f"--model vit_digits --pretrained weights.pth --proxy-samples 16 --output-dir {shlex.quote(str(output))}"
    command = [sys.executable, ROOT / "main_reparam.py", *COMMON, *shlex.split(flags)]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    result = subprocess.run(command, cwd=folder, capture_output=True, env=environment, timeout=300)
    assert result.returncode == 0 and b"\x1b" not in result.stdout and b"Traceback" not in result.stderr
    (line,) = (line for line in result.stdout.decode().splitlines() if "main_test.py" in line)
    words = shlex.split(line)
    assert words[:3] == ["python", "main_test.py", "--checkpoint"]
    assert words[3] == str(output).replace("\x1b", "\\x1b").replace("\u00e9", "\\xe9")


def test_stage_1_writes_its_weights_when_all_that_goes_with_them_is_there(folder, monkeypatch, capfd):
    """Alone they would be trained as plain slices, with a table that grows."""

    def full(*_):
        raise OSError(28, "No space left on device", "late/density.png")

    monkeypatch.chdir(folder)
    monkeypatch.setattr("main_reparam.save_figure", full)
    with pytest.raises(SystemExit):
        run_stage("main_reparam.py --model vit_digits --pretrained weights.pth --proxy-samples 16 --output-dir late")
    assert "error: late/density.png: No space left on device" in capfd.readouterr().err
    assert (folder / "late/compensation.safetensors").exists() and not (folder / "late/reparamed.pth").exists()
    shutil.rmtree(folder / "late")


def test_a_folder_left_by_a_killed_run_goes_and_a_save_on_another_disk_works(folder, monkeypatch, capfd):
    monkeypatch.chdir(folder)
    mount(folder / "disk", "size=4m")
    try:
        for place in ("disk", "."):
            utils.temporary_path(place, "files").mkdir()
            (Path(place) / ".of_a_user.1.part").touch()
            run_stage(f"main_test.py --checkpoint net --op-code 0 --save {place} --output-dir results")
            hidden = {path.name for path in Path(place).glob(".*")}
            assert Path(place, "model.safetensors").is_file() and hidden == {".of_a_user.1.part"}
    finally:
        unmount(folder / "disk")
