"""State that no longer fits its parameter is refused before any kernel runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

from torch import Tensor

from lightning_optim.core.parallel import sharding
from lightning_optim.core.rule import Rule
from lightning_optim.core.state.formats import COMPENSATION, RADIUS, TRAINED, scale_key
from lightning_optim.core.state.quantized_view import num_scales
from lightning_optim.core.step.records import GroupStep, ParamStep
from lightning_optim.core.step.stacks import first_index


def validate_shapes(groups: Sequence[GroupStep], averages: Sequence[str]) -> None:
    """Check that every parameter still has the shape of its state.

    Args:
        groups: of this step.
        averages: keys of the state of averaging methods.

    Raises:
        RuntimeError: a parameter was resized in place; the message names it, both shapes and what to do.
    """
    for group in groups:
        for s in group.params:
            if s.plan.stored is None and s.state:
                _check(group.rule, s, averages)


def note_complete(step: ParamStep) -> None:
    """Note that the state of a parameter is complete: from now on its shapes and dtypes are compared only.

    Args:
        step: the parameter.
    """
    tensors = [(key, t) for key, t in step.state.items() if isinstance(t, Tensor) and key != TRAINED]
    step.plan.stored = tuple([(key, t.shape, t.dtype) for key, t in tensors])


def _check(rule: Rule, step: ParamStep, averages: Sequence[str]) -> None:
    """Check the state of one parameter.

    On ranks that keep no values of a parameter, empty tensors have the shape of what the owner keeps, so that all ranks
    come to the same answer.
    """
    plan, missing = step.plan, ""
    for key, fmt in plan.formats.items():
        stored = step.state.get(key)
        if stored is None:
            missing = key
        elif stored.shape != fmt.shape and stored.shape != (0, *fmt.shape):
            _refuse_resized(step, key, stored.shape, fmt.shape)
        elif fmt.is_quantized and stored.dtype == fmt.dtype:
            _check_scales(rule, step, key)
    for key in _foreign(step, averages) if missing and step.state.get("step") else ():
        _refuse_resized(step, key, step.state[key].shape, plan.formats[missing].shape, missing)
    for key in (COMPENSATION, TRAINED, *averages):
        stored = step.state.get(key)
        if stored is not None and stored.shape != plan.shape:
            _refuse_resized(step, key, stored.shape, plan.shape)
    radius, count = step.state.get(RADIUS), sum(block.dims[0] for block in plan.blocks)
    if radius is not None and radius.numel() != count:
        _refuse_resized(step, RADIUS, radius.shape, (count,))


def _check_scales(rule: Rule, step: ParamStep, key: str) -> None:
    """Check that the scales of a quantized state tensor belong to its values."""
    fmt, quantized, scale = step.plan.formats[key], sharding.local(step.state[key]), step.state.get(scale_key(key))
    count = num_scales(fmt, quantized, first_index(rule, step.plan, fmt))
    if scale is not None and sharding.local(scale).numel() != count:
        raise RuntimeError(f"{step.plan.name}: storage_block was changed while there is {key!r}; set it as it was")


def _foreign(step: ParamStep, averages: Sequence[str]) -> list[str]:
    """State tensors of a parameter that its rule would not declare for the present shape."""
    fmts = step.plan.formats
    declared = {"step", COMPENSATION, RADIUS, TRAINED, *fmts, *map(scale_key, fmts), *averages}
    return [key for key, stored in step.state.items() if key not in declared and isinstance(stored, Tensor)]


def _refuse_resized(
    step: ParamStep, key: str, stored: Sequence[int], expected: Sequence[int], missing: str = ""
) -> NoReturn:
    """Refuse a parameter whose state has another shape.

    Raises:
        RuntimeError: always.
    """
    whole = tuple(stored)[1:] if len(stored) and stored[0] == 0 else tuple(stored)
    wanted = f"{missing!r} {tuple(expected)}" if missing else tuple(expected)
    raise RuntimeError(
        f"{step.plan.name} has shape {tuple(step.plan.shape)}, and its state is that of another shape: {key!r} has "
        f"{whole}, expected {wanted}; nothing was updated. The parameter was resized in place, as "
        "resize_token_embeddings does, or a setting that shapes the state (rank, blocks) was changed. Resize before "
        "the first step, build a new optimizer afterwards, or start this parameter's state again by "
        "optimizer.state.pop(parameter), on every rank"
    )
