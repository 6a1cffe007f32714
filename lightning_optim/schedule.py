"""Learning rate and momentum over a run, by role: what torch's schedulers, one factor for all groups, do not have.

In a loop of your own, or with torch's `LambdaLR` in its place where that is enough:

    optimizer = build_optimizer(model, "muon", lr=0.02, schedule={"schedule": "power", "cooldown": 0.8, "power": 1.2})
    scheduler = ScheduleLR(optimizer, total_steps=1000)       # scheduler.step() after every optimizer.step()
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, get_type_hints

from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lightning_optim.core.momentum_alias import momentum_of, set_momentum
from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.rule import check_value, nearest

SCHEDULES = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
    "power": lambda x: 1.0 - x,
}
"""Factor of the learning rate as a function of the share of steps done after the warm-up; `"power"` takes a power."""

OF_ROLE = ("cooldown", "min_lr_ratio")
"""What a group, and so an override and `rest_settings`, may have for itself."""


@dataclass(frozen=True)
class ScheduleConfig:
    """A schedule as a value; `settings` of a preset and the argument `schedule` of `build_optimizer` are its fields.

    Step t = 0, 1, ... has the factor `min(1, (t + 1) / warmup_steps)` in the warm-up, and then

        constant    1
        linear, cosine    floor + (1 - floor) f((t - warmup_steps) / (total_steps - warmup_steps))
        power       floor + (1 - floor) min(1, (T - t) / D)^p, T the horizon, D the cooldown

    A horizon beyond `total_steps` ends the run early, as the records of the NanoGPT benchmark do. Numbers of steps may
    be given as a float: a share of `total_steps` (`horizon`) or of T (`cooldown`).

    Args:
        schedule: a name of `SCHEDULES`.
        warmup_steps: of linear warm-up.
        total_steps: of the run; a trainer knows it.
        min_lr_ratio: the floor. A group's own, from an override, goes before; so for `cooldown`.
        cooldown: D; all steps after the warm-up if not given. At a power of 1 that is the linear schedule.
        horizon: T; `total_steps` if not given.
        power: p.
        momentum_warmup_steps: steps in which the main rule's momentum rises linearly; 0 for none.
        momentum_start: momentum of the first of them; 0.85 over 300 steps is the speed-run recipe for Muon's 0.95
            (github.com/KellerJordan/modded-nanogpt).
        momentum_cooldown_steps: last steps before T in which it falls linearly.
        momentum_end: what it falls to.

    Raises:
        ValueError: an unknown schedule, or a value out of range.
    """

    schedule: str = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    min_lr_ratio: float = 0.0
    cooldown: float | None = None
    horizon: float | None = None
    power: float = 1.0
    momentum_warmup_steps: int = 0
    momentum_start: float = 0.85
    momentum_cooldown_steps: int = 0
    momentum_end: float = 0.85

    def __post_init__(self) -> None:
        """Check the values."""
        hints = get_type_hints(type(self))
        for f in fields(self):
            value = getattr(self, f.name)
            if f.name == "schedule":
                if value not in SCHEDULES:
                    raise ValueError(f"unknown schedule {value!r}; {nearest(str(value), list(SCHEDULES))}")
            elif hints[f.name] is int and isinstance(value, int) and value < 0:
                raise ValueError(f"{f.name} must be >= 0, got {value}")
            else:
                later = f.name in ("momentum_start", "momentum_end")  # `ScheduleLR` knows what they must lie below
                check_value(f"schedule: {f.name}", value, hints[f.name], signed=later)
        for key, most in (("cooldown", 1.0), ("horizon", 10.0)):
            value = getattr(self, key)
            if isinstance(value, float) and value > most:
                raise ValueError(f"schedule: {key} is a share as a float, a number of steps as an int; got {value}")
        if self.schedule != "power" and (self.cooldown, self.horizon, self.power) != (None, None, 1.0):
            raise ValueError(f"cooldown, horizon and power are for schedule='power', not {self.schedule!r}")

    @classmethod
    def of(cls, schedule: str | Mapping[str, Any]) -> ScheduleConfig:
        """Make a schedule of a name or of plain settings.

        Args:
            schedule: a name of `SCHEDULES`, or some of the fields.

        Returns:
            The schedule.

        Raises:
            ValueError: a name that is no field.
        """
        settings = schedule_settings(schedule)
        names = [f.name for f in fields(cls)]
        for key in settings:
            if key not in names:
                raise ValueError(f"a schedule has no setting {key!r}; {nearest(key, names)}")
        return cls(**settings)

    @property
    def needs_total(self) -> bool:
        """Whether the length of the run matters after the warm-up."""
        by_itself = isinstance(self.horizon, int)
        return not by_itself and (self.schedule != "constant" or self.momentum_cooldown_steps > 0)

    def end(self, total: int) -> float:
        """The horizon T.

        Args:
            total: steps of the run.

        Returns:
            Steps.
        """
        return _steps(self.horizon, total) if self.horizon is not None else total

    def factor(self, step: int, total: Callable[[], int | None], group: Mapping[str, Any]) -> float:
        """The factor of a group's learning rate.

        Args:
            step: from 0.
            total: gives the steps of the run, or None as long as they are not known, for which the factor after the
                warm-up is 1; only asked where it matters.
            group: may have what `OF_ROLE` names.

        Returns:
            The factor.
        """
        warm = self.warmup_steps
        if step < warm:
            return (step + 1) / warm
        if self.schedule == "constant" or (step == warm and self.schedule != "power"):
            return 1.0
        steps = total() if self.needs_total else 0
        if steps is None:
            return 1.0
        floor = group.get("min_lr_ratio", self.min_lr_ratio)
        end = self.end(steps)
        cooldown = group.get("cooldown", self.cooldown) if self.schedule == "power" else None
        length = end - warm if cooldown is None else _steps(cooldown, end)
        share = min(1.0, max(0.0, 1 - (end - step) / max(1, length)))
        return floor + (1 - floor) * SCHEDULES[self.schedule](share) ** self.power

    def momentum(self, step: int, total: Callable[[], int | None], full: float) -> float:
        """The momentum of the main rule.

        Args:
            step: from 0.
            total: gives the steps of the run, or None as long as they are not known; only asked where it matters.
            full: its value between the two ends.

        Returns:
            The momentum.
        """
        if step < self.momentum_warmup_steps:
            return self.momentum_start + (full - self.momentum_start) * (step / self.momentum_warmup_steps)
        steps = total() if self.momentum_cooldown_steps and self.needs_total else 0
        if not self.momentum_cooldown_steps or steps is None:
            return full
        left = (self.end(steps) - step) / self.momentum_cooldown_steps
        return self.momentum_end + (full - self.momentum_end) * min(1.0, max(0.0, left))

    def moving(self, optimizer: RuleOptimizer, step: int) -> list[dict[str, Any]]:
        """Groups whose momentum is on the way.

        Args:
            optimizer: whose groups.
            step: from 0.

        Returns:
            Those of the main rule, or none.
        """
        moves = self.momentum_cooldown_steps or (self.momentum_warmup_steps and step <= self.momentum_warmup_steps)
        return [g for g in optimizer.param_groups if moves and g["rule"] == optimizer.defaults["rule"]]

    def move_momentum(self, optimizer: RuleOptimizer, step: int, total: int | Callable[[], int | None]) -> None:
        """Set the momentum of a step.

        Args:
            optimizer: whose main rule has one.
            step: from 0.
            total: steps of the run, or what gives them.
        """
        for group in self.moving(optimizer, step):
            full = group.setdefault("initial_momentum", _full_momentum(group))
            now = self.momentum(step, total if callable(total) else lambda: self.total_steps or total, full)
            set_momentum(group, now)


def schedule_settings(schedule: str | Mapping[str, Any] | None) -> dict[str, Any]:
    """The settings that an argument `schedule` stands for.

    Args:
        schedule: a name of `SCHEDULES`, some of the fields of `ScheduleConfig`, or None.

    Returns:
        Fields of `ScheduleConfig` by name.
    """
    return {"schedule": schedule} if isinstance(schedule, str) else dict(schedule or {})


def _steps(value: float, of: float) -> float:
    return value if isinstance(value, int) else value * of


class ScheduleLR(LambdaLR):
    """A `LambdaLR` that also moves groups added during training (`BaseFinetuning`), from the lr they came with.

    Groups may have a cooldown and a floor of their own. The momentum of the optimizer's main rule, `momentum`, or
    `betas[0]` of a rule that has no field of that name, follows the curve too; the groups of other rules keep theirs.

    Args:
        optimizer: of this package.
        curve: what to follow; the optimizer's own (`build_optimizer(..., schedule=...)`) if not given.
        total_steps: of the run, or what to call for it whenever it matters, which may say None as long as nobody knows;
            the curve's if not given.

    Raises:
        ValueError: no curve, or the main rule has no momentum, or one that is not above the curve's ends.
    """

    def __init__(
        self,
        optimizer: RuleOptimizer,
        curve: ScheduleConfig | None = None,
        total_steps: int | Callable[[], int | None] | None = None,
    ) -> None:
        curve = curve or optimizer.curve
        if curve is None:
            raise ValueError("Schedule: give a curve, or build the optimizer with schedule=...")
        length = curve.total_steps if curve.total_steps is not None else total_steps
        self.optimizer, self._curve, self._total = optimizer, curve, length
        shares = optimizer.averages is not None and optimizer.averages.needs_total
        if isinstance(length, int) or (length is not None and shares):
            optimizer.total_steps = length
        self.momentum_warmup_steps, self.momentum_start = curve.momentum_warmup_steps, curve.momentum_start
        for group in curve.moving(optimizer, 0):
            if momentum_of(group) is None:
                raise ValueError(f"{group['rule']} has no momentum to warm up")
            for key, steps in (("start", curve.momentum_warmup_steps), ("end", curve.momentum_cooldown_steps)):
                value, full = getattr(curve, f"momentum_{key}"), _full_momentum(group)
                if steps and not 0 <= value < full:
                    raise ValueError(
                        f"momentum_{key} must lie below the momentum of group {group['name']!r}, {full}; got {value}"
                    )
        super().__init__(optimizer, [partial(self._factor, i) for i in range(len(optimizer.param_groups))])

    def _asked(self) -> int | None:
        """Steps of the run as it is now: a trainer's search for a batch size is a run too, of another length."""
        if self._total is None:
            raise ValueError("the schedule depends on the length of the run: give total_steps")
        return self._total() if callable(self._total) else self._total

    def begin(self) -> None:
        """Say that the run starts: its length is known now, and a finder may have set the learning rates.

        A learning rate that somebody set before the first step is the group's peak from then on. A run that is resumed
        continues as it was.

        Raises:
            ValueError: the schedule depends on the length of the run, which is not known.
        """
        if self._curve.needs_total:
            self._asked()
        if self.last_epoch == 0:
            for i, group in enumerate(self.optimizer.param_groups[: len(self.lr_lambdas)]):
                if float(group["lr"]) != float(self._last_lr[i]):
                    self.base_lrs[i] = group["initial_lr"] = _copied(group["lr"])
                now = self.base_lrs[i] * self._factor(i, 0)
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(now)
                else:
                    group["lr"] = now
            self._last_lr = [_copied(group["lr"]) for group in self.optimizer.param_groups]
            self._curve.move_momentum(self.optimizer, 0, self._asked)

    def _factor(self, i: int, step: int) -> float:
        return self._curve.factor(step, self._asked, self.optimizer.param_groups[i])

    def state_dict(self) -> dict[str, Any]:
        """Where the schedule is.

        Returns:
            Plain values.
        """
        return {k: v for k, v in super().state_dict().items() if k not in ("_curve", "_total")}

    def step(self, epoch: int | None = None) -> None:
        """Go to the next step.

        Args:
            epoch: deprecated in torch, the step to go to.
        """
        super().step(epoch)
        self._curve.move_momentum(self.optimizer, self.last_epoch, self._asked)

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the step to come.

        Returns:
            One per group.
        """
        first, step, groups = len(self.lr_lambdas), self.last_epoch, self.optimizer.param_groups
        out = [*super().get_lr()]
        for i in range(first, len(groups)):
            out.append(groups[i]["lr"] * (self._factor(i, step) / (self._factor(i, step - 1) or 1.0)))
        return out


def _copied(lr: float | Tensor) -> float | Tensor:
    return lr.clone() if isinstance(lr, Tensor) else lr


def _full_momentum(group: Mapping[str, Any]) -> float:
    """The momentum between warm-up and cooldown; kept in the group, as the learning rate's `initial_lr` is."""
    return group.get("initial_momentum", momentum_of(group))
