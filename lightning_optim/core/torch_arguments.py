"""Arguments of torch's own optimizers, which code that is changed to one of ours may still give."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

import torch

from lightning_optim.core.rule import Rule, hyperparameters

GENERIC: dict[str, Any] = {
    "maximize": False,
    "foreach": None,
    "fused": None,
    "capturable": False,
    "differentiable": False,
}
"""Arguments of every optimizer of torch, with their defaults. `foreach` and `fused` choose among implementations of one
result; ours is chosen by what a parameter is, so they change nothing."""

_REMEDIES = {
    "maximize": "call backward on the negative of the objective",
    "capturable": "capture the forward and the backward pass in a CUDA graph, and step outside of it",
    "differentiable": "torch.optim has optimizers that can be differentiated through",
}


@functools.cache
def torch_arguments(rule: type[Rule]) -> Mapping[str, Any]:
    """Arguments that torch's optimizer of a rule's name has and the rule has not.

    Args:
        rule: a rule class.

    Returns:
        Defaults by name, those of every optimizer of torch first.
    """
    theirs = getattr(torch.optim, rule.__name__, None)
    parameters = inspect.signature(theirs).parameters if theirs is not None else {}
    own = hyperparameters(rule)
    return GENERIC | {
        k: p.default for k, p in parameters.items() if k not in own and k != "params" and k not in GENERIC
    }


def accept_torch_arguments(rule: type[Rule], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Replace arguments of torch's optimizers by settings of a rule.

    Args:
        rule: rule of the settings.
        settings: a param group or arguments of an optimizer class.

    Returns:
        The settings without arguments of torch's: those with a counterpart are translated as in a checkpoint of torch's
        optimizer, those that do not change a result are dropped.

    Raises:
        ValueError: an argument that would change the result and that no rule honors.
    """
    theirs = torch_arguments(rule)
    given = {k: v for k, v in settings.items() if k in theirs}
    for key, remedy in _REMEDIES.items():
        if given.get(key):
            raise ValueError(f"{rule.name}: {key}={given[key]!r} is not supported; {remedy}")
    changed = {k for k, v in given.items() if k not in GENERIC and v != theirs[k]}
    translated = rule.translate(dict(settings)) if changed else settings
    return {k: v for k, v in translated.items() if k not in theirs}
