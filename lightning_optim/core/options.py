"""The options that every param group has beside its rule's hyperparameters, and which of them exclude each other."""

from __future__ import annotations

import typing
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning_optim.core.rule import GlobalStepRule, Rule, nearest
from lightning_optim.core.state.formats import Storage

CONSTRAINTS = ("constraint", "uw_floor", "uw_floor_by", "radial_damping", "pin")
"""Options that depend on the norms of a parameter's matrices."""


@dataclass(frozen=True)
class Options:
    """Options of a param group."""

    lr_convention: Literal["native", "adamw"] = "native"
    """`"native"` is the published scale; `"adamw"` scales the direction to AdamW's RMS (0.2 per unit lr), so that
    AdamW's learning rate stays valid."""
    on_nonfinite: Literal["raise", "skip", "off"] | None = None
    """What happens when a gradient is not finite, before anything is written: `"raise"` FloatingPointError, `"skip"`
    the step, or `"off"` for no check. The default is off for elementwise rules, as in torch, and raise for the others,
    and for groups with a constraint, of which one NaN destroys a whole matrix. In these, a finite gradient whose
    squares overflow (a norm above 1.8e19 in float32) is scaled down with a warning under `"raise"`, and left out under
    `"skip"`, unless the group has `clip_norm`."""
    param_rounding: Literal["stochastic", "nearest", "kahan"] = "stochastic"
    """How bfloat16 weights are rounded: stochastically, to nearest, or to nearest with the rounding error kept in one
    more tensor (Kahan summation). float16 weights are rounded to nearest unless `"kahan"`."""
    state_storage: Storage = "fp32"
    """How state is stored between steps; arithmetic is always float32. `"bf16"` is rounded stochastically. `"int8"` is
    the dynamic 8-bit map with one scale per `storage_block` elements; `"int8_grid"` has the same values, rounded faster
    and coarser, as bitsandbytes does on a CPU; `"fp8"` is e4m3 with such scales. `"host"` is pinned host memory for
    parameters on CUDA. Square factors, bases, and row or column statistics stay float32. Settings are part of a
    checkpoint; state that was stored in another format is converted."""
    storage_block: int = 256
    """Elements per scale of quantized state, a power of two."""
    storage_min: int = 4096
    """State tensors with fewer elements stay float32."""
    blocks: int | tuple[int, ...] | tuple[tuple[int, int], ...] | None = None
    """How the rows of a matrix are divided into smaller matrices: a number of equal blocks (attention heads, a fused
    QKV), or the rows of one block after the other, repeated until all rows are used: `(8, 4, 4)` for 8 rows of queries,
    4 of keys and 4 of values, `(1, 1)` for alternate rows. Negative numbers divide columns."""
    transposed: bool = False
    """Matrices are stored as inputs x outputs (Transformers' Conv1D); rules see outputs as rows."""
    constraint: Literal["none", "hyperball"] = "none"
    """`"hyperball"` keeps the norm of every matrix and makes lr the angle of a step, for any rule; with
    `lr_convention="adamw"` the step is as long as AdamW's. Weights must not be zero.
    `lightning_optim.core.step.constraints` has the formulae of this and the next four options, in their order."""
    uw_floor: float = 0.0
    """Lower bound of the norm of the step per unit lr, relative to the norm of the weights; 0 for none."""
    uw_floor_by: Literal["matrix", "row"] = "matrix"
    """Whether `uw_floor` holds for each matrix or for each row."""
    radial_damping: float = 1.0
    """Factor of the part of a step that moves a matrix away from the origin; 1 leaves it unchanged."""
    pin: bool = False
    """After the step, set the norm of every matrix to what the radial part of the step alone makes of it."""
    cautious_decay: float | bool = 0.0
    """Decay, at this rate, only the weights that the step moves towards zero; True takes the rate `weight_decay`, which
    then decays nothing else."""
    cautious_when: Literal["before", "after_pin"] = "before"
    """Cautious decay before the step, of weights that do not move as well, or after `pin`."""
    clip_norm: float | None = None
    """Scale the gradients of the group by `clip_norm / norm` if their common norm, over the whole mesh, is larger.
    Unlike a trainer's clipping, one group's norm does not shrink another's, and `p.grad` stays as it is."""
    compile: bool = False
    """Step large parameters of elementwise and reducing rules by compiled graphs
    (`lightning_optim.core.step.compiled`), with the fewest passes over memory. There is one graph per rule for all
    steps, learning rates and sizes; results differ by rounding. Graphs are made when the group is added, which takes
    seconds and, on a CPU, a C++ compiler. Rules with a fused kernel of torch's keep it for state that is not quantized.
    A checkpoint does not change it."""
    comm_dtype: Literal["exact", "bf16"] = "exact"
    """The dtype in which gradients are sent to the rank that owns a matrix, and directions back: their own, or
    bfloat16."""
    seed: int = 0
    """Seed of the stochastic rounding of weights and state, and of random projections."""


TOGETHER: dict[str, dict[str, str]] = {
    "constraint": {"name": "constraint"} | {key: key for key in CONSTRAINTS[1:]},
    "cautious_decay": {"rate": "cautious_decay", "when": "cautious_when"},
    "state_storage": {"format": "state_storage", "block": "storage_block", "min": "storage_min"},
}
"""Options that belong together, as the keys of one mapping: `state_storage={"format": "int8", "block": 128}`. Groups
and checkpoints hold them one by one, as command lines do."""

OPTIONS: dict[str, Any] = {f.name: f.default for f in fields(Options)}
"""Default values by name."""
OPTION_TYPES: dict[str, Any] = typing.get_type_hints(Options)

ARGUMENT_TYPES: dict[str, Any] = {
    key: hint | Mapping[str, Any] if key in TOGETHER else hint for key, hint in OPTION_TYPES.items()
}
"""Types of options as arguments: one of `TOGETHER` may be a mapping."""

ZERO_MATRIX = (
    "a matrix of zeros, and constraint='hyperball' keeps the norm; initialize it with random numbers, or leave it out "
    "by an override ('NAME', None, {'constraint': 'none'})"
)


def expand_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the options of `TOGETHER` one by one.

    Args:
        settings: of a group; the value of such an option may be a mapping, such as
            `constraint={"name": "hyperball", "uw_floor": 0.1, "uw_floor_by": "row"}`.

    Returns:
        A new dictionary.

    Raises:
        ValueError: a mapping has an unknown key, or an option is given twice.
    """
    out = {key: value for key, value in settings.items() if not (key in TOGETHER and isinstance(value, Mapping))}
    for option, names in TOGETHER.items():
        value = settings.get(option)
        for key, one in value.items() if isinstance(value, Mapping) else ():
            if key not in names:
                raise ValueError(f"{option} has no setting {key!r}; {nearest(key, list(names))}")
            if names[key] in out:
                raise ValueError(f"{names[key]} is given twice: by itself, and as {option}[{key!r}]")
            out[names[key]] = one
    return out


def has_constraint(group: Mapping[str, Any]) -> bool:
    """Whether a group has one of the options `CONSTRAINTS`.

    Returns:
        True if the norms of matrices influence the step.
    """
    return (
        group["constraint"] != "none" or group["uw_floor"] > 0 or group["radial_damping"] != 1.0 or bool(group["pin"])
    )


def validate_constraints(rule: Rule, group: Mapping[str, Any]) -> None:
    """Check the options of a group that depend on norms against each other.

    Args:
        rule: of the group.
        group: its settings.

    Raises:
        ValueError: two options contradict each other.
    """
    label = f"group {group['name']!r}"
    if group["constraint"] == "hyperball" and (group["pin"] or (group["uw_floor"] and group["uw_floor_by"] != "row")):
        raise ValueError(
            f"{label}: constraint='hyperball' sets the norms of weights and step; leave out pin and uw_floor, "
            "or give uw_floor_by='row'"
        )
    if group["cautious_decay"] is True and rule.weight_decay and rule.decay not in ("before", "after"):
        raise ValueError(
            f"{label}: {rule.name} applies weight_decay itself, so cautious_decay=True cannot mask it; "
            "give weight_decay=0 and cautious_decay a number"
        )


def validate_line_search(rule: Rule, group: Mapping[str, Any]) -> None:
    """Check that no option of a group changes the step of a rule that searches along it.

    Args:
        rule: of the group.
        group: its settings.

    Raises:
        ValueError: an option would change the step.
    """
    if not isinstance(rule, GlobalStepRule):
        return
    label = f"group {group['name']!r}: {rule.name} takes the step for which it measured the loss, so"
    if group["clip_norm"] is not None:
        raise ValueError(f"{label} clip_norm has no gradient to clip; leave it out")
    if group["cautious_decay"] or has_constraint(group):
        raise ValueError(f"{label} constraint, uw_floor, radial_damping, pin and cautious_decay are not for it")
