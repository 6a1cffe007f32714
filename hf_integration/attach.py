"""Our optimizers for trainers that take no such argument."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

from transformers import Trainer

from hf_integration.checkpoint import Consolidate, KeepSchedule
from hf_integration.curvature import add_curvature_callback
from hf_integration.factory import OptimizerFactory
from hf_integration.first_batch import first_batch
from hf_integration.settings import check_settings, with_flags
from lightning_optim.core.parallel import engines
from lightning_optim.core.rule import lookup

AnyTrainer = TypeVar("AnyTrainer", bound=Trainer)


def attach(trainer: AnyTrainer, name: str, *, lr: float | None = None, **settings: Any) -> AnyTrainer:
    """Have a trainer build one of our optimizers; DPO, GRPO and Seq2Seq trainers have no argument for it.

    attach(DPOTrainer(model, args=args, ...), "muon", rest_lr=1e-5).train()

    `args.optim` and `args.optim_args` are not used. `adam_beta1`, `adam_beta2` and `adam_epsilon` hold for every
    rule with Adam's betas or eps (AdamW, `adam_mini`, `galore`), unless `settings` say otherwise. The trainer's
    arguments are read whenever it builds the optimizer, so each trial of `hyperparameter_search` has its own; what is
    given here holds for all.

    Args:
        trainer: any subclass whose `create_optimizer` is the Trainer's.
        name: of the main rule.
        lr: learning rate, `args.learning_rate` if not given; with the default convention, AdamW's.
        **settings: of `build_optimizer`; `weight_decay` is `args.weight_decay` if not given.

    Returns:
        The trainer.

    Raises:
        ValueError: the trainer has an optimizer, or an engine (DeepSpeed, FSDP1) that cannot run the rule; an unknown
            name or bad value.
    """
    if trainer.optimizer is not None or trainer.optimizer_cls_and_kwargs is not None or trainer.state.global_step:
        raise ValueError(
            f"attach(trainer, {name!r}): the trainer already has an optimizer or has trained; "
            "attach to a new one, before train() and without optimizers= or optimizer_cls_and_kwargs="
        )
    engines.validate_engine([lookup(name)])
    arguments = settings if lr is None else settings | {"lr": lr}
    check_settings(name, arguments)
    with_flags(trainer.args, name, arguments)  # raises what the flags do not allow; they are read at building
    kwargs = {"name": name, "args": partial(getattr, trainer, "args"), "first_batch": partial(first_batch, trainer)}
    kwargs |= arguments
    trainer.optimizer_cls_and_kwargs = (OptimizerFactory, kwargs)  # pyright: ignore[reportAttributeAccessIssue]
    trainer.add_callback(KeepSchedule())
    trainer.add_callback(Consolidate())
    add_curvature_callback(trainer)
    return trainer
