"""Trainers x rules and probes: what is measured beside training is measured on what the trainer trains.

Every combination trains with a falling loss of the trainer, or is refused before anything was updated.
"""

from __future__ import annotations

import copy
import importlib.util
import math
import random
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import TrainerCallback

import hf_integration
from lightning_optim.diagnostics.undisturbed import undisturbed
from lightning_optim.diagnostics.view import unwrap_optimizer
from tests.helpers.trainers import TRANSFORMERS

RULES = {"muon": 1e-2, "sophia_g": 1e-2, "sophia_h": 1e-2, "kfac": 0.05, "lbfgs": 1.0, "hessian_free": 1.0}
"""Learning rate of each rule."""
PRESETS = ("cheap", "matrix", "curvature")
STEPS = 8
REINFORCED = ("RLOOTrainer", "GRPOTrainer")
"""Trainers whose batches are drawn from the model, so that only the loss of one batch can fall."""
NO_LABELS = "the loss calls none of torch's .* use one of these .*, or lbfgs"
REFUSED = {
    **{
        (name, "hessian_free"): NO_LABELS
        for name in (*REINFORCED, "label smoothing", "SentenceTransformerTrainer", "SFTTrainer", "DPOTrainer",
                     "KTOTrainer", "RewardTrainer")
    },
}  # fmt: skip
"""What is refused, and how: fused heads and other losses than torch's show no predictions."""
CORE = {("own compute_loss", "lbfgs"), ("accumulation", "sophia_h"), ("DPOTrainer", "sophia_g"), ("LoRA", "kfac"),
        ("DPOTrainer", "hessian_free"), ("GRPOTrainer", "matrix")}  # fmt: skip
"""The part of the matrix that runs in CI."""

pytestmark = [
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning", "ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def cells(core: set[tuple[str, str]], columns: tuple[str, ...]) -> list[Any]:
    """All combinations; those outside the core are slow."""
    every = [(name, column) for name in TRANSFORMERS for column in columns]
    return [pytest.param(*cell, marks=() if cell in core else pytest.mark.slow) for cell in every]


def make(name: str, folder: Path, *callbacks: Any) -> Any:
    """A trainer that keeps the inputs which `compute_loss` gets."""
    if name == "SentenceTransformerTrainer" and importlib.util.find_spec("sentence_transformers") is None:
        pytest.skip("sentence-transformers is not installed")
    trainer = TRANSFORMERS[name](folder, list(callbacks))
    trainer.batches = []

    def prepare(inputs: Any, original: Any = trainer._prepare_inputs) -> Any:
        out = original(inputs)
        trainer.batches.append(copy.deepcopy(out))
        return out

    trainer._prepare_inputs = prepare
    return trainer


def by_hand(trainer: Any, batches: list[Any]) -> Tensor:
    """The loss of a step in evaluation mode, from the trainer's own `compute_loss`."""
    counted = trainer.model_accepts_loss_kwargs or trainer.compute_loss_func is not None
    items = trainer._get_num_items_in_batch(batches, trainer.args.device) if counted else None
    trainer.model.eval()
    total = torch.zeros(())
    for batch in batches:
        with trainer.compute_loss_context_manager():
            total = total + trainer.compute_loss(trainer.model, copy.deepcopy(batch), num_items_in_batch=items)
    return total if items is not None else total / len(batches)


class Falls(TrainerCallback):
    """The loss of every step's batch before and after the step."""

    def __init__(self) -> None:
        self.trainer: Any = None
        self.before: list[float] = []
        self.after: list[float] = []

    def note(self, losses: list[float]) -> None:
        trainer = self.trainer
        kept = {k: copy.deepcopy(v) for k, v in vars(trainer).items() if k in ("_metrics", "accum_loss_components")}
        with undisturbed(trainer.model), torch.no_grad():
            count = trainer.args.gradient_accumulation_steps
            losses.append(float(by_hand(trainer, trainer.batches[-count:])))
        vars(trainer).update(kept)

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        self.note(self.before)

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        self.note(self.after)


def weights(trainer: Any) -> dict[str, Tensor]:
    return {k: v.detach().clone() for k, v in trainer.model.state_dict().items()}


@contextmanager
def only_our_warnings() -> Iterator[list[str]]:
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        yield messages
    messages += [str(w.message) for w in record if "measur" in str(w.message) or "differences" in str(w.message)]


@pytest.mark.parametrize(("name", "column"), cells(CORE, (*RULES, *PRESETS)))
def test_the_trainers_loss_falls_or_is_refused_before_training(tmp_path: Path, name: str, column: str) -> None:
    rule = column if column in RULES else "muon"
    falls = Falls()
    callbacks = hf_integration.diagnostics(column, steps=4 * STEPS) if column in PRESETS else []
    trainer = falls.trainer = make(name, tmp_path, *callbacks)
    # full steps without a line search may leave the region where the ratio of policies is clipped
    search = {"line_search_fn": "strong_wolfe"} if rule == "lbfgs" and name in REINFORCED else {}
    hf_integration.attach(trainer, rule, lr=RULES[rule], **search)
    trainer.add_callback(falls)
    before = weights(trainer)
    if (name, column) in REFUSED:
        with pytest.raises((ValueError, RuntimeError), match=REFUSED[name, column]):
            trainer.train()
        assert trainer.state.global_step == 0
        assert all(torch.equal(x, before[k]) for k, x in weights(trainer).items())
        return
    with only_our_warnings() as messages:
        trainer.train()
    assert trainer.state.global_step == STEPS
    assert not [m for m in messages if "stops measuring" in m], messages
    assert len([m for m in messages if "differences" in m]) <= 1 + (column == "curvature")
    if name in REINFORCED:
        assert sum(falls.after) < sum(falls.before)
    else:
        assert falls.after[-1] < falls.before[0]


@pytest.mark.slow
def test_a_search_is_refused_on_policy(tmp_path: Path) -> None:
    """Where GRPO trains on each batch once, the ratio of policies is always 1."""
    trainer = TRANSFORMERS["GRPOTrainer"](tmp_path, [])
    trainer.num_iterations = trainer.args.num_iterations = 1
    before = weights(hf_integration.attach(trainer, "lbfgs"))
    with pytest.raises(ValueError, match=r"a search needs a loss that changes with the weights.*num_iterations=2"):
        trainer.train()
    assert all(torch.equal(x, before[k]) for k, x in weights(trainer).items())


class Compared(TrainerCallback):
    """Compares what the estimator has measured with the same by hand."""

    def __init__(self, twice: bool) -> None:
        self.twice, self.count = twice, 0
        self.trainer: Any = None

    def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        trainer, optimizer = self.trainer, cast("Any", unwrap_optimizer(kwargs["optimizer"]))
        params = [p for p in trainer.model.parameters() if p.requires_grad and p.grad is not None]
        estimator, oracle = optimizer.estimator, optimizer.loss_oracle
        batches = trainer.batches[-trainer.args.gradient_accumulation_steps :]
        loss, gradient = oracle.gradient(params)
        with undisturbed(trainer.model, trainer):
            trainer.compute_loss.paused = True
            expected = by_hand(trainer, batches)
            grads = torch.autograd.grad(expected, params, allow_unused=True)
            pairs = [(a, torch.zeros_like(a) if g is None else g) for a, g in zip(gradient, grads, strict=True)]
            off = math.sqrt(sum(float((a - g).double().square().sum()) for a, g in pairs))
            size = math.sqrt(sum(float(g.double().square().sum()) for _, g in pairs))
            assert loss == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)
            assert off <= 1e-5 * size
        self.count += 1
        if self.twice:
            self.compare_traces(estimator, params, oracle.batches, batches)

    def compare_traces(self, estimator: Any, params: list[Tensor], recorded: list[Any], batches: list[Any]) -> None:
        trainer, seen = self.trainer, []
        measured, _ = estimator._hutchinson(params, recorded)
        generator = torch.Generator().manual_seed(estimator._seed(0, everywhere=True))
        u = [(torch.randint(2, p.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(p.dtype) for p in params]
        step = 1e-3 * math.sqrt(sum(float(p.detach().double().square().sum()) for p in params))
        step /= math.sqrt(sum(p.numel() for p in params))
        with undisturbed(trainer.model, trainer), sdpa_kernel(SDPBackend.MATH):
            trainer.compute_loss.paused = True
            if estimator.measurement._uses_differences:
                start = [p.detach().clone() for p in params]
                for sign in (1, -1):
                    for p, x, v in zip(params, start, u, strict=True):
                        p.data.copy_(x + sign * step * v)
                    seen.append(torch.autograd.grad(by_hand(trainer, batches), params, allow_unused=True))
                for p, x in zip(params, start, strict=True):
                    p.data.copy_(x)
                rows = [None if a is None else (a - b) / (2 * step) for a, b in zip(*seen, strict=True)]
            else:
                grads = torch.autograd.grad(by_hand(trainer, batches), params, create_graph=True, allow_unused=True)
                slope = sum((g * v).sum() for g, v in zip(grads, u, strict=True) if g is not None and g.requires_grad)
                rows = torch.autograd.grad(cast("Tensor", slope), params, allow_unused=True)
        terms = [0.0 if h is None else float((v * h).double().sum()) for v, h in zip(u, rows, strict=True)]
        size = sum(abs(x) for x in terms)
        assert sum(float(x.double().sum()) for x in measured) == pytest.approx(sum(terms), abs=1e-5 * size + 1e-9)


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x == "own compute_loss" else pytest.mark.slow) for x in TRANSFORMERS]
)
def test_loss_gradient_and_trace_equal_those_by_hand(tmp_path: Path, name: str) -> None:
    """To 1e-5, in the first step: from the trainer's own `compute_loss` on that batch."""
    compared = Compared(twice=name not in ("torch_compile", "bf16"))
    trainer = compared.trainer = make(name, tmp_path)
    trainer.args.max_steps = 1
    hf_integration.attach(trainer, "lbfgs")
    trainer.add_callback(compared)
    trainer.train()
    assert compared.count == 1


def kept(trainer: Any) -> dict[str, Any]:
    """What must not depend on probes: weights, buffers, optimizer state, logs, metrics, counters, random numbers."""
    timed = ("train_runtime", "train_samples_per_second", "train_steps_per_second", "total_flos")
    logs = [{k: v for k, v in row.items() if k not in timed} for row in trainer.state.log_history]
    logs = [{k: v for k, v in row.items() if not k.startswith(("step_time", "curvature/seconds"))} for row in logs]
    optimizer: Any = unwrap_optimizer(trainer.optimizer)
    out: dict[str, Any] = {f"weights/{k}": v for k, v in weights(trainer).items()}
    out |= {f"state/{i}/{k}": v for i, s in enumerate(optimizer.state.values()) for k, v in s.items()}
    out |= {"logs": repr(logs), "random": torch.rand(3), "python": random.random(), "numpy": float(np.random.rand())}
    for key in ("_metrics", "accum_loss_components", "_total_train_tokens", "calls", "values"):
        out[key] = repr(getattr(trainer, key, None))
    return out


@pytest.mark.parametrize(
    "name", [pytest.param(x, marks=() if x == "own compute_loss" else pytest.mark.slow) for x in TRANSFORMERS]
)
def test_a_run_with_probes_is_bitwise_the_run_without(tmp_path: Path, name: str) -> None:
    runs = []
    for watched in (False, True):
        callbacks = hf_integration.diagnostics("curvature", steps=36) if watched else []
        for callback in callbacks:
            if isinstance(callback, hf_integration.HessianBlocks):
                callback.probe.probes, callback.probe.steps = 2, 2  # pyright: ignore[reportAttributeAccessIssue]
        trainer = make(name, tmp_path / str(watched), *callbacks)
        trainer.args.max_steps = 10
        with only_our_warnings() as messages:
            hf_integration.attach(trainer, "muon").train()
        assert not [m for m in messages if "stops measuring" in m], messages
        runs.append(kept(trainer))
        if watched:
            measured = [c.probe.measured for c in callbacks if isinstance(c, hf_integration.HessianBlocks)]  # pyright: ignore
            assert measured[0] >= 1
    assert runs[0].keys() == runs[1].keys()
    for key, value in runs[0].items():
        same = torch.equal(value, runs[1][key]) if isinstance(value, Tensor) else value == runs[1][key]
        assert same, (key, value, runs[1][key])
