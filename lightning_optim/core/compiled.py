"""Steps as compiled graphs: update and write of a parameter in as few passes over memory as the rule's sums allow.

There is one graph per rule and its settings. Sizes, the number of the step, the learning rate and the weight decay are
open: schedules, and parameters of other sizes, compile nothing anew. Taken are large parameters in the dtype of the
arithmetic; narrow weights, small tensors and matrices whose shards a rule would have to sum over step as without.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from lightning_optim.core import chunks, constraint
from lightning_optim.core.rule import Rule
from lightning_optim.ops.kernels.graphs import Compiled, compiled

EXAMPLE = (5, 1021, 769)
"""Matrices, rows and columns while a graph is made, where they are not one: large, for Inductor shares the work of
small ones out to no threads, and all different, for what is equal then stays so."""
MOST = 2**31
"""Elements from which on indices may not fit into what a graph counts in."""
VARIANTS = 16
"""Graphs of one rule, for parameters of one kind, after which a setting must be what changes from step to step."""

_made: Counter[Any] = Counter()


class Kind(NamedTuple):
    """What parameters of one graph have in common."""

    dtype: torch.dtype
    device: str
    stacked: bool = False
    """More than one matrix, for a rule that reduces."""
    turned: bool = False
    """The matrices are stored columns x rows."""


def refusal(rule: Rule, group: Mapping[str, Any]) -> str | None:
    """Why a group cannot be stepped by graphs.

    Args:
        rule: of the group.
        group: its settings.

    Returns:
        The end of a message with the remedy, or None.
    """
    if not (rule.elementwise or rule.reduces):
        return "works on whole matrices, whose products are no faster in a graph; leave compile out"
    if getattr(rule, "momentum_kernel", None) is not None:
        return "has several momenta, whose weights change from step to step; momentum_kernel=None or compile=False"
    if constraint.shapes_step(group) or group["cautious_decay"]:
        wants = [*constraint.OPTIONS, "cautious_decay"]
        return f"is given one of {', '.join(wants)}, which need a whole direction; leave them or compile out"
    if group["state_storage"] not in ("fp32", "host"):
        return f"keeps its state as {group['state_storage']!r}; state_storage='fp32' or compile=False"
    return None


def check(rule: Rule, group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
    """Make the graphs of a group, so that whatever is missing is found before training.

    Args:
        rule: of the group.
        group: its settings.
        params: its parameters.

    Raises:
        ValueError: a rule or setting without a graph, or a machine without a compiler.
    """
    said = f"group {group['name']!r}: compile=True, but {rule.name}"
    if (reason := refusal(rule, group)) is not None:
        raise ValueError(f"{said} {reason}")
    kinds = {kind_of(rule, group, p) for p in params if p.device.type != "meta"} - {None}
    for kind in kinds if type(rule).kernel is Rule.kernel or rule.reduces else ():
        try:
            _graph(_open(rule), cast("Kind", kind), torch.get_num_threads())
        except Exception as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"{said} cannot be compiled here: {text[0]}. On a CPU torch needs a C++ compiler (install g++, or name "
                "one in the environment variable CXX); compile=False does without"
            ) from error


def kind_of(rule: Rule, group: Mapping[str, Any], p: Tensor, dims: chunks.Dims | None = None) -> Kind | None:
    """Which graph a parameter takes.

    Args:
        rule: of the group.
        group: its settings.
        p: the parameter, or this rank's part of it.
        dims: as a stack of matrices, if known.

    Returns:
        None where it is stepped without.
    """
    large = p.numel() >= chunks.STACK_LIMIT if rule.reduces else p.numel() > chunks.SMALL
    if not large or p.numel() >= MOST or p.dtype not in (torch.float32, torch.float64):
        return None
    if rule.elementwise:
        return Kind(p.dtype, p.device.type)
    if p.ndim < 2 or group.get("role") == "vector":
        return None
    b, m, n = dims or chunks.matrix_dims(p.shape, conv=not rule.last_two, transposed=group["transposed"])
    turned = group["transposed"] and 2 <= p.ndim <= 3
    return Kind(p.dtype, p.device.type, b > 1, turned) if min(m, n) > 1 and not (b > 1 and turned) else None


def step(rule: Rule, kind: Kind, p: Tensor, g: Tensor, state: Mapping[str, Tensor], t: int, size: float) -> None:
    """Take the step of one parameter.

    Args:
        rule: with the group's settings.
        kind: of the parameter.
        p: the parameter, flat or as a stack of matrices; written.
        g: its gradient, likewise.
        state: by slot, likewise; written.
        t: number of the step.
        size: what the direction is multiplied by.
    """
    graph = _graph(_open(rule), kind, torch.get_num_threads())
    graph([p, g, *state.values()], [float(t), size, 1 - rule.lr * rule.weight_decay, rule.lr])


def _open(rule: Rule) -> Rule:
    """The rule without what is given to its graph at every step."""
    fixed = {k: tuple(v) for k, v in vars(rule).items() if isinstance(v, list)}
    decays = float(rule.weight_decay != 0) if rule.decay in ("before", "after") else rule.weight_decay
    return replace(cast("Any", rule), **fixed, lr=0.0, weight_decay=decays)


@functools.cache
def _graph(rule: Rule, kind: Kind, threads: int) -> Compiled:
    """Update and write of one parameter."""
    _made[type(rule), kind, threads] += 1
    if _made[type(rule), kind, threads] > VARIANTS:
        raise RuntimeError(
            f"{rule.name}: compile=True, and a setting other than lr and weight_decay keeps changing; every value "
            "takes a graph of its own. Leave it as it is, or give compile=False"
        )
    b, m, n = (EXAMPLE[0] if kind.stacked else 1, *EXAMPLE[1:])
    slots = rule.declared(m, n)
    shapes = [(b, m, n), (b, m, n), *((b, *slot.shape(m, n)) for slot in slots.values())]
    if rule.elementwise:
        shapes = [(m * n,)] * len(shapes)
    made = [torch.empty(s, dtype=kind.dtype, device=kind.device) for s in shapes]
    full = [x.shape == made[0].shape for x in made]
    examples = [x.mT.contiguous().mT if kind.turned and whole else x for x, whole in zip(made, full, strict=True)]

    def update(p: Tensor, g: Tensor, *rest: Tensor) -> None:
        held, (t, size, keep, lr) = rest[:-4], rest[-4:]
        own = replace(cast("Any", rule), lr=lr)
        if rule.decay == "coupled" and rule.weight_decay:
            g = g.add(p, alpha=rule.weight_decay)
        s = SimpleNamespace(**dict(zip(slots, held, strict=True)), vector=False, vote=torch.sign, mean=_as_is)
        d = own.update(g, s, p if rule.reads_param else None, t)
        d = d if isinstance(d, Tensor) else d(slice(0, p.shape[-2]))
        if rule.decay == "before" and rule.weight_decay:
            p.mul_(keep)
        p.sub_(d * size)
        if rule.decay == "after" and rule.weight_decay:
            p.mul_(keep)
        after, known = [getattr(s, key) for key in slots], {id(x) for x in held}
        after = [x.clone() if id(x) in known and x is not h else x for x, h in zip(after, held, strict=True)]
        for before, value in zip(held, after, strict=True):
            if value is not before:
                before.copy_(value)

    return compiled(update, examples, 4)


def _as_is(x: Tensor) -> Tensor:
    return x
