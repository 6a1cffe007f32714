"""The training loop of a trial on rows of tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from lightning_optim.bench import tasks
from lightning_optim.bench.models import size_of
from lightning_optim.bench.result import Stopwatch, TrialResult
from lightning_optim.bench.space import Setup, Trial
from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.curvature import CurvatureEstimator, needs_curvature
from lightning_optim.data.tokenizer import shuffled
from lightning_optim.schedule import SCHEDULES, ScheduleLR

DIVERGENCE_FACTOR = 1.5
"""A run whose validation loss exceeds its first by this factor has diverged."""


def schedule(setup: Setup, progress: float) -> float:
    """Factor of the learning rate.

    Args:
        setup: says how long it rises and where it ends.
        progress: share of the run that this step completes, in (0, 1].

    Returns:
        Linear from 0 to 1 in the first `warmup` of the run, then half a cosine down to `min_lr`.
    """
    if progress < setup.warmup:
        return progress / setup.warmup
    x = min(1.0, (progress - setup.warmup) / (1 - setup.warmup))
    return setup.min_lr + (1 - setup.min_lr) * SCHEDULES["cosine"](x)


def scheduler_of(optimizer: RuleOptimizer, setup: Setup, progress: Callable[[int], float]) -> LambdaLR:
    """The learning-rate scheduler of a run.

    Args:
        optimizer: knows the length of the run; a schedule of its own takes precedence over the setup's.
        setup: setup of the trial.
        progress: share of the run that a step, from 0, completes.

    Returns:
        A scheduler, one step per step of the optimizer.
    """
    if optimizer.curve is not None:
        return ScheduleLR(optimizer, total_steps=optimizer.total_steps)
    return LambdaLR(optimizer, lambda step: schedule(setup, progress(step)))


def train(
    trial: Trial,
    model: nn.Module,
    optimizer: RuleOptimizer,
    task: tasks.Task,
    result: TrialResult,
) -> None:
    """Train on rows of tokens, to the end of the budget or until it diverges.

    Args:
        trial: what to result.
        model: trained.
        optimizer: of the model.
        task: the data.
        result: filled with losses and times.
    """
    setup, device = trial.setup, trial.setup.device
    steps = size_of(setup)[1]
    timed = setup.track == "seconds"
    max_steps = max(steps, len(task.train)) * 100 if timed else steps
    rows = shuffled(len(task.train), min(max_steps, 100_000) * setup.batch, trial.seed)

    def progress(step: int) -> float:
        return max(result.training.spent / setup.budget, 1e-3) if timed else (step + 1) / steps

    estimator = estimator_of(model, optimizer, setup)
    scheduler = scheduler_of(optimizer, setup, progress)
    optimizer.register_step_pre_hook(result.stepping.start)
    optimizer.register_step_post_hook(result.stepping.stop)

    def evaluate() -> bool:
        optimizer.eval()
        metrics = tasks.evaluate(model, task.held_out, device, setup.precision)
        optimizer.train()
        if not math.isfinite(metrics["loss"]):
            result.diverged(f"validation loss not finite after {result.steps} steps")
            return False
        result.add_point(**metrics)
        if metrics["loss"] > DIVERGENCE_FACTOR * result.curve[0]["loss"]:
            result.diverged(
                f"validation loss {metrics['loss']:.2f} after {result.steps} steps, {result.curve[0]['loss']:.2f} at 0"
            )
        return result.status == "ok"

    evaluate()
    for row_ids in rows.split(setup.batch):
        with result.training.running():
            try:
                batch = task.train.take(row_ids, device)
                loss, clipped = step(model, optimizer, trial, batch, result.stepping, estimator)
            except FloatingPointError as e:
                loss, clipped, result.why = math.nan, False, str(e).split(";")[0]
            scheduler.step()
        result.steps += 1
        result.clipped += clipped
        result.tokens += int((task.train.labels[row_ids] != tasks.IGNORE).sum())
        if not math.isfinite(loss):
            return result.diverged(result.why or f"training loss not finite at step {result.steps}")
        done = result.training.spent / setup.budget if timed else result.steps / steps
        if done >= 1 or done * setup.evaluations >= len(result.curve):
            if not evaluate() or done >= 1:
                return None
    return None


def autocasts(setup: Setup) -> bool:
    """Whether the forward pass computes in bfloat16 with weights of another precision.

    Args:
        setup: any.

    Returns:
        True on `precision="autocast"`.
    """
    return setup.precision == "autocast"


def loss_of(model: nn.Module, setup: Setup, batch: Any) -> torch.Tensor:
    """The mean loss of rows.

    Args:
        model: any.
        setup: gives the precision.
        batch: what `Rows.take` gives.

    Returns:
        A scalar.
    """
    with torch.autocast(setup.device, torch.bfloat16, enabled=autocasts(setup)):
        return model(**batch).loss


def estimator_of(model: nn.Module, optimizer: RuleOptimizer, setup: Setup) -> CurvatureEstimator | None:
    """The curvature estimator of an optimizer that needs one.

    Args:
        model: trained.
        optimizer: of the model.
        setup: of the trial.

    Returns:
        None where the optimizer needs only gradients.
    """
    return (
        CurvatureEstimator(model, optimizer, lambda batch: loss_of(model, setup, batch))
        if needs_curvature(optimizer)
        else None
    )


def step(
    model: nn.Module,
    optimizer: RuleOptimizer,
    trial: Trial,
    rows: Mapping[str, torch.Tensor],
    stepping: Stopwatch,
    estimator: CurvatureEstimator | None,
) -> tuple[float, bool]:
    """One optimizer step.

    Args:
        model: trained.
        optimizer: of the model.
        trial: how.
        rows: arguments of the model, `[batch, context]`.
        stepping: also measures what the estimator takes; the step itself is measured by hooks.
        estimator: measures curvature, or None.

    Returns:
        The mean training loss, and whether the gradient was clipped.
    """
    setup, loss = trial.setup, 0.0
    optimizer.zero_grad()
    size = setup.microbatch or setup.batch
    parts = [dict(zip(rows, part, strict=True)) for part in zip(*(x.split(size) for x in rows.values()), strict=True)]
    for batch in parts:
        if estimator is not None:
            estimator.record_batch(batch)
        out = loss_of(model, setup, batch)
        (out / len(parts)).backward()
        loss += float(out.detach()) / len(parts)
    norm = clip_grad_norm_(model.parameters(), setup.clip) if setup.clip else torch.tensor(0.0)
    if estimator is not None:
        with stepping.running():
            estimator.estimate()
    optimizer.step()
    return loss, bool(norm > setup.clip)
