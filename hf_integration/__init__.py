"""Transformers: any optimizer of lightning_optim in the stock `Trainer`, by a flag or one argument."""

from hf_integration.arguments import TrainingArguments
from hf_integration.attach import attach
from hf_integration.checkpoint import KeepSchedule, last_checkpoint
from hf_integration.factory import OptimizerFactory, create_optimizer
from hf_integration.register import register
from hf_integration.relora import ReLoRACallback

__all__ = [
    "KeepSchedule",
    "OptimizerFactory",
    "ReLoRACallback",
    "TrainingArguments",
    "attach",
    "create_optimizer",
    "last_checkpoint",
    "register",
]
