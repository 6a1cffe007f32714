"""Letters give the shape of state, and the rank has to be known."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest
import torch

from lightning_optim.core.rule import StateSpec, eye, zeros


@pytest.mark.parametrize(
    ("letters", "expected"),
    [("mn", (3, 7)), ("nm", (7, 3)), ("mm", (3, 3)), ("m1", (3, 1)), ("1n", (1, 7)), ("nr", (7, 2)), ("25", (2, 5))],
)
def test_letters_are_rows_and_columns(letters: str, expected: tuple[int, int]) -> None:
    assert StateSpec(letters, rank=2).shape(3, 7) == expected


def test_a_rank_that_is_not_known_is_an_error() -> None:
    for letters in ("rn", "mr"):
        with pytest.raises(ValueError, match=f"the rank of state '{letters}' is not known yet; use Rule.state_specs"):
            zeros(letters).shape(3, 7)


def test_a_size_goes_before_the_letters() -> None:
    spec = StateSpec("rn", size=(4, 6))
    assert spec.shape(3, 7) == spec.shape(100, 100) == (4, 6)


def test_start_values_and_what_storage_may_do() -> None:
    plain = zeros("mn")
    assert (plain.fill, plain.dtype, plain.nonnegative, plain.exact) == (0.0, None, False, False)
    moment = zeros("m1", torch.float64, nonnegative=True, exact=True)
    assert (moment.dtype, moment.nonnegative, moment.exact) == (torch.float64, True, True)
    assert eye("mm").fill == "eye" and eye("mm") == eye("mm") != eye("nn")
    with pytest.raises(FrozenInstanceError):
        plain.fill = 1.0  # pyright: ignore[reportAttributeAccessIssue]
