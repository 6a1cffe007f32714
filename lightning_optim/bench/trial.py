"""One training run, and the line of JSON that tells everything about it."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lightning_optim.bench import facts, tasks
from lightning_optim.bench.ledger import Ledger, Line
from lightning_optim.bench.models import make, size_of
from lightning_optim.bench.result import Stopwatch, TrialResult
from lightning_optim.bench.space import Setup, Trial, decay, read_trial, roles_apart
from lightning_optim.bench.training import autocasts, estimator_of, step, train
from lightning_optim.build.factory import build_optimizer
from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.rule import lookup
from lightning_optim.diagnostics.memory import LiveStorages, SavedActivations, predicted_state

HEADS = 2
"""A wider model's width grows by this many elements per attention head: rotary embeddings need an even number."""


class DoesNotFit(ValueError):
    """The budget of memory is less than the preset needs with an optimizer."""


@dataclass(frozen=True)
class Workspace:
    """Where trials and what they share lie."""

    ledger: Ledger
    cache: Path

    def start(self, setup: Setup) -> Trial | None:
        """The pretraining that a setup starts from.

        Args:
            setup: with `start`, `OPTIMIZER@KEY`, unless it is a pretraining.

        Returns:
            Its trial.

        Raises:
            ValueError: the ledger has no such pretraining.
        """
        if setup.regime == "pretrain":
            return None
        line = self.ledger.lines.get(setup.start.rpartition("@")[2])
        if line is None:
            raise ValueError(f"--start {setup.start}: no such trial in {self.ledger.path}; run the pretraining first")
        return read_trial(line["config"])

    def weights(self, trial: Trial) -> dict[str, torch.Tensor]:
        """The weights at the end of a trial; it is run again where they are not in the cache.

        Args:
            trial: a pretraining.

        Returns:
            State dict.
        """
        path = self.cache / "models" / f"{trial.key}.pt"
        if not path.is_file():
            execute(trial, self, save=path)
        return torch.load(path)


def execute(trial: Trial, workspace: Workspace, save: Path | None = None) -> Line:
    """Train once.

    Args:
        trial: what to run.
        workspace: caches, and the trials that others start from.
        save: where to write the trained weights.

    Returns:
        The line of the trial, without `why`. Its status is `ok`, `diverged` or `out of memory`.
    """
    setup = trial.setup
    torch.set_num_threads(setup.threads)
    first = workspace.start(setup)
    task = tasks.load(setup, first.setup if first else None, workspace.cache)
    torch.manual_seed(trial.seed)
    width = widest(trial, task) if setup.track == "memory" else 0
    model = make(first.setup if first else setup, len(task.tokenizer), width)
    if first:
        model.load_state_dict(workspace.weights(first))
        torch.manual_seed(trial.seed)  # for the adapters, whether or not the pretraining ran just now
    model = prepared(model, trial)
    optimizer = build(model, trial)
    result = TrialResult(training=Stopwatch(setup.device), stepping=Stopwatch(setup.device))
    predicted = predicted_state(optimizer)
    peak: dict[str, int] = {}
    try:
        if setup.regime == "dpo":
            from lightning_optim.bench.dpo import train_dpo

            train_dpo(trial, model, optimizer, task, result)
        else:
            peak = peak_bytes(model, trial, task)
            train(trial, model, optimizer, task, result)
    except torch.OutOfMemoryError as e:
        result.status, result.why = "out of memory", str(e).splitlines()[0]
    if save is not None:
        optimizer.eval()
        tasks.write(model.state_dict(), save)
    curve = [{k: rounded(v) for k, v in point.items()} for point in result.curve]
    return {
        "key": trial.key,
        "config": trial.config,
        "status": result.status,
        "reason": result.why,
        "final": curve[-1] if curve and result.status == "ok" else None,
        "curve": curve,
        "steps": result.steps,
        "tokens": result.tokens,
        "clipped_steps": result.clipped,
        "time": {
            "seconds": rounded(result.training.seconds),
            "cpu_seconds": rounded(result.training.cpu_seconds),
            "optimizer_seconds": rounded(result.stepping.seconds),
            "optimizer_cpu_seconds": rounded(result.stepping.cpu_seconds),
        },
        "memory": facts.memory(model, optimizer, predicted, peak),
        "model": facts.model(model, setup),
        "data": task.facts,
        "setup": facts.setup(setup, task.facts["context"], optimizer.curve),
        "optimizer": facts.optimizer(optimizer),
        "precision": facts.precision(model, optimizer, setup),
        "versions": facts.versions(setup),
    }


def rounded(value: float) -> float:
    """Six digits of a number; seconds and losses have no more.

    Args:
        value: any.

    Returns:
        Integers as they are.
    """
    return value if isinstance(value, int) else float(f"{value:.6g}")


def prepared(model: nn.Module, trial: Trial) -> nn.Module:
    """Put a model on its device, at its precision, with adapters if the regime has them.

    Args:
        model: with its first weights.
        trial: names them.

    Returns:
        The module to train.
    """
    setup = trial.setup
    model = model.to(setup.device, torch.bfloat16 if setup.precision == "bfloat16" else torch.float32)
    if setup.regime == "lora":
        from peft import LoraConfig, get_peft_model

        adapters = LoraConfig(
            r=setup.lora_rank, lora_alpha=2 * setup.lora_rank, target_modules="all-linear", task_type="CAUSAL_LM"
        )
        model = get_peft_model(model, adapters)  # pyright: ignore[reportArgumentType, reportAssignmentType]
    return model.train()


def build(model: nn.Module, trial: Trial) -> RuleOptimizer:
    """The optimizer of a trial.

    Args:
        model: to train.
        trial: names it. A preset has a decay of its own; where the settings have a schedule, as a preset does, that
            takes precedence over the setup's.

    Returns:
        With the groups that `build_optimizer` makes.

    Raises:
        ValueError: a schedule over a number of steps on a track without one.
    """
    settings: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in trial.settings.items()}
    if "preset" not in settings:
        rule, setup = lookup(trial.optimizer), trial.setup
        shared = {"weight_decay": decay(rule, setup.weight_decay), **roles_apart(rule, setup.rest_lr)}
        own_overrides = settings.get("overrides", ())
        overrides = [
            *own_overrides,
            *(x for x in shared.pop("overrides", ()) if x[0] not in [y[0] for y in own_overrides]),
        ]
        settings = shared | settings | ({"overrides": overrides} if overrides else {})
    optimizer = build_optimizer(model, trial.optimizer, lr=trial.lr, seed=trial.seed, **settings)
    optimizer.total_steps = size_of(trial.setup)[1]
    counts = optimizer.curve or (optimizer.averages and optimizer.averages.needs_total)
    if counts and trial.setup.track == "seconds":
        raise ValueError(
            f"{trial.optimizer}: its schedule and averages count steps; --track seconds has no number of them"
        )
    return optimizer


def peak_bytes(model: nn.Module, trial: Trial, task: tasks.Task) -> dict[str, int]:
    """The most memory that two steps take, the one that makes all state among them; on a copy of the model.

    Args:
        model: is not changed.
        trial: how to train.
        task: the data.

    Returns:
        `peak`, in bytes: weights, gradients, state, activations and what operations return, on a GPU the allocator's;
        `activations`, which autograd keeps; `peak_predicted`, weights, state and the larger of gradients and
        activations: those of one step are freed before the next.
    """
    other = copy.deepcopy(model)
    optimizer = build(other, trial)
    estimator = estimator_of(other, optimizer, trial.setup)
    row_ids = torch.arange(min(trial.setup.batch, len(task.train)))
    device, before = trial.setup.device, 0
    weights = sum(x.numel() * x.itemsize for x in {*other.parameters(), *other.buffers()})
    gradients = sum(p.numel() * p.itemsize for p in other.parameters() if p.requires_grad)
    rows = task.train.take(row_ids, device)
    microbatch = {key: x[: trial.setup.microbatch or len(row_ids)] for key, x in rows.items()}
    with SavedActivations(other) as saved, torch.autocast(device, torch.bfloat16, enabled=autocasts(trial.setup)):
        other(**microbatch)
    activations = saved.bytes
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
    predicted = weights + (predicted_state(optimizer) or 0) + max(gradients, activations)
    with LiveStorages() as live:
        try:
            for _ in range(2):
                step(other, optimizer, trial, rows, Stopwatch(device), estimator)
        except FloatingPointError:
            pass  # the run itself will tell
    peak = live.peak if device == "cpu" else torch.accelerator.max_memory_allocated() - before
    return {"peak": peak + weights, "peak_predicted": predicted, "activations": activations}


def widest(trial: Trial, task: tasks.Task) -> int:
    """The widest model whose weights, gradients and state fit the memory budget.

    Args:
        trial: whose setup has the budget in bytes.
        task: tells the token ids.

    Returns:
        Width, at least the preset's.

    Raises:
        DoesNotFit: not even the preset's model fits.
    """
    setup = trial.setup
    start, fits = size_of(setup)[0], 0
    heads = facts.heads(setup)
    for width in range(start, 16 * start, HEADS * heads):
        if needed_bytes(trial, len(task.tokenizer), width) > setup.budget:
            break
        fits = width
    if not fits:
        raise DoesNotFit(f"{trial.optimizer}: --budget {setup.budget:g} bytes are too few for {setup.model!r}")
    return fits


def needed_bytes(trial: Trial, vocabulary: int, width: int = 0) -> int:
    """Bytes of weights, gradients and state, from shapes alone.

    Args:
        trial: names the optimizer.
        vocabulary: token ids.
        width: of the model; 0 for the preset's.

    Returns:
        The sum.
    """
    with torch.device("meta"):
        model = make(trial.setup, vocabulary, width)
    model = prepared(model, Trial(Setup(device="meta", precision=trial.setup.precision), trial.optimizer, trial.lr))
    weights = sum(2 * p.numel() * p.itemsize for p in model.parameters())
    return weights + (predicted_state(build(model, trial)) or 0)
