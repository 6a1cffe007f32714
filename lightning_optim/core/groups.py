"""What a param group says: its rule, hyperparameters and options, completed and checked before anything is changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core import chunks
from lightning_optim.core.rule import Rule, hyperparameters, lookup, nearest

OPTIONS: dict[str, Any] = {
    "lr_convention": "native",
    "on_nonfinite": None,
    "param_rounding": "stochastic",
    "blocks": None,
    "cautious_decay": False,
    "seed": 0,
}
"""Settings every group has beside its rule's hyperparameters, with their defaults; see `Executor`."""

CHOICES = {
    "lr_convention": ("native", "adamw"),
    "on_nonfinite": ("raise", "skip", "off"),
    "param_rounding": ("stochastic", "nearest"),
}


def rule_of(group: Mapping[str, Any]) -> Rule:
    """The rule that owns a group, with the group's present settings; a tensor lr is read here.

    Args:
        group: of `param_groups`.

    Returns:
        The rule.
    """
    rule = lookup(group["rule"])
    values = {name: group[name] for name in hyperparameters(rule)}
    return rule(**{k: float(v) if isinstance(v, Tensor) else v for k, v in values.items()})


def completed(
    group: Mapping[str, Any], defaults: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A new group with everything it leaves out, checked.

    Args:
        group: as the user gave it.
        defaults: of the optimizer; they count for groups of the same rule.
        groups: that the optimizer has already.

    Returns:
        A new dictionary.

    Raises:
        ValueError: an unknown rule or option, a value out of range, or a parameter the rule cannot take.
    """
    out = dict(group)
    params = out.get("params", ())
    if not isinstance(params, (list, set)):  # torch refuses sets
        out["params"] = [params] if isinstance(params, Tensor) else list(params)
    name = out.get("rule", defaults.get("rule"))
    if name is None:
        raise ValueError(f"param group {out.get('name', '')!r} names no rule; add 'rule': 'adamw', say")
    rule = lookup(name)
    out["rule"] = rule.name
    inherited = defaults if defaults.get("rule") == rule.name else {}
    for key, value in inherited.items():
        out.setdefault(key, value)
    if out.get("lr_convention") == "adamw":
        out.update({k: v for k, v in rule.adamw_settings.items() if k not in group})
    for key, value in (hyperparameters(rule) | OPTIONS).items():
        out.setdefault(key, value)
    taken = {g["name"] for g in groups}
    if out.setdefault("name", _unused(rule.name, taken)) in taken:
        raise ValueError(f"two param groups are named {out['name']!r}; names must be unique")
    _check_group(rule, out)
    _check_owned_once(groups, out)
    return out


def _unused(name: str, taken: set[str]) -> str:
    return next(x for x in (name, *(f"{name}_{i}" for i in range(1, len(taken) + 2))) if x not in taken)


def _named(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Parameters of a group that torch has not seen yet, with a name for messages."""
    at = f"of group {group['name']!r}"
    return [x if isinstance(x, tuple) else (f"parameter {i} {at}", x) for i, x in enumerate(group["params"])]


def _check_owned_once(groups: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> None:
    owners = {id(p): group["name"] for group in groups for p in group["params"]}
    for name, p in _named(new):
        if id(p) in owners:
            raise ValueError(f"{name}: already owned by group {owners[id(p)]!r}; a parameter belongs to one group")
        owners[id(p)] = new["name"]


def _check_group(rule: type[Rule], group: dict[str, Any]) -> None:
    made = rule_of(group)
    made.validate()
    if group["on_nonfinite"] is None:
        group["on_nonfinite"] = "off" if rule.elementwise else "raise"
    for key, choices in CHOICES.items():
        if group[key] not in choices:
            raise ValueError(f"{group['name']}: unknown {key} {group[key]!r}; {nearest(str(group[key]), choices)}")
    if group["blocks"] is not None and (not isinstance(group["blocks"], int) or group["blocks"] < 1):
        raise ValueError(f"{group['name']}: blocks must be a positive integer, got {group['blocks']!r}")
    for name, p in _named(group):
        if isinstance(p, Tensor):
            _check_param(made, name, p, group["blocks"])


def _check_param(rule: Rule, name: str, p: Tensor, blocks: int | None) -> None:
    shape = tuple(p.shape)
    if p.is_complex():
        raise ValueError(f"{name}: complex parameters are not supported; use torch.view_as_real")
    if not p.is_floating_point():
        raise ValueError(f"{name}: {rule.name} needs a floating-point parameter, got {p.dtype}")
    if p.layout != torch.strided:
        raise ValueError(f"{name}: sparse parameters are not supported, got layout {p.layout}")
    if rule.elementwise or (rule.reduces and p.ndim >= 2 and not _is_flat(p)):
        return
    if _is_flat(p):
        raise ValueError(
            f"{name}: {rule.name} needs whole matrices, which FSDP1 and ZeRO hide in flat parameters; "
            "use FSDP2 (fully_shard, Lightning's ModelParallelStrategy, accelerate fsdp_version 2) or DDP"
        )
    if p.ndim < 2 and not rule.vectors:
        raise ValueError(
            f"{name}: {rule.name} needs a matrix, got shape {shape}; give it to an elementwise rule such as adamw "
            "(build_optimizer does)"
        )
    try:
        chunks.matrix_dims(shape, blocks, conv=not rule.reduces)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def _is_flat(p: Tensor) -> bool:
    """Whether FSDP1 (FlatParameter and its views) or DeepSpeed ZeRO has flattened or emptied this parameter."""
    return bool(getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False) or hasattr(p, "ds_id"))
