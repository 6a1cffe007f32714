"""Relations between classical, sign, large-batch and factored rules, beside their references."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from lightning_optim import (
    CAME,
    LAMB,
    LARS,
    Adafactor,
    AdafactorHF,
    AdamMini,
    AdamW,
    Adapprox,
    Lion,
    RMSprop,
    Signum,
    build_optimizer,
)
from lightning_optim.core.rule import Rule
from lightning_optim.rules.adagrad import Adagrad as AdagradRule
from lightning_optim.rules.rmsprop import RMSprop as RMSpropRule
from tests.helpers.rules import gradient


def trained(optimizer_class: Any, steps: int = 4, **settings: Any) -> Parameter:
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
    state = {k: [torch.empty(s, device="meta") for s in shapes] for k in rule.state_specs(4, 3)}
    assert rule.kernel(p, g, state, 2)
    assert all(t._version > 0 for ts in (p, *state.values()) for t in ts)
    assert all(t._version == 0 for t in g)


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB, AdamMini])
def test_a_convolution_is_one_matrix(optimizer_class: Any) -> None:
    kernel = Parameter(torch.randn(6, 2, 3, 3, generator=torch.Generator().manual_seed(0)))
    matrix = Parameter(kernel.detach().flatten(1).clone())
    a, b = optimizer_class([kernel], weight_decay=0.1), optimizer_class([matrix], weight_decay=0.1)
    for t in range(1, 4):
        kernel.grad = gradient(kernel, "kernel", t)
        matrix.grad = kernel.grad.flatten(1)
        a.step()
        b.step()
    assert torch.equal(kernel.flatten(1), matrix)


@pytest.mark.parametrize("optimizer_class", [LARS, LAMB])
def test_a_layer_moves_by_a_fraction_of_its_norm(optimizer_class: Any) -> None:
    """Whatever the scale of its gradient; a vector does not."""
    settings: dict[str, Any] = {"momentum": 0.0} if optimizer_class is LARS else {"eps": 1e-12}
    for scale in (1e-3, 1.0, 1e3):
        p, v = Parameter(torch.randn(5, 4)), Parameter(torch.zeros(3))
        before = p.detach().clone()
        p.grad, v.grad = scale * torch.randn(5, 4), torch.tensor([0.0, 1.0, -1.0])
        optimizer_class([p, v], lr=0.1, weight_decay=0.0, **settings).step()
        moved = (p - before).norm() / before.norm()
        fraction = 0.1 * 1e-3 if optimizer_class is LARS else 0.1
        torch.testing.assert_close(moved, torch.tensor(fraction), rtol=1e-3, atol=0.0)
        torch.testing.assert_close(v.detach(), -0.1 * v.grad)


def test_lamb_without_its_ratio_is_adam_with_decay_in_the_direction() -> None:
    p, q = Parameter(torch.randn(3, 3)), Parameter(torch.zeros(3, 3))
    q.data.copy_(p)
    lamb, adamw = LAMB([p], lr=0.01, norm_bounds=(0.0, 0.0), eps=1e-8), AdamW([q], lr=0.01, weight_decay=0.01)
    for t in range(1, 4):
        p.grad, q.grad = gradient(p, "p", t), gradient(q, "p", t)
        lamb.step()
        adamw.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_vectors_by_role_are_excluded() -> None:
    """A matrix with a side of length one is a vector to the factory; experts' biases are others."""
    first, narrow = nn.Linear(4, 6), nn.Linear(6, 1)
    model = nn.Sequential(first, narrow, nn.Linear(1, 3))
    optimizer = build_optimizer(model, "lamb", lr=0.1, weight_decay=0.1)
    line, square = narrow.weight, first.weight
    before = line.detach().clone(), square.detach().clone()
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(line, before[0] - 0.1, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close((square - before[1]).norm(), 0.1 * before[1].norm())


def test_came_starts_large_and_settles() -> None:
    """RMS of its direction on white noise: 11 at first, below 6 after 20 steps, as its second means fill up."""
    p = Parameter(torch.zeros(64, 64))
    optimizer = CAME([p], lr=1.0)
    sizes = []
    for t in range(1, 21):
        before = p.detach().clone()
        p.grad = gradient(p, "noise", t)
        optimizer.step()
        sizes.append((p - before).square().mean().sqrt().item())
    assert sizes[0] == pytest.approx(11.1, rel=0.02)
    assert sizes[4] == pytest.approx(9.1, rel=0.05)
    assert sizes[19] == pytest.approx(5.6, rel=0.1)


def test_adafactor_hf_without_scales_is_adafactor_beside_eps_and_decay() -> None:
    p, q = (Parameter(torch.randn(4, 6, generator=torch.Generator().manual_seed(1))) for _ in range(2))
    ours = AdafactorHF([p], lr=0.01), Adafactor([q], lr=0.01)
    for t in range(1, 5):
        p.grad, q.grad = gradient(p, "p", t), gradient(q, "p", t)
        for optimizer in ours:
            optimizer.step()
    torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def adapprox(p: Parameter, gradients: list[torch.Tensor], **settings: Any) -> torch.Tensor:
    """The weights after some steps, and the second moment's factors in the optimizer."""
    q = Parameter(p.detach().clone())
    optimizer = Adapprox([q], lr=0.01, **settings)
    for g in gradients:
        q.grad = g
        optimizer.step()
    state = optimizer.state[q]
    return torch.cat([q.detach().flatten(), (state["factor_left"] @ state["factor_right"].mT).flatten()])


def test_adapprox_of_rank_one_is_exact_where_the_second_moment_is() -> None:
    p = Parameter(torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    pattern = gradient(p[:, :1], "a", 1) @ gradient(p[:1], "b", 1)
    scales = [1.0, -0.5, 2.0, 0.1]
    one, all_of_them = (adapprox(p, [x * pattern for x in scales], rank=rank) for rank in (1, 6))
    torch.testing.assert_close(one, all_of_them)


def test_adapprox_draws_the_same_sketch_for_the_same_seed() -> None:
    p = Parameter(torch.randn(12, 15, generator=torch.Generator().manual_seed(0)))
    gradients = [gradient(p, "p", t) for t in range(1, 4)]
    first, again, other = (adapprox(p, gradients, rank=2, iterations=1, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_adapprox_keeps_nearly_the_best_low_rank_part() -> None:
    p = Parameter(torch.zeros(40, 60))
    g = gradient(p, "p", 1) * torch.logspace(0, -2, 40)[:, None]
    snapshot = adapprox(p, [g], rank=4)[p.numel() :].view_as(p)
    v = 1e-3 * g**2
    best = torch.linalg.svdvals(v)[4:].norm()
    assert (snapshot - v).norm() <= 1.001 * best
