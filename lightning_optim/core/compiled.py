"""Steps as compiled graphs: one pass over memory where the operations of a rule, one by one, take several.

There is one graph per rule and its settings. Sizes, the number of the step and the learning rate are open: a
schedule, and parameters of other sizes, compile nothing anew. Taken are parameters in the dtype of the arithmetic whose
tensors are large and lie in memory in one order, with state as float32 on the same device; all else steps as without.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor

from lightning_optim.core import chunks
from lightning_optim.core.rule import Rule

Step = Callable[[Tensor, Tensor, list[Tensor], Tensor, Tensor, Tensor], None]


class _State:
    """A namespace that can be traced, as SimpleNamespace cannot."""

    vector: bool
    vote: Callable[[Tensor], Tensor]


@functools.lru_cache
def _graph(rule: Rule, keys: tuple[str, ...]) -> Step:
    """Update and write of one parameter."""

    def step(p: Tensor, g: Tensor, held: list[Tensor], t: Tensor, size: Tensor, keep: Tensor) -> None:
        if rule.decay == "coupled" and rule.weight_decay:
            g = g.add(p, alpha=rule.weight_decay)
        s = _State()
        s.vector, s.vote = False, torch.sign
        for key, tensor in zip(keys, held, strict=True):
            setattr(s, key, tensor)
        d = rule.update(g, cast("Any", s), p if rule.reads_param else None, cast("Any", t))
        d = d if isinstance(d, Tensor) else d(slice(0, p.shape[-2]))
        left = [getattr(s, key) for key in keys]
        for before, after in zip(held, left, strict=True):
            if after is not before:
                before.copy_(after)
        if rule.decay == "before" and rule.weight_decay:
            p.mul_(keep)
        p.sub_(d * size)
        if rule.decay == "after" and rule.weight_decay:
            p.mul_(keep)

    return torch.compile(step, dynamic=True, fullgraph=True)


def takes(rule: Rule, tensors: Sequence[Tensor]) -> bool:
    """Whether a parameter can be stepped by a graph.

    Args:
        rule: of the group.
        tensors: the parameter, or this rank's part of it, its gradient, and its state.

    Returns:
        False where the step is taken without.
    """
    p = tensors[0]
    plain = all(x.dtype == p.dtype and x.device == p.device and x.is_contiguous() for x in tensors)
    return rule.compiles and (rule.elementwise or rule.reduces) and p.ndim > 1 and p.numel() > chunks.SMALL and plain


def step(rule: Rule, p: Tensor, g: Tensor, state: dict[str, Tensor], t: int, size: float) -> None:
    """Take the step of one parameter.

    Args:
        rule: with the group's settings.
        p: the parameter, flat or as a stack of matrices; written.
        g: its gradient, likewise.
        state: by slot, likewise; written.
        t: number of the step.
        size: what the direction is multiplied by.
    """
    still = replace(rule, **{k: tuple(v) for k, v in vars(rule).items() if isinstance(v, list)}, lr=0.0)
    numbers = (torch.tensor(x, dtype=torch.float64) for x in (t, size, 1 - rule.lr * rule.weight_decay))
    _graph(still, tuple(state))(p, g, list(state.values()), *numbers)
