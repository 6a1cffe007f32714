"""Parameters that FSDP1 or DeepSpeed ZeRO has flattened, and the checks of rules and options that cannot step them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim.core import options
from lightning_optim.core.options import OPTIONS
from lightning_optim.core.rule import Rule

HIDDEN = "which FSDP1 and ZeRO hide in flat parameters"
REMEDY = "use FSDP2 (fully_shard, Lightning's ModelParallelStrategy, accelerate fsdp_version 2) or DDP"


def is_flat(p: Tensor) -> bool:
    """Whether FSDP1 (FlatParameter and its views) or DeepSpeed ZeRO-3 has flattened or emptied this parameter.

    Returns:
        True if it has.
    """
    return bool(getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False) or hasattr(p, "ds_id"))


def check_unflattened(rule: type[Rule], named: Iterable[tuple[str, Tensor]]) -> None:
    """Check that the parameters of a model still have the shapes from which roles are derived.

    Args:
        rule: the main rule.
        named: names and parameters of the model.

    Raises:
        ValueError: FSDP1 or DeepSpeed's `zero.Init` has flattened or emptied a trainable parameter.
    """
    name = next((name for name, p in named if p.requires_grad and is_flat(p)), None)
    if name is not None:
        _check_shapeless(rule, name)
        raise ValueError(
            f"{name}: FSDP1 or ZeRO-3 has flattened it, so roles (vectors are not decayed, say) cannot be derived; "
            f"{REMEDY}, or give the class of {rule.name} all parameters with the same settings"
        )


def check_flat(rule: Rule, name: str, p: Tensor, group: Mapping[str, Any]) -> None:
    """Check that a flat tensor, which holds elements of one or more parameters, can be stepped like the parameters.

    Elementwise rules can do so, unless an option of the group depends on the shapes of the parameters, on the position
    of an element or on other ranks.

    Args:
        rule: rule of the group.
        name: name of the parameter or the group, for the message.
        p: the flat tensor.
        group: settings of the group.

    Raises:
        ValueError: the rule or an option needs the parameters themselves.
    """
    _check_shapeless(rule, name)
    defaults = OPTIONS | {"on_nonfinite": "off"}
    keys = ["clip_norm", "on_nonfinite", *(options.CONSTRAINTS if options.has_constraint(group) else ())]
    keys += ["state_storage"] if group["state_storage"] != "host" else []
    remedies = {key: f"{key}={defaults[key]!r}" for key in keys if group[key] != defaults[key]}
    if p.dtype == torch.bfloat16 and group["param_rounding"] == "stochastic":
        remedies["param_rounding"] = "param_rounding='nearest' or 'kahan'"
    for key, allowed in remedies.items():
        raise ValueError(f"{name}: {key}={group[key]!r} needs whole parameters, {HIDDEN}; give {allowed}, or {REMEDY}")


def _check_shapeless(rule: Rule | type[Rule], name: str) -> None:
    """Refuse a flat tensor for a rule that needs the parameters in it."""
    if not rule.elementwise:
        raise ValueError(f"{name}: {rule.name} needs whole matrices, {HIDDEN}; {REMEDY}")
    if rule.curvature_input:
        raise ValueError(f"{name}: {rule.name} cannot be measured in the flat parameters of FSDP1 and ZeRO; {REMEDY}")


class KnownParameters:
    """The parameters with which each group was created, to recognize those by which an engine replaces them."""

    def __init__(self) -> None:
        self._groups: dict[str, list[tuple[int, torch.Size | None]]] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    def remember(self, group: Mapping[str, Any]) -> None:
        """Record the parameters of a group.

        Args:
            group: a member of `param_groups`.
        """
        self._groups[group["name"]] = [(id(p), None if is_lazy(p) else p.shape) for p in group["params"]]

    def rename(self, names: Sequence[str], groups: Sequence[Mapping[str, Any]]) -> None:
        """Record the new names of groups that a checkpoint has renamed.

        Args:
            names: names before the change.
            groups: `param_groups` after it.
        """
        before = [self._groups.get(name, []) for name in names]
        self._groups |= {group["name"]: params for group, params in zip(groups, before, strict=True)}

    def flat_tensors(self, group: Mapping[str, Any]) -> list[Tensor]:
        """The flat tensors by which an engine (DeepSpeed ZeRO) has replaced a group's parameters.

        A parameter may be replaced by a copy, or by a shard of the same shape (FSDP2); then the result is empty.

        Args:
            group: a member of `param_groups`.

        Returns:
            One-dimensional tensors with which the group was not created, where it had other shapes or more parameters.
        """
        before, params = self._groups.get(group["name"], []), group["params"]
        ids, out = {number for number, _ in before}, []
        for i, p in enumerate(params) if before else ():
            if id(p) in ids or p.ndim != 1:
                continue
            shape = before[i][1] if i < len(before) else None
            # users may replace one vector by another; DeepSpeed's flat tensors are no Parameters
            is_vector = shape is None or shape == p.shape or (len(shape) == 1 and isinstance(p, torch.nn.Parameter))
            if len(params) < len(before) or not is_vector:
                out.append(p)
        return out

    def validate(self, rule: Rule, group: Mapping[str, Any], *, averaging: bool) -> None:
        """Check that a rule and the group's options can step the flat tensors that an engine has put into a group.

        Args:
            rule: rule of the group.
            group: a member of `param_groups`.
            averaging: whether the optimizer has averaging methods.

        Raises:
            ValueError: the rule, an option or the averaging methods need the parameters themselves.
        """
        for p in self.flat_tensors(group):
            names = ", ".join([*group.get("param_names", ("parameters",))[:3], "..."])
            label = f"group {group['name']!r} ({names}), which DeepSpeed (or a similar engine) has made a flat tensor"
            check_flat(rule, label, p, group)
            if averaging:
                raise ValueError(f"{label}: the averages of `with_averaging` would not reach the model; {REMEDY}")
