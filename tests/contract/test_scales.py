"""Gradients of any size give finite weights, or a step that is refused whole."""

from __future__ import annotations

import pytest

from tests.contract.scales import outcome
from tests.helpers.rules import NAMES, SEARCHING


@pytest.mark.parametrize("spike", [False, True])
@pytest.mark.parametrize("name", [*NAMES, *SEARCHING])
def test_weights_stay_finite_or_the_step_is_refused(name: str, spike: bool) -> None:
    for scale in (1e-38, 1e20, 1e30):
        assert outcome(name, scale, spike=spike) not in ("NaN", "half-taken"), scale
