"""Parameters that FSDP1 or DeepSpeed ZeRO has flattened, and the checks of rules and options that cannot step them.

Of what DeepSpeed flattens, `parallel.zero` finds the parameters again; what is refused here is what FSDP1 or an unknown
engine has made, and what cannot be either way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim.core import options
from lightning_optim.core.options import OPTIONS
from lightning_optim.core.parallel.fragment import Fragment
from lightning_optim.core.rule import Rule, lookup

HIDDEN = "which FSDP1 hides in flat parameters"
REMEDY = "use FSDP2 (fully_shard, Lightning's ModelParallelStrategy, accelerate fsdp_version 2) or DDP"


def is_flat(p: Tensor) -> bool:
    """Whether FSDP1 (FlatParameter and its views) or DeepSpeed ZeRO-3 has flattened or emptied this parameter.

    Returns:
        True if it has.
    """
    emptied = not is_lazy(p) and p.shape != getattr(p, "ds_shape", p.shape)
    return bool(getattr(p, "_fsdp_flattened", False) or getattr(p, "_is_flat_param", False) or emptied)


def check_unflattened(rule: type[Rule], named: Iterable[tuple[str, Tensor]]) -> None:
    """Check that the parameters of a model still have the shapes from which roles are derived.

    Args:
        rule: the main rule.
        named: names and parameters of the model.

    Raises:
        ValueError: FSDP1 has flattened a trainable parameter.
    """
    name = next((name for name, p in named if p.requires_grad and is_flat(p)), None)
    if name is not None:
        _check_shapeless(rule, name)
        raise ValueError(
            f"{name}: FSDP1 has flattened it, so roles (vectors are not decayed, say) cannot be derived; "
            f"{REMEDY}, or give the class of {rule.name} all parameters with the same settings"
        )


def check_measurable(rule: Rule | type[Rule], name: str) -> None:
    """Check that an engine that flattens parameters leaves what a rule needs beside gradients.

    Args:
        rule: the rule.
        name: name of the parameter or the group, for the message.

    Raises:
        ValueError: the rule needs curvature.
    """
    if rule.curvature_input:
        raise ValueError(f"{name}: {rule.name} cannot be measured in the flat parameters of FSDP1 and ZeRO; {REMEDY}")


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
    remedies = _about_parameters(group, p.dtype)
    for key, allowed in remedies.items():
        raise ValueError(f"{name}: {key}={group[key]!r} needs whole parameters, {HIDDEN}; give {allowed}, or {REMEDY}")


def _about_parameters(group: Mapping[str, Any], dtype: torch.dtype) -> dict[str, str]:
    """Options of a group that depend on shapes, on the position of an element or on other ranks.

    Args:
        group: settings of the group.
        dtype: of the weights.

    Returns:
        What to give instead, by option.
    """
    defaults = OPTIONS | {"on_nonfinite": "off"}
    keys = ["clip_norm", *(options.CONSTRAINTS if options.has_constraint(group) else ()), "on_nonfinite"]
    keys += ["state_storage"] if group["state_storage"] != "host" else []
    remedies = {key: f"{key}={defaults[key]!r}" for key in keys if group[key] != defaults[key]}
    if dtype == torch.bfloat16 and group["param_rounding"] == "stochastic":
        remedies["param_rounding"] = "param_rounding='nearest' or 'kahan'"
    return remedies


def needs_parameters(rule: type[Rule], group: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether a group is stepped by parameters, and not by flat tensors that hold elements of several.

    Args:
        rule: of the group.
        group: its settings.
        dtype: of the flat tensors.

    Returns:
        False for rules that work element by element without options about parameters.
    """
    return not rule.elementwise or bool(_about_parameters(group, dtype))


def check_fragments(group: Mapping[str, Any], flats: Sequence[Tensor], *, has_fragments: bool) -> None:
    """Check what cannot be where DeepSpeed steps flat tensors one after the other.

    Args:
        group: settings of a group.
        flats: its flat tensors.
        has_fragments: whether it is stepped by parameters.

    Raises:
        ValueError: the rule or an option.
    """
    rule, label = lookup(group["rule"]), f"group {group['name']!r}"
    check_measurable(rule, label)
    remedies = {}
    if group["on_nonfinite"] == "skip":  # other groups may have been stepped
        remedies["on_nonfinite"] = "on_nonfinite='raise' or 'off'"
    if group["clip_norm"] is not None and len(flats) > 1:
        remedies["clip_norm"] = "DeepSpeed's gradient_clipping, or a sub_group_size that holds the whole group"
    if has_fragments and rule.elementwise and group["state_storage"] in ("int8", "fp8"):
        remedies["state_storage"] = "state_storage='bf16' or 'fp32'"
    for key, allowed in remedies.items():
        raise ValueError(f"{label}: {key}={group[key]!r} does not work under DeepSpeed ZeRO; give {allowed}")


def _check_shapeless(rule: Rule | type[Rule], name: str) -> None:
    """Refuse a flat tensor for a rule that needs the parameters in it."""
    if not rule.elementwise:
        raise ValueError(f"{name}: {rule.name} needs whole matrices, {HIDDEN}; {REMEDY}")
    check_measurable(rule, name)


def _shape_of(p: Tensor) -> torch.Size | None:
    """The shape of a whole parameter; None for a lazy one."""
    return None if is_lazy(p) else getattr(p, "ds_shape", p.shape)


class KnownParameters:
    """The parameters with which each group was created, to recognize those by which an engine replaces them."""

    def __init__(self) -> None:
        self._groups: dict[str, list[tuple[int, torch.Size | None]]] = {}
        self._held: dict[str, tuple[dict[str, Any], list[Tensor]]] = {}

    def __bool__(self) -> bool:
        return bool(self._groups)

    def remember(self, group: dict[str, Any]) -> None:
        """Record the parameters of a group.

        Args:
            group: a member of `param_groups`.
        """
        self._held[group["name"]] = group, list(group["params"])
        self._groups[group["name"]] = [(id(p), _shape_of(p)) for p in group["params"]]

    def held(self) -> list[tuple[dict[str, Any], list[Tensor]]]:
        """The groups with the parameters with which they were created.

        Returns:
            Nothing after `release`.
        """
        return list(self._held.values())

    def release(self) -> None:
        """Keep no parameter alive from now on, since the first step is taken and no engine has replaced them."""
        self._held.clear()

    def rename(self, names: Sequence[str], groups: Sequence[Mapping[str, Any]]) -> None:
        """Record the new names of groups that a checkpoint has renamed.

        Args:
            names: names before the change.
            groups: `param_groups` after it.
        """
        before = [self._groups.get(name, []) for name in names]
        self._groups |= {group["name"]: params for group, params in zip(groups, before, strict=True)}
        held = [self._held.pop(name, None) for name in names]
        self._held |= {g["name"]: (g, of[1]) for g, of in zip(groups, held, strict=True) if of is not None}

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
            if id(p) in ids or p.ndim != 1 or isinstance(p, Fragment):
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
