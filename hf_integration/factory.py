"""The optimizer factory of the stock Trainer (Transformers >= 5.2)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import nn
from transformers import TrainingArguments

from hf_integration.batches import current_trainer
from hf_integration.checkpoint import accept_adamw
from hf_integration.curvature import add_curvature_callback
from hf_integration.first_batch import describes_inputs
from hf_integration.parameter_flags import check_adam_flags, overrides_of_flags
from hf_integration.settings import with_flags
from lightning_optim import RuleOptimizer, build_optimizer
from lightning_optim.curvature import needs_curvature


class OptimizerFactory:
    """Builds the optimizer inside the stock Trainer.

    Trainer(..., optimizer_cls_and_kwargs=(OptimizerFactory, {"name": "muon", "lr": 2e-5}))
    Trainer(model, args, optimizer_cls_and_kwargs=(OptimizerFactory, {"name": "muon", "args": args}))

    The Trainer calls `OptimizerFactory()(model, **kwargs)` once the model is placed; its own learning-rate and decay
    groups are not used, so the keyword arguments are those of `build_optimizer`. With `args`, what they do not set is
    read from the Trainer's arguments at that moment, so `Trainer.hyperparameter_search` reaches the optimizer. With
    `preset`, `schedule` or `averaging` give the Trainer `callbacks=[KeepSchedule()]`, too, which follows them; `attach`
    and `register` do.
    """

    def __call__(
        self,
        model: nn.Module,
        *,
        name: str | None = None,
        lr: float | None = None,
        args: TrainingArguments | Callable[[], TrainingArguments] | None = None,
        first_batch: Callable[[], Any] | None = None,
        **settings: Any,
    ) -> RuleOptimizer:
        """Build the optimizer.

        Args:
            model: the Trainer's model.
            name: of the main rule; the name in `args` if not given, where those are our `TrainingArguments`.
            lr: learning rate; with the default convention, AdamW's. Needed unless `args` or a `recipe` is given.
            args: of the Trainer, or what returns them; `--learning_rate`, `--weight_decay` and the `--adam_*` flags
                hold where `lr` and `settings` do not say otherwise.
            first_batch: gives `example_inputs` for a model that describes none, where `settings` have none.
            **settings: of `build_optimizer`.

        Returns:
            One optimizer for the whole model.

        Raises:
            ValueError: no name, a flag that nothing follows, weights of a loss, or what `build_optimizer` raises.
        """
        _refuse_weights_elsewhere(model, settings.pop("optimizer_dict", ()))
        arguments = settings if lr is None else settings | {"lr": lr}
        flags = args() if callable(args) else args
        of_flags = getattr(flags, "optimizer_settings", None)
        if name is None and of_flags is None:
            raise ValueError("OptimizerFactory needs the name of an optimizer: {'name': 'muon', ...}")
        if name is None:
            arguments = of_flags(arguments)  # pyright: ignore[reportOptionalCall]
        else:
            arguments = {"name": name, **arguments} if flags is None else with_flags(flags, name, arguments)
        if flags is not None:
            own = arguments.get("overrides") or ()
            arguments = {
                **arguments,
                "overrides": [*own, *overrides_of_flags(model, flags, own, arguments.get("rest", "adamw"))],
            }
        if first_batch is not None and arguments.get("example_inputs") is None and not describes_inputs(model):
            arguments = {**arguments, "example_inputs": first_batch()}
        optimizer = create_optimizer(model, **arguments)
        if flags is not None:
            check_adam_flags(flags, optimizer)
        _measure_curvature(optimizer)
        return optimizer


def _refuse_weights_elsewhere(model: nn.Module, groups: Iterable[Mapping[str, Any]]) -> None:
    """Refuse groups of sentence-transformers with weights that the model lacks; others are the model's own."""
    known = {id(p) for p in model.parameters()}
    if any(id(p) not in known for group in groups for p in group["params"]):
        raise ValueError(
            "the loss has weights of its own, which would not be trained; give the Trainer "
            "optimizers=(create_optimizer(loss, name, lr=...), None)"
        )


def create_optimizer(model: nn.Module, name: str, *, lr: float | None = None, **settings: Any) -> RuleOptimizer:
    """`build_optimizer` under the name PEFT users look for.

    Trainer(model, args, optimizers=(create_optimizer(model, "muon", lr=2e-5), None), ...)

    The model must be placed already, and the Trainer takes no finished optimizer under FSDP or with `model_init`:
    `OptimizerFactory` and `attach` work there, too. The Trainer's `--learning_rate` and `--weight_decay` are not used.
    What a rule needs beside gradients is measured as under `attach`.

    Unlike `build_optimizer`'s, its `load_state_dict` also takes an `optimizer.pt` of the Trainer's or torch's AdamW:
    AdamW's moments are kept where AdamW still owns the parameter.

    Args:
        model: any module, adapters included; its trainable parameters are taken.
        name: of the main rule.
        lr: learning rate; with the default convention, AdamW's. Needed unless a `recipe` is given.
        **settings: of `build_optimizer`.

    Returns:
        One optimizer for the whole model.
    """
    optimizer = build_optimizer(model, name, lr=lr, **settings)
    accept_adamw(optimizer, model)
    optimizer.register_state_dict_pre_hook(_measure_curvature)  # accelerate reads the state as it prepares an optimizer
    return optimizer


def _measure_curvature(optimizer: Any) -> None:
    """Have the trainer whose event is under way, if there is one, measure the curvature that an optimizer needs."""
    trainer = current_trainer()
    if trainer is not None and needs_curvature(optimizer):
        add_curvature_callback(trainer)
