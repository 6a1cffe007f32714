"""Diagnostic callbacks with the real trainers of Lightning and Transformers: tags read back, training untouched."""

from __future__ import annotations

import copy
import inspect
import math
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.custom_scalar import layout_pb2
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import PreTrainedModel, TrainerCallback, set_seed

import hf_integration
from lightning_optim import callbacks, configure_optimizers
from lightning_optim.callbacks import (
    GradientNoiseScale,
    GradientRank,
    HessianBlocks,
    MemoryLogger,
    OptimizerHealth,
    PreconditionerRefresh,
    diagnostics,
)
from lightning_optim.diagnostics import figures, view
from lightning_optim.diagnostics import memory as memory_of
from lightning_optim.diagnostics.probes import curvature, health, noise, refresh, registry, stubs
from lightning_optim.diagnostics.report import OverheadBudget
from tests.diagnostics.test_diagnostics import Detached, Once
from tests.helpers.lightning_cells import WAYS
from tests.helpers.paths import ROOT
from tests.hf_integration.test_trainer import CONTEXT, VOCABULARY, arguments, llama, one_thread, trainer_of  # noqa: F401
from tests.test_lightning import assert_same, trainer, weights
from tests.test_lightning import pytestmark as lightning_warnings

pytestmark = lightning_warnings

ROLES = ["down_proj", "embedding", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj", "vector"]
EVERY: dict[str, Any] = {"every": 2, "max_overhead": 1e6, "detail": True}
ALWAYS: dict[str, Any] = EVERY | {"every": 1}
CURVATURE: dict[str, Any] = {**EVERY, "probes": 2, "steps": 3, "coupling_probes": 1, "sequences": 1}


class Batches:
    """The same random rows for every trainer, of few tokens, so that their gradients agree."""

    def __init__(self, count: int, rows: int = 4) -> None:
        self.count, self.rows = count, rows

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        made = torch.Generator().manual_seed(0)
        for _ in range(self.count):
            yield torch.randint(8, (self.rows, CONTEXT), generator=made)

    def state_dict(self) -> dict[str, int]:
        return {}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        pass


class Module(L.LightningModule):
    """A tiny LLaMA with dropout, so that a stolen random number shows."""

    def __init__(self, name: str = "soap", dropout: float = 0.0, **settings: Any) -> None:
        super().__init__()
        self.model = llama(dropout=dropout)
        self.name, self.settings = name, settings

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train_loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.name, lr=1e-2, **self.settings)


def fit(folder: Path, module: Module, *this: L.Callback, steps: int = 4, **settings: Any) -> L.Trainer:
    settings = {"max_steps": steps, "gradient_clip_val": 0.5, "log_every_n_steps": 1} | settings
    logger = settings.pop("logger", None) or TensorBoardLogger(folder, name="", version="")
    torch.manual_seed(1)
    made = trainer(folder, logger=logger, callbacks=list(this), **settings)
    rows = steps * settings.get("accumulate_grad_batches", 1)
    made.fit(module, Batches(rows))
    return made


def events(folder: Path) -> EventAccumulator:
    actual = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0, "tensors": 0})
    actual.Reload()
    return actual


def scalars(folder: Path) -> dict[str, list[float]]:
    actual = events(folder)
    return {tag: [e.value for e in actual.Scalars(tag)] for tag in actual.Tags()["scalars"]}


def of(tags: Any, prefix: str) -> set[str]:
    return {tag for tag in tags if tag.startswith(prefix)}


def per_role(prefix: str, roles: list[str] = ROLES) -> set[str]:
    return {f"{prefix}/{role}" for role in roles}


# -- Lightning: one callback at a time --------------------------------------------------------------------------------


def test_health(tmp_path: Path) -> None:
    module = Module("adamw", weight_decay=0.1)
    before = weights(module)
    health = OptimizerHealth(**ALWAYS, image_every=2)
    fit(tmp_path, module, health, steps=3, accumulate_grad_batches=2)
    actual, tags = scalars(tmp_path), events(tmp_path).Tags()
    for kind in ("gradient_rms", "update_rms", "weight_rms", "update_to_weight"):
        assert of(actual, f"health/{kind}/") == per_role(f"health/{kind}")
    assert len(actual["health/gradient_norm"]) == 3 and max(actual["health/gradient_norm"]) <= 0.5 * (1 + 1e-4)
    assert actual["health/clip_rate"] == [1, 1, 1] and actual["health/skipped_steps"] == [0, 0, 0]
    after, name = weights(module), "model.model.embed_tokens.weight"
    assert actual["health/weight_rms/embedding"][-1] == pytest.approx(
        after[name].square().mean().sqrt().item(), rel=1e-5
    )
    assert actual["health/effective_lr"][0] > 0 and "health/update_to_weight_by_layer" in tags["images"]
    assert "health/loss_scale" not in actual
    assert not torch.equal(before[name], after[name])
    assert actual["diagnostics/interval/health"] == [1, 1, 1] and len(of(actual, "health/")) <= 60


def test_updates_are_what_the_weights_moved_by(tmp_path: Path) -> None:
    module = Module("muon")
    before = weights(module)
    fit(tmp_path, module, OptimizerHealth(**ALWAYS), steps=1)
    moved = {k: v - before[k] for k, v in weights(module).items()}
    actual = scalars(tmp_path)
    q = torch.stack([v for k, v in moved.items() if "q_proj" in k])
    start = torch.stack([v for k, v in weights(module).items() if "q_proj" in k])
    assert actual["health/update_rms/q_proj"] == [pytest.approx(q.square().mean().sqrt().item(), rel=1e-5)]
    expected = (q.norm() / start.norm()).item()
    assert actual["health/update_to_weight/q_proj"] == [pytest.approx(expected, rel=1e-5)]


def test_skipped_steps_are_counted(tmp_path: Path) -> None:
    class Broken(Module):
        def on_after_backward(self) -> None:
            if self.trainer.global_step in (1, 2):
                next(self.parameters()).grad.fill_(math.nan)  # pyright: ignore[reportOptionalMemberAccess]

    module = Broken("adamw", on_nonfinite="skip")
    fit(tmp_path, module, OptimizerHealth(**ALWAYS), steps=4, gradient_clip_val=None)
    actual = scalars(tmp_path)
    assert actual["health/skipped_steps"] == [0, 1, 2, 2] and actual["health/nonfinite_steps"] == [0, 1, 2, 2]


def test_ranks(tmp_path: Path) -> None:
    module = Module("muon")
    fit(tmp_path, module, GradientRank(**EVERY), steps=4)
    actual, seen = scalars(tmp_path), events(tmp_path)
    matrices = [r for r in ROLES if r != "vector"]
    assert of(actual, "rank/gradient_rank@90/") == per_role("rank/gradient_rank@90", matrices)
    assert all(1 <= x <= 32 for x in actual["rank/update_stable_rank/q_proj"])
    assert not of(actual, "rank/gradient_captured/")  # muon has no basis: absent
    # the golden band of Newton-Schulz, wide for tiny gradients; bfloat16 products
    assert 0.2 < actual["rank/orthogonality_error"][0] < 0.8 and actual["rank/singular_max"][0] < 1.25
    assert actual["rank/suggested"][0] % 8 == 0
    assert {"rank/gradient_rank@90_by_layer", "rank/stable_rank_by_layer"} <= set(seen.Tags()["images"])
    assert "rank/table/text_summary" in seen.Tags()["tensors"] and len(of(actual, "rank/")) <= 60
    with np.load(tmp_path / "diagnostics" / "rank-0000001.npz") as arrays:
        table, columns, names = arrays["values"], list(arrays["columns"]), list(arrays["names"])
    e = names.index("model.model.layers.0.self_attn.q_proj.weight")
    s = torch.linalg.svdvals(dict(module.named_parameters())[names[e]].detach().double())
    assert table.shape == (len(names), len(columns)) and 1 < table[e, columns.index("weight.stable_rank")] <= 32
    last = np.load(tmp_path / "diagnostics" / "rank-0000003.npz")["values"]
    assert last[e, columns.index("weight.stable_rank")] == pytest.approx(
        (s.square().sum() / s[0] ** 2).item(), rel=1e-5
    )


def test_ranks_know_the_optimizers_basis(tmp_path: Path) -> None:
    fit(tmp_path, Module("soap", refresh="fixed:2"), GradientRank(**EVERY), steps=6)
    actual = scalars(tmp_path)
    captured = actual["rank/gradient_captured/q_proj"]
    assert len(captured) == 3 and all(0 < x <= 1 for x in captured)
    assert all(-0.1 <= x <= 1 + 1e-6 for x in actual["rank/overlap"]) and actual["rank/residual_gap"][-1] >= -1e-6


def test_ranks_refuse_an_unknown_scalar() -> None:
    with pytest.raises(ValueError, match="no scalar 'gradient.size'"):
        GradientRank(scalars=["gradient.size"])
    with pytest.raises(ValueError, match="every >= 1"):
        OptimizerHealth(every=0)


def test_hessian(tmp_path: Path) -> None:
    fit(tmp_path, Module("soap"), HessianBlocks(**{**CURVATURE, "coupling_every": 1}), steps=4)
    actual, seen = scalars(tmp_path), events(tmp_path)
    for kind in ("trace", "lambda_max", "lambda_min", "frobenius"):
        assert of(actual, f"hessian/{kind}/") == per_role(f"hessian/{kind}")
    for tag in ("sharpness_ratio", "curvature_along_update", "model_ratio", "js_shape", "js_scale"):
        assert len(actual[f"hessian/{tag}"]) == 2, tag
    assert all(actual[f"hessian/lambda_min/{r}"] <= actual[f"hessian/lambda_max/{r}"] for r in ROLES)
    assert 0 < actual["hessian/block_diagonal_share"][0] <= 1 and actual["hessian/sharpness"][0] > 0
    assert len(actual["hessian/tau/gate_proj"]) == 1 and 0 < actual["hessian/tau/gate_proj"][0] < 1
    images = set(seen.Tags()["images"])
    assert {"hessian/coupling", "hessian/spectral_density", "hessian/js_distance"} <= images
    assert "hessian/entries/gate_proj" in images and len(of(actual, "hessian/")) <= 60


def test_the_quadratic_model_predicts_a_small_step(tmp_path: Path) -> None:
    class Fixed(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch[:1] * 0 + 3, batch_idx)

    settings = CURVATURE | {"every": 1, "exact": ()}
    fit(tmp_path, Fixed("sgd", lr_convention="native"), HessianBlocks(**settings), steps=2)
    assert scalars(tmp_path)["hessian/model_ratio"] == pytest.approx([1, 1], rel=0.05)


@pytest.mark.parametrize(("kernel", "why"), [(Once, "has no second derivative"), (Detached, "differ from them")])
def test_differences_where_a_kernel_has_no_second_derivative(tmp_path: Path, kernel: Any, why: str) -> None:
    module = Module("adamw")
    module.model.lm_head.register_forward_pre_hook(lambda _, x: (kernel.apply(x[0]),))  # pyright: ignore
    with pytest.warns(UserWarning, match=f"differences of gradients: .*{why}"):
        fit(tmp_path, module, HessianBlocks(**CURVATURE), steps=2)
    assert scalars(tmp_path)["hessian/sharpness"][0] > 0


def test_memory(tmp_path: Path) -> None:
    module = Module("soap")
    fit(tmp_path, module, MemoryLogger(**EVERY), steps=4)
    actual, seen = scalars(tmp_path), events(tmp_path)
    params = sum(p.nbytes for p in module.parameters()) / 2**20
    assert actual["memory/parameters"][0] == pytest.approx(params) == actual["memory/gradients"][0]
    assert actual["memory/state"] == pytest.approx(actual["memory/state_predicted"])
    assert actual["memory/activations"][0] > 0 and actual["memory/temporary"][0] > 0
    assert actual["memory/resident"][0] > params and "memory/table/text_summary" in seen.Tags()["tensors"]
    assert "memory/allocated" not in actual and "memory/checkpoint" not in actual


def test_noise_scale_of_accumulated_batches(tmp_path: Path) -> None:
    """With clipping and a loss that Lightning divides: as computed by hand from whole gradients."""
    module = Module("adamw")
    start = copy.deepcopy(module)
    probe = GradientNoiseScale(**ALWAYS)
    fit(tmp_path, module, probe, steps=1, accumulate_grad_batches=4, gradient_clip_val=0.01)
    gradients = []
    for batch in Batches(4):
        start.zero_grad()
        start.model(input_ids=batch, labels=batch).loss.backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in start.parameters() if p.grad is not None]).double())
    g = torch.stack(gradients)
    small, big = g.square().sum(1).mean(), g.mean(0).square().sum()
    square, trace = (16 * big - 4 * small) / 12, (small - big) / (1 / 4 - 1 / 16)
    actual = scalars(tmp_path)
    assert actual["noise/gradient_square"] == [pytest.approx(square.item(), rel=1e-3)]
    assert actual["noise/trace"] == [pytest.approx(trace.item(), rel=1e-3)]
    assert actual["noise/scale_sequences"] == [pytest.approx((trace / square).item(), rel=1e-3)]
    assert actual["noise/scale_tokens"] == [pytest.approx((trace / square).item() * CONTEXT, rel=1e-3)]
    assert actual["noise/batch_sequences"] == [16]


def test_noise_scale_of_a_single_batch_is_absent(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="needs gradient accumulation or several ranks"):
        fit(tmp_path, Module("adamw"), GradientNoiseScale(**ALWAYS), steps=2)
    assert not of(scalars(tmp_path), "noise/")


@pytest.mark.parametrize("policy", ["fixed:2", "staggered:3", "off_diagonal:0.1:2", "lazy:2", "time_budget:0.5"])
def test_refresh_policies_set_live(tmp_path: Path, policy: str) -> None:
    module, settings = Module("soap"), dict[str, Any](EVERY | {"every": 3})
    made = fit(tmp_path, module, PreconditionerRefresh(policy, **settings), steps=9)
    actual = scalars(tmp_path)
    assert {g["refresh"] for g in made.optimizers[0].param_groups if "refresh" in g} == {policy}
    matrices = sum("proj" in name for name, _ in module.named_parameters())
    assert actual["refresh/count"][0] >= matrices and len(actual["refresh/count"]) == 3
    assert actual["refresh/reason/first"][0] >= matrices and actual["refresh/share_of_step"][0] > 0
    assert all(x >= 0 for x in actual["refresh/staleness_mean"]) and actual["refresh/ms"][0] > 0
    assert actual["refresh/age_max"][-1] >= actual["refresh/age_mean"][-1] >= 1
    if policy == "fixed:2":
        assert actual["refresh/age_max"] == [1, 2, 1] and all(0 <= x <= 1 for x in actual["refresh/drift"])
    assert "refresh/raster" in events(tmp_path).Tags()["images"]


def test_refresh_schedule_changes_the_policy(tmp_path: Path) -> None:
    module = Module("soap")
    settings: dict[str, Any] = EVERY | {"every": 4}
    callback = PreconditionerRefresh("fixed:1", {5: "fixed:100"}, **settings)
    fit(tmp_path, module, callback, steps=8)
    counts = scalars(tmp_path)["refresh/count"]
    assert counts[0] == 4 * counts[0] / 4 and counts[0] > 0 and counts[1] == 0
    with pytest.raises(ValueError, match="no policy 'often'"):
        PreconditionerRefresh("often")


def test_refresh_says_nothing_of_rules_without_costly_state(tmp_path: Path) -> None:
    fit(tmp_path, Module("adamw"), PreconditionerRefresh("fixed:2", **ALWAYS), steps=2)
    assert not of(scalars(tmp_path), "refresh/")


def test_refresh_of_rules_whose_state_tells_no_age_has_no_staleness(tmp_path: Path) -> None:
    fit(tmp_path, Module("flora", rank=2), PreconditionerRefresh(every=1, max_overhead=1e6), steps=2)
    actual = scalars(tmp_path)
    assert actual["refresh/count"][0] > 0 and "refresh/staleness_mean" not in actual


# -- all of them ------------------------------------------------------------------------------------------------------


def everything(kinds: Any, every: int = 2) -> list[Any]:
    often = EVERY | {"every": every}
    return [
        kinds.OptimizerHealth(**often, image_every=1),
        kinds.MemoryLogger(**often),
        kinds.PreconditionerRefresh(**often),
        kinds.GradientRank(**often),
        kinds.GradientNoiseScale(**often),
        kinds.HessianBlocks(**CURVATURE | often, exact=()),
    ]


def with_entries(kinds: Any) -> list[Any]:
    """Every callback that leaves the optimizer as it is, with all that it can do."""
    this = everything(kinds, 6)
    this[-1].probe.exact = "auto"
    return [*this, kinds.RoleTable()]


def kept(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    """Weights, gradients and the optimizer's state, but for what a refresh notes of itself only when asked."""
    this = {f"{k} {what}": t for k, p in model.named_parameters() for what, t in (("", p), ("grad", p.grad))}
    slots = {f"{i} {k}": v for i, s in optimizer.state_dict()["state"].items() for k, v in s.items()}
    actual = {**this, **{k: v for k, v in slots.items() if "refreshed" not in k}}
    return {k: v.detach().clone() for k, v in actual.items() if v is not None}


@pytest.mark.parametrize("name", ["soap", "muon"])
def test_training_is_the_same_with_every_callback(tmp_path: Path, name: str) -> None:
    runs = []
    for watched in (False, True):
        module = Module(name, dropout=0.1)
        made = fit(
            tmp_path / str(watched),
            module,
            *(with_entries(callbacks) if watched else ()),
            steps=20,
            accumulate_grad_batches=2,
        )
        runs.append((kept(module, made.optimizers[0]), torch.rand(2), [m.training for m in module.modules()]))
    (a, random_a, modes_a), (b, random_b, modes_b) = runs
    assert_same(a, b)
    assert torch.equal(random_a, random_b) and modes_a == modes_b
    losses = [scalars(tmp_path / str(x))["train_loss"] for x in (False, True)]
    assert losses[0] == losses[1] and len(losses[0]) == 20


def test_a_resumed_run_continues_the_averages(tmp_path: Path) -> None:
    module = Module("adamw")
    first = GradientNoiseScale(**ALWAYS)
    made = fit(tmp_path / "a", module, first, steps=2, accumulate_grad_batches=2)
    made.save_checkpoint(tmp_path / "last.ckpt")
    second = GradientNoiseScale(**ALWAYS)
    again = trainer(tmp_path / "b", max_steps=3, accumulate_grad_batches=2, callbacks=[second], logger=False)
    again.fit(Module("adamw"), Batches(6), ckpt_path=tmp_path / "last.ckpt")
    assert second.probe.step == 3
    weight = second.probe._average.weight  # pyright: ignore[reportAttributeAccessIssue]
    assert weight == pytest.approx(1 - 0.9**3)


def test_other_loggers_get_the_scalars(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path, name="", version="")
    fit(
        tmp_path,
        Module("adamw"),
        OptimizerHealth(**ALWAYS),
        MemoryLogger(**ALWAYS),
        steps=2,
        logger=logger,
    )
    header = (tmp_path / "metrics.csv").read_text().splitlines()[0].split(",")
    assert {"health/gradient_norm", "memory/parameters"} <= set(header)


def test_a_failed_run_leaves_nothing_behind(tmp_path: Path) -> None:
    class Fails(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            if batch_idx == 3:
                raise ZeroDivisionError
            return super().training_step(batch, batch_idx)

    module = Fails("soap")
    this = everything(callbacks)
    with pytest.raises(ZeroDivisionError):
        fit(tmp_path, module, *this, steps=6, accumulate_grad_batches=2)
    assert all(not c.probe._handles for c in this)
    assert not any(p._backward_hooks for p in module.parameters())
    assert not _get_current_dispatch_mode_stack()


# -- measurements that fail -------------------------------------------------------------------------------------------


class Broken(health.Health):
    """Raises in one of its methods, at the second call."""

    where: str = ""
    calls: int = 0

    def __getattribute__(self, name: str) -> Any:
        value = super().__getattribute__(name)
        if name != Broken.where:
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            Broken.calls += 1
            if Broken.calls > 1:
                raise ZeroDivisionError("broken")
            return value(*args, **kwargs)

        return call


class BrokenHere(callbacks.OptimizerHealth):
    kind = Broken


class BrokenThere(hf_integration.OptimizerHealth):
    kind = Broken


def messages(record: Any, words: str = "stops measuring") -> list[str]:
    return [str(w.message) for w in record if words in str(w.message)]


METHODS = ["before_step", "after_every_step", "measure", "complete", "present", "_adapt_interval", "_before", "_after"]


@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_a_probe_that_raises_is_one_warning(tmp_path: Path, framework: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: str, *this: Any) -> dict[str, Tensor]:
        if framework == "lightning":
            module = Module("adamw", dropout=0.1)
            made = fit(tmp_path / folder, module, *this, steps=4)
            return kept(module, made.optimizers[0])
        model = llama(dropout=0.1)
        return kept(model, hf_run(tmp_path / folder, model, *this, optim="adamw").optimizer)

    expected = run("plain") | {"random": torch.rand(2)}
    kind = BrokenHere if framework == "lightning" else BrokenThere
    for where in METHODS:
        monkeypatch.setattr(Broken, "where", where)
        monkeypatch.setattr(Broken, "calls", 0)
        this = kind(**ALWAYS)
        with pytest.warns(UserWarning) as record:
            actual = run(where, this) | {"random": torch.rand(2)}
        assert_same(actual, expected)
        (text,) = messages(record)
        assert text.startswith(f"{kind.__name__} stops measuring, and training continues") and "broken" in text
        assert "ZeroDivisionError" in text and "test_probes.py" in text and this.probe.stopped
        assert not this.probe._handles


@pytest.mark.parametrize(
    "method",
    [
        "prepare",
        "begin_batch",
        "record_batch",
        "after_forward",
        "after_backward",
        "before_optimizer_step",
        "layout",
        "clear",
    ],
)
def test_whatever_a_framework_calls_may_raise(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **kwargs: Any) -> Any:
        raise ZeroDivisionError("broken")

    module, plain = Module("adamw"), Module("adamw")
    fit(tmp_path / "plain", plain, steps=3)
    for kind in (health.Health, noise.GradientNoiseScale):
        monkeypatch.setattr(kind, method, fails)
    this = [OptimizerHealth(**ALWAYS), GradientNoiseScale(**ALWAYS)]
    with pytest.warns(UserWarning) as record:
        fit(tmp_path / "a", module, *this, steps=3)
    assert_same(weights(module), weights(plain))
    assert len(messages(record, "put everything away" if method == "clear" else "stops measuring")) >= 1
    with pytest.warns(UserWarning) as record:
        hf_run(tmp_path / "b", llama(), hf_integration.OptimizerHealth(**ALWAYS), optim="adamw", max_steps=2)
    assert len(messages(record, "put everything away" if method == "clear" else "stops measuring")) >= 1


def test_a_hook_on_a_gradient_may_raise(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> None:
        raise ZeroDivisionError("broken")

    module, plain = Module("adamw"), Module("adamw")
    fit(tmp_path / "plain", plain, steps=3)
    monkeypatch.setattr(noise.GradientNoiseScale, "_note", fails)
    monkeypatch.setattr(memory_of, "storages", fails)
    with pytest.warns(UserWarning) as record:
        fit(tmp_path / "a", module, GradientNoiseScale(**ALWAYS), MemoryLogger(**ALWAYS), steps=3)
    assert len(messages(record)) == 2
    assert_same(weights(module), weights(plain))
    assert not any(p._backward_hooks for p in module.parameters())
    assert not _get_current_dispatch_mode_stack()


@pytest.mark.parametrize(("call", "method"), [(1, "auto"), (4, "auto"), ("last", "auto"), (7, "difference")])
def test_a_loss_that_fails_in_the_middle(tmp_path: Path, call: Any, method: Any) -> None:
    """The last call is at the weights before the step."""

    def loss(module: Any, batch: Tensor) -> Tensor:
        calls.append(module.model.lm_head.weight.detach().clone())
        for draw in (random.random, np.random.rand, lambda: torch.rand(1)):
            draw()
        if len(calls) == (0 if call == "last" else call) or (call == "last" and not torch.equal(calls[0], calls[-1])):
            module.requires_grad_(False)
            raise ArithmeticError("no loss")
        return module.model(input_ids=batch, labels=batch).loss

    states = []
    calls: list[Tensor] = []
    for this in ([], [HessianBlocks(loss=loss, **CURVATURE | {"method": method, "exact": ()})]):
        random.seed(0)
        np.random.seed(0)
        module = Module("adamw", dropout=0.1)
        if this:
            with pytest.warns(UserWarning, match=r"ArithmeticError: no loss.*Give HessianBlocks\(loss") as record:
                made = fit(tmp_path / "watched", module, *this, steps=5)
            assert len(messages(record)) == 1
        else:
            made = fit(tmp_path / "plain", module, steps=5)
        flags = torch.tensor([m.training for m in module.modules()] + [p.requires_grad for p in module.parameters()])
        drawn = torch.tensor([random.random(), np.random.rand(), float(torch.rand(1))])
        states.append(kept(module, made.optimizers[0]) | {"flags": flags, "random": drawn})
        assert module.model.config._attn_implementation == "sdpa"
    assert_same(*states)


def test_an_interruption_passes(tmp_path: Path) -> None:
    def loss(model: Any, batch: Any) -> Tensor:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hf_run(tmp_path, llama(), hf_integration.HessianBlocks(loss=loss, **CURVATURE), optim="adamw")


@pytest.mark.parametrize("framework", ["lightning", "transformers"])
def test_what_cannot_be_written_is_one_warning(tmp_path: Path, framework: str) -> None:
    class Blocks(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            (hf_folder(tmp_path) / "diagnostics").write_text("in the way")

    with pytest.warns(UserWarning, match="OptimizerHealth stops measuring.*FileExistsError") as record:
        if framework == "lightning":
            (tmp_path / "diagnostics").write_text("in the way")
            fit(tmp_path, Module("adamw"), OptimizerHealth(**ALWAYS, image_every=1), steps=3)
        else:
            this = hf_integration.OptimizerHealth(**ALWAYS, image_every=1)
            assert hf_run(tmp_path, llama(), this, Blocks(), optim="adamw").state.global_step == 4
    assert len(messages(record)) == 1


def test_manual_optimization_needs_a_loss(tmp_path: Path) -> None:
    class Manual(Module):
        calls = 0

        def __init__(self) -> None:
            super().__init__("adamw")
            self.automatic_optimization = False

        def training_step(self, batch: Tensor, batch_idx: int) -> Any:
            self.calls += 1
            optimizer: Any = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(self.model(input_ids=batch, labels=batch).loss)
            optimizer.step()

    module, this = Manual(), HessianBlocks(**CURVATURE)
    with pytest.warns(UserWarning, match=r"manual optimization.*Give HessianBlocks\(loss=") as record:
        fit(tmp_path / "a", module, this, steps=4, gradient_clip_val=None)
    assert len(messages(record)) == 1 and module.calls == 4 and not of(scalars(tmp_path / "a"), "hessian/")
    of_batch: Any = lambda m, batch: m.model(input_ids=batch, labels=batch).loss  # noqa: E731
    this = HessianBlocks(loss=of_batch, **CURVATURE)
    fit(tmp_path / "b", Manual(), this, steps=4, gradient_clip_val=None)
    assert of(scalars(tmp_path / "b"), "hessian/trace")


def test_each_of_several_optimizers_is_watched(tmp_path: Path) -> None:
    watching = [*diagnostics("cheap", 10), *diagnostics("cheap", 10, optimizer=1)]
    assert len({c.state_key for c in watching}) == 4  # each saves a state of its own
    logger = TensorBoardLogger(tmp_path, name="", version="")
    WAYS["GAN"](tmp_path, "muon", watching, logger=logger)
    actual, shown = scalars(tmp_path), charts_of(tmp_path)
    names = {f"{prefix}{name}" for prefix in ("", "optimizer_1/") for name in ("health", "memory", "diagnostics")}
    assert set(shown) == names
    for category in shown.values():
        for title, patterns in category.items():
            assert any(re.fullmatch(p, tag) for p in patterns for tag in actual), title
    rates = [actual[f"{prefix}health/effective_lr"][-1] for prefix in ("", "optimizer_1/")]
    assert rates[1] > 10 * rates[0]  # 1e-2 and 1e-4
    with pytest.raises(ValueError, match=r"OptimizerHealth\(optimizer=2\): the module has 2 optimizer"):
        WAYS["GAN"](tmp_path, "muon", diagnostics("cheap", 10, optimizer=2))


def test_a_policy_is_refused_and_outlives_what_is_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="psgd_kron: .*cannot decide"):
        fit(tmp_path / "a", Module("psgd_kron"), PreconditionerRefresh("staggered:3", {4: "lazy:10"}), steps=2)

    def fails(*args: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(refresh.PreconditionerRefresh, "measure", fails)
    with pytest.warns(UserWarning, match="PreconditionerRefresh stops measuring"):
        made = fit(tmp_path / "b", Module("soap"), PreconditionerRefresh("fixed:1", {3: "fixed:7"}, **ALWAYS), steps=4)
    assert {g["refresh"] for g in made.optimizers[0].param_groups if "refresh" in g} == {"fixed:7"}


def test_a_probe_that_has_failed_saves_and_starts_over(tmp_path: Path) -> None:
    failing: Any = lambda module, batch: 1 / 0  # noqa: E731
    this = HessianBlocks(loss=failing, **CURVATURE)
    with pytest.warns(UserWarning, match="stops measuring"):
        made = fit(tmp_path / "a", Module("adamw"), this, steps=2)
    made.save_checkpoint(tmp_path / "last.ckpt")
    again = HessianBlocks(**CURVATURE)
    logger = TensorBoardLogger(tmp_path / "b", name="")
    fresh = trainer(tmp_path, max_steps=4, callbacks=[again], logger=logger, log_every_n_steps=1)
    fresh.fit(Module("adamw"), Batches(4), ckpt_path=tmp_path / "last.ckpt")
    assert again.probe.measured == 1  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.warns(UserWarning, match="HessianBlocks starts over.*KeyError"):
        again.load_state_dict({"pace": {}, "filled": []})


# -- the registry, presets and what they may cost ----------------------------------------------------------------------


@pytest.mark.parametrize("framework", [callbacks, hf_integration])
def test_callbacks_have_the_signatures_and_docstrings_of_their_probes(framework: Any) -> None:
    for entry in registry.REGISTRY:
        callback = getattr(framework, entry.callback)
        assert entry.callback in framework.__all__ and callback.kind is entry.probe
        parameters, expected = inspect.signature(callback).parameters, inspect.signature(entry.probe).parameters
        more = {"loss"} if entry.probe.needs_loss else set()
        more |= {"optimizer"} if framework is callbacks else set()
        assert set(parameters) - set(expected) == more
        assert list(inspect.signature(callback.__init__).parameters)[1:] == list(parameters)
        assert {k: p.default for k, p in parameters.items() if k not in more} == {
            k: p.default for k, p in expected.items()
        }
        assert not any(isinstance(p.annotation, str) for p in parameters.values())
        assert parameters["every"].default == entry.every
        doc = inspect.getdoc(callback) or ""
        assert doc.startswith(inspect.getdoc(entry.probe) or "-") and all(f"    {name}: " in doc for name in parameters)


def test_the_guide_covers_every_callback_and_its_links_exist() -> None:
    folder = ROOT / "callbacks"
    text = (folder / "README.md").read_text(encoding="utf-8")
    for entry in registry.REGISTRY:
        assert f"| `{entry.callback}` | `{entry.preset}` |" in text and f"## {entry.callback}\n" in text
        (row,) = (line for line in text.splitlines() if line.startswith(f"| `{entry.callback}`"))
        assert f"| {entry.every} |" in row and row.endswith(f", {entry.budget:.1%} |".replace("%", " %"))
    links = re.findall(r"\]\((\S+?)(?:#\S*)?\)", text)
    assert len(links) > 8 and all((folder / link).exists() for link in links)


@pytest.mark.parametrize("module", stubs.MODULES)
def test_the_stubs_of_the_callbacks_are_up_to_date(module: str) -> None:
    path = Path(str(sys.modules[module].__file__)).with_suffix(".pyi")
    assert path.read_text() == stubs.stub(module), "run python -m lightning_optim.diagnostics.probes.stubs"


@pytest.mark.parametrize(("name", "limit"), [("cheap", 0.01), ("matrix", 0.03), ("curvature", 0.05)])
def test_presets(name: str, limit: float) -> None:
    for made in (diagnostics(name), hf_integration.diagnostics(name)):
        assert limit / 2 < sum(c.probe.budget.limit for c in made) <= limit * (1 + 1e-9)
    short = {c.probe.name: c.probe.budget.every for c in diagnostics(name, 120)}
    assert short.get("hessian", 10) == 10 and short["health"] == 10
    with pytest.raises(ValueError, match="did you mean 'cheap'"):
        diagnostics("cheep")


@pytest.mark.parametrize(
    ("name", "optim"),
    [
        pytest.param(name, optim, marks=() if (name, optim) == ("curvature", "muon") else pytest.mark.slow)
        for name in ("cheap", "matrix", "curvature")
        for optim in ("soap", "muon")
    ],
)
def test_presets_have_few_tags(tmp_path: Path, name: str, optim: str) -> None:
    """At most 60, and so with as many roles as there can be, a loss scale and all of CUDA's memory tags, too."""
    settings: dict[str, Any] = {"max_steps": 24, "gradient_accumulation_steps": 2, "max_grad_norm": 0.5}
    fit(tmp_path / "lightning", Module(optim), *quick(diagnostics(name, 24)), steps=24, accumulate_grad_batches=2)
    hf_run(tmp_path / "hf", llama(), *quick(hf_integration.diagnostics(name, 24)), optim=optim, **settings)
    families = tuple(f"{row.probe.name}/" for row in registry.members(name)) + ("diagnostics/",)
    actual = [{t for t in scalars(x) if t.startswith(families)} for x in (tmp_path / "lightning", hf_folder(tmp_path))]
    assert actual[0] == actual[1] and {t.partition("/")[0] + "/" for t in actual[0]} >= set(families) - {"refresh/"}
    by_role = [t for t in actual[0] if t.rpartition("/")[2] in ROLES]
    more = len(by_role) // len(ROLES) * (view.MAX_ROLES - len(ROLES)) + 2 + 4
    assert len(by_role) % len(ROLES) == 0 and len(actual[0]) + more <= 60
    assert len(actual[0]) >= 20


def quick(made: Any) -> Any:
    """Callbacks of a preset, of which none looks less often here, and the costliest does not do much."""
    for callback in made:
        callback.probe.budget.limit = 1e6
        if isinstance(callback.probe, curvature.HessianBlocks):
            callback.probe.probes, callback.probe.steps, callback.probe.exact = 2, 3, ()
    return made


def test_what_is_no_scalar_is_in_pictures_and_tables(tmp_path: Path) -> None:
    plain: dict[str, Any] = CURVATURE | {"detail": False}
    this = [
        OptimizerHealth(every=1, max_overhead=1e6, image_every=2),
        HessianBlocks(**plain),
        GradientRank(every=2, max_overhead=1e6, scalars=["weight.stable_rank"]),
    ]
    fit(tmp_path, Module("soap"), *this, steps=4)
    actual, seen = scalars(tmp_path), events(tmp_path)
    assert not of(actual, "health/weight_rms") and not of(actual, "hessian/trace") and not of(actual, "rank/gradient")
    assert of(actual, "rank/weight_stable_rank/") and "diagnostics/interval/health" not in actual
    measures = (
        "health/gradient_rms",
        "health/weight_rms",
        "hessian/trace",
        "hessian/lambda_min",
        "rank/gradient_rank@90",
    )
    curves = {f"{measure}_by_role" for measure in measures}
    assert curves <= set(seen.Tags()["images"])
    (table,) = (e.tensor_proto.string_val[0].decode() for e in seen.Tensors("hessian/measures/text_summary")[-1:])
    assert {"sharpness", "js_scale", "frobenius_all"} <= {line.split(" | ")[0][2:] for line in table.splitlines()}
    with np.load(tmp_path / "diagnostics" / "hessian-0000003.npz") as arrays:
        assert list(arrays["hessian/trace/steps"]) == [2, 4] and arrays["hessian/trace/q_proj"].shape == (2,)
        assert arrays["hessian/sharpness"] > 0
    interval = seen.Tensors("diagnostics/interval/health/text_summary")
    assert [e.tensor_proto.string_val[0] for e in interval] == [b"every 1 steps"]


def test_a_costly_probe_doubles_its_interval() -> None:
    pace = OverheadBudget(every=10, limit=0.05)
    pace.add_measurement(5.0)  # the first is not judged
    assert pace.every == 10
    for _ in range(3):
        pace.add_training_time(10.0)
        pace.add_measurement(0.4)
    assert pace.every == 10 and pace.recent == pytest.approx(0.04)
    pace.add_training_time(10.0)
    pace.add_measurement(1.0)
    assert pace.every == 20 and pace.due(40) and not pace.due(30)
    assert pace.share == pytest.approx(7.2 / 40)
    again = OverheadBudget(every=10, limit=0.05)
    again.load_state_dict(pace.state_dict())
    assert again.every == 20 and again.share == pace.share
    assert pace.judged == pytest.approx(2 * pace.recent)


def charts_of(folder: Path) -> dict[str, dict[str, list[str]]]:
    """The dashboard that is shown: the last layout."""
    layout: Any = layout_pb2.Layout()  # pyright: ignore[reportAttributeAccessIssue]
    layout.ParseFromString(events(folder).Tensors("custom_scalars__config__")[-1].tensor_proto.string_val[0])
    return {x.title: {chart.title: list(chart.multiline.tag) for chart in x.chart} for x in layout.category}


@pytest.mark.parametrize("name", ["soap", "muon", "adamw"])
def test_every_chart_of_the_dashboard_has_something_to_show(tmp_path: Path, name: str) -> None:
    fit(tmp_path, Module(name), *everything(callbacks), steps=4, accumulate_grad_batches=2)
    actual, shown = scalars(tmp_path), charts_of(tmp_path)
    for category in shown.values():
        for title, patterns in category.items():
            assert any(re.fullmatch(p, tag) for p in patterns for tag in actual), title
    refreshed = {"refresh"} if name == "soap" else set()
    assert set(shown) == {"health", "memory", "rank", "noise", "hessian", "diagnostics"} | refreshed


def test_a_resumed_run_keeps_its_dashboard(tmp_path: Path) -> None:
    first = fit(tmp_path / "a", Module("adamw"), OptimizerHealth(**ALWAYS), MemoryLogger(**EVERY), steps=2)
    first.save_checkpoint(tmp_path / "last.ckpt")
    logger = TensorBoardLogger(tmp_path / "b", name="", version="")
    again = [OptimizerHealth(**ALWAYS), MemoryLogger(**EVERY)]
    made = trainer(tmp_path, max_steps=3, callbacks=again, logger=logger, log_every_n_steps=1)
    made.fit(Module("adamw"), Batches(3), ckpt_path=tmp_path / "last.ckpt")
    assert set(charts_of(tmp_path / "b")) == {"health", "memory", "diagnostics"}
    assert not of(scalars(tmp_path / "b"), "memory/")


# -- Transformers -----------------------------------------------------------------------------------------------------


def hf_run(folder: Path, model: PreTrainedModel, *this: TrainerCallback, **settings: Any) -> Any:
    settings = {"report_to": ["tensorboard"], "max_steps": 4, "gradient_accumulation_steps": 2} | settings
    made = trainer_of(model, arguments(folder, **settings), *this)
    made.train()
    return made


def hf_folder(folder: Path) -> Path:
    return next(p.parent for p in folder.rglob("events.out.tfevents*"))


def test_the_same_tags_in_transformers(tmp_path: Path) -> None:
    fit(tmp_path / "lightning", Module("soap"), *everything(callbacks), steps=4, accumulate_grad_batches=2)
    hf_run(tmp_path / "hf", llama(), *everything(hf_integration), optim="soap")
    ours, theirs = events(tmp_path / "lightning"), events(hf_folder(tmp_path / "hf"))
    for kind in ("scalars", "images"):
        mine, others = (
            {t for row in registry.REGISTRY for t in of(x.Tags()[kind], f"{row.probe.name}/")} for x in (ours, theirs)
        )
        mine, others = ({t for t in x if "noise/scale" not in t} for x in (mine, others))  # NaN by chance
        assert mine == others and mine
    assert any((hf_folder(tmp_path / "hf") / "diagnostics").glob("hessian-*.npz"))
    assert "custom_scalars__config__" in theirs.Tags()["tensors"]


@pytest.mark.parametrize("name", ["soap", "muon"])
def test_transformers_trains_the_same_with_every_callback(tmp_path: Path, name: str) -> None:
    settings: dict[str, Any] = {"optim": name, "max_steps": 20, "max_grad_norm": 0.5}
    runs = []
    for folder, this in (("plain", []), ("watched", with_entries(hf_integration))):
        model = llama(dropout=0.1)
        made = hf_run(tmp_path / folder, model, *this, **settings)
        losses = [x["loss"] for x in made.state.log_history if "loss" in x]
        modes = [m.training for m in model.modules()]
        runs.append((kept(model, made.optimizer), torch.rand(2), modes, losses))
    (a, random_a, modes_a, losses_a), (b, random_b, modes_b, losses_b) = runs
    assert_same(a, b)
    assert torch.equal(random_a, random_b) and modes_a == modes_b
    assert losses_a == losses_b and len(losses_a) == 20
    actual = scalars(hf_folder(tmp_path / "watched"))
    assert actual["health/clip_rate"][-1] > 0 and actual["noise/batch_sequences"][-1] == 4


def test_noise_scale_in_both_frameworks_is_the_same(tmp_path: Path) -> None:
    model = llama()
    start = copy.deepcopy(model)
    this = hf_integration.GradientNoiseScale(**ALWAYS)
    made = hf_run(tmp_path, model, this, max_steps=1, gradient_accumulation_steps=4, max_grad_norm=0.01)
    gradients = []
    for batch in _batches_of(made, 4):
        start.zero_grad()
        start(input_ids=batch, labels=batch).loss.backward()
        gradients.append(torch.cat([p.grad.reshape(-1) for p in start.parameters() if p.grad is not None]).double())
    g = torch.stack(gradients)
    small, big = g.square().sum(1).mean(), g.mean(0).square().sum()
    square, trace = (8 * big - 2 * small) / 6, (small - big) / (1 / 2 - 1 / 8)
    actual = scalars(hf_folder(tmp_path))
    assert actual["noise/gradient_square"] == [pytest.approx(square.item(), rel=1e-3)]
    assert actual["noise/trace"] == [pytest.approx(trace.item(), rel=1e-3)]


def _batches_of(made: Any, count: int) -> list[Tensor]:
    """The first batches of a run, which the seed decides."""
    set_seed(made.args.seed)
    return [b["input_ids"] for _, b in zip(range(count), made.get_train_dataloader(), strict=False)]


def test_transformers_callbacks_keep_their_state(tmp_path: Path) -> None:
    this = hf_integration.GradientNoiseScale(**ALWAYS)
    settings: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "max_steps": 2, "optim": "adamw"}
    hf_run(tmp_path, llama(), this, **settings)
    again = hf_integration.GradientNoiseScale(**ALWAYS)
    args = arguments(
        tmp_path,
        **settings
        | {
            "max_steps": 3,
            "restore_callback_states_from_checkpoint": True,
            "report_to": [],
            "gradient_accumulation_steps": 2,
        },
    )
    made = trainer_of(llama(), args, again)
    made.train(str(tmp_path / "checkpoint-2"))
    restored = next(c for c in made.callback_handler.callbacks if isinstance(c, hf_integration.GradientNoiseScale))
    assert restored.probe._average.weight == pytest.approx(1 - 0.9**3)  # pyright: ignore[reportAttributeAccessIssue]


# -- what the probes see ----------------------------------------------------------------------------------------------


def test_labels_of_roles() -> None:
    names = [
        ("h.0.attn.c_attn.weight", "qkv"),
        ("h.0.attn.c_proj.weight", "hidden"),
        ("h.1.attn.c_proj.weight", "hidden"),
        ("h.0.mlp.c_proj.weight", "hidden"),
        ("wte.weight", "embedding"),
        ("ln.weight", "vector"),
    ]
    labels = view.role_labels(names, [1] * 6)
    assert labels == ["c_attn", "attn.c_proj", "attn.c_proj", "mlp.c_proj", "embedding", "vector"]
    many = [(f"m{chr(97 + i)}.weight", "") for i in range(20)]
    labels = view.role_labels(many, list(range(20, 0, -1)), limit=5)
    assert labels[:4] == ["ma", "mb", "mc", "md"] and set(labels[4:]) == {"other"}


def test_pictures_have_titles_scales_and_no_holes() -> None:
    picture = figures.heat_map(
        [[1.0, math.nan], [3.0, 4.0]], "title", rows=["a", "b"], columns=["x", "y"], across="step", unit="rank"
    )
    assert picture.dtype == np.uint8 and picture.ndim == 3 and picture.shape[2] == 3
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50
    empty = figures.heat_map([[math.nan]], "nothing", rows=["a"], columns=["x"], across="", unit="")
    assert empty.shape[0] > 50
    lines = figures.curves(np.arange(5), {"a": np.arange(5), "b": np.ones(5)}, "t", across="x", up="y")
    assert (lines == np.array(figures.LINES[0], dtype=np.uint8)).all(-1).any()
    assert (lines == np.array(figures.LINES[1], dtype=np.uint8)).all(-1).any()
    table = figures.colors()
    assert table.shape == (256, 3) and (np.diff(table.sum(1).astype(int)) >= -2).all()


@pytest.mark.parametrize(
    ("values", "kind", "ticks"),
    [
        ([0.3, 7.0], "log", [0.5, 1, 2, 5]),
        ([1.0, 3e4], "log", [1, 10, 100, 1e3, 1e4]),
        ([2.0, 7.0], "linear", [0, 2, 4, 6]),
        ([-100.0, 0.1, 1000.0], "signed", [-10, 0, 10, 1000]),
        ([-100.0, -1.0], "signed", [-100, -10, 0]),
        ([0.0], "linear", [-0.4, -0.2, 0, 0.2, 0.4]),
    ],
)
def test_axes_have_round_numbers(values: list[float], kind: str, ticks: list[float]) -> None:
    axis = figures._axis(np.array(values), None, 1e-6)
    assert axis.kind == kind and axis.ticks() == pytest.approx(ticks)
    places = [float(axis.place(x)) for x in sorted({*values, *ticks})]
    assert places == sorted(set(places)) and 0 <= places[0] and places[-1] <= 1


@pytest.mark.parametrize(("every", "expected"), [(10, [2, 4, 8, 10, 20]), (2, [2, 4, 6, 8]), (1, [1, 2, 3])])
def test_pictures_come_early_and_then_regularly(every: int, expected: list[int]) -> None:
    probe, drawn = OptimizerHealth(image_every=every).probe, []
    for probe._report_count in range(expected[-1]):
        drawn += [probe._report_count + 1] * probe.draws_pictures()
    assert drawn == expected


def test_short_names_tell_layers_apart() -> None:
    names = [f"model.layers.{i}.{side}.weight" for i in (0, 1) for side in ("q", "norm")]
    assert figures.short(names) == ["layers.0.q", "layers.0.norm", "layers.1.q", "layers.1.norm"]
    assert figures.short(["a.b.weight", "a.b.bias"]) == ["weight", "bias"]
    assert figures.short(["only.weight"]) == ["only"]


def test_any_torch_optimizer_can_be_watched(tmp_path: Path) -> None:
    class Plain(Module):
        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-3)

    this = [OptimizerHealth(**EVERY), MemoryLogger(**EVERY), GradientRank(**EVERY), HessianBlocks(**CURVATURE)]
    fit(tmp_path, Plain(), *this, PreconditionerRefresh(**EVERY), steps=2)
    actual = scalars(tmp_path)
    assert actual["hessian/sharpness_ratio"][0] > 0 and "memory/state_predicted" not in actual
    assert of(actual, "health/update_rms/") == per_role("health/update_rms")


def test_fused_backward_has_no_gradients_and_no_zeros(tmp_path: Path) -> None:
    class Fused(Module):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx)

        def configure_optimizers(self) -> Any:
            for p in self.parameters():
                p.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
            return super().configure_optimizers()

    this = [OptimizerHealth(**EVERY), GradientRank(**EVERY), MemoryLogger(**EVERY)]
    fit(tmp_path, Fused("adamw"), *this, steps=2, gradient_clip_val=None)
    actual = scalars(tmp_path)
    assert not of(actual, "health/gradient") and not of(actual, "rank/gradient") and "health/clip_rate" not in actual
    assert of(actual, "health/weight_rms/") == per_role("health/weight_rms")


def test_bfloat16_weights_and_transposed_layers(tmp_path: Path) -> None:
    class Narrow(Module):
        def __init__(self) -> None:
            super().__init__("soap")
            self.to(torch.bfloat16)

    fit(tmp_path, Narrow(), *everything(callbacks)[:4], steps=4)
    assert of(scalars(tmp_path), "rank/gradient_rank@90/")


def test_modules_that_log_are_left_alone(tmp_path: Path) -> None:
    module = Module("adamw")
    fit(tmp_path, module, HessianBlocks(**CURVATURE), steps=2)
    assert "log" not in vars(module) and len(scalars(tmp_path)["train_loss"]) == 2
    assert isinstance(module.model, nn.Module) and module.training
