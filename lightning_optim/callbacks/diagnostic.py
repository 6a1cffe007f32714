"""The base of the diagnostic callbacks: Lightning's hooks feed a probe, whose reports go to the trainer's loggers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_optim.callbacks.training_step import (
    StepInputs,
    StepListener,
    loss_scale,
    training_loss,
    unwatch_steps,
    watch_steps,
)
from lightning_optim.diagnostics.probes import tensorboard
from lightning_optim.diagnostics.probes.base import Probe
from lightning_optim.diagnostics.probes.context import TrainingContext
from lightning_optim.diagnostics.report import Report
from lightning_optim.diagnostics.view import unwrap_optimizer


class Diagnostic(Callback, StepListener):
    """Base of all diagnostic callbacks; their arguments are those of the probe.

    Scalars go to every logger of the trainer, pictures and tables to TensorBoard (pictures also to loggers with
    `log_image`), arrays into `diagnostics/` beside the log. An exception in a measurement, or in what writes it, is one
    warning: measuring stops and training continues.

    A callback watches one optimizer of the module, the first if `optimizer` names no other; add one callback for each
    that is to be watched. The tags of others than the first begin with `optimizer_1/` and so on.
    """

    kind: ClassVar[type[Probe]]
    loss_type: ClassVar[Any] = Callable[[LightningModule, Any], Tensor] | None
    loss_help: ClassVar[str] = "of (module, batch), where it is not what `training_step` returns: manual optimization."
    optimizer_help: ClassVar[str | None] = "index of the optimizer, where a module has several."
    loss: Callable[[LightningModule, Any], Tensor] | None = None
    """The loss of a batch, in place of what `training_step` returns. A subclass may have it as a method."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        loss = settings.pop("loss", None) if self.kind.needs_loss else None
        if loss is not None:
            self.loss = loss
        self._index = settings.pop("optimizer", 0)
        self.probe = self.kind(*args, **settings)
        self.probe.title = type(self).__name__
        self.probe.prefix = f"optimizer_{self._index}/" if self._index else ""
        self._folder: Path | None = None
        self._charts: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the probe.

        Raises:
            ValueError: the module has no optimizer of that index.
        """
        if not trainer.optimizers:
            return
        if not 0 <= self._index < len(trainer.optimizers):
            raise ValueError(
                f"{type(self).__name__}(optimizer={self._index}): the module has {len(trainer.optimizers)} "
                "optimizer(s), and the first is 0"
            )
        wrapper = trainer.strategy.model
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective call
        context = TrainingContext(
            model=pl_module,
            optimizer=unwrap_optimizer(trainer.optimizers[self._index]),
            loss=self._loss_of(pl_module),
            clip=_clip(trainer),
            loss_scale=loss_scale(trainer),
            step=trainer.global_step,
            ranks=trainer.world_size,
            rank=trainer.global_rank,
        )
        context.extra["checkpoint"] = lambda: _checkpoint(trainer)
        context.extra["ddp"] = wrapper if isinstance(wrapper, DistributedDataParallel) else None
        context.extra["group"] = torch.distributed.group.WORLD if trainer.world_size > 1 else None
        self._charts = None
        self.probe.start(context)
        watch_steps(trainer, self)
        if self.kind.needs_loss and self.loss is None and not pl_module.automatic_optimization:
            self.probe.give_up(
                "under manual optimization training_step steps the optimizer, so it cannot be called for its loss",
                alone=False,
            )

    def _loss_of(self, module: LightningModule) -> Callable[[StepInputs], Tensor]:
        own_loss = self.loss
        return lambda inputs: training_loss(module, inputs) if own_loss is None else own_loss(module, inputs.batch)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Tell the probe that a step begins."""
        self.probe.begin_batch()

    def begin_step(self, trainer: Trainer, inputs: StepInputs) -> None:
        """Show the probe a batch."""
        self.probe.record_batch(inputs if self.kind.needs_loss else inputs.batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Tell the probe that the forward pass has ended."""
        self.probe.after_forward()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the probe that the backward pass has ended."""
        self.probe.after_backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Tell the probe that the optimizer steps next."""
        context = self.probe.context
        if context is not None and unwrap_optimizer(optimizer) is context.optimizer:
            self.probe.before_optimizer_step()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log the probe's report, if there is one."""
        report = self.probe.end_batch()
        if report is not None and trainer.is_global_zero:
            self.probe.safely(self._log, trainer, report, trainer.global_step - 1)

    def _log(self, trainer: Trainer, report: Report, step: int) -> None:
        scalars, charts = report.finite(), self.probe.layout()
        layout, name = None, f"{self.probe.prefix}{self.probe.name}"
        if charts != self._charts:  # the dashboard gets a chart as soon as there is something to show in it
            others = [c.probe for c in trainer.callbacks if isinstance(c, Diagnostic)]  # pyright: ignore[reportAttributeAccessIssue]
            self._charts, layout = charts, tensorboard.layout_of(others)
        for i, logger in enumerate(trainer.loggers):
            logger.log_metrics(scalars, step=step)
            folder = self._folder if i == 0 else None
            if isinstance(logger, TensorBoardLogger):
                if layout:
                    logger.experiment.add_custom_scalars(layout)
                tensorboard.write(report, logger.experiment, step, folder, name)
            else:
                tensorboard.write(report, None, step, folder, name)
                if hasattr(logger, "log_image"):
                    for tag, picture in report.images.items():
                        logger.log_image(tag, [picture], step=step)  # pyright: ignore[reportAttributeAccessIssue]
        if not trainer.loggers:
            tensorboard.write(report, None, step, self._folder, name)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the probe."""
        self.probe.stop()
        unwatch_steps(trainer, self)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the probe."""
        self.probe.on_exception(exception)
        self.probe.stop()
        unwatch_steps(trainer, self)

    @property
    def state_key(self) -> str:
        """Name of the state in checkpoints: one for each optimizer."""
        return self._generate_state_key(optimizer=self._index) if self._index else super().state_key

    def state_dict(self) -> dict[str, Any]:
        """State of the probe, from which a resumed run continues.

        Returns:
            Plain values.
        """
        return self.probe.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a saved state.

        Args:
            state_dict: from `state_dict`.
        """
        self.probe.load_state_dict(state_dict)


def _clip(trainer: Trainer) -> float | None:
    return trainer.gradient_clip_val if trainer.gradient_clip_algorithm in (None, "norm") else None  # pyright: ignore[reportReturnType]


def _checkpoint(trainer: Trainer) -> Path | None:
    callback: Any = trainer.checkpoint_callback
    path = callback and (getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", ""))
    return Path(path) if path else None
