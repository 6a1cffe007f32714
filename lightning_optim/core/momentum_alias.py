"""Aliases of a group's momentum, since torch's schedules and Lightning's monitor use one name for all groups."""

from __future__ import annotations

import functools
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_optim.core.rule import Rule, hyperparameters, lookup


class ParamGroup(dict[str, Any]):
    """A param group with aliases for what trainers and schedules look for in torch's.

    `group["name"]` is the rule where nobody gave a name to the only group: like torch's, it then has no key `name`, and
    monitors call its learning rate `lr-AdamW`.

    `OneCycleLR` and `CyclicLR` write `momentum`, or the first of `betas`, into every group. In a group whose rule has
    the other setting, that one is read and written instead. A rule without momentum reads as 0 and ignores writes. The
    alias is never stored, so checkpoints hold the rule's own settings only.
    """

    def __setitem__(self, key: str, value: Any) -> None:
        """Write a setting, or the momentum by its alias."""
        if key in MOMENTUM_NAMES and "rule" in self and is_other_name(lookup(self["rule"]), key, value):
            set_momentum(self, value[0] if isinstance(value, (tuple, list)) else value)
        else:
            super().__setitem__(key, value)

    def __missing__(self, key: str) -> Any:
        """Read the momentum by its alias, or the name that a group has while it is the only one."""
        if key == "name" and "rule" in self:
            return self["rule"]
        if key in MOMENTUM_NAMES and "rule" in self and is_other_name(lookup(self["rule"]), key):
            momentum = momentum_of(self) or 0.0
            return (momentum,) if key == "betas" else momentum
        raise KeyError(key)


MOMENTUM_NAMES = ("momentum", "betas")
"""Settings in which torch's schedules and Lightning's monitor look for a momentum."""


@functools.cache
def momentum_field(rule: type[Rule]) -> str | None:
    """The hyperparameter of a rule that is its momentum.

    Args:
        rule: a rule class.

    Returns:
        `"momentum"`, else `"betas"` (the momentum is the first), else `"beta1"`; None for a rule without momentum.
    """
    defaults = hyperparameters(rule)  # the `momentum` of COSMOS is a word
    return next((k for k in (*MOMENTUM_NAMES, "beta1") if k in defaults and not isinstance(defaults[k], str)), None)


def momentum_of(group: Mapping[str, Any]) -> float | None:
    """The momentum of a group.

    Args:
        group: a param group of an optimizer.

    Returns:
        Its value; None where the rule has none under the settings of the group.
    """
    field = momentum_field(lookup(group["rule"]))
    value = None if field is None else group[field]
    return value[0] if isinstance(value, (tuple, list)) else value


def set_momentum(group: dict[str, Any], value: float) -> None:
    """Set the momentum of a group, if it has one.

    Args:
        group: a param group of an optimizer.
        value: the momentum.
    """
    field = momentum_field(lookup(group["rule"]))
    if field is not None and momentum_of(group) is not None:
        group[field] = (value, *group[field][1:]) if field == "betas" else value


def momentum_names(groups: Sequence[Mapping[str, Any]]) -> str | None:
    """The name by which a schedule or a monitor can access the momentum of every group.

    Args:
        groups: param groups of an optimizer.

    Returns:
        `"momentum"` or `"betas"`; None where no group has a momentum.
    """
    rules = [lookup(group["rule"]) for group in groups if momentum_of(group) is not None]
    if not rules:
        return None
    any_has_both = any(momentum_field(rule) == "momentum" and "betas" in hyperparameters(rule) for rule in rules)
    return "momentum" if any_has_both or all(momentum_field(rule) == "momentum" for rule in rules) else "betas"


def is_other_name(rule: type[Rule], key: str, value: Any = None) -> bool:
    """Whether a name is an alias for a rule: it has no such setting, or (COSMOS) one of another meaning."""
    defaults = hyperparameters(rule)
    return key not in defaults or (isinstance(defaults[key], str) and isinstance(value, numbers.Real))


def publish_momentum(defaults: dict[str, Any], groups: Sequence[Mapping[str, Any]]) -> None:
    """Add to an optimizer's `defaults` the names by which schedules and monitors look for a momentum.

    Args:
        defaults: defaults of the optimizer, extended in place.
        groups: param groups of the optimizer.
    """
    rule = lookup(defaults.get("rule", groups[0]["rule"]))
    settings = hyperparameters(rule)
    for key in (momentum_field(rule), momentum_names(groups)):
        if key in MOMENTUM_NAMES:
            defaults.setdefault(key, settings[key] if key in settings else groups[0][key])
