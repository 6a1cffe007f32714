"""Optimizers that need more than gradients, in Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim import curvature
from lightning_optim.diagnostics.hessian import Method

from .observe import loss_scale, training_loss, unwrapped  # noqa: TID251


class CurvatureFeed(Callback):
    """Measures what some rules need beside gradients; see `lightning_optim.curvature.Feed`.

    `configure_optimizers` and `HybridOptimizer` add it to the trainer by themselves; add one of your own,
    `Trainer(callbacks=[CurvatureFeed(share=0.25)])`, for other settings, or for an optimizer made otherwise. It logs
    `curvature/win_rate` (Sophia: the share of coordinates that are not clipped, best between 0.1 and 0.5) and
    `curvature/seconds`.

    Args:
        share: of the rows of every batch that is measured; see `Feed`.
        method: `"exact"` products with the Hessian, or `"difference"` of gradients where kernels do not allow those.
        loss: of (module, batch), where `training_step` has side effects beside logging.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        share: float | None = None,
        method: Method = "exact",
        loss: Callable[[LightningModule, Any], Tensor] | None = None,
    ) -> None:
        curvature.check_settings(share, method)
        self._settings: dict[str, Any] = {"share": share, "method": method}
        self._loss = loss
        self.feed: curvature.Feed | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the feed, if the optimizer needs one.

        Args:
            trainer: the trainer.
            pl_module: its module.

        Raises:
            ValueError: manual optimization, whose `training_step` cannot be called for its loss.
        """
        optimizer: Any = unwrapped(trainer.optimizers[0]) if trainer.optimizers else None
        if not curvature.observes(optimizer) or optimizer.fed:
            return
        if self._loss is None and not pl_module.automatic_optimization:
            raise ValueError(
                "CurvatureFeed: training_step of manual optimization steps the optimizer; give CurvatureFeed(loss=...)"
            )

        def loss(batch: Any) -> Tensor:
            with trainer.precision_plugin.train_step_context():
                return training_loss(pl_module, batch) if self._loss is None else self._loss(pl_module, batch)

        settings = self._settings | {"loss_scale": loss_scale(trainer), "rank": trainer.global_rank}
        self.feed = curvature.Feed(pl_module, optimizer, loss, **settings)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the feed a batch.

        Args:
            trainer: the trainer.
            pl_module: its module.
            batch: the batch.
            batch_idx: its number.
        """
        if self.feed is not None:
            self.feed.see(batch)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, if it is due.

        Args:
            trainer: the trainer.
            pl_module: its module.
            optimizer: not looked at.
        """
        said = self.feed.ready() if self.feed is not None else {}
        for logger in trainer.loggers if said else ():
            logger.log_metrics(said, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the feed.

        Args:
            trainer: the trainer.
            pl_module: its module.
        """
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the feed.

        Args:
            trainer: the trainer.
            pl_module: its module.
            exception: any.
        """
        self._close()

    def _close(self) -> None:
        if self.feed is not None:
            self.feed.close()
            self.feed = None
