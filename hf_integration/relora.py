"""ReLoRA in Transformers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any, Literal

from safetensors.torch import load_file, save_file
from torch import nn
from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from lightning_optim import relora

FILE = "relora.safetensors"
"""Holds the merged weights in a checkpoint, where the Trainer saves the adapters only."""


class ReLoRA(TrainerCallback):
    """Merges the LoRA adapters of a model into its weights every so often; see `lightning_optim.relora.ReLoRA`.

    Trainer(get_peft_model(model, config), args, callbacks=[ReLoRA(every=2000)], ...)

    Steps are optimizer steps. Every checkpoint gets a file with the merged weights, and resuming continues the run
    exactly. After the run save `trainer.model.merge_and_unload()`: the adapter alone holds the last piece only.

    Args:
        every: steps between merges.
        prune: share of the adapters' optimizer state that becomes zero.
        by: `"magnitude"` or `"random"`.
        warmup_steps: after each merge.
        seed: random seed of the adapters that start again.
        resume_from: the checkpoint to resume from, if it does not lie in the Trainer's `output_dir`.

    Raises:
        ValueError: a value out of range.
    """

    def __init__(
        self,
        every: int,
        *,
        prune: float = 0.99,
        by: Literal["magnitude", "random"] = "magnitude",
        warmup_steps: int = 50,
        seed: int = 0,
        resume_from: str | Path | None = None,
    ) -> None:
        self._settings: dict[str, Any] = dict(every=every, prune=prune, by=by, warmup_steps=warmup_steps, seed=seed)
        relora.check_settings(**self._settings)
        self._resume_from = resume_from
        self.relora: relora.ReLoRA | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Optimizer | None = None,
        **_: Any,
    ) -> None:
        """Hook the optimizer and, in a resumed run, take the merged weights.

        Args:
            args: the Trainer's.
            state: the Trainer's.
            control: the Trainer's.
            model: with adapters.
            optimizer: of the adapters.

        Raises:
            ValueError: no adapters that can be merged, or a checkpoint without merged weights.
        """
        assert model is not None and optimizer is not None
        if args.load_best_model_at_end:
            raise ValueError("ReLoRA: load_best_model_at_end would put old adapters on newer weights")
        self._leave()
        self.relora = relora.ReLoRA(model, optimizer, steps=state.global_step, **self._settings)
        if state.global_step >= self._settings["every"]:
            self.relora.load_weights(load_file(self._find(args, state), device=str(args.device)))

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Put the merged weights beside the checkpoint's adapters.

        Args:
            args: the Trainer's.
            state: the Trainer's.
            control: the Trainer's.
        """
        if self.relora is not None and args.should_save:
            folder = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
            weights = {name: weight.contiguous() for name, weight in self.relora.weights.items()}
            save_file(weights, folder / f"{FILE}.part")
            os.replace(folder / f"{FILE}.part", folder / FILE)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Leave the optimizer alone.

        Args:
            args: the Trainer's.
            state: the Trainer's.
            control: the Trainer's.
        """
        self._leave()

    def _leave(self) -> None:
        if self.relora is not None:
            self.relora.remove()
            self.relora = None

    def _find(self, args: TrainingArguments, state: TrainerState) -> Path:
        home = Path(str(args.output_dir)) / f"checkpoint-{state.global_step}"
        checkpoints = [Path(x) for x in (self._resume_from, args.resume_from_checkpoint) if x]
        files = [folder / FILE for folder in (*checkpoints, home) if (folder / FILE).exists()]
        if not files:
            raise ValueError(
                f"ReLoRA: no {FILE} in {home}: the adapters of step {state.global_step} belong to merged weights; "
                "give ReLoRA(resume_from=...) the checkpoint if it lies elsewhere"
            )
        return files[0]
