"""See the optimizer work: Lightning's diagnostic callbacks for the Transformers Trainer, with the same tags."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import TrainingArguments

from hf_integration.batches import Batches, copied, current_trainer
from lightning_optim.diagnostics.probes import curvature, health, memory, noise, presets, rank, refresh
from lightning_optim.diagnostics.probes.base import Probe, Run
from lightning_optim.diagnostics.report import Report


class Diagnostic(TrainerCallback, ExportableState):
    """Base of the callbacks below; `settings` are those of the probe.

    Scalars go to the trainer's loggers (`report_to`), pictures and tables to TensorBoard, arrays into `diagnostics/`
    beside the log. Given as an instance or, with the defaults, as a class. With
    `restore_callback_states_from_checkpoint` a resumed run continues the averages. The batches are those that the
    trainer's `compute_loss` receives. An exception in a measurement, or in what writes it, is one warning: measuring
    stops and training continues.
    """

    kind: ClassVar[type[Probe]]

    def __init_subclass__(cls) -> None:
        """Give the class its probe's signature."""
        super().__init_subclass__()
        if "kind" in cls.__dict__ and "__init__" not in cls.__dict__:
            cls.__signature__ = inspect.signature(cls.kind)

    def __init__(self, *args: Any, **settings: Any) -> None:
        self.settings = dict(inspect.signature(self.kind).bind(*args, **settings).arguments)
        self.probe = self.kind(**self.settings)
        self.probe.title = type(self).__name__
        self.saved: dict[str, Any] = {}
        self._siblings: Sequence[TrainerCallback] = ()
        self._batches: Batches | None = None
        self._charts: Any = None

    def loss(self, model: nn.Module, batch: Any, /) -> Tensor:
        """The loss of a batch: what the trainer's `compute_loss` makes of it.

        Args:
            model: the model.
            batch: as `compute_loss` receives it.

        Returns:
            A scalar.

        Raises:
            RuntimeError: no trainer was found.
        """
        if self._batches is None:
            raise RuntimeError("there is no transformers.Trainer whose compute_loss could be taken")
        return self._batches.loss(batch)

    def state(self) -> dict[str, Any]:
        """What continues in a resumed run.

        Returns:
            Plain values, as Transformers keeps them.
        """
        return {"args": self.settings, "attributes": {"saved": self.probe.state_dict()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the probe.

        Args:
            args: of the trainer.
            state: of the trainer.
            control: not looked at.
            **kwargs: model and optimizer.
        """
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        scaler = getattr(optimizer, "scaler", None)
        run = Run(
            model=model,
            optimizer=unwrapped(optimizer),
            loss=lambda batch: self.loss(model, copied(batch)),
            clip=args.max_grad_norm or None,
            loss_scale=lambda: None if scaler is None else scaler.get_scale(),
            step=state.global_step,
            ranks=args.world_size,
            rank=args.process_index,
        )
        run.extra["checkpoint"] = lambda: _checkpoint(args)
        run.extra["group"] = torch.distributed.group.WORLD if args.world_size > 1 else None
        self._siblings, self._charts = siblings(), None
        self._unwatch()
        trainer = current_trainer()
        if trainer is not None:
            self._batches = Batches(trainer, model, self._see, self._forwarded)
            run.extra["rows_belong_together"] = not self._batches.rows_are_independent
            wrapper = getattr(trainer, "model_wrapped", None)
            run.extra["ddp"] = wrapper if isinstance(wrapper, DistributedDataParallel) else None
        if self.saved:
            self.probe.load_state_dict(self.saved)
        self.probe.start(run)

    def _see(self, batch: Any) -> None:
        self.probe.see(batch)

    def _forwarded(self) -> None:
        self.probe.forwarded()

    def _unwatch(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """A step begins.

        Args:
            args: not looked at, as are the others.
            state: the same.
            control: the same.
            **kwargs: the same.
        """
        if self._batches is not None and not self.probe.stopped:
            self._batches.open()
        self.probe.begin()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The backward pass of a micro-batch is over, but for the last.

        Args:
            args: not looked at, as are the others.
            state: the same.
            control: the same.
            **kwargs: the same.
        """
        self.probe.backward()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The optimizer steps next.

        Args:
            args: not looked at, as are the others.
            state: the same.
            control: the same.
            **kwargs: the same.
        """
        self.probe.ready()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log what the probe has found.

        Args:
            args: of the trainer.
            state: of the trainer.
            control: of the trainer.
            **kwargs: passed on to the trainer's loggers.
        """
        if self._batches is not None:
            self._batches.close()
        report = self.probe.end()
        if report is not None and state.is_world_process_zero:
            self.probe.safely(self._log, args, state, control, report, kwargs)

    def _log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        report: Report,
        kwargs: dict[str, Any],
    ) -> None:
        writers, charts = writers_of(self._siblings, state), self.probe.layout()
        if charts != self._charts:  # the dashboard gets a chart as soon as there is something to show in it
            self._charts = charts
            for writer in writers:
                others = [c.probe for c in self._siblings if isinstance(c, Diagnostic)]
                writer.add_custom_scalars(presets.layout_of(others))
        log_scalars(self._siblings, args, state, control, report.finite(), kwargs)
        writer = writers[0] if writers else None
        folder = Path(writer.log_dir if writer is not None else args.output_dir or ".")
        presets.write(report, writer, state.global_step, folder, self.probe.name)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the probe.

        Args:
            args: not looked at, as are the others.
            state: the same.
            control: the same.
            **kwargs: the same.
        """
        self.probe.stop()
        self._unwatch()


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
        loss: of (model, batch as `compute_loss` receives it), where it is not what the trainer's `compute_loss` gives.
    """

    def __init__(self, *, loss: Callable[[nn.Module, Any], Tensor] | None = None, **settings: Any) -> None:
        super().__init__(**settings)
        if loss is not None:
            self.loss = loss


CALLBACKS: dict[type[Probe], type[Diagnostic]] = {
    c.kind: c
    for c in (OptimizerHealth, GradientRank, HessianBlocks, GradientNoiseScale, MemoryLogger, PreconditionerRefresh)
}


def diagnostics(preset: str, steps: int | None = None) -> list[Diagnostic]:
    """The callbacks of a preset.

    `Trainer(..., callbacks=diagnostics("cheap"))`: sizes of gradients and updates, memory (at most 1 % of training
    time). `"matrix"` adds ranks, subspaces and refreshes (3 %), `"curvature"` the Hessian and the noise scale (5 %).
    A callback that takes longer doubles its interval.

    Args:
        preset: `"cheap"`, `"matrix"` or `"curvature"`.
        steps: optimizer steps of the run; in a short one the rare measurements come more often.

    Returns:
        New callbacks.

    Raises:
        ValueError: an unknown preset.
    """
    return [CALLBACKS[kind](**settings) for kind, settings in presets.preset(preset, steps)]


def log_scalars(
    others: Sequence[TrainerCallback],
    args: TrainingArguments,
    state: TrainerState,
    control: TrainerControl,
    scalars: Mapping[str, float],
    kwargs: Mapping[str, Any],
) -> None:
    """Write numbers to all loggers of the trainer.

    Args:
        others: the trainer's callbacks.
        args: of the trainer.
        state: of the trainer.
        control: of the trainer.
        scalars: by tag.
        kwargs: passed on to the loggers.
    """
    for writer in writers_of(others, state):
        for tag, value in scalars.items():
            writer.add_scalar(tag, value, state.global_step)
    loggers = tuple(INTEGRATION_TO_CALLBACK.values())
    for other in others:
        if isinstance(other, loggers) and not isinstance(other, TensorBoardCallback):
            other.on_log(args, state, control, logs=dict(scalars), **kwargs)


def siblings() -> Sequence[TrainerCallback]:
    """All callbacks of the trainer that calls the calling one.

    Transformers gives a callback no way to the loggers but the caller's frame.

    Returns:
        Empty outside a trainer's event.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler):
            return caller.callbacks
        frame = frame.f_back
    return ()


def writers_of(others: Sequence[TrainerCallback], state: TrainerState) -> list[Any]:
    """TensorBoard's writers.

    Args:
        others: callbacks of a trainer.
        state: of the trainer.

    Returns:
        Of type `SummaryWriter`; none on processes that do not log.
    """
    found = [c.tb_writer for c in others if isinstance(c, TensorBoardCallback)]
    return [w for w in found if w is not None] if state.is_world_process_zero else []


def unwrapped(optimizer: Any) -> Optimizer:
    """The optimizer inside Accelerate's wrapper.

    Returns:
        torch's or ours.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def _checkpoint(args: TrainingArguments) -> Path | None:
    found = get_last_checkpoint(args.output_dir) if args.output_dir and Path(args.output_dir).is_dir() else None
    return Path(found) if found else None
