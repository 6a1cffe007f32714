"""One name for the momentum of every group, under which torch's schedules and Lightning's monitor look for it."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_optim.core.rule import Rule, hyperparameters, lookup


class ParamGroup(dict[str, Any]):
    """A param group that answers to both names of a momentum, as torch's schedules use one name for all groups.

    `OneCycleLR` and `CyclicLR` write `momentum`, or the first of `betas`, into every group. In a group whose rule has
    the other one, that one is set, and read, instead; a rule without momentum shows 0 and ignores what is written. The
    other name is never stored, so checkpoints hold the rule's own settings only.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        """Set a setting, or the momentum under its other name."""
        if key in MOMENTUM_NAMES and "rule" in self and is_other_name(lookup(self["rule"]), key, value):
            set_momentum(self, value[0] if isinstance(value, (tuple, list)) else value)
        else:
            super().__setitem__(key, value)

    def __missing__(self, key: str) -> Any:
        """Read the momentum under its other name."""
        if key in MOMENTUM_NAMES and "rule" in self and is_other_name(lookup(self["rule"]), key):
            now = momentum_of(self) or 0.0
            return (now,) if key == "betas" else now
        raise KeyError(key)


MOMENTUM_NAMES = ("momentum", "betas")
"""Where torch's schedules and Lightning's monitor look for a momentum."""


@functools.cache
def momentum_field(rule: type[Rule]) -> str | None:
    """The hyperparameter of a rule that is its momentum.

    Args:
        rule: any.

    Returns:
        `"momentum"`, else `"betas"`, whose first one it is, else `"beta1"`; None for a rule without.
    """
    known = hyperparameters(rule)  # the `momentum` of COSMOS is a word
    return next((k for k in (*MOMENTUM_NAMES, "beta1") if k in known and not isinstance(known[k], str)), None)


def momentum_of(group: Mapping[str, Any]) -> float | None:
    """The momentum of a group.

    Args:
        group: of an optimizer.

    Returns:
        Its value; None where the rule, as it is set, has none.
    """
    field = momentum_field(lookup(group["rule"]))
    value = None if field is None else group[field]
    return value[0] if isinstance(value, (tuple, list)) else value


def set_momentum(group: dict[str, Any], value: float) -> None:
    """Set the momentum of a group; nothing where it has none.

    Args:
        group: of an optimizer.
        value: of the momentum.
    """
    field = momentum_field(lookup(group["rule"]))
    if field is not None and momentum_of(group) is not None:
        group[field] = (value, *group[field][1:]) if field == "betas" else value


def momentum_names(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """The name under which one schedule reaches the momentum of every group, and one monitor reads it.

    Args:
        groups: of an optimizer.

    Returns:
        `"momentum"` or `"betas"`; None where no group has a momentum.
    """
    rules = [lookup(group["rule"]) for group in groups if momentum_of(group) is not None]
    if not rules:
        return None
    both = any(momentum_field(rule) == "momentum" and "betas" in hyperparameters(rule) for rule in rules)
    return "momentum" if both or all(momentum_field(rule) == "momentum" for rule in rules) else "betas"


def is_other_name(rule: type[Rule], key: str, value: Any = None) -> bool:
    """Whether a rule has no setting of this name, or (COSMOS) one of another meaning than the value's."""
    known = hyperparameters(rule)
    return key not in known or (isinstance(known[key], str) and isinstance(value, numbers.Real))


def publish_momentum(defaults: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Keep in an optimizer's `defaults` the names under which schedules and monitors look for a momentum.

    Args:
        defaults: of the optimizer, extended.
        groups: of the optimizer.
    """
    rule = lookup(defaults.get("rule", groups[0]["rule"]))
    settings = hyperparameters(rule)
    for key in (momentum_field(rule), momentum_names(groups)):
        if key in MOMENTUM_NAMES:
            defaults.setdefault(key, settings[key] if key in settings else groups[0][key])
