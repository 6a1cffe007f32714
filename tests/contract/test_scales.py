"""Gradients of any size give finite weights, or a step that is refused whole."""

from __future__ import annotations

import pytest

from tests.contract.scales import outcome
from tests.helpers.rules import KINDS, NAMES, SEARCHING

EVERY = [*NAMES, *SEARCHING]
OTHERS = [(False, 1e20), (False, 1e30), (True, 1e-38), (True, 1e20), (True, 1e30)]


@pytest.mark.parametrize(
    ("name", "spike", "scale"),
    [
        *((name, False, 1e-38) for name in EVERY),
        *((name, True, 1e20) for name in KINDS),
        *(
            pytest.param(name, *x, marks=pytest.mark.slow)
            for name in EVERY
            for x in OTHERS
            if name not in KINDS or x != (True, 1e20)
        ),
    ],
)
def test_weights_stay_finite_or_the_step_is_refused(name: str, spike: bool, scale: float) -> None:
    assert outcome(name, scale, spike=spike) not in ("NaN", "half-taken")
