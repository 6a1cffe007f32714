"""Weight averaging in Lightning: which weights train, and which are evaluated and saved."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_optim.callbacks.run_length import total_steps_of
from lightning_optim.core.optimizer import RuleOptimizer


class AveragedWeights(Callback):
    """Calls `eval()` and `train()` of wrapped optimizers; `configure_optimizers` gives it to the trainer.

    Validation, tests after a fit and checkpoints see the weights to evaluate; a resumed run has those to train, bit for
    bit. Under FSDP2, and with `save_weights_only=True` where no validation precedes, checkpoints hold those to train.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the length of the run, where a share of it is asked for; earlier the trainer's loader would suffer.

        Args:
            trainer: the trainer.
            pl_module: its module.

        Raises:
            ValueError: the trainer does not know it.
        """
        for optimizer in _wrapped(trainer):
            if optimizer.total_steps is None and optimizer.averages is not None and optimizer.averages.needs_total:
                optimizer.total_steps = total_steps_of(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Train.

        Args:
            trainer: the trainer.
            pl_module: its module.
            batch: any.
            batch_idx: any.
        """
        for optimizer in _wrapped(trainer):
            optimizer.train()
            if optimizer.averages is not None:  # accumulated gradients come before the closure of the step
                with torch.no_grad():
                    optimizer.averages.look_ahead(optimizer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate.

        Args:
            trainer: the trainer.
            pl_module: its module.
        """
        for optimizer in _wrapped(trainer):
            optimizer.eval()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train on, where a checkpoint that follows could not hold both.

        Args:
            trainer: the trainer.
            pl_module: its module.
        """
        for optimizer in _wrapped(trainer):
            if optimizer.is_sharded():
                optimizer.train()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the weights to evaluate behind.

        Args:
            trainer: the trainer.
            pl_module: its module.
        """
        self.on_validation_start(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the weights to evaluate; those to train are in the optimizer's state.

        Args:
            trainer: the trainer.
            pl_module: its module.
            checkpoint: with the weights to train, and the state that belongs to them.
        """
        stepped = [o for o in _wrapped(trainer) if o.state]  # before, both are the same, and finders go on
        if not stepped or any(optimizer.is_sharded() for optimizer in stepped):
            return
        for optimizer in stepped:
            optimizer.eval()
        checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        checkpoint["optimizer_states"] = [trainer.strategy.optimizer_state(o) for o in trainer.optimizers]


def _wrapped(trainer: Trainer) -> list[RuleOptimizer]:
    return [o for o in trainer.optimizers if isinstance(o, RuleOptimizer) and o.averages is not None]
