"""What all probes share: when they work, what they see, what they cost."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_optim.core import layout
from lightning_optim.diagnostics import view
from lightning_optim.diagnostics.report import Pace, Report, over_ranks

HISTORY = 120
"""Columns of a picture over time; beyond it every second one is dropped."""


@dataclass
class Run:
    """What a probe may look at.

    Args:
        model: the plain module, inside DDP or a compiled wrapper.
        optimizer: torch's or ours, inside a framework's wrapper.
        loss: the training loss of a batch, by a call without side effects.
        clip: the gradient norm that the trainer clips to.
        loss_scale: the present factor of mixed precision; None without.
        step: optimizer steps taken before.
        ranks: number of data-parallel processes.
        rank: of this one.
        extra: what a framework knows besides: `checkpoint`, a function that gives the last checkpoint's path;
            `ddp`, the wrapper; `group`, the process group.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any], Tensor] | None = None
    clip: float | None = None
    loss_scale: Callable[[], float | None] = lambda: None
    step: int = 0
    ranks: int = 1
    rank: int = 0
    extra: dict[str, Any] = field(default_factory=dict)


class Probe:
    """Base of all probes.

    A framework calls `start`, then `begin` and `end` around every optimizer step or micro-batch, and in between, for
    every batch, `see`, `forwarded` and `backward`, then `ready`; at last `stop`. Weights before and after a step are
    seen by hooks of the optimizer. Nothing that training depends on is changed: weights, gradients, state, modes and
    random numbers are as without the probe.

    Args:
        every: steps between measurements.
        max_overhead: share of training time above which the interval doubles.
    """

    name: ClassVar[str]
    charts: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Title of a chart to patterns of tags, for a dashboard."""

    def __init__(self, every: int, max_overhead: float) -> None:
        if every < 1 or not max_overhead > 0:
            raise ValueError(f"{self.name}: needs every >= 1 and max_overhead > 0, got {every}, {max_overhead}")
        self.pace = Pace(every, max_overhead)
        self.run: Run | None = None
        self.step = 0
        self._handles: list[Any] = []
        self._cost = 0.0
        self._started: float | None = None
        self._sampled = False
        self._made: Report | None = None

    # -- called by a framework ------------------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Begin to watch a run.

        Args:
            run: what there is to see.
        """
        self.stop()
        self.run, self.step = run, run.step
        self._handles = [
            run.optimizer.register_step_pre_hook(lambda *_: self._before()),
            run.optimizer.register_step_post_hook(lambda *_: self._after()),
        ]
        self.prepare(run)

    def stop(self) -> None:
        """Stop watching; also after an exception."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._sampled, self._made, self._started = False, None, None
        self.clear()

    def begin(self) -> None:
        """A step, or one of its micro-batches, begins."""
        self._started = time.perf_counter()

    def see(self, batch: Any) -> None:
        """A batch is about to be trained on.

        Args:
            batch: tensors, in any nesting.
        """

    def forwarded(self) -> None:
        """The forward pass of a batch is over, its backward pass begins."""

    def backward(self) -> None:
        """The backward pass of a batch is over; gradients are not clipped yet."""

    def ready(self) -> None:
        """The optimizer is about to step."""

    def failed(self, error: BaseException) -> None:
        """Training ends with an exception.

        Args:
            error: the exception.
        """

    def end(self) -> Report | None:
        """A step, or one of its micro-batches, has ended.

        Returns:
            A report, if one was made.
        """
        if self._started is not None:
            self.pace.train(max(0.0, time.perf_counter() - self._started - self._cost_inside))
            self._started = None
        self._cost_inside = 0.0
        report, self._made = self._made, None
        if report is None or self.run is None:
            return None
        with self._timed():
            self.finish(self.run, report)
        self._judge(report)
        return report

    def state_dict(self) -> dict[str, Any]:
        """What continues in a resumed run.

        Returns:
            Plain values.
        """
        return {"pace": self.pace.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue.

        Args:
            state: from `state_dict`.
        """
        self.pace.load_state_dict(state["pace"])

    # -- overridden by probes -------------------------------------------------------------------------------------

    def prepare(self, run: Run) -> None:
        """The run begins."""

    def clear(self) -> None:
        """The run is over: hooks and copies go."""

    def before(self, run: Run) -> None:
        """A sampled step begins; in Lightning the gradients are not there yet."""

    def always(self, run: Run, advanced: bool) -> None:
        """Any step has been taken.

        Args:
            run: what there is to see.
            advanced: whether the optimizer moved, as far as its state tells.
        """

    def after(self, run: Run) -> Report | None:
        """A sampled step has been taken; gradients are as the optimizer got them.

        Args:
            run: what there is to see.

        Returns:
            The report, to be completed by `finish`; None if there is nothing to say.
        """
        return Report()

    def finish(self, run: Run, report: Report) -> None:
        """Complete a report after the step; the model may be called, gradients may be gone.

        Args:
            run: what there is to see.
            report: from `after`.
        """

    # -- inside ---------------------------------------------------------------------------------------------------

    _cost_inside = 0.0
    _count_before: float | None = None

    def _timed(self) -> _Timed:
        return _Timed(self)

    def _before(self) -> None:
        if self.run is None:
            return
        self.step += 1
        self._sampled = self.pace.due(self.step)
        self._count_before = _count(self.run.optimizer)
        if self._sampled:
            with self._timed(), torch.no_grad():
                self.before(self.run)

    def _after(self) -> None:
        if self.run is None:
            return
        now = _count(self.run.optimizer)
        self.always(self.run, now is None or self._count_before is None or now > self._count_before)
        if self._sampled:
            with self._timed(), torch.no_grad():
                self._made = self.after(self.run)
            self._sampled = False

    def _judge(self, report: Report) -> None:
        """Note the cost, agreed on by all ranks so that they keep measuring together."""
        assert self.run is not None
        device = layout.local(self.run.optimizer.param_groups[0]["params"][0]).device
        trained = self.pace._since
        agreed = over_ranks(torch.tensor([self._cost, trained], dtype=torch.float64, device=device)) / self.run.ranks
        seconds, self.pace._since = agreed.tolist()
        self.pace.note(seconds)
        self._cost = 0.0
        report.scalars[f"diagnostics/share/{self.name}"] = self.pace.share
        report.scalars[f"diagnostics/interval/{self.name}"] = float(self.pace.every)

    def generator(self, device: torch.device, salt: int = 0) -> torch.Generator:
        """Random numbers of this step, the same on every rank and apart from the training's.

        Args:
            device: of the numbers.
            salt: tells streams apart.

        Returns:
            A generator.
        """
        return torch.Generator(device).manual_seed(1_000_003 * self.step + salt)


class _Timed:
    """Adds the time of a block to a probe's cost."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def __enter__(self) -> None:
        _wait(self.probe.run)
        self.started = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        _wait(self.probe.run)
        seconds = time.perf_counter() - self.started
        self.probe._cost += seconds
        self.probe._cost_inside += seconds


def _wait(run: Run | None) -> None:
    """Let the device catch up, so that training's work is not counted as ours."""
    if run is not None and torch.accelerator.is_available():
        device = next(run.model.parameters()).device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


def _count(optimizer: torch.optim.Optimizer) -> float | None:
    """The largest step count of a parameter, where counts lie on the CPU."""
    counts = [s["step"] for s in optimizer.state.values() if isinstance(s.get("step"), Tensor)]
    if not counts:
        return None if not optimizer.state else -1.0
    if any(c.device.type != "cpu" for c in counts[:1]):
        return None
    return max(float(c) for c in counts)


class History:
    """Columns of a picture over time."""

    def __init__(self, limit: int = HISTORY) -> None:
        self.limit = limit
        self.steps: list[int] = []
        self.columns: list[list[float]] = []

    def add(self, step: int, column: Sequence[float]) -> None:
        """Add a column; a column of another height starts anew.

        Args:
            step: when.
            column: numbers.
        """
        if self.columns and len(column) != len(self.columns[0]):
            self.steps, self.columns = [], []
        self.steps.append(step)
        self.columns.append(list(column))
        if len(self.steps) > self.limit:
            self.steps, self.columns = self.steps[::2], self.columns[::2]

    def table(self) -> list[list[float]]:
        """The columns side by side.

        Returns:
            Rows.
        """
        return [list(row) for row in zip(*self.columns, strict=True)]


def found_entries(run: Run) -> list[view.Entry]:
    """The trained parameters of a run.

    Returns:
        See `view.entries`.
    """
    return view.entries(run.model, run.optimizer)
