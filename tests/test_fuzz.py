"""Random command lines and damaged files, ten minutes of them: no traceback, no hang, nothing half-written."""

import contextlib
import json
import os
import resource
import shlex
import shutil
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from runs import CONTEXT
from test_bad_input import COMMON, parser_of, run_stage

import utils
from models.vit.pretrained import ModelSpec, read_checkpoint, save_checkpoint

MINUTES, LIMIT, MEMORY = 10, 120, 12 * 2**30
STARTS = {
    "main_reparam.py": "--model vit_digits --pretrained net/reparamed.pth --proxy-samples 16",
    "main_train.py": "--model vit_digits --pretrained net/reparamed.pth --proxy-samples 16 --epochs 1 --batch-size 512",
    "main_test.py": "--checkpoint net --op-code 9 --batch-size 600",
    "main_finetune_peeled.py": "--checkpoint net --op-code 9 --epochs 1 --batch-size 512",
}
NUMBERS = ["0", "1", "2", "16", "300", "0.5", "-1", "1e-30", "1e30", "nan", "9" * 400]
WORDS = [
    "", "x", ".", "net", "nowhere", "/dev/null", "a" * 300, "\x1b[2J\u00e9 '", "auto", "none", "DIGITS", "vit_tiny",
]  # fmt: skip
VALUES = st.sampled_from(NUMBERS + WORDS)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
)


@st.composite
def command_lines(draw):
    """A command line that works, and after it up to four random flags."""
    script = draw(st.sampled_from(sorted(STARTS)))
    words = [*shlex.split(STARTS[script]), "--output-dir", "out"]
    for action in draw(st.lists(st.sampled_from(actions_of(script)), max_size=4)):
        choices = st.sampled_from(list(action.choices or [*NUMBERS[:6], "auto"]))
        value = [] if action.nargs == 0 else [draw(choices if draw(st.booleans()) else VALUES)]
        words += [action.option_strings[0], *value]
    return script, words


def actions_of(script):
    # Not the help, and no hours of work that the flags ask for rightly.
    left_out = {"-h", "--epochs", "--num-workers", "--input-size", "--latency-batch-size", "--export"}
    return [action for action in parser_of(script)._actions if action.option_strings[0] not in left_out]


def damage(draw, path):
    """Put another file, a folder, a pipe or a file that differs in one place where ``path`` is."""
    content, kind = path.read_bytes(), draw(st.sampled_from(["bits", "cut", "json", "folder", "pipe", "random"]))
    place = draw(st.integers(0, len(content) - 1))
    path.unlink()
    if kind == "folder":
        path.mkdir()
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "json" and path.suffix == ".json":
        tree = json.loads(content)
        node = tree
        while isinstance(node[key := draw(st.sampled_from(sorted(node)))], dict) and draw(st.booleans()):
            node = node[key]
        node[key] = draw(JSON)
        path.write_text(json.dumps(tree))
    elif kind == "random":
        path.write_bytes(draw(st.binary(max_size=60)))
    else:
        changed = bytes([content[place] ^ 1 << draw(st.integers(0, 7))])
        path.write_bytes(content[:place] + (changed + content[place + 1 :] if kind == "bits" else b""))


def child(folder, script, words):
    os.chdir(folder)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    with open("words.txt", "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        run_stage(shlex.join([script, *words]))


@pytest.fixture(scope="module")
def net(tmp_path_factory):
    """A folder with a super-network ``net``, a sub-network ``subnet`` and no more."""
    folder = tmp_path_factory.mktemp("fuzz")
    with contextlib.chdir(folder):
        utils.seed_all(3)
        save_checkpoint(ModelSpec("vit_digits", 10).build().state_dict(), Path("start.pth"))
        run_stage("main_reparam.py --model vit_digits --pretrained start.pth --proxy-samples 32 --output-dir net")
        run_stage("main_test.py --checkpoint net --op-code 9 --save subnet --output-dir results")
    return folder


@pytest.mark.slow
def test_nothing_that_is_given_ends_in_a_traceback_a_hang_or_half_a_file(net, tmp_path):
    @settings(
        max_examples=20, deadline=None, database=None, phases=[Phase.explicit, Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(command_lines(), st.data())
    def one(command, data):
        folder = tmp_path / "work"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(net, folder)
        script, words = command
        if data.draw(st.booleans()):
            files = sorted(path for path in folder.rglob("*") if path.parent.name in ("net", "subnet"))
            damage(data.draw, data.draw(st.sampled_from(files)))
            words = [word.replace("net", "subnet") if data.draw(st.booleans()) else word for word in words]
        note(shlex.join([script, *COMMON, *words]))
        process = CONTEXT.Process(target=child, args=(folder, script, words))
        process.start()
        process.join(LIMIT)
        hangs = process.exitcode is None
        process.kill()
        process.join()
        said = (folder / "words.txt").read_text(errors="replace")
        note(said)
        assert not hangs and process.exitcode in (0, 2) and "Traceback" not in said
        assert (process.exitcode == 2) == ("error: " in said)
        assert not list(folder.rglob(utils.LEFT_OVER))
        for path in (folder / "out").rglob("*") if (folder / "out").is_dir() else ():
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix in (".pth", ".safetensors"):
                assert read_checkpoint(path)

    end, rounds = time.monotonic() + 60 * MINUTES, 0
    while time.monotonic() < end:  # each round draws other examples
        one()
        rounds += 1
    assert rounds
