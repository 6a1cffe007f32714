"""`TrainingArguments` whose `--optim` also takes the names of lightning_optim."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import transformers
from transformers.training_args import OptimizerNames

from hf_integration.factory import OptimizerFactory
from lightning_optim.core.rule import REGISTRY, nearest


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Transformers' arguments with our optimizers under `--optim`.

    A name of ours is kept in `optim_name` and switched on by passing `optimizer_cls_and_kwargs()` to the Trainer; any
    other name is Transformers' own and runs as ever. Where both have a name (`sgd`, `adafactor`), it is ours.
    """

    optim: str = field(default="adamw", metadata={"help": "Name of an optimizer of lightning_optim or Transformers."})
    rest_optim: str = field(default="adamw", metadata={"help": "Rule of the parameters the optimizer does not take."})
    rest_learning_rate: float | None = field(default=None, metadata={"help": "Its learning rate; default: the same."})
    lr_convention: str = field(
        default="adamw",
        metadata={"help": "adamw: --learning_rate is AdamW's, whatever the optimizer; native: the published scale."},
    )

    def __post_init__(self) -> None:
        """Take our name out of `optim` and let Transformers check the rest.

        Raises:
            ValueError: nobody knows the name; the nearest ones are given.
        """
        self.optim_name = None
        if self.optim in REGISTRY:
            self.optim_name, self.optim = str(self.optim), OptimizerNames.ADAMW_TORCH.value
        elif self.optim not in list(OptimizerNames):
            raise ValueError(f"unknown optimizer {self.optim!r}; {nearest(self.optim, [*REGISTRY, *OptimizerNames])}")
        super().__post_init__()

    def optimizer_cls_and_kwargs(self) -> tuple[type, dict[str, Any]] | None:
        """The Trainer's argument of the same name.

        Returns:
            The factory and its arguments, or None for an optimizer of Transformers' own.
        """
        if self.optim_name is None:
            return None
        settings = {
            "name": self.optim_name,
            "lr": self.learning_rate,
            "weight_decay": self.weight_decay,
            "rest": self.rest_optim,
            "rest_lr": self.rest_learning_rate,
            "lr_convention": self.lr_convention,
        }
        return OptimizerFactory, settings
