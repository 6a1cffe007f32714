"""The frontier's rules and their parts: against SVD in float64, against each other, and by hand."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import KLSOAP, MOSO, SOAP, AdamW, Muon, MuonSq, Muown, NorMuon, RuleOptimizer, SinkSOAP, SOAPMuon
from lightning_optim.core.rule import REGISTRY, MomentumRule, hyperparameters
from lightning_optim.ops.eigenbasis import average_kl_
from lightning_optim.ops.maps import aurora, contra
from lightning_optim.ops.moments import BI_MAXWELL, k_maxwell
from lightning_optim.ops.norms import cosine, gram_norm, norm, sinkhorn, variance_factor
from lightning_optim.ops.orthogonal import SCHEDULES, orthogonalize
from lightning_optim.ops.spectral import norm_by_power
from lightning_optim.optimizers import CLASSES

F64 = torch.float64
STEPS = 6
EXACT: dict[str, Any] = {"ns_dtype": "float64"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def of_values(values: Tensor, m: int, n: int) -> tuple[Tensor, Tensor]:
    """A matrix with these singular values, and its polar factor."""
    u = torch.linalg.qr(draw(m, len(values), seed=1)).Q
    v = torch.linalg.qr(draw(n, len(values), seed=2)).Q
    return (u * values) @ v.T, u @ v.T


def path(cls: Any, shape: tuple[int, int], turn: Any = lambda g: g, steps: int = STEPS, **settings: Any) -> Tensor:
    """Parameters over some steps from zero, of gradients that may be changed."""
    p = Parameter(torch.zeros(shape, dtype=F64))
    optimizer: RuleOptimizer = cls([p], **{"lr": 0.1, "weight_decay": 0.0, **settings})
    out = []
    for t in range(steps):
        p.grad = turn(draw(*shape, seed=100 + t))
        optimizer.step()
        out.append(p.detach().clone())
    return torch.stack(out)


def same(a: Tensor, b: Tensor, tolerance: float = 1e-9) -> None:
    assert (a - b).norm() <= tolerance * b.norm()


@pytest.mark.parametrize("shape", [(12, 12), (12, 30), (30, 12)])
@pytest.mark.parametrize("divisor", ["fro", "gram"])
@pytest.mark.parametrize("coefficients", ["converged", "polar_express_long"])
def test_converged_iterations_give_the_polar_factor(shape: tuple[int, int], divisor: Any, coefficients: str) -> None:
    x, polar = of_values(torch.logspace(0, -2, 12, dtype=F64), *shape)
    stack = torch.stack([x, 1e3 * x, torch.zeros_like(x)])
    wide = orthogonalize(stack, 12, coefficients=coefficients, divisor=divisor, dtype=F64)
    torch.testing.assert_close(wide, torch.stack([polar, polar, torch.zeros_like(x)]), rtol=0, atol=1e-13)
    narrow = orthogonalize(stack.float(), 12, coefficients=coefficients, divisor=divisor, dtype=torch.float32)
    assert (narrow[0] - polar).abs().max() < 1e-5
    half = orthogonalize(stack.float(), 12, coefficients=coefficients, divisor=divisor)
    assert (half[0] - polar).norm() < 0.08 * polar.norm()


def test_accuracy_of_converged_iterations_is_as_documented() -> None:
    """What a singular value becomes; the largest one makes the divisor about 1."""
    values = torch.tensor([1.0, 0.01, 1e-3, 3e-4, 1e-4], dtype=F64)
    x, _ = of_values(values, 5, 9)
    share = values / gram_norm(x).squeeze()
    for name, bounds in {"converged": (1e-15, 5e-6, 0.14, 0.62), "polar_express_long": (1e-14,) * 4}.items():
        actual = torch.linalg.svdvals(orthogonalize(x[None], 12, coefficients=name, divisor="gram", dtype=F64))[0]
        exact = share.clone()
        for i in range(12):
            a, b, c = SCHEDULES[name][min(i, len(SCHEDULES[name]) - 1)]
            exact = a * exact + b * exact**3 + c * exact**5
        torch.testing.assert_close(actual, exact.sort(descending=True).values, rtol=0, atol=1e-12)
        assert all((1 - exact[1 + i]).abs() <= bound + 1e-15 for i, bound in enumerate(bounds))


def test_norms_against_svd() -> None:
    for shape in ((20, 30), (30, 20)):
        x = draw(4, *shape)
        values = torch.linalg.svdvals(x)
        torch.testing.assert_close(gram_norm(x).flatten(), (values**4).sum(-1) ** 0.25)
        actual = norm_by_power(x).flatten() / values[:, 0]
        assert (actual > 0.85).all() and (actual <= 1 + 1e-12).all()
        torch.testing.assert_close(norm_by_power(x, 2000).flatten(), values[:, 0])
    a, b = draw(2, 3, 4), draw(2, 3, 4, seed=1)
    torch.testing.assert_close(cosine(a, b).flatten(), torch.cosine_similarity(a.flatten(1), b.flatten(1)))
    assert not cosine(a, torch.zeros_like(b)).any()


@pytest.mark.parametrize("size", ["power", "gram"])
def test_contra_damps_singular_values_in_proportion(size: Any) -> None:
    values = torch.tensor([1.0, 0.6, 0.3, 0.1], dtype=F64)
    x, polar = of_values(values, 4, 7)
    x, polar = x[None], polar[None]
    y = contra(polar, x, 0.4, size)
    length = (norm_by_power if size == "power" else gram_norm)(x).item()
    expected = 1 - 0.2 * values / length
    actual = torch.linalg.svdvals(y)[0]
    torch.testing.assert_close(actual / actual[0], (expected / expected[-1]).flip(0))
    snapshot = norm if size == "power" else gram_norm
    torch.testing.assert_close(snapshot(y), snapshot(polar))
    assert contra(polar, x, 0.0, size) is polar


def test_soft_takes_singular_values_to_the_power_of_a_tenth() -> None:
    """Within 3e-4 from 0.1 on and 6e-3 at 0.01, up to the scale of the result."""
    values = torch.tensor([0.9, 0.5, 0.2, 0.1, 0.01], dtype=F64)
    x, polar = of_values(values, 5, 9)
    settings: dict[str, Any] = {"coefficients": "converged", "dtype": F64, "divisor": "gram"}
    y = orthogonalize(x[None], 12, soft=1.0, **settings)
    torch.testing.assert_close(gram_norm(y), gram_norm(polar[None]))
    share = values / gram_norm(x).squeeze()
    actual = torch.linalg.svdvals(y)[0]
    ratio = actual / actual[0] / (share / share[0]) ** 0.1
    assert (ratio - 1)[:4].abs().max() < 1e-3 and (ratio[4] - 1).abs() < 1e-2
    half = orthogonalize(x[None], 12, soft=0.5, **settings)
    torch.testing.assert_close(half, (y + polar) / 2)
    assert torch.equal(orthogonalize(x[None], 12, soft=0.0, **settings), orthogonalize(x[None], 12, **settings))


def exactly(x: Tensor) -> Tensor:
    return orthogonalize(x, 12, coefficients="converged", dtype=F64)


@pytest.mark.parametrize("shape", [(2, 128, 32), (2, 32, 128)])
def test_aurora_evens_out_the_longer_lines(shape: tuple[int, int, int]) -> None:
    x = draw(*shape)
    x[:, 0, 0] *= 30
    lines = -1 if shape[1] > shape[2] else -2
    spread = [(exactly(x).norm(dim=lines) * 2 - 1).abs().max().item()]
    for repeats in (1, 2, 3):
        y = aurora(x, exactly, repeats)
        torch.testing.assert_close(torch.linalg.svdvals(y), torch.ones(2, 32, dtype=F64))
        spread.append((y.norm(dim=lines) * 2 - 1).abs().max().item())
    assert spread[0] > spread[1] > spread[2] > spread[3] and spread[2] < 0.1
    square = draw(1, 8, 8)
    assert torch.equal(aurora(square, exactly), exactly(square))
    x[0, :3] = 0
    assert aurora(x, exactly).isfinite().all() and not aurora(torch.zeros(1, 6, 3, dtype=F64), exactly).any()


def test_sinkhorn_balances_rows_and_columns() -> None:
    x = draw(3, 6, 9)
    y = sinkhorn(x, 50, 1e-14)
    torch.testing.assert_close(y.square().sum(-1), torch.full((3, 6), 1 / 6, dtype=F64))
    torch.testing.assert_close(y.square().sum(-2), torch.full((3, 9), 1 / 9, dtype=F64))
    ratio = y / x  # rank one
    torch.testing.assert_close(torch.linalg.svdvals(ratio)[:, 1:], torch.zeros(3, 5, dtype=F64), rtol=0, atol=1e-12)
    assert not sinkhorn(torch.zeros(1, 3, 4)).any()


@pytest.mark.parametrize("shape", [(5, 1), (1, 4), (1, 1), (5, 4)])
@pytest.mark.parametrize("lines", ["rows", "columns"])
def test_variance_factor(shape: tuple[int, int], lines: str) -> None:
    m, n = shape
    dim, v = (-1, torch.zeros(1, m, 1, dtype=F64)) if lines == "rows" else (-2, torch.zeros(1, 1, n, dtype=F64))
    mean = torch.zeros_like(v)
    for t in range(3):
        x = draw(1, m, n, seed=t)
        if min(shape) > 1:
            x[:, 0] = 0
        factor = variance_factor(x, v, 0.9)
        mean = 0.9 * mean + 0.1 * x.square().mean(dim, keepdim=True)
        y = x / mean.sqrt().clamp(min=1e-8)
        torch.testing.assert_close(x * factor, y * x.norm() / y.norm())
        torch.testing.assert_close(v, mean)


@pytest.mark.parametrize("missing", ["", "left", "right"])
def test_kl_factors_with_unit_eigenvalues_are_those_of_soap(missing: str) -> None:
    x, bases = draw(1, 4, 7), {"left": draw(1, 4, 4), "right": draw(1, 7, 7)}
    bases = {k: torch.linalg.qr(q).Q for k, q in bases.items() if k != missing}
    factors = {k: torch.zeros_like(q) for k, q in bases.items()}
    ones = {"left": torch.ones(1, 4, 1, dtype=F64), "right": torch.ones(1, 1, 7, dtype=F64)}
    roots = average_kl_(factors, bases, {k: ones[k] for k in bases}, x, 0.25)
    expected = {"left": x @ x.mT / 7, "right": x.mT @ x / 4}
    for side, factor in factors.items():
        torch.testing.assert_close(factor, 0.25 * expected[side])
        seen = 0.75 + 0.25 * (bases[side].mT @ expected[side] @ bases[side]).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(roots[side].flatten(), seen.flatten() ** -0.5)


def test_soap_muon_without_rotation_is_muon_sq_of_the_momentum() -> None:
    """A first gradient of zero gives bases that permute axes; the refresh after it never comes."""

    def late(g: Tensor) -> Tensor:
        return torch.zeros_like(g) if torch.equal(g, draw(*g.shape, seed=100)) else g

    settings: dict[str, Any] = {**EXACT, "momentum": 0.9, "beta2": 0.95, "restore": "gram"}
    soap = path(SOAPMuon, (4, 7), late, refresh="fixed:100", **settings)
    inner = {"inner_eps": 1e-8, "inner_eps_added": False, "ns_divisor": "gram"}
    plain = path(MuonSq, (4, 7), late, second_moment="momentum", **inner, **settings)
    assert not soap[0].any() and soap[1].any()
    same(soap, plain)


def test_muon_sq_of_a_constant_second_moment_is_muon() -> None:
    polar: dict[str, Any] = {"ns_steps": 12, "ns_coefficients": "converged", **EXACT}
    constant = path(MuonSq, (4, 7), inner_eps=1e12, eps=1e-300, **EXACT)
    same(constant, path(Muon, (4, 7), eps=1e-300, **polar))


@pytest.mark.parametrize("settings", [{}, {"sides": "short"}, {"finish": "norm"}, {"factors": "kl"}, {"contra": 0.4}])
def test_turning_the_gradients_turns_the_steps_of_soap_muon(settings: dict[str, Any]) -> None:
    """Within the eigenbasis nothing depends on the axes; on a short side, on those of the longer one."""
    shape = (5, 9) if settings.get("sides") else (6, 6)
    a = torch.linalg.qr(draw(shape[0], shape[0], seed=1)).Q
    b = torch.eye(9, dtype=F64) if settings.get("sides") else torch.linalg.qr(draw(6, 6, seed=2)).Q
    turned = path(SOAPMuon, shape, lambda g: a @ g @ b, **settings, **EXACT)
    same(turned, a @ path(SOAPMuon, shape, **settings, **EXACT) @ b, 1e-7)


@pytest.mark.parametrize(
    ("cls", "settings"),
    [
        (MuonSq, {"inner_eps": 0.0, **EXACT}),
        (SOAPMuon, {"inner_eps": 0.0, "max_precond_dim": 6, **EXACT}),
        (SinkSOAP, {"inner_eps": 1e-300, "max_precond_dim": 6}),
        (MOSO, {"inner_eps": 0.0}),
        (KLSOAP, {"eps": 0.0, "max_precond_dim": 6, "refresh": "fixed:100"}),
        (KLSOAP, {"eps": 0.0, "max_precond_dim": 0}),
    ],
)
def test_the_size_of_gradients_does_not_matter(cls: Any, settings: dict[str, Any]) -> None:
    """KL-SOAP in its first basis: its eigenvalues start at a fixed 0.1, which weighs in later ones."""
    for factor in (1e-3, 1e3):
        same(path(cls, (6, 8), lambda g, factor=factor: factor * g, **settings), path(cls, (6, 8), **settings), 1e-8)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_maps_of_strength_zero_are_muon(shape: tuple[int, int]) -> None:
    polar: dict[str, Any] = {"ns_steps": 12, "ns_coefficients": "converged", **EXACT}
    plain = path(Muon, shape, **polar)
    assert torch.equal(path(Muon, shape, contra=0.0, soft=0.0, aurora=0, **polar), plain)
    for one in ({"contra": 0.4}, {"soft": 0.3}):
        assert (path(Muon, shape, **one, **polar) - plain).norm() > 1e-3 * plain.norm()
    one = path(Muon, shape, aurora=2, **polar)
    assert torch.equal(one, plain) == (shape == (5, 5))


def test_trust_gate_opens_and_closes() -> None:
    """A gate that is shut is Muon, one that is open SOAP-Muon; in between, as published, in the golden cases."""
    settings: dict[str, Any] = {"max_precond_dim": 6, **EXACT}
    muon = path(Muon, (6, 8), ns_steps=12, ns_coefficients="converged", ns_divisor="gram", **EXACT)
    shut = path(SOAPMuon, (6, 8), trust_gate=(0.0, 0.0, 100, 200), **settings)
    same(shut, muon)
    opened = path(SOAPMuon, (6, 8), trust_gate=(1.0, 1.0, 100, 200), **settings)
    same(opened, path(SOAPMuon, (6, 8), **settings))


AVERAGING = sorted(
    n for n, r in REGISTRY.items() if issubclass(r, MomentumRule) and not r.__dict__.get("curvature_input")
)


def class_of(name: str) -> Any:
    return CLASSES[name]


def own_beta(name: str) -> float:
    h = hyperparameters(REGISTRY[name])
    return h["betas"][1 if name == "lion" else 0] if "betas" in h else h["momentum"]


def kernel_path(name: str, **settings: Any) -> Tensor:
    exact = EXACT if "ns_dtype" in hyperparameters(REGISTRY[name]) else {}
    rank = {"rank": 3} if "rank" in hyperparameters(REGISTRY[name]) else {}
    leading = {"leading": 2} if "leading" in hyperparameters(REGISTRY[name]) else {}
    refresh = {"refresh": "fixed:2"} if REGISTRY[name].preconditioners else {}
    return path(class_of(name), (6, 6), **exact, **rank, **leading, **refresh, **settings)


def test_every_rule_with_a_mean_of_gradients_takes_a_kernel() -> None:
    expected = {"adamw", "adam", "lion", "signum", "lamb", "came", "adam_mini", "soap", "kl_soap", "muon", "normuon"}
    expected |= {"soap_muon", "muon_sq", "sink_soap", "moso", "galore", "fira", "apollo", "alice", "eigen_adam"}
    assert expected | {"shampoo", "psgd_kron", "adapprox"} <= set(AVERAGING)


@pytest.mark.parametrize("name", AVERAGING)
def test_a_kernel_of_equal_betas_is_the_one_mean(name: str) -> None:
    """From the start or from a switch on, whatever the weights; one of other betas is not."""
    beta, plain = own_beta(name), kernel_path(name)
    for kernel in (((beta, 1.0),), ((beta, 0.3), (beta, 0.7))):
        for first in (0, 3):
            same(kernel_path(name, momentum_kernel=kernel, kernel_steps=(first, first)), plain, 1e-12)
    other = kernel_path(name, momentum_kernel=((0.2, 0.5), (0.999, 0.5)), kernel_steps=(3, 3))
    same(other[:3], plain[:3], 1e-12)
    assert not torch.allclose(other, plain)


def test_a_kernel_is_the_weighted_sum_of_its_means() -> None:
    """Two means from step 3 on with weights that move to step 5: by hand, with Adam's bias correction and Muon's."""
    kernel = ((0.5, 0.25, 0.75), (0.98, 0.75, 0.25))
    shape, actual = (4, 4), dict[Any, Tensor]()
    classes: list[tuple[Any, float]] = [(AdamW, 0.9), (Muon, 0.95)]
    for cls, beta in classes:
        ours: dict[str, Any] = {"betas": (0.9, 0.95)} if cls is AdamW else {**EXACT, "nesterov": False}
        actual[cls] = path(cls, shape, momentum_kernel=kernel, kernel_steps=(2, 4), **ours)
        one, parts, mass_one = torch.zeros(shape, dtype=F64), [torch.zeros(shape, dtype=F64)] * 2, 0.0
        v, p, masses = torch.zeros(shape, dtype=F64), torch.zeros(shape, dtype=F64), [0.0, 0.0]
        for t in range(1, STEPS + 1):
            g = draw(*shape, seed=99 + t)
            if t <= 2:
                one, mass_one = beta * one + (1 - beta) * g, beta * mass_one + (1 - beta)
                parts, masses = [one, one], [mass_one, mass_one]
                m, mass = one, mass_one
            else:
                parts = [b * x + (1 - b) * g for (b, *_), x in zip(kernel, parts, strict=True)]
                masses = [b * x + (1 - b) for (b, *_), x in zip(kernel, masses, strict=True)]
                done = min((t - 2) / 2, 1)
                weights = [k[1] + done * (k[2] - k[1]) for k in kernel]
                m = weights[0] * parts[0] + weights[1] * parts[1]
                mass = sum(w * x for w, x in zip(weights, masses, strict=True))
            v = 0.95 * v + 0.05 * g**2
            ratio = m / mass / ((v / (1 - 0.95**t)).sqrt() + 1e-8)
            p = p - 0.1 * (ratio if cls is AdamW else orthogonalize(m[None], dtype=F64)[0])
            same(actual[cls][t - 1], p, 1e-12)


def test_published_kernels() -> None:
    ages = [sum(w * b / (1 - b) for b, w in BI_MAXWELL)]
    ages += [sum(k[i] * k[0] / (1 - k[0]) for k in k_maxwell()) for i in (1, 2)]
    assert ages == pytest.approx([30, 58, 26], abs=0.1)
    assert [k[1] for k in k_maxwell()] == pytest.approx(
        [0.005094, 0.010188, 0.015282, 0.020376, 0.025470, 0.030564, 0.035658, 0.857369], abs=2e-6
    )
    assert [k[2] for k in k_maxwell()] == pytest.approx(
        [0.032262, 0.064524, 0.096786, 0.129047, 0.161309, 0.193571, 0.225833, 0.096669], abs=2e-6
    )


@pytest.mark.parametrize("name", ["adamw", "muon", "soap", "galore"])
def test_a_kernel_is_saved_and_counted(name: str) -> None:
    """Its means are state like any other: in the checkpoint, in bfloat16 storage, and resumed bitwise."""
    settings: dict[str, Any] = {"momentum_kernel": BI_MAXWELL, "kernel_steps": (2, 2), "lr": 0.01}
    start, cls = torch.randn(64, 80, generator=torch.Generator().manual_seed(0)), class_of(name)

    def run(p: Parameter, optimizer: RuleOptimizer, steps: range) -> None:
        for t in steps:
            p.grad = torch.randn(64, 80, generator=torch.Generator().manual_seed(t))
            optimizer.step()

    for storage in ("fp32", "bf16"):
        p, q = (Parameter(start.clone()) for _ in range(2))
        whole, first = (cls([x], state_storage=storage, **settings) for x in (p, q))
        run(p, whole, range(6))
        run(q, first, range(4))
        second = cls([q], state_storage=storage, **settings)
        second.load_state_dict(copy.deepcopy(first.state_dict()))
        run(q, second, range(4, 6))
        assert torch.equal(p, q)
        mean = REGISTRY[name].first_moment  # pyright: ignore[reportAttributeAccessIssue]
        assert whole.state[p][f"{mean}_1"].shape == whole.state[p][mean].shape
        assert f"{mean}_2" not in whole.state[p]


@pytest.mark.parametrize(
    ("cls", "settings", "message"),
    [
        (AdamW, {"momentum_kernel": ((0.9, 0.5), (0.99, 0.4))}, "momentum_kernel.*add up to 1"),
        (Muon, {"momentum_kernel": ((0.9, 0.5), (1.0, 0.5))}, "momentum_kernel.*below 1"),
        (Muon, {"momentum_kernel": ()}, "momentum_kernel must be"),
        (Muon, {"momentum_kernel": ((0.9,), (0.8,))}, "momentum_kernel must be"),
        (SOAP, {"momentum_kernel": ((0.9, 1.0, 1.0),)}, "kernel_steps must be the steps between which weights change"),
        (Muon, {"soft": 0.5}, "soft.*converged"),
        (Muon, {"soft": 1.5, "ns_steps": 12, "ns_coefficients": "converged"}, "soft must be at most 1"),
        (Muon, {"contra_size": "big"}, "contra_size: unknown value 'big'"),
        (SOAPMuon, {"beta2": 1.0}, "beta2"),
        (SOAPMuon, {"factors": "kl", "decomposition": "eigh"}, "decomposition='qr'"),
        (SOAPMuon, {"trust_gate": (0.4, 0.8, 5, 5)}, "trust_gate.*first < last"),
        (Muown, {"length": 0.0}, "length > 0"),
        (Muown, {"ns_coefficients": "polar"}, "did you mean 'polar_express"),
    ],
)
def test_bad_settings_are_refused(cls: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls([Parameter(torch.zeros(3, 4))], **settings)


def by_hand(cls: Any, steps: int, **settings: Any) -> dict[int, list[float]]:
    """Steps of size 0.1 from W = cos(i + 2 j) by G_t = sin(1 + 3 i + 5 j + 7 t) + cos((i + 1)(j + 2) t) / 2."""
    index = [(i, j) for i in range(2) for j in range(3)]
    p = Parameter(torch.tensor([math.cos(i + 2 * j) for i, j in index], dtype=F64).view(2, 3))
    optimizer, out = cls([p], lr=0.1, **settings), {}
    for t in range(1, steps + 1):
        grad = [math.sin(1 + 3 * i + 5 * j + 7 * t) + 0.5 * math.cos((i + 1) * (j + 2) * t) for i, j in index]
        p.grad = torch.tensor(grad, dtype=F64).view(2, 3)
        optimizer.step()
        out[t] = p.detach().flatten().tolist()
    return out


POLAR: dict[str, Any] = {"ns_steps": 12, "ns_coefficients": "converged", **EXACT}
APPLIED: dict[str, Any] = {"uw_floor": 0.3825, "radial_damping": 0.5, "pin": True, "refresh": "fixed:1", **EXACT}
CONTRA: dict[str, Any] = {"contra": 0.4, "contra_size": "power", "lines": "longer"}
HANDS = [
    pytest.param(
        SOAPMuon,
        APPLIED,
        {
            1: [0.993824, -0.420061, -0.551264, 0.635985, -1.0033, 0.2831],
            2: [0.96292, -0.51026, -0.54483, 0.721276, -0.992236, 0.286163],
            3: [0.911306, -0.55212, -0.614921, 0.798041, -0.969097, 0.234712],
        },
        id="soap_muon-floor-brake-pin",
    ),
    pytest.param(
        SOAPMuon,
        {**APPLIED, "uw_floor_by": "row", "cautious_decay": 0.5, "cautious_when": "after_pin"},
        {
            1: [0.944132, -0.420061, -0.523701, 0.635985, -1.0033, 0.2831],
            3: [0.775252, -0.550845, -0.561511, 0.796197, -0.87185, 0.222279],
        },
        id="soap_muon-rows-cautious",
    ),
    pytest.param(
        SOAPMuon,
        {"uw_floor": 0.35, "refresh": "fixed:10", "restore": "fro", "inner_eps_added": True, **CONTRA, **EXACT},
        {
            1: [1.005823, -0.447281, -0.572352, 0.621744, -1.065473, 0.291295],
            2: [0.996604, -0.560825, -0.578795, 0.704018, -1.075809, 0.301573],
            4: [0.983463, -0.718993, -0.706652, 0.864273, -1.08999, 0.287736],
        },
        id="soap_muon-first",
    ),
    pytest.param(
        KLSOAP,
        {"betas": (0.95, 0.9), "refresh": "fixed:1", "constraint": "hyperball"},
        {
            1: [1, -0.416147, -0.653644, 0.540302, -0.989992, 0.283662],
            2: [0.946968, -0.491215, -0.627783, 0.646938, -0.960464, 0.282369],
            3: [0.847068, -0.597482, -0.680488, 0.689382, -0.917466, 0.313593],
            4: [0.804294, -0.675721, -0.733717, 0.705795, -0.832591, 0.346009],
        },
        id="kl_soap-hyperball",
    ),
    pytest.param(
        NorMuon,
        {"lines": "longer", "constraint": "hyperball", **POLAR},
        {
            1: [0.963578, -0.431336, -0.535185, 0.617296, -1.046687, 0.274483],
            3: [0.874534, -0.62399, -0.543094, 0.743575, -0.955991, 0.192243],
        },
        id="normuon-hyperball",
    ),
    pytest.param(
        SOAPMuon,
        {"beta2": 0.9, "refresh": "fixed:1", **EXACT},
        {
            1: [0.99825, -0.421925, -0.553826, 0.638711, -1.007748, 0.284359],
            2: [0.98843, -0.521301, -0.559115, 0.737765, -1.01802, 0.293459],
            3: [0.950909, -0.57083, -0.637467, 0.82542, -1.00949, 0.246091],
            4: [0.980785, -0.66384, -0.658835, 0.919554, -0.977087, 0.236658],
        },
        id="soap_muon",
    ),
    pytest.param(
        MuonSq,
        {"weight_decay": 0.1, **EXACT},
        {
            1: [0.949175, -0.371161, -0.606282, 0.575724, -1.020918, 0.240001],
            3: [0.824239, -0.443729, -0.554852, 0.642061, -0.876786, 0.247795],
        },
        id="muon_sq",
    ),
    pytest.param(
        NorMuon,
        {"contra": 0.4, "contra_size": "power", "lines": "longer", **POLAR},
        {
            2: [1.002131, -0.552948, -0.526248, 0.701233, -1.082352, 0.30089],
            3: [0.963979, -0.612949, -0.592036, 0.742644, -1.023041, 0.227517],
        },
        id="contra_muon",
    ),
    pytest.param(
        SinkSOAP,
        {"weight_decay": 0.1, "refresh": "fixed:1"},
        {
            1: [0.988548, -0.437254, -0.56546, 0.616536, -1.057734, 0.281396],
            3: [0.891127, -0.585599, -0.567278, 0.713625, -0.991625, 0.217319],
        },
        id="sink_soap",
    ),
    pytest.param(
        Muown,
        {"schedule_steps": 5, "length": 2.0, **EXACT},
        {
            1: [0.931244, -0.396892, -0.576779, 0.615071, -1.065389, 0.285835],
            3: [0.84306, -0.409736, -0.522972, 0.708319, -1.09498, 0.286845],
        },
        id="muown",
    ),
]


@pytest.mark.parametrize(("cls", "settings", "expected"), HANDS)
def test_vectors_by_hand(cls: Any, settings: dict[str, Any], expected: dict[int, list[float]]) -> None:
    actual = by_hand(cls, max(expected), **settings)
    for t, values in expected.items():
        assert actual[t] == pytest.approx(values, abs=1e-5), t


@pytest.mark.parametrize("divisor", ["fro", "gram"])
def test_polar_factor_by_hand(divisor: Any) -> None:
    h1 = torch.tensor([[[0.781285, -0.074829, -1.077809], [-1.326812, 0.192182, 0.763906]]], dtype=F64)
    actual = orthogonalize(h1, 12, coefficients="converged", divisor=divisor, dtype=F64).flatten().tolist()
    assert actual == pytest.approx([0.017498, 0.057785, -0.998176, -0.984087, 0.177553, -0.006972], abs=2e-6)
