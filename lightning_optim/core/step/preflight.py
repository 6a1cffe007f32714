"""What precedes the first write of a step: ranks agree, gradients are finite, and they are clipped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.parallel import collectives, guard, sharding
from lightning_optim.core.parallel.replicas import Replicas
from lightning_optim.core.step.records import GroupStep, ParamStep
from lightning_optim.ops.lapack import failures

TOO_LARGE, NOT_FINITE = 1, 2
"""What is wrong with a gradient; the worse is the larger."""


def compare_groups(collective_guard: guard.CollectiveGuard, groups: Sequence[GroupStep], process_group: Any) -> None:
    """Check that all ranks that train together have the same groups.

    Args:
        collective_guard: of the optimizer.
        groups: of this step.
        process_group: of replicas, if any.

    Raises:
        RuntimeError: the groups differ; nothing was updated.
    """
    ranks = set(collectives.ranks_of(s.plan.param for group in groups for s in group.params))
    ranks.update(() if process_group is None else Replicas(process_group).ranks)
    if len(ranks) > 1:
        lines: list[str] = []
        for group in groups:
            lines.append(
                repr({k: v for k, v in group.group.items() if k not in ("params", "param_names", "role_sources")})
            )
            lines += [f"{s.plan.name} {tuple(s.plan.shape)}" for s in group.params]
        collective_guard.compare(sorted(ranks), lines)


def only_allocates(groups: Sequence[GroupStep], replicas: Replicas | None) -> bool:
    """Whether this is the dummy step by which torch.distributed.checkpoint makes an optimizer allocate its state.

    Args:
        groups: of this step.
        replicas: that share the work, if any.

    Returns:
        True if every lr is 0, every parameter has a gradient, and every gradient is 0.
    """
    if any(float(group.group["lr"]) != 0.0 for group in groups):
        return False
    steps = [s for group in groups for s in group.params]
    complete = bool(steps) and all(s.grad is not None for s in steps)
    moving = not complete or _largest([s.gradient() for s in steps]) != 0.0
    return not all_reduce_max([float(moving)], steps, replicas)[0]


def all_reduce_max(values: Sequence[float], steps: Sequence[ParamStep], replicas: Replicas | None) -> list[float]:
    """The largest of each value over all ranks that share parameters; no communication in a process that is alone.

    Args:
        values: of this rank.
        steps: the parameters concerned.
        replicas: that share the work, if any.

    Returns:
        The maxima, equal on every rank.
    """
    params = [s.plan.param for s in steps if s.plan.is_sharded]
    if replicas is None:
        return collectives.all_reduce_max(values, params) if params else list(values)
    return collectives.all_reduce_max(values, [s.plan.param for s in steps], replicas.group)


def gradients_usable(groups: Sequence[GroupStep], replicas: Replicas | None, *, compressing: bool) -> bool:
    """Check all gradients before anything is written; one synchronization if any group asks for it.

    Args:
        groups: of this step.
        replicas: that share the work, or reduce less than gradients; None if there are none.
        compressing: whether they reduce less than gradients.

    Returns:
        False if the step is to be skipped.

    Gradients that are finite, but whose squares overflow, are left out where the group asks to skip, and scaled down
    by `shrink` where it asks to raise.

    Raises:
        FloatingPointError: a gradient is not finite, and its group asks to raise.
        RuntimeError: a sparse gradient, or ranks that disagree on which parameters have a gradient.
    """
    asked: dict[str, list[tuple[ParamStep, bool]]] = {"raise": [], "skip": []}
    compared: list[ParamStep] = []
    for group in groups:
        policy, squared = group.group["on_nonfinite"], has_square_sums(group)
        for s in group.params:
            if s.grad is not None:
                if s.grad.layout != torch.strided:
                    raise RuntimeError(f"{s.plan.name}: sparse gradients are not supported; use sparse=False")
                if policy != "off":
                    asked[policy].append((s, squared))
        if compressing or policy != "off" or not group.rule.elementwise or group.plan.has_constraint:
            compared += group.params
    if not compared:
        return True
    raised, skipped = (float(unusable(some)) if some else 0.0 for some in asked.values())
    if replicas is not None or any(s.plan.is_sharded for s in compared):
        bits = float(guard.fingerprint(s.grad is not None for s in compared))
        raised, skipped, high, low = all_reduce_max([raised, skipped, bits, -bits], compared, replicas)
        if high != -low:
            raise RuntimeError("ranks disagree on which parameters have a gradient; nothing was updated")
    if raised == NOT_FINITE:
        names = [s.plan.name for s, _ in asked["raise"] if unusable([(s, False)])]
        raise FloatingPointError(
            f"gradient not finite: {', '.join(names[:5]) or 'on another rank'}; nothing was updated. "
            'on_nonfinite="skip" leaves such steps out'
        )
    if raised and not skipped:
        shrink([s for s, squared in asked["raise"] if squared], replicas)
    return not skipped


def shrink(steps: Sequence[ParamStep], replicas: Replicas | None) -> None:
    """Scale down gradients whose squares overflow, by a power of two each, and say so when the step is whole.

    Such a gradient (a norm above 1.8e19 in float32) would turn second moments, and for rules with whole matrices the
    weights, to infinity or NaN. Scaled, it leaves its direction, and the largest second moment that can be held.

    Args:
        steps: with a gradient; the same on every rank.
        replicas: that share the work, or reduce less than gradients; None if there are none.
    """
    tops = all_reduce_max([_largest([s.gradient()]) for s in steps], steps, replicas)
    shrunk = []
    for s, top in zip(steps, tops, strict=True):
        bound = torch.finfo(_dtype_of_squares(s)).max ** 0.5 / 16
        excess = top * math.sqrt(s.plan.shape.numel()) / bound
        if excess > 1:
            s.clip *= 2.0 ** -math.ceil(math.log2(excess))
            shrunk.append(s.plan.name)
    if shrunk:
        failures.add(
            "the gradient was so large that its squares overflow, and was scaled down (to a norm of about 1e18 in "
            "float32), which second moments remember for long; clip_norm, or the trainer's clipping, bounds gradients, "
            'and on_nonfinite="skip" leaves such steps out'
        )
        failures.name(shrunk)


def any_unusable(groups: Sequence[GroupStep], replicas: Replicas | None) -> bool:
    """Whether a step would be refused or left out, since some gradient on some rank cannot be used.

    Args:
        groups: of this step.
        replicas: that share the work, or reduce less than gradients; None if there are none.

    Returns:
        The same on every rank.
    """
    steps = [s for group in groups for s in group.params]
    present: list[tuple[ParamStep, bool]] = []
    for group in groups:
        squared = group.group["on_nonfinite"] == "skip" and has_square_sums(group)
        present += [(s, squared) for s in group.params if s.grad is not None and s.grad.layout == torch.strided]
    return bool(all_reduce_max([float(unusable(present))], steps, replicas)[0])


def unreduced_gradients(groups: Sequence[GroupStep]) -> list[Tensor]:
    """The gradients that rules do not reduce themselves where replicas reduce less than gradients.

    Args:
        groups: of this step.

    Returns:
        Gradients on this rank.
    """
    return [s.grad for group in groups for s in group.params if s.grad is not None and s.plan.replicas is None]


def has_square_sums(group: GroupStep) -> bool:
    """Whether a rule sums squares of a gradient as large as it is: if they overflow, its state is lost.

    Args:
        group: of this step.

    Returns:
        False for elementwise rules without a constraint, and for groups that clip.
    """
    return (not group.rule.elementwise or group.plan.has_constraint) and group.group["clip_norm"] is None


def unusable(steps: Sequence[tuple[ParamStep, bool]]) -> int:
    """Whether some gradient cannot be used; one synchronization per device, if all can.

    Args:
        steps: parameters with a gradient, and whether its squares have to be finite, too.

    Returns:
        0, `TOO_LARGE` or `NOT_FINITE`.
    """
    # a sum takes 0.7 of the time of the largest element, and is not finite where an element is not; a norm takes as
    # long as a sum out of memory, and overflows where the squares do. Those of float16 cannot
    sums: dict[torch.device, list[Tensor]] = {}
    norms: dict[tuple[torch.device, torch.dtype, int], list[Tensor]] = {}
    for s, squared in steps:
        g = s.gradient()
        if squared and g.dtype != torch.float16:
            key = g.device, _dtype_of_squares(s), sharding.num_shards(s.plan.param) if s.plan.is_sharded else 1
            norms.setdefault(key, []).append(torch.linalg.vector_norm(g).double())
        else:
            sums.setdefault(g.device, []).append(g.sum().double())
    bounded = [(torch.stack(x) < _largest_norm(dtype, ranks)).all() for (_, dtype, ranks), x in norms.items()]
    finite = [torch.stack(x).isfinite().all() for x in sums.values()]
    if all(_by_device([*finite, *bounded])):
        return 0
    if not math.isfinite(_largest([s.gradient() for s, _ in steps])):
        return NOT_FINITE
    return 0 if all(bounded) else TOO_LARGE


def _dtype_of_squares(step: ParamStep) -> torch.dtype:
    """The dtype in which a rule sums squares, or keeps them: narrow formats have the range of float32 at most."""
    return step.plan.compute_dtype if step.plan.is_compute_format else torch.float32


def _largest_norm(dtype: torch.dtype, ranks: int) -> float:
    """The norm from which on squares overflow; the parts of a tensor on other ranks may be as large."""
    return (torch.finfo(dtype).max / ranks) ** 0.5


def _by_device(flags: Sequence[Tensor]) -> Iterator[bool]:
    """Whether all flags on each device are set; one synchronization per device."""
    for device in dict.fromkeys([flag.device for flag in flags]):
        yield bool(torch.stack([flag for flag in flags if flag.device == device]).all())


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest absolute value, NaN if there is one; one synchronization per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        if t.numel():  # aminmax is 20 times faster than an infinity norm
            by_device.setdefault(t.device, []).append(torch.stack(t.aminmax()).abs().double())
    largest = [torch.cat(ends).max().item() for ends in by_device.values()]
    return math.nan if any(math.isnan(x) for x in largest) else max(largest, default=0.0)


def clip_gradients(groups: Sequence[GroupStep]) -> None:
    """Find the factor of every group that clips, by torch's formula; one synchronization if any does.

    Args:
        groups: of this step.
    """
    asked = [group for group in groups if group.group["clip_norm"] is not None]
    if not asked:
        return
    pairs = [[(s.plan.param, None if s.grad is None else s.gradient()) for s in group.params] for group in asked]
    for group, norm in zip(asked, collectives.total_norms(pairs), strict=True):
        scale = group.group["clip_norm"] / (norm + 1e-6)
        for s in group.params:
            s.clip = 1.0 if scale >= 1 else scale
