"""The loss of a module's `training_step`, computed beside training."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning import LightningModule, Trainer
from torch import Tensor


def training_loss(module: LightningModule, batch: Any) -> Tensor:
    """The loss that `training_step` returns for a batch. Nothing is logged.

    Args:
        module: the module.
        batch: what `training_step` takes.

    Returns:
        A scalar.

    Raises:
        ValueError: `training_step` returns no loss.
    """
    with _silent(module):
        step = module.training_step
        out = step(batch, 0) if len(inspect.signature(step).parameters) > 1 else step(batch)
    if not isinstance(out, Tensor | Mapping):
        raise ValueError("training_step returned no loss for the batch that is measured; give loss=")
    return out if isinstance(out, Tensor) else out["loss"]


@contextmanager
def _silent(module: LightningModule) -> Iterator[None]:
    """Replace `self.log` by a function that does nothing."""
    before = vars(module).get("log")
    module.__dict__["log"] = lambda *args, **kwargs: None
    try:
        yield
    finally:
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
