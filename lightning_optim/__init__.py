"""Optimizers for large language models: one step loop, one rule per algorithm.

    from lightning_optim import build_optimizer
    optimizer = build_optimizer(model, "muon", lr=3e-4)

Importing the package needs torch only; `configure_optimizers` (Lightning) and `lightning_optim.callbacks` import
Lightning when they are used.
"""

from typing import TYPE_CHECKING, Any

from lightning_optim import optimizers
from lightning_optim.build.factory import build_optimizer
from lightning_optim.build.layouts import register_layout
from lightning_optim.build.overrides import layerwise_decay, lora_plus
from lightning_optim.build.plan import plan
from lightning_optim.build.role_report import roles
from lightning_optim.build.roles import assign
from lightning_optim.config import OptimizerConfig
from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.rule import Rule, StateSpec, eye, lookup, zeros
from lightning_optim.core.step.averaging_methods import EMANesterov, MuLoCo, TailEMA
from lightning_optim.optimizers import *  # noqa: F403
from lightning_optim.schedule import ScheduleConfig, ScheduleLR

if TYPE_CHECKING:
    from lightning_optim.callbacks.configure import configure_optimizers

__version__ = "0.1.0"
__all__ = [
    "ScheduleConfig",
    "EMANesterov",
    "RuleOptimizer",
    "MuLoCo",
    "OptimizerConfig",
    "Rule",
    "ScheduleLR",
    "StateSpec",
    "TailEMA",
    "assign",
    "build_optimizer",
    "configure_optimizers",
    "eye",
    "layerwise_decay",
    "lookup",
    "lora_plus",
    "plan",
    "register_layout",
    "roles",
    "zeros",
]
__all__ += optimizers.__all__


def __getattr__(name: str) -> Any:
    """Import Lightning only when a name that needs it is used."""
    if name == "configure_optimizers":
        from lightning_optim.callbacks.configure import configure_optimizers

        return configure_optimizers
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
