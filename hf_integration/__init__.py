"""Transformers: any optimizer of lightning_optim in the stock `Trainer`, by a flag or one argument."""

from hf_integration import probes
from hf_integration.arguments import TrainingArguments
from hf_integration.attach import attach
from hf_integration.checkpoint import Consolidate, KeepSchedule, last_checkpoint
from hf_integration.curvature import CurvatureCallback
from hf_integration.factory import OptimizerFactory, create_optimizer
from hf_integration.presets import diagnostics
from hf_integration.probes import *  # noqa: F403
from hf_integration.register import register
from hf_integration.relora import ReLoRA
from hf_integration.roles import HybridOptimizer, RoleTable

__all__ = [
    "Consolidate",
    "CurvatureCallback",
    "HybridOptimizer",
    "KeepSchedule",
    "OptimizerFactory",
    "ReLoRA",
    "RoleTable",
    "TrainingArguments",
    "attach",
    "create_optimizer",
    "diagnostics",
    "last_checkpoint",
    "register",
]
__all__ += probes.__all__
