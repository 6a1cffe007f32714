"""The arguments of `configure_optimizers` as a value. Importing it needs torch only; calling it needs Lightning."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal

import torch

from lightning_optim.build.overrides import Override
from lightning_optim.build.recipes import find
from lightning_optim.core.param_groups import plain
from lightning_optim.core.rule import lookup
from lightning_optim.core.step.averaging_methods import EMANesterov, MuLoCo, TailEMA
from lightning_optim.schedule import ScheduleConfig, schedule_settings


@dataclass(frozen=True)
class OptimizerConfig:
    """The arguments of `configure_optimizers` as one value, which LightningCLI reads from YAML.

    A module takes it as an argument, `optimizer: OptimizerConfig`, and ends its `configure_optimizers` with
    `return self.optimizer(self)`: it is called with the module because the parameters alone do not tell their roles.
    `optimizer: OptimizerConfig | OptimizerCallable`, in this order, takes optimizer classes as well. jsonargparse lets
    `OptimizerCallable` alone take only them; to such a module give `lightning_optim.callbacks.HybridOptimizer`.

    Args:
        name: see `configure_optimizers`, as are all the following but the last.
        lr: see there.
        recipe: see there.
        preset: see there.
        schedule: see there.
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
    preset: str | None = None
    schedule: Literal["constant", "linear", "cosine", "power"] | dict[str, Any] | None = None
    weight_decay: float | None = None
    rest: str | None = None
    rest_lr: float | None = None
    rest_settings: dict[str, Any] = field(default_factory=dict)
    lr_convention: Literal["adamw", "native"] | None = None
    overrides: list[Override] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Check the names before a model is built, and make numbers plain."""
        lookup(self.name)
        lookup(self.rest or self.name)
        find(self.recipe or self.name)
        for f in fields(self):
            object.__setattr__(self, f.name, plain(getattr(self, f.name)))
        if self.schedule is not None:
            ScheduleConfig.of(self.schedule)
        if self.preset is not None:
            find(self.preset)

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        """Load a checkpoint, also one that was written when the schedule's settings were fields of their own.

        Args:
            state: fields by name.
        """
        names = [f.name for f in fields(self)]
        of_schedule = {k: v for k, v in state.items() if k not in names and v is not None}
        settings = {k: v for k, v in state.items() if k in names}
        if of_schedule:
            settings["schedule"] = schedule_settings(settings["schedule"]) | of_schedule
        vars(self).update(settings)

    def __call__(self, module: Any) -> dict[str, Any]:
        """Build what `LightningModule.configure_optimizers` returns.

        Args:
            module: a LightningModule; all its trainable parameters are taken.

        Returns:
            See `configure_optimizers`.
        """
        from lightning_optim.callbacks.configure import configure_optimizers  # imports Lightning only when called

        arguments = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "settings"}
        return configure_optimizers(module, **arguments, **self.settings)


# `save_hyperparameters()` stores these objects in checkpoints, which load with `weights_only=True` because every class
# holds plain values. Older checkpoints name a class as it was called, and where it was defined, when they were written.
EARLIER_NAMES: dict[type, tuple[str, ...]] = {
    OptimizerConfig: tuple(f"{home}.OptimizerConfig" for home in ("lightning", "factory", "build.factory")),
    ScheduleConfig: ("schedule.Curve",),
    EMANesterov: ("core.averages.EMANesterov",),
    TailEMA: ("core.averages.TailEMA",),
    MuLoCo: ("core.averages.MuLoCo",),
}
torch.serialization.add_safe_globals(list(EARLIER_NAMES))
torch.serialization.add_safe_globals([
    (cls, f"lightning_optim.{name}") for cls, names in EARLIER_NAMES.items() for name in names
])
