"""The page of a super-network, as a file and in a browser."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import tiny_supernet

import report
from models.piad.width_table import WidthTable
from models.subnet.store import SuperNetwork
from models.vit.cost import Costs
from models.vit.pretrained import ModelSpec
from models.vit.widths import Widths
from utils import InputError

STEPS = [Widths((16, 2 * n, 16), (192, 24 * n, 192)) for n in range(8, -1, -1)]


def row(loaded, step, **more):
    widths = loaded.table.steps[step]
    figures = {"macs": loaded.costs.macs(widths), "widths": widths.as_dict(), "top1": 90 - step}
    return {"asked": f"op_code {step}", "latency_ms": 2.5, "file": None} | figures | more


@pytest.fixture
def path(tmp_path):
    """The page of a super-network of nine steps, of which two have been measured, with another's results over it."""
    page = pytest.importorskip("page", reason="plotly is not installed", exc_type=ImportError)
    supernet = tiny_supernet()
    spec, table, costs = ModelSpec("vit_tiny", 7), WidthTable(STEPS), Costs.of(supernet)
    loaded = SuperNetwork(supernet, spec, table, costs, Path("net/reparamed.pth"), weights="")
    rows = [row(loaded, 0), row(loaded, 4), row(loaded, 4, file="model.int8.onnx", top1=1), row(loaded, 6, top1=None)]
    others = [("another", [row(loaded, 2, top1=80)])]
    commands = [f"python main_test.py --op-code {step}" for step in range(9)]
    page.write(rows, loaded, commands, others, tmp_path / "page.html")
    return tmp_path / "page.html"


def test_the_page_is_one_file_with_a_state_for_every_step(path):
    text = path.read_text()
    assert "<script src=" not in text and [file.name for file in path.parent.iterdir()] == ["page.html"]
    for step, widths in enumerate(STEPS):
        assert f"--op-code {step}" in text and json.dumps(widths.attn, separators=(",", ":")) in text
    assert "another" in text


@pytest.mark.slow
def test_the_slider_moves_and_the_figures_follow_in_a_browser(path):
    browsers, chromium = pytest.importorskip("playwright.sync_api"), shutil.which("chromium")
    if not chromium:
        pytest.skip("no chromium here")
    with browsers.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        view, wrong, fetched = browser.new_page(), [], []
        view.on("console", lambda message: wrong.append(message.text))
        view.on("pageerror", lambda error: wrong.append(str(error)))
        view.on("request", lambda request: fetched.append(request.url))
        view.goto(path.as_uri())
        shown = [view.locator(".annotation-text").nth(i) for i in (3, 4)]
        bars = view.locator(".bars .bartext")
        shown[1].wait_for()
        assert "(1.000 of the full network)" in shown[0].text_content() and "top-1 90.00" in shown[0].text_content()
        assert bars.all_text_contents() == ["16"] * 3 + ["192"] * 3
        rail = view.locator(".slider-rail-touch-rect").bounding_box()
        for step in (4, 6):
            view.mouse.click(rail["x"] + rail["width"] * step / 8, rail["y"] + rail["height"] / 2)
            view.wait_for_function(f"document.body.textContent.includes('--op-code {step}')")
            words = shown[0].text_content()
            assert "top-1 86.00, 2.50 ms per batch" in words and ("the nearest" in words) == (step == 6)
            assert shown[1].text_content() == f"python main_test.py --op-code {step}"
            assert bars.all_text_contents() == ["16", str(16 - 2 * step), "16", "192", str(192 - 24 * step), "192"]
        place = shown[1].bounding_box()
        view.mouse.click(place["x"] + 5, place["y"] + 5)
        view.wait_for_function("window.getSelection().toString() == 'python main_test.py --op-code 6'")
        browser.close()
    assert not wrong and fetched == [path.as_uri()]


def test_what_is_laid_over_a_page_must_be_results(tmp_path):
    for words, message in (
        (f"x={tmp_path}", "expected LABEL=FOLDER, a folder with results.json"),
        ("x", "expected LABEL"),
    ):
        with pytest.raises(InputError, match=message):
            report.read(words)
    for text in ("[]", "{}", '{"rows": []}', "{"):
        (tmp_path / "results.json").write_text(text)
        with pytest.raises(InputError, match=r"results.json: not (JSON|the results of main_test.py)"):
            report.read(f"x={tmp_path}")
