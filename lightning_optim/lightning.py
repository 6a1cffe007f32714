"""The public module for Lightning: one line in `configure_optimizers`."""

from lightning_optim.callbacks.averaged_weights import AveragedWeights
from lightning_optim.callbacks.configure import check_strategy, configure_optimizers
from lightning_optim.callbacks.module_order import ModuleOrder
from lightning_optim.callbacks.run_length import RunStart
from lightning_optim.config import OptimizerConfig
from lightning_optim.schedule import SCHEDULES, ScheduleLR

__all__ = [
    "SCHEDULES",
    "AveragedWeights",
    "ModuleOrder",
    "OptimizerConfig",
    "RunStart",
    "ScheduleLR",
    "check_strategy",
    "configure_optimizers",
]
