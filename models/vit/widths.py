"""What a sub-network keeps of every residual branch."""

from dataclasses import dataclass

BRANCH_NAMES = ("attn", "mlp")


@dataclass(frozen=True)
class Widths:
    """What one sub-network keeps: ``attn[b]`` dimensions of every head and ``mlp[b]`` hidden units of block b. 0: the
    branch is gone."""

    attn: tuple[int, ...]
    mlp: tuple[int, ...]

    @property
    def flat(self):
        """All 2L widths, block by block: attn 0, mlp 0, attn 1, ..."""
        return tuple(width for pair in zip(self.attn, self.mlp, strict=True) for width in pair)

    @classmethod
    def from_flat(cls, flat):
        return cls(tuple(flat[0::2]), tuple(flat[1::2]))

    @property
    def named(self):
        """{'0.attn': width, '0.mlp': width, '1.attn': ...}: the names of ``mask_table.json``, in the order of flat."""
        return dict(zip(branch_names(len(self.attn)), self.flat, strict=True))

    def as_dict(self):
        return {"attn": list(self.attn), "mlp": list(self.mlp)}

    @classmethod
    def from_dict(cls, content):
        return cls(tuple(content["attn"]), tuple(content["mlp"]))


def branch_names(depth):
    """The names of the 2L branches in ``mask_table.json``: '0.attn', '0.mlp', '1.attn', ..."""
    return [f"{block}.{name}" for block in range(depth) for name in BRANCH_NAMES]
