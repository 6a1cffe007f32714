"""Relations between classical, sign, large-batch and factored rules, beside their references."""

from __future__ import annotations

import pytest
import torch
from torch.nn import Parameter

from lightning_optim import Lion, RMSprop, Signum
from lightning_optim.core.rule import Rule
from lightning_optim.rules.adagrad import Adagrad as AdagradRule
from lightning_optim.rules.rmsprop import RMSprop as RMSpropRule
from tests.rules import gradient


def trained(optimizer_class: type, steps: int = 4, **settings: object) -> Parameter:
    """A matrix after some steps with random gradients."""
    p = Parameter(torch.arange(12.0).view(4, 3))
    optimizer = optimizer_class([p], **settings)
    for t in range(1, steps + 1):
        p.grad = gradient(p, "p", t)
        optimizer.step()
    return p


def test_signum_is_lion_with_equal_betas() -> None:
    lion = trained(Lion, lr=0.1, betas=(0.9, 0.9), weight_decay=0.1)
    assert torch.equal(lion, trained(Signum, lr=0.1, momentum=0.9, weight_decay=0.1))


def test_centered_rmsprop_is_finite_when_gradients_repeat() -> None:
    """Rounding makes torch's variance negative, and its weights NaN."""
    ours, theirs = Parameter(torch.zeros(64)), Parameter(torch.zeros(64))
    optimizers = RMSprop([ours], centered=True), torch.optim.RMSprop([theirs], centered=True)
    for _ in range(3000):
        for p, optimizer in zip((ours, theirs), optimizers, strict=True):
            p.grad = torch.linspace(0.1, 5.0, 64)
            optimizer.step()
    assert theirs.isnan().any()
    assert ours.isfinite().all()


@pytest.mark.parametrize("rule", [RMSpropRule(), RMSpropRule(momentum=0.9), AdagradRule()])
def test_kernels_for_accelerators_take_our_arguments(rule: Rule) -> None:
    """On the meta device, which has no numbers, torch's kernels write what they are to write."""
    shapes = [(4, 3), (7,)]
    p, g = ([torch.empty(s, device="meta") for s in shapes] for _ in range(2))
    state = {k: [torch.empty(s, device="meta") for s in shapes] for k in rule.declared(4, 3)}
    assert rule.kernel(p, g, state, 2)
    assert all(t._version > 0 for ts in (p, *state.values()) for t in ts)
    assert all(t._version == 0 for t in g)
