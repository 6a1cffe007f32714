"""Weight averaging in Lightning: which weights train, and which are evaluated and saved."""

from __future__ import annotations

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from lightning_optim.callbacks.run_length import total_steps_of
from lightning_optim.core.optimizer import RuleOptimizer


class AveragedWeights(Callback):
    """Calls `eval()` and `train()` of optimizers that average weights. `configure_optimizers` adds it to the trainer.

    Validation, tests after a fit and checkpoints use the averaged weights; a resumed run continues from the training
    weights, bit for bit. Under FSDP2, and with `save_weights_only=True` if no validation precedes, checkpoints hold
    the training weights.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the optimizer the length of the run, if a setting is a share of it.

        Earlier, the trainer would create a loader whose position it never restores.

        Args:
            trainer: the trainer.
            pl_module: its module.

        Raises:
            ValueError: the trainer does not know it.
        """
        for optimizer in _averaging_optimizers(trainer):
            if optimizer.total_steps is None and optimizer.averages is not None and optimizer.averages.needs_total:
                optimizer.total_steps = total_steps_of(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Switch to the training weights."""
        for optimizer in _averaging_optimizers(trainer):
            optimizer.train()
            if optimizer.averages is not None:  # accumulated gradients come before the closure of the step
                with torch.no_grad():
                    optimizer.averages.look_ahead(optimizer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Switch to the averaged weights."""
        for optimizer in _averaging_optimizers(trainer):
            optimizer.eval()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Return to the training weights where a following checkpoint could not hold both."""
        for optimizer in _averaging_optimizers(trainer):
            if optimizer.is_sharded():
                optimizer.train()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the averaged weights in the module."""
        self.on_validation_start(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the averaged weights; the training weights are in the optimizer's state.

        Args:
            trainer: the trainer.
            pl_module: its module.
            checkpoint: with the training weights, and the state that belongs to them.
        """
        stepped = [
            o for o in _averaging_optimizers(trainer) if o.state
        ]  # before the first step both are equal, and tuners continue
        if not stepped or any(optimizer.is_sharded() for optimizer in stepped):
            return
        for optimizer in stepped:
            optimizer.eval()
        checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        checkpoint["optimizer_states"] = [trainer.strategy.optimizer_state(o) for o in trainer.optimizers]


def _averaging_optimizers(trainer: Trainer) -> list[RuleOptimizer]:
    return [o for o in trainer.optimizers if isinstance(o, RuleOptimizer) and o.averages is not None]
