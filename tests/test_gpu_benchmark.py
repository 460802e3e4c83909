"""benchmarks/gpu.py, where there is no GPU."""

import sys
from argparse import Namespace

import pytest
from conftest import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))
import gpu


@pytest.mark.slow
def test_the_smallest_case_runs_on_the_cpu_and_writes_nothing(tmp_path, capsys):
    flags = gpu.FLAGS | {"device": "cpu", "output": str(tmp_path / "gpu.md"), "given": []}
    gpu.main(Namespace(**flags))
    parts = capsys.readouterr().out.split("\n## ")[1:]
    assert [part.splitlines()[0] for part in parts] == list(gpu.PARTS)
    assert all(len(part.splitlines()) > 5 for part in parts)
    assert not list(tmp_path.iterdir())
