"""Relations between algorithms, in float64: where one is a case of another, the parameters agree."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import (
    RACS,
    SOAP,
    SWAN,
    Adam,
    Alice,
    Alice0,
    Dion,
    EigenAdam,
    GaLore,
    Muon,
    PSGDKron,
    RuleOptimizer,
    Shampoo,
    SOAPMuon,
)

F64 = torch.float64
STEPS = 6


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def orthogonal(n: int, seed: int) -> Tensor:
    return torch.linalg.qr(draw(n, n, seed=seed)).Q


def path(
    cls: Any, shape: tuple[int, int], left: Tensor | None = None, right: Tensor | None = None, **settings: Any
) -> Tensor:
    """Displacements over some steps from zero, of gradients that may be turned."""
    p = Parameter(torch.zeros(shape, dtype=F64))
    optimizer: RuleOptimizer = cls([p], lr=0.1, weight_decay=0.0, **settings)
    out = []
    for t in range(STEPS):
        g = draw(*shape, seed=100 + t)
        g = g if left is None else left @ g
        p.grad = g if right is None else g @ right
        optimizer.step()
        out.append(p.detach().clone())
    return torch.stack(out)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_alice_at_full_rank_without_switching_is_eigen_adam(shape: tuple[int, int]) -> None:
    """Within one basis: Alice keeps the first moment in it, Eigen-Adam outside."""
    alice = path(Alice, shape, rank=9, leading=9, alpha=1.0, switch=False, refresh="fixed:100")
    same(alice, path(EigenAdam, shape, betas=(0.9, 0.9, 0.999), refresh="fixed:100"))


def test_alice_without_its_three_parts_is_galore() -> None:
    """Without tracking, switching and compensation; GaLore without its bias correction."""
    bare = {"switch": False, "compensation": "none", "alpha": 0.25, "rank": 3, "leading": 3}
    galore = path(GaLore, (4, 7), rank=3, scale=0.25, betas=(0.9, 0.9), eps=1e-8, correct_bias=False)
    same(path(Alice0, (4, 7), refresh="fixed:100", **bare), galore)
    same(path(Alice, (4, 7), betas=(0.9, 0.9, 0.0), refresh="fixed:100", **bare), galore)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_soap_without_a_rotated_side_is_adam_from_its_second_step(shape: tuple[int, int]) -> None:
    soap = path(SOAP, shape, max_precond_dim=0, betas=(0.9, 0.95), eps=1e-12)
    p = Parameter(torch.zeros(shape, dtype=F64))
    adam = Adam([p], lr=0.1, betas=(0.9, 0.95), eps=1e-12)
    assert not soap[0].any()
    for t in range(1, STEPS):
        p.grad = draw(*shape, seed=100 + t)
        adam.step()
        same(soap[t], p.detach())


@pytest.mark.parametrize("shape", [(4, 7), (7, 4)])
def test_soap_of_the_shorter_side_that_keeps_its_first_step_is_eigen_adam(shape: tuple[int, int]) -> None:
    """Within one basis, for SOAP's second moment follows a later one."""
    soap = path(SOAP, shape, sides="short", skip_first=False, betas=(0.9, 0.95), refresh="fixed:100")
    # SOAP's eps is added to the uncorrected root, as here
    eigen = path(EigenAdam, shape, betas=(0.9, 0.95, 0.99), correct_bias=True, refresh="fixed:100")
    same(soap, eigen)


@pytest.mark.parametrize(("cls", "settings"), [(SOAP, {}), (SOAPMuon, {"ns_dtype": "float64"})])
def test_rotations_in_bfloat16_are_nearly_those_of_the_arithmetic(cls: Any, settings: dict[str, Any]) -> None:
    """A product is off by 0.004 of the norm; dividing by the root of V, small elements alike, makes 0.03 to 0.05."""
    exact, narrow = (path(cls, (24, 40), rotation_dtype=d, **settings) for d in ("float32", "bfloat16"))
    same(narrow, exact, 0.06)
    assert (narrow - exact).norm() > 1e-3 * exact.norm()
    unturned = (path(cls, (24, 40), rotation_dtype=d, max_precond_dim=8, **settings) for d in ("float32", "bfloat16"))
    assert torch.equal(*unturned), "nothing is rounded where nothing is turned"


@pytest.mark.parametrize("settings", [{"refresh": "fixed:1"}, {"refresh": "fixed:3", "skip_first": False}])
def test_soap_of_rank_deficient_gradients_is_finite_and_reproducible(settings: dict[str, Any]) -> None:
    """Rank 2 on both sides. In the missing directions M and V are rounding; `floor` keeps their ratio small."""
    grads = [draw(8, 2) @ draw(2, 2, seed=t) @ draw(2, 12) for t in range(12)]

    def end(dtype: torch.dtype, *, among: int = 1, **more: Any) -> Tensor:
        ps = [Parameter(torch.zeros(8, 12, dtype=dtype)) for _ in range(among)]
        optimizer = SOAP(ps, lr=0.1, weight_decay=0.0, **settings, **more)
        for g in grads:
            for i, p in enumerate(ps):
                p.grad = g.to(dtype) * (i + 1)
            optimizer.step()
        return ps[0].detach()

    loose = end(torch.float32)
    assert loose.isfinite().all()
    assert torch.equal(loose, end(torch.float32)) and torch.equal(loose, end(torch.float32, among=3))
    exact = end(torch.float64)
    assert (loose - exact).norm() > exact.norm()  # steps of rounding
    for floor, error in ((1e-3, 0.3), (1e-2, 0.03)):
        exact = end(torch.float64, floor=floor)
        assert (end(torch.float32, floor=floor) - exact).norm() < error * exact.norm()


def test_eigen_adam_of_orthogonal_rows_is_adam() -> None:
    """Eigenvectors of a diagonal Gram matrix are axes, whatever their order and signs."""
    p, q = (Parameter(torch.zeros(3, 6, dtype=F64)) for _ in range(2))
    eigen = EigenAdam([p], lr=0.1, betas=(0.9, 0.95, 0.99), refresh="fixed:100", correct_bias=True, eps=1e-14)
    adam = Adam([q], lr=0.1, betas=(0.9, 0.95), eps=1e-14)
    for t in range(STEPS):
        g = torch.zeros(3, 6, dtype=F64)
        g[:, :3] = torch.diag(torch.tensor([1.0, 2.0, 3.0], dtype=F64) * (1 + 0.1 * t))
        p.grad, q.grad = g.clone(), g.clone()
        eigen.step()
        adam.step()
        same(p.detach(), q.detach())


EQUIVARIANT = [
    pytest.param(Muon, {"ns_dtype": "float64"}, "both", id="muon"),
    pytest.param(Shampoo, {"graft": "none", "eps": 1e-3}, "both", id="shampoo"),
    pytest.param(Shampoo, {"graft": "sgd", "eps": 1e-3, "root": "newton"}, "both", id="shampoo-newton"),
    pytest.param(EigenAdam, {"refresh": "fixed:2"}, "left", id="eigen_adam"),
    pytest.param(Alice, {"rank": 2, "switch": False, "leading": 2, "refresh": "fixed:100"}, "left", id="alice"),
    pytest.param(SOAP, {"refresh": "fixed:100", "max_precond_dim": 4}, "left", id="soap"),
]


@pytest.mark.parametrize(("cls", "settings", "sides"), EQUIVARIANT)
def test_turning_the_gradients_turns_the_steps(cls: Any, settings: dict[str, Any], sides: str) -> None:
    """Muon(A G B) = A Muon(G) B for orthogonal A and B; Adam in an eigenbasis does not see the basis it was given."""
    a, b = orthogonal(4, 1), orthogonal(7, 2) if sides == "both" else None
    turned = path(cls, (4, 7), a, b, **settings)
    plain = path(cls, (4, 7), **settings)
    same(turned, a @ plain if b is None else a @ plain @ b, 1e-8)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (Muon, {"ns_dtype": "float64", "eps": 1e-30}),
        (RACS, {}),
        (SWAN, {"root": "eigh"}),
        (Shampoo, {"graft": "none", "eps": 0.0, "accumulate": "sum", "betas": (0.0, 0.0), "sides": "short"}),
        (Dion, {"rank": 3, "eps": 1e-30}),
    ],
)
def test_the_size_of_gradients_does_not_matter(cls: Any, settings: dict[str, Any]) -> None:
    p, q = (Parameter(torch.zeros(4, 7, dtype=F64)) for _ in range(2))
    a, b = cls([p], lr=0.1, weight_decay=0.0, **settings), cls([q], lr=0.1, weight_decay=0.0, **settings)
    for t in range(STEPS):
        p.grad = draw(4, 7, seed=100 + t)
        q.grad = 1e3 * p.grad
        a.step()
        b.step()
    same(q.detach(), p.detach())


def test_transposing_the_gradients_transposes_the_steps() -> None:
    p, q = Parameter(torch.zeros(4, 7, dtype=F64)), Parameter(torch.zeros(7, 4, dtype=F64))
    groups: list[tuple[str, dict[str, Any]]] = [
        ("swan", {"root": "eigh"}),
        ("shampoo", {"eps": 1e-3}),
        ("eigen_adam", {"refresh": "fixed:2"}),
        ("alice", {"rank": 2, "leading": 2, "refresh": "fixed:2"}),
        ("psgd_kron", {"refresh": "fixed:100", "start": 200}),
    ]
    for rule, settings in groups:
        a, b = (RuleOptimizer([{"params": [x], "rule": rule, "lr": 0.1, **settings}]) for x in (p, q))
        for t in range(STEPS):
            p.grad = draw(4, 7, seed=100 + t)
            q.grad = p.grad.T.clone()
            a.step()
            b.step()
        same(q.detach().T, p.detach())


def test_one_sided_shampoo_of_one_step_is_the_polar_factor() -> None:
    """(G G^T)^(-1/2) G, which is also what SWAN makes of centred, normalised rows."""
    settings = {"graft": "none", "eps": 0.0, "accumulate": "sum", "betas": (0.0, 0.0), "sides": "left"}
    g = draw(4, 7, seed=100)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    same(path(Shampoo, (4, 7), **settings)[0], -0.1 * u @ vh)
    two = path(Shampoo, (4, 7), **{**settings, "sides": "both"})[0]
    same(two, -0.1 * u @ vh, 1e-6)
    g = (g - g.mean(1, keepdim=True)) / g.std(1, correction=0, keepdim=True)
    u, _, vh = torch.linalg.svd(g, full_matrices=False)
    same(path(SWAN, (4, 7), root="eigh")[0], -0.1 * u @ vh)


def test_shampoo_of_a_vector_of_one_is_adagrad() -> None:
    p, q = (Parameter(torch.zeros(1, dtype=F64)) for _ in range(2))
    a = Shampoo([p], lr=0.1, graft="none", eps=0.0, accumulate="sum", betas=(0.0, 0.0), refresh="fixed:1")
    b = torch.optim.Adagrad([q], lr=0.1, eps=0.0)
    for t in range(STEPS):
        p.grad = draw(1, seed=t)
        q.grad = p.grad.clone()
        a.step()
        b.step()
    same(p.detach(), q.detach())


@pytest.mark.parametrize("settings", [{}, {"graft": "none", "sides": "short"}, {"max_dim": 4, "start": 3}])
def test_shampoo_of_a_tensor_is_that_of_its_matrices(settings: dict[str, Any]) -> None:
    """Experts are a matrix each, a convolution is the matrix it applies to patches, a small matrix may be a vector."""
    settings = {"eps": 1e-3, "refresh": "fixed:2", **settings}
    grads = [draw(3, 4, 5, seed=t) for t in range(STEPS)]

    def ends(*views: Any, **more: Any) -> list[Tensor]:
        ps = [Parameter(torch.zeros(view(grads[0]).shape, dtype=F64)) for view in views]
        optimizer = Shampoo(ps, lr=0.1, **settings, **more)
        for g in grads:
            for p, view in zip(ps, views, strict=True):
                p.grad = view(g).clone()
            optimizer.step()
        return [p.detach() for p in ps]

    (experts,) = ends(lambda g: g)
    for expert, alone in zip(experts, ends(*(lambda g, i=i: g[i] for i in range(3))), strict=True):
        same(expert, alone)
    kernel, matrix = ends(lambda g: g.view(3, 4, 5, 1), lambda g: g.view(3, 20))
    same(kernel.view(3, 20), matrix)
    if "max_dim" not in settings:
        small, vector = ends(lambda g: g[0], lambda g: g[0].flatten(), target_dims=1)
        same(small.flatten(), vector)


@pytest.mark.parametrize("settings", [{}, {"root": "newton"}, {"preconditioner": "eigenvalue"}])
def test_shampoo_keeps_its_last_good_roots(settings: dict[str, Any]) -> None:
    """A gradient that is finite where its factors are not, in an optimizer that refuses none."""
    p = Parameter(torch.zeros(4, 6))
    optimizer = Shampoo([p], graft="none", eps=1e-3, refresh="fixed:1", on_nonfinite="off", **settings)
    for t in range(3):
        p.grad = draw(4, 6, seed=t).float()
        optimizer.step()
    good = {k: optimizer.state[p][k].clone() for k in ("root_left", "root_right")}
    p.grad = torch.full((4, 6), 1e20)
    with pytest.warns(RuntimeWarning, match="last good one is kept"):
        optimizer.step()
    assert all(torch.equal(optimizer.state[p][k], x) for k, x in good.items())
    assert p.isfinite().all()


def test_racs_scales_by_the_principal_singular_pair_of_the_squared_gradient() -> None:
    g = draw(4, 7, seed=100)
    u, values, vh = torch.linalg.svd(g.square())
    fit = values[0] * u[:, :1] @ vh[:1]
    settings = {"ema": False, "iterations": 100, "alpha": 1.0}
    same(path(RACS, (4, 7), **settings)[0], -0.1 * g / fit.sqrt())
    rank_one = Parameter(torch.zeros(4, 7, dtype=F64))
    rank_one.grad = draw(4, 1) @ draw(1, 7)
    RACS([rank_one], lr=0.1, ema=False, alpha=1.0).step()
    same(rank_one.detach(), -0.1 * rank_one.grad.sign())


def test_psgd_whitens_a_stationary_gradient() -> None:
    """At its fixed point P^2 is the inverse of the second moment: E[(P g) g^T P] is the identity up to noise."""
    made = torch.Generator().manual_seed(0)
    mix, p = torch.diag(torch.logspace(-1, 1, 4, dtype=F64)), Parameter(torch.zeros(4, 6, dtype=F64))
    optimizer = PSGDKron([p], lr=1.0, momentum=0.0, refresh="fixed:1", max_rms=1e9)
    seen = []
    for t in range(600):
        before = p.detach().clone()
        p.grad = mix @ torch.randn(4, 6, generator=made, dtype=F64)
        optimizer.step()
        seen += [before - p.detach()] if t >= 400 else []
    moment = torch.stack([x @ x.T / 6 for x in seen]).mean(0)
    assert torch.linalg.cond(moment) < 3 < torch.linalg.cond(mix @ mix)


def test_dion_feeds_back_what_it_misses() -> None:
    """A fixed gradient of rank 3, steps of rank 1: all three directions are taken, none stays behind for good."""
    g, p = draw(5, 3) @ draw(3, 6, seed=1), Parameter(torch.zeros(5, 6, dtype=F64))
    optimizer = Dion([p], lr=0.1, rank=1, weight_decay=0.0)
    for _ in range(200):
        p.grad = g.clone()
        optimizer.step()
    u, values, _ = torch.linalg.svd(p.detach())
    assert values[2] > 0.1 * values[0] and values[3] < 1e-9 * values[0]
    exact = torch.linalg.svd(g).U[:, :3]
    same(exact @ exact.T @ u[:, :3], u[:, :3])
