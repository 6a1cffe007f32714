"""What rules with a projection have in common with Adam, with each other and with exact projections."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import APOLLO, APOLLOSVD, AdafactorHF, AdamW, Fira, Flora, GaLore, RuleOptimizer
from lightning_optim.core.step.records import Refresh
from lightning_optim.ops.projection import Method, Side, aligned, leading_vectors, left_out, project, sides

NEVER = "fixed:1000"
METHODS: list[Method] = ["svd", "randomized_svd", "subspace_iteration"]


def matrices(count: int, *shape: int, seed: int = 0) -> list[Tensor]:
    made = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=made, dtype=torch.float64) for _ in range(count)]


def moved(cls: Any, grads: list[Tensor], **settings: Any) -> Tensor:
    """Where a parameter goes from zero."""
    p = Parameter(torch.zeros_like(grads[0]))
    optimizer = cls([p], weight_decay=0.0, **settings)
    for g in grads:
        p.grad = g.clone()
        optimizer.step()
    return p.detach()


@pytest.mark.parametrize("shape", [(5, 9), (9, 5), (6, 6)])
@pytest.mark.parametrize("side", ["std", "full"])
def test_galore_of_full_rank_is_adam_in_a_rotated_basis(shape: tuple[int, int], side: Side) -> None:
    grads = matrices(6, *shape)
    u, _, vt = torch.linalg.svd(grads[0], full_matrices=False)
    left = u if "left" in sides(*shape, side) else None
    right = vt.mT if "right" in sides(*shape, side) else None
    turned = moved(AdamW, [project(g, left, right) for g in grads], lr=0.01, eps=1e-6, eps_mode="uncorrected")
    ours = moved(GaLore, grads, lr=0.01, rank=99, scale=1.0, side=side, refresh=NEVER)
    torch.testing.assert_close(project(ours, left, right).abs(), turned.abs(), rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(ours.norm(), turned.norm(), rtol=1e-9, atol=0)


def test_rank_zero_is_adam() -> None:
    grads = matrices(5, 4, 7)
    adam = moved(AdamW, grads, lr=0.01, eps=1e-6, eps_mode="uncorrected")
    for cls in (GaLore, Fira, APOLLO):
        torch.testing.assert_close(moved(cls, grads, lr=0.01, rank=0), adam, rtol=1e-12, atol=0)


def test_fira_of_full_rank_is_galore() -> None:
    grads = matrices(6, 5, 9)
    galore = moved(GaLore, grads, rank=5, scale=0.5, refresh="fixed:2")
    torch.testing.assert_close(moved(Fira, grads, rank=5, alpha=0.5, refresh="fixed:2"), galore, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_fira_adds_what_galore_leaves_out(shape: tuple[int, int]) -> None:
    """Outside of the subspace, columns scaled as Adam scales them inside."""
    (g,) = matrices(1, *shape)
    wide = shape[0] < shape[1]
    low = moved(GaLore, [g], lr=1.0, rank=2, scale=0.25, eps=1e-12)
    extra = moved(Fira, [g], lr=1.0, rank=2, alpha=0.25, eps=1e-12) - low
    u, _, vt = torch.linalg.svd(g, full_matrices=False)
    inside = u[:, :2].mT @ extra if wide else extra @ vt[:2].mT
    assert inside.abs().max() < 1e-12
    outside = g - (u[:, :2] @ u[:, :2].mT @ g if wide else g @ vt[:2].mT @ vt[:2])
    x = u[:, :2].mT @ g if wide else g @ vt[:2].mT
    expected = outside * (2**0.5 / x.norm(dim=0 if wide else 1, keepdim=True))  # signs at the first step
    torch.testing.assert_close(-extra, expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
def test_apollo_scales_the_gradient(shape: tuple[int, int], scale_type: str) -> None:
    grads = matrices(4, *shape)
    before = moved(APOLLO, grads[:3], rank=2, scale_type=scale_type)
    ratios = (moved(APOLLO, grads, rank=2, scale_type=scale_type) - before) / grads[-1]
    dim = 0 if shape[0] < shape[1] else 1
    assert (ratios < 0).all() and torch.allclose(ratios, ratios.mean(dim, keepdim=True))
    assert torch.allclose(ratios, ratios.mean()) == (scale_type == "tensor")


def test_apollo_of_full_rank_moves_columns_as_far_as_adam_does() -> None:
    (g,) = matrices(1, 5, 9)
    apollo, adam = moved(APOLLOSVD, [g], lr=1.0, rank=5), moved(GaLore, [g], lr=1.0, rank=5, scale=1.0)
    torch.testing.assert_close(apollo.norm(dim=0), adam.norm(dim=0), rtol=1e-5, atol=0)


def test_apollo_projections_keep_norms_on_average() -> None:
    (g,) = matrices(1, 40, 60)
    p = Parameter(torch.zeros_like(g))
    optimizer = APOLLO([p], rank=8, refresh="fixed:1")
    actual = []
    for _ in range(100):
        p.grad = g.clone()
        optimizer.step()
        actual.append((project(g, optimizer.state[p]["projection_left"], None).norm() / g.norm()).square())
    actual = torch.stack(actual)
    assert (actual.mean() - 1).abs() < 4 * actual.std() / 10 and actual.std() > 0.01


def test_flora_without_momentum_is_adafactor() -> None:
    grads, settings = matrices(4, 5, 9), {"lr": 0.01, "scale_parameter": False, "relative_step": False, "beta1": None}
    assert torch.equal(moved(Flora, grads, rank=2, **settings), moved(AdafactorHF, grads, **settings))


@pytest.mark.slow
def test_flora_keeps_its_momentum_on_average() -> None:
    """Over many seeds, and over a projection that is drawn again: P C is the momentum of steps that are all alike."""
    g = matrices(1, 8, 12)[0].sign()  # a gradient whose step is itself
    settings = {"lr": 1.0, "rank": 4, "refresh": "fixed:2", "clip_threshold": 1e9}
    before, after = [], []
    for seed in range(400):
        actual = [-moved(Flora, [g] * count, seed=seed, **settings) for count in (2, 3)]
        before.append(actual[0] - 0.1 * g)
        after.append(actual[1] - actual[0])
    for steps, share in ((before, 0.19), (after, 0.271)):
        actual = torch.stack(steps)
        error = (actual.mean(0) - share * g).abs() / (actual.std(0) / 20)
        assert error.max() < 4.5 and actual.std(0).min() > 0.01


# -- projections ------------------------------------------------------------------------------------------------------


def spectrum(m: int, n: int, power: float, seed: int = 0) -> Tensor:
    a, b = matrices(2, n, m, seed=seed)
    u, v = torch.linalg.qr(a[:m]).Q, torch.linalg.qr(b).Q
    return ((u * torch.arange(1, m + 1, dtype=torch.float64) ** -power) @ v.mT)[None].float()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("wanted", [("left",), ("right",), ("left", "right")])
def test_cheap_bases_capture_what_the_exact_one_does(method: Method, wanted: tuple[str, ...]) -> None:
    rank, shapes = 8, {"left": 48, "right": 80}
    x, before = spectrum(48, 80, 1.0), spectrum(48, 80, 1.0, seed=1)

    def sketch(side: str) -> Tensor:
        return torch.randn(1, 128 - shapes[side], rank + 8, generator=torch.Generator().manual_seed(0))

    def energy(bases: dict[str, Tensor], side: str) -> float:
        q = bases[side]
        return 1 - left_out(x, project(x, *((q, None) if side == "left" else (None, q)))).item()

    none = {k: torch.zeros(1, shapes[k], rank) for k in wanted}
    exact = leading_vectors(x, none, "svd", sketch, first=True)
    old = leading_vectors(before + x, none, "svd", sketch, first=True)
    actual = leading_vectors(x, old, method, sketch, first=False)
    for side in wanted:
        q = actual[side]
        assert (q.mT @ q - torch.eye(rank)).abs().max() < 1e-5
        assert energy(actual, side) > (1 - 1e-6 if method == "svd" else 0.985) * energy(exact, side)
        assert energy(actual, side) > energy(old, side)
        assert ((q * old[side]).sum(-2) >= 0).all()
        zero = leading_vectors(torch.zeros_like(x), old, method, sketch, first=False)
        assert torch.equal(zero[side], old[side])


def test_signs_do_not_depend_on_the_decomposition() -> None:
    (q,) = matrices(1, 9, 9)
    q = torch.linalg.qr(q).Q[:, :4]
    flips = torch.tensor([1.0, -1.0, -1.0, 1.0], dtype=torch.float64)
    first = aligned(q * flips, torch.zeros_like(q))
    assert torch.equal(first, aligned(q, torch.zeros_like(q)))
    assert torch.equal(aligned(first * flips, first), first)


@pytest.mark.parametrize("basis", METHODS)
@pytest.mark.parametrize("policy", ["fixed:3", "off_diagonal:0.2:2", "lazy:2:0.4:2"])
def test_resume_is_bitwise_for_every_basis_and_policy(basis: Method, policy: str) -> None:
    grads = [g.float() for g in matrices(14, 12, 20)]

    def steps(p: Parameter, optimizer: RuleOptimizer, some: list[Tensor]) -> None:
        for g in some:
            p.grad = g.clone()
            optimizer.step()

    straight = Parameter(torch.zeros(12, 20))
    steps(straight, GaLore([straight], rank=3, basis=basis, refresh=policy), grads)
    p = Parameter(torch.zeros(12, 20))
    first = GaLore([p], rank=3, basis=basis, refresh=policy)
    steps(p, first, grads[:6])
    second, events = GaLore([p], rank=3, basis=basis, refresh=policy), []
    second.on_refresh = events.append
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    steps(p, second, grads[6:])
    assert torch.equal(p, straight) and events


def test_a_gradient_that_leaves_the_subspace_is_noticed() -> None:
    a, b = (torch.linalg.qr(x).Q[:, :2] for x in matrices(2, 8, 8))
    p = Parameter(torch.zeros(8, 12, dtype=torch.float64))
    optimizer, events = GaLore([p], rank=2, refresh="off_diagonal:0.3:1"), list[Refresh]()
    optimizer.on_refresh = events.append
    for t, mix in enumerate(matrices(12, 2, 12)):
        p.grad = (a if t < 6 else b) @ mix
        optimizer.step()
    assert [(e.t, e.reason) for e in events] == [(1, "first"), (7, "stale")]
    assert 0.3 < events[1].staleness <= 1


def test_state_is_as_large_as_published() -> None:
    """m n + 2 n r + m r elements with the weight, and a handful of scalars: Gong et al. 2025, Table 1."""
    for cls in (GaLore, Fira, APOLLO):
        p = Parameter(torch.zeros(64, 100))
        p.grad = torch.ones_like(p)
        optimizer = cls([p], rank=16)
        optimizer.step()
        elements = sum(x.numel() for x in optimizer.state[p].values())
        assert 0 < elements - (2 * 100 * 16 + 64 * 16) <= 8
