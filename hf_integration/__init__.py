"""Transformers: any optimizer of lightning_optim in the stock `Trainer`, by a flag or one argument."""

from hf_integration.arguments import TrainingArguments
from hf_integration.checkpoint import last_checkpoint
from hf_integration.factory import OptimizerFactory

__all__ = ["OptimizerFactory", "TrainingArguments", "last_checkpoint"]
