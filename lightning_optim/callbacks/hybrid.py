"""Train with our optimizer a module that one cannot touch."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any

from lightning import LightningModule, Trainer

from lightning_optim.callbacks.configure import check_strategy, configure_optimizers
from lightning_optim.callbacks.roles import RoleTable
from lightning_optim.core.rule import lookup


class HybridOptimizer(RoleTable):
    """Replaces what the module's `configure_optimizers` returns, for the length of `fit`.

    `Trainer(callbacks=[HybridOptimizer("muon", lr=3e-4, schedule="cosine")])`: the module's own
    `configure_optimizers` is not called, and need not exist. Everything else stays Lightning's: clipping,
    accumulation, checkpoints. To resume, give the callback again; it keeps nothing in the checkpoint. A module of
    manual optimization gets one optimizer from `self.optimizers()`, whatever number it expects.

    It is a `RoleTable`, too: it says what every parameter is, which rule has it and how much state.

    Args:
        name: of the main rule, `python -m lightning_optim list` prints them.
        lr: peak learning rate; with the default convention, AdamW's. Needed unless a `recipe` or `preset` is given.
        schedule: a name or settings, `{"schedule": "cosine", "warmup_steps": 100}`; see `configure_optimizers`.
        **settings: the other arguments of `lightning_optim.configure_optimizers`.

    Raises:
        ValueError: an unknown name; when `fit` begins, a strategy (FSDP1, DeepSpeed) that cannot run the rule.
    """

    def __init__(
        self,
        name: str,
        *,
        lr: float | None = None,
        schedule: str | dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        super().__init__()
        self._name = lookup(name).name
        self._settings: dict[str, Any] = dict(lr=lr, schedule=schedule, **settings)
        self._replaced: tuple[LightningModule, Any] | None = None
        self._log: Callable[..., None] | None = None

    @property
    def log(self) -> Callable[..., None] | None:
        """The module's `log`, which the trainer hands every callback.

        Returns:
            None before the trainer did.
        """
        return self._log

    @log.setter
    def log(self, log: MethodType) -> None:
        # The first word a callback hears of the module, and the only one before the trainer asks whether the module
        # has configure_optimizers: setup would be too late for a module without.
        self._log = log
        module = log.__self__
        if isinstance(module, LightningModule) and module.trainer.state.fn == "fit":
            self._replace(module)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Replace the module's method.

        Args:
            trainer: the trainer.
            pl_module: its module.
            stage: only `"fit"` asks for optimizers.
        """
        if stage == "fit":
            self._replace(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give the module its own method back."""
        self._restore()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the module its own method back; after an exception the trainer does not call `teardown`."""
        self._restore()

    def _replace(self, module: LightningModule) -> None:
        if sum(isinstance(c, HybridOptimizer) for c in module.trainer.callbacks) > 1:  # pyright: ignore
            raise ValueError("the trainer has more than one HybridOptimizer; a module has one optimizer")
        if self._replaced is not None:
            return
        check_strategy(module, self._name)
        self._replaced = module, vars(module).get("configure_optimizers")  # LightningCLI puts one on the instance
        module.configure_optimizers = MethodType(self._build, module)

    def _build(self, module: LightningModule) -> dict[str, Any]:
        return configure_optimizers(module, self._name, **self._settings)

    def _restore(self) -> None:
        if self._replaced is not None:
            module, original = self._replaced
            del module.configure_optimizers
            if original is not None:
                module.configure_optimizers = original
            self._replaced = None
