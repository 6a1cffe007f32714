"""Optimizers that need more than gradients, in Lightning."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning import Callback, LightningModule, Trainer
from torch import Tensor
from torch.optim import Optimizer

from lightning_optim import curvature
from lightning_optim.callbacks.training_step import (
    StepInputs,
    StepListener,
    loss_scale,
    training_loss,
    unwatch_steps,
    watch_steps,
)
from lightning_optim.diagnostics.view import unwrap_optimizer


class CurvatureCallback(Callback, StepListener):
    """Measures what some rules need beside gradients; see `lightning_optim.curvature.CurvatureEstimator`.

    `configure_optimizers` and `HybridOptimizer` add it to the trainer by themselves; add one of your own,
    `Trainer(callbacks=[CurvatureCallback(share=0.25)])`, for other settings, or for an optimizer made otherwise. It
    logs `curvature/win_rate` (Sophia: the share of coordinates that are not clipped, best between 0.1 and 0.5) and
    `curvature/seconds`. It measures in whatever calls the training step, finders that replace the callbacks included.

    Args:
        share: of the rows of every batch that is measured; see `CurvatureEstimator`.
        method: `"exact"` products with the Hessian, `"difference"` of gradients where kernels do not allow those, or
            `"auto"`: exact until a kernel turns out not to allow it.
        loss: of (module, batch), for manual optimization: the loss of which the optimizer gets the gradient. It is
            compared with those that `manual_backward` gets in the first step, or with what `training_step` returns.
        optimizer: index of the optimizer, where several of a module need curvature: one callback for each.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        share: float | None = None,
        method: curvature.EstimatorMethod = "auto",
        loss: Callable[[LightningModule, Any], Tensor] | None = None,
        optimizer: int | None = None,
    ) -> None:
        curvature.check_settings(share, method)
        self._settings: dict[str, Any] = {"share": share, "method": method}
        self._loss, self._index = loss, optimizer
        self.estimator: curvature.CurvatureEstimator | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch the training steps.

        Args:
            trainer: the trainer.
            pl_module: its module.
            stage: only `"fit"` trains.
        """
        if stage == "fit":
            watch_steps(trainer, self)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Make the estimator, if an optimizer needs one; refuse before the first step what cannot be measured.

        Args:
            trainer: the trainer.
            pl_module: its module.
        """
        self._attach(trainer)

    def begin_step(self, trainer: Trainer, inputs: StepInputs) -> None:
        """Record a batch."""
        self._attach(trainer)
        if self.estimator is not None:
            self.estimator.record_batch(inputs)

    def report_losses(self, trainer: Trainer, losses: list[Tensor]) -> None:
        """Note what a batch is trained by."""
        if self.estimator is not None:
            self.estimator.report_losses(losses)

    def fail_step(self) -> None:
        """Forget the batches of a step that is not taken."""
        if self.estimator is not None:
            self.estimator.discard()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Measure, if it is due.

        Args:
            trainer: the trainer.
            pl_module: its module.
            optimizer: that is about to step.
        """
        if self.estimator is None or unwrap_optimizer(optimizer) is not self.estimator.optimizer:
            return
        metrics = self.estimator.estimate()
        for logger in trainer.loggers if metrics else ():
            logger.log_metrics(metrics, step=trainer.global_step)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Watch the training steps no more.

        Args:
            trainer: the trainer.
            pl_module: its module.
            stage: unused.
        """
        self._close()
        unwatch_steps(trainer, self)

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
        unwatch_steps(trainer, self)

    def _close(self) -> None:
        if self.estimator is not None:
            self.estimator.close()
        self.estimator = None

    def _attach(self, trainer: Trainer) -> None:
        """Make the estimator of the trainer's present optimizer."""
        optimizers: list[Any] = [unwrap_optimizer(optimizer) for optimizer in trainer.optimizers]
        if self.estimator is not None:
            if any(self.estimator.optimizer is x for x in optimizers):
                return
            self._close()
        module = trainer.lightning_module
        chosen = optimizers if self._index is None else optimizers[self._index : self._index + 1]
        chosen = [x for x in chosen if curvature.needs_curvature(x) and not x.has_curvature]
        if not chosen:
            return
        self._validate(module, optimizers, chosen)
        optimizer = chosen[0]

        def loss(inputs: StepInputs) -> Tensor:
            with trainer.precision_plugin.train_step_context():
                return training_loss(module, inputs) if self._loss is None else self._loss(module, inputs.batch)

        self.estimator = curvature.CurvatureEstimator(
            module,
            optimizer,
            loss,
            weight=lambda inputs: 1.0,  # the trainer's loss is the plain mean over micro-batches and ranks
            compare=self._loss is not None or curvature.searches(optimizer),
            repeats=not module.automatic_optimization,
            loss_scale=loss_scale(trainer),
            rank=trainer.global_rank,
            **self._settings,
        )

    def _validate(self, module: LightningModule, optimizers: list[Any], chosen: list[Any]) -> None:
        """Refuse what cannot be measured."""
        if len(chosen) > 1:
            raise ValueError(
                f"CurvatureCallback: {len(chosen)} optimizers need curvature, each of its own loss; give the trainer "
                "CurvatureCallback(optimizer=0, loss=...), CurvatureCallback(optimizer=1, loss=...) and so on"
            )
        kinds = curvature.inputs_of(chosen[0])
        if module.automatic_optimization:
            return
        if "factors" in kinds and len(optimizers) > 1:
            raise ValueError(
                "CurvatureCallback: kfac takes its factors from all passes of a training step, which with several "
                "optimizers are those of several losses; use another rule, such as soap or muon"
            )
        if self._loss is None and kinds - {"factors"}:
            raise ValueError(
                "CurvatureCallback: training_step of manual optimization steps the optimizer, so it cannot be called "
                "for its loss; give CurvatureCallback(loss=...), a function of the module and a batch"
            )
