"""The width table: the kept widths of every step of the dropout list, on disk as ``mask_table.json``."""

import json
from bisect import bisect_left
from dataclasses import dataclass, field

import utils
from models.vit.cost import MATMULS
from models.vit.widths import Widths, branch_names
from utils import InputError, NotNamed

TABLE_NAME = "mask_table.json"
FORMAT_VERSION = 1


@dataclass
class WidthTable:
    """Widths per step: ``steps[0]`` is the full network, ``steps[-1]`` the smallest; widths never grow. meta: free
    additional information, kept in the file's ``"meta"`` member."""

    steps: list[Widths]
    meta: dict = field(default_factory=dict)

    @property
    def last(self):
        """The index of the last step."""
        return len(self.steps) - 1

    def first_within(self, cost, limit):
        """The first (largest) step whose ``cost(widths)`` is at most ``limit``, or None. Found by bisection: widths
        never grow, and so no cost does."""
        step = bisect_left(self.steps, -limit, key=lambda widths: -cost(widths))
        return step if step < len(self.steps) else None

    def describe(self, spec, costs):
        """Put the model and the costs of every step into ``meta``. spec: ModelSpec; costs: Costs."""
        self.meta = {
            "model": spec.name,
            "img_size": spec.img_size,
            "crop_ratio": spec.crop_ratio,
            "num_classes": spec.num_classes,
            "macs": [costs.macs(widths) for widths in self.steps],
            "macs_with_attention_matmuls": [costs.macs(widths, MATMULS) for widths in self.steps],
            "parameters": [costs.parameters(widths) for widths in self.steps],
        }

    def to_json(self):
        """The published layout of ``mask_table.json``, one member per branch and one string key per step; and meta."""
        members = {}
        for index, name in enumerate(branch_names(len(self.steps[0].attn))):
            widths = [step.flat[index] for step in self.steps]
            members[name] = {str(step): width for step, width in enumerate(widths)} | {"-1": widths[-1]}
        return json.dumps({"meta": {"format_version": FORMAT_VERSION} | self.meta} | members)

    @classmethod
    def from_json(cls, text, source):
        """Parse ``mask_table.json``. source: the name in errors. Raises InputError if it is not a valid table."""
        content = utils.parse_json(text, source)
        if not isinstance(content, dict):
            raise InputError(f"{source}: expected one object with members '0.attn', '0.mlp', ...")
        count = len([name for name in content if name.endswith((".attn", ".mlp"))])
        names = branch_names(max(count + 1, 2) // 2)
        if missing := [name for name in names if name not in content]:
            raise InputError(f"{source}: member '{missing[0]}' is missing")
        columns = [_column(content[name], name, source) for name in names]
        if any(len(column) != len(columns[0]) for column in columns):
            raise InputError(f"{source}: its members do not all have the same steps")
        meta = content.get("meta")
        return cls(list(map(Widths.from_flat, zip(*columns, strict=True))), meta if isinstance(meta, dict) else {})

    @classmethod
    def load(cls, path):
        """Read ``mask_table.json``. Raises InputError if it is missing or invalid."""
        text = utils.read_text(path, f"the width table lies beside the checkpoint as {TABLE_NAME}")
        return cls.from_json(text, path)

    def save(self, path):
        utils.save_text(self.to_json(), path)

    def check_made_for(self, weights, source):
        """Raise NotNamed if the table records another digest than ``weights``. Tables of stage 1 record one,
        published ones do not."""
        if self.meta.get("weights", weights) != weights:
            raise NotNamed(f"{source}: made for other weights than these; to use it anyway, name it", "mask_table")

    def check_fits(self, costs, source):
        """Raise InputError unless the table is one of the network with ``costs``: it starts at the full widths, and
        keeps all or nothing of an indivisible branch. source: the name in errors."""
        full, another = costs.full.flat, f"{source}: made for another model: its step 0 has"
        if len(self.steps[0].flat) != len(full):
            raise InputError(f"{another} {len(self.steps[0].attn)} blocks, the model {len(full) // 2}")
        for step, widths in enumerate(self.steps):
            for (name, kept), most, indivisible in zip(widths.named.items(), full, costs.indivisible, strict=True):
                if step == 0 and kept != most:
                    raise InputError(f"{another} width {kept} for '{name}', the model {most}")
                if indivisible and kept not in (0, most):
                    raise InputError(
                        f"{source}: '{name}' step {step} keeps {kept} of {most}; in this model it can only be kept "
                        "whole or dropped"
                    )


def _column(member, name, source):
    """The widths of one branch in step order, checked."""
    if not isinstance(member, dict):
        raise InputError(f"{source}: member '{name}' must map steps to widths")
    column = []
    for step in range(max(len(member.keys() - {"-1"}), 1)):
        if str(step) not in member:
            raise InputError(f"{source}: '{name}' has no step '{step}'; steps run from '0' without a gap")
        width = member[str(step)]
        if type(width) is not int or width < 0:
            raise InputError(f"{source}: '{name}' step {step} is {width!r}; widths are integers of at least 0")
        if column and width > column[-1]:
            raise InputError(f"{source}: '{name}' grows from {column[-1]} to {width} at step {step}")
        column.append(width)
    if member.get("-1", column[-1]) != column[-1]:
        raise InputError(f"{source}: '{name}' step '-1' is {member['-1']}, its last step {column[-1]}")
    return column
