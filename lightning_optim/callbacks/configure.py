"""`configure_optimizers`: from a LightningModule to the optimizer and the schedule that its trainer steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from lightning import LightningModule
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy

from lightning_optim.build.factory import build_optimizer
from lightning_optim.build.overrides import Override
from lightning_optim.callbacks.averaged_weights import AveragedWeights
from lightning_optim.callbacks.curvature import CurvatureCallback
from lightning_optim.callbacks.module_order import ModuleOrder
from lightning_optim.callbacks.run_length import RunStart, total_steps_of
from lightning_optim.callbacks.training_step import watch_steps
from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.parallel import engines
from lightning_optim.core.rule import lookup
from lightning_optim.curvature import needs_curvature
from lightning_optim.schedule import ScheduleConfig, ScheduleLR


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
        preset: name of a published pretraining stack, schedule and averages included; other arguments take precedence.
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
        _check_fused_backward(module)
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
    _add_curvature_callback(module, optimizer)
    trainer = getattr(module, "_trainer", None)
    for kind in (ModuleOrder, RunStart):
        if trainer is not None and not any(isinstance(c, kind) for c in trainer.callbacks):
            trainer.callbacks.insert(0, kind())
    curve = optimizer.curve or ScheduleConfig()
    if curve.needs_total and curve.total_steps is None:
        total_steps_of(module)  # raises if the trainer can never know it
    scheduler = ScheduleLR(optimizer, curve, partial(total_steps_of, module))
    if optimizer.averages is not None and trainer is not None:
        if not any(isinstance(c, AveragedWeights) for c in trainer.callbacks):
            trainer.callbacks.insert(0, AveragedWeights())
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


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


def _check_fused_backward(module: LightningModule) -> None:
    """Refuse settings that need gradients after the backward pass, where a fused one leaves none."""
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


def _add_curvature_callback(module: LightningModule, optimizer: RuleOptimizer) -> None:
    """Add the callback that measures curvature, if the optimizer needs it."""
    trainer = getattr(module, "_trainer", None)
    if trainer is not None and needs_curvature(optimizer):
        if not any(isinstance(callback, CurvatureCallback) for callback in trainer.callbacks):
            callback = CurvatureCallback()
            trainer.callbacks.insert(0, callback)
            watch_steps(trainer, callback)  # its setup is not going to be called
