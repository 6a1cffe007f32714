"""Optimizers that need more than gradients, in the Transformers Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from hf_integration.batches import Batches, copied, current_trainer
from hf_integration.callbacks import log_scalars, siblings
from lightning_optim import curvature
from lightning_optim.diagnostics.view import unwrap_optimizer


class CurvatureCallback(TrainerCallback):
    """Measures what some rules need beside gradients; see `lightning_optim.curvature.CurvatureEstimator`.

    `Trainer(..., callbacks=[CurvatureCallback()])`; `attach` and `register` add it by themselves, and it does nothing
    for other optimizers. It logs `curvature/win_rate` (Sophia: the share of coordinates that are not clipped, best
    between 0.1 and 0.5) and `curvature/seconds`.

    The batches are those that the trainer's `compute_loss` receives, and the loss is the one it computes, whether it is
    overridden or not, label smoothing and `compute_loss_func` included.

    Args:
        share: share of the rows of every batch that is measured; see `CurvatureEstimator`. By default, trainers that
            override `compute_loss` (except TRL's SFTTrainer) are measured on all rows, which may belong together.
        method: `"exact"` products with the Hessian, `"difference"` of gradients where kernels do not allow those, or
            `"auto"`: exact until a kernel turns out not to allow it.
        loss: function of (model, batch as `compute_loss` receives it) that replaces `compute_loss`. The two must be
            equal, and are compared in the first step.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        share: float | None = None,
        method: curvature.EstimatorMethod = "auto",
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        curvature.check_settings(share, method)
        self._settings: dict[str, Any] = {"share": share, "method": method}
        self._loss = loss
        self.estimator: curvature.CurvatureEstimator | None = None
        self._batches: Batches | None = None
        self._others: Sequence[TrainerCallback] = ()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Create the curvature estimator, if the optimizer needs one.

        Args:
            args: arguments of the trainer.
            state: unused.
            control: unused.
            **kwargs: model and optimizer.

        Raises:
            RuntimeError: no trainer is found whose batches and loss could be taken.
        """
        self._close()
        model, optimizer = kwargs["model"], unwrap_optimizer(kwargs["optimizer"])
        if not curvature.needs_curvature(optimizer) or optimizer.has_curvature:  # pyright: ignore[reportAttributeAccessIssue]
            return
        trainer, custom_loss = current_trainer(), self._loss
        if trainer is None:
            raise RuntimeError(
                "CurvatureCallback finds no transformers.Trainer whose batches and compute_loss it could take; in a "
                "loop of your own use lightning_optim.curvature.CurvatureEstimator"
            )
        batches = Batches(
            trainer,
            model,
            lambda batch: estimator.record_batch(batch),
            reported=lambda loss: estimator.report_losses([loss()]) if estimator.compares else None,
            failed=lambda: estimator.discard(),
        )
        settings = dict(self._settings)
        if settings["share"] is None and not batches.rows_are_independent:
            settings["share"] = 1.0
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        estimator = curvature.CurvatureEstimator(
            model,
            optimizer,  # pyright: ignore[reportArgumentType]
            batches.loss if custom_loss is None else lambda batch: custom_loss(model, copied(batch)),
            weight=batches.weight,
            compare=custom_loss is not None or curvature.searches(optimizer),
            loss_scale=lambda: None if scaler is None else scaler.get_scale(),
            rank=args.process_index,
            **settings,
        )
        self.estimator, self._batches, self._others = estimator, batches, siblings()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Watch the batches of a step.

        Args:
            args: unused.
            state: unused.
            control: unused.
            **kwargs: unused.
        """
        if self._batches is not None:
            self._batches.open()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, if it is due.

        Args:
            args: arguments of the trainer.
            state: state of the trainer.
            control: control of the trainer.
            **kwargs: passed on to the trainer's loggers.
        """
        try:
            metrics = self.estimator.estimate() if self.estimator is not None else {}
        except BaseException:  # the trainer calls no further hook
            self._close()
            raise
        if metrics and state.is_world_process_zero:
            log_scalars(self._others, args, state, control, metrics, kwargs)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Leave the trainer alone between steps.

        Args:
            args: unused.
            state: unused.
            control: unused.
            **kwargs: unused.
        """
        if self._batches is not None:
            self._batches.close()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the estimator.

        Args:
            args: unused.
            state: unused.
            control: unused.
            **kwargs: unused.
        """
        self._close()

    def _close(self) -> None:
        if self.estimator is not None:
            self.estimator.close()
        if self._batches is not None:
            self._batches.close()
        self.estimator = self._batches = None


def add_curvature_callback(trainer: Trainer) -> None:
    """Have a trainer measure curvature; one that has a callback for it is left as it is.

    Args:
        trainer: the trainer.
    """
    if not any(isinstance(callback, CurvatureCallback) for callback in trainer.callback_handler.callbacks):
        trainer.add_callback(CurvatureCallback())
