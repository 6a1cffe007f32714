"""Look-ahead, averages and the outer optimizer: their formulas, train() and eval(), checkpoints, and the trainers."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import Parameter

from hf_integration import Consolidate, KeepSchedule
from lightning_optim import EMANesterov, MuLoCo, RuleOptimizer, TailEMA, build_optimizer, lightning, plan
from lightning_optim.callbacks import AveragedWeights
from tests.helpers import jobs
from tests.helpers.pool import Pool
from tests.helpers.rules import assert_equal, give, gradient, make, params, run
from tests.test_lightning import Net, Rows, trainer

ALL = [(EMANesterov(0.5, 0.9, start=2, stop=7), TailEMA(start=3, tau=4.0)), (MuLoCo(every=3), TailEMA(start=2))]
each = pytest.mark.parametrize("members", ALL, ids=["ahead", "outer"])


def quadratic(p: Parameter, target: Tensor) -> Tensor:
    return 0.5 * (p - target).square().sum()


def problem() -> tuple[Parameter, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return Parameter(torch.randn(4, 5, generator=draw).double()), torch.randn(4, 5, generator=draw).double()


def trained(members: tuple[Any, ...], steps: int, *, closure: bool, **settings: Any) -> tuple[Parameter, RuleOptimizer]:
    p, target = problem()
    optimizer = make("sgd", [p], lr=0.1, momentum=0.5, **settings)
    optimizer = optimizer.with_averaging(*members) if members else optimizer

    def compute() -> Tensor:
        optimizer.zero_grad()
        loss = quadratic(p, target)
        loss.backward()
        return loss

    for _ in range(steps):
        if closure:
            optimizer.step(compute)
        else:
            compute()
            optimizer.step()
    return p, optimizer


def sgd(w: Tensor, g: Tensor, state: dict[str, Tensor]) -> Tensor:
    state["m"] = 0.5 * state["m"] + g if "m" in state else g
    return w - 0.1 * state["m"]


@pytest.mark.parametrize("closure", [True, False])
def test_ema_nesterov_is_its_formula(closure: bool) -> None:
    p, optimizer = trained((EMANesterov(0.3, 0.9, start=2, stop=6),), 9, closure=closure)
    w, target = problem()
    w, before, b, state = w.detach(), w.detach(), torch.zeros(4, 5).double(), {}
    for t in range(9):
        if 2 <= t < 6:
            w = w + 0.3 * b
        w = sgd(w, w - target, state)
        b, before = 0.9 * b + 0.1 * (w - before), w
    optimizer.eval()
    torch.testing.assert_close(p.detach(), w)


def test_tail_ema_is_its_formula() -> None:
    p, optimizer = trained((TailEMA(start=3, tau=4.0, weight=0.6),), 8, closure=False)
    w, target = problem()
    w, mean, state = w.detach(), None, {}
    for t in range(8):
        w = sgd(w, w - target, state)
        if t >= 3:
            mean = w if mean is None else mean + (w - mean) / 4
    torch.testing.assert_close(p.detach(), w)
    optimizer.eval()
    assert mean is not None
    torch.testing.assert_close(p.detach(), 0.4 * w + 0.6 * mean)
    optimizer.train()
    torch.testing.assert_close(p.detach(), w)


def test_muloco_is_its_formula() -> None:
    p, _ = trained((MuLoCo(every=3, lr=0.7, momentum=0.5),), 9, closure=False)
    w, target = problem()
    w, state = w.detach(), {}
    snapshot, u = w, torch.zeros(4, 5).double()
    for t in range(9):
        w = sgd(w, w - target, state)
        if t % 3 == 2:
            way = snapshot - w
            u = 0.5 * u + 0.7 * way
            w = snapshot = snapshot - 0.5 * u - 0.7 * way
    torch.testing.assert_close(p.detach(), w)


def test_muloco_that_does_nothing_is_the_inner_optimizer() -> None:
    p, _ = trained((MuLoCo(every=2, lr=1.0, momentum=0.0),), 7, closure=False)
    alone, _ = trained((), 7, closure=False)
    torch.testing.assert_close(p, alone, rtol=1e-13, atol=1e-14)


@pytest.mark.parametrize("closure", [True, False])
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
def test_ema_nesterov_that_does_nothing_is_the_inner_optimizer_bit_for_bit(name: str, closure: bool) -> None:
    ps, alone = params(name), params(name)
    optimizer = make(name, ps).with_averaging(EMANesterov(step_size=0.0, start=1))
    for t in range(1, 6):
        give(ps, t)
        optimizer.step((lambda: 0.0) if closure else None)
    run(name, alone, range(1, 6))
    assert_equal(alone, ps)


@each
@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor"])
@pytest.mark.parametrize("shown", [True, False], ids=["saved in eval", "saved in train"])
def test_save_load_continue_is_bitwise(name: str, members: tuple[Any, ...], shown: bool) -> None:
    """Whichever weights the model was saved with."""
    whole, ps = params(name), params(name)
    straight = run(name, whole, range(1, 10), make(name, whole).with_averaging(*members))
    first = run(name, ps, range(1, 6), make(name, ps).with_averaging(*members))
    if shown:
        first.eval()
    file = io.BytesIO()
    torch.save({"optimizer": first.state_dict(), "params": {k: p.detach() for k, p in ps.items()}}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = {k: Parameter(v) for k, v in saved["params"].items()}
    second = make(name, resumed).with_averaging(*members)
    second.load_state_dict(saved["optimizer"])
    second.train()
    run(name, resumed, range(6, 10), second)
    assert_equal(whole, resumed)
    for optimizer in (straight, second):
        optimizer.eval()
    assert_equal(whole, resumed)


@each
def test_eval_and_train_leave_the_run_as_it_is(members: tuple[Any, ...]) -> None:
    plain, watched = params("adamw"), params("adamw")
    run("adamw", plain, range(1, 9), make("adamw", plain).with_averaging(*members))
    optimizer = make("adamw", watched).with_averaging(*members)
    optimizer.eval()
    for t in range(1, 9):
        optimizer.train()
        run("adamw", watched, range(t, t + 1), optimizer)
        before = {k: Parameter(p.detach().clone()) for k, p in watched.items()}
        with torch.inference_mode():
            optimizer.eval()
        optimizer.eval()
        assert t < 6 or not torch.equal(before["wide"], watched["wide"])
    optimizer.train()
    assert_equal(plain, watched)


def test_embeddings_are_not_averaged() -> None:
    model = nn.Sequential(nn.Embedding(6, 4), nn.Linear(4, 4))
    optimizer = build_optimizer(model, "adamw", lr=0.1, averaging={"tail_ema": {"start": 0, "tau": 5.0}})
    for t in range(3):
        for key, p in model.named_parameters():
            p.grad = gradient(p, key, t)
        optimizer.step()
    before = {k: p.detach().clone() for k, p in model.named_parameters()}
    optimizer.eval()
    same = {k: torch.equal(before[k], p) for k, p in model.named_parameters()}
    assert same == {"0.weight": True, "1.weight": False, "1.bias": False}


def test_a_share_of_the_run_needs_its_length() -> None:
    p, target = problem()
    optimizer = make("sgd", [p], lr=0.1).with_averaging(TailEMA(start=0.5, tau=2.0))
    p.grad, before = p.detach() - target, p.detach().clone()
    with pytest.raises(RuntimeError, match=r"set optimizer\.total_steps, give ScheduleLR total_steps"):
        optimizer.step()
    assert torch.equal(before, p)
    optimizer.total_steps = 8
    for _ in range(8):
        p.grad = p.detach() - target
        optimizer.step()
    assert optimizer.param_groups[0]["average_count"] == 4


def test_a_step_that_is_left_out_moves_nothing() -> None:
    ps = params("adamw")
    optimizer = make("adamw", ps, on_nonfinite="skip").with_averaging(EMANesterov(0.5, 0.9, start=1))
    run("adamw", ps, range(1, 5), optimizer)
    before = {k: Parameter(p.detach().clone()) for k, p in ps.items()}
    for closure in (None, lambda: 0.0):
        give(ps, 5)
        ps["wide"].grad[0, 0] = float("nan")  # pyright: ignore[reportOptionalSubscript]
        optimizer.step(closure)
        optimizer.eval()
        optimizer.train()
    optimizer.eval()
    shown = {k: Parameter(p.detach().clone()) for k, p in ps.items()}
    optimizer.train()
    assert optimizer.param_groups[0]["average_step"] == 4
    other = params("adamw")
    twin = run(
        "adamw",
        other,
        range(1, 5),
        make("adamw", other, on_nonfinite="skip").with_averaging(EMANesterov(0.5, 0.9, start=1)),
    )
    assert_equal(before, other)
    twin.eval()
    assert_equal(shown, other)


def test_fused_backward_steps_are_the_same() -> None:
    results = []
    for fused in (True, False):
        p = Parameter(torch.ones(4, 5))
        optimizer = make("adamw", [p], lr=0.1).with_averaging(EMANesterov(0.5, 0.9, start=1), TailEMA(start=2))
        if fused:
            optimizer.fuse_backward()
        for t in range(1, 6):
            (p.square() * gradient(p, "x", t)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        optimizer.eval()
        results.append(p.detach().clone())
    assert torch.equal(*results)


def test_a_group_that_joins_is_averaged_too() -> None:
    p, late = Parameter(torch.ones(4, 5)), Parameter(torch.ones(5))
    optimizer = make("adamw", [p], lr=0.1).with_averaging(TailEMA(start=0))
    for t in range(1, 5):
        if t == 2:
            optimizer.add_param_group({"params": [late]})
        for key, x in (("p", p), ("late", late)):
            x.grad = gradient(x, key, t)
        optimizer.step()
    before = late.detach().clone()
    optimizer.eval()
    assert not torch.equal(before, late)


@pytest.mark.parametrize("members", [(TailEMA(start=0),), (EMANesterov(0.5, 0.9, start=0),), (MuLoCo(every=2),)])
def test_a_resized_parameter_is_refused_before_weights_move(members: Any) -> None:
    """Also of a rule without state of its own, where only the averages know the old shape."""
    p, other = Parameter(torch.ones(4, 5)), Parameter(torch.ones(5))
    optimizer = make("sgd", [p, other], lr=0.1, momentum=0.0).with_averaging(*members)
    for t in range(1, 6):
        for key, x in (("p", p), ("other", other)):
            x.grad = gradient(x, key, t)
        if t == 4:
            p.data = torch.zeros(6, 5)
            before, state = other.detach().clone(), {k: x.clone() for k, x in optimizer.state[other].items()}
            p.grad = torch.ones(6, 5)
            for call in (optimizer.step, lambda: optimizer.step(lambda: 1.0), optimizer.eval, optimizer.state_dict):
                with pytest.raises(RuntimeError, match=r"parameter 0 has shape \(6, 5\).* has \(4, 5\)"):
                    call()
            assert torch.equal(before, other) and optimizer.param_groups[0]["train_mode"]
            assert all(torch.equal(optimizer.state[other][k], x) for k, x in state.items())
            optimizer.state.pop(p)
        optimizer.step()
    optimizer.eval()
    optimizer.train()
    assert p.isfinite().all() and p.shape == (6, 5)


def test_what_cannot_be_is_named() -> None:
    narrow = Parameter(torch.ones(4, 5).bfloat16())
    with pytest.raises(ValueError, match="parameter 0 of group 'adamw': ema_nesterov moves weights by less than"):
        make("adamw", [narrow]).with_averaging(EMANesterov())
    with pytest.raises(ValueError, match="do not go together"):
        make("adamw", params("adamw")).with_averaging(EMANesterov(), MuLoCo())
    with pytest.raises(ValueError, match="tail_ema: tau must be"):
        TailEMA(tau=-1.0)
    wrapped = make("adamw", params("adamw")).with_averaging(TailEMA())
    with pytest.raises(ValueError, match="one call"):
        wrapped.with_averaging(MuLoCo())
    run("adamw", ps := params("adamw"), range(1, 3), wrapped := make("adamw", ps).with_averaging(TailEMA()))
    with pytest.raises(ValueError, match="give this one the same averaging"):
        make("adamw", params("adamw")).load_state_dict(wrapped.state_dict())
    wrapped.eval()
    saved = wrapped.state_dict()
    cut = {i: {k: v for k, v in slots.items() if k != "train_weight"} for i, slots in saved["state"].items()}
    with pytest.raises(ValueError, match=r"made after optimizer.eval\(\)"):
        make("adamw", params("adamw")).with_averaging(TailEMA()).load_state_dict({**saved, "state": cut})
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        wrapped.step()
    model = nn.Linear(3, 3)
    with pytest.raises(ValueError, match="unknown name 'tail_emma'.*tail_ema"):
        build_optimizer(model, "adamw", lr=0.1, averaging={"tail_emma": {}})
    with pytest.raises(ValueError, match="tail_ema has no setting 'taw'.*tau"):
        build_optimizer(model, "adamw", lr=0.1, averaging={"tail_ema": {"taw": 3}})


def test_bfloat16_weights_have_a_float32_average() -> None:
    p = Parameter(torch.ones(4, 5).bfloat16())
    optimizer = make("adamw", [p], lr=0.01).with_averaging(TailEMA(start=0, tau=100.0))
    for t in range(1, 4):
        p.grad = gradient(p, "x", t)
        optimizer.step()
    assert optimizer.state[p]["tail"].dtype == torch.float32
    before = p.detach().clone()
    optimizer.eval()
    optimizer.train()
    assert torch.equal(before, p)


def test_plan_prices_the_averages() -> None:
    model = nn.Sequential(nn.Linear(6, 4, bias=False))
    actual = plan(model, "muon", lr=0.1, averaging={"muloco": {}, "tail_ema": {}}).rows[0].state_bytes
    assert {k: actual[k] for k in ("outer_momentum", "outer_anchor", "tail")} == dict.fromkeys(
        ("outer_momentum", "outer_anchor", "tail"), 96
    )
    narrow = plan(model.bfloat16(), "muon", lr=0.1, constraint="hyperball").rows[0].state_bytes
    assert narrow["radius"] == 4


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_two_ranks_and_a_checkpoint_of_theirs_on_one(pool: Pool, name: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    actual = pool.run("tests.helpers.jobs:averaged", 2, name=name, folder=folder, members=ALL[0])
    model = jobs.Model(name)
    torch.set_num_threads(1)
    optimizer = make(name, model.parameters()).with_averaging(*ALL[0])
    jobs.take_steps(model, optimizer, range(1, 9))
    optimizer.eval()
    straight = jobs.weights(model)
    other = jobs.Model(name)
    resumed = make(name, other.parameters()).with_averaging(*ALL[0])
    jobs.load_into(other, resumed, folder)
    jobs.take_steps(other, resumed, range(5, 9))
    resumed.eval()
    torch.set_num_threads(2)
    for weights in (*actual, jobs.weights(other)):
        for key, p in straight.items():
            torch.testing.assert_close(weights[key], p, rtol=1e-6, atol=1e-6)


def saved_by_one(rank: int, world: int) -> list[dict[str, Tensor]]:
    """Shared work, collected before the averaged weights are there: the training weights, and those loaded."""
    model = jobs.Model("muon")
    optimizer, fresh = (make("muon", model.parameters()).with_averaging(TailEMA(start=0)) for _ in range(2))
    optimizer.shard_work()
    jobs.take_steps(model, optimizer, range(1, 4))
    trained = {k: p.clone() for k, p in jobs.weights(model).items()}
    optimizer.consolidate()
    optimizer.eval()
    box: list[Any] = [optimizer.state_dict() if rank == 0 else None]
    dist.broadcast_object_list(box, 0)
    fresh.shard_work()
    fresh.load_state_dict(box[0])
    fresh.train()
    return [trained, jobs.weights(model)]


@pytest.mark.dist
def test_what_is_collected_before_eval_has_the_weights_to_train(pool: Pool) -> None:
    for trained, loaded in pool.run("tests.core.step.test_weight_averaging:saved_by_one", 2):
        for key, p in trained.items():
            assert torch.equal(p, loaded[key]), key


def test_a_checkpoint_that_lacks_some_weights_to_train_is_refused() -> None:
    ps = params("adamw")
    optimizer = run("adamw", ps, range(1, 3), make("adamw", ps).with_averaging(TailEMA()))
    optimizer.eval()
    saved = optimizer.state_dict()
    del saved["state"][1]["train_weight"]
    with pytest.raises(ValueError, match=r"made after optimizer.eval\(\)"):
        make("adamw", params("adamw")).with_averaging(TailEMA()).load_state_dict(saved)


@pytest.mark.parametrize("member", [EMANesterov(), MuLoCo()])
def test_a_rule_that_keeps_the_weights_is_not_moved(member: Any) -> None:
    with pytest.raises(ValueError, match="group 'muown': muown keeps .* give it tail_ema only"):
        make("muown", [Parameter(torch.ones(4, 5))]).with_averaging(member)
    make("muown", [Parameter(torch.ones(4, 5))]).with_averaging(TailEMA())


@pytest.mark.parametrize("loaded", [True, False])
def test_the_best_weights_that_a_trainer_loads_stay(loaded: bool) -> None:
    """After `load_best_model_at_end`, whatever is evaluated next; without a best checkpoint the average is shown."""
    p, optimizer = trained((TailEMA(start=0),), 5, closure=False)
    with torch.no_grad():
        p.zero_()
    args = SimpleNamespace(load_best_model_at_end=True)
    state = SimpleNamespace(best_model_checkpoint="best" if loaded else None)
    KeepSchedule().on_train_end(args, state, None, optimizer=optimizer)
    optimizer.eval()
    assert bool(p.any()) != loaded
    optimizer.train()
    assert not p.any()


@pytest.mark.parametrize("strategy", ["best", "steps"])
def test_shared_state_is_collected_before_a_trainer_knows_the_best(strategy: str) -> None:
    calls: list[str] = []

    class Counted(RuleOptimizer):
        def consolidate(self) -> None:
            calls.append(strategy)

    optimizer = Counted([Parameter(torch.ones(3))], {"rule": "adamw"})
    Consolidate().on_evaluate(SimpleNamespace(save_strategy=strategy), None, None, optimizer=optimizer)
    assert calls == (["best"] if strategy == "best" else [])


def test_what_is_frozen_ahead_or_in_evaluation_comes_back() -> None:
    p, q = (Parameter(torch.ones(4, 5)) for _ in range(2))
    optimizer = make("adamw", [p, q], lr=0.1).with_averaging(EMANesterov(0.5, 0.9, start=1), TailEMA(start=0))
    for t in range(1, 5):
        p.grad, q.grad = gradient(p, "p", t), gradient(q, "q", t)
        optimizer.step()
    anchor, ahead = optimizer.state[q]["anchor"].clone(), q.detach().clone()
    assert not torch.equal(anchor, ahead)
    optimizer.eval()
    q.requires_grad_(False)
    optimizer.train()
    assert torch.equal(q, ahead)
    for t in range(5, 7):
        p.grad, q.grad = gradient(p, "p", t), None
        optimizer.step()
        assert torch.equal(q, anchor)
    optimizer.eval()
    assert torch.equal(q, anchor)


@pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated")
def test_lightning_tells_the_length_of_epochs(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(Net("adamw", averaging={"tail_ema": {"start": 0.5}}), Rows(4))
    optimizer: Any = fit.optimizers[0]
    assert (optimizer.total_steps, optimizer.param_groups[0]["average_count"]) == (8, 4)
    assert lightning.AveragedWeights is AveragedWeights
