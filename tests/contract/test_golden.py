"""Recorded trajectories of the official implementations, replayed through our classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.contract.golden import mapping, replay

CASES = [c for c in replay.load_cases(str(Path(__file__).parent / "golden" / "cases")) if mapping.supports(c)]


def test_every_family_of_the_registry_is_replayed() -> None:
    families = {c["optimizer"] for c in CASES}
    assert families >= {
        "AdamW",
        "Adam",
        "SGD",
        "Lion",
        "Adafactor-torch",
        "Muon-torch",
        "Muon-KellerJordan",
        "Muon-KellerJordan-AuxAdam",
        "Muon-Moonlight",
    }


@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad")  # the replay's, of a closure's loss
@pytest.mark.parametrize("case", CASES, ids=lambda c: c["id"])
def test_golden(case: dict[str, Any]) -> None:
    errors = replay.replay(case, mapping.make)
    assert not replay.failures(case, errors), errors
