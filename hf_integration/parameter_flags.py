"""Flags of Transformers' arguments that speak of some of a model's parameters."""

from __future__ import annotations

import glob
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import check_target_module_exists

from hf_integration.settings import ADAM
from lightning_optim import RuleOptimizer
from lightning_optim.build.roles import Override, applicable_overrides

ADAM_FLAGS = ("adam_beta1", "adam_beta2", "adam_epsilon")


def overrides_of_flags(
    model: nn.Module, args: TrainingArguments, first: Sequence[Override], rest: str
) -> list[Override]:
    """What `--optim_target_modules` and `learning_rate_mapping` say, as overrides of single parameters.

    Args:
        model: the Trainer's.
        args: of the Trainer; `learning_rate_mapping` is an argument of sentence-transformers: a learning rate for
            every parameter whose name a regular expression is found in, the last one that is.
        first: overrides that win over these.
        rest: rule of what is not in a target module.

    Returns:
        Overrides of those parameters that `first` leaves.

    Raises:
        ValueError: target modules that are none of the model's, or a regular expression that is found in no name.
    """
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    others = set(names) - _of_targets(model, args.optim_target_modules) if args.optim_target_modules else set()
    rates = _rates(names, getattr(args, "learning_rate_mapping", None) or {})
    more = [
        (glob.escape(name), rest if name in others else None, {"lr": rates[name]} if name in rates else {})
        for name in names
        if name in others or name in rates
    ]
    return applicable_overrides(model, first, more)


def _of_targets(model: nn.Module, targets: str | list[str]) -> set[str]:
    """Names of the weights of target modules, as Transformers reads them for GaLore and APOLLO."""
    every_linear = isinstance(targets, str) and targets.replace("_", "-") == "all-linear"
    weights = set()
    for name, module in model.named_modules():
        by_name = bool(check_target_module_exists(targets, name)) and not every_linear
        weight = getattr(module, "weight", None)
        is_matrix = isinstance(weight, nn.Parameter) and weight.ndim > 1
        if is_matrix and (by_name or (every_linear and isinstance(module, nn.Linear))):
            weights.add(f"{name}.weight")
    if not weights:
        raise ValueError(f"optim_target_modules {targets!r} names no module of the model that has a weight matrix")
    return weights


def _rates(names: Sequence[str], mapping: Mapping[str, float]) -> dict[str, float]:
    rates: dict[str, float] = {}
    for pattern, rate in mapping.items():
        found = [name for name in names if re.search(pattern, name)]
        if not found:
            raise ValueError(f"learning_rate_mapping: {pattern!r} is found in no name of a parameter that is trained")
        rates |= dict.fromkeys(found, rate)
    return rates


def check_adam_flags(args: TrainingArguments, optimizer: RuleOptimizer) -> None:
    """Refuse Adam's flags where nothing is updated by AdamW or Adam.

    Args:
        args: of the Trainer.
        optimizer: built for them.

    Raises:
        ValueError: a flag differs from its default, and no group follows it.
    """
    default = {f.name: f.default for f in fields(type(args))}
    changed = [name for name in ADAM_FLAGS if getattr(args, name) != default[name]]
    rules = dict.fromkeys(group["rule"] for group in optimizer.param_groups)
    if changed and not rules.keys() & set(ADAM):
        raise ValueError(
            f"--{changed[0]} {getattr(args, changed[0])} is for what AdamW or Adam updates, which is nothing here "
            f"(only {', '.join(rules)}); leave it out, and give settings of these in optim_args or as arguments"
        )
