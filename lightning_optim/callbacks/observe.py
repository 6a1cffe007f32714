"""See the optimizer work: each callback hands Lightning's hooks to a probe and its reports to the trainer's loggers."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_optim.diagnostics.probes import curvature, health, memory, noise, presets, rank, refresh
from lightning_optim.diagnostics.probes.base import Probe, Run
from lightning_optim.diagnostics.report import Report


class Diagnostic(Callback):
    """Base of the callbacks below; `settings` are those of the probe.

    Scalars go to every logger of the trainer, pictures and tables to TensorBoard (pictures also to loggers with
    `log_image`), arrays into `diagnostics/` beside the log. The module's first optimizer is looked at. An exception in
    a measurement, or in what writes it, is one warning: measuring stops and training continues.
    """

    kind: ClassVar[type[Probe]]

    def __init_subclass__(cls) -> None:
        """Give the class its probe's signature, which LightningCLI reads."""
        super().__init_subclass__()
        if "kind" in cls.__dict__ and "__init__" not in cls.__dict__:
            cls.__signature__ = inspect.signature(cls.kind)

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.probe = self.kind(*args, **settings)
        self.probe.title = type(self).__name__
        self._folder: Path | None = None
        self._charts: Any = None

    def loss(self, module: LightningModule, batch: Any, /) -> Tensor:
        """The loss of a batch, without logging.

        Args:
            module: the module.
            batch: what `training_step` takes.

        Returns:
            A scalar.
        """
        return training_loss(module, batch)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the probe.

        Args:
            trainer: the trainer.
            pl_module: its module.
        """
        if not trainer.optimizers:
            return
        wrapper = trainer.strategy.model
        self._folder = Path(trainer.log_dir or trainer.default_root_dir)  # a collective call
        run = Run(
            model=pl_module,
            optimizer=unwrapped(trainer.optimizers[0]),
            loss=lambda batch: self.loss(pl_module, batch),
            clip=_clip(trainer),
            loss_scale=loss_scale(trainer),
            step=trainer.global_step,
            ranks=trainer.world_size,
            rank=trainer.global_rank,
        )
        run.extra["checkpoint"] = lambda: _checkpoint(trainer)
        run.extra["ddp"] = wrapper if isinstance(wrapper, DistributedDataParallel) else None
        run.extra["group"] = torch.distributed.group.WORLD if trainer.world_size > 1 else None
        self._charts = None
        self.probe.start(run)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Show the probe a batch.

        Args:
            trainer: the trainer.
            pl_module: its module.
            batch: the batch.
            batch_idx: its number.
        """
        self.probe.begin()
        self.probe.see(batch)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """The forward pass is over.

        Args:
            trainer: the trainer.
            pl_module: its module.
            loss: not looked at.
        """
        self.probe.forwarded()

    def on_after_backward(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The backward pass is over.

        Args:
            trainer: the trainer.
            pl_module: its module.
        """
        self.probe.backward()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """The optimizer steps next.

        Args:
            trainer: the trainer.
            pl_module: its module.
            optimizer: not looked at.
        """
        self.probe.ready()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log what the probe has found.

        Args:
            trainer: the trainer.
            pl_module: its module.
            outputs: not looked at.
            batch: not looked at.
            batch_idx: not looked at.
        """
        report = self.probe.end()
        if report is not None and trainer.is_global_zero:
            self.probe.safely(self._log, trainer, report, trainer.global_step - 1)

    def _log(self, trainer: Trainer, report: Report, step: int) -> None:
        scalars, charts = report.finite(), self.probe.layout()
        layout = None
        if charts != self._charts:  # the dashboard gets a chart as soon as there is something to show in it
            others = [c.probe for c in trainer.callbacks if isinstance(c, Diagnostic)]  # pyright: ignore[reportAttributeAccessIssue]
            self._charts, layout = charts, presets.layout_of(others)
        for i, logger in enumerate(trainer.loggers):
            logger.log_metrics(scalars, step=step)
            folder = self._folder if i == 0 else None
            if isinstance(logger, TensorBoardLogger):
                if layout:
                    logger.experiment.add_custom_scalars(layout)
                presets.write(report, logger.experiment, step, folder, self.probe.name)
            else:
                presets.write(report, None, step, folder, self.probe.name)
                if hasattr(logger, "log_image"):
                    for tag, picture in report.images.items():
                        logger.log_image(tag, [picture], step=step)  # pyright: ignore[reportAttributeAccessIssue]
        if not trainer.loggers:
            presets.write(report, None, step, self._folder, self.probe.name)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the probe.

        Args:
            trainer: the trainer.
            pl_module: its module.
        """
        self.probe.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Stop the probe.

        Args:
            trainer: the trainer.
            pl_module: its module.
            exception: what happened.
        """
        self.probe.failed(exception)
        self.probe.stop()

    def state_dict(self) -> dict[str, Any]:
        """What continues in a resumed run.

        Returns:
            Plain values.
        """
        return self.probe.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue.

        Args:
            state_dict: from `state_dict`.
        """
        self.probe.load_state_dict(state_dict)


class OptimizerHealth(Diagnostic):  # noqa: D101
    kind = health.Health
    __doc__ = kind.__doc__


class GradientRank(Diagnostic):  # noqa: D101
    kind = rank.GradientRank
    __doc__ = kind.__doc__


class GradientNoiseScale(Diagnostic):  # noqa: D101
    kind = noise.GradientNoiseScale
    __doc__ = kind.__doc__


class MemoryLogger(Diagnostic):  # noqa: D101
    kind = memory.Memory
    __doc__ = kind.__doc__


class PreconditionerRefresh(Diagnostic):  # noqa: D101
    kind = refresh.PreconditionerRefresh
    __doc__ = kind.__doc__


class HessianBlocks(Diagnostic):  # noqa: D101
    kind = curvature.HessianBlocks
    __doc__ = f"""{(kind.__doc__ or "").rstrip()}
        loss: of (module, batch), where `training_step` has side effects beside logging.
    """

    def __init__(self, *, loss: Callable[[LightningModule, Any], Tensor] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if loss is not None:
            self.loss = loss

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:  # noqa: D102
        super().on_train_start(trainer, pl_module)
        own = "loss" in vars(self) or type(self).loss is not Diagnostic.loss
        if trainer.optimizers and not own and not pl_module.automatic_optimization:
            self.probe.give_up(
                "under manual optimization training_step steps the optimizer, so it cannot be called for its loss",
                alone=False,
            )


CALLBACKS: dict[type[Probe], type[Diagnostic]] = {
    c.kind: c
    for c in (OptimizerHealth, GradientRank, HessianBlocks, GradientNoiseScale, MemoryLogger, PreconditionerRefresh)
}


def diagnostics(preset: str, steps: int | None = None) -> list[Diagnostic]:
    """The callbacks of a preset.

    `Trainer(callbacks=diagnostics("cheap"))`: sizes of gradients and updates, memory (at most 1 % of training time).
    `"matrix"` adds ranks, subspaces and refreshes (3 %), `"curvature"` the Hessian and the noise scale (5 %). A
    callback that takes longer doubles its interval.

    Args:
        preset: `"cheap"`, `"matrix"` or `"curvature"`.
        steps: optimizer steps of the run; in a short one the rare measurements come more often.

    Returns:
        New callbacks.

    Raises:
        ValueError: an unknown preset.
    """
    return [CALLBACKS[kind](**settings) for kind, settings in presets.preset(preset, steps)]


def training_loss(module: LightningModule, batch: Any) -> Tensor:
    """What `training_step` returns for a batch, without logging.

    Args:
        module: the module.
        batch: what `training_step` takes.

    Returns:
        A scalar.

    Raises:
        ValueError: it returns none.
    """
    with _silent(module):
        step = module.training_step
        out = step(batch, 0) if len(inspect.signature(step).parameters) > 1 else step(batch)
    if not isinstance(out, Tensor | Mapping):
        raise ValueError("training_step returned no loss for the batch that is measured; give loss=")
    return out if isinstance(out, Tensor) else out["loss"]


@contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """Let `self.log` do nothing."""
    own = vars(module).get("log")
    module.__dict__["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
        if own is None:
            del module.__dict__["log"]
        else:
            module.__dict__["log"] = own


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer inside a framework's wrappers.

    Returns:
        torch's or ours.
    """
    while not isinstance(optimizer, Optimizer):
        optimizer = optimizer.optimizer
    return optimizer


def _clip(trainer: Trainer) -> float | None:
    return trainer.gradient_clip_val if trainer.gradient_clip_algorithm in (None, "norm") else None  # pyright: ignore[reportReturnType]


def loss_scale(trainer: Trainer) -> Callable[[], float | None]:
    """The present factor of mixed precision.

    Returns:
        A function that gives it, or None without.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return lambda: None if scaler is None else scaler.get_scale()


def _checkpoint(trainer: Trainer) -> Path | None:
    callback: Any = trainer.checkpoint_callback
    path = callback and (getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", ""))
    return Path(path) if path else None
