"""Refreshes of preconditioners: when they happen, and what they cost."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.parallel import sharding
from lightning_optim.core.param_groups import rule_of
from lightning_optim.core.step.records import Refresh
from lightning_optim.core.step.refresh_scheduler import staleness
from lightning_optim.diagnostics.probes.base import Probe
from lightning_optim.diagnostics.probes.context import TrainingContext
from lightning_optim.diagnostics.probes.failures import SettingError
from lightning_optim.diagnostics.probes.refresh_history import RefreshHistory
from lightning_optim.diagnostics.report import Report, over_ranks
from lightning_optim.refresh import parse


class PreconditionerRefresh(Probe):
    """Sets when preconditioners (eigenbases, inverse roots, projections) are recomputed, and logs what that costs.

    The callback applies to every rule of this package with preconditioners and logs nothing for other optimizers. It
    logs the refreshes since the last measurement: `refresh/count`, `refresh/ms`, `refresh/share_of_step`,
    `refresh/age_mean`, `age_max` (at present), `refresh/staleness_mean`, `staleness_p95` (of all matrices at
    present, where the rule defines it), `refresh/drift` (1 - overlap of new and old state) and
    `refresh/reason/<reason>`. The pictures `refresh/raster` and `refresh/cost` have a row per matrix and a column per
    step: when each was refreshed, why, and in how many milliseconds.

    Args:
        policy: text of a policy (`lightning_optim.refresh`) for all rules with preconditioners; None leaves the policy
            of each group.
        schedule: optimizer step to the policy that applies from that step on.
        every: steps between measurements.
        max_overhead: share of training time above which the interval doubles.
        detail: whether every measure is also a scalar, not only those of the charts.
    """

    name = "refresh"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "share of training time that refreshes take": ["refresh/share_of_step"],
        "refreshes since the last measurement": ["refresh/count"],
        "age of the oldest preconditioner (steps)": ["refresh/age_max"],
        "mean staleness of preconditioners": ["refresh/staleness_mean"],
        "drift: 1 - overlap of new and replaced state": ["refresh/drift"],
    }
    curves: ClassVar[Mapping[str, tuple[str, str]]] = {
        "refresh/reason": ("refreshes since the last measurement, by reason", "number"),
    }

    def __init__(
        self,
        policy: str | None = None,
        schedule: Mapping[int, str] | None = None,
        every: int = 25,
        max_overhead: float = 0.01,
        detail: bool = False,
    ) -> None:
        super().__init__(every, max_overhead, detail)
        self.schedule = dict(sorted((int(step), text) for step, text in (schedule or {}).items()))
        if policy is not None:
            self.schedule = {0: policy} | self.schedule
        for text in self.schedule.values():
            parse(text)
        self.events: list[tuple[int, Refresh]] = []
        self.total = 0
        self.history = RefreshHistory()
        self._since = 0.0
        self._policy: Any = None
        self._policy_step = 0

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return super().state_dict() | {"total": self.total}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(state)
        self.total = state["total"]

    def prepare(self, context: TrainingContext) -> None:
        """Subscribe to the optimizer's refreshes and set the policy.

        Args:
            context: the run.

        Raises:
            SettingError: a policy that measures staleness, for a rule that does not define it.
        """
        self.events = []
        if isinstance(context.optimizer, RuleOptimizer):
            for text in self.schedule.values():
                self._set_policy(context.optimizer, text, only_check=True)
            context.optimizer.on_refresh = self._note
            if context.optimizer.process_group is None:
                context.optimizer.process_group = context.extra.get("group")
            self._policy_step = context.step
            self._apply_policy(context.optimizer, context.step + 1)
            if self.schedule:  # a hook of its own: the policy applies even if measuring fails
                self._policy = context.optimizer.register_step_pre_hook(lambda *_: self._advance_policy(context))

    def _note(self, refresh: Refresh) -> None:
        self.events.append((self.step, refresh))

    def clear(self) -> None:  # noqa: D102
        if self.context is not None and isinstance(self.context.optimizer, RuleOptimizer):
            self.context.optimizer.on_refresh = None

    def stop(self) -> None:  # noqa: D102
        super().stop()
        if self._policy is not None:
            self._policy.remove()
            self._policy = None

    def _advance_policy(self, context: TrainingContext) -> None:
        self._policy_step += 1
        self._apply_policy(context.optimizer, self._policy_step)

    def _apply_policy(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        texts = [text for start, text in self.schedule.items() if start <= step]
        if texts and isinstance(optimizer, RuleOptimizer):
            self._set_policy(optimizer, texts[-1])

    def _set_policy(self, optimizer: RuleOptimizer, text: str, *, only_check: bool = False) -> None:
        for group in optimizer.group_steps():
            if group.rule.preconditioners and group.group["refresh"] != text:
                before = group.group["refresh"]
                group.group["refresh"] = text
                try:
                    rule_of(group.group).validate()
                except ValueError as error:
                    group.group["refresh"] = before
                    raise SettingError(str(error)) from error
                if only_check:
                    group.group["refresh"] = before

    def measure(self, context: TrainingContext) -> Report | None:  # noqa: D102
        if not isinstance(context.optimizer, RuleOptimizer):
            return None
        ages: dict[str, float] = {}
        stale: dict[str, Tensor] = {}
        names: list[str] = []
        for group in context.optimizer.group_steps():
            if not group.rule.preconditioners:
                continue
            for s in group.params:
                name = s.plan.name
                records = [t for key, t in s.state.items() if key.partition(".")[0] == "refreshed"]
                if not records:
                    continue
                names.append(name)
                if all(sharding.local(t).numel() for t in records):  # empty on ranks that do not own the matrix
                    ages[name] = max(float(record[:, 0].amax()) for record in s.refresh_records())
                    whole = sharding.sharding_of(s.plan.param) is None
                    if whole and s.grad is not None and group.rule.measures_staleness():
                        stale[name] = staleness(group, s, s.gradient())
        if not names:
            return None
        events, trained = list(self.events), self.budget.trained - self._since
        self._since = self.budget.trained
        self.events.clear()
        return self._report_of(context, names, ages, {k: float(v) for k, v in stale.items()}, events, trained)

    def _report_of(
        self,
        context: TrainingContext,
        names: list[str],
        ages: Mapping[str, float],
        stale: Mapping[str, float],
        noted: list[tuple[int, Refresh]],
        trained: float,
    ) -> Report:
        device, events = context.device, [event for _, event in noted]
        drifts = [1 - e.overlap for e in events if not math.isnan(e.overlap)]
        seconds = sum(e.seconds for e in events)
        scalars = [len(events), seconds, sum(drifts), len(drifts), trained]
        last = {e.name: float(e.age) for e in events}
        columns = [scalars]
        for table in (ages, stale, last):
            columns += [[table.get(n, 0.0) for n in names], [float(n in table) for n in names]]
        flat = torch.tensor([x for column in columns for x in column], dtype=torch.float64, device=device)
        sums = over_ranks(flat).cpu()
        count, seconds, drift, drifted, trained = sums[:5].tolist()
        tables = sums[5:].view(3, 2, len(names))
        age, staleness, marks = (torch.where(k > 0, v / k, math.nan) for v, k in tables)
        shared = float(tables[0, 1].max())  # number of ranks that refresh the same matrices
        count, seconds = count / shared, seconds / shared
        self.total += round(count)
        report = Report()
        s = report.scalars
        s["refresh/count"] = count
        s["refresh/ms"] = 1e3 * seconds
        if trained > 0:
            s["refresh/share_of_step"] = seconds / (trained / context.ranks) / (context.ranks / shared)
        s |= {"refresh/age_mean": float(age.nanmean()), "refresh/age_max": float(age.nan_to_num(0.0).max())}
        finite = staleness[~staleness.isnan()]
        if finite.numel():
            s |= {"refresh/staleness_mean": float(finite.mean()), "refresh/staleness_p95": float(finite.quantile(0.95))}
        if drifted:
            s["refresh/drift"] = drift / drifted
        s |= {f"refresh/reason/{reason}": float(n) for reason, n in Counter(e.reason for e in events).items()}
        self.history.add(names, noted, self.step, device)
        report.images |= self.history.pictures()
        report.arrays = {"names": names, "age": age, "staleness": staleness, "refreshed_at_age": marks}
        report.scalars = report.finite()
        return report
