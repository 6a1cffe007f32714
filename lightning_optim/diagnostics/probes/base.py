"""The base class of all probes: when they measure, what they may read, and how long they may take."""

from __future__ import annotations

import time
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim.diagnostics.probes.context import TrainingContext
from lightning_optim.diagnostics.probes.failures import FailureContainment, SettingError
from lightning_optim.diagnostics.probes.presentation import ReportPresentation
from lightning_optim.diagnostics.report import OverheadBudget, Report, checked, over_ranks


class Probe(FailureContainment, ReportPresentation):
    """Base of all probes.

    A framework calls `start`, then `begin_batch` and `end_batch` around every optimizer step or micro-batch, and in
    between, for every batch, `record_batch`, `after_forward` and `after_backward`, then `before_optimizer_step`; at the
    end `stop`. Hooks of the optimizer call the probe before and after each step. A probe changes nothing that training
    depends on: weights, gradients, state, modes and random numbers are as without it.

    A probe overrides `measure`, which returns a report of a sampled step, and those of the other methods it needs.
    An exception in any of them is one warning (`FailureContainment`); only a `SettingError` is raised. `Report.scalars`
    that no chart shows become pictures and a table (`ReportPresentation`); all probes together log at most 60 tags.

    Args:
        every: steps between measurements.
        max_overhead: share of training time above which the interval doubles.
        detail: whether every measure is also a scalar.
    """

    needs_loss: ClassVar[bool] = False
    """Whether the probe calls the run's loss. Its callbacks then have an argument `loss` for it."""

    def __init__(self, every: int, max_overhead: float, detail: bool = False) -> None:
        if every < 1 or not max_overhead > 0:
            raise ValueError(f"{self.name}: needs every >= 1 and max_overhead > 0, got {every}, {max_overhead}")
        FailureContainment.__init__(self)
        ReportPresentation.__init__(self, detail)
        self.budget = OverheadBudget(every, max_overhead)
        self.context: TrainingContext | None = None
        self.step = 0
        self._logged_interval = 0
        self._is_sampled = False
        self._cost = 0.0
        self._cost_in_batch = 0.0
        self._batch_start: float | None = None
        self._step_count: float | None = None

    # -- called by a framework ------------------------------------------------------------------------------------

    def start(self, context: TrainingContext) -> None:
        """Start to measure a run.

        Args:
            context: the run.

        Raises:
            SettingError: a setting that the run cannot honor.
        """
        self.stop()
        self.stopped = self._unreported_failure = self._in_exchange = False
        self.context, self.step = context, context.step
        self._handles = [
            context.optimizer.register_step_pre_hook(lambda *_: self._pre_step_hook()),
            context.optimizer.register_step_post_hook(lambda *_: self._post_step_hook()),
        ]
        try:
            self.prepare(context)
        except SettingError:
            self._remove_hooks()
            raise

    def stop(self) -> None:
        """Stop measuring; also after an exception."""
        self._remove_hooks()
        self._is_sampled = self._unreported_failure = self._in_exchange = False
        self._pending_report = self._batch_start = None
        self._release()

    def begin_batch(self) -> None:
        """A step, or one of its micro-batches, begins."""
        self._batch_start, self._cost_in_batch = time.perf_counter(), 0.0

    def record_batch(self, batch: Any) -> None:
        """A batch is about to be trained on.

        Args:
            batch: tensors, in any nesting.
        """

    def after_forward(self) -> None:
        """The forward pass of a batch has ended, its backward pass begins."""

    def after_backward(self) -> None:
        """The backward pass of a batch has ended; gradients are not clipped yet."""

    def before_optimizer_step(self) -> None:
        """The optimizer is about to step."""

    def on_exception(self, error: BaseException) -> None:
        """Training ends with an exception.

        Args:
            error: the exception.
        """

    def end_batch(self) -> Report | None:
        """A step, or one of its micro-batches, has ended.

        Returns:
            A report, if the step was sampled.
        """
        if self._batch_start is not None:
            seconds = time.perf_counter() - self._batch_start - self._cost_in_batch
            self.budget.add_training_time(max(0.0, seconds))
            self._batch_start = None
        report, self._pending_report = self._pending_report, None
        if report is None or self.context is None:
            return None
        self._in_exchange = True
        with checked(self._exchange_failures):
            with MeasurementTimer(self):
                self.complete(self.context, report)
                self.present(report)
            self._adapt_interval(report)
        return report.under(self.prefix)

    def state_dict(self) -> dict[str, Any]:
        """State from which a resumed run continues.

        Returns:
            Plain values.
        """
        return {"pace": self.budget.state_dict(), "filled": sorted(self.filled_charts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state: from `state_dict`.
        """
        self.budget.load_state_dict(state["pace"])
        self.filled_charts = set(state["filled"])

    # -- overridden by probes -------------------------------------------------------------------------------------

    def prepare(self, context: TrainingContext) -> None:
        """The run begins."""

    def before_step(self, context: TrainingContext) -> None:
        """A sampled step begins; in Lightning the gradients are not there yet."""

    def after_every_step(self, context: TrainingContext, advanced: bool) -> None:
        """A step has been taken, sampled or not.

        Args:
            context: the run.
            advanced: whether the optimizer updated the weights, as far as its state tells.
        """

    def measure(self, context: TrainingContext) -> Report | None:
        """Measure a sampled step that has been taken; gradients are as the optimizer received them.

        Args:
            context: the run.

        Returns:
            The report, which `complete` completes; None if there is nothing to report.
        """
        return Report()

    def complete(self, context: TrainingContext, report: Report) -> None:
        """Complete a report after the step. The model may be called; the gradients may be gone.

        Args:
            context: the run.
            report: from `measure`.
        """

    # -- inside ---------------------------------------------------------------------------------------------------

    def _pre_step_hook(self) -> None:
        if self.context is None:
            return
        if self._unreported_failure:  # keep counting, to report the failure when the other ranks measure next
            self.step += 1
            self._is_sampled = self.budget.due(self.step)
        else:
            self.safely(self._before)

    def _post_step_hook(self) -> None:
        if self.context is None:
            return
        if not self._unreported_failure:
            self.safely(self._after)
        if self._unreported_failure and self._is_sampled:
            self._report_failure()

    def _before(self) -> None:
        assert self.context is not None
        self.step += 1
        self._is_sampled = self.budget.due(self.step)
        self._step_count = _step_count(self.context.optimizer)
        if self._is_sampled:
            with MeasurementTimer(self), torch.no_grad():
                self.before_step(self.context)

    def _after(self) -> None:
        assert self.context is not None
        count = _step_count(self.context.optimizer)
        advanced = count is None or self._step_count is None or count > self._step_count
        self.after_every_step(self.context, advanced)
        if self._is_sampled:
            self._in_exchange = True
            with MeasurementTimer(self), torch.no_grad(), checked(self._exchange_failures):
                self._exchange_failures()
                self._pending_report = self.measure(self.context)
                self._exchange_failures()
            self._is_sampled = self._in_exchange = False

    def _adapt_interval(self, report: Report) -> None:
        """Record the cost, averaged over ranks so that they keep measuring together, and log the interval."""
        assert self.context is not None
        times = torch.tensor([self._cost, self.budget._since], dtype=torch.float64, device=self.context.device)
        times = over_ranks(times) / self.context.ranks
        self._in_exchange = False
        seconds, self.budget._since = times.tolist()
        self.budget.add_measurement(seconds)
        self._cost = 0.0
        report.scalars[f"diagnostics/share/{self.name}"] = self.budget.share
        if self.detail:
            report.scalars[f"diagnostics/interval/{self.name}"] = float(self.budget.every)
        if self._logged_interval != self.budget.every:
            reason = f": it took {self.budget.judged:.2%} of training, more than {self.budget.limit:.2%}"
            reason = reason if self._logged_interval > 0 else ""
            self._logged_interval = self.budget.every
            report.texts[f"diagnostics/interval/{self.name}"] = f"every {self.budget.every} steps{reason}"

    def generator(self, device: torch.device, salt: int = 0) -> torch.Generator:
        """Random numbers of this step, equal on every rank and independent of the training's.

        Args:
            device: of the numbers.
            salt: tells streams apart.

        Returns:
            A generator.
        """
        return torch.Generator(device).manual_seed(1_000_003 * self.step + salt)


class MeasurementTimer:
    """Adds the time of a block to a probe's cost."""

    def __init__(self, probe: Probe) -> None:
        self.probe = probe

    def __enter__(self) -> None:
        _synchronize(self.probe.context)
        self.start = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        _synchronize(self.probe.context)
        seconds = time.perf_counter() - self.start
        self.probe._cost += seconds
        self.probe._cost_in_batch += seconds


def _synchronize(context: TrainingContext | None) -> None:
    """Wait for the device, so that queued kernels of training do not count as cost of the probe."""
    if context is not None and torch.accelerator.is_available():
        device = next(context.model.parameters()).device
        if device.type != "cpu":
            torch.accelerator.synchronize(device)


def _step_count(optimizer: torch.optim.Optimizer) -> float | None:
    """The largest step count of a parameter; None where counts are not on the CPU, or before the first step."""
    counts = [s["step"] for s in optimizer.state.values() if isinstance(s.get("step"), Tensor)]
    if not counts:
        return None if not optimizer.state else -1.0
    if any(c.device.type != "cpu" for c in counts[:1]):
        return None
    return max(float(c) for c in counts)
