"""One call from a model to an optimizer: the right rule on every parameter, AdamW's learning rate still valid."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optim.build.overrides import Override
from lightning_optim.build.param_role import MATRIX_ROLES
from lightning_optim.build.recipes import PRESETS, resolve_settings
from lightning_optim.build.role_report import roles
from lightning_optim.build.role_warnings import Owned, warnings_of
from lightning_optim.build.roles import Assignment, applicable_overrides, assign
from lightning_optim.core import options
from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.options import OPTIONS
from lightning_optim.core.parallel import collectives, sharding
from lightning_optim.core.parallel.flat_parameters import check_unflattened
from lightning_optim.core.parallel.zero import square_of_partition, whole_shapes
from lightning_optim.core.param_groups import rule_of, settings_of, unused
from lightning_optim.core.rule import Rule, check_value, lookup, nearest
from lightning_optim.core.step.averaging_methods import AveragingMethod, averages_of
from lightning_optim.optimizers import CLASSES
from lightning_optim.schedule import OF_ROLE, ScheduleConfig, schedule_settings

_log = logging.getLogger(__name__)


def build_optimizer(
    model: nn.Module,
    name: str,
    *,
    lr: float | None = None,
    recipe: str | None = None,
    preset: str | None = None,
    weight_decay: float | None = None,
    rest: str | None = None,
    rest_lr: float | None = None,
    rest_settings: Mapping[str, Any] | None = None,
    lr_convention: str | None = None,
    overrides: Sequence[Override] = (),
    last_layer: Literal["rest", "rule"] | None = None,
    blocks: Literal["layers", "heads"] | None = None,
    averaging: Mapping[str, Mapping[str, Any]] | None = None,
    schedule: str | Mapping[str, Any] | None = None,
    fused_backward: bool = False,
    shard_work: bool = False,
    example_inputs: object = None,
    **settings: Any,
) -> RuleOptimizer:
    """Build one optimizer for a whole model.

    Rules for whole matrices (muon) get the hidden matrices and `rest` the embeddings, head and vectors; every other
    rule gets everything. Vectors are not decayed. The main rule's hidden matrices are group 0, whose learning rate
    the trainers log. If there is nothing for the main rule, a warning says so.

    Args:
        model: any module; its trainable parameters are taken.
        name: of the main rule, `python -m lightning_optim list` prints them.
        lr: learning rate; with the default convention, AdamW's.
        recipe: name of published settings (`lightning_optim.build.recipes`) for what is not given here.
        preset: name of a published pretraining stack (`lightning_optim.build.recipes.PRESETS`), with roles, `schedule`
            and `averaging`; what is given here takes precedence. With a learning rate of 1e-3 or less, or adapters,
            only the rule's hyperparameters are taken, and a warning says so.
        weight_decay: of everything but vectors; 0 if not given.
        rest: rule of what the main rule does not take; adamw if not given.
        rest_lr: its learning rate, `lr` if not given.
        rest_settings: its hyperparameters.
        lr_convention: `"adamw"`, if not given, scales every direction to AdamW's RMS; `"native"` takes `lr` as
            published.
        overrides: ordered (pattern or role, rule or None, settings); the first match wins. Settings are hyperparameters
            and options of the group, `lr_factor`, which multiplies the learning rate and survives schedulers, as
            they multiply every group's first one, `lr_per_rms`, a learning rate per root mean square of the weights as
            they are now (how large an embedding starts differs from model to model), `blocks`, which may be `"heads"`,
            too, and `cooldown` and `min_lr_ratio`, which the group then has in place of the schedule's.
        last_layer: whether `"rest"`, if not given, or the main `"rule"` gets an untied output layer.
        blocks: what is a matrix to rules that need whole ones: each of fused `"layers"`, if not given, or also each of
            the `"heads"` of queries, keys and values, which rules with row, column or whole sums then follow, too.
            `adam_mini` has one second moment per head of queries and keys in any case, unless `block="row"` is given.
        averaging: averaging methods by name: `{"ema_nesterov": {"step_size": 0.6}}`, `"tail_ema"`, `"muloco"`
            (`lightning_optim.core.step.weight_averaging`).
        schedule: `"linear"`, `"cosine"` or another name, or settings of `lightning_optim.schedule.ScheduleConfig`,
            `{"schedule": "cosine", "warmup_steps": 100}`. `ScheduleLR` and the trainers' integrations follow it.
        fused_backward: step within the backward pass, where gradients are freed (`RuleOptimizer.fuse_backward`).
        shard_work: under DDP, shard optimizer work and state over the ranks, as ZeRO-1 does
            (`RuleOptimizer.shard_work`).
        example_inputs: of the model's forward pass, with which roles are measured (`lightning_optim.roles`). Models of
            Transformers and timm, and LightningModules with an `example_input_array`, need none.
        **settings: hyperparameters of the main rule, and options of all groups (`on_nonfinite`, `param_rounding`,
            `clip_norm`, `seed`). Options about the norms of matrices (`constraint`, `uw_floor`, `radial_damping`,
            `pin`) are for the main rule's hidden ones; overrides can give them to others.

    Returns:
        An instance of the main rule's class with one group per rule and role.

    Raises:
        ValueError: an unknown name, setting or pattern, a parameter its rule cannot take, or parameters that FSDP1 has
            flattened.
    """
    arguments: dict[str, Any] = {
        "lr": lr,
        "weight_decay": weight_decay,
        "rest": rest,
        "rest_lr": rest_lr,
        "rest_settings": None if rest_settings is None else options.expand_options(rest_settings),
        "lr_convention": lr_convention,
        "last_layer": last_layer,
        "blocks": blocks,
        "averaging": averaging,
        "schedule": None if schedule is None else schedule_settings(schedule),
        "overrides": overrides,
        "example_inputs": example_inputs,
    }
    with whole_shapes(model.parameters()):
        check_unflattened(lookup(name), model.named_parameters())
        request = _resolve(model, name, recipe, preset, arguments, options.expand_options(settings))
        optimizer = _with_groups(model, request)

    def divide(group: dict[str, Any]) -> list[dict[str, Any]]:
        like = arguments | {"overrides": request.overrides, "averaging": {}}
        again = build_optimizer(model, name, recipe=recipe, preset=preset, **like, **settings)
        return _divided(group, again, {g["name"] for g in optimizer.param_groups})

    optimizer.divide = divide
    if request.averaging:
        optimizer.with_averaging(*request.averaging)
    optimizer.curve = request.schedule
    if fused_backward:
        optimizer.fuse_backward()
    if shard_work:
        optimizer.shard_work()
    return optimizer


class _Request(NamedTuple):
    """What `build_optimizer` is asked for, with recipe, preset and defaults resolved and every name checked."""

    rule: type[Rule]
    rest: type[Rule]
    values: dict[str, Any]
    """The arguments of `build_optimizer`."""
    settings: dict[str, Any]
    """Hyperparameters and options of the main rule."""
    constraints: dict[str, Any]
    """Options about the norms of matrices, for the main rule's hidden ones."""
    cautious_decay: float | bool
    overrides: Sequence[Override]
    schedule: ScheduleConfig | None
    averaging: list[AveragingMethod]

    @property
    def shared(self) -> dict[str, Any]:
        """Options of all groups."""
        return {key: value for key, value in self.settings.items() if key in OPTIONS}

    @property
    def by_rule(self) -> dict[str, dict[str, Any]]:
        """Hyperparameters and options of each rule."""
        return {self.rest.name: self.shared | self.values["rest_settings"], self.rule.name: self.settings}


def _resolve(
    model: nn.Module,
    name: str,
    recipe: str | None,
    preset: str | None,
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> _Request:
    """Fill in what a recipe or a preset says, and check every name before a group is made."""
    if recipe is not None and preset is not None:
        raise ValueError(f"give a recipe or a preset, not both; got {recipe!r} and {preset!r}")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"unknown preset {preset!r}; {nearest(preset, list(PRESETS))}")
    inputs = arguments["example_inputs"]
    adapters = preset is not None and any(trait.role.startswith("lora") for trait in roles(model, inputs).values())
    values = resolve_settings(name, recipe or preset, {**arguments, **settings}, adapters=adapters)
    more, overrides = values.pop("more_overrides"), arguments["overrides"]
    overrides = [*overrides, *applicable_overrides(model, overrides, more, inputs)] if more else overrides
    rule, rest = lookup(name), lookup(values["rest"])
    rule_settings = {k: v for k, v in values.items() if k not in arguments}
    _check_names(rule, rule_settings)
    _check_names(rest, {k: v for k, v in values["rest_settings"].items() if k not in OF_ROLE})
    constraints = {key: rule_settings.pop(key) for key in options.CONSTRAINTS if key in rule_settings}
    return _Request(
        rule,
        rest,
        values,
        rule_settings,
        constraints,
        rule_settings.pop("cautious_decay", 0.0),
        overrides,
        ScheduleConfig.of(values["schedule"]) if values["schedule"] else None,
        averages_of(values["averaging"]),
    )


def _with_groups(model: nn.Module, request: _Request) -> RuleOptimizer:
    """The optimizer with one group per rule and role; a warning says what is not as one might expect."""
    rule, values = request.rule, request.values
    matrices = {key: values[key] for key in ("last_layer", "blocks")}
    assigned = assign(
        model,
        rule.name,
        request.rest.name,
        request.overrides,
        **matrices,
        constrained=bool(request.constraints),
        by_rule=request.by_rule,
        example_inputs=values["example_inputs"],
    )
    groups: dict[str, dict[str, Any]] = {}
    for a in assigned:
        if a.group not in groups:
            groups[a.group] = _group_of(a, request)
        groups[a.group]["params"].append((a.name, a.param))
        groups[a.group]["role_sources"].append(a.trait.source)
    for group in groups.values():
        per_rms = group.pop("lr_per_rms")
        if per_rms is not None:
            group["lr"] *= _rms([p for _, p in group["params"]])
    ordered = sorted(groups.values(), key=lambda g: (g["rule"] != rule.name, g["role"] != "hidden"))
    optimizer = CLASSES[rule.name](ordered)
    common = {k: values[k] for k in ("lr", "weight_decay", "lr_convention")}
    optimizer.example_inputs = values["example_inputs"]
    optimizer.defaults.update(request.settings | common | {"cautious_decay": request.cautious_decay})
    _say_native(optimizer, values["lr_convention"])
    for message in warnings_of(rule.name, (Owned(a.name, a.role, _shape(a.param), a.rule, a.blocks) for a in assigned)):
        _log.warning("%s", message)
    return optimizer


def _shape(p: Tensor) -> Sequence[int]:
    """The shape of a parameter; none of one that is not initialized yet."""
    return () if is_lazy(p) else p.shape


def _group_of(a: Assignment, request: _Request) -> dict[str, Any]:
    """The group of an assignment, without parameters; `lr_per_rms` is still to be multiplied by their RMS."""
    values, masked, settings = request.values, request.cautious_decay, dict(a.settings)
    factor, per_rms = settings.pop("lr_factor", 1.0), settings.pop("lr_per_rms", None)
    _check_names(lookup(a.rule), {k: v for k, v in settings.items() if k not in OF_ROLE})
    check_value(f"{a.group}: lr_factor", factor, float)
    check_value(f"{a.group}: lr_per_rms", per_rms, float | None)
    is_main, is_vector = a.rule == request.rule.name, a.role == "vector"
    group = {
        "name": a.group,
        "rule": a.rule,
        "role": a.role,
        "lr": values["lr"] if is_main or values["rest_lr"] is None else values["rest_lr"],
        "weight_decay": 0.0 if is_vector else values["weight_decay"],
        "cautious_decay": 0.0 if is_vector and masked is not True else masked,
        "lr_convention": values["lr_convention"],
        "transposed": a.transposed,
        "blocks": a.blocks,
        "role_sources": [],
        **request.by_rule.get(a.rule, request.shared),
        **(request.constraints if is_main and a.role in MATRIX_ROLES else {}),
        **settings,
        "params": [],
    }
    lr = group["lr"] if per_rms is None else per_rms
    return group | {"lr": lr if factor == 1 else lr * factor, "lr_per_rms": per_rms}


def _divided(group: Mapping[str, Any], like: RuleOptimizer, taken: Collection[str]) -> list[dict[str, Any]]:
    """A group that joins, as groups like those of an optimizer that has its parameters from the start.

    Args:
        group: names no rule.
        like: the optimizer built again, with the parameters that are trained now.
        taken: names of groups that are there.

    Returns:
        One group per rule and role; what `like` does not have comes last, under the main rule.
    """
    params = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
    left = {id(p[1] if isinstance(p, tuple) else p): p for p in params}
    own_settings = {k: v for k, v in group.items() if k not in ("params", "name", "lr")}
    share = group["lr"] / like.defaults["lr"] if "lr" in group and like.defaults["lr"] else 1.0
    out: list[dict[str, Any]] = []
    for g in like.param_groups:
        mine = [(n, p) for n, p in zip(g["param_names"], g["params"], strict=True) if left.pop(id(p), None) is not None]
        if mine:
            label = f"{group['name']}/{g['name']}" if "name" in group else g["name"]
            of_role = {k: v for k, v in own_settings.items() if k != "weight_decay" or g["role"] != "vector"}
            sources = dict(zip(g["param_names"], g["role_sources"], strict=True))
            part = {"name": unused(label, taken), "lr": g["lr"] * share, "params": mine}
            out.append({**g, **of_role, **part, "role_sources": [sources[n] for n, _ in mine]})
    if left:
        out.append({**group, "rule": like.defaults["rule"], "params": list(left.values())})
    return out


def _check_names(rule: type[Rule], settings: Mapping[str, Any]) -> None:
    names = list(settings_of(rule))
    of_schedule = {f.name for f in fields(ScheduleConfig)}
    for key in settings:
        if key not in names and key in of_schedule:
            raise ValueError(f"{key} is a setting of the schedule: give schedule={{{key!r}: {settings[key]!r}, ...}}")
        if key not in names:
            raise ValueError(f"{rule.name} has no setting {key!r}; {nearest(key, names)}")


def _rms(params: Sequence[Tensor]) -> float:
    """The root mean square of weights, over the whole mesh; 1 where there are none yet."""
    if any(p.is_meta for p in params):
        return 1.0
    partitions = [square_of_partition(p) for p in params]
    left = [p for p, square in zip(params, partitions, strict=True) if square is None]
    norm = collectives.total_norms([[(p, sharding.local(p.detach())) for p in left]])[0] if left else 0.0
    norm = (norm**2 + sum(square or 0.0 for square in partitions)) ** 0.5 if len(left) < len(params) else norm
    return norm / sum(p.numel() for p in params) ** 0.5 or 1.0


def _say_native(optimizer: RuleOptimizer, lr_convention: str) -> None:
    """Say once which rules have no scale that the adamw convention could match."""
    if lr_convention == "adamw":
        scaleless = {g["rule"] for g in optimizer.param_groups if rule_of(g).rms(2, 2) is None}
        if scaleless:
            _log.warning("%s: lr is the published one, not AdamW's (no fixed scale)", ", ".join(sorted(scaleless)))
