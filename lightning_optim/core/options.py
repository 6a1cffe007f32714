"""options."""

from __future__ import annotations

import typing
from dataclasses import dataclass, fields
from typing import Any, Literal

from lightning_optim.core.state.formats import Storage


@dataclass(frozen=True)
class Options:
    """Settings every group has beside its rule's hyperparameters; `RuleOptimizer` explains them."""

    lr_convention: Literal["native", "adamw"] = "native"
    on_nonfinite: Literal["raise", "skip", "off"] | None = None
    param_rounding: Literal["stochastic", "nearest", "kahan"] = "stochastic"
    state_storage: Storage = "fp32"
    storage_block: int = 256
    storage_min: int = 4096
    blocks: int | tuple[int, ...] | tuple[tuple[int, int], ...] | None = None
    transposed: bool = False
    constraint: Literal["none", "hyperball"] = "none"
    uw_floor: float = 0.0
    uw_floor_by: Literal["matrix", "row"] = "matrix"
    radial_damping: float = 1.0
    pin: bool = False
    cautious_decay: float | bool = 0.0
    cautious_when: Literal["before", "after_pin"] = "before"
    clip_norm: float | None = None
    compile: bool = False
    comm_dtype: Literal["exact", "bf16"] = "exact"
    seed: int = 0


OPTIONS: dict[str, Any] = {f.name: f.default for f in fields(Options)}
OPTION_TYPES: dict[str, Any] = typing.get_type_hints(Options)
