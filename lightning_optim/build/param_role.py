"""The roles of parameters, and what is known of one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from lightning_optim.build.output_layers import is_conv1d
from lightning_optim.core.matrix_views import Blocks

Role = Literal[
    "hidden",
    "qkv",
    "gate_up",
    "experts",
    "lora_a",
    "lora_b",
    "lora_embedding",
    "embedding",
    "head",
    "router",
    "conv",
    "vector",
    "other",
]

MATRIX_ROLES: frozenset[str] = frozenset({"hidden", "qkv", "gate_up", "experts", "lora_a", "lora_b"})
"""Roles that rules for whole matrices take."""

Source = Literal["user", "registry", "measured", "structure", "unknown"]
"""Who says what a parameter is: an override; a layout that was registered; a watched forward pass; how modules are put
together; nobody."""


@dataclass(frozen=True)
class ParamRole:
    """What a parameter is."""

    role: Role
    reason: str
    transposed: bool = False
    """Stored as inputs x outputs."""
    blocks: Blocks = None
    """How the outputs are cut into matrices of their own, as the option `blocks` of a group."""
    heads: int | None = None
    """Equal blocks of outputs that are attention heads."""
    by_head: Blocks = None
    """How queries and keys are cut into heads, and values in the same parameter into rows, as the option `blocks`."""
    kind: str = ""
    """Of a vector: `bias` of a layer, `output_bias` of an attention's output layer, `gain` of a norm."""
    decays: bool = True
    """False for what its module excludes from weight decay."""
    source: Source = "structure"
    """Who says so; of a fused layer, who says in which order its rows are."""


Found = Iterator[tuple[Any, ParamRole]]
"""Parameters, or None, with what they are."""


def sides(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer.

    Args:
        module: an `nn.Linear` or a Conv1D of Transformers.

    Returns:
        (outputs, inputs).
    """
    rows, columns = module.weight.shape[-2:]
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def head_size(module: nn.Module, outputs: int) -> int | None:
    """Rows of one head of an attention module.

    Args:
        module: any module; attributes that count heads, or say how wide one is, make it an attention module.
        outputs: rows of all queries.

    Returns:
        None of other modules.
    """
    for key in ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim"):
        if isinstance(size := getattr(module, key, None), int) and size:
            return size
    for key in ("num_heads", "num_attention_heads", "n_heads", "n_head"):
        if isinstance(count := getattr(module, key, None), int) and count and outputs % count == 0:
            return outputs // count
    return None


def by_head(blocks: Blocks, outputs: int, size: int | None) -> tuple[int | None, Blocks]:
    """How a fused layer of queries, keys and values is cut into heads.

    Args:
        blocks: how it is cut into the three.
        outputs: its rows.
        size: rows of a head.

    Returns:
        (number of heads, the option `blocks` with queries and keys by head and values by row); None where not known.
    """
    if not size or outputs % size:
        return None, None
    rows = (outputs // 3,) * 3 if blocks == 3 else blocks
    sizes = [x for x in rows if isinstance(x, int)] if isinstance(rows, tuple) else []
    if len(sizes) != 3 or any(x % size for x in sizes):
        return outputs // size, None
    return outputs // size, ((size, (sizes[0] + sizes[1]) // size), (1, sizes[2]))
