"""What modules are, without running them."""

from __future__ import annotations

from torch import nn

from lightning_optim.build import structure


class Fused(nn.Module):
    """A wide layer and one back."""

    def __init__(self, outputs: int, heads: int | None = None) -> None:
        super().__init__()
        self.wide, self.back, self.num_heads = nn.Linear(8, outputs), nn.Linear(8, 8), heads


def test_fused_layers() -> None:
    assert [t.role for _, t in structure.fused_layers(Fused(16))] == ["gate_up"]
    (found,) = structure.fused_layers(Fused(24, heads=2))
    assert (found[1].role, found[1].blocks, found[1].source) == ("qkv", None, "unknown")
    assert not list(structure.fused_layers(Fused(24)))
