"""The table of roles: which rule updates which parameter, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from lightning_optim.build.plan import Owners
from lightning_optim.core.optimizer import RuleOptimizer


class RoleTable(Callback):
    """Writes the role of every parameter, the rule that updates it, why, and how much state that takes.

    The table is the text `roles` in TensorBoard and `roles.md` in the trainer's `log_dir`, beside the checkpoints, and
    is rewritten as soon as parameters are frozen, unfrozen or added. A trainer without logger and checkpoints gets no
    file, and an optimizer of another package no table. `HybridOptimizer` writes the same table.
    """

    def __init__(self) -> None:
        self._table = Owners()
        self._folder: Path | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out where the table is to be written, on all ranks."""
        folder = trainer.log_dir if trainer.loggers or trainer.checkpoint_callbacks else None
        self._folder, self._table = Path(folder) if folder else None, Owners()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Write the table if it is no longer true."""
        optimizer = trainer.optimizers[0] if trainer.optimizers else None
        if self._folder is None or not trainer.is_global_zero or not isinstance(optimizer, RuleOptimizer):
            return
        text = self._table.news(pl_module, optimizer, trainer.global_step)
        if text is None:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / "roles.md").write_text(text, encoding="utf-8")
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                logger.experiment.add_text("roles", text, trainer.global_step)
