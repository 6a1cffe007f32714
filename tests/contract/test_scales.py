"""Gradients of any size give finite weights, or a step that is refused whole."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.nn import Parameter

from tests.contract.scales import outcome
from tests.helpers.rules import KINDS, NAMES, SEARCHING, gradient, make, others_slow, params

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


@pytest.mark.parametrize("name", others_slow(EVERY))
def test_weights_stay_finite_where_the_first_gradient_is_the_smallest(name: str) -> None:
    """Of a matrix with one element, too, whose norm does not underflow: what is built from it is as large as can be."""
    ps = {**params(name), "one": Parameter(torch.ones(1, 1))}
    optimizer = make(name, ps, lr=1e-3)
    for t, size in enumerate((1e-42, 1.0, 1e30), 1):
        for key, p in ps.items():
            p.grad = (gradient(p, key, t).double() * size).to(p.dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            try:
                optimizer.step()
            except FloatingPointError:
                assert name in SEARCHING
        assert all(p.isfinite().all() for p in ps.values()), t
