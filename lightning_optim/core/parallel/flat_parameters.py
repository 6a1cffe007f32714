"""flat_parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.options import OPTIONS
from lightning_optim.core.rule import Rule
from lightning_optim.core.step import constraints

HIDDEN = "which FSDP1 and ZeRO hide in flat parameters"
REMEDY = "use FSDP2 (fully_shard, Lightning's ModelParallelStrategy, accelerate fsdp_version 2) or DDP"


def is_flat(p: Tensor) -> bool:
    """Whether FSDP1 (FlatParameter and its views) or DeepSpeed ZeRO-3 has flattened or emptied this parameter.

    Returns:
        True for such a one.
    """
    return bool(getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False) or hasattr(p, "ds_id"))


def check_unflattened(rule: type[Rule], named: Iterable[tuple[str, Tensor]]) -> None:
    """Check that the parameters of a model have their shapes, by which roles are told.

    Args:
        rule: the main rule.
        named: the model's parameters.

    Raises:
        ValueError: FSDP1 or DeepSpeed's `zero.Init` has flattened or emptied a trainable one.
    """
    name = next((name for name, p in named if p.requires_grad and is_flat(p)), None)
    if name is not None:
        _check_shapeless(rule, name)
        raise ValueError(
            f"{name}: FSDP1 or ZeRO-3 has flattened it, so roles (vectors are not decayed, say) cannot be told; "
            f"{REMEDY}, or give the class of {rule.name} all parameters with the same settings"
        )


def check_flat(rule: Rule, name: str, p: Tensor, group: Mapping[str, Any]) -> None:
    """Check that a flat tensor, a run of elements of one or more parameters, can be stepped like the parameters.

    That is so for an elementwise rule, unless an option of the group depends on the shapes of the parameters, on the
    place of an element or on other ranks.

    Args:
        rule: of the group.
        name: of the parameter or the group, for the message.
        p: the flat tensor.
        group: its settings.

    Raises:
        ValueError: it is not so.
    """
    _check_shapeless(rule, name)
    defaults = OPTIONS | {"on_nonfinite": "off"}
    keys = ["clip_norm", "on_nonfinite", *(constraints.OPTIONS if constraints.shapes_step(group) else ())]
    keys += ["state_storage"] if group["state_storage"] != "host" else []
    instead = {key: f"{key}={defaults[key]!r}" for key in keys if group[key] != defaults[key]}
    if p.dtype == torch.bfloat16 and group["param_rounding"] == "stochastic":
        instead["param_rounding"] = "param_rounding='nearest' or 'kahan'"
    for key, allowed in instead.items():
        raise ValueError(f"{name}: {key}={group[key]!r} needs whole parameters, {HIDDEN}; give {allowed}, or {REMEDY}")


def _check_shapeless(rule: Rule | type[Rule], name: str) -> None:
    """Refuse a flat tensor for a rule that needs the parameters in it."""
    if not rule.elementwise:
        raise ValueError(f"{name}: {rule.name} needs whole matrices, {HIDDEN}; {REMEDY}")
    if rule.curvature_input:
        raise ValueError(f"{name}: {rule.name} cannot be measured in the flat parameters of FSDP1 and ZeRO; {REMEDY}")
