"""Flags of Transformers' arguments that speak of some of a model's parameters."""

from __future__ import annotations

import glob
import logging
import re
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn
from transformers import TrainingArguments
from transformers.trainer_utils import check_target_module_exists

from hf_integration.settings import ADAM_FLAGS, adam_settings
from lightning_optim import RuleOptimizer
from lightning_optim.build.roles import Override, applicable_overrides
from lightning_optim.core.rule import hyperparameters, lookup

_log = logging.getLogger(__name__)


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
    """Refuse Adam's flags that no rule follows, and name the rules that do not follow a flag which others follow.

    Args:
        args: of the Trainer.
        optimizer: built for them.

    Raises:
        ValueError: a flag differs from its default, and no group has a rule with Adam's setting.
    """
    rules = list(dict.fromkeys(group["rule"] for group in optimizer.param_groups))
    for flag, key in ADAM_FLAGS.items():
        value = getattr(args, flag)
        if value == getattr(type(args), flag):
            continue
        followers = [rule for rule in rules if key in adam_settings(args, rule)]
        if not followers:
            raise ValueError(
                f"--{flag} {value} is for rules with Adam's {key}, of which there is none here (only "
                f"{', '.join(rules)}); leave it out, and give settings of these in optim_args or as arguments"
            )
        for rule in rules:
            own = hyperparameters(lookup(rule)).get(key)
            if own is not None and rule not in followers and _is_default(optimizer, rule, key, own):
                _log.warning(
                    "--%s %s holds for %s; %s keeps its own %s=%s: optim_args or arguments set it",
                    *(flag, value, ", ".join(followers), rule, key, own),
                )


def _is_default(optimizer: RuleOptimizer, rule: str, key: str, default: Any) -> bool:
    """Whether nobody has given another value."""
    return any(group["rule"] == rule and group[key] == default for group in optimizer.param_groups)
