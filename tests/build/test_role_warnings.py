"""What is said where an assignment need not be what one expects."""

from __future__ import annotations

from lightning_optim.build.role_warnings import Owned, warnings_of


def test_what_is_said() -> None:
    hidden = Owned("h", "hidden", (8, 8), "muon", None)
    unknown = Owned("table", "other", (9, 8), "adamw", None)
    fused = Owned("qkv", "qkv", (24, 8), "muon", None)
    assert not warnings_of("muon", [hidden, unknown._replace(shape=(7, 8)), fused._replace(blocks=3)])
    assert not warnings_of("adamw", [x._replace(rule="adamw") for x in (hidden, unknown, fused)])
    (half,) = warnings_of("muon", [hidden, unknown])
    assert "muon has 47% of the weights" in half and "[('table', 'muon', {'role': 'hidden'})]" in half
    (whole,) = warnings_of("muon", [hidden, fused])
    assert "one matrix" in whole and "qkv" in whole
    (nothing,) = warnings_of("muon", [unknown])
    assert nothing.startswith("muon owns no parameter")
