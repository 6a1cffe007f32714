"""Completion and checks of a param group (rule, hyperparameters, options), before the optimizer is changed."""

from __future__ import annotations

import difflib
import numbers
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from lightning_optim.core import matrix_views, options
from lightning_optim.core.momentum_alias import MOMENTUM_NAMES, is_other_name, momentum_field
from lightning_optim.core.options import OPTION_TYPES, OPTIONS
from lightning_optim.core.parallel import sharding
from lightning_optim.core.parallel.flat_parameters import check_flat, check_measurable, is_flat
from lightning_optim.core.parallel.zero import whole_shapes
from lightning_optim.core.rule import GlobalStepRule, Rule, check_value, hyperparameters, lookup
from lightning_optim.core.torch_arguments import accept_torch_arguments
from lightning_optim.ops.quantize import PIECE

MIN_RMS = 1e-12
"""Of a direction per unit learning rate that can be scaled to AdamW's."""


def settings_of(rule: type[Rule]) -> dict[str, Any]:
    """Every setting of a group with this rule.

    Returns:
        Defaults by name: hyperparameters, then options.
    """
    return hyperparameters(rule) | OPTIONS


def plain(value: Any) -> Any:
    """Convert numpy's numbers in a setting to Python's, as they do not load with `weights_only=True`.

    Args:
        value: a setting; tuples, lists and dictionaries are converted recursively.

    Returns:
        The value with Python's numbers.
    """
    cls = type(value)
    if cls is tuple or cls is list:
        return cls(plain(x) for x in value)
    if cls is dict:
        return {k: plain(x) for k, x in value.items()}
    if cls in (bool, int, float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def rule_of(group: Mapping[str, Any]) -> Rule:
    """The rule of a group, with the group's current settings; the value of a tensor lr is read here.

    Args:
        group: a member of `param_groups`.

    Returns:
        The rule.

    Raises:
        ValueError: the group lacks a setting of its rule, or an option has an unknown value.
    """
    rule = lookup(group["rule"])
    missing = [name for name in settings_of(rule) if name not in group]
    if missing:
        raise ValueError(
            f"group {group.get('name', '')!r} runs {rule.name!r} but has no {', '.join(missing)}; "
            "a group keeps the rule it was added with"
        )
    if group["lr_convention"] not in ("native", "adamw") or group["on_nonfinite"] not in ("raise", "skip", "off"):
        _check_options(group)
    values = {name: group[name] for name in hyperparameters(rule)}
    return rule(**{k: float(v) if isinstance(v, Tensor) else v for k, v in values.items()})


def blocks_of(
    rule: Rule, group: Mapping[str, Any], shape: Sequence[int]
) -> tuple[tuple[matrix_views.MatrixBlock, ...], bool]:
    """The matrices of a parameter of a group; elementwise rules use them only for the norms of a constraint.

    Args:
        rule: rule of the group.
        group: settings, of which `blocks` and `transposed` are used.
        shape: shape of the parameter.

    Returns:
        (blocks, whether rows and columns are exchanged).

    Raises:
        ValueError: the rows do not divide into the group's blocks.
    """
    blocks, transposed = matrix_view_options(rule, group)
    return matrix_views.split_blocks(tuple(shape), blocks, conv=not rule.last_two, transposed=transposed), transposed


def matrix_view_options(rule: Rule, group: Mapping[str, Any]) -> tuple[matrix_views.Blocks, bool]:
    """The options of a group that determine how its parameters are split into matrices.

    Args:
        rule: rule of the group.
        group: settings, of which `blocks` and `transposed` are used.

    Returns:
        (blocks, whether rows and columns are exchanged).
    """
    if rule.elementwise and not options.has_constraint(group):
        return None, False
    # the rows of a layer share one input
    return None if rule.needs_all_gradients else group["blocks"], group["transposed"]


def complete_group(
    group: Mapping[str, Any], defaults: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """Complete a new group by defaults, and check it.

    Args:
        group: the group as passed by the user.
        defaults: settings passed to the optimizer, which apply to groups of the same rule.
        groups: the optimizer's existing groups.

    Returns:
        A new dictionary.

    Raises:
        ValueError: an unknown rule or option, a value out of range, or a parameter that the rule cannot take.
    """
    out = options.expand_options(group)
    params = out.get("params", ())
    if not isinstance(params, set):  # torch refuses sets
        out["params"] = [params] if isinstance(params, Tensor) else _without_duplicates(params)
    name = out.get("rule", defaults.get("rule"))
    if name is None:
        raise ValueError(f"param group {out.get('name', '')!r} names no rule; add 'rule': 'adamw', say")
    rule = lookup(name)
    out = accept_torch_arguments(rule, out)
    out["rule"] = rule.name
    for key in out:
        _refuse_misspelled(key, rule)
    if defaults.get("rule") == rule.name:
        defaults = {k: v for k, v in defaults.items() if k not in MOMENTUM_NAMES or not is_other_name(rule, k)}
        out = {**defaults, **out}
    if out.get("lr_convention") == "adamw":
        out = {**rule.adamw_settings, **out}
    out = {**settings_of(rule), **out}
    out = {k: v if k == "params" else plain(v) for k, v in out.items()}
    for key in hyperparameters(rule):
        if isinstance(out[key], Tensor) and out[key].numel() != 1:
            shape = tuple(out[key].shape)
            raise ValueError(f"{rule.name}: {key} must be a number or a tensor of one element, got shape {shape}")
    out["blocks"] = matrix_views.frozen(out["blocks"])
    names = {g["name"] for g in groups}
    if out.setdefault("name", unused(rule.name, names)) in names:
        raise ValueError(f"two param groups are named {out['name']!r}; names must be unique")
    _check_settings(out)
    if out["on_nonfinite"] is None:
        is_whole = not rule.elementwise or options.has_constraint(out)  # one NaN destroys a whole matrix
        out["on_nonfinite"] = "raise" if is_whole else "off"
    instance = rule_of(out)
    with whole_shapes(p for _, p in _named(out) if isinstance(p, Tensor)):
        for label, p in _named(out):
            if isinstance(p, Tensor) and p.requires_grad:
                validate_param(instance, label, p, out)
    _check_owned_once(groups, out)
    _match_param_names(groups, out)
    if not groups and "name" not in group:
        del out["name"]  # see `ParamGroup`
    return out


def _without_duplicates(params: Iterable[Any]) -> list[Any]:
    """Parameters of a group, each once; a warning says if one was given twice, as torch's does."""
    params = list(params)
    first = {id(x[1] if isinstance(x, tuple) else x): x for x in reversed(params)}
    if len(first) < len(params):
        warnings.warn(
            "optimizer contains a parameter group with duplicate parameters; each is stepped once", stacklevel=5
        )
        kept = {id(x) for x in first.values()}
        params = [x for x in params if id(x) in kept and not kept.discard(id(x))]
    return params


def validate_loaded(group: Mapping[str, Any]) -> Rule:
    """Check a group that comes from a checkpoint.

    Returns:
        Its rule.

    Raises:
        ValueError: a value out of range.
    """
    _check_settings(group)
    return rule_of(group)


def _check_settings(group: Mapping[str, Any]) -> None:
    rule = lookup(group["rule"])
    values = {k: float(v) if isinstance(v := group[k], Tensor) else v for k in hyperparameters(rule)}
    instance = rule(**values)
    instance.validate()
    _check_options(group)
    _check_scale(instance, group)
    options.validate_constraints(instance, group)
    options.validate_line_search(instance, group)
    block = group["storage_block"]
    if not 16 <= block <= PIECE or PIECE % block:
        raise ValueError(f"{group['name']}: storage_block must be a power of two from 16 to {PIECE}, got {block!r}")
    if group["clip_norm"] == 0:
        raise ValueError(f"{group['name']}: clip_norm must be positive, or None for no clipping, got 0")
    if not matrix_views.are_valid(group["blocks"]):
        raise ValueError(f"{group['name']}: blocks must be a positive integer or several, got {group['blocks']!r}")


def _check_scale(rule: Rule, group: Mapping[str, Any]) -> None:
    """Check that a direction can be scaled to AdamW's, if the group asks for it: that it is not zero."""
    if group["lr_convention"] != "adamw":
        return
    try:
        size = rule.rms(2, 2)
        is_usable = size is None or MIN_RMS <= size <= 1 / MIN_RMS
    except (ArithmeticError, ValueError):
        is_usable = False
    if not is_usable:
        known = hyperparameters(type(rule)) | dict(rule.adamw_settings)
        changed = [f"{k}={group[k]!r}" for k, v in known.items() if k not in ("lr", "weight_decay") and group[k] != v]
        raise ValueError(
            f"{group['name']}: {', '.join(changed)} leaves no step that lr_convention='adamw' could scale; give larger "
            "values, or lr_convention='native'"
        )


def _check_options(group: Mapping[str, Any]) -> None:
    for key, hint in OPTION_TYPES.items():
        check_value(f"{group['name']}: {key}", group[key], hint, signed=key in ("seed", "blocks"))


def _refuse_misspelled(key: str, rule: type[Rule]) -> None:
    names = [*settings_of(rule), "params", "rule", "name", "role", "initial_lr", "param_names"]
    if key in MOMENTUM_NAMES and key not in names:
        field = momentum_field(rule)
        hints = {None: "it has no momentum", "betas": "its momentum is the first of 'betas'"}
        raise ValueError(f"{rule.name} has no setting {key!r}; {hints.get(field, f'its momentum is {field!r}')}")
    if key not in names and (close := difflib.get_close_matches(key, [*names, "learning_rate"], n=1, cutoff=0.8)):
        suggestion = "lr" if close[0] == "learning_rate" else close[0]
        raise ValueError(f"{rule.name} has no setting {key!r}; did you mean {suggestion!r}?")


def unused(name: str, names: Collection[str]) -> str:
    """The name itself, or the first of `name_1`, `name_2`, ... that is not in use.

    Returns:
        A name that is not in use.
    """
    return next(x for x in (name, *(f"{name}_{i}" for i in range(1, len(names) + 2))) if x not in names)


def _named(group: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """Parameters of a group that torch has not processed yet, with a name for messages."""
    suffix = f"of group {group['name']!r}"
    return [x if isinstance(x, tuple) else (f"parameter {i} {suffix}", x) for i, x in enumerate(group["params"])]


def _match_param_names(groups: Sequence[Mapping[str, Any]], new: dict[str, Any]) -> None:
    """Name the parameters of a new group, or drop their names, since torch requires names in all groups or in none."""
    if groups and new["params"] and isinstance(new["params"], list):
        groups_have_names, has_names = "param_names" in groups[0], isinstance(new["params"][0], tuple)
        if groups_have_names and not has_names:
            new["params"] = [(f"{new['name']}.{i}", p) for i, p in enumerate(new["params"])]
        elif has_names and not groups_have_names:
            new["params"] = [p for _, p in new["params"]]


def _check_owned_once(groups: Sequence[Mapping[str, Any]], new: Mapping[str, Any]) -> None:
    owners = {id(p): group["name"] for group in groups for p in group["params"]}
    for name, p in _named(new):
        if id(p) in owners:
            raise ValueError(f"{name}: already owned by group {owners[id(p)]!r}; a parameter belongs to one group")
        owners[id(p)] = new["name"]


def validate_param(rule: Rule, name: str, p: Tensor, group: Mapping[str, Any]) -> None:
    """Check that a rule can train a parameter.

    Args:
        rule: the rule.
        name: name of the parameter, for the message.
        p: the parameter.
        group: settings of its group.

    Raises:
        ValueError: the rule or an option does not support the parameter.
    """
    if is_lazy(p):
        return  # checked once it is materialized and trained
    shape = tuple(p.shape)
    if p.is_complex():
        raise ValueError(f"{name}: complex parameters are not supported; use torch.view_as_real")
    if not p.is_floating_point():
        raise ValueError(f"{name}: {rule.name} needs a floating-point parameter, got {p.dtype}")
    if p.layout != torch.strided:
        raise ValueError(f"{name}: sparse parameters are not supported, got layout {p.layout}")
    if hasattr(p, "ds_id"):  # of `zero.Init`
        check_measurable(rule, name)
    if is_flat(p):
        check_flat(rule, name, p, group)
    if group["constraint"] == "hyperball" and _is_zero(p):
        raise ValueError(f"{name}: {options.ZERO_MATRIX}")
    if rule.elementwise and not options.has_constraint(group):
        return
    if rule.needs_all_gradients and sharding.local(p) is not p:
        raise ValueError(f"{name}: {rule.name} needs whole parameters and hooks, which FSDP2 does not support; use DDP")
    if isinstance(rule, GlobalStepRule) and p.dtype.itemsize < 4:
        raise ValueError(
            f"{name}: {rule.name} compares the loss at weights that are close together, which {p.dtype} cannot "
            "resolve; keep weights in float32 (bf16-mixed, torch_dtype=torch.float32)"
        )
    if p.ndim < 2 and not rule.vectors:
        raise ValueError(
            f"{name}: {rule.name} needs a matrix, got shape {shape}; give it to an elementwise rule such as adamw "
            "(build_optimizer does)"
        )
    try:
        blocks, _ = blocks_of(rule, group, shape)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    specs = [rule.state_specs(*block.dims[1:], vector=p.ndim < 2) for block in blocks if p.numel() and len(blocks) > 1]
    kinds = [{key: spec.letters == "mn" for key, spec in some.items()} for some in specs]
    if any(kind.get(key, is_whole) != is_whole for kind in kinds for key, is_whole in kinds[0].items()):
        raise ValueError(f"{name}: {rule.name} keeps other state for some of its blocks; make their sizes more alike")


def _is_zero(p: Tensor) -> bool:
    """Whether a whole parameter has only zeros; sharded ones are checked before their first step."""
    return p.device.type != "meta" and sharding.sharding_of(p) is None and not p.any()
