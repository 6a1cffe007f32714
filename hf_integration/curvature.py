"""Optimizers that need more than gradients, in the Transformers Trainer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from hf_integration.callbacks import log_scalars, siblings, unwrapped
from lightning_optim import curvature
from lightning_optim.diagnostics.hessian import Method, measuring


class CurvatureFeed(TrainerCallback):
    """Measures what some rules need beside gradients; see `lightning_optim.curvature.Feed`.

    `Trainer(..., callbacks=[CurvatureFeed()])`; `attach` and `register` add it by themselves, and it does nothing for
    other optimizers. It logs `curvature/win_rate` (Sophia: the share of coordinates that are not clipped, best between
    0.1 and 0.5) and `curvature/seconds`.

    Args:
        share: of the rows of every batch that is measured; see `Feed`.
        method: `"exact"` products with the Hessian, or `"difference"` of gradients where kernels do not allow those.
        loss: of (model, keyword arguments of its forward pass), where it is not the output's `loss`.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        share: float | None = None,
        method: Method = "exact",
        loss: Callable[[nn.Module, Any], Tensor] | None = None,
    ) -> None:
        curvature.check_settings(share, method)
        self._settings: dict[str, Any] = {"share": share, "method": method}
        self._loss = _output_loss if loss is None else loss
        self.feed: curvature.Feed | None = None
        self._others: Sequence[TrainerCallback] = ()
        self._hook: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Make the feed, if the optimizer needs one.

        Args:
            args: of the trainer.
            state: not looked at.
            control: not looked at.
            **kwargs: model and optimizer.
        """
        self._close()
        model, optimizer = kwargs["model"], unwrapped(kwargs["optimizer"])
        if not curvature.observes(optimizer) or optimizer.fed:  # pyright: ignore[reportAttributeAccessIssue]
            return
        scaler = getattr(kwargs["optimizer"], "scaler", None)
        feed = self.feed = curvature.Feed(
            model,
            optimizer,  # pyright: ignore[reportArgumentType]
            lambda batch: self._loss(model, batch),
            loss_scale=lambda: None if scaler is None else scaler.get_scale(),
            rank=args.process_index,
            **self._settings,
        )
        self._others = siblings()

        def see(_: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            if model.training and not measuring():
                feed.see({k: v for k, v in kwargs.items() if k != "num_items_in_batch"})

        self._hook = model.register_forward_pre_hook(see, with_kwargs=True)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure, if it is due.

        Args:
            args: of the trainer.
            state: of the trainer.
            control: of the trainer.
            **kwargs: passed on to the trainer's loggers.
        """
        said = self.feed.ready() if self.feed is not None else {}
        if said and state.is_world_process_zero:
            log_scalars(self._others, args, state, control, said, kwargs)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Close the feed.

        Args:
            args: not looked at, as are the others.
            state: the same.
            control: the same.
            **kwargs: the same.
        """
        self._close()

    def _close(self) -> None:
        if self.feed is not None:
            self.feed.close()
            self._hook.remove()
            self.feed = None


def _output_loss(model: nn.Module, batch: Any) -> Tensor:
    loss = model(**batch).loss
    if loss is None:
        raise ValueError(
            "the model's output has no loss for what the trainer gives it; give CurvatureFeed(loss=...), a function of "
            "the model and the keyword arguments of its forward pass"
        )
    return loss
