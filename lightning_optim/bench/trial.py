"""One training run, and the line of JSON that tells everything about it."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.optim.lr_scheduler import LambdaLR

from lightning_optim.bench import facts, tasks
from lightning_optim.bench.ledger import Ledger, Line
from lightning_optim.bench.models import make, size_of
from lightning_optim.bench.space import Setup, Trial, decay, read_trial, roles_apart
from lightning_optim.bench.tokens import shuffled
from lightning_optim.build.factory import build_optimizer
from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.rule import lookup
from lightning_optim.curvature import CurvatureEstimator, needs_curvature
from lightning_optim.diagnostics.memory import LiveStorages, SavedActivations, predicted_state
from lightning_optim.schedule import SCHEDULES, ScheduleLR

GIVEN_UP = 1.5
"""A run whose validation loss exceeds its first by this factor has diverged."""
HEADS = 2
"""A wider model's width grows by this many elements per attention head: rotary embeddings need an even number."""


class DoesNotFit(ValueError):
    """The budget of memory is less than the preset needs with an optimizer."""


@dataclass
class Stopwatch:
    """Time and processor time, of everything inside `with watch.running():`.

    Processor time is that of all threads. It is what a busy machine can be compared by; on an accelerator it means
    little, and time is taken after the device is done.
    """

    device: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    _begin: tuple[float, float] = (0.0, 0.0)

    def now(self) -> tuple[float, float]:
        """Both clocks.

        Returns:
            In seconds.
        """
        if self.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter(), time.process_time()

    def start(self, *_: Any) -> None:
        """Begin; arguments are ignored, as a hook of an optimizer has some."""
        self._begin = self.now()

    def stop(self, *_: Any) -> None:
        """End, and add up."""
        end = self.now()
        self.seconds += end[0] - self._begin[0]
        self.cpu_seconds += end[1] - self._begin[1]

    @property
    def spent(self) -> float:
        """What a budget in seconds is counted in: processor seconds on a CPU."""
        return self.cpu_seconds if self.device == "cpu" else self.seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure a block.

        Yields:
            Nothing.
        """
        self.start()
        try:
            yield
        finally:
            self.stop()


@dataclass
class Run:
    """What is found while a model trains."""

    status: str = "ok"
    why: str = ""
    steps: int = 0
    tokens: int = 0
    clipped: int = 0
    """Steps whose gradient was clipped."""
    curve: list[dict[str, float]] = field(default_factory=list)

    def diverged(self, why: str) -> None:
        """End with a divergence.

        Args:
            why: in words.
        """
        self.status, self.why = "diverged", why


@dataclass(frozen=True)
class Workspace:
    """Where trials and what they share lie."""

    ledger: Ledger
    cache: Path

    def start(self, setup: Setup) -> Trial | None:
        """The pretraining that a setup goes on from.

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
        workspace: caches, and the trials that others go on from.
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
    total, stepping, run = Stopwatch(setup.device), Stopwatch(setup.device), Run()
    predicted = predicted_state(optimizer)
    peak: dict[str, int] = {}
    try:
        if setup.regime == "dpo":
            from lightning_optim.bench.dpo import train_dpo

            train_dpo(trial, model, optimizer, task, run, total, stepping)
        else:
            peak = peak_bytes(model, trial, task)
            train(trial, model, optimizer, task, run, total, stepping)
    except torch.OutOfMemoryError as e:
        run.status, run.why = "out of memory", str(e).splitlines()[0]
    if save is not None:
        optimizer.eval()
        tasks.write(model.state_dict(), save)
    curve = [{k: rounded(v) for k, v in point.items()} for point in run.curve]
    return {
        "key": trial.key,
        "config": trial.config,
        "status": run.status,
        "reason": run.why,
        "final": curve[-1] if curve and run.status == "ok" else None,
        "curve": curve,
        "steps": run.steps,
        "tokens": run.tokens,
        "clipped_steps": run.clipped,
        "time": {
            "seconds": rounded(total.seconds),
            "cpu_seconds": rounded(total.cpu_seconds),
            "optimizer_seconds": rounded(stepping.seconds),
            "optimizer_cpu_seconds": rounded(stepping.cpu_seconds),
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
            goes before the setup's.

    Returns:
        With the groups that `build_optimizer` makes.

    Raises:
        ValueError: a schedule over a number of steps on a track without one.
    """
    given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in trial.settings.items()}
    if "preset" not in given:
        rule, setup = lookup(trial.optimizer), trial.setup
        shared = {"weight_decay": decay(rule, setup.weight_decay), **roles_apart(rule, setup.rest_lr)}
        own = given.get("overrides", ())
        overrides = [*own, *(x for x in shared.pop("overrides", ()) if x[0] not in [y[0] for y in own])]
        given = shared | given | ({"overrides": overrides} if overrides else {})
    optimizer = build_optimizer(model, trial.optimizer, lr=trial.lr, seed=trial.seed, **given)
    optimizer.total_steps = size_of(trial.setup)[1]
    counts = optimizer.curve or (optimizer.averages and optimizer.averages.needs_total)
    if counts and trial.setup.track == "seconds":
        raise ValueError(
            f"{trial.optimizer}: its schedule and averages count steps; --track seconds has no number of them"
        )
    return optimizer


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
    """What moves the learning rates of a run.

    Args:
        optimizer: with the length of the run; a schedule of its own goes before the setup's.
        setup: of the trial.
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
    run: Run,
    total: Stopwatch,
    stepping: Stopwatch,
) -> None:
    """Train on rows of tokens, to the end of the budget or until it diverges.

    Args:
        trial: what to run.
        model: trained.
        optimizer: of the model.
        task: the data.
        run: filled with what is found.
        total: measures training without evaluation.
        stepping: measures the optimizer.
    """
    setup, device = trial.setup, trial.setup.device
    steps = size_of(setup)[1]
    timed = setup.track == "seconds"
    most = max(steps, len(task.train)) * 100 if timed else steps
    rows = shuffled(len(task.train), min(most, 100_000) * setup.batch, trial.seed)

    def progress(step: int) -> float:
        return max(total.spent / setup.budget, 1e-3) if timed else (step + 1) / steps

    feed = feed_of(model, optimizer, setup)
    scheduler = scheduler_of(optimizer, setup, progress)
    optimizer.register_step_pre_hook(stepping.start)
    optimizer.register_step_post_hook(stepping.stop)

    def look() -> bool:
        optimizer.eval()
        found = tasks.evaluate(model, task.held_out, device, setup.precision)
        optimizer.train()
        point = {"step": run.steps, "tokens": run.tokens, "seconds": total.seconds, "cpu_seconds": total.cpu_seconds}
        if not math.isfinite(found["loss"]):
            run.diverged(f"validation loss not finite after {run.steps} steps")
            return False
        run.curve.append(point | found)
        if found["loss"] > GIVEN_UP * run.curve[0]["loss"]:
            run.diverged(
                f"validation loss {found['loss']:.2f} after {run.steps} steps, {run.curve[0]['loss']:.2f} at 0"
            )
        return run.status == "ok"

    look()
    for chosen in rows.split(setup.batch):
        with total.running():
            try:
                loss, clipped = step(model, optimizer, trial, task.train.take(chosen, device), stepping, feed)
            except FloatingPointError as e:
                loss, clipped, run.why = math.nan, False, str(e).split(";")[0]
            scheduler.step()
        run.steps += 1
        run.clipped += clipped
        run.tokens += int((task.train.labels[chosen] != tasks.IGNORE).sum())
        if not math.isfinite(loss):
            return run.diverged(run.why or f"training loss not finite at step {run.steps}")
        done = total.spent / setup.budget if timed else run.steps / steps
        if done >= 1 or done * setup.evaluations >= len(run.curve):
            if not look() or done >= 1:
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


def feed_of(model: nn.Module, optimizer: RuleOptimizer, setup: Setup) -> CurvatureEstimator | None:
    """What measures curvature for an optimizer that asks for it.

    Args:
        model: trained.
        optimizer: of the model.
        setup: of the trial.

    Returns:
        None where gradients are enough.
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
    feed: CurvatureEstimator | None,
) -> tuple[float, bool]:
    """One optimizer step.

    Args:
        model: trained.
        optimizer: of the model.
        trial: how.
        rows: arguments of the model, `[batch, context]`.
        stepping: also measures what the feed takes; the step itself is measured by hooks.
        feed: of `feed_of`.

    Returns:
        The mean training loss, and whether the gradient was clipped.
    """
    setup, loss = trial.setup, 0.0
    optimizer.zero_grad()
    size = setup.microbatch or setup.batch
    parts = [dict(zip(rows, part, strict=True)) for part in zip(*(x.split(size) for x in rows.values()), strict=True)]
    for batch in parts:
        if feed is not None:
            feed.record_batch(batch)
        out = loss_of(model, setup, batch)
        (out / len(parts)).backward()
        loss += float(out.detach()) / len(parts)
    norm = clip_grad_norm_(model.parameters(), setup.clip) if setup.clip else torch.tensor(0.0)
    if feed is not None:
        with stepping.running():
            feed.estimate()
    optimizer.step()
    return loss, bool(norm > setup.clip)


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
    feed = feed_of(other, optimizer, trial.setup)
    chosen = torch.arange(min(trial.setup.batch, len(task.train)))
    device, before = trial.setup.device, 0
    weights = sum(x.numel() * x.itemsize for x in {*other.parameters(), *other.buffers()})
    gradients = sum(p.numel() * p.itemsize for p in other.parameters() if p.requires_grad)
    rows = task.train.take(chosen, device)
    part = {key: x[: trial.setup.microbatch or len(chosen)] for key, x in rows.items()}
    with SavedActivations(other) as saved, torch.autocast(device, torch.bfloat16, enabled=autocasts(trial.setup)):
        other(**part)
    activations = saved.bytes
    if device != "cpu":
        torch.accelerator.reset_peak_memory_stats()
        before = torch.accelerator.memory_allocated()
    predicted = weights + (predicted_state(optimizer) or 0) + max(gradients, activations)
    with LiveStorages() as live:
        try:
            for _ in range(2):
                step(other, optimizer, trial, rows, Stopwatch(device), feed)
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
