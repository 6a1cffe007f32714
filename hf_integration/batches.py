"""What a trainer trains: its batches as `compute_loss` receives them, and the loss that it makes of them."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from lightning_optim.diagnostics.batches import map_tensors
from lightning_optim.diagnostics.undisturbed import frozen, in_full_precision, measuring, unchanged_attributes

ROW_BY_ROW = {"transformers.trainer.Trainer", "trl.trainer.sft_trainer.SFTTrainer"}
"""Trainers whose `compute_loss` is a mean over rows that do not depend on one another."""


def current_trainer() -> Trainer | None:
    """The trainer whose event is under way; Transformers hands it to no callback.

    Returns:
        None outside a trainer's event.
    """
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, Trainer):
            return caller
        frame = frame.f_back
    return None


class Batches:
    """Watches the batches of a trainer, and computes their loss again as the trainer does.

    Between `open` and `close`, that is within a step, every call of `trainer.compute_loss` with gradients enabled is a
    training batch. Passes that a trainer makes for other ends (generation, reference models, evaluation) are none.

    Args:
        trainer: the trainer.
        model: its model, outside DDP and compiled wrappers.
        see: told each batch before `compute_loss` gets it: a copy, with the same tensors.
        forwarded: told when `compute_loss` is done.
        reported: told how to get the loss that the trainer has computed of a batch, as if that were the whole step.
        failed: told when `compute_loss` raises an exception.
    """

    def __init__(
        self,
        trainer: Trainer,
        model: nn.Module,
        see: Callable[[Any], None],
        forwarded: Callable[[], None] = lambda: None,
        reported: Callable[[Callable[[], Tensor]], None] = lambda _: None,
        failed: Callable[[], None] = lambda: None,
    ) -> None:
        self.trainer, self.model = trainer, model
        self.see, self.forwarded, self.reported, self.failed = see, forwarded, reported, failed
        self._counted = False
        """Whether the trainer tells `compute_loss` how many items the step has."""
        self._items_of_step: Any = None
        self._inputs: Any = None
        """Of the batch whose loss is being computed."""
        self._by_items: bool | None = None
        """Whether the loss of a batch is divided by the number of items of the step."""

    @property
    def rows_are_independent(self) -> bool:
        """Whether the loss of some of the rows is known to say something of the loss of all.

        It is not where rows belong together, as pairs and groups of preferences and other examples of a contrast do.
        """
        owner = next(c for c in type(self.trainer).__mro__ if "compute_loss" in vars(c))
        is_row_by_row = f"{owner.__module__}.{owner.__qualname__}" in ROW_BY_ROW
        return is_row_by_row and getattr(self.trainer, "compute_loss_func", None) is None

    def open(self) -> None:
        """Watch `compute_loss`; a second call changes nothing."""
        watched = vars(self.trainer).get("compute_loss")
        if not isinstance(watched, _Watched):
            watched = _Watched(self.trainer)
            self.trainer.compute_loss = watched  # pyright: ignore[reportAttributeAccessIssue]
        if self not in watched.listeners:
            watched.listeners.append(self)

    def close(self) -> None:
        """Leave `compute_loss` as it was."""
        watched = vars(self.trainer).get("compute_loss")
        if isinstance(watched, _Watched) and self in watched.listeners:
            watched.listeners.remove(self)
            if not watched.listeners:
                watched.remove()

    def begin(self, inputs: Any, items: Any) -> None:
        """A batch is about to be trained on.

        Args:
            inputs: of `compute_loss`.
            items: `num_items_in_batch`.
        """
        self._counted, self._items_of_step = items is not None, items
        self._inputs = copied(inputs)
        self.see(copied(inputs))

    def end(self, out: Any) -> None:
        """The loss of a batch has been computed.

        Args:
            out: what `compute_loss` has returned.
        """
        self.forwarded()
        inputs, self._inputs = self._inputs, None
        self.reported(lambda: self._of_whole_step(_scalar(out).detach(), inputs))

    def _of_whole_step(self, loss: Tensor, inputs: Any) -> Tensor:
        """A loss that was divided by the items of the step, divided by those of its batch instead."""
        if not self._by_items:
            return loss
        trainer: Any = self.trainer
        shared = trainer.args.average_tokens_across_devices and trainer.args.n_gpu <= 1
        ranks = trainer.accelerator.num_processes if shared else 1
        with self._alone():
            return loss * self._items_of_step / (self._items(inputs) * ranks)

    def loss(self, batch: Any) -> Tensor:
        """The loss of a batch, or of some of its rows, as if the batch were the whole step of one process.

        What a trainer keeps account of is left as it was.

        Args:
            batch: from `see`.

        Returns:
            A scalar.
        """
        return self._loss(batch)

    def _loss(self, batch: Any, factor: int = 1) -> Tensor:
        trainer: Any = self.trainer
        with self._alone(), trainer.compute_loss_context_manager():
            inputs = copied(batch)
            items = self._items(inputs)
            items = None if items is None else items * factor
            out = trainer.compute_loss(self.model, inputs, num_items_in_batch=items)
        return _scalar(out)

    def weight(self, batch: Any) -> float:
        """The weight of a batch in the step's loss, of which the trainer takes a mean over micro-batches or over items.

        Args:
            batch: from `see`.

        Returns:
            The number of items, or 1 where all micro-batches count the same.
        """
        with self._alone():
            items = self._items(batch)
        if items is None:
            return 1.0
        if self._by_items is None:  # only the loss itself tells what it does with the number
            with frozen(self.model, twice=False):
                losses = [float(self._loss(batch, factor).detach()) for factor in (1, 2)]
            self._by_items = not math.isclose(*losses, rel_tol=0.25)
        return float(items) if self._by_items else 1.0

    def _items(self, inputs: Any) -> Any:
        """What `num_items_in_batch` is for a step of these inputs only."""
        count = getattr(self.trainer, "_get_num_items_in_batch", None)
        if not self._counted or count is None:
            return None
        return count([inputs], self.trainer.args.device)

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Have the trainer believe that the step is one batch of one process, in training mode."""
        trainer, model = self.trainer, self.model
        dropout = model.training
        with ExitStack() as stack:
            own_loss = getattr(trainer, "compute_loss_func", None)
            stack.enter_context(unchanged_attributes(trainer, trainer.state, own_loss))
            watched = vars(trainer).get("compute_loss")
            if isinstance(watched, _Watched):
                stack.enter_context(_set(watched, "paused", True))
            for owner, key, value in (
                (trainer.args, "average_tokens_across_devices", False),
                (trainer.args, "_n_gpu", 1),
                (trainer, "log", lambda *_, **__: None),
                (trainer, "current_gradient_accumulation_steps", 1),
                (trainer, "model_wrapped", model),
                (trainer.model, "training", True),
                (model, "forward", vars(model).get("_original_forward")),  # without accelerate's autocast
            ):
                wanted = key != "forward" or (value is not None and in_full_precision())
                if wanted and hasattr(owner, key):
                    stack.enter_context(_set(owner, key, value))
            # trainers ask the model for the mode; its own forward pass is to be without dropout
            for register, flag in (
                (functools.partial(model.register_forward_pre_hook, prepend=True), dropout),
                (functools.partial(model.register_forward_hook, always_call=True), True),
            ):
                handle = register(lambda *_, flag=flag: vars(model).__setitem__("training", flag))
                stack.callback(handle.remove)
            yield


class _Watched:
    """Stands for `trainer.compute_loss` within a step."""

    def __init__(self, trainer: Trainer) -> None:
        self.trainer, self.original = trainer, trainer.compute_loss
        self.own = "compute_loss" in vars(trainer)
        self.listeners: list[Batches] = []
        self.paused = False
        functools.update_wrapper(self, self.original)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Tell of a training batch, and compute its loss as ever."""
        quiet = self.paused or measuring() or not torch.is_grad_enabled()
        listeners = [] if quiet else list(self.listeners)
        inputs = args[1] if len(args) > 1 else kwargs.get("inputs")
        items = args[3] if len(args) > 3 else kwargs.get("num_items_in_batch")
        try:
            for listener in listeners:
                listener.begin(inputs, items)
            out = self.original(*args, **kwargs)
        except BaseException:  # the next step, if there is one, watches again
            for listener in listeners:
                listener.failed()
                listener.close()
            raise
        for listener in listeners:
            listener.end(out)
        return out

    def remove(self) -> None:
        """Put back what was there before."""
        self.listeners.clear()
        if vars(self.trainer).get("compute_loss") is self:
            if self.own:
                self.trainer.compute_loss = self.original  # pyright: ignore[reportAttributeAccessIssue]
            else:
                del self.trainer.compute_loss

    def __reduce__(self) -> Any:
        """A copy of the trainer has the trainer's own method."""
        return (_itself, (self.original,)) if self.own else (getattr, (self.trainer, "compute_loss"))


def _scalar(out: Any) -> Tensor:
    """The loss in what `compute_loss` returns."""
    loss = out[0] if isinstance(out, tuple) else out
    return loss.mean() if loss.ndim else loss


def _itself(x: Any) -> Any:
    return x


@contextmanager
def _set(owner: Any, key: str, value: Any) -> Iterator[None]:
    """An attribute has another value for a while."""
    attributes = vars(owner)
    had, before = key in attributes, attributes.get(key)
    attributes[key] = value
    try:
        yield
    finally:
        if had:
            attributes[key] = before
        else:
            del attributes[key]


def copied(inputs: Any) -> Any:
    """A batch in containers of its own, as `compute_loss` may take labels out.

    Args:
        inputs: tensors and anything else, in any nesting.

    Returns:
        The same tensors.
    """
    return map_tensors(inputs, lambda t: t)
