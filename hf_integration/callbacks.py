"""The base of the diagnostic callbacks for the Transformers Trainer; the tags are those of Lightning."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK, TensorBoardCallback
from transformers.trainer_callback import CallbackHandler, ExportableState
from transformers.trainer_utils import get_last_checkpoint
from transformers.training_args import TrainingArguments

from hf_integration.batches import Batches, copied, current_trainer
from lightning_optim.diagnostics.probes import tensorboard
from lightning_optim.diagnostics.probes.base import Probe
from lightning_optim.diagnostics.probes.context import TrainingContext
from lightning_optim.diagnostics.report import Report
from lightning_optim.diagnostics.view import unwrap_optimizer


class Diagnostic(TrainerCallback, ExportableState):
    """Base of all diagnostic callbacks; their arguments are those of the probe.

    Scalars go to the trainer's loggers (`report_to`), pictures and tables to TensorBoard, arrays into `diagnostics/`
    beside the log. Given as an instance or, with the defaults, as a class. With
    `restore_callback_states_from_checkpoint` a resumed run continues the averages. The batches are those that the
    trainer's `compute_loss` receives. An exception in a measurement, or in what writes it, is one warning: measuring
    stops and training continues.
    """

    kind: ClassVar[type[Probe]]
    loss_type: ClassVar[Any] = Callable[[nn.Module, Any], Tensor] | None
    loss_help: ClassVar[str] = (
        "of (model, batch as `compute_loss` receives it), where it is not what the trainer's `compute_loss` gives."
    )

    optimizer_help: ClassVar[str | None] = None

    def __init__(self, *args: Any, **settings: Any) -> None:
        loss = settings.pop("loss", None) if self.kind.needs_loss else None
        if loss is not None:
            self.loss = loss
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
            RuntimeError: there is no trainer.
        """
        if self._batches is None:
            raise RuntimeError("there is no transformers.Trainer whose compute_loss could be taken")
        return self._batches.loss(batch)

    def state(self) -> dict[str, Any]:
        """State from which a resumed run continues.

        Returns:
            Plain values, as Transformers keeps them.
        """
        return {"args": self.settings, "attributes": {"saved": self.probe.state_dict()}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the probe."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        scaler = getattr(optimizer, "scaler", None)
        context = TrainingContext(
            model=model,
            optimizer=unwrap_optimizer(optimizer),
            loss=lambda batch: self.loss(model, copied(batch)),
            clip=args.max_grad_norm or None,
            loss_scale=lambda: None if scaler is None else scaler.get_scale(),
            step=state.global_step,
            ranks=args.world_size,
            rank=args.process_index,
        )
        context.extra["checkpoint"] = lambda: _checkpoint(args)
        context.extra["group"] = torch.distributed.group.WORLD if args.world_size > 1 else None
        self._siblings, self._charts = siblings(), None
        self._unwatch()
        trainer = current_trainer()
        if trainer is not None:
            self._batches = Batches(trainer, model, self._record_batch, self._after_forward)
            context.extra["rows_belong_together"] = not self._batches.rows_are_independent
            wrapper = getattr(trainer, "model_wrapped", None)
            context.extra["ddp"] = wrapper if isinstance(wrapper, DistributedDataParallel) else None
        if self.saved:
            self.probe.load_state_dict(self.saved)
        self.probe.start(context)

    def _record_batch(self, batch: Any) -> None:
        self.probe.record_batch(batch)

    def _after_forward(self) -> None:
        self.probe.after_forward()

    def _unwatch(self) -> None:
        if self._batches is not None:
            self._batches.close()
        self._batches = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the probe that a step begins."""
        if self._batches is not None and not self.probe.stopped:
            self._batches.open()
        self.probe.begin_batch()

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the probe that the backward pass of a micro-batch, but for the last, has ended."""
        self.probe.after_backward()

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Tell the probe that the optimizer steps next."""
        self.probe.before_optimizer_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Log the probe's report, if there is one."""
        if self._batches is not None:
            self._batches.close()
        report = self.probe.end_batch()
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
                writer.add_custom_scalars(tensorboard.layout_of(others))
        log_scalars(self._siblings, args, state, control, report.finite(), kwargs)
        writer = writers[0] if writers else None
        folder = Path(writer.log_dir if writer is not None else args.output_dir or ".")
        tensorboard.write(report, writer, state.global_step, folder, self.probe.name)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop the probe."""
        self.probe.stop()
        self._unwatch()


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
    writers = [c.tb_writer for c in others if isinstance(c, TensorBoardCallback)]
    return [w for w in writers if w is not None] if state.is_world_process_zero else []


def _checkpoint(args: TrainingArguments) -> Path | None:
    path = get_last_checkpoint(args.output_dir) if args.output_dir and Path(args.output_dir).is_dir() else None
    return Path(path) if path else None
