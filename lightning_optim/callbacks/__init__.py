"""Lightning callbacks, imported as `lightning_optim.callbacks`."""

from lightning_optim.callbacks import probes
from lightning_optim.callbacks.averaged_weights import AveragedWeights
from lightning_optim.callbacks.curvature import CurvatureCallback
from lightning_optim.callbacks.hybrid import HybridOptimizer
from lightning_optim.callbacks.module_order import ModuleOrder
from lightning_optim.callbacks.presets import diagnostics
from lightning_optim.callbacks.probes import *  # noqa: F403
from lightning_optim.callbacks.relora import ReLoRA
from lightning_optim.callbacks.roles import RoleTable

__all__ = [
    "AveragedWeights",
    "CurvatureCallback",
    "HybridOptimizer",
    "ModuleOrder",
    "ReLoRA",
    "RoleTable",
    "diagnostics",
]
__all__ += probes.__all__
