"""ReLoRA in Lightning."""

from __future__ import annotations

from typing import Any, Literal

from lightning import Callback, LightningModule, Trainer

from lightning_optim import relora


class ReLoRA(Callback):
    """Merges the LoRA adapters of a module into its weights every so often; see `lightning_optim.relora.ReLoRA`.

    `Trainer(callbacks=[ReLoRA(every=2000)])`, for a module that holds a model of `peft.get_peft_model`. Steps are
    optimizer steps. Lightning's checkpoints hold the merged weights, and resuming from one continues the run exactly.

    Args:
        every: steps between merges.
        prune: share of the adapters' optimizer state that becomes zero.
        by: `"magnitude"` or `"random"`.
        warmup_steps: after each merge.
        seed: of the reinitialized adapters.

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
    ) -> None:
        self._settings: dict[str, Any] = dict(every=every, prune=prune, by=by, warmup_steps=warmup_steps, seed=seed)
        relora.check_settings(**self._settings)
        self._steps = 0
        self.relora: relora.ReLoRA | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hook the optimizer.

        Args:
            trainer: the trainer.
            pl_module: its module.

        Raises:
            ValueError: not exactly one optimizer, or no adapters that can be merged.
        """
        if len(trainer.optimizers) != 1:
            raise ValueError(f"ReLoRA needs exactly one optimizer, the module has {len(trainer.optimizers)}")
        self.relora = relora.ReLoRA(pl_module, trainer.optimizers[0], steps=self._steps, **self._settings)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the optimizer alone."""
        if self.relora is not None:
            self._steps = self.relora.steps
            self.relora.remove()
            self.relora = None

    def state_dict(self) -> dict[str, Any]:
        """What is saved.

        Returns:
            The number of steps taken.
        """
        return {"steps": self._steps if self.relora is None else self.relora.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take what was saved.

        Args:
            state_dict: from `state_dict`.
        """
        self._steps = state_dict["steps"]
