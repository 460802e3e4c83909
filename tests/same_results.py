"""Compare what two run_demo.sh have written, to the bit: python tests/same_results.py OLD NEW (output/demo folders).

Weights, tables, rows of results and logs must be equal, but for what was measured by the clock. Prints what differs.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from runs import CLOCK, assert_equal

from models.vit.pretrained import read_checkpoint

STATE = ("model", "model_ema", "optimizer", "lr_scheduler", "scaler", "epoch", "max_accuracy", "position", "mask_table")


def read(path):
    """The content of one file: of a checkpoint, the state of training; of others all but what the clock says."""
    if path.suffix == ".pth":
        return {name: value for name, value in read_checkpoint(path).items() if name in STATE}
    text = path.read_text()
    rows = json.loads(text)["rows"] if path.name == "results.json" else map(json.loads, text.splitlines())
    return [{name: value for name, value in row.items() if name not in CLOCK} for row in rows]


def main(old, new):
    paths = [p for name in ("*.pth", "mask_table.json", "results.json", "log.txt") for p in sorted(old.rglob(name))]
    different = 0
    for path in paths:
        name = path.relative_to(old)
        try:
            assert_equal(read(path), read(new / name), str(name))
        except (AssertionError, OSError, ValueError) as error:
            different += 1
            print(f"differs: {error}")
    print(f"{len(paths)} files compared, {different} differ")
    return bool(different) or not paths


if __name__ == "__main__":
    sys.exit(main(*map(Path, sys.argv[1:])))
