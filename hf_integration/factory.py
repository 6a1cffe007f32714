"""The optimizer factory of the stock Trainer (Transformers >= 5.2)."""

from __future__ import annotations

from typing import Any

from torch import nn

from hf_integration.checkpoint import accept_adamw
from lightning_optim import Executor, build_optimizer


class OptimizerFactory:
    """Builds the optimizer inside the stock Trainer.

    Trainer(..., optimizer_cls_and_kwargs=(OptimizerFactory, {"name": "muon", "lr": 2e-5}))

    The Trainer calls `OptimizerFactory()(model, **kwargs)` once the model is placed; its own learning-rate and decay
    groups are not used, so the keyword arguments are those of `build_optimizer`. With `preset`, `schedule` or `wrap`
    give the Trainer `callbacks=[KeepSchedule()]`, too, which follows them; `attach` and `register` do.
    """

    def __call__(self, model: nn.Module, *, name: str, lr: float | None = None, **settings: Any) -> Executor:
        """Build the optimizer.

        Args:
            model: the Trainer's model.
            name: of the main rule.
            lr: learning rate; with the default convention, AdamW's. Needed unless a `recipe` is given.
            **settings: of `build_optimizer`.

        Returns:
            One optimizer for the whole model.
        """
        return create_optimizer(model, name, lr=lr, **settings)


def create_optimizer(model: nn.Module, name: str, *, lr: float | None = None, **settings: Any) -> Executor:
    """`build_optimizer` under the name PEFT users look for.

    Trainer(model, args, optimizers=(create_optimizer(model, "muon", lr=2e-5), None), ...)

    The model must be placed already, and the Trainer takes no finished optimizer under FSDP or with `model_init`:
    `OptimizerFactory` and `attach` work there, too. The Trainer's `--learning_rate` and `--weight_decay` are not used.

    Unlike `build_optimizer`'s, its `load_state_dict` also takes an `optimizer.pt` of the Trainer's or torch's AdamW:
    AdamW's moments go on where AdamW still owns the parameter.

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
    return optimizer
