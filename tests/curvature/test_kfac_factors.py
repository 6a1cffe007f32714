"""K-FAC: exact where it must be, its factors those of the whole batch, training left alone."""

from __future__ import annotations

import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Trainer
from transformers.pytorch_utils import Conv1D

import hf_integration
from lightning_optim import KFAC, RuleOptimizer, build_optimizer
from lightning_optim.curvature import CurvatureEstimator
from lightning_optim.ops.kronecker import damped_inverse, divided, factored_damping, mean_eigenvalue
from tests.curvature.test_estimator import Keep
from tests.helpers import rules
from tests.helpers.pool import Pool
from tests.hf_integration import test_trainer as test_hf
from tests.test_lightning import Net, Rows, assert_same, trainer, weights
from tests.test_lightning import pytestmark as lightning_warnings

pytestmark = lightning_warnings


@pytest.fixture(autouse=True)
def nothing_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No numbers made of gradients here."""
    monkeypatch.setattr(rules, "feeding", False)


def test_a_deep_linear_network_gets_the_analytic_natural_gradient() -> None:
    """Whose Fisher blocks are Kronecker products exactly: they are built here from Jacobians, without factors."""
    torch.manual_seed(0)
    made = torch.Generator().manual_seed(0)
    sizes, damping = (4, 5, 3, 2), 1e-4
    model = nn.Sequential(*(nn.Linear(a, b, bias=False, dtype=torch.float64) for a, b in zip(sizes, sizes[1:])))  # noqa: B905
    x = torch.randn(20, 4, generator=made, dtype=torch.float64)
    y = torch.randn(20, 2, generator=made, dtype=torch.float64)
    params: list[Tensor] = [layer.weight for layer in model]  # pyright: ignore
    optimizer = KFAC(params, lr=1.0, momentum=0.0, beta=0.0, damping=damping, kl_clip=None)
    (0.5 * (model(x) - y).square().sum(1).mean()).backward()
    expected = []
    for i, p in enumerate(params):

        def out(w: Tensor, i: int = i) -> Tensor:
            return torch.func.functional_call(model, {f"{i}.weight": w}, (x,))

        jacobian: Any = torch.autograd.functional.jacobian(out, p.detach())
        j = jacobian.reshape(20, 2, -1)
        fisher = torch.einsum("bki,bkj->ij", j, j) / 20
        assert p.grad is not None
        step = torch.linalg.solve(fisher + damping * torch.eye(len(fisher)), p.grad.flatten()).view_as(p)
        expected.append(p.detach() - step)
    with torch.no_grad():
        for i, p in enumerate(params):
            a = model[:i](x)
            above = torch.eye(len(p), dtype=torch.float64)
            for later in params[i + 1 :]:
                above = later @ above
            optimizer.update_curvature({p: SimpleNamespace(inputs=a.mT @ a / 20, outputs=above.mT @ above)})
    optimizer.step()
    for p, e in zip(params, expected, strict=True):
        torch.testing.assert_close(p.detach(), e, rtol=1e-8, atol=1e-8)


def factor(n: int) -> Tensor:
    x = torch.randn(n, 4 * n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return x @ x.mT / (4 * n)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_division_in_eigenbases_solves_the_damped_kronecker_product(dtype: torch.dtype, error: float) -> None:
    left, right = factor(32), factor(48)
    g = torch.randn(32, 48, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.linalg.solve(torch.kron(left, right) + 1e-3 * torch.eye(32 * 48).double(), g.flatten()).view_as(g)
    (a, u), (b, v) = (torch.linalg.eigh(x.to(dtype)) for x in (left, right))
    actual = divided(g.to(dtype), u, v, a[:, None] * b + 1e-3)
    assert (actual - expected).norm() <= error * expected.norm()
    db, da = factored_damping(mean_eigenvalue(left), mean_eigenvalue(3 * left), 0.04)
    assert (db * da).item() == pytest.approx(0.04) and (da / db).item() == pytest.approx(3.0)
    assert [x.item() for x in factored_damping(db * 0, da, 0.04)] == pytest.approx([0.2, 0.2])
    inverse = damped_inverse(left, 0.1)
    torch.testing.assert_close(
        inverse @ (left + 0.1 * torch.eye(32).double()), torch.eye(32).double(), rtol=1e-9, atol=1e-9
    )


class Layers(nn.Module):
    """Every kind of layer, over sequences."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 3, 3, padding=1, stride=2)
        self.linear = nn.Linear(3, 4, bias=False)
        self.turned = Conv1D(5, 4)
        self.norm = nn.LayerNorm(5)
        self.out = nn.Linear(5, 2)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x).flatten(2).mT  # [rows, positions, 3]
        return self.out(self.norm(torch.tanh(self.turned(torch.tanh(self.linear(h))))))

    def loss(self, batch: Tensor) -> Tensor:
        return self(batch).square().mean()


def data(rows: int = 4) -> Tensor:
    return torch.randn(rows, 2, 5, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def own(model: Layers, **settings: Any) -> RuleOptimizer:
    matrices = [(n, p) for n, p in model.named_parameters() if "norm" not in n]
    turned = [x for x in matrices if x[0] == "turned.weight"]
    rest = [x for x in matrices if x[0] != "turned.weight"]
    groups = [{"params": rest}, {"params": turned, "transposed": True, "name": "turned"}]
    return KFAC(groups, **settings)


def factors(model: Layers, some: list[Tensor], sequence: Any = "expand", scale: float = 1.0) -> dict[str, Any]:
    """What the estimator shows for batches that are accumulated."""
    optimizer = own(model, sequence=sequence)
    seen: dict[Tensor, Any] = {}
    optimizer.update_curvature = lambda actual: seen.update(actual) or {}  # pyright: ignore
    estimator = CurvatureEstimator(model, optimizer, model.loss, loss_scale=lambda: scale)
    for batch in some:
        estimator.record_batch(batch)
        (model.loss(batch) * scale * len(batch) / sum(map(len, some))).backward()
    estimator.estimate()
    estimator.close()
    return {name: seen[p] for name, p in model.named_parameters() if p in seen}


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
def test_factors_are_means_of_outer_products(sequence: str) -> None:
    model, x = Layers(), data()
    actual = factors(model, [x], sequence)
    assert set(actual) == {"conv.weight", "linear.weight", "turned.weight", "out.weight"}
    h = F.conv2d(x, model.conv.weight, model.conv.bias, stride=2, padding=1).flatten(2).mT
    h1 = torch.tanh(model.linear(h))
    turned = model.turned(h1)
    out = model.out(model.norm(torch.tanh(turned)))
    q = torch.autograd.grad(out.square().mean(), turned)[0]
    patches = F.unfold(x, 3, padding=1, stride=2).mT
    for name, a, bias in (("turned.weight", h1.detach(), True), ("linear.weight", h.detach(), False),
                          ("conv.weight", patches, True)):  # fmt: skip
        a = a.mean(1) if sequence == "reduce" else a.flatten(0, 1)
        a = torch.cat([a, torch.ones(len(a), 1)], 1) if bias else a
        torch.testing.assert_close(actual[name].inputs, a.T @ a / len(a), rtol=1e-12, atol=1e-14)
    q = q.sum(1) if sequence == "reduce" else q.flatten(0, 1)
    torch.testing.assert_close(actual["turned.weight"].outputs, q.T @ q / len(q), rtol=1e-12, atol=1e-16)


def assert_alike(a: dict[str, Any], b: dict[str, Any]) -> None:
    for name in a:
        torch.testing.assert_close(a[name].inputs, b[name].inputs, rtol=1e-11, atol=1e-14)
        torch.testing.assert_close(a[name].outputs, b[name].outputs, rtol=1e-11, atol=1e-16)


@pytest.mark.parametrize("sequence", ["expand", "reduce"])
def test_micro_batches_and_a_loss_scale_change_nothing(sequence: str) -> None:
    whole = factors(Layers(), [data(6)], sequence)
    assert_alike(whole, factors(Layers(), list(data(6).split([4, 2])), sequence, scale=1024.0))


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_counts_every_row_once(reentrant: bool) -> None:
    model = Layers()
    inner = model.linear.forward
    snapshot = model.turned.forward
    model.linear.register_forward_pre_hook(lambda m, x: (x[0].requires_grad_() if x[0].is_leaf else x[0],))
    block = nn.Sequential(model.linear, nn.Tanh(), model.turned)
    assert inner and snapshot

    def forward(x: Tensor) -> Tensor:
        h = checkpoint(block, model.conv(x).flatten(2).mT, use_reentrant=reentrant)
        return model.out(model.norm(torch.tanh(h)))  # pyright: ignore[reportArgumentType]

    model.forward = forward
    assert_alike(factors(Layers(), [data()]), factors(model, [data()]))


def test_gradients_are_those_of_training_without_a_feed() -> None:
    plain, watched = Layers(), Layers()
    plain.loss(data()).backward()
    factors(watched, [data()])
    for a, b in zip(plain.parameters(), watched.parameters(), strict=True):
        assert a.grad is not None and b.grad is not None and torch.equal(a.grad, b.grad)
    assert not any(m._forward_hooks for m in watched.modules())


def test_modes_and_keywords_change_nothing() -> None:
    model = Layers().eval()
    linear, turned = model.linear, model.turned

    def forward(x: Tensor) -> Tensor:
        h = linear(input=model.conv(x).flatten(2).mT)
        return model.out(model.norm(torch.tanh(turned(x=torch.tanh(h)))))

    model.forward = forward
    assert_alike(factors(Layers(), [data()]), factors(model, [data()]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")  # torch's, as it compiles
@pytest.mark.parametrize("is_compiled_before", [False, True])
def test_a_compiled_model_calls_the_hooks(is_compiled_before: bool) -> None:
    plain, model = Layers(), Layers()
    model.compile(backend="aot_eager")
    if is_compiled_before:
        model.loss(data()).backward()
        model.zero_grad()
    assert_alike(factors(plain, [data(), data(3)]), factors(model, [data(), data(3)]))


def test_layers_that_are_not_called_are_an_error() -> None:
    layer = nn.Linear(3, 2)
    estimator = CurvatureEstimator(layer, KFAC(layer.named_parameters()), lambda batch: layer(batch).sum())
    x = torch.ones(4, 3)
    estimator.record_batch(x)
    F.linear(x, layer.weight, layer.bias).sum().backward()
    with pytest.raises(RuntimeError, match="saw no pass through the layers it measures"):
        estimator.estimate()


def test_a_bias_frozen_after_the_bases_were_made() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(6, 5, dtype=torch.float64)
    optimizer = KFAC(layer.named_parameters(), momentum=0.0, kl_clip=None, factors="fixed:1", refresh="fixed:100")
    estimator = CurvatureEstimator(layer, optimizer, lambda batch: layer(batch).square().mean())
    x = torch.randn(16, 6, dtype=torch.float64)
    g = torch.empty(0)
    for frozen in (False, True):
        layer.bias.requires_grad_(not frozen)
        layer.bias.grad = layer.weight.grad = None
        estimator.record_batch(x)
        layer(x).square().mean().backward()
        estimator.estimate()
        assert layer.weight.grad is not None
        g = torch.cat([layer.weight.grad, torch.zeros(5, 1)], 1)
        optimizer.step()
    s = optimizer.state[layer.weight]
    q, r = s["output_basis"].to(g), s["input_basis"].to(g)
    d = q @ ((q.T @ g @ r) / (s["output_values"].to(g).T * s["input_values"].to(g) + 1e-3)) @ r.T
    torch.testing.assert_close(s["momentum_buffer"].to(g), d[:, :6], rtol=1e-5, atol=1e-5)


def test_only_layers_of_a_group_that_is_due_are_shown() -> None:
    model = Layers()
    optimizer = own(model, factors="fixed:2")
    optimizer.param_groups[1]["factors"] = "fixed:1"
    shown: list[set[int]] = []
    take = optimizer.update_curvature
    optimizer.update_curvature = lambda actual: shown.append(set(map(id, actual))) or take(actual)  # pyright: ignore
    estimator = CurvatureEstimator(model, optimizer, model.loss)
    for _ in range(3):
        estimator.record_batch(data())
        model.loss(data()).backward()
        estimator.estimate()
        optimizer.step()
        optimizer.zero_grad()
    turned = id(model.turned.weight)
    assert [x == {turned} for x in shown] == [False, True, False] and all(turned in x for x in shown)


def test_layers_that_have_no_factors_are_named() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    optimizer = KFAC(model.named_parameters())
    with pytest.raises(ValueError, match=r"0\.weight: kfac needs the weight of an nn\.Linear"):
        CurvatureEstimator(model, optimizer, lambda batch: model(batch).sum())
    built = build_optimizer(model, "kfac", lr=0.1)
    assert {g["rule"]: g["param_names"] for g in built.param_groups}["kfac"] == ["1.weight"]
    CurvatureEstimator(model, built, lambda batch: model(batch).sum())
    with pytest.raises(ValueError, match="damping"):
        KFAC([nn.Parameter(torch.ones(2, 2))], damping=0.0)


# -- entry points ------------------------------------------------------------------------------------------------------

SETTINGS: dict[str, Any] = {"factors": "fixed:2", "refresh": "fixed:4"}


def test_lightning_installs_the_feed_and_resumes_bitwise(tmp_path: Path) -> None:
    whole = Net("kfac", **SETTINGS)
    trainer(tmp_path, max_steps=6, callbacks=[Keep(tmp_path / "a.ckpt")]).fit(whole, Rows(6))
    optimizer: Any = whole.optimizers(use_pl_optimizer=False)
    snapshot = optimizer.state[whole.hidden.weight]["output_factor"]
    assert (snapshot - torch.diag(snapshot.diagonal())).any()
    resumed = Net("kfac", **SETTINGS)
    trainer(tmp_path, max_steps=6).fit(resumed, Rows(6), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert_same(weights(whole), weights(resumed))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_transformers_attach_installs_the_feed_and_resumes_bitwise(tmp_path: Path, checkpointing: bool) -> None:
    def make() -> tuple[nn.Module, Trainer]:
        model = test_hf.gpt2()
        if checkpointing:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # its new name is not in 5.2
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        args = test_hf.arguments(
            tmp_path, max_steps=6, save_strategy="steps", save_steps=3, gradient_accumulation_steps=2
        )
        return model, hf_integration.attach(Trainer(model, args, train_dataset=test_hf.Tokens()), "kfac", **SETTINGS)

    whole, run = make()
    run.train()
    resumed, run = make()
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    test_hf.assert_same(test_hf.weights(whole), test_hf.weights(resumed))


# -- several processes ------------------------------------------------------------------------------------------------


def train(rank: int, world: int, kind: str) -> dict[str, Tensor]:
    """Three steps on the rank's rows; the weights."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rules.feeding = False
    model = Layers()
    if kind == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    try:
        optimizer = build_optimizer(model, "kfac", lr=1e-2, **SETTINGS)
        estimator = CurvatureEstimator(model, optimizer, model.loss, rank=rank)
    except ValueError as error:
        return {"error": torch.tensor(list(str(error).encode()))}
    finally:
        rules.feeding = True
    outer: Any = nn.parallel.DistributedDataParallel(model) if kind == "ddp" else model
    for _ in range(3):
        mine = data().chunk(world)[rank]
        estimator.record_batch(mine)
        outer(mine).square().mean().backward()
        estimator.estimate()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


@pytest.mark.dist
def test_two_processes_equal_one(pool: Pool) -> None:
    alone, start = train(0, 1, ""), weights(Layers())
    for one in pool.run("tests.curvature.test_kfac_factors:train", 2, kind="ddp"):
        for key, p in alone.items():
            assert (one[key] - p).norm() <= 1e-9 * (p - start[key]).norm(), key
    refused = pool.run("tests.curvature.test_kfac_factors:train", 2, kind="fsdp2")[0]["error"]
    assert "kfac needs whole parameters and hooks, which FSDP2 does not support" in bytes(refused.tolist()).decode()


class Routed(nn.Module):
    """Two layers of which a batch takes one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.experts = nn.ModuleList([nn.Linear(4, 3), nn.Linear(4, 3)]).double()

    def forward(self, x: Tensor, expert: int) -> Tensor:
        return self.experts[expert](x).tanh()


def route(rank: int, world: int) -> dict[str, Tensor]:
    """One step in which every half of the batch has a layer of its own; the factors."""
    rules.feeding = False
    model = Routed()
    optimizer = KFAC(model.named_parameters(), lr=1e-2)
    estimator = CurvatureEstimator(model, optimizer, lambda batch: model(batch, 0).sum(), rank=rank)
    outer: Any = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    halves = torch.randn(10, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64).split([6, 4])
    for i in range(2) if world == 1 else [rank]:
        estimator.record_batch(halves[i])
        (outer(halves[i], i).square().mean() * world / 2).backward()
    estimator.estimate()
    optimizer.step()
    rules.feeding = True
    weights_of: dict[str, Any] = {f"{i}": layer.weight for i, layer in enumerate(model.experts)}
    slots = ("input_factor", "output_factor")
    return {f"{i}.{key}": optimizer.state[w][key] for i, w in weights_of.items() for key in slots} | weights(model)


@pytest.mark.dist
def test_a_layer_that_one_process_does_not_use(pool: Pool) -> None:
    alone = route(0, 1)
    for one in pool.run("tests.curvature.test_kfac_factors:route", 2):
        for key, x in alone.items():
            torch.testing.assert_close(one[key], x, rtol=1e-6, atol=1e-9)
