"""On a GPU, what the CPU gives: TEST_GPUS=0 sh run_tests.sh tests/test_gpu.py. Skipped where there is none."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, TINY_WIDTHS, difference, measured, random_images, rewritten, tiny_supernet
from runs import log_of
from torch.nn import functional as F

from models.subnet.extract import extract
from models.vit.pretrained import read_checkpoint
from models.vit.supernet import compile_branches, full_widths, set_widths
from models.wpac.compensation import attach, compensate

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
DATA = ["--model", "vit_digits", "--data-set", "DIGITS", "--num-workers", "2"]
PLAIN = [
    "--no-repeated-aug", "--aa=", "--hflip", "0", "--color-jitter", "0", "--reprob", "0", "--mixup", "0",
    "--cutmix", "0", "--drop-path", "0", "--warmup-epochs", "0", "--lr", "4e-3",
]  # fmt: skip


def stage(script, *options, launcher=()):
    """What a script prints, in one process; ``launcher``: words before it, as of torchrun."""
    command = [sys.executable, *launcher, script, *DATA, *map(str, options)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    """The folder of stage 1 on the GPU, after a short training there in bf16."""
    folder = tmp_path_factory.mktemp("start")
    stage("tools/pretrain.py", "--epochs", 20, *PLAIN, "--amp", "bf16", "--output-dir", folder / "pretrain")
    words = stage("main_reparam.py", "--pretrained", folder / "pretrain/pretrained.pth", "--output-dir", folder / "one")
    assert "cuda" in words.lower() or "nvidia" in words.lower(), words
    return folder / "one"


def test_statistics_and_what_is_solved_from_them_are_those_of_the_cpu():
    here, there = tiny_supernet(), tiny_supernet().cuda()
    sums, others = measured(here, hidden=True), measured(there, hidden=True)
    for own, other in zip(sums, others, strict=True):
        assert difference(own.taylor, other.taylor.cpu()) < 1e-2  # convolutions are TF32 there
        assert difference(own.mean_gram, other.mean_gram.cpu()) < 1e-2
    images = random_images(8).cuda()
    before = there(images)
    compensation = rewritten(there, others, "balanced", "greedy")
    assert difference(before, there(images)) < 1e-4
    compensated = copy.deepcopy(there)
    attach(compensated, compensation)
    for widths in TINY_WIDTHS:
        if 0 in widths.flat:
            continue  # what a branch that is off adds on average is in the extracted network alone
        set_widths(compensated, widths)
        subnet = compensate(extract(there, widths), there, compensation)
        assert difference(subnet(images), compensated(images)) < 1e-3


@pytest.mark.parametrize("amp", [torch.float32, torch.bfloat16])
def test_compiled_compensated_slices_train_as_eager_ones(amp):
    eager = tiny_supernet().cuda()
    attach(eager, rewritten(eager, measured(eager, hidden=True), "balanced", "greedy"))
    compiled, images = copy.deepcopy(eager), random_images(8).cuda()
    compile_branches(compiled)
    for widths in (full_widths(eager), *TINY_WIDTHS):
        gradients = []
        for network in (eager, compiled):
            set_widths(network, widths)
            network.zero_grad()
            with torch.autocast("cuda", amp, enabled=amp != torch.float32):
                logits = network(images)
            F.cross_entropy(logits.float(), torch.arange(8, device="cuda") % 7).backward()
            gradients.append(torch.cat([p.grad.flatten() for p in network.parameters() if p.grad is not None]))
        assert difference(*gradients) < (1e-3 if amp == torch.float32 else 0.1)


def test_what_is_cut_on_a_gpu_is_as_good_as_on_a_cpu(start, tmp_path):
    tops = []
    for device in ("cuda", "cpu"):
        words = ["--checkpoint", start, "--macs-ratio", 1, 0.5, 0.25, "--output-dir", tmp_path / device]
        stage("main_test.py", *words, "--device", device, "--amp", "none")
        rows = json.loads((tmp_path / device / "results.json").read_text())["rows"]
        tops.append([row["top1"] for row in rows])
    assert len(tops[0]) == 3 and min(tops[0]) > 50
    assert tops[0] == pytest.approx(tops[1], abs=0.7)


@pytest.mark.parametrize(
    "options", [[], ["--amp", "fp16"], ["--compile"], ["--mask-table", "none", "--grow-epochs", 1]]
)
def test_stage_2_trains_in_every_way(options, start, tmp_path):
    command = ["main_train.py", "--pretrained", start / "reparamed.pth", *PLAIN, "--epochs", 2]
    stage(*command, *options, "--output-dir", tmp_path)
    assert [record["epoch"] for record in log_of(tmp_path)] == [0, 1]
    assert log_of(tmp_path)[1]["train_loss"] < 2.0


def test_a_run_under_torchrun_and_a_resumed_one_train_the_same_weights(start, tmp_path):
    command = ["main_train.py", "--pretrained", start / "reparamed.pth", *PLAIN, "--epochs", 2]
    stage(*command, "--output-dir", tmp_path / "none")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=1"]
    stage(*command, "--output-dir", tmp_path / "one", launcher=launcher)
    resumed = tmp_path / "none/checkpoint_0.pth"
    stage(*command, "--output-dir", tmp_path / "again", "--resume", resumed)
    weights = [read_checkpoint(tmp_path / name / "checkpoint_1.pth")["model"] for name in ("none", "one", "again")]
    for name, tensor in weights[0].items():
        assert difference(tensor, weights[1][name]) < 1e-2, name
        assert difference(tensor, weights[2][name]) < 1e-2, name
