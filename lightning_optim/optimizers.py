"""One `torch.optim.Optimizer` class per rule, generated from its fields: `AdamW(params, lr=1e-3, ...)`.

`optimizers.pyi` spells the signatures out for editors and type checkers; `python -m lightning_optim.docs` writes it.
"""

from __future__ import annotations

import dataclasses
import inspect
import typing
from typing import Any

import lightning_optim.rules  # noqa: F401  (fills the registry)
from lightning_optim.catalog import documentation
from lightning_optim.core.optimizer import ParamsT, RuleOptimizer
from lightning_optim.core.options import ARGUMENT_TYPES, OPTIONS
from lightning_optim.core.rule import REGISTRY, Rule
from lightning_optim.core.torch_arguments import accept_torch_arguments, torch_arguments


def signature(rule: type[Rule]) -> inspect.Signature:
    """The constructor's signature of a rule's optimizer class, without `self`.

    Returns:
        `params`, the hyperparameters, then keyword-only options and arguments of torch's optimizer.
    """
    kind, hints = inspect.Parameter, typing.get_type_hints(rule)
    fields = dataclasses.fields(rule)  # pyright: ignore[reportArgumentType]
    named = [
        kind(f.name, kind.KEYWORD_ONLY if f.kw_only else kind.POSITIONAL_OR_KEYWORD, default=f.default, annotation=hint)
        for f in sorted(fields, key=lambda f: bool(f.kw_only))
        for hint in [hints[f.name]]
    ]
    options = [kind(k, kind.KEYWORD_ONLY, default=v, annotation=ARGUMENT_TYPES[k]) for k, v in OPTIONS.items()]
    options += [kind(k, kind.KEYWORD_ONLY, default=v) for k, v in torch_arguments(rule).items()]
    options.append(kind("max_temp_bytes", kind.KEYWORD_ONLY, default=2**25, annotation=int))
    return inspect.Signature([kind("params", kind.POSITIONAL_OR_KEYWORD, annotation=ParamsT), *named, *options])


def optimizer_class(rule: type[Rule]) -> type[RuleOptimizer]:
    """Make the optimizer class of a rule.

    Returns:
        A subclass of `RuleOptimizer` whose default rule this is.
    """
    call = signature(rule)

    def __init__(self: RuleOptimizer, *args: Any, **kwargs: Any) -> None:
        bound = call.bind(*args, **kwargs).arguments
        params, size = bound.pop("params"), bound.pop("max_temp_bytes", 2**25)
        defaults = {"rule": rule.name, **accept_torch_arguments(rule, bound)}
        RuleOptimizer.__init__(self, params, defaults, max_temp_bytes=size)

    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    __init__.__signature__ = call.replace(parameters=[self_parameter, *call.parameters.values()])  # pyright: ignore
    body = {"__init__": __init__, "__doc__": documentation(rule), "__module__": __name__, "__signature__": call}
    return type(rule.__name__, (RuleOptimizer,), body)


CLASSES: dict[str, type[RuleOptimizer]] = {name: optimizer_class(rule) for name, rule in sorted(REGISTRY.items())}
"""Optimizer class of each rule, by the rule's name."""

globals().update({cls.__name__: cls for cls in CLASSES.values()})
__all__ = sorted(cls.__name__ for cls in CLASSES.values())  # pyright: ignore[reportUnsupportedDunderAll]
