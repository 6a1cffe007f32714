"""Optimizers that need more than gradients, in Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim import curvature
from lightning_optim.callbacks.training_step import loss_scale, training_loss
from lightning_optim.diagnostics.hessian import again
from lightning_optim.diagnostics.view import unwrap_optimizer


class CurvatureCallback(Callback):
    """Measures what some rules need beside gradients; see `lightning_optim.curvature.CurvatureEstimator`.

    `configure_optimizers` and `HybridOptimizer` add it to the trainer by themselves; add one of your own,
    `Trainer(callbacks=[CurvatureCallback(share=0.25)])`, for other settings, or for an optimizer made otherwise. It
    logs `curvature/win_rate` (Sophia: the share of coordinates that are not clipped, best between 0.1 and 0.5) and
    `curvature/seconds`.

    Args:
        share: of the rows of every batch that is measured; see `CurvatureEstimator`.
        method: `"exact"` products with the Hessian, `"difference"` of gradients where kernels do not allow those, or
            `"auto"`: exact until a kernel turns out not to allow it.
        loss: of (module, batch), where `training_step` has side effects beside logging. It must be what `training_step`
            returns: the two are compared on the first batch, in the same mode and with the same random numbers.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        share: float | None = None,
        method: curvature.EstimatorMethod = "auto",
        loss: Callable[[LightningModule, Any], Tensor] | None = None,
    ) -> None:
        curvature.check_settings(share, method)
        self._settings: dict[str, Any] = {"share": share, "method": method}
        self._loss = loss
        self.estimator: curvature.CurvatureEstimator | None = None
        self._first: FirstBatch | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the estimator, if the optimizer needs one.

        Args:
            trainer: the trainer.
            pl_module: its module.

        Raises:
            ValueError: manual optimization, whose `training_step` cannot be called for its loss.
        """
        optimizer: Any = unwrap_optimizer(trainer.optimizers[0]) if trainer.optimizers else None
        if not curvature.needs_curvature(optimizer) or optimizer.has_curvature:
            return
        if self._loss is None and not pl_module.automatic_optimization:
            raise ValueError(
                "CurvatureCallback: training_step of manual optimization steps the optimizer; give "
                "CurvatureCallback(loss=...)"
            )

        def loss(batch: Any) -> Tensor:
            with trainer.precision_plugin.train_step_context():
                return training_loss(pl_module, batch) if self._loss is None else self._loss(pl_module, batch)

        settings = self._settings | {"loss_scale": loss_scale(trainer), "rank": trainer.global_rank}
        self.estimator = curvature.CurvatureEstimator(pl_module, optimizer, loss, **settings)
        self._first = None if self._loss is None else FirstBatch(trainer, pl_module, loss)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Record a batch.

        Args:
            trainer: the trainer.
            pl_module: its module.
            batch: the batch.
            batch_idx: its number.
        """
        if self._first is not None:
            self._first.begin(batch)
        if self.estimator is not None:
            self.estimator.record_batch(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Note what the first batch is trained by.

        Args:
            trainer: the trainer.
            pl_module: its module.
            loss: what `training_step` returned.
        """
        if self._first is not None:
            self._first.trained(loss)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, if it is due.

        Args:
            trainer: the trainer.
            pl_module: its module.
            optimizer: not looked at.
        """
        if self._first is not None:
            self._first.compare()
            self._first = None
        metrics = self.estimator.estimate() if self.estimator is not None else {}
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the estimator.

        Args:
            trainer: the trainer.
            pl_module: its module.
        """
        self._close()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the estimator.

        Args:
            trainer: the trainer.
            pl_module: its module.
            exception: any.
        """
        self._close()

    def _close(self) -> None:
        if self.estimator is not None:
            self.estimator.close()
        self.estimator = self._first = None


class FirstBatch:
    """Compares the loss that a user gave with that of `training_step`, on the first batch of a run.

    Args:
        trainer: the trainer.
        module: its module.
        loss: of a batch.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, loss: Callable[[Any], Tensor]) -> None:
        self.trainer, self.module, self.loss = trainer, module, loss
        self.scale = loss_scale(trainer)
        self._batch: Any = None
        self._random: Any = None
        self._measured: float | None = None
        self._trained: list[float] = []

    def begin(self, batch: Any) -> None:
        """A batch is about to be trained on.

        Args:
            batch: the batch.
        """
        if self._random is None:
            self._batch = batch
            self._random = torch.get_rng_state(), [torch.cuda.get_rng_state(d) for d in self._devices()]
        elif self._batch is not None:  # the second batch
            self.compare()

    def trained(self, loss: Tensor) -> None:
        """A backward pass begins.

        Args:
            loss: scaled, and divided by the number of accumulated batches.
        """
        if self._batch is None:
            return
        many = self.trainer.accumulate_grad_batches if self.module.automatic_optimization else 1
        self._trained.append(float(loss.detach()) * many / (self.scale() or 1.0))
        if self._measured is None:
            with again(self.module), torch.random.fork_rng(self._devices()):
                torch.set_rng_state(self._random[0])
                for device, state in zip(self._devices(), self._random[1], strict=True):
                    torch.cuda.set_rng_state(state, device)
                self._measured = float(self.loss(self._batch).detach())

    def compare(self) -> None:
        """Compare what is known; of several backward passes of a batch, the given loss may be one or the sum.

        Raises:
            ValueError: the losses differ.
        """
        self._batch = None
        measured, self._measured = self._measured, None
        if measured is None:
            return
        candidates = [*self._trained, sum(self._trained)]
        nearest = min(candidates, key=lambda x: abs(x - measured))
        dtypes = {p.dtype for p in self.module.parameters() if p.is_floating_point()}
        precision = str(self.trainer.precision)
        dtypes |= {torch.bfloat16} if precision.startswith("bf16") else set()
        dtypes |= {torch.float16} if precision.startswith("16") else set()
        curvature.compare_losses(measured, nearest, dtypes)

    def _devices(self) -> list[int]:
        return sorted({p.device.index or 0 for p in self.module.parameters() if p.device.type == "cuda"})
