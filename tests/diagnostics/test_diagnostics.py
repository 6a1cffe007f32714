"""Pure functions of `lightning_optim.diagnostics` against numbers worked out by hand or in exact arithmetic."""

from __future__ import annotations

import gc
import itertools
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_optim import SGD, build_optimizer
from lightning_optim.core.rule import REGISTRY
from lightning_optim.diagnostics import hessian, lanczos, memory, noise, spectrum, subspace
from lightning_optim.diagnostics.hessian import Hessian
from lightning_optim.diagnostics.probes.context import TrainingContext
from lightning_optim.diagnostics.probes.curvature import HessianBlocks
from lightning_optim.diagnostics.undisturbed import frozen, measuring
from lightning_optim.ops import eigenbasis
from lightning_optim.ops.orthogonal import QUINTIC
from tests.helpers.rules import drawing


def random(seed: int = 0) -> torch.Generator:
    return drawing(seed)


def orthogonal(n: int, seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(n, n, generator=random(seed), dtype=torch.float64)).Q


# -- rank -------------------------------------------------------------------------------------------------------------

RANKS = {
    "stable": (spectrum.stable_rank, 1.375),
    "effective": (spectrum.effective_rank, 3.363585661014858),
    "effective_energy": (lambda s: spectrum.effective_rank(s.square()), 2.2763215196832296),
    "participation": (spectrum.participation, 1.7664233576642336),
    "nuclear": (spectrum.nuclear_rank, 32 / 11),
}


@pytest.mark.parametrize("name", RANKS)
def test_rank_measures(name: str) -> None:
    measure, expected = RANKS[name]
    a = torch.diag(torch.tensor([4.0, 2.0, 1.0, 1.0], dtype=torch.float64))
    u, v = orthogonal(4, 1), orthogonal(6, 2)[:4]
    for same in (a, a.T, 7 * a, u @ a, u @ a @ v, (u @ a @ v).T, torch.stack([a, u @ a])):
        actual = measure(spectrum.singular_values(same))
        torch.testing.assert_close(actual, torch.full_like(actual, expected), rtol=1e-7, atol=0)
    k = 5
    assert measure(spectrum.singular_values(torch.eye(k))).item() == pytest.approx(k, rel=1e-9)
    one = torch.outer(torch.arange(1.0, 4), torch.arange(1.0, 6))
    assert measure(spectrum.singular_values(one)).item() == pytest.approx(1, abs=1e-3 if name == "effective" else 1e-6)
    assert measure(spectrum.singular_values(torch.zeros(3, 5))).isnan()
    assert measure(spectrum.singular_values(torch.full((3, 5), math.inf))).isnan()


def test_energies_and_condition() -> None:
    s = spectrum.singular_values(torch.diag(torch.tensor([1.0, 4.0, 1.0, 2.0])))
    assert spectrum.energy(s, 1).item() == pytest.approx(16 / 22) and spectrum.energy(s, 2).item() == pytest.approx(
        20 / 22
    )
    assert spectrum.rank_at(s, 0.9) == 2 and spectrum.rank_at(s, 0.99) == 4 and spectrum.rank_at(s, 1.0) == 4
    assert spectrum.condition(s).item() == pytest.approx(4)
    assert spectrum.condition(spectrum.singular_values(torch.ones(3, 3))).isinf()
    zero = spectrum.singular_values(torch.zeros(2, 2))
    for value in (
        spectrum.energy(zero, 1),
        spectrum.rank_at(zero),
        spectrum.condition(zero),
    ):
        assert value.isnan()


def test_measures_of_a_gaussian_matrix_are_the_comparison_line() -> None:
    a = torch.randn(200, 300, generator=random())
    actual = spectrum.measures(a, random())
    assert actual["stable_rank"].item() == pytest.approx(spectrum.gaussian_stable_rank(200, 300), rel=0.05)
    assert actual["participation"].item() == pytest.approx(200 * 300 / (200 + 300), rel=0.02)
    assert actual["rms"].item() == pytest.approx(1, rel=0.02) and actual["fro"].item() == pytest.approx(a.norm().item())


def test_a_sketch_bounds_the_whole_spectrum() -> None:
    kinds = {"gaussian": torch.ones(96), "decaying": 1 / torch.arange(1.0, 97)}
    for name, s in kinds.items():
        a = orthogonal(128, 3).float()[:, :96] * s @ orthogonal(96, 4).float()
        a = torch.randn(128, 96, generator=random(5)) if name == "gaussian" else a
        whole = spectrum.measures(a, random(), ranks=(8, 32))
        part = spectrum.measures(a, random(), ranks=(8, 32), limit=8)
        for key in ("energy@8", "energy@32"):
            assert 0.84 * whole[key] <= part[key] <= whole[key] * (1 + 1e-5), (name, key)
        assert part["stable_rank"] >= whole["stable_rank"] * (1 - 1e-5)
        torch.testing.assert_close(part["participation"], whole["participation"], rtol=1e-5, atol=0)


def test_newton_schulz_band() -> None:
    x = torch.linspace(0.01, 1, 200_000, dtype=torch.float64)
    for _ in range(5):
        a, b, c = QUINTIC
        x = a * x + b * x**3 + c * x**5
    assert 0.68181 <= x.min().item() and x.max().item() <= 1.13437
    assert spectrum.outside_band(x) == 0
    s = torch.tensor([1.2, 1.0, 0.5])
    assert spectrum.outside_band(s).item() == pytest.approx(2 / 3)
    assert spectrum.orthogonality_error(s).item() == pytest.approx(math.sqrt((0.44**2 + 0.75**2) / 3))


# -- subspaces --------------------------------------------------------------------------------------------------------


def test_subspace_angles() -> None:
    e = torch.eye(4, dtype=torch.float64)
    c, s = math.cos(math.pi / 6), math.sin(math.pi / 6)
    u, v = e[:, :2], torch.stack([c * e[0] + s * e[2], e[1]], 1)
    assert subspace.cosines(u, v).tolist() == pytest.approx([1, 0.8660254037844387])
    assert eigenbasis.mean_squared_cosine(u, v).item() == pytest.approx(0.875)
    assert subspace.adjusted_overlap(u, v).item() == pytest.approx(0.75)
    turned = v @ orthogonal(2, 3) * torch.tensor([1.0, -1.0])
    assert eigenbasis.mean_squared_cosine(u, turned).item() == pytest.approx(0.875)
    assert subspace.column_cosines(u, v).tolist() == pytest.approx([c, 1])
    assert not torch.allclose(subspace.column_cosines(u, turned), subspace.column_cosines(u, v))
    assert subspace.adjusted_overlap(e, e[:, [2, 0, 1, 3]]) == 1
    assert subspace.captured(u, torch.ones(4, 3, dtype=torch.float64)).item() == pytest.approx(0.5)


def off_diagonal(matrix: Tensor, q: Tensor) -> Tensor:
    """The share of a matrix that a whole basis leaves off the diagonal, from all of Q^T X Q."""
    rotated = q.mT @ matrix @ q
    return (rotated - rotated.diagonal().diag()).norm() / rotated.norm()


@pytest.mark.parametrize(("degrees", "expected"), [(0, 0.0), (15, 0.2236068), (45, 0.4472136), (90, 0.0)])
def test_off_diagonal_staleness(degrees: float, expected: float) -> None:
    phi = math.radians(degrees)
    q = torch.tensor([[math.cos(phi), -math.sin(phi)], [math.sin(phi), math.cos(phi)]], dtype=torch.float64)
    matrix = torch.diag(torch.tensor([3.0, 1.0], dtype=torch.float64))
    assert off_diagonal(matrix, q).item() == pytest.approx(expected, abs=1e-7)
    sampled = eigenbasis.off_diagonal(matrix[None], q[None], top=1, others=1)
    assert sampled.item() == pytest.approx(expected, abs=1e-7)


def test_sampled_staleness_is_exact_with_all_columns_and_close_with_some() -> None:
    n = 256
    values = torch.arange(1, n + 1, dtype=torch.float64) ** -1.0
    q = orthogonal(n)
    noisy = torch.linalg.qr(q + 0.02 * torch.randn(n, n, generator=random(1), dtype=torch.float64) / 4).Q
    matrix = q * values @ q.T
    exact = off_diagonal(matrix, noisy)
    whole = eigenbasis.off_diagonal(matrix[None], noisy[None], top=32, others=n)
    torch.testing.assert_close(whole[0], exact)
    some = [eigenbasis.off_diagonal(matrix[None], noisy[None], t).item() for t in range(5)]
    assert all(abs(x / exact.item() - 1) < 0.25 for x in some)


# -- curvature --------------------------------------------------------------------------------------------------------


def h5() -> Tensor:
    h = torch.diag(torch.tensor([2.0, 2, 4, 9, -1], dtype=torch.float64))
    h[0, 1] = h[1, 0] = 1
    h[0, 2] = h[2, 0] = 0.5
    return h


BLOCKS = [[0], [1]]


def quadratic(method: Any = "exact") -> Hessian:
    """x^T H x / 2 with H of `h5`, as two parameters of two and three weights."""
    start = torch.tensor([0.3, -0.2, 0.5, 0.1, 0.7], dtype=torch.float64)
    params = [x.clone().requires_grad_() for x in start.split([2, 3])]
    h = h5()

    def loss() -> Tensor:
        x = torch.cat(params)
        return 0.5 * x @ h @ x

    return Hessian(loss, params, method)


def all_signs(n: int) -> list[Tensor]:
    return [torch.tensor(z, dtype=torch.float64) for z in itertools.product((-1.0, 1.0), repeat=n)]


def test_hutchinson_over_all_signs_is_exact() -> None:
    full = quadratic()
    probes = [list(z.split([2, 3])) for z in all_signs(5)]
    traces, squares, diagonal = hessian.hutchinson(full, BLOCKS, probes)
    assert traces.sum(1).mean().item() == pytest.approx(16) and squares.mean().item() == pytest.approx(108.5)
    # 2 (|H_bb|^2 - sum h_ii^2), without the 0.25 that the coupling of the blocks would add
    assert traces.sum(1).var(correction=0).item() == pytest.approx(4)
    assert traces[:, 0].mean().item() == pytest.approx(4) and traces[:, 0].var(correction=0).item() == pytest.approx(4)
    assert traces[:, 1].tolist() == pytest.approx([12] * 32)
    torch.testing.assert_close(torch.cat(diagonal), h5().diagonal())
    assert full.products == 64 and all(p.grad is None for p in full.params)
    whole = hessian.hutchinson(full, [[0, 1]], probes)
    assert whole[0].var(correction=0).item() == pytest.approx(5) and full.products == 64 + 32


def test_coupling_over_all_signs_is_exact() -> None:
    full = quadratic()
    squares = hessian.coupling_squares(full, BLOCKS, [[[z] for z in all_signs(2)], [[z] for z in all_signs(3)]])
    torch.testing.assert_close(squares, torch.tensor([[10, 0.25], [0.25, 98]], dtype=torch.float64))
    assert hessian.coupling(squares)[0, 1].item() == pytest.approx(0.0893641822, rel=1e-8)
    assert hessian.coupling(squares).diagonal().tolist() == pytest.approx([1, 1])
    assert hessian.block_diagonal_share(squares) == pytest.approx(108 / 108.5)


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_exact_blocks_and_their_dominance(method: Any) -> None:
    full = quadratic(method)
    a, b = (hessian.exact_block(full, i) for i in (0, 1))
    tolerance = 1e-10 if method == "exact" else 1e-9
    torch.testing.assert_close(a, h5()[:2, :2], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(b, h5()[2:, 2:], rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(hessian.exact_block(full, 1, slice(1, 3)), h5()[3:, 3:], rtol=tolerance, atol=tolerance)
    assert hessian.diagonal_dominance(a).item() == pytest.approx(2 / 3)
    assert hessian.diagonal_dominance(h5()).item() == pytest.approx(0.8571428571428571)


def test_conditioning_ratio() -> None:
    h = torch.diag(torch.tensor([100.0, 1.0], dtype=torch.float64))
    assert hessian.condition_number(h).item() == pytest.approx(100)
    assert hessian.conditioning_ratio(h, torch.tensor([1e4, 1.0])).item() == pytest.approx(0.01)
    assert hessian.conditioning_ratio(h, torch.ones(2)).item() == pytest.approx(1)
    turn = orthogonal(2)
    dense = turn @ h @ turn.T
    d = torch.tensor([9.0, 4.0], dtype=torch.float64)
    by_hand = torch.linalg.eigvals(torch.diag(d.rsqrt()) @ dense).real.abs()
    expected = by_hand.max() / by_hand.min() / 100
    torch.testing.assert_close(hessian.conditioning_ratio(dense, d), expected)


def test_r_grows_as_tau_falls() -> None:
    """Seed case of the slides: eigenvalues 1 to 500, turned further and further from the axes."""
    d = 50
    values = torch.linspace(1, 500, d, dtype=torch.float64)
    skew = torch.randn(d, d, generator=random(), dtype=torch.float64)
    taus, ratios = [], []
    for strength in (0.0, 0.05, 0.2, 1.0):
        turn = torch.matrix_exp(strength * (skew - skew.T) / 2)
        h = turn * values @ turn.T
        taus.append(hessian.diagonal_dominance(h).item())
        ratios.append(hessian.conditioning_ratio(h, (h @ h).diagonal()).item())
    assert taus[0] == pytest.approx(1) and taus == sorted(taus, reverse=True) and ratios == sorted(ratios)
    assert ratios[0] < 0.01 and ratios[-1] > 0.3


def test_lanczos_finds_the_whole_small_spectrum() -> None:
    h, v = h5(), torch.tensor([1.0, 2, -1, 0.5, 1], dtype=torch.float64)
    run = lanczos.lanczos(lambda x: h @ x, v, 10)
    exact = [-1, 0.958063820282, 2.893400907536, 4.148535272182, 9]
    assert run.values.tolist() == pytest.approx(exact, abs=1e-10)
    unit = v / v.norm()
    assert run.weights.sum().item() == pytest.approx(1)
    assert (run.weights * run.values).sum().item() == pytest.approx((unit @ h @ unit).item())
    assert run.residuals.max() < 1e-8 and run.size == 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_lanczos_stops_in_an_invariant_subspace(dtype: torch.dtype) -> None:
    h = torch.diag(torch.tensor([1.0, 2, 3, 4, 5, 6], dtype=dtype))
    run = lanczos.lanczos(lambda x: h @ x, torch.tensor([0.0, 1, 0, 1, 0, 0], dtype=dtype), 6)
    assert run.values.tolist() == pytest.approx([2, 4], abs=1e-6)
    assert lanczos.lanczos(lambda x: 0 * x, torch.ones(6, dtype=dtype), 6).values.tolist() == [0]


def test_lanczos_keeps_the_sign_of_the_extremes() -> None:
    h = torch.diag(torch.cat([torch.tensor([-5.0]), torch.linspace(-1, 1, 60), torch.tensor([3.0])]).double())
    run = lanczos.lanczos(lambda x: h @ x, torch.randn(62, generator=random(), dtype=torch.float64), 12)
    assert run.values[0].item() == pytest.approx(-5, abs=1e-6) and run.values[-1].item() == pytest.approx(3, abs=1e-5)


def test_js_distance() -> None:
    p = torch.tensor([1.0, 0.0], dtype=torch.float64)
    assert lanczos.js_distance(p, p) == 0
    assert lanczos.js_distance(p, p.flip(0)).item() == pytest.approx(1)
    assert lanczos.js_distance(p, torch.tensor([0.5, 0.5])).item() == pytest.approx(0.5579230452841438)
    grid = torch.linspace(-1e3, 1e3, 2000, dtype=torch.float64)
    far = [torch.exp(-0.5 * ((grid - x) / 2).square()) for x in (-900.0, 900.0)]
    assert lanczos.js_distance(*far).item() == pytest.approx(1)


def test_densities_and_their_distances() -> None:
    def runs(values: Tensor) -> list[lanczos.Ritz]:
        return [
            lanczos.lanczos(lambda x: values * x, torch.randn(40, generator=random(i), dtype=torch.float64), 40)
            for i in range(3)
        ]

    a = torch.linspace(1, 2, 40, dtype=torch.float64)
    spectra = [runs(a), runs(10 * a), runs(a)]
    grid, sigma = lanczos.grid_of(spectra)
    mass = lanczos.density(spectra[1], grid, sigma).sum() * (grid[1] - grid[0])
    assert mass.item() == pytest.approx(1, rel=1e-3)
    scale, shape = (lanczos.js_matrix(spectra, shape=x) for x in (False, True))
    assert scale[0, 1] > 0.9 and shape[0, 1] < 0.05 and scale[0, 2] < 1e-6
    assert lanczos.mean_distance(scale) == pytest.approx((scale[0, 1] + scale[0, 2] + scale[1, 2]).item() / 3)


def test_preconditioned_sharpness_and_its_threshold() -> None:
    h, p = (torch.diag(torch.tensor(x, dtype=torch.float64)) for x in ([100.0, 1.0], [10.0, 0.1]))
    root = p.diagonal().rsqrt()
    operator = hessian.preconditioned(lambda v: h @ v, lambda v: root * v)
    assert [(operator(e) @ e).item() for e in torch.eye(2, dtype=torch.float64)] == pytest.approx([10, 10])
    assert hessian.stability_threshold(1e-3, 0.9) == pytest.approx(38000)
    assert hessian.stability_threshold(1e-3, 0.0) == pytest.approx(2000)


class Tiny(nn.Module):
    """An attention layer and a small MLP, 400 weights."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(12, 8)
        self.qkv = nn.Linear(8, 24, bias=False)
        self.mlp = nn.Linear(8, 12)
        self.dropout = nn.Dropout(0.5)
        self.batch = torch.randint(12, (3, 6), generator=random())

    def forward(self, x: Tensor) -> Tensor:
        x = self.embedding(x)
        q, k, v = (y.view(*x.shape[:2], 2, 4).transpose(1, 2) for y in self.qkv(x).chunk(3, -1))
        a = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.mlp(self.dropout(nn.functional.gelu(x + a.transpose(1, 2).flatten(2))))

    def loss(self) -> Tensor:
        return nn.functional.cross_entropy(self(self.batch).flatten(0, 1), self.batch.flatten().roll(1))


def dense(model: Tiny) -> Tensor:
    """The whole Hessian by a double loop of torch's, in float64."""
    params = dict(model.named_parameters())
    sizes = [p.numel() for p in params.values()]

    def loss(flat: Tensor) -> Tensor:
        parts = {k: x.view_as(p) for (k, p), x in zip(params.items(), flat.split(sizes), strict=True)}
        out = torch.func.functional_call(model, parts, (model.batch,))
        return nn.functional.cross_entropy(out.flatten(0, 1), model.batch.flatten().roll(1))

    flat = torch.cat([p.detach().reshape(-1) for p in params.values()])
    with frozen(model):
        return torch.autograd.functional.hessian(loss, flat, vectorize=True)  # pyright: ignore[reportReturnType]


def test_products_of_a_transformer_are_those_of_its_dense_hessian() -> None:
    model = Tiny().double()
    params = list(model.parameters())
    sizes = [p.numel() for p in params]
    whole, bounds = dense(model), [0, *itertools.accumulate(sizes)]
    with frozen(model):
        full = Hessian(model.loss, params)
        generator = random()
        z = [hessian.signs(p, generator) for p in params]
        flat = torch.cat([x.reshape(-1) for x in z])
        actual = torch.cat([x.reshape(-1) for x in full.product(z, range(len(params)))])
        torch.testing.assert_close(actual, whole @ flat, rtol=1e-9, atol=1e-11)
        block = hessian.exact_block(full, 1, slice(0, 4))
        first = bounds[1]
        part = hessian.exact_block(full, 1, slice(0, 4), slice(0, 3))
        torch.testing.assert_close(part, block.view(4, 8, 4, 8)[:, :3, :, :3].reshape(12, 12))
        torch.testing.assert_close(block, whole[first : first + 32, first : first + 32], rtol=1e-9, atol=1e-11)
        probes = [[[hessian.signs(p, generator)] for _ in range(60)] for p in params]
        squares = hessian.coupling_squares(full, [[i] for i in range(len(params))], probes)
        run = lanczos.lanczos(full.flat([1]), full.random([1], generator), 60)
    exact = torch.stack([torch.stack([x.square().sum() for x in row.split(sizes, 1)]) for row in whole.split(sizes, 0)])
    assert ((squares - exact).abs() <= 0.35 * exact + 1e-9).all()
    values = torch.linalg.eigvalsh(whole[first : bounds[2], first : bounds[2]])
    assert run.values[0].item() == pytest.approx(values[0].item(), rel=1e-6)
    assert run.values[-1].item() == pytest.approx(values[-1].item(), rel=1e-6)


def test_traces_by_role_are_as_good_as_ten_probes_within_the_role() -> None:
    """Also of small roles beside the embedding, whose coupling would be many times their traces."""
    model = Tiny().double()
    with torch.no_grad():
        model.embedding.weight.mul_(0.1)  # which couples it to the others
    named = dict(model.named_parameters())
    kinds = {"qkv.weight": "hidden", "embedding.weight": "embedding", "mlp.weight": "head", "mlp.bias": "vector"}
    groups = [{"params": [(name, named[name])], "name": name, "role": role} for name, role in kinds.items()]
    optimizer = SGD(groups, lr=0.0)
    probe = HessianBlocks(every=1, max_overhead=1e9, exact=(), detail=True, sequences=3)
    probe.start(TrainingContext(model, optimizer, lambda batch: model.loss()))
    measured: list[dict[str, Any]] = []
    for _ in range(20):
        probe.begin_batch()
        probe.record_batch(model.batch)
        optimizer.zero_grad()
        model.eval()
        model.loss().backward()
        probe.after_forward()
        probe.after_backward()
        probe.before_optimizer_step()
        optimizer.step()
        report = probe.end_batch()
        assert report is not None
        measured.append({**report.arrays, **report.scalars})
    probe.stop()
    sizes = [p.numel() for p in model.parameters()]
    rows = dict(zip(("embedding", "qkv", "head", "vector"), dense(model).split(sizes), strict=True))
    assert set(measured[0]["roles"]) == set(rows)
    for i, (role, row) in enumerate(rows.items()):
        block = row.split(sizes, 1)[i]
        inside = 2 * float(block.square().sum() - block.diagonal().square().sum())
        expected = math.sqrt(inside / 10)
        actual = torch.tensor([x[f"hessian/trace/{role}"] for x in measured], dtype=torch.float64)
        errors = torch.stack([x["trace_error"][x["roles"].index(role)] for x in measured])
        off = float((actual - block.trace()).square().mean().sqrt())
        assert off < 1.3 * expected and float(errors.square().mean().sqrt()) == pytest.approx(expected, rel=0.35), role
        if role in ("qkv", "head"):
            assert float(row.square().sum() - block.square().sum()) > 10 * inside  # what a joint probe would add
    assert measured[1]["hessian/products"] == 4 * (9 + 10) + 1
    everything = math.sqrt(sum(float(row.square().sum()) for row in rows.values()))
    assert measured[0]["hessian/frobenius_all"] == pytest.approx(everything, rel=0.1)


def test_differences_against_the_exact_product_in_float32() -> None:
    model = Tiny()
    params = list(model.parameters())
    before = [p.detach().clone() for p in params]
    with frozen(model):
        z = [hessian.signs(p, random()) for p in params]
        exact = Hessian(model.loss, params).product(z, range(len(params)))
        near = Hessian(model.loss, params, "difference").product(z, range(len(params)))
    a, b = (torch.cat([x.reshape(-1) for x in y]) for y in (exact, near))
    assert (a - b).norm() < 1e-3 * a.norm()
    assert all(torch.equal(p, x) for p, x in zip(params, before, strict=True))
    assert all(p.grad is None for p in params)


def test_attention_without_a_second_derivative() -> None:
    model = Tiny()
    params = list(model.parameters())
    model.eval()
    z = [torch.ones_like(p) for p in params]
    refused = pytest.raises(hessian.NoSecondDerivativeError, match=r"no second derivative .*frozen\(model\)")
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION), refused:
        Hessian(model.loss, params)
    flags = torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled()
    with frozen(model):
        Hessian(model.loss, params).product(z, range(len(params)))
        assert not torch.backends.cuda.flash_sdp_enabled()
    assert flags == (torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.math_sdp_enabled())


class Once(torch.autograd.Function):
    """x^2, whose derivative torch is told not to differentiate."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0] * 2 * ctx.saved_tensors[0]


class Detached(Once):
    """x^2, whose derivative does not say that it cannot be differentiated."""

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grads[0] * 2 * ctx.saved_tensors[0].detach()


@pytest.mark.parametrize("kernel", [Once, Detached])
@pytest.mark.parametrize("last", [False, True])
def test_a_kernel_that_leaves_its_second_derivative_out(kernel: Any, last: bool) -> None:
    """torch computes the product without its terms."""
    w, u, x = (torch.randn(s, generator=random(), dtype=torch.float64) for s in ((3, 4), (3,), (4,)))
    params = [w.requires_grad_(), u.requires_grad_()]
    z = [torch.ones_like(p) for p in params]
    if last:
        honest, false = (lambda f=f: f((w @ x).dot(u)) for f in (torch.square, kernel.apply))
    else:
        honest, false = (lambda f=f: f(w @ x).dot(u) for f in (torch.square, kernel.apply))
    exact = Hessian(honest, params).product(z, [0, 1])
    near = Hessian(false, params, "difference").product(z, [0, 1])
    assert hessian.apart(exact, near) < 1e-3
    if kernel is Once:
        with pytest.raises(hessian.NoSecondDerivativeError):
            Hessian(false, params)
    else:
        assert hessian.apart(Hessian(false, params).product(z, [0, 1]), near) > hessian.TOLERANCE


def test_frozen_puts_everything_back() -> None:
    model = Tiny()
    model.mlp.eval()
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    with frozen(model):
        assert not any(m.training for m in model.modules()) and measuring()
        assert model.loss() == model.loss()
        torch.rand(5)
    assert not measuring()
    assert {m for m in model.modules() if not m.training} == {model.mlp}
    assert torch.equal(torch.rand(2), expected)
    with pytest.raises(ZeroDivisionError), frozen(model):
        raise ZeroDivisionError
    assert model.training and not measuring()


def test_directional_curvature() -> None:
    full = quadratic()
    u = [torch.tensor([1.0, 1.0]).double(), torch.tensor([0.0, 1.0, 0.0]).double()]
    curved, slope = hessian.directional(full, u)
    x = torch.cat(u)
    assert curved == pytest.approx((x @ h5() @ x / x.dot(x)).item())
    assert slope == pytest.approx((torch.cat([p.detach() for p in full.params]) @ h5() @ x).item())


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")  # torch's own
def test_curvlinops_agrees() -> None:
    curvlinops = pytest.importorskip("curvlinops", reason="an oracle, not a dependency")
    model = Tiny().double().eval()
    params, batch = list(model.parameters()), model.batch
    with sdpa_kernel(SDPBackend.MATH):
        data = [(batch, batch.flatten().roll(1))]

        class Flat(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.inner = model

            def forward(self, x: Tensor) -> Tensor:
                return self.inner(x).flatten(0, 1)

        operator = curvlinops.HessianLinearOperator(
            Flat(), nn.CrossEntropyLoss(), params, data, check_deterministic=False
        )
        z = torch.ones(sum(p.numel() for p in params), dtype=torch.float64)
        theirs = operator @ z
        ours = Hessian(model.loss, params).product([torch.ones_like(p) for p in params], range(len(params)))
    torch.testing.assert_close(torch.cat([x.reshape(-1) for x in ours]), theirs, rtol=0, atol=1e-12)


# -- noise ------------------------------------------------------------------------------------------------------------


def estimates(gradients: Sequence[Tensor], b: float) -> tuple[float, float]:
    g = torch.stack(list(gradients)).double()
    square, trace = noise.estimate(g.square().sum(1).mean(), g.mean(0).square().sum(), b, b * len(g))
    return square.item(), trace.item()


def test_noise_scale_by_hand() -> None:
    assert estimates([torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])], 1) == pytest.approx((0, 1))
    assert estimates([torch.tensor([3.0, 4.0])] * 2, 1) == pytest.approx((25, 0))
    with pytest.raises(ValueError, match="at least two micro-batches"):
        estimates([torch.tensor([3.0, 4.0])], 1)


def test_noise_scale_of_gaussian_gradients() -> None:
    """|G|^2 = 4, tr Sigma = 400, micro-batches of 8: the averages are right though single steps are negative."""
    made, average = random(), noise.NoiseScale(beta=0.99)
    mean = torch.zeros(1000, dtype=torch.float64)
    mean[0] = 2.0
    squares, traces = [], []
    for _ in range(500):
        g = mean + torch.randn(8, 1000, generator=made, dtype=torch.float64) * math.sqrt(0.4 / 8)
        square, trace = noise.estimate(g.square().sum(1).mean(), g.mean(0).square().sum(), 8, 64)
        average.update(square[None], trace[None])
        squares.append(square)
        traces.append(trace)
    assert (torch.stack(traces).sum() / torch.stack(squares).sum()).item() == pytest.approx(100, rel=0.05)
    assert average.scale().item() == pytest.approx(100, rel=0.1)
    again = noise.NoiseScale()
    again.load_state_dict(average.state_dict())
    assert again.scale().equal(average.scale())


def test_a_negative_average_has_no_scale() -> None:
    average = noise.NoiseScale()
    average.update(torch.tensor([-1.0]), torch.tensor([3.0]))
    assert average.scale().isnan()
    average.update(torch.tensor([3.0]), torch.tensor([3.0]))
    assert average.scale().item() == pytest.approx((0.99 * 3 + 3) / (0.99 * -1 + 3))


# -- memory -----------------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    """Embedding and head share their weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(32, 16)
        self.hidden = nn.Linear(16, 16, bias=False)
        self.head = nn.Linear(16, 32, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("mask", torch.zeros(10))
        self.register_buffer("alias", self.embedding.weight.detach()[:4])

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.tanh(self.hidden(self.embedding(x))))


def stepped(model: nn.Module, name: str, **settings: Any) -> Any:
    optimizer = build_optimizer(model, name, lr=1e-3, **settings)
    model(torch.zeros(2, 3, dtype=torch.long)).sum().backward()
    optimizer.step()
    return optimizer


def test_every_byte_is_counted_once() -> None:
    model = Tied()
    optimizer = stepped(model, "adamw")
    actual = memory.categories(model, optimizer)
    assert actual["parameters"] == 4 * (32 * 16 + 16 * 16) and actual["buffers"] == 40
    assert actual["gradients"] == actual["parameters"]
    assert actual["state"] == 2 * actual["parameters"] + 2 * 8 == memory.predicted_state(optimizer)
    assert actual["state.exp_avg"] == actual["state.exp_avg_sq"] == actual["parameters"] and actual["state.step"] == 16
    assert memory.storages([torch.empty(4, device="meta")]) == {}


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_state_is_what_the_shapes_say(name: str) -> None:
    model = Tied()
    optimizer = stepped(model, name)
    assert memory.categories(model, optimizer)["state"] == memory.predicted_state(optimizer)


def test_nested_state_of_any_optimizer() -> None:
    class Basis:
        def __init__(self) -> None:
            self.q = torch.zeros(4)

    p = nn.Parameter(torch.zeros(3))
    optimizer = torch.optim.SGD([p], momentum=0.9)
    optimizer.state[p] = {"lists": [torch.zeros(2), {"deep": torch.zeros(5)}], "object": Basis(), "alias": p.data}
    actual = {k: sum(v.values()) for k, v in memory.state_storages(optimizer).items()}
    assert actual == {"lists": 28, "object": 16, "alias": 0}
    assert memory.predicted_state(optimizer) is None


def test_activations_grow_with_the_batch() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(16, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 16))
    sizes = []
    for rows in (64, 128, 256):
        x = torch.zeros(rows, 8, dtype=torch.long)
        with memory.SavedActivations(model) as saved:
            model(x).sum().backward()
        sizes.append(saved.bytes)
    assert sizes[1] == pytest.approx(2 * sizes[0], rel=0.01) and sizes[2] == pytest.approx(4 * sizes[0], rel=0.01)
    assert sizes[0] == 64 * 8 * (8 + 4 * (32 + 64))  # indices, two activations


def test_saved_activations_die_with_a_loss_that_nobody_differentiates() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Softmax(-1))
    with memory.SavedActivations(model):
        out = model(torch.randn(2, 4))
    content = weakref.ref(out)
    del out
    gc.collect()
    assert content() is None


def test_live_storages() -> None:
    outside = torch.zeros(1000)
    with memory.LiveStorages() as live:
        a = torch.zeros(100)
        b = a.view(10, 10)
        outside.add_(1)
        c = outside[:10] * 2
        assert live.current == 400 + 40
        del a
        gc.collect()
        assert live.current == 440
        del b
        gc.collect()
        assert live.current == 40
    assert live.peak == 440 and c.numel() == 10


def test_foreach_holds_more_than_the_loop() -> None:
    peaks = {}
    for foreach in (True, False):
        params = [nn.Parameter(torch.zeros(100, 100)) for _ in range(6)]
        optimizer = torch.optim.AdamW(params, foreach=foreach)
        for _ in range(2):
            for p in params:
                p.grad = torch.ones_like(p)
            with memory.LiveStorages() as live:
                optimizer.step()
            peaks[foreach] = live.peak
    assert peaks[True] >= 2 * peaks[False]


RECORDED = {
    "allocated_bytes.all.current": 3 * 2**30,
    "allocated_bytes.all.peak": 7 * 2**30,
    "reserved_bytes.all.current": 4 * 2**30,
    "reserved_bytes.all.peak": 8 * 2**30,
    "active_bytes.all.peak": 7 * 2**30,
    "inactive_split_bytes.all.current": 2**29,
    "requested_bytes.all.current": int(2.7 * 2**30),
    "num_alloc_retries": 2,
    "num_ooms": 1,
    "segment.all.current": 55,
}
"""The keys of `torch.cuda.memory_stats()` that are read, and one that is not."""


def test_allocator_numbers() -> None:
    actual = memory.allocator(RECORDED)
    assert actual["allocated"] == 3 * 2**30 and actual["reserved_peak"] == 8 * 2**30
    assert actual["fragmentation"] == 0.25 and actual["split"] == 0.125
    assert actual["rounding"] == pytest.approx(0.1) and actual["retries"] == 2 and actual["ooms"] == 1
    assert "rounding" not in memory.allocator({"allocated_bytes.all.current": 1}) and memory.allocator({}) == {}


def test_phases_keep_the_peak_of_the_run() -> None:
    now = {"allocated_bytes.all.current": 10.0, "allocated_bytes.all.peak": 90.0}

    def reset() -> None:
        now["allocated_bytes.all.peak"] = now["allocated_bytes.all.current"]

    phases = memory.Phases(lambda: now, reset)
    phases.begin()
    for name, current, peak in (("forward", 40.0, 45.0), ("backward", 20.0, 70.0), ("step", 20.0, 28.0)):
        now.update({"allocated_bytes.all.current": current, "allocated_bytes.all.peak": peak})
        phases.mark(name)
    assert phases.peaks == {"forward": 45, "backward": 70, "step": 28}
    assert phases.growth == {"forward": 35, "backward": 30, "step": 8} and phases.run_peak == 90


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the system does not tell the size of a process")
def test_resident_memory() -> None:
    actual = memory.resident()
    assert 2**20 < actual["rss"] <= actual["rss_peak"]
