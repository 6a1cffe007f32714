"""What a Lightning trainer trains: the batches of `training_step`, and the loss that it makes of them."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.loggers.logger import DummyLogger
from torch import Tensor

from lightning_optim.diagnostics.undisturbed import measuring


class _Source:
    """The iterator that `training_step` draws batches from; None once the step is over."""

    def __init__(self, iterator: Iterator[Any]) -> None:
        self.iterator: Iterator[Any] | None = iterator


@dataclass(frozen=True)
class StepInputs:
    """What `training_step` is called with.

    Args:
        args: the batch, its number and, with several loaders, that of the loader; without an iterator over the loader.
        drawn: what is drawn from such an iterator, (batch, number, number of the loader) each; filled while it runs.
        source: the iterator, if there is one.
    """

    args: tuple[Any, ...]
    drawn: list[Any]
    source: _Source | None = None

    @property
    def batch(self) -> Any:
        """The batch, the first one where `training_step` draws several."""
        return self.args[0] if self.source is None else self.drawn[0][0]

    def call(self, step: Callable[..., Any]) -> Any:
        """Call a training step with these inputs.

        Args:
            step: the method.

        Returns:
            What it returns.
        """
        return step(*self.args) if self.source is None else step(_Draws(self.source, self.drawn), *self.args)


class _Draws:
    """An iterator over what has been drawn already and then, within the step, over the loader."""

    def __init__(self, source: _Source, drawn: list[Any]) -> None:
        self.source, self.drawn, self.position = source, drawn, 0

    def __iter__(self) -> _Draws:
        return self

    def __next__(self) -> Any:
        if self.position == len(self.drawn):
            if self.source.iterator is None:
                raise StopIteration
            self.drawn.append(next(self.source.iterator))
        self.position += 1
        return self.drawn[self.position - 1]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.source.iterator, name)


class StepListener:
    """Base of what is told of a trainer's training steps, whether or not it is among the trainer's callbacks."""

    def begin_step(self, trainer: Trainer, inputs: StepInputs) -> None:
        """A batch is about to be trained on."""

    def report_losses(self, trainer: Trainer, losses: list[Tensor]) -> None:
        """The losses of a batch are known: of automatic optimization one, else one for every backward pass."""

    def fail_step(self) -> None:
        """A training step has raised an exception."""


def watch_steps(trainer: Trainer, listener: StepListener) -> None:
    """Tell a listener of every training step of a trainer; a second call changes nothing.

    The trainer's strategy is watched, which finders that replace the callbacks keep.

    Args:
        trainer: the trainer.
        listener: what is told.
    """
    strategy = trainer.strategy
    watched = vars(strategy).get("training_step")
    if not isinstance(watched, _WatchedStep):
        watched = _WatchedStep(trainer)
        strategy.training_step = watched
        strategy.backward = functools.partial(_backward, watched, strategy.backward)  # pyright: ignore
    if listener not in watched.listeners:
        watched.listeners.append(listener)


def unwatch_steps(trainer: Trainer, listener: StepListener) -> None:
    """Tell a listener nothing more.

    Args:
        trainer: the trainer.
        listener: from `watch_steps`.
    """
    watched = vars(trainer.strategy).get("training_step")
    if isinstance(watched, _WatchedStep) and listener in watched.listeners:
        watched.listeners.remove(listener)
        if not watched.listeners:
            del trainer.strategy.training_step, trainer.strategy.backward


class _WatchedStep:
    """Stands for `strategy.training_step`."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.original = trainer, trainer.strategy.training_step
        self.listeners: list[StepListener] = []
        self.losses: list[Tensor] = []
        self._last: Any = None
        """The batch and its number: closures that are called again train on the same one."""
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any) -> Any:
        """Tell of a training batch, and call the method as ever."""
        number = self.trainer.fit_loop.epoch_loop.batch_progress.total.ready
        if measuring() or (self._last is not None and self._last[0] is args[0] and self._last[1] == number):
            return self.original(*args)
        self._last, self.losses = (args[0], number), []
        module = self.trainer.lightning_module
        source = _Source(args[0]) if isinstance(args[0], Iterator) else None
        inputs = StepInputs(args if source is None else args[1:], [], source)
        listeners = list(self.listeners)
        try:
            if source is not None:
                inputs.drawn.extend(itertools.islice(args[0], 1))
            for listener in listeners:
                listener.begin_step(self.trainer, inputs)
            out = inputs.call(self.original)
        except BaseException:
            for listener in listeners:
                listener.fail_step()
            raise
        finally:
            if source is not None:
                source.iterator = None
        if module.automatic_optimization and out is not None:
            for listener in listeners:
                listener.report_losses(self.trainer, [loss_of(out).detach()])
        return out


def _backward(watched: _WatchedStep, original: Callable[..., Any], loss: Tensor, *args: Any, **kwargs: Any) -> Any:
    """Stands for `strategy.backward`."""
    if not watched.trainer.lightning_module.automatic_optimization and not measuring():
        watched.losses.append(loss.detach())
        for listener in list(watched.listeners):
            listener.report_losses(watched.trainer, watched.losses)
    try:
        return original(loss, *args, **kwargs)
    except BaseException:
        for listener in list(watched.listeners):
            listener.fail_step()
        raise


def training_loss(module: LightningModule, inputs: StepInputs) -> Tensor:
    """The loss that `training_step` returns. Nothing is logged.

    Args:
        module: the module.
        inputs: of the step.

    Returns:
        A scalar.

    Raises:
        ValueError: `training_step` returns no loss.
    """
    with silent(module):
        out = inputs.call(module.training_step)
    if not isinstance(out, Tensor | Mapping):
        raise ValueError("training_step returned no loss for the batch that is measured; give loss=")
    return loss_of(out)


def loss_of(out: Any) -> Tensor:
    """The loss in what `training_step` returns.

    Args:
        out: a loss, or a mapping with one.

    Returns:
        The loss.
    """
    return out if isinstance(out, Tensor) else out["loss"]


@contextmanager
def silent(module: LightningModule) -> Iterator[None]:
    """Log nothing: `self.log`, `self.log_dict` and the loggers do nothing.

    Args:
        module: the module.

    Yields:
        Nothing.
    """
    trainer: Any = module.trainer
    loggers, before = trainer.loggers, vars(module).get("log")
    module.__dict__["log"] = lambda *args, **kwargs: None
    trainer.loggers = [DummyLogger() for _ in loggers]
    try:
        yield
    finally:
        trainer.loggers = loggers
        if before is None:
            del module.__dict__["log"]
        else:
            module.__dict__["log"] = before


def loss_scale(trainer: Trainer) -> Callable[[], float | None]:
    """The factor by which mixed precision scales the loss.

    Args:
        trainer: the trainer.

    Returns:
        A function that returns the present factor, or None where losses are not scaled.
    """
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    return lambda: None if scaler is None else scaler.get_scale()
