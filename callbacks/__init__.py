"""Lightning callbacks, imported as `lightning_optim.callbacks`."""

from lightning_optim.lightning import AveragedWeights, ModuleOrder

from .curvature import CurvatureCallback  # noqa: TID251
from .hybrid import HybridOptimizer  # noqa: TID251  (this folder has two names; here it is the package's)
from .observe import (  # noqa: TID251
    GradientNoiseScale,
    GradientRank,
    HessianBlocks,
    MemoryLogger,
    OptimizerHealth,
    PreconditionerRefresh,
    diagnostics,
)
from .relora import ReLoRA  # noqa: TID251
from .roles import RoleTable  # noqa: TID251

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
