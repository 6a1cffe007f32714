"""Lightning: one line in `configure_optimizers`. The only module of the package that imports lightning."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from lightning_optim.build.factory import OptimizerConfig, build_optimizer
from lightning_optim.build.roles import Override
from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.parallel import engines
from lightning_optim.core.rule import lookup
from lightning_optim.curvature import needs_curvature
from lightning_optim.schedule import SCHEDULES, ScheduleConfig, ScheduleLR

__all__ = ["SCHEDULES", "OptimizerConfig", "ScheduleLR", "configure_optimizers"]


def configure_optimizers(
    module: LightningModule,
    name: str,
    *,
    lr: float | None = None,
    recipe: str | None = None,
    preset: str | None = None,
    schedule: str | Mapping[str, Any] | None = None,
    weight_decay: float | None = None,
    rest: str | None = None,
    rest_lr: float | None = None,
    rest_settings: Mapping[str, Any] | None = None,
    lr_convention: str | None = None,
    overrides: Sequence[Override] = (),
    **settings: Any,
) -> dict[str, Any]:
    """Build what `LightningModule.configure_optimizers` returns.

    Write `return configure_optimizers(self, "muon", lr=3e-4, schedule="cosine")` there, for a warm-up
    `schedule={"schedule": "cosine", "warmup_steps": 100}`.

    Args:
        module: the module; all its trainable parameters are taken.
        name: of the main rule.
        lr: peak learning rate; with the default convention, AdamW's.
        recipe: name of published settings, the learning rate among them, but not the schedule.
        preset: name of a published pretraining stack, schedule and averages included; what is given here goes before.
        schedule: `"constant"`, the default, `"linear"`, `"cosine"` or `"power"`, or settings of
            `lightning_optim.schedule.ScheduleConfig`. The trainer knows `total_steps`.
        weight_decay: see `build_optimizer`, as are the following.
        rest: see `build_optimizer`.
        rest_lr: see `build_optimizer`.
        rest_settings: see `build_optimizer`.
        lr_convention: see `build_optimizer`.
        overrides: see `build_optimizer`.
        **settings: see `build_optimizer`.

    Returns:
        `{"optimizer": ..., "lr_scheduler": {...}}`, one optimizer with a schedule stepped every optimizer step.

    Raises:
        ValueError: an unknown schedule, a run of unknown length, `fused_backward` in a trainer that accumulates, clips
            or scales gradients, a strategy (FSDP1, DeepSpeed) that cannot run the rule, or what `ScheduleLR` and
            `build_optimizer` raise.
    """
    if schedule is not None:
        ScheduleConfig.of(schedule)
    check_strategy(module, name)
    if settings.get("fused_backward"):
        _refuse_what_needs_gradients(module)
    optimizer = build_optimizer(
        module,
        name,
        lr=lr,
        recipe=recipe,
        preset=preset,
        schedule=schedule,
        weight_decay=weight_decay,
        rest=rest,
        rest_lr=rest_lr,
        rest_settings=rest_settings,
        lr_convention=lr_convention,
        overrides=overrides,
        **settings,
    )
    _feed(module, optimizer)
    trainer = getattr(module, "_trainer", None)
    for kind in (ModuleOrder, RunStart):
        if trainer is not None and not any(isinstance(c, kind) for c in trainer.callbacks):
            trainer.callbacks.insert(0, kind())
    curve = optimizer.curve or ScheduleConfig()
    if curve.needs_total and curve.total_steps is None:
        _total_steps(module)  # raises where it is known that nobody will know
    scheduler = ScheduleLR(optimizer, curve, partial(_total_steps, module))
    if optimizer.averages is not None and trainer is not None:
        if not any(isinstance(c, AveragedWeights) for c in trainer.callbacks):
            trainer.callbacks.insert(0, AveragedWeights())
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class ModuleOrder(Callback):
    """Numbers parameters in the optimizers' state as the module does; `configure_optimizers` gives it to the trainer.

    Lightning's `ModelParallelStrategy` takes these numbers, in a checkpoint of one process or of DDP, for places in
    `module.parameters()`, while torch counts through the groups, of which a hybrid has several. Whoever else reads a
    checkpoint goes by the order of the groups, which stays.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the places in the module for the numbers.

        Args:
            trainer: the trainer.
            pl_module: its module.
            checkpoint: with the state of the optimizers.
        """
        places = {id(p): i for i, p in enumerate(pl_module.parameters())}
        for k, optimizer in enumerate(trainer.optimizers):
            saved = checkpoint["optimizer_states"][k]
            own = [places.get(id(p)) for group in optimizer.param_groups for p in group["params"]]
            numbers = [i for group in saved.get("param_groups", ()) for i in group["params"]]
            if None in own or len(own) != len(numbers) or any(isinstance(i, str) for i in numbers):
                continue  # not the module's own, or on a rank that does not save, where FSDP2 has names
            place = dict(zip(numbers, own, strict=True))
            checkpoint["optimizer_states"][k] = saved | {
                "state": {place.get(i, i): slots for i, slots in saved["state"].items()},
                "param_groups": [g | {"params": [place[i] for i in g["params"]]} for g in saved["param_groups"]],
            }


class RunStart(Callback):
    """Tells schedules of ours when the run starts; `configure_optimizers` gives it to the trainer.

    They are made earlier: a `BatchSizeFinder` or `LearningRateFinder` then changes how long the run is, or its rates.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Set the learning rates of the first step.

        Args:
            trainer: the trainer.
            pl_module: its module.

        Raises:
            ValueError: a schedule depends on the length of the run, which the trainer does not know.
        """
        for config in trainer.lr_scheduler_configs:
            if isinstance(config.scheduler, ScheduleLR):
                config.scheduler.begin()


class AveragedWeights(Callback):
    """Calls `eval()` and `train()` of wrapped optimizers; `configure_optimizers` gives it to the trainer.

    Validation, tests after a fit and checkpoints see the weights to evaluate; a resumed run has those to train, bit for
    bit. Under FSDP2, and with `save_weights_only=True` where no validation precedes, checkpoints hold those to train.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tell the length of the run, where a share of it is asked for; earlier the trainer's loader would suffer.

        Args:
            trainer: the trainer.
            pl_module: its module.

        Raises:
            ValueError: the trainer does not know it.
        """
        for optimizer in _wrapped(trainer):
            if optimizer.total_steps is None and optimizer.averages is not None and optimizer.averages.needs_total:
                optimizer.total_steps = _total_steps(pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Train.

        Args:
            trainer: the trainer.
            pl_module: its module.
            batch: any.
            batch_idx: any.
        """
        for optimizer in _wrapped(trainer):
            optimizer.train()
            if optimizer.averages is not None:  # accumulated gradients come before the closure of the step
                with torch.no_grad():
                    optimizer.averages.look_ahead(optimizer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate.

        Args:
            trainer: the trainer.
            pl_module: its module.
        """
        for optimizer in _wrapped(trainer):
            optimizer.eval()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Train on, where a checkpoint that follows could not hold both.

        Args:
            trainer: the trainer.
            pl_module: its module.
        """
        for optimizer in _wrapped(trainer):
            if optimizer.is_sharded():
                optimizer.train()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the weights to evaluate behind.

        Args:
            trainer: the trainer.
            pl_module: its module.
        """
        self.on_validation_start(trainer, pl_module)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Save the weights to evaluate; those to train are in the optimizer's state.

        Args:
            trainer: the trainer.
            pl_module: its module.
            checkpoint: with the weights to train, and the state that belongs to them.
        """
        stepped = [o for o in _wrapped(trainer) if o.state]  # before, both are the same, and finders go on
        if not stepped or any(optimizer.is_sharded() for optimizer in stepped):
            return
        for optimizer in stepped:
            optimizer.eval()
        checkpoint["state_dict"] = trainer.strategy.lightning_module_state_dict()
        checkpoint["optimizer_states"] = [trainer.strategy.optimizer_state(o) for o in trainer.optimizers]


def _wrapped(trainer: Trainer) -> list[RuleOptimizer]:
    return [o for o in trainer.optimizers if isinstance(o, RuleOptimizer) and o.averages is not None]


def check_strategy(module: LightningModule, name: str) -> None:
    """Check that the trainer's strategy can run a rule.

    FSDP1 has flattened the parameters when it asks for the optimizer, DeepSpeed is going to.

    Args:
        module: of the trainer; without one nothing is checked.
        name: of the main rule.

    Raises:
        ValueError: it cannot.
    """
    trainer = getattr(module, "_trainer", None)
    strategy = None if trainer is None else trainer.strategy
    if isinstance(strategy, FSDPStrategy):
        raise ValueError(
            f"{name}: strategy 'fsdp' is FSDP1, which hides matrices and their roles in flat parameters; use FSDP2 "
            "(ModelParallelStrategy with fully_shard in configure_model) or DDP"
        )
    if isinstance(strategy, DeepSpeedStrategy) and isinstance(strategy.config, Mapping):
        engines.check_deepspeed(strategy.config, [lookup(name)])


def _refuse_what_needs_gradients(module: LightningModule) -> None:
    """A fused backward pass leaves no gradients to accumulate, clip or unscale."""
    trainer = getattr(module, "_trainer", None)
    if trainer is None:
        return
    wrong = {
        "accumulate_grad_batches > 1 (gradients are used at once: raise the batch size)": (
            trainer.accumulate_grad_batches > 1
        ),
        "gradient_clip_val (give clip_norm to configure_optimizers)": bool(trainer.gradient_clip_val),
        "precision 16-mixed (its gradients are scaled: use bf16-mixed)": (
            getattr(trainer.precision_plugin, "scaler", None) is not None
        ),
    }
    for what, there in wrong.items():
        if there:
            raise ValueError(f"fused_backward does not work with {what}")


def _feed(module: LightningModule, optimizer: RuleOptimizer) -> None:
    """Have the trainer measure what the optimizer needs beside gradients."""
    trainer = getattr(module, "_trainer", None)
    if trainer is not None and needs_curvature(optimizer):
        from lightning_optim.callbacks import CurvatureCallback

        if not any(isinstance(callback, CurvatureCallback) for callback in trainer.callbacks):
            trainer.callbacks.insert(0, CurvatureCallback())


def _total_steps(module: LightningModule) -> int | None:
    # None before the loader is there: asked earlier, the trainer makes it, and never restores its position
    trainer = module.trainer
    endless = trainer.max_epochs == -1
    if not endless and trainer.train_dataloader is None:
        return None
    varied = next((c for c in trainer.callbacks if isinstance(c, GradientAccumulationScheduler)), None)  # pyright: ignore
    if endless or varied is None or math.isinf(trainer.num_training_batches):
        steps = trainer.estimated_stepping_batches
    else:  # the trainer itself takes the present accumulation for that of all epochs
        every = [varied.get_accumulate_grad_batches(epoch) for epoch in range(max(trainer.max_epochs or 1, 1))]
        steps = sum(math.ceil(trainer.num_training_batches / count) for count in every)
        steps = steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    if not 0 < steps < math.inf:
        raise ValueError("the trainer does not know how many steps it will take; give total_steps in schedule={...}")
    return int(steps)
