"""Steps within the backward pass: the same weights as ordinary steps, without the gradients' memory."""

from __future__ import annotations

import copy
import gc
import io
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.nn import Parameter
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.checkpoint import checkpoint

from lightning_optim import LOMO, AdamW, Lion, Muon, RuleOptimizer, build_optimizer
from lightning_optim.core.rule import REGISTRY
from lightning_optim.diagnostics.memory import LiveStorages
from tests.helpers.pool import Pool
from tests.helpers.rules import NAMES, give, make, params

FUSABLE = [n for n in NAMES if not REGISTRY[n].curvature_input]
LOW_RANK = ("alice", "apollo", "fira", "galore", "galore_adafactor")
"""Rules with layer-by-layer updates in Gong et al. 2025 (arXiv:2502.07752, appendix F.6) or in Transformers."""


def alone(name: str) -> dict[str, Any]:
    """Settings under which a rule's refreshes hang on no other parameter; there are some in six steps."""
    settings: dict[str, Any] = {"refresh": "fixed:2"} if REGISTRY[name].preconditioners else {}
    return settings | ({"rank": 4} if name in LOW_RANK else {}) | ({"leading": 2} if name == "alice" else {})


class Net(nn.Module):
    """An embedding tied to the head, a norm and two layers."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 6)
        self.norm, self.up, self.down = nn.LayerNorm(6), nn.Linear(6, 9), nn.Linear(9, 6)
        self.to(dtype)

    def loss(self, t: int) -> Tensor:
        ids = torch.randint(11, (5, 7), generator=torch.Generator().manual_seed(t))
        x = self.embedding(ids)
        logits = (x + self.down(torch.tanh(self.up(self.norm(x))))) @ self.embedding.weight.T
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids.roll(1, 1).flatten())


def train(
    net: Net, optimizer: RuleOptimizer, steps: range = range(1, 6), *, two_pass: bool = False, schedule: bool = True
) -> Net:
    """Steps with a learning rate that changes."""
    scheduler = LambdaLR(optimizer, lambda t: 1 / (1 + t)) if schedule else None
    for t in steps:
        optimizer.zero_grad()
        loss = net.loss(t)
        if two_pass:
            with optimizer.fuse_backward().norm_pass():
                loss.backward(retain_graph=True)
        loss.backward()
        if optimizer.fused:
            assert all(p.grad is None for g in optimizer.param_groups for p in g["params"])
        optimizer.step()
        if scheduler:
            scheduler.step()
    return net


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FUSABLE)
def test_weights_are_those_of_ordinary_steps(name: str, dtype: torch.dtype) -> None:
    nets = Net(dtype), Net(dtype)
    optimizers = [
        build_optimizer(n, name, lr=1e-2, weight_decay=0.1, fused_backward=f, **alone(name))
        for n, f in zip(nets, (False, True), strict=True)
    ]
    for net, optimizer in zip(nets, optimizers, strict=True):
        train(net, optimizer)
    assert same(*nets) and not same(nets[0], Net(dtype))
    assert optimizers[0].state_dict()["state"].keys() == optimizers[1].state_dict()["state"].keys()


def measured(name: str, *, fused: bool) -> dict[str, float]:
    """Bytes over those of all gradients in the second step of a deep model, whose first makes the state."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12)))
    size = sum(p.nbytes for p in model.parameters())
    optimizer = build_optimizer(model, name, lr=1e-3, fused_backward=fused, **alone(name))
    x, alive = torch.randn(4, 64), [0]
    model(x).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    loss = model(x).square().mean()
    for p in model.parameters():
        p.register_hook(lambda _: alive.append(sum(q.grad is not None for q in model.parameters())))
    gc.collect()
    with LiveStorages() as live:
        loss.backward()
        after = live.current
        optimizer.step()
    return {"alive": max(alive), "after": after / size, "peak": live.peak / size}


@pytest.mark.parametrize("name", ["lomo", "adalomo", "muon", "galore"])
def test_gradients_are_freed_one_by_one(name: str) -> None:
    """Ordinary: all gradients at once. Fused: that of one parameter, and what the rule needs for it."""
    ordinary, fused = measured(name, fused=False), measured(name, fused=True)
    assert ordinary["alive"] == 23 and ordinary["after"] >= 1 and ordinary["peak"] >= 1
    assert fused["alive"] == 0 and fused["after"] <= 0.02
    assert fused["peak"] <= {"lomo": 0.15, "adalomo": 0.3, "muon": 0.5, "galore": 0.5}[name]


@pytest.mark.parametrize("name", ["lomo", "adalomo", "muon"])
def test_two_passes_clip_as_ordinary_steps_do(name: str) -> None:
    nets, bound = (Net(), Net()), 0.05
    for net, fused in zip(nets, (False, True), strict=True):
        optimizer = build_optimizer(net, name, lr=1e-2, clip_norm=bound, fused_backward=fused)
        train(net, optimizer, two_pass=fused)
    free = train(Net(), build_optimizer(Net(), name, lr=1e-2))
    assert not same(nets[0], free)
    for a, b in zip(*(n.parameters() for n in nets), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_one_pass_clips_by_the_norm_before_or_the_own() -> None:
    a, b = Parameter(torch.zeros(2)), Parameter(torch.zeros(2))
    optimizer = LOMO([a, b], lr=1.0, clip_norm=1.0)
    optimizer.fuse_backward()

    def step(ga: list[float], gb: list[float]) -> list[float]:
        with torch.no_grad():
            a.zero_()
            b.zero_()
        (a @ torch.tensor(ga) + b @ torch.tensor(gb)).backward()
        optimizer.step()
        return [round(-x, 4) for x in (a[0].item(), b[1].item())]

    assert step([3.0, 0.0], [0.0, 0.5]) == [1.0, 0.5], "the first step knows no norm but each gradient's own"
    assert optimizer.param_groups[0]["previous_norm"] == pytest.approx(math.hypot(3, 0.5))
    assert step([3.0, 0.0], [0.0, 0.5]) == [round(3 / math.hypot(3, 0.5), 4), round(0.5 / math.hypot(3, 0.5), 4)]
    assert step([30.0, 0.0], [0.0, 0.5])[0] == 1.0, "a jump does not get through"
    restored = LOMO([a, b], lr=1.0)
    restored.load_state_dict(optimizer.state_dict())
    assert restored.param_groups[0]["previous_norm"] == pytest.approx(math.hypot(30, 0.5))


def test_a_parameter_without_dimensions_is_clipped() -> None:
    p = Parameter(torch.tensor(1.0))
    optimizer = LOMO([p], lr=0.5, clip_norm=1.0)
    optimizer.fuse_backward()
    (p * 4).backward()
    optimizer.step()
    assert p.item() == pytest.approx(0.5, abs=1e-5)


def test_gradients_that_share_memory_are_clipped_once() -> None:
    a, b = Parameter(torch.zeros(2, 2)), Parameter(torch.zeros(4))
    optimizer = LOMO([a, b], lr=1.0, clip_norm=1.0)
    with optimizer.fuse_backward().norm_pass():
        (a.view(-1) + b.view(-1)).backward(torch.full((4,), 2.0))
    (a.view(-1) + b.view(-1)).backward(torch.full((4,), 2.0))
    torch.testing.assert_close(a.view(-1), torch.full((4,), -(0.125**0.5)))
    assert torch.equal(a.view(-1), b)


@pytest.mark.parametrize("storage", ["bf16", "int8"])
def test_state_may_rest_in_any_form(storage: Any) -> None:
    nets = Net(), Net()
    for net, fused in zip(nets, (False, True), strict=True):
        settings: dict[str, Any] = {"state_storage": storage, "storage_min": 0}
        train(net, build_optimizer(net, "adamw", lr=1e-2, fused_backward=fused, **settings))
    assert same(*nets)


def test_a_norm_pass_tells_the_norms_and_steps_nothing() -> None:
    net = Net()
    optimizer = build_optimizer(net, "muon", lr=1e-2, fused_backward=True)
    with optimizer.fuse_backward().norm_pass() as norms:
        net.loss(1).backward()
    assert same(net, Net()) and all(p.grad is None for p in net.parameters()) and not optimizer.state
    other = Net()
    other.loss(1).backward()
    grads = dict(other.named_parameters())
    for group in optimizer.param_groups:
        exact = math.hypot(*(float(grads[n].grad.norm()) for n in group["param_names"]))  # pyright: ignore
        assert norms[group["name"]] == pytest.approx(exact)


def test_accumulation_is_refused() -> None:
    net = Net()
    optimizer = build_optimizer(net, "lion", lr=1e-2, fused_backward=True)
    net.loss(1).backward()
    with pytest.raises(RuntimeError, match="gradient_accumulation_steps=1"):
        net.loss(2).backward()
    optimizer.zero_grad()
    optimizer.step()
    net.loss(2).backward()


def test_a_checkpointed_model_steps_once() -> None:
    nets = Net(), Net()
    for net, fused in zip(nets, (False, True), strict=True):
        optimizer = build_optimizer(net, "lion", lr=1e-2, fused_backward=fused)
        loss: Any = checkpoint(net.loss, 1, use_reentrant=False)
        loss.backward()
        optimizer.step()
    assert same(*nets)


@pytest.mark.parametrize("unscale", [False, True])
def test_grad_scaler_is_refused(unscale: bool) -> None:
    net = Net()
    optimizer = build_optimizer(net, "lion", lr=1e-2, fused_backward=True)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(net.loss(1)).backward()
    if unscale:
        scaler.unscale_(optimizer)
    with pytest.raises(RuntimeError, match="no GradScaler"):
        scaler.step(optimizer)
    net.zero_grad()
    ordinary = build_optimizer(net, "lion", lr=1e-2, fused_backward=True)
    assert ordinary.fused
    ordinary.fused.close()
    scaler.scale(net.loss(1)).backward()
    scaler.step(ordinary)


def test_non_finite_gradients_stop_before_their_parameter() -> None:
    net = Net()
    optimizer = build_optimizer(net, "muon", lr=1e-2, on_nonfinite="raise", fused_backward=True)
    net.up.weight.register_hook(lambda g: g * math.nan)
    before = net.up.weight.clone()
    with pytest.raises(FloatingPointError, match=r"up.weight; it was not updated"):
        net.loss(1).backward()
    assert torch.equal(net.up.weight, before) and not torch.equal(net.down.weight, Net().down.weight)
    again = Net()
    optimizer = build_optimizer(again, "lion", lr=1e-2, on_nonfinite="raise", fused_backward=True)
    again.up.weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(FloatingPointError, match="nothing was updated"), optimizer.fuse_backward().norm_pass():
        again.loss(1).backward()
    assert same(again, Net())


@pytest.mark.parametrize("name", LOW_RANK)
def test_low_rank_rules_resume_between_two_refreshes(name: str) -> None:
    settings = alone(name) | {"lr": 1e-2, "fused_backward": True, "refresh": "any(fixed:4, fixed:6)"}
    whole, net, again = Net(), Net(), Net()
    train(whole, build_optimizer(whole, name, **settings), range(1, 9), schedule=False)
    first, second = build_optimizer(net, name, **settings), build_optimizer(again, name, **settings)
    train(net, first, range(1, 4), schedule=False)
    again.load_state_dict(net.state_dict())
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    assert same(train(again, second, range(4, 9), schedule=False), whole)


REFUSED: dict[str, Callable[[Net], Any]] = {
    "spreads refreshes over all": lambda net: build_optimizer(net, "soap", lr=1e-2, fused_backward=True),
    "cannot skip a step": lambda net: build_optimizer(net, "lion", lr=1e-2, on_nonfinite="skip", fused_backward=True),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_is_refused_at_construction(message: str) -> None:
    net = Net()
    with pytest.raises(ValueError, match=message):
        REFUSED[message](net)
    train(net, build_optimizer(net, "lion", lr=1e-2))


def test_groups_that_join_and_parameters_that_thaw() -> None:
    nets = Net(), Net()
    for net, fused in zip(nets, (False, True), strict=True):
        net.down.requires_grad_(False)
        rest = {id(p) for p in net.norm.parameters()}
        optimizer = Lion([p for p in net.parameters() if id(p) not in rest], lr=1e-2)
        if fused:
            optimizer.fuse_backward()
            with pytest.raises(ValueError, match="cannot skip a step"):
                optimizer.add_param_group({"params": [Parameter(torch.zeros(2))], "on_nonfinite": "skip"})
        train(net, optimizer, range(1, 3), schedule=False)
        net.down.requires_grad_(True)
        optimizer.add_param_group({"params": list(net.norm.parameters())})
        net.zero_grad()
        net.loss(3).backward()
        assert (net.norm.weight.grad is None) == fused
        optimizer.step()
        optimizer.zero_grad()
        train(net, optimizer, range(4, 6), schedule=False)
    assert same(*nets)


def test_given_gradients_and_closures() -> None:
    a, b = params("adamw"), params("adamw")
    ordinary, fused = make("adamw", a), make("adamw", b)
    fused.fuse_backward()
    for t in range(1, 4):
        for ps, optimizer in ((a, ordinary), (b, fused)):
            give(ps, t)
            optimizer.step()
    assert all(torch.equal(a[k], b[k]) for k in a)
    net = Net()
    optimizer = build_optimizer(net, "lion", lr=1e-2, fused_backward=True)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = net.loss(1)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(Net().loss(1).item())
    other = Net()
    assert same(net, train(other, build_optimizer(other, "lion", lr=1e-2), range(1, 2)))


def test_resume_copies_and_close() -> None:
    whole = Net()
    train(whole, build_optimizer(whole, "adamw", lr=1e-2, fused_backward=True), schedule=False)
    net = Net()
    first = build_optimizer(net, "adamw", lr=1e-2, fused_backward=True)
    train(net, first, range(1, 3), schedule=False)
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = build_optimizer(net, "adamw", lr=1e-2, fused_backward=True)  # takes over
    second.load_state_dict(torch.load(file, weights_only=True))
    train(net, second, range(3, 5), schedule=False)
    assert second.fused
    second.fused.close()
    twin = copy.deepcopy(net)
    net.loss(5).backward()
    assert net.up.weight.grad is not None and same(net, twin)
    second.step()
    assert same(net, whole)
    assert copy.deepcopy(build_optimizer(net, "lion", lr=1.0, fused_backward=True)).fused is None


def test_dcp_dummy_step_only_materialises() -> None:
    net = Net()
    optimizer = AdamW(net.named_parameters(), lr=1e-2)
    optimizer.fuse_backward()
    saved: Any = get_optimizer_state_dict(net, optimizer)
    assert all(int(s["step"]) == 0 for s in saved["state"].values())
    other = Net()
    assert same(train(net, optimizer), train(other, AdamW(other.parameters(), lr=1e-2)))


@pytest.mark.dist
@pytest.mark.parametrize("name", ["lion", "adalomo"])
def test_fsdp2_equals_ordinary_steps(pool: Pool, name: str) -> None:
    for fused, ordinary in pool.run("tests.helpers.jobs:fused_backward", 2, name=name):
        for key, value in fused.items():
            assert torch.equal(value, ordinary[key]), key


@pytest.mark.dist
def test_ddp_and_sharded_matrices_are_refused(pool: Pool) -> None:
    for ddp, matrices in pool.run("tests.helpers.jobs:refused_in_fused_backward", 2):
        assert "reduces its gradient" in ddp and "nothing was updated" in ddp
        assert "exchanged together" in matrices
    Muon([Parameter(torch.zeros(2, 2))]).fuse_backward()
