"""What all probes share: when they work, what they see, what they cost."""

from __future__ import annotations

import math
import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_optim.core import layout
from lightning_optim.diagnostics import figures, view
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

    What is measured is scalars where `charts` shows it (at most 60 tags of all probes together); otherwise what has a
    value per role is curves in a picture, `<measure>_by_role`, and the rest is the table `<name>/measures`. Both come
    with every `picture_every`-th measurement, the first of them with the second one, their numbers with them as arrays.

    Args:
        every: steps between measurements.
        max_overhead: share of training time above which the interval doubles.
        detail: whether everything measured becomes a scalar, too.
    """

    name: ClassVar[str]
    charts: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Title of a chart to patterns of tags, for a dashboard; these tags are scalars."""
    curves: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Start of tags that end in a role to title and vertical axis of a picture."""

    def __init__(self, every: int, max_overhead: float, detail: bool = False) -> None:
        if every < 1 or not max_overhead > 0:
            raise ValueError(f"{self.name}: needs every >= 1 and max_overhead > 0, got {every}, {max_overhead}")
        self.pace = Pace(every, max_overhead)
        self.detail, self.picture_every = detail, 1
        self.filled: set[str] = set()
        self._lines: dict[str, Lines] = {}
        self._reports, self._interval = 0, 0
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
        self._started, self._cost_inside = time.perf_counter(), 0.0

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
        report, self._made = self._made, None
        if report is None or self.run is None:
            return None
        with self._timed():
            self.finish(self.run, report)
            self._show(report)
        self._judge(report)
        return report

    def draws(self) -> bool:
        """Whether the measurement under way comes with pictures.

        Returns:
            True every `picture_every` measurements, and at powers of two before the first of these.
        """
        number = self._reports + 1
        early = 1 < number < self.picture_every and number.bit_count() == 1
        return early or number % self.picture_every == 0

    def layout(self) -> dict[str, Sequence[str]]:
        """Charts that have something to show by now.

        Returns:
            Title to patterns of tags.
        """
        return {title: patterns for title, patterns in self._charts().items() if title in self.filled}

    def state_dict(self) -> dict[str, Any]:
        """What continues in a resumed run.

        Returns:
            Plain values.
        """
        return {"pace": self.pace.state_dict(), "filled": sorted(self.filled)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue.

        Args:
            state: from `state_dict`.
        """
        self.pace.load_state_dict(state["pace"])
        self.filled = set(state["filled"])

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
        if self.detail:
            report.scalars[f"diagnostics/interval/{self.name}"] = float(self.pace.every)
        if self._interval != self.pace.every:
            known = self._interval > 0
            self._interval = self.pace.every
            why = f": it took {self.pace.judged:.2%} of training, more than {self.pace.limit:.2%}" if known else ""
            report.texts[f"diagnostics/interval/{self.name}"] = f"every {self.pace.every} steps{why}"

    def _charts(self) -> dict[str, Sequence[str]]:
        more = {title: [f"{re.escape(start)}/.*"] for start, (title, _) in self.curves.items()} if self.detail else {}
        return {**self.charts, **more}

    def _show(self, report: Report) -> None:
        """Move what no chart shows from the scalars to pictures and a table."""
        patterns = {title: re.compile("|".join(p)) for title, p in self._charts().items()}
        rest: dict[str, float] = {}
        by_start: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for tag, value in report.finite().items():
            titles = {title for title, pattern in patterns.items() if pattern.fullmatch(tag)}
            self.filled |= titles
            start, _, role = tag.rpartition("/")
            if start in self.curves:
                by_start[start][role] = value
            elif not titles:
                rest[tag] = value
            if not titles and not self.detail:
                del report.scalars[tag]
        for start, values in by_start.items():
            self._lines.setdefault(start, Lines()).add(self.step, values)
        drawn = self.draws()
        self._reports += 1
        if not drawn:
            return
        for start in by_start:
            title, up = self.curves[start]
            steps, lines = self._lines[start].table()
            # a name of its own: TensorBoard shows neither of a scalar and an image of one name
            report.images[f"{start}_by_role"] = figures.curves(
                steps, lines, title, across="optimizer step", up=up, scale=None
            )
            report.arrays |= {f"{start}/steps": steps} | {f"{start}/{role}": line for role, line in lines.items()}
        if rest:
            rows = [f"| {tag.removeprefix(self.name + '/')} | {figures.number(x)} |" for tag, x in rest.items()]
            report.texts[f"{self.name}/measures"] = "\n".join(["| measure | value |", "|---|---|", *rows])
            report.arrays |= rest

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


class Lines:
    """Curves over time, one per role."""

    def __init__(self, limit: int = HISTORY) -> None:
        self.limit = limit
        self.steps: list[int] = []
        self.values: list[dict[str, float]] = []

    def add(self, step: int, values: Mapping[str, float]) -> None:
        """Add a point to every curve.

        Args:
            step: when.
            values: by role.
        """
        self.steps.append(step)
        self.values.append(dict(values))
        if len(self.steps) > self.limit:
            self.steps, self.values = self.steps[::2], self.values[::2]

    def table(self) -> tuple[list[int], dict[str, list[float]]]:
        """The curves.

        Returns:
            (steps, values by role, NaN where a role had none).
        """
        roles = dict.fromkeys(role for values in self.values for role in values)
        return self.steps, {role: [values.get(role, math.nan) for values in self.values] for role in roles}


def found_entries(run: Run) -> list[view.Entry]:
    """The trained parameters of a run.

    Returns:
        See `view.entries`.
    """
    return view.entries(run.model, run.optimizer)
