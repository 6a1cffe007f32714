"""Means of gradients equal the sums that define them, in float64."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from lightning_optim.core.rule import MomentumRule, zeros

BETA = 0.7


@dataclass(frozen=True, kw_only=True)
class Mean(MomentumRule, abstract=True):
    """A base whose only state is M."""

    lr: float = 0.1
    weight_decay: float = 0.0

    name: ClassVar[str] = "mean"
    state: ClassVar[Any] = {"exp_avg": zeros("mn")}


def start(rule: Mean) -> SimpleNamespace:
    """The state before the first gradient."""
    return SimpleNamespace(**{k: torch.zeros(2, 3, dtype=torch.float64) for k in rule.state_specs(2, 3)})


def gradients(count: int) -> list[Tensor]:
    return list(torch.randn(count, 2, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))


def naive(rule: Mean, xs: list[Tensor]) -> tuple[Tensor, float]:
    """M as a weighted sum of all gradients, and the sum of the weights."""
    kernel, (first, last), t = rule.momentum_kernel, rule.kernel_steps, len(xs)
    total, weight_of_all = torch.zeros(2, 3, dtype=torch.float64), 0.0
    for i, x in enumerate(xs, start=1):
        if kernel is None or t <= first:
            weight = (1 - BETA) * BETA ** (t - i)
        else:
            fraction = min(1.0, (t - first) / max(1, last - first))
            weight = 0.0
            for beta, begin, *end in kernel:
                w = begin + fraction * ((end[0] if end else begin) - begin)
                one = (1 - BETA) * BETA ** (first - i) * beta ** (t - first) if i <= first else 0.0
                weight += w * (one if i <= first else (1 - beta) * beta ** (t - i))
        total += weight * x
        weight_of_all += weight
    return total, weight_of_all


RULES = [
    Mean(),
    Mean(momentum_kernel=((0.5, 0.25), (0.9, 0.75))),
    Mean(momentum_kernel=((0.6, 0.5), (0.9, 0.3), (0.95, 0.2)), kernel_steps=(3, 3)),
    Mean(momentum_kernel=((0.5, 1.0, 0.25), (0.9, 0.0, 0.75)), kernel_steps=(2, 6)),
]


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_means_are_weighted_sums_of_all_gradients(rule: Mean) -> None:
    s, xs = start(rule), gradients(9)
    rule.validate()
    for t, x in enumerate(xs, start=1):
        before = x.clone()
        found = rule.update_ema(s, x, BETA, t)
        expected, weight = naive(rule, xs[:t])
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-13)
        torch.testing.assert_close(rule.ema(s, t), found, rtol=0, atol=0)
        assert rule.bias_correction(BETA, t) == pytest.approx(weight, rel=1e-12)
        assert torch.equal(x, before), "the gradient is not written"
        assert (found is s.exp_avg) == (rule.momentum_kernel is None or t <= rule.kernel_steps[0])


def test_every_mean_after_the_first_has_state_of_its_own() -> None:
    rule = RULES[2]
    assert rule.ema_names() == list(rule.state_specs(2, 3)) == ["exp_avg", "exp_avg_1", "exp_avg_2"]
    assert list(Mean().state_specs(2, 3)) == ["exp_avg"]
    s = start(rule)
    s.exp_avg_1 += 1
    assert [x is y for x, y in zip(rule.emas(s), (s.exp_avg, s.exp_avg_1, s.exp_avg_2), strict=True)] == [True] * 3


def test_rows_of_the_means_are_views_of_the_state() -> None:
    rule = RULES[1]
    s, xs = start(rule), gradients(1)
    stacked = [getattr(s, name)[None] for name in rule.ema_names()]
    for rows in (slice(0, 1), slice(1, 2)):
        rule.update_ema(rule.ema_state(stacked, rows), xs[0][None, rows], BETA, 1)
    whole = start(rule)
    rule.update_ema(whole, xs[0], BETA, 1)
    assert all(torch.equal(a, b) for a, b in zip(rule.emas(s), rule.emas(whole), strict=True))


INVALID: list[tuple[Any, tuple[int, int], str]] = [
    ((), (0, 0), r"momentum_kernel must be \(\(beta, weight\), ...\) or .*, got \(\)"),
    (((0.9, 1.0), (0.5, 0.0, 0.0)), (0, 0), "momentum_kernel must be"),
    (((0.9, 0.5),), (0, 0), "with betas below 1 and weights that add up to 1"),
    (((1.0, 1.0),), (0, 0), "with betas below 1"),
    (((0.9, 1.0, 0.5), (0.5, 0.0, 0.0)), (0, 4), "weights that add up to 1"),
    (((0.9, 1.0, 0.5), (0.5, 0.0, 0.5)), (4, 4), r"kernel_steps must be the steps between which .*got \(4, 4\)"),
]


@pytest.mark.parametrize(("kernel", "steps", "message"), INVALID)
def test_kernels_that_are_no_means_are_refused(kernel: Any, steps: tuple[int, int], message: str) -> None:
    with pytest.raises(ValueError, match=f"^mean: .*{message}|^mean: {message}"):
        Mean(momentum_kernel=kernel, kernel_steps=steps).validate()
