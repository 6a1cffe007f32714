"""What every rank will hold and send under DeepSpeed ZeRO, before there is one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import nn

from lightning_optim.build.mesh_estimate import MeshEstimate, Strategy, Travelling, share_out
from lightning_optim.core.parallel.flat_parameters import check_fragments, needs_parameters
from lightning_optim.core.param_groups import blocks_of, rule_of
from lightning_optim.core.state import formats
from lightning_optim.core.step.plan import state_formats

if TYPE_CHECKING:
    from lightning_optim.core.optimizer import RuleOptimizer

MASTER = torch.float32
"""DeepSpeed keeps a copy of the weights that a rank steps in this dtype, whatever theirs is."""
ALIGNMENT = 2
"""ZeRO-1 and 2 pad the flat tensor of a group to a multiple of this many elements per rank."""


def estimate_zero(optimizer: RuleOptimizer, model: nn.Module, strategy: Strategy, world_size: int) -> MeshEstimate:
    """Say what falls on each rank, without offload and with sub-groups that hold whole groups.

    Args:
        optimizer: of the whole model, on any device; the meta device will do.
        model: the model, whose frozen parameters take memory, too.
        strategy: `"zero1"`, `"zero2"` or `"zero3"`.
        world_size: number of ranks.

    Returns:
        The numbers. Gradients are those of one backward pass, in the dtype of the weights.

    Raises:
        ValueError: no rank, or a rule or an option that does not work under ZeRO.
    """
    if world_size < 1:
        raise ValueError(f"{strategy}: world_size must be at least 1, got {world_size}")
    ranks, stage = range(world_size), int(strategy[-1])
    state, sent, masters, gradients = ([0] * world_size for _ in range(4))
    travelling: list[Travelling] = []
    for group in optimizer.param_groups:
        params, rule = [p for p in group["params"] if p.requires_grad], rule_of(group)
        runs, length = _elements_by_rank([p.numel() for p in params], stage, world_size)
        has_fragments = needs_parameters(type(rule), group, MASTER)
        check_fragments(group, (), has_fragments=has_fragments)
        width = params[0].dtype.itemsize if params else 0
        for r in ranks:
            masters[r] += length * MASTER.itemsize
            gradients[r] += width * (sum(p.numel() for p in params) if stage == 1 else length)
        shapes = [p.shape for p in params]
        if not has_fragments:
            shapes, runs = [torch.Size([length])] * bool(params), [[length] * world_size]
        for shape, volumes in zip(shapes, runs, strict=False):
            p = torch.empty(shape, dtype=MASTER, device="meta")
            parts, _ = blocks_of(rule, group, shape)
            forms = state_formats(rule, group, p, parts)
            radii = sum(part.dims[0] for part in parts) if formats.keeps_radius(MASTER, group) else 0
            for r in ranks:
                state[r] += formats.STEP_DTYPE.itemsize + 4 * radii
                if rule.elementwise:
                    state[r] += volumes[r] * sum(form.dtype.itemsize for form in forms.values())
            if not rule.elementwise:
                travelling.append(Travelling(rule, group, p, parts, forms, volumes))
    work, largest = share_out(travelling, state, sent)
    parts_of = world_size if stage == 3 else 1
    weights = sum(-(-p.numel() // parts_of) * p.dtype.itemsize for p in model.parameters())
    held = {"weights": [weights] * world_size, "gradients": gradients, "masters": masters}
    return MeshEstimate(strategy, world_size, state, sent, 0, work, largest, held)


def _elements_by_rank(sizes: Sequence[int], stage: int, world_size: int) -> tuple[list[list[int]], int]:
    """Where DeepSpeed places the parameters of a group.

    Args:
        sizes: elements of each.
        stage: of ZeRO.
        world_size: number of ranks.

    Returns:
        Elements of each parameter by rank, and of the flat tensor of each rank, padding included.
    """
    ranks = range(world_size)
    if stage == 3:  # a share of every parameter
        shares = [-(-size // world_size) for size in sizes]
        runs = [
            [min(share, max(0, size - r * share)) for r in ranks] for size, share in zip(sizes, shares, strict=True)
        ]
        return runs, sum(shares)
    multiple = ALIGNMENT * world_size  # a share of all of them, one after the other
    length, start, runs = -(-sum(sizes) // multiple) * ALIGNMENT, 0, []
    for size in sizes:
        runs.append([max(0, min(start + size, (r + 1) * length) - max(start, r * length)) for r in ranks])
        start += size
    return runs, length
