"""What a parameter is by what a watched forward pass did with it."""

from __future__ import annotations

import math
from dataclasses import replace

from torch import Tensor

from lightning_optim.build.dataflow import WeightFacts
from lightning_optim.build.param_role import ParamRole, Role, by_head


def measured(trait: ParamRole, p: Tensor, facts: WeightFacts | None) -> ParamRole:
    """What a parameter is by a forward pass.

    Args:
        trait: what it is otherwise.
        p: the parameter, of two or more dimensions.
        facts: of the pass, None if it was not watched.

    Returns:
        The trait, or another with `source="measured"`.
    """
    if facts is None or not facts.kinds or trait.role.startswith("lora"):
        return trait
    if "embedding" in facts.kinds:
        return _with(trait, "embedding", "rows are looked up", transposed=False)
    if facts.is_head:
        return _with(trait, "head", "nothing with weights comes after it", transposed=_is_transposed(trait, facts))
    if facts.is_router:
        return _with(trait, "router", "something is chosen by its outputs", transposed=_is_transposed(trait, facts))
    if "matmul" in facts.kinds:
        return _stack(trait, p, facts) if p.ndim > 2 else _matrix(trait, p, facts)
    if "conv" in facts.kinds and trait.role == "other":
        return _with(trait, "conv", "kernel of a convolution")
    return trait


def _with(trait: ParamRole, role: Role, reason: str, *, transposed: bool = False) -> ParamRole:
    """A measured role; where structure says the same, its words stay."""
    reason = trait.reason if trait.role == role else reason
    return ParamRole(role, reason, transposed, source="measured")


def _is_transposed(trait: ParamRole, facts: WeightFacts) -> bool:
    """How a weight is stored: a known layer's as its class does, else as it is contracted."""
    known = trait.source == "structure" and trait.role not in ("experts", "other")
    return next(iter(facts.transposed)) if not known and len(facts.transposed) == 1 else trait.transposed


def _matrix(trait: ParamRole, p: Tensor, facts: WeightFacts) -> ParamRole:
    """A parameter of two dimensions that is one factor of a product."""
    is_transposed, cut = _is_transposed(trait, facts), facts.cut()
    outputs = p.shape[1 if is_transposed else 0]
    three = cut == 3 or (isinstance(cut, tuple) and len(cut) == 3)
    if three and (facts.attends or trait.role == "qkv"):
        size = outputs // trait.heads if trait.heads else facts.head_size
        heads, heads_cut = by_head(cut, outputs, size)
        reason = trait.reason.removesuffix(", in an order that is not known")
        reason = reason if trait.role == "qkv" else "queries, keys and values are read from it"
        return ParamRole("qkv", reason, is_transposed, cut, heads, heads_cut, source="measured")
    if cut in (2, (1, 1)) and facts.gates and trait.role in ("hidden", "gate_up", "other"):
        reason = trait.reason if trait.role == "gate_up" else "one half of its outputs is multiplied with the other"
        return ParamRole("gate_up", reason, is_transposed, cut, source="measured")
    if trait.role == "head":
        return ParamRole("hidden", "not the model's output", is_transposed, source="measured")
    if trait.role != "other":
        return trait if trait.role != "hidden" else replace(trait, transposed=is_transposed, source="measured")
    whole = {(p.shape[0], p.shape[1]), (p.shape[1], p.shape[0])}
    if facts.products <= whole and not facts.is_indexed:
        return ParamRole("hidden", "a factor of a product", is_transposed, source="measured")
    return _experts_in_one(trait, p, facts, transposed=is_transposed)


def _experts_in_one(trait: ParamRole, p: Tensor, facts: WeightFacts, *, transposed: bool) -> ParamRole:
    """A parameter of two dimensions of which only parts are factors of products: the matrices of experts."""
    outputs, inputs = reversed(p.shape) if transposed else p.shape
    if facts.is_indexed or facts.is_batched or len(facts.products) != 1:
        return trait
    rows, columns = next(iter(facts.products))
    if columns == inputs and rows < outputs and outputs % rows == 0:
        return ParamRole(
            "experts", "one block of its outputs is used at a time", transposed, outputs // rows, source="measured"
        )
    if rows == outputs and columns < inputs and inputs % columns == 0:
        blocks = -(inputs // columns)
        return ParamRole("experts", "one block of its inputs is used at a time", transposed, blocks, source="measured")
    return trait


def _stack(trait: ParamRole, p: Tensor, facts: WeightFacts) -> ParamRole:
    """A parameter of three dimensions or more that is a factor of products."""
    sides = tuple(p.shape[-2:])
    if trait.role not in ("experts", "other") or p.ndim != 3 or not facts.products <= {sides, sides[::-1]}:
        return trait
    if math.prod(p.shape[:-2]) < 2:
        return trait
    cut = facts.cut()
    blocks = cut if facts.gates and cut in (2, (1, 1)) else trait.blocks
    is_known = blocks is not None or not facts.gates
    reason = trait.reason.removesuffix(", gate and up in an order that is not known") if is_known else trait.reason
    reason = reason if trait.role == "experts" else "a matrix for each expert"
    return ParamRole("experts", reason, _is_transposed(trait, facts), blocks, source="measured")
