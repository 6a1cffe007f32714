"""Who owns what, kept true; and any optimizer of ours by a callback of the stock Trainer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.training_args import TrainingArguments

from hf_integration.attach import attach
from hf_integration.batches import current_trainer
from hf_integration.callbacks import siblings, writers_of
from hf_integration.settings import check_settings
from lightning_optim import RuleOptimizer
from lightning_optim.build.plan import Owners
from lightning_optim.diagnostics.view import unwrap_optimizer


class RoleTable(TrainerCallback):
    """Writes what every parameter is, which rule has it, why, and how much state that takes.

    The table is the text `roles` in TensorBoard and `roles.md` in `output_dir`, beside the checkpoints, and is written
    again as soon as parameters are frozen, unfrozen or added. Of an optimizer that is not ours it says nothing.
    `HybridOptimizer` does the same by itself.
    """

    def __init__(self) -> None:
        self._table = Owners()
        self._siblings: Sequence[TrainerCallback] = ()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Find TensorBoard's writers.

        Args:
            args: of the trainer.
            state: of the trainer.
            control: not looked at.
            **kwargs: not looked at.
        """
        self._siblings, self._table = siblings(), Owners()

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Write the table if it is no longer true.

        Args:
            args: of the trainer.
            state: of the trainer.
            control: not looked at.
            **kwargs: model and optimizer.
        """
        optimizer = unwrap_optimizer(kwargs["optimizer"])
        if not state.is_world_process_zero or not isinstance(optimizer, RuleOptimizer):
            return
        text = self._table.news(kwargs["model"], optimizer, state.global_step)
        if text is None:
            return
        if args.output_dir:
            folder = Path(args.output_dir)
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "roles.md").write_text(text, encoding="utf-8")
        for writer in writers_of(self._siblings, state):
            writer.add_text("roles", text, state.global_step)


class HybridOptimizer(RoleTable):
    """Has the trainer build one of our optimizers, as `attach` does, and is a `RoleTable`.

    Trainer(..., callbacks=[HybridOptimizer("muon", rest_lr=1e-5)]).train()

    Args:
        name: of the main rule, `python -m lightning_optim list` prints them.
        lr: learning rate, `args.learning_rate` if not given; with the default convention, AdamW's.
        **settings: of `build_optimizer`; `weight_decay` is `args.weight_decay` if not given.

    Raises:
        ValueError: an unknown name or bad value; when training begins, a trainer that has another optimizer.
    """

    def __init__(self, name: str, *, lr: float | None = None, **settings: Any) -> None:
        super().__init__()
        check_settings(name, settings if lr is None else settings | {"lr": lr})
        self._name, self._settings = name, {"lr": lr, **settings}
        self._attached = False

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Attach to the trainer that is being made.

        Args:
            args: not looked at, as are the others.
            state: the same.
            control: the same.
            **kwargs: the same.
        """
        trainer = current_trainer()
        if trainer is not None:
            attach(trainer, self._name, **self._settings)
            self._attached = True

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See whether it came in time.

        Args:
            args: of the trainer.
            state: of the trainer.
            control: of the trainer.
            **kwargs: of the trainer.

        Raises:
            ValueError: the callback was added to a finished trainer.
        """
        if not self._attached:
            raise ValueError(
                f"HybridOptimizer({self._name!r}) came after the trainer was made: give it to Trainer(callbacks=[...]) "
                f"or use hf_integration.attach(trainer, {self._name!r})"
            )
        super().on_train_begin(args, state, control, **kwargs)
