"""Lightning callbacks, imported as `lightning_optim.callbacks`."""

from lightning_optim.callbacks.curvature import CurvatureCallback
from lightning_optim.callbacks.hybrid import HybridOptimizer
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
from lightning_optim.lightning import AveragedWeights, ModuleOrder

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
