"""Lightning callbacks, imported as `lightning_optim.callbacks`."""

from lightning_optim.callbacks.averaged_weights import AveragedWeights
from lightning_optim.callbacks.curvature import CurvatureCallback
from lightning_optim.callbacks.hybrid import HybridOptimizer
from lightning_optim.callbacks.module_order import ModuleOrder
from lightning_optim.callbacks.observe import (
    GradientNoiseScale,
    GradientRank,
    HessianBlocks,
    MemoryLogger,
    OptimizerHealth,
    PreconditionerRefresh,
    diagnostics,
)
from lightning_optim.callbacks.relora import ReLoRA
from lightning_optim.callbacks.roles import RoleTable

__all__ = [
    "AveragedWeights",
    "CurvatureCallback",
    "GradientNoiseScale",
    "GradientRank",
    "HessianBlocks",
    "HybridOptimizer",
    "MemoryLogger",
    "ModuleOrder",
    "OptimizerHealth",
    "PreconditionerRefresh",
    "ReLoRA",
    "RoleTable",
    "diagnostics",
]
