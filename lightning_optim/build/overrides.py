"""Overrides: what the user says of parameters, by names, roles and kinds."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from fnmatch import fnmatchcase
from typing import Any, get_args

from torch import nn

from lightning_optim.build.param_role import ParamRole, Role
from lightning_optim.core.rule import check_value, lookup, nearest
from lightning_optim.core.state.matching import bare_name

Override = tuple[str, str | None] | tuple[str, str | None, Mapping[str, Any]]
"""(pattern or role, rule or None to keep it, settings): `("*.gate.*", "adamw", {"lr": 1e-4})`."""


def layerwise_decay(model: nn.Module, factor: float) -> list[Override]:
    """Overrides for learning rates that fall from layer to layer towards the input.

    With L layers, layer i from 0 gets `factor^(L - i)`, what comes before the layers `factor^(L + 1)`, and what comes
    after them 1 (Clark et al. 2020, arXiv:2003.10555). Layers are the members of a `ModuleList` that lies in no other;
    of encoder and decoder each counts for itself.

    Args:
        model: the model that `build_optimizer` will get; wrappers do not matter.
        factor: below 1 to decay.

    Returns:
        Overrides.

    Raises:
        ValueError: the model has no such list, or the factor is negative or no number.
    """
    check_value("factor", factor, float)
    place: dict[int, tuple[str, float]] = {}
    depth, inside = 0, set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and id(module) not in inside:
            inside.update(id(m) for m in module.modules())
            depth = max(depth, len(module))
            for i, layer in enumerate(module):
                entry = f"{glob.escape(prefix)}.{i}.*" if prefix else f"{i}.*", factor ** (len(module) - i)
                place.update({id(p): entry for p in layer.parameters() if id(p) not in place})
    if not place:
        raise ValueError(f"{type(model).__name__} has no ModuleList of layers; write the overrides yourself")
    out: dict[str, float] = {}
    before = True
    for name, p in model.named_parameters():
        before = before and id(p) not in place
        if p.requires_grad and (before or id(p) in place):
            pattern, share = place.get(id(p), (glob.escape(name), factor ** (depth + 1)))
            out[pattern] = share
    return [(pattern, None, {"lr_factor": share}) for pattern, share in out.items()]


def lora_plus(ratio: float = 16.0) -> list[Override]:
    """Overrides for LoRA+: the second factors of adapters learn `ratio` times as fast as the first.

    Source: Hayou et al. 2024, arXiv:2402.12354, where 16 is advised.

    Returns:
        Overrides.
    """
    return [("lora_b", None, {"lr_factor": ratio})]


def checked(override: Override) -> tuple[str, str | None, Mapping[str, Any]]:
    """An override with all three of its members.

    Returns:
        (pattern or role, name of the rule or None, settings).

    Raises:
        ValueError: it is none, or its rule is unknown.
    """
    if not 2 <= len(override) <= 3 or not isinstance(override[0], str):
        raise ValueError(f"an override is (pattern or role, rule or None, settings), got {override!r}")
    named = lookup(override[1]).name if override[1] is not None else None
    return override[0], named, override[2] if len(override) == 3 else {}


def matches(pattern: str, name: str, role: str, kind: str = "") -> bool:
    """Whether an override's pattern is a parameter's role or kind or matches its name, wrappers' prefixes or not.

    Returns:
        True if so.
    """
    return pattern in (role, kind) or fnmatchcase(name, pattern) or fnmatchcase(bare_name(name), pattern)


def why_unmatched(pattern: str, roles: Mapping[str, ParamRole], model: nn.Module) -> str:
    """Why an override applies to nothing, and what could be meant.

    Args:
        pattern: of the override.
        roles: of trainable parameters.
        model: it is about.

    Returns:
        The end of an error message.
    """
    if any(matches(pattern, name, trait.role, trait.kind) for name, trait in roles.items()):
        return "earlier overrides have taken everything it matches; put it before them"
    if any(matches(pattern, name, "") for name, p in model.named_parameters() if not p.requires_grad):
        return "what it matches is frozen"
    present = sorted({trait.role for trait in roles.values()})
    if pattern in get_args(Role):
        tied = pattern == "head" and _shares_weights(model)
        shared = " (the output layer shares the weights of another: override that one)" if tied else ""
        return f"no parameter has this role here{shared}; the roles are {', '.join(present)}"
    return nearest(pattern, [*present, *roles]) if len(roles) < 200 else f"the roles are {', '.join(present)}"


def _shares_weights(model: nn.Module) -> bool:
    """Whether a parameter has several names."""
    return len(list(model.named_parameters(remove_duplicate=False))) > len(list(model.parameters()))
