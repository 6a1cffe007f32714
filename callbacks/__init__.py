"""Lightning callbacks, imported as `lightning_optim.callbacks`."""

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

__all__ = [
    "GradientNoiseScale",
    "GradientRank",
    "HessianBlocks",
    "HybridOptimizer",
    "MemoryLogger",
    "OptimizerHealth",
    "PreconditionerRefresh",
    "diagnostics",
]
