"""Gradients of any size give finite weights, or a step that is refused whole."""

from __future__ import annotations

import pytest

from tests.contract.scales import outcome
from tests.helpers.rules import NAMES, SEARCHING

OTHERS = [(False, 1e20), (False, 1e30), (True, 1e-38), (True, 1e30)]


@pytest.mark.parametrize(
    ("spike", "scale"), [(False, 1e-38), (True, 1e20), *(pytest.param(*x, marks=pytest.mark.slow) for x in OTHERS)]
)
@pytest.mark.parametrize("name", [*NAMES, *SEARCHING])
def test_weights_stay_finite_or_the_step_is_refused(name: str, spike: bool, scale: float) -> None:
    assert outcome(name, scale, spike=spike) not in ("NaN", "half-taken")
