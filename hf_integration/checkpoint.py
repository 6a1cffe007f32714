"""Which of a Trainer's checkpoints a run can continue from, those of Transformers' own AdamW among them."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, cast
from weakref import WeakKeyDictionary

from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import Trainer, TrainerCallback

from hf_integration.settings import ADAM
from hf_integration.startup.optimizer_names import MEMBER_PREFIX, PREFIX
from lightning_optim import RuleOptimizer, lookup
from lightning_optim.core.parallel import engines
from lightning_optim.schedule import ScheduleConfig

_log = logging.getLogger(__name__)

MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
"""Slots of `torch.optim.AdamW`, the last with `amsgrad` only."""

_BEFORE_ADAMW: WeakKeyDictionary[RuleOptimizer, list[float]] = WeakKeyDictionary()
"""Learning rates of the groups before a checkpoint of AdamW was loaded."""


def last_checkpoint(folder: str | Path, *, before: int | None = None) -> str | None:
    """The newest complete checkpoint.

    The Trainer writes `trainer_state.json` last, so a directory where it is missing or cut short was left by a run that
    stopped while it was saving. Transformers' own `get_last_checkpoint` would take it.

    Args:
        folder: the Trainer's `output_dir`; need not exist.
        before: only of steps below this one. Give `max_steps` if there is one: from a checkpoint of the very last step
            the Trainer goes one step too far, unless an epoch ends there.

    Returns:
        Path of the checkpoint with the largest step, None if there is none.
    """
    folders = {
        int(m[1]): path for path in Path(folder).glob("*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    }
    steps = sorted((step for step in folders if before is None or step < before), reverse=True)
    return next((str(folders[step]) for step in steps if _complete(folders[step])), None)


def _complete(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_bytes()))
    except (OSError, ValueError):
        return False


class KeepSchedule(TrainerCallback):
    """Lets the schedule and the weights follow our optimizer, where it has a say in them.

    Trainer(..., optimizer_cls_and_kwargs=(OptimizerFactory, ...), callbacks=[KeepSchedule()]).train(checkpoint)

    * The schedule of a checkpoint of Transformers' AdamW, which has two groups, is fitted to the groups of our
      optimizer, which takes AdamW's `optimizer.pt` by itself; this is for `scheduler.pt`.
    * An optimizer built with `schedule=` or a preset follows that, whatever `--lr_scheduler_type` says.
    * Parameters that are unfrozen while it trains, and that the optimizer therefore lacks, are named in a warning.
    * A wrapped optimizer shows the averaged weights to what is saved, and at the end of the run; a resumed run has
      those to train, bit for bit. (The Trainer itself does so for evaluations.) Under FSDP2 checkpoints have those to
      train.

    `attach` and `register` add it. Where nothing of this is asked for, it changes nothing.
    """

    def __init__(self) -> None:
        self._warned = False

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Give every group its own learning rate at the schedule's present place.

        Raises:
            ValueError: the optimizer has a schedule, and the Trainer one that cannot follow it; or `--optim` has one of
                our names, and DeepSpeed's configuration an optimizer, which the Trainer took instead.
        """
        scheduler, optimizer = kwargs["lr_scheduler"], _ours(kwargs["optimizer"])
        if optimizer is None and getattr(args.optim, "name", "").startswith(MEMBER_PREFIX):
            engines.validate_engine([lookup(args.optim.value.removeprefix(PREFIX))])
        groups = kwargs["optimizer"].param_groups
        if isinstance(scheduler, LambdaLR) and all("rule" in group for group in groups):
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
            scheduler._last_lr = [group["lr"] for group in groups]
        elif optimizer is not None and optimizer in _BEFORE_ADAMW:
            _continue_from_adamw(scheduler, groups, _BEFORE_ADAMW.pop(optimizer))
        if optimizer is not None:
            optimizer.total_steps = state.max_steps
        if optimizer is not None and optimizer.curve is not None:
            if not isinstance(scheduler, LambdaLR):
                raise ValueError(
                    f"the optimizer has a schedule of its own, which {type(scheduler).__name__} cannot follow; choose "
                    "--lr_scheduler_type constant, say"
                )
            scheduler.lr_lambdas = [partial(self._factor, optimizer, i, state) for i in range(len(groups))]
            for i, group in enumerate(groups):
                group["lr"] = scheduler.base_lrs[i] * self._factor(optimizer, i, state, state.global_step)
            scheduler._last_lr = [group["lr"] for group in groups]

    @staticmethod
    def _factor(optimizer: RuleOptimizer, i: int, state: Any, step: int) -> float:
        curve = cast("ScheduleConfig", optimizer.curve)
        return curve.factor(step, lambda: curve.total_steps or state.max_steps, optimizer.param_groups[i])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the momentum of the step."""
        optimizer = _ours(kwargs["optimizer"])
        if optimizer is not None and optimizer.curve is not None:
            optimizer.curve.move_momentum(optimizer, state.global_step, state.max_steps)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Name parameters that have a gradient and are in no group."""
        optimizer, model = _ours(kwargs["optimizer"]), kwargs["model"]
        if optimizer is None or self._warned:
            return
        owned = {id(p) for group in optimizer.param_groups for p in group["params"]}
        trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad and p.grad is not None]
        missing = [name for name, p in trained if id(p) not in owned]
        if missing and len(missing) < len(trained):  # DeepSpeed has replaced all
            self._warned = True
            _log.warning(
                "%s parameters have gradients and are not in the optimizer, as they were frozen when it was built: %s; "
                "unfreeze them before train(), or call optimizer.add_param_group({'params': ...}) afterwards",
                len(missing),
                ", ".join(missing[:6]) + ("" if len(missing) <= 6 else ", ..."),
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show what is to be saved."""
        optimizer = _ours(kwargs["optimizer"])
        if optimizer is not None and control.should_save and not optimizer.is_sharded():
            optimizer.eval()

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Train on, where a checkpoint that follows could not hold both kinds of weights (FSDP2)."""
        optimizer = _ours(kwargs["optimizer"])
        if optimizer is not None and optimizer.is_sharded():
            optimizer.train()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Show what is to be saved."""
        self.on_step_end(args, state, control, **kwargs)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the averaged weights behind, but for those that `load_best_model_at_end` has just loaded."""
        optimizer = _ours(kwargs["optimizer"])
        if optimizer is None:
            return
        if not args.load_best_model_at_end or state.best_model_checkpoint is None:
            optimizer.eval()
        elif optimizer.averages is not None:  # evaluations to come are of what was loaded
            optimizer.averages.replaced(optimizer)


def _continue_from_adamw(scheduler: Any, groups: Sequence[dict[str, Any]], before: Sequence[float]) -> None:
    """Let a schedule that follows a metric (`reduce_lr_on_plateau`, `greedy`) go on from a checkpoint of AdamW.

    That has left it one of each bound and rate for each of its own groups, all the same. Its rate is the present one of
    the first group here, and the others keep the ratio that they had to it before.
    """
    rates = [scheduler._last_lr[0] * lr / before[0] for lr in before]
    for group, lr in zip(groups, rates, strict=True):
        group["lr"] = lr
    for name, values in (("_last_lr", rates), ("_init_lrs", list(before))):
        if hasattr(scheduler, name):
            setattr(scheduler, name, values)
    for name in ("min_lrs", "max_lrs"):
        if hasattr(scheduler, name):
            setattr(scheduler, name, [getattr(scheduler, name)[0]] * len(groups))


def _ours(optimizer: Any) -> RuleOptimizer | None:
    """Our optimizer, out of what accelerate wraps it in."""
    while not isinstance(optimizer, RuleOptimizer) and hasattr(
        optimizer, "optimizer"
    ):  # of accelerate, and of DeepSpeed
        optimizer = optimizer.optimizer
    return optimizer if isinstance(optimizer, RuleOptimizer) else None


class Consolidate(TrainerCallback):
    """Before a checkpoint, collects state that ranks share out (`shard_work=True`): the Trainer saves on one of them.

    `attach` and `register` add it. Without shared work it does nothing.
    """

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collect if this step ends with a checkpoint."""
        optimizer = _ours(kwargs["optimizer"])
        if control.should_save and optimizer is not None:
            optimizer.consolidate()

    on_epoch_end = on_step_end

    def on_evaluate(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Collect if the Trainer may find these weights the best, and save them, after this call."""
        optimizer = _ours(kwargs["optimizer"])
        if optimizer is not None and args.save_strategy == "best":
            optimizer.consolidate()


def accept_adamw(optimizer: RuleOptimizer, model: nn.Module) -> None:
    """Let `optimizer.load_state_dict` take what `torch.optim.AdamW` saved.

    AdamW's groups may be the Trainer's (decayed and not decayed), or one of all trainable parameters in the model's
    order, or have names. Parameters that AdamW or Adam owns here, too, keep its moments; every other rule starts
    from zero. Settings stay those of `optimizer`; learning rates are where the checkpoint's schedule was.

    Args:
        optimizer: of `build_optimizer`.
        model: it was built for.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    decayed = set(Trainer.get_decay_parameter_names(cast("Trainer", None), model))
    split = [[n for n in names if n in decayed], [n for n in names if n not in decayed]]

    def translated(optimizer: Any, saved: dict[str, Any]) -> dict[str, Any] | None:
        groups = saved["param_groups"]
        if not groups or any("rule" in group or "betas" not in group for group in groups):
            return None
        _BEFORE_ADAMW[optimizer] = [group["lr"] for group in optimizer.param_groups]
        return _translated(optimizer, saved, _named(groups, [names] if len(groups) == 1 else split))

    optimizer.register_load_state_dict_pre_hook(translated)


def _named(groups: Sequence[Mapping[str, Any]], expected: Sequence[Sequence[str]]) -> dict[str, Any]:
    """Parameter names and the numbers they were saved under."""
    named = all("param_names" in group for group in groups)
    layout = [group["param_names"] for group in groups] if named else expected
    saved, here = [len(group["params"]) for group in groups], [len(names) for names in layout]
    if saved != here:
        raise ValueError(
            f"the checkpoint's AdamW has groups of {saved} parameters, for this model they would be {here}; "
            "is it another model's, or were others of its parameters trained?"
        )
    return dict(zip(chain(*layout), chain(*(group["params"] for group in groups)), strict=True))


def _translated(optimizer: RuleOptimizer, saved: Mapping[str, Any], numbers: Mapping[str, Any]) -> dict[str, Any]:
    """A state dict as `optimizer` would have saved it."""
    for group in saved["param_groups"]:
        lookup("adamw").translate(dict(group))  # refuses what would change the run
    unknown = {key for slots in saved["state"].values() for key in slots} - {"step", *MOMENTS}
    if unknown:
        raise ValueError(f"the checkpoint's optimizer is not torch's AdamW: it has {', '.join(sorted(unknown))}")
    first = saved["param_groups"][0]
    factor = first["lr"] / first["initial_lr"] if first.get("initial_lr") else 1.0
    groups: list[dict[str, Any]] = []
    state: dict[int, Any] = {}
    for group in optimizer.param_groups:
        start = sum(len(g["params"]) for g in groups)
        settings = {k: v for k, v in group.items() if k != "params"}
        settings |= {"lr": settings["initial_lr"] * factor} if "initial_lr" in settings else {}
        groups.append({**settings, "params": list(range(start, start + len(group["params"])))})
        if group["rule"] in ADAM:
            keys = ("step", *MOMENTS[: 3 if group["amsgrad"] else 2])
            for i, name in zip(groups[-1]["params"], group["param_names"], strict=True):
                slots = saved["state"].get(numbers.get(name), {})
                state |= {i: {k: v for k, v in slots.items() if k in keys}} if slots else {}
    again = sorted({group["rule"] for group in groups} - set(ADAM))
    fresh = f"; {', '.join(again)} starts from scratch" if again else ""
    _log.warning("from AdamW's checkpoint: moments of %s of %s parameters%s", len(state), len(numbers), fresh)
    return {**saved, "state": state, "param_groups": groups}
