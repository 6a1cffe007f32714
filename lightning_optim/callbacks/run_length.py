"""The number of optimizer steps of a run, and the schedules that wait for its start."""

from __future__ import annotations

import math

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler

from lightning_optim.schedule import ScheduleLR


class RunStart(Callback):
    """Starts the schedules when the run starts. `configure_optimizers` adds it to the trainer.

    Schedules are created earlier: a `BatchSizeFinder` or `LearningRateFinder` may change the length of the run, or its
    learning rates, in between.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the learning rates of the first step.

        Args:
            trainer: the trainer.
            pl_module: its module.

        Raises:
            ValueError: a schedule depends on the length of the run, which the trainer does not know.
        """
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ScheduleLR):
                config.scheduler.begin()


def total_steps_of(module: LightningModule) -> int | None:
    """Number of optimizer steps that the trainer will take.

    Args:
        module: of the trainer.

    Returns:
        None before the trainer has its loader: asked earlier, it makes one whose position it never restores.

    Raises:
        ValueError: the trainer does not know it.
    """
    trainer = module.trainer
    endless = trainer.max_epochs == -1
    if not endless and trainer.train_dataloader is None:
        return None
    scheduler = next((c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)), None)  # pyright: ignore
    if endless or scheduler is None or math.isinf(trainer.num_training_batches):
        steps = trainer.estimated_stepping_batches
    else:  # the trainer would assume the present accumulation in all epochs
        every = [scheduler.get_accumulate_grad_batches(epoch) for epoch in range(max(trainer.max_epochs or 1, 1))]
        steps = sum(math.ceil(trainer.num_training_batches / count) for count in every)
        steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    if not 0 < steps < math.inf:
        raise ValueError("the trainer does not know how many steps it will take; give total_steps in schedule={...}")
    return int(steps)
