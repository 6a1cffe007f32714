"""What every rank of a mesh will hold, send and work on, before there is a mesh."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor

from lightning_optim.core.parallel import stack_sharding
from lightning_optim.core.parallel.hypothetical_mesh import rows_over
from lightning_optim.core.parallel.ownership import assign_owners
from lightning_optim.core.parallel.sharding import Sharding
from lightning_optim.core.param_groups import blocks_of, rule_of
from lightning_optim.core.rule import Rule
from lightning_optim.core.state import formats
from lightning_optim.core.state.formats import StateFormat
from lightning_optim.core.step.plan import state_formats, step_cost
from lightning_optim.core.step.stacked import needs_param

if TYPE_CHECKING:
    from lightning_optim.core.optimizer import RuleOptimizer


Strategy = Literal["ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3"]


@dataclass(frozen=True)
class MeshEstimate:
    """What falls on each rank of one team: all ranks, or those of one replica under HSDP."""

    strategy: Strategy
    world_size: int
    state: list[int]
    """Bytes of state by rank."""
    sent: list[int]
    """Bytes of gradients, parameters and directions that each rank sends in a step. It receives as many, but for what
    unequal shards make of it."""
    summed: int
    """Bytes of row or column sums that are added up over the ranks in a step, about."""
    work: list[float] = field(default_factory=list)
    """Of whole-matrix rules by rank, see `step_cost`; empty where nothing is shared out."""
    largest: float = 0.0
    """Of one parameter: no way to share out the work gives every rank less than this."""
    held: Mapping[str, list[int]] = field(default_factory=dict)
    """Under ZeRO, bytes by rank of weights, gradients and masters; DeepSpeed's buckets come on top."""

    @property
    def imbalance(self) -> float:
        """The most work on a rank over the mean; 1 where nothing is shared out."""
        return max(self.work) * len(self.work) / sum(self.work) if sum(self.work) else 1.0

    @property
    def bound(self) -> float:
        """What the imbalance cannot be below: 1, or that of the largest parameter."""
        return max(1.0, self.largest * len(self.work) / sum(self.work)) if sum(self.work) else 1.0


class Travelling(NamedTuple):
    """A parameter whose matrices one rank steps."""

    rule: Rule
    group: Mapping[str, Any]
    p: Tensor
    parts: Sequence[Any]
    forms: Mapping[str, StateFormat]
    volumes: Sequence[int] | None
    """Elements by rank; None where every rank has all."""


def estimate_mesh(
    optimizer: RuleOptimizer,
    strategy: Strategy,
    world_size: int,
    *,
    node_size: int = 8,
    shard_work: bool = False,
) -> MeshEstimate:
    """Say what falls on each rank.

    Args:
        optimizer: of the whole model, on any device; the meta device will do.
        strategy: `"ddp"`; `"fsdp2"`, rows over all ranks; or `"hsdp"`, rows over the ranks of a node. For ZeRO see
            `lightning_optim.build.zero_estimate`.
        world_size: number of ranks.
        node_size: ranks of a node.
        shard_work: under DDP, whether replicas share out the work (`RuleOptimizer.shard_work`).

    Returns:
        The numbers.

    Raises:
        ValueError: ranks that do not make whole nodes.
    """
    size = node_size if strategy == "hsdp" else world_size
    if world_size < 1 or size < 1 or world_size % size:
        raise ValueError(f"{strategy}: {world_size} ranks are not a multiple of a node's {size}")
    cut = None if strategy == "ddp" else rows_over(size)
    state, sent, summed = [0] * size, [0] * size, 0
    travelling: list[Travelling] = []
    for group in optimizer.param_groups:
        rule = rule_of(group)
        for p in group["params"]:
            parts, is_transposed = blocks_of(rule, group, p.shape)
            forms = state_formats(rule, group, p, parts)
            extra_bytes = p.dtype.itemsize if formats.compensated(p.dtype, group) else 0
            if optimizer.averages is not None:
                extra_bytes += formats.compute_dtype_of(p.dtype).itemsize * len(optimizer.averages.keys)
            radii = sum(part.dims[0] for part in parts) if formats.keeps_radius(p.dtype, group) else 0
            for r, volume in enumerate(_volumes(cut, p.shape, size)):
                state[r] += formats.STEP_DTYPE.itemsize + 4 * radii + extra_bytes * volume
            axes = (
                stack_sharding.axes_of(p, cut, parts[0].dims, is_transposed) if cut is not None and rule.reduces else ()
            )
            whole = parts[0].rows is None and len(parts) == 1
            if cut is None:
                travels = shard_work and not rule.elementwise and not rule.reduces
            else:
                travels = not rule.elementwise and not (rule.reduces and axes is not None and whole)
            if travels:
                volumes = None if cut is None else _volumes(cut, p.shape, size)
                travelling.append(Travelling(rule, group, p, parts, forms, volumes))
                continue
            for form in forms.values():
                cut_form = (
                    cut
                    if rule.elementwise
                    else stack_sharding.stored_sharding(cut, axes or (), form.spec, len(form.shape))
                )
                for r, size_on_rank in enumerate(_bytes(cut_form, form, size)):
                    state[r] += size_on_rank
                summed += 4 * math.prod(form.shape) if cut is not None and cut_form is None else 0
    work, largest = share_out(travelling, state, sent)
    return MeshEstimate(strategy, world_size, state, sent, summed, work, largest)


def share_out(travelling: Sequence[Travelling], state: list[int], sent: list[int]) -> tuple[list[float], float]:
    """Give matrices owners, as a run does.

    Args:
        travelling: in the order of the groups.
        state: bytes by rank, to which theirs are added.
        sent: bytes by rank, to which theirs are added.

    Returns:
        Work by rank and the largest of one parameter; nothing where there are no matrices.
    """
    work, costs = [0.0] * len(state), [step_cost(x.parts) for x in travelling]
    for x, owner in zip(travelling, assign_owners(costs, work), strict=True):
        state[owner] += sum(form.nbytes for form in x.forms.values())
        wide = formats.compute_dtype_of(x.p.dtype).itemsize
        there, back = (2, 2) if x.group["comm_dtype"] == "bf16" else (x.p.dtype.itemsize, wide)
        there += x.p.dtype.itemsize if needs_param(x.rule) else 0
        if x.volumes is None:  # a broadcast leaves its source once for every other rank, or fewer times, on a tree
            sent[owner] += x.p.numel() * back * (len(state) - 1)
            continue
        for r, volume in enumerate(x.volumes):
            sent[r] += 0 if r == owner else volume * there
            sent[owner] += 0 if r == owner else volume * back
    return (work if travelling else []), max(costs, default=0.0)


def _volumes(cut: Sharding | None, shape: torch.Size, size: int) -> list[int]:
    """Elements of a tensor on every rank."""
    if cut is None:
        return [math.prod(shape)] * size
    row = math.prod(shape[1:])
    return [row * (end - first) for first, end in (cut.shard_slices(shape[:1], r)[0] for r in range(size))]


def _bytes(cut: Sharding | None, form: StateFormat, size: int) -> list[int]:
    """Bytes of a slot on every rank, scales included."""
    volumes = _volumes(cut, torch.Size(form.shape), size)
    if not form.is_quantized:
        return [n * form.dtype.itemsize for n in volumes]
    out, start = [], 0
    for n in volumes:
        first, end = start // form.block, -(-(start + n) // form.block)
        out.append(n * form.dtype.itemsize + (4 * (end - first) if n else 0))
        start += n if cut is not None else 0
    return out
