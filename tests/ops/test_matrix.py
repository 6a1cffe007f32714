"""Shared parts of the matrix rules against SVD and eigh in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lightning_optim.ops import orthogonal as orthogonal_ops
from lightning_optim.ops.eigenbasis import average_kl_, eigenbasis, off_diagonal, unaligned
from lightning_optim.ops.kronecker import damped_inverse
from lightning_optim.ops.lapack import (
    Fallback,
    LinAlgError,
    complement,
    eigh,
    failures,
    orthonormal,
    singular_vectors,
)
from lightning_optim.ops.lowrank import follow_subspace, leading_basis, range_basis, switch
from lightning_optim.ops.moments import rank_one
from lightning_optim.ops.norms import gram_norm, growth_factor, magnitude, normalized, quotient, rms
from lightning_optim.ops.orthogonal import GRAM_ASPECT, GRAM_ROWS, orthogonalize
from lightning_optim.ops.roots import coupled_newton, inverse_power, inverse_root, root_error
from lightning_optim.ops.spectral import norm_lower_bound
from lightning_optim.ops.tiles import filled, joined, tiles

F64 = torch.float64


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = F64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64).to(dtype)


def spectrum(values: Tensor, seed: int = 0) -> Tensor:
    """A symmetric matrix with these eigenvalues."""
    q = torch.linalg.qr(draw(len(values), len(values), seed=seed)).Q
    return (q * values) @ q.T


def test_rank_one_finds_the_principal_singular_pair() -> None:
    a = draw(3, 6, 9).square()
    q, s = rank_one(a, 100)
    u, values, vh = torch.linalg.svd(a)
    best = values[:, :1, None] * u[:, :, :1] @ vh[:, :1]
    torch.testing.assert_close(q @ s, best, rtol=1e-9, atol=1e-12)
    assert (rank_one(a, 5)[0] @ rank_one(a, 5)[1] - best).norm() < 0.02 * best.norm()


def test_rank_one_printed_example() -> None:
    """After one iteration of [[1, 2, -1], [0.5, -1, 3]]; by hand."""
    a = torch.tensor([[[1.0, 2.0, -1.0], [0.5, -1.0, 3.0]]], dtype=F64).square()
    q, s = rank_one(a, 1)
    torch.testing.assert_close(s[0, 0], torch.tensor([0.625, 2.5, 5.0], dtype=F64))
    torch.testing.assert_close(q[0, :, 0], torch.tensor([0.49382716, 1.50617284], dtype=F64))


@pytest.mark.parametrize("scale", [1e-15, 1.0, 1e15])
def test_rank_one_of_float32_squares_at_any_scale(scale: float) -> None:
    g = draw(1, 6, 9, dtype=torch.float32)
    q, s = rank_one((scale * g).square())
    expected, columns = rank_one(g.double().square())
    torch.testing.assert_close(q.double(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(s.double() / scale**2, columns, rtol=1e-5, atol=0)


def test_rank_one_of_float32_squares_that_underflow() -> None:
    g = draw(1, 6, 9, dtype=torch.float32)
    expected, columns = rank_one(g.double().square())
    q, s = rank_one(1e-20 * g, squared=True)  # squares of few digits
    torch.testing.assert_close(q.double(), expected, rtol=1e-3, atol=0)
    torch.testing.assert_close(s.double() * 1e40, columns, rtol=1e-3, atol=0)
    assert all(not x.any() for x in rank_one(1e-30 * g, squared=True))
    assert all(not x.any() for x in rank_one(0 * g))


def test_growth_is_limited_and_a_fall_is_not() -> None:
    last, out = torch.zeros(1, 1, 1, dtype=F64), []
    for size in (1.0, 2.0, 1.5, 0.1, 5.0, 0.0, 3.0):
        x = torch.full((1, 1, 1), size, dtype=F64)
        last = growth_factor(x, last, 1.01) * x
        out.append(last.item())
    assert out == pytest.approx([1, 1.01, 1.0201, 0.1, 0.101, 0, 3])


def test_normalized() -> None:
    x = torch.stack([draw(3, 4), torch.zeros(3, 4, dtype=F64)])
    torch.testing.assert_close(rms(normalized(x, 0.2)).flatten(), torch.tensor([0.2, 0], dtype=F64))


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e-30, 1e-38, 1e-42, 1e30])
@pytest.mark.parametrize("target", [0.2, 128**0.5, 1e6])
def test_normalized_at_any_scale(scale: float, target: float) -> None:
    x = scale * torch.stack([draw(3, 4), 1e-3 * draw(3, 4, seed=1), torch.zeros(3, 4, dtype=F64)])
    actual = normalized(x.float(), target)
    torch.testing.assert_close(rms(actual).flatten(), torch.tensor([target, target, 0]))
    if scale == 1:
        plain = x[:2].float()
        assert torch.equal(actual[:2], plain * (target / rms(plain))), "a power of two changes nothing"


def test_a_quotient_of_norms_is_finite() -> None:
    a, b = torch.tensor([0.0, 2.0, 0.0, 2.0, 2.0]), torch.tensor([0.0, 0.0, 1.0, 1e-44, 4.0])
    assert quotient(a, b).tolist() == [1, 1, 1, 1, 0.5]


@pytest.mark.parametrize("root", [1, 2, 3, 4])
def test_inverse_roots_undo_the_matrix(root: int) -> None:
    x = torch.stack([spectrum(torch.logspace(0, -k, 12, dtype=F64), k) for k in (1, 3)])
    eye = torch.eye(12, dtype=F64)
    for actual in (inverse_root(x, root), coupled_newton(x, root, 60, 1e-13).root, inverse_power(x, 1 / root)):
        torch.testing.assert_close(
            torch.linalg.matrix_power(actual, root) @ x, eye.expand(2, 12, 12), atol=1e-9, rtol=0
        )


@pytest.mark.parametrize(("method", "bound"), [("eigh", 1e-3), ("newton", 2e-4)])
def test_float32_roots_keep_the_documented_accuracy(method: str, bound: float) -> None:
    x = spectrum(torch.logspace(0, -12, 64, dtype=F64))[None].float()
    exact = inverse_power(x.double() + 1e-4 * torch.eye(64, dtype=F64), 1 / 4)
    actual = inverse_root(x, 4, eps=1e-4, method=method)  # pyright: ignore[reportArgumentType]
    assert (actual - exact).norm() < bound * exact.norm()
    wide = inverse_root(x, 4, eps=1e-4, method=method, dtype=F64)  # pyright: ignore[reportArgumentType]
    assert wide.dtype == torch.float32
    assert (wide - exact).norm() < 1e-4 * exact.norm()


def test_newton_does_not_depend_on_who_shares_the_stack() -> None:
    x = torch.stack([spectrum(torch.logspace(0, -k, 12, dtype=F64), k) for k in (1, 6)]).float()
    together = inverse_root(x, 4, method="newton")
    assert all(torch.equal(together[i : i + 1], inverse_root(x[i : i + 1], 4, method="newton")) for i in (0, 1))


def test_inverse_power_of_a_singular_matrix_is_that_of_its_range() -> None:
    values = torch.tensor([4.0, 1.0, 0.0, 0.0], dtype=F64)
    actual = inverse_power(spectrum(values), 0.5)
    torch.testing.assert_close(actual, spectrum(torch.tensor([0.5, 1.0, 0.0, 0.0], dtype=F64)))
    assert not inverse_power(torch.zeros(1, 3, 3), 0.5).any()
    lifted = inverse_power(spectrum(torch.tensor([1.0, -1e-3], dtype=F64)), 1.0, eps=1e-4)
    torch.testing.assert_close(eigh(lifted).values[0], torch.tensor(1e4, dtype=F64))


def test_a_failed_root_keeps_the_last_good_one() -> None:
    x = torch.stack([torch.full((3, 3), torch.nan), torch.eye(3)])
    last = torch.stack([3 * torch.eye(3), 5 * torch.eye(3)])
    for method in ("eigh", "newton"):
        with pytest.warns(RuntimeWarning, match="last good one"):
            actual = inverse_root(x, 4, method=method, previous=last)
        assert torch.equal(actual[0], last[0])
        torch.testing.assert_close(actual[1], torch.eye(3))
        with pytest.raises(LinAlgError, match="inverse root"):
            inverse_root(x, 4, method=method)


def test_a_failed_eigenbasis_keeps_the_last_good_one() -> None:
    x = torch.stack([torch.full((3, 3), torch.nan), torch.diag(torch.tensor([1.0, 3.0, 2.0]))])
    last = torch.stack([3 * torch.eye(3), 5 * torch.eye(3)])
    with pytest.warns(RuntimeWarning, match="last good one"):
        actual = eigenbasis(x, previous=last)
    assert torch.equal(actual[0], last[0])
    assert torch.equal(actual[1], eigenbasis(x[1:])[0])
    with pytest.raises(LinAlgError):
        eigenbasis(x)


def test_a_matrix_that_fails_does_not_disturb_its_stack() -> None:
    """Each is tried again in float64, and then replaced alone."""
    x = torch.stack([torch.full((4, 3), torch.nan), torch.randn(4, 3), torch.randn(4, 3)])
    grams = x.mT @ x
    others = Fallback(lambda: (torch.zeros(3, 3), torch.eye(3).expand(3, 3, 3)), "no eigenvectors")
    with pytest.warns(RuntimeWarning, match="no eigenvectors") as record:
        actual = eigh(grams, others)
    assert len(record) == 1 and torch.equal(actual.vectors[0], torch.eye(3)) and not actual.values[0].any()
    assert torch.equal(actual.vectors[1:], eigh(grams[1:]).vectors)
    with pytest.warns(RuntimeWarning, match="no vectors"):
        left, right = singular_vectors(x, Fallback(lambda: (torch.zeros(3, 4, 3), torch.zeros(3, 3, 3)), "no vectors"))
    exact = singular_vectors(x[1:])
    assert not left[0].any() and torch.equal(left[1:], exact[0]) and torch.equal(right[1:], exact[1])
    singular = torch.stack([torch.zeros(3, 3), 2 * torch.eye(3)])
    with pytest.warns(RuntimeWarning, match="the last good one is kept"):
        assert torch.equal(damped_inverse(singular, 0.0, torch.eye(3).expand(2, 3, 3))[0], torch.eye(3))
    with pytest.raises(LinAlgError):
        damped_inverse(singular, 0.0)


def test_failures_are_told_together_at_the_end() -> None:
    with pytest.warns(RuntimeWarning) as record:
        failures.depth += 1
        failures.add("this")
        failures.name([f"w{i}" for i in range(7)])
        failures.add("that")
        failures.name(["v"])
        failures.name(["another, of which nothing failed"])
        failures.depth -= 1
        assert not record
        failures.warn()
    assert [str(x.message) for x in record] == ["w0, w1, w2, w3, w4 and 2 more: this; v: that"]


def test_magnitude_is_an_exact_power_of_two() -> None:
    made = torch.Generator().manual_seed(0)
    sizes = [2.0**k for k in (-120, -100, -3, 0, 1, 60, 120)]
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        x = torch.randn(7, 5, 7, generator=made).to(dtype) * torch.tensor(sizes, dtype=dtype).view(-1, 1, 1)
        scale = magnitude(x)
        assert scale.dtype == dtype and (torch.frexp(scale.double()).mantissa == 0.5).all()
        top = (x / scale).abs().amax((-2, -1))
        assert ((top >= 1) & (top < 2)).all() and torch.equal((x / scale * scale)[1:], x[1:])
    assert (magnitude(torch.zeros(2, 5, 7)) == 1).all()
    assert torch.equal(magnitude(torch.tensor([[3e38, -1e38]])), torch.tensor([[2.0**127]]))


@pytest.mark.parametrize("size", [1e-12, 1e12, 1e17])
def test_what_does_not_depend_on_the_scale_does_not_see_it(size: float) -> None:
    """Squares of squares would overflow, or vanish."""
    made = torch.Generator().manual_seed(0)
    x, sketch = torch.randn(2, 12, 20, generator=made), torch.randn(2, 20, 6, generator=made)
    size = 2.0 ** round(math.log2(size))
    gram = x @ x.mT
    q = eigh(gram).vectors.roll(1, -2)
    assert torch.equal(gram_norm(x * size), gram_norm(x) * size)
    assert torch.equal(range_basis(x * size, sketch, 4, power=2), range_basis(x, sketch, 4, power=2))
    assert torch.equal(range_basis(x.square() * size**2, sketch, 4), range_basis(x.square(), sketch, 4))
    assert torch.equal(off_diagonal(gram * size**2, q), off_diagonal(gram, q))
    assert torch.equal(unaligned(gram @ q * size**2, q), unaligned(gram @ q, q))


@pytest.mark.parametrize("root", [1, 2, 3, 4])
def test_error_of_a_root(root: int) -> None:
    """None of the exact one, |c - 1| / (c + 1) of a matrix that has grown by c, rounding only in float32."""
    x = spectrum(torch.logspace(-6, 0, 12, dtype=F64))
    r = inverse_power(x, 1 / root)
    assert root_error(x, r, root).max() < 1e-9
    torch.testing.assert_close(root_error(3 * x, r, root), torch.tensor(0.5, dtype=F64))
    torch.testing.assert_close(root_error(x / 3, r, root), torch.tensor(0.5, dtype=F64))
    assert root_error(x.flip(-1).flip(-2), r, root).max() > 0.3
    assert not root_error(torch.zeros(2, 3, 3), torch.eye(3).expand(2, 3, 3), root).any()
    narrow = spectrum(torch.logspace(-8, 0, 64, dtype=F64)).float()
    assert root_error(narrow, inverse_power(narrow, 1 / root, eps=1e-8), root).max() < (0.3 if root == 1 else 1e-4)


def test_float32_overflow_is_retried_in_float64() -> None:
    """A trace whose square overflows float32: the Newton iteration's norm is infinite there."""
    x = 1e38 * torch.eye(8)[None]
    assert not coupled_newton(4 * x, 2, 20).root.isfinite().all() or (coupled_newton(4 * x, 2, 20).error > 0.1).all()
    torch.testing.assert_close(inverse_root(x, 2, method="newton"), 1e-19 * torch.eye(8)[None])


def test_decompositions_of_a_stack_are_those_of_its_matrices() -> None:
    x = draw(2, 3, 37, 37, dtype=torch.float32)
    x = x @ x.mT
    both, alone = eigh(x), eigh(x[1, 2])
    assert torch.equal(both.vectors[1, 2], alone.vectors) and both.values.shape == (2, 3, 37)
    assert (both.values.diff(dim=-1) <= 0).all()
    q = orthonormal(x[..., :5])
    assert torch.equal(q[1, 2], orthonormal(x[1, 2, :, :5]))
    whole = torch.cat([q, complement(q)], -1)
    torch.testing.assert_close(whole.mT @ whole, torch.eye(37).expand(2, 3, 37, 37), atol=2e-6, rtol=0)


def test_range_finder_captures_the_leading_energy() -> None:
    m, n, rank = 40, 60, 5
    u, _, vh = torch.linalg.svd(draw(m, n), full_matrices=False)
    values = 1 / torch.arange(1, m + 1, dtype=F64)
    x = (u * values) @ vh
    best = values[:rank].square().sum()
    for power, bound in ((0, 0.9), (1, 0.995), (4, 1 - 1e-6)):
        q = range_basis(x[None], draw(1, n, rank + 8, seed=1), rank, power)
        torch.testing.assert_close(q.mT @ q, torch.eye(rank, dtype=F64)[None])
        assert (q.mT @ x).square().sum() > bound * best


@pytest.mark.parametrize("shape", [(2, 6, 9), (2, 9, 6), (2, 6, 6)])
def test_leading_basis_is_that_of_the_svd(shape: tuple[int, ...]) -> None:
    x = draw(*shape)
    u = leading_basis(x, 3)
    exact = torch.linalg.svd(x).U[..., :3]
    torch.testing.assert_close(u @ u.mT, exact @ exact.mT)
    torch.testing.assert_close((u * exact).sum(-2).abs(), torch.ones(2, 3, dtype=F64))
    assert (u.gather(-2, u.abs().argmax(-2, keepdim=True)) > 0).all()


def test_a_followed_subspace_keeps_its_signs_and_outlives_a_zero_gradient() -> None:
    x = draw(1, 6, 9)
    u = leading_basis(x, 3)
    for signs in ([1.0, 1.0, 1.0], [1.0, -1.0, -1.0]):
        old = u * torch.tensor(signs, dtype=F64)
        torch.testing.assert_close(follow_subspace(lambda y: x @ (x.mT @ y), old), old)
    assert torch.equal(follow_subspace(torch.zeros_like, u), u)


def test_subspace_iteration_converges_to_the_leading_eigenvectors() -> None:
    a = spectrum(torch.tensor([5.0, 4.0, 3.0, 0.5, 0.4, 0.3, 0.2], dtype=F64))
    u = orthonormal(draw(7, 3))
    for _ in range(30):
        u = follow_subspace(lambda x: a @ x, u)
    torch.testing.assert_close(u.T @ a @ u, torch.diag(torch.tensor([5.0, 4.0, 3.0], dtype=F64)), atol=1e-10, rtol=0)


def test_switching_keeps_the_leading_columns_and_draws_from_the_complement() -> None:
    u = orthonormal(draw(2, 8, 4))
    new = switch(u, 3, draw(2, 4, seed=1))
    assert torch.equal(new[..., :3], u[..., :3])
    torch.testing.assert_close(new.mT @ new, torch.eye(4, dtype=F64).expand(2, 4, 4), atol=1e-12, rtol=0)
    assert (u.mT @ new[..., 3:]).abs().max() < 1e-12
    assert torch.equal(switch(u, 4, draw(2, 4)), u)
    near = orthonormal(draw(1, 5, 4))  # a complement of one column: three of the four leading ones stay
    snapshot = switch(near, 1, draw(1, 1))
    assert torch.equal(snapshot[..., :3], near[..., :3])
    assert (snapshot[..., 3:].mT @ near).abs().max() < 1e-12
    square = orthonormal(draw(1, 4, 4))
    assert torch.equal(switch(square, 1, draw(1, 0)), square)


def test_lower_bound_of_the_spectral_norm() -> None:
    x = draw(3, 8, 5)
    actual = norm_lower_bound(x @ x.mT).flatten()
    exact = torch.linalg.matrix_norm(x, 2).square()
    assert (actual <= exact).all() and (actual > 0.7 * exact).all()
    one = x[0, :, :1] @ x[0, :, :1].T
    torch.testing.assert_close(norm_lower_bound(one)[0, 0], torch.linalg.matrix_norm(one, 2))
    assert not norm_lower_bound(torch.zeros(1, 4, 4)).any()


@pytest.mark.parametrize("size", [(12, 20), (8, 8), (5, 7), (1, 20), (1, 1)])
def test_tiles_come_back_together(size: tuple[int, int]) -> None:
    x = draw(2, 12, 20)
    cut = tiles(x, *size)
    count = -(-12 // size[0]) * -(-20 // size[1])
    assert cut.shape == (2, count, *size)
    assert torch.equal(joined(cut, 12, 20), x)
    rows, columns = filled(12, 20, *size, x.device)
    assert torch.equal(tiles(torch.ones(12, 20), *size) == 0, rows[:, :, None] | columns[:, None, :])


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("coefficients", ["quintic", "annealed"])
def test_gram_form_of_wide_matrices_is_as_accurate_as_the_plain_one(
    monkeypatch: pytest.MonkeyPatch, coefficients: str, tall: bool
) -> None:
    rows, columns = GRAM_ROWS, int(GRAM_ASPECT * GRAM_ROWS)
    x = draw(1, rows, 8) @ draw(1, 8, columns, seed=1) + draw(1, rows, columns, seed=2)
    x = x.mT if tall else x
    exact = orthogonalize(x, coefficients=coefficients, dtype=F64)
    actual = orthogonalize(x, coefficients=coefficients)
    monkeypatch.setattr(orthogonal_ops, "GRAM_ROWS", 10**6)
    plain = orthogonalize(x, coefficients=coefficients)
    assert not torch.equal(actual, plain)
    assert (actual - exact).norm() < min(0.04 * exact.norm(), 3 * (plain - exact).norm())
    assert torch.linalg.matrix_norm(actual, 2).max() < 1.25


def test_orthogonalizing_zero_gives_zero_in_the_gram_form() -> None:
    assert not orthogonalize(torch.zeros(1, GRAM_ROWS, int(GRAM_ASPECT * GRAM_ROWS))).any()


def test_kl_factors_with_eigenvalues_of_one_are_soaps_by_size() -> None:
    """Whatever the bases: a rotation alone whitens nothing."""
    x, w = draw(2, 5, 8), 0.3
    factors = {"left": draw(2, 5, 5), "right": draw(2, 8, 8)}
    expected = {"left": factors["left"].lerp(x @ x.mT / 8, w), "right": factors["right"].lerp(x.mT @ x / 5, w)}
    bases = {side: torch.linalg.qr(f).Q for side, f in factors.items()}
    ones = {"left": torch.ones(2, 5, 1, dtype=F64), "right": torch.ones(2, 1, 8, dtype=F64)}
    average_kl_(factors, bases, ones, x, w)
    for side, factor in factors.items():
        torch.testing.assert_close(factor, expected[side], rtol=1e-12, atol=1e-12)
