"""What all probes share: when they work, what they see, what they cost."""

from __future__ import annotations

import contextlib
import math
import re
import time
import traceback
import warnings
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn

from lightning_optim.core.parallel import sharding
from lightning_optim.diagnostics import figures, view
from lightning_optim.diagnostics.report import OverheadBudget, Report, checked, over_ranks, summed

T = TypeVar("T")
ENTRIES: Mapping[str, Callable[[], Any]] = {
    "start": lambda: None,
    "begin": lambda: None,
    "see": lambda: None,
    "forwarded": lambda: None,
    "backward": lambda: None,
    "ready": lambda: None,
    "failed": lambda: None,
    "end": lambda: None,
    "stop": lambda: None,
    "layout": dict,
    "state_dict": dict,
    "load_state_dict": lambda: None,
}
"""What a framework calls of a probe, and what it gets from one that has stopped measuring."""
HISTORY = 120
"""Columns of a picture over time; beyond it every second one is dropped."""


class SettingError(ValueError):
    """A setting that the run cannot honor: refused, where any other exception only ends the measuring."""


class OtherRankError(RuntimeError):
    """The probe of another rank has failed."""


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
            `ddp`, the wrapper; `group`, the process group; `rows_belong_together`, where the loss of some of a batch's
            rows says nothing of the loss of all.
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

    A probe never ends a run: an exception in any of these methods is one warning, and the probe stops measuring, on all
    ranks with the next measurement. Only a `SettingError` is raised.

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
    needs_loss: ClassVar[bool] = False
    """Whether the probe calls the run's loss. Its callbacks then have an argument `loss` for it."""
    curves: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Start of tags that end in a role to title and vertical axis of a picture."""
    remedy: ClassVar[str] = "leave it out, or change what it is given"
    """What a user can do where the probe fails."""

    def __init__(self, every: int, max_overhead: float, detail: bool = False) -> None:
        if every < 1 or not max_overhead > 0:
            raise ValueError(f"{self.name}: needs every >= 1 and max_overhead > 0, got {every}, {max_overhead}")
        self.pace = OverheadBudget(every, max_overhead)
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
        self.title = type(self).__name__
        """What the user calls it."""
        self.stopped = False
        """Whether it measures no more in this run, after an exception."""
        self._together = False
        """Whether all ranks are in the same part of a measurement, and will hear of a failure at the next exchange."""
        self._untold = False
        """Whether the other ranks have yet to hear that this one has failed."""

    # -- failures -------------------------------------------------------------------------------------------------

    def __getattribute__(self, name: str) -> Any:
        """Have what frameworks call never end a run, whoever overrides it."""
        value = object.__getattribute__(self, name)
        if name not in ENTRIES or object.__getattribute__(self, "_inside"):
            return value
        return lambda *args, **kwargs: self._entry(name, value, args, kwargs)

    def _entry(self, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        default = ENTRIES[name]()
        if name == "load_state_dict":
            return self._load(call, *args, **kwargs)
        if self.stopped and name not in ("start", "stop", "state_dict"):
            if self._untold and name == "end" and self._made is not None:
                self._tell()
            if not self._untold:
                self._leave()
            return default
        out = self._guarded(call, name, args, kwargs)
        return default if self.stopped and out is None else out

    def _load(self, load: Callable[[Any], None], state: Mapping[str, Any]) -> None:
        """Continue what was saved; a probe that had failed saved nothing."""
        if not state:
            return
        try:
            self._inside = True
            load(state)
        except Exception as error:
            warnings.warn(
                f"{self.title} starts over, as it cannot read its state in the checkpoint: "
                f"{type(error).__name__}: {error}",
                stacklevel=4,
            )
        finally:
            self._inside = False

    def safely(self, call: Callable[..., T], *args: Any) -> T | None:
        """Call something that belongs to measuring; an exception becomes a warning, and the end of measuring.

        Args:
            call: what writes reports, say.
            *args: of the call.

        Returns:
            What the call returns; None of a probe that has stopped.

        Raises:
            SettingError: a setting that cannot be honored.
        """
        return None if self.stopped else self._guarded(call, getattr(call, "__name__", "a call"), args, {})

    def _guarded(self, call: Callable[..., T], name: str, args: Any, kwargs: Any) -> T | None:
        outer, self._inside = self._inside, True
        try:
            return call(*args, **kwargs)
        except SettingError:
            raise
        except Exception as error:
            if outer:
                raise
            self._inside = False
            if isinstance(error, OtherRankError):
                self.give_up("it failed on another rank, whose warning says why", alone=False)
            else:
                self.give_up(f"{type(error).__name__}: {error} ({_place_of(error)}, in {name})")
            return None
        finally:
            self._inside = outer

    def give_up(self, reason: str, *, alone: bool = True) -> None:
        """Stop measuring for the rest of the run, with one warning.

        Args:
            reason: why.
            alone: whether the other ranks do not know it, nor come to the same conclusion.
        """
        if self.stopped:
            return
        self.stopped = True
        self._untold = alone and self.run is not None and self.run.ranks > 1
        self._clear()
        if self._together:
            self._tell()
        warnings.warn(
            f"{self.title} stops measuring, and training continues without it: {reason.rstrip('.')}. "
            f"{self.remedy[0].upper()}{self.remedy[1:]}",
            stacklevel=2,
        )

    def _tell(self) -> None:
        """Let the other ranks, which wait in an exchange, know that this one has failed."""
        untold, self._untold, self._together = self._untold, False, False
        if untold:
            with contextlib.suppress(OtherRankError):
                self._agree(failed=True)

    def _agree(self, *, failed: bool = False) -> None:
        """Exchange with all ranks whether the probe of one has failed."""
        run = self.run
        if run is None or run.ranks == 1:
            return
        device = sharding.local(run.optimizer.param_groups[0]["params"][0]).device
        if summed(torch.tensor([float(failed)], device=device)).sum() > 0:
            raise OtherRankError

    def _leave(self) -> None:
        """Remove the optimizer's hooks; not within one of them, as torch iterates over them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _clear(self) -> None:
        """Let hooks and copies go; an exception here has nothing left to stop."""
        self._started = None
        inside, self._inside = self._inside, True
        try:
            self.clear()
        except Exception as error:
            warnings.warn(f"{self.title} could not put everything away: {type(error).__name__}: {error}", stacklevel=3)
        finally:
            self._inside = inside

    # -- called by a framework ------------------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Begin to watch a run.

        Args:
            run: what there is to see.

        Raises:
            SettingError: a setting that the run cannot honor.
        """
        self.stop()
        self.stopped = self._untold = self._together = False
        self.run, self.step = run, run.step
        self._handles = [
            run.optimizer.register_step_pre_hook(lambda *_: self._before_step()),
            run.optimizer.register_step_post_hook(lambda *_: self._after_step()),
        ]
        try:
            self.prepare(run)
        except SettingError:
            self._leave()
            raise

    def stop(self) -> None:
        """Stop watching; also after an exception."""
        self._leave()
        self._sampled = self._untold = self._together = False
        self._made = None
        self._clear()

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
        self._together = True
        with checked(self._agree):
            with self._timed():
                self.finish(self.run, report)
                self._show(report)
            self._adapt_interval(report)
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

    _inside = False
    """Whether a method that a framework calls is under way."""
    _cost_inside = 0.0
    _count_before: float | None = None

    def _timed(self) -> _Timed:
        return _Timed(self)

    def _before_step(self) -> None:
        if self.run is None:
            return
        if self._untold:  # counts on, so as to tell the others when they measure next
            self.step += 1
            self._sampled = self.pace.due(self.step)
        else:
            self.safely(self._before)

    def _after_step(self) -> None:
        if self.run is None:
            return
        if not self._untold:
            self.safely(self._after)
        if self._untold and self._sampled:
            self._tell()

    def _before(self) -> None:
        assert self.run is not None
        self.step += 1
        self._sampled = self.pace.due(self.step)
        self._count_before = _count(self.run.optimizer)
        if self._sampled:
            with self._timed(), torch.no_grad():
                self.before(self.run)

    def _after(self) -> None:
        assert self.run is not None
        now = _count(self.run.optimizer)
        self.always(self.run, now is None or self._count_before is None or now > self._count_before)
        if self._sampled:
            self._together = True
            with self._timed(), torch.no_grad(), checked(self._agree):
                self._agree()
                self._made = self.after(self.run)
                self._agree()
            self._sampled = self._together = False

    def _adapt_interval(self, report: Report) -> None:
        """Note the cost, agreed on by all ranks so that they keep measuring together."""
        assert self.run is not None
        device = sharding.local(self.run.optimizer.param_groups[0]["params"][0]).device
        trained = self.pace._since
        agreed = over_ranks(torch.tensor([self._cost, trained], dtype=torch.float64, device=device)) / self.run.ranks
        self._together = False
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


def _place_of(error: BaseException) -> str:
    """Where an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "no traceback"


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
