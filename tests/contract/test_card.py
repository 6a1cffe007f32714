"""Steps on a device that is not the CPU: nothing leaves it, and the host does not wait."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest

from lightning_optim.core.rule import REGISTRY
from tests.helpers.paths import ROOT

NAMES = sorted(name for name, rule in REGISTRY.items() if not rule.curvature_input)
ROOTS = {"psgd_kron": [0], "shampoo": [0, 3]}
"""Steps in which a rule may wait: for the scale of its first gradient, for the spectra whose roots it takes."""


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    words = [sys.executable, "-W", "ignore", "-m", "tests.helpers.card"]
    return json.loads(subprocess.run(words, cwd=ROOT, check=True, capture_output=True).stdout)


@pytest.mark.parametrize("form", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_everything_stays_on_the_device_and_no_step_waits(found: dict[str, Any], name: str, form: str) -> None:
    seen = found[f"{name} {form}"]
    assert "error" not in seen, seen["error"]
    assert set(seen["devices"]) <= {"card:0"}
    waiting = {i: waits for i, waits in enumerate(seen["waits"]) if waits}
    assert waiting.keys() <= {*ROOTS.get(name, [])}, waiting


@pytest.mark.parametrize("name", NAMES)
def test_a_look_for_non_finite_gradients_waits_once(found: dict[str, Any], name: str) -> None:
    seen = found[f"{name} checked"]
    assert "error" not in seen, seen["error"]
    assert {len(waits) for i, waits in enumerate(seen["waits"]) if i not in ROOTS.get(name, [])} == {1}
