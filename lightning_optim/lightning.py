"""Lightning: one line in `configure_optimizers`. The only module of the package that imports lightning."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from lightning import LightningModule
from torch import Tensor
from torch.optim.lr_scheduler import LambdaLR

from lightning_optim.core.executor import Executor
from lightning_optim.core.rule import lookup, nearest
from lightning_optim.factory import build_optimizer
from lightning_optim.partition import Override
from lightning_optim.recipes import find

SCHEDULES = {
    "constant": lambda x: 1.0,
    "linear": lambda x: 1.0 - x,
    "cosine": lambda x: 0.5 * (1 + math.cos(math.pi * x)),
}
"""Factor of the learning rate as a function of the share of steps done after the warm-up."""


class Schedule(LambdaLR):
    """A `LambdaLR` that also moves groups added during training (`BaseFinetuning`), from the lr they came with.

    It can warm up the momentum of the optimizer's main rule too: `momentum`, or `betas[0]` of a rule that has no field
    of that name. At step k it is `start + (momentum - start) min(1, k / momentum_warmup_steps)`. The groups of other
    rules keep theirs.

    Args:
        optimizer: of this package.
        factor: of the learning rate, by step.
        momentum_warmup_steps: optimizer steps of momentum warm-up; 0 for none.
        momentum_start: momentum of the first step; 0.85 over 300 steps is the speed-run recipe for Muon's 0.95
            (github.com/KellerJordan/modded-nanogpt).

    Raises:
        ValueError: the main rule has no momentum, or one that is not above `momentum_start`.
    """

    def __init__(
        self,
        optimizer: Executor,
        factor: Callable[[int], float],
        *,
        momentum_warmup_steps: int = 0,
        momentum_start: float = 0.85,
    ) -> None:
        self.momentum_warmup_steps, self.momentum_start = momentum_warmup_steps, momentum_start
        self.optimizer = optimizer
        if momentum_warmup_steps < 0:
            raise ValueError(f"momentum_warmup_steps must be >= 0, got {momentum_warmup_steps}")
        for group in self._warmed():
            if "momentum" not in group and "betas" not in group:
                raise ValueError(f"{group['rule']} has no momentum to warm up")
            if not 0 <= momentum_start < _full_momentum(group):
                raise ValueError(
                    f"momentum_start must lie below the momentum of group {group['name']!r}, {_full_momentum(group)}; "
                    f"got {momentum_start}"
                )
        super().__init__(optimizer, factor)

    def step(self, epoch: int | None = None) -> None:
        """Go to the next step.

        Args:
            epoch: deprecated in torch, the step to go to.
        """
        super().step(epoch)
        for group in self._warmed():
            end = group.setdefault("initial_momentum", _full_momentum(group))
            done = self.last_epoch / self.momentum_warmup_steps
            now = end if done >= 1 else self.momentum_start + (end - self.momentum_start) * done
            if "momentum" in group:
                group["momentum"] = now
            else:
                group["betas"] = (now, *group["betas"][1:])

    def _warmed(self) -> list[dict[str, Any]]:
        """Groups whose momentum is on the way."""
        if not self.momentum_warmup_steps or getattr(self, "last_epoch", 0) > self.momentum_warmup_steps:
            return []
        main = self.optimizer.defaults["rule"]
        return [group for group in self.optimizer.param_groups if group["rule"] == main]

    def get_lr(self) -> list[float | Tensor]:
        """Learning rates of the step to come.

        Returns:
            One per group.
        """
        factor, step = self.lr_lambdas[0], self.last_epoch
        later = self.optimizer.param_groups[len(self.lr_lambdas) :]
        change = factor(step) / (factor(step - 1) or 1.0) if later else 1.0
        return [*super().get_lr(), *(group["lr"] * change for group in later)]


def configure_optimizers(
    module: LightningModule,
    name: str,
    *,
    lr: float | None = None,
    recipe: str | None = None,
    schedule: str = "constant",
    warmup_steps: int = 0,
    total_steps: int | None = None,
    min_lr_ratio: float = 0.0,
    momentum_warmup_steps: int = 0,
    momentum_start: float = 0.85,
    weight_decay: float | None = None,
    rest: str | None = None,
    rest_lr: float | None = None,
    rest_settings: Mapping[str, Any] | None = None,
    lr_convention: str | None = None,
    overrides: Sequence[Override] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Build what `LightningModule.configure_optimizers` returns.

    Write `return configure_optimizers(self, "muon", lr=3e-4, schedule="cosine", warmup_steps=100)` there.

    Args:
        module: the module; all its trainable parameters are taken.
        name: of the main rule.
        lr: peak learning rate; with the default convention, AdamW's.
        recipe: name of published settings, the learning rate among them, but not the schedule.
        schedule: `"constant"`, `"linear"` or `"cosine"` decay after the warm-up.
        warmup_steps: optimizer steps of linear warm-up from `lr / warmup_steps`.
        total_steps: optimizer steps of the run; asked of the trainer if not given.
        min_lr_ratio: the learning rate decays to this share of `lr`.
        momentum_warmup_steps: optimizer steps in which the main rule's momentum rises linearly to its value; see
            `Schedule`.
        momentum_start: momentum of the first of them.
        weight_decay: see `build_optimizer`, as are the following.
        rest: see `build_optimizer`.
        rest_lr: see `build_optimizer`.
        rest_settings: see `build_optimizer`.
        lr_convention: see `build_optimizer`.
        overrides: see `build_optimizer`.
        **settings: see `build_optimizer`.

    Returns:
        `{"optimizer": ..., "lr_scheduler": {...}}`, one optimizer with a schedule stepped every optimizer step.

    Raises:
        ValueError: an unknown schedule, a run of unknown length, or what `Schedule` and `build_optimizer` raise.
    """
    _check_schedule(schedule)
    optimizer = build_optimizer(
        module,
        name,
        lr=lr,
        recipe=recipe,
        weight_decay=weight_decay,
        rest=rest,
        rest_lr=rest_lr,
        rest_settings=rest_settings,
        lr_convention=lr_convention,
        overrides=overrides,
        **settings,
    )
    groups = optimizer.param_groups
    known = {"momentum": any("momentum" in g for g in groups), "betas": all("betas" in g for g in groups)}
    for key in (k for k, there in known.items() if there):  # LearningRateMonitor looks for these in the defaults
        optimizer.defaults.setdefault(key, next(g[key] for g in groups if key in g))
    if total_steps is None and schedule != "constant" and module.trainer.max_epochs == -1:
        total_steps = _total_steps(module)

    def factor(step: int) -> float:
        nonlocal total_steps
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        if schedule == "constant" or step == warmup_steps:
            return 1.0
        if total_steps is None:  # not asked earlier: the trainer then makes its loader, and never restores its position
            total_steps = _total_steps(module)
        share = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return min_lr_ratio + (1 - min_lr_ratio) * SCHEDULES[schedule](share)

    scheduler = Schedule(optimizer, factor, momentum_warmup_steps=momentum_warmup_steps, momentum_start=momentum_start)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


@dataclass(frozen=True)
class OptimizerConfig:
    """What `configure_optimizers` is to be given, as a value that LightningCLI reads from YAML.

    A module takes it as an argument, `optimizer: OptimizerConfig`, and ends its `configure_optimizers` with
    `return self.optimizer(self)`: it is called with the module because the parameters alone do not tell their roles.
    `optimizer: OptimizerConfig | OptimizerCallable`, in this order, takes optimizer classes as well. jsonargparse lets
    `OptimizerCallable` alone take only them; to such a module give `lightning_optim.callbacks.HybridOptimizer`.

    Args:
        name: see `configure_optimizers`, as are all the following but the last.
        lr: see there.
        recipe: see there.
        schedule: see there.
        warmup_steps: see there.
        total_steps: see there.
        min_lr_ratio: see there.
        momentum_warmup_steps: see there.
        momentum_start: see there.
        weight_decay: see there.
        rest: see there.
        rest_lr: see there.
        rest_settings: see there.
        lr_convention: see there.
        overrides: see there.
        settings: hyperparameters of the main rule, and options of all groups.

    Raises:
        ValueError: an unknown name, recipe or schedule.
    """

    name: str
    lr: float | None = None
    recipe: str | None = None
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    warmup_steps: int = 0
    total_steps: int | None = None
    min_lr_ratio: float = 0.0
    momentum_warmup_steps: int = 0
    momentum_start: float = 0.85
    weight_decay: float | None = None
    rest: str | None = None
    rest_lr: float | None = None
    rest_settings: dict[str, Any] = field(default_factory=dict)
    lr_convention: Literal["adamw", "native"] | None = None
    overrides: list[Override] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names before a model is built."""
        lookup(self.name)
        lookup(self.rest or self.name)
        find(self.recipe or self.name)
        _check_schedule(self.schedule)

    def __call__(self, module: LightningModule) -> dict[str, Any]:
        """Build what `LightningModule.configure_optimizers` returns.

        Args:
            module: the module; all its trainable parameters are taken.

        Returns:
            See `configure_optimizers`.
        """
        given = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}
        return configure_optimizers(module, **given, **self.settings)


def _full_momentum(group: Mapping[str, Any]) -> float:
    """The momentum after the warm-up; kept in the group, as the learning rate's `initial_lr` is."""
    now = group["momentum"] if "momentum" in group else group["betas"][0]
    return group.get("initial_momentum", now)


def _check_schedule(schedule: str) -> None:
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; {nearest(schedule, list(SCHEDULES))}")


def _total_steps(module: LightningModule) -> int:
    """Optimizer steps of the trainer's run."""
    steps = module.trainer.estimated_stepping_batches
    if not 0 < steps < math.inf:
        raise ValueError("the trainer does not know how many steps it will take; give configure_optimizers total_steps")
    return int(steps)
