"""`TrainingArguments` whose `--optim` also takes the names of lightning_optim."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import transformers
from transformers.training_args import OptimizerNames

from hf_integration.factory import OptimizerFactory
from hf_integration.settings import settings_of_flag, with_flags
from hf_integration.startup.optimizer_names import PREFIX
from lightning_optim.core.parallel import engines
from lightning_optim.core.rule import REGISTRY, lookup, nearest

THEIRS = ("lomo", "adalomo")
"""Names under which the Trainer calls another backward pass, of the package lomo-optim. `args.optim` then has the
prefix; it may be given with any of our names."""


@dataclass
class TrainingArguments(transformers.TrainingArguments):
    """Transformers' arguments with our optimizers under `--optim`.

    trainer = Trainer(model, args, optimizer_cls_and_kwargs=args.optimizer_cls_and_kwargs(), ...)

    Any other name is Transformers' own and runs as ever. Where both have a name (`sgd`, `adafactor`), it is ours.
    `--optim_args "momentum=0.9, nesterov=False"` sets arguments of `build_optimizer`, in the form that
    `lightning_optim.settings.parse_settings` documents, and `--adam_beta1`, `--adam_beta2` and `--adam_epsilon` hold
    for every rule with Adam's betas or eps (AdamW, `adam_mini`, `galore`). With `--optim_target_modules` our rule gets
    the weights of these modules only.
    """

    optim: str = field(default="adamw", metadata={"help": "Name of an optimizer of lightning_optim or Transformers."})
    rest_optim: str = field(default="adamw", metadata={"help": "Rule of the parameters the optimizer does not take."})
    rest_learning_rate: float | None = field(default=None, metadata={"help": "Its learning rate; default: the same."})
    lr_convention: Literal["adamw", "native"] = field(
        default="adamw",
        metadata={"help": "adamw: --learning_rate is AdamW's, whatever the optimizer; native: the published scale."},
    )

    def __post_init__(self) -> None:
        """Check our names, and let Transformers check the rest.

        Raises:
            ValueError: nobody knows the name; the nearest ones are given.
        """
        theirs = [name.value for name in OptimizerNames]
        name = self.optim.value if isinstance(self.optim, OptimizerNames) else self.optim
        name = name.removeprefix(PREFIX)
        if name not in REGISTRY and name not in theirs:
            raise ValueError(f"unknown optimizer {name!r}; {nearest(name, [*REGISTRY, *theirs])}")
        lookup(self.rest_optim)
        if name in REGISTRY:
            settings_of_flag(self.optim_args)
            self.optim = OptimizerNames.ADAMW_TORCH  # the parent takes its own names only
        super().__post_init__()
        if name in REGISTRY:
            self.optim = PREFIX + name if name in THEIRS else name

    def optimizer_cls_and_kwargs(self) -> tuple[type, dict[str, Any]] | None:
        """The Trainer's argument of the same name.

        Returns:
            The factory and its arguments, or None for an optimizer of Transformers' own. The factory reads these
            arguments when the Trainer builds the optimizer, so changes until then count, those of
            `Trainer.hyperparameter_search` among them. Arguments of `build_optimizer` may be added to the dictionary.
        """
        if self.optim.removeprefix(PREFIX) not in REGISTRY:
            return None
        self.optimizer_settings()  # raises here, before there is a model, what can be known here
        return OptimizerFactory, FactoryArguments(args=self)

    def optimizer_settings(self, settings: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What the flags say of the optimizer now.

        Args:
            settings: arguments of `build_optimizer` that win over the flags.

        Returns:
            Its name, and arguments of `build_optimizer`.

        Raises:
            ValueError: the optimizer is not one of ours, bad settings, or a DeepSpeed configuration that cannot run the
                optimizer.
        """
        name = self.optim.removeprefix(PREFIX)
        if name not in REGISTRY:
            raise ValueError(
                f"optim was changed to {self.optim!r}, which is not an optimizer of lightning_optim; for one of "
                "Transformers' own make a new Trainer, without optimizer_cls_and_kwargs"
            )
        flags = {"rest": self.rest_optim, "rest_lr": self.rest_learning_rate, "lr_convention": self.lr_convention}
        engines.validate_engine([lookup(name)])
        chosen = settings_of_flag(self.optim_args) | dict(settings or {})
        if chosen.get("recipe") or chosen.get("preset"):  # what is not set by a flag is the recipe's
            flags = {k: v for k, v in flags.items() if v not in (None, "adamw")}
        return with_flags(self, name, flags | chosen)


class FactoryArguments(dict[str, Any]):
    """Arguments of the factory: `args`, what the user adds, and, to be read, what the flags now say."""

    def __missing__(self, key: str) -> Any:
        """Read a setting from the flags."""
        return self["args"].optimizer_settings()[key]
