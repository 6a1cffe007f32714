"""Transformers: any optimizer of lightning_optim in the stock `Trainer`, by a flag or one argument."""

from hf_integration.arguments import TrainingArguments
from hf_integration.attach import attach
from hf_integration.callbacks import (
    GradientNoiseScale,
    GradientRank,
    HessianBlocks,
    MemoryLogger,
    OptimizerHealth,
    PreconditionerRefresh,
    diagnostics,
)
from hf_integration.checkpoint import Consolidate, KeepSchedule, last_checkpoint
from hf_integration.curvature import CurvatureCallback
from hf_integration.factory import OptimizerFactory, create_optimizer
from hf_integration.register import register
from hf_integration.relora import ReLoRA
from hf_integration.roles import HybridOptimizer, RoleTable

__all__ = [
    "Consolidate",
    "CurvatureCallback",
    "GradientNoiseScale",
    "GradientRank",
    "HessianBlocks",
    "HybridOptimizer",
    "KeepSchedule",
    "MemoryLogger",
    "OptimizerFactory",
    "OptimizerHealth",
    "PreconditionerRefresh",
    "ReLoRA",
    "RoleTable",
    "TrainingArguments",
    "attach",
    "create_optimizer",
    "diagnostics",
    "last_checkpoint",
    "register",
]
