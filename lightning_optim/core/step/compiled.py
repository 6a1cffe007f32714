"""Steps as compiled graphs: update and write of a parameter in as few passes over memory as the rule's sums allow.

There is one graph per rule and its settings. Sizes, the number of the step, the learning rate and the weight decay are
open: schedules, and parameters of other sizes, compile nothing again. Graphs step large parameters in the dtype of the
arithmetic; narrow weights, small tensors and matrices whose shards a rule would have to sum over take ordinary steps.

Quantized state is dequantized, updated and requantized inside the graph, in whole blocks of scales and in pieces: a
block is passed over twice, since its scale must be known before its values, and a piece stays in cache in between.
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

from lightning_optim.core import matrix_views, options
from lightning_optim.core.rule import Rule
from lightning_optim.core.state import formats
from lightning_optim.core.state.formats import CODES, StateFormat, Storage, scale_key
from lightning_optim.core.state.quantized_view import num_scales
from lightning_optim.core.step.records import GroupStep, ParamStep
from lightning_optim.core.step.stacks import first_index
from lightning_optim.ops import quantize
from lightning_optim.ops.kernels.graphs import Compiled, compiled

EXAMPLE = (5, 1021, 769)
"""Matrices, rows and columns while a graph is made, where they are not one: large, for Inductor shares the work of
small ones out to no threads, and all different, for what is equal then stays so."""
MOST = 2**31
"""Elements from which on indices may not fit into what a graph counts in."""
PIECE = 2**18
"""Elements that a graph with codes works on at a time, on a CPU, so that what it keeps of a block stays in cache."""
VARIANTS = 16
"""Graphs of one rule, for parameters of one kind, after which a setting must be what changes from step to step."""

_made: Counter[Any] = Counter()
_recent: tuple[Rule | None, dict[Any, Compiled]] = None, {}
"""The rule of the last call, and its graphs."""


class Kind(NamedTuple):
    """What parameters of one graph have in common."""

    dtype: torch.dtype
    device: str
    stacked: bool = False
    """More than one matrix, for a rule that reduces."""
    is_transposed: bool = False
    """The matrices are stored columns x rows."""
    storage: tuple[Storage, ...] = ()
    """How each state tensor is stored, where any is quantized; `"fp32"` for those that are not."""
    block: int = 0
    """Elements per scale of quantized state."""


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
    if options.has_constraint(group) or group["cautious_decay"]:
        wants = [*options.CONSTRAINTS, "cautious_decay"]
        return f"is given one of {', '.join(wants)}, which need a whole direction; leave them or compile out"
    if group["state_storage"] == "bf16" or (rule.reduces and group["state_storage"] in CODES):
        return f"keeps its state as {group['state_storage']!r}; state_storage='fp32' or compile=False"
    return None


def validate_compile(rule: Rule, group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
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
    found = [kind_of(rule, group, p) for p in params if p.device.type != "meta"]
    kinds = {kind for kind in found if kind is not None}
    alone = type(rule).kernel is Rule.kernel or rule.reduces
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    for kind in [kind for kind in kinds if alone or kind.storage]:
        try:
            _graph_of(rule, kind)
        except GuardOnDataDependentSymNode as error:
            raise ValueError(f"{said} asks for the step or a rate, which a graph leaves open; compile=False") from error
        except Exception as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"{said} cannot be compiled here: {text[0]}. On a CPU torch needs a C++ compiler (install g++, or name "
                "one in the environment variable CXX); compile=False does without"
            ) from error


def kind_of(
    rule: Rule,
    group: Mapping[str, Any],
    p: Tensor,
    dims: matrix_views.StackShape | None = None,
    fmts: Sequence[StateFormat] | None = None,
) -> Kind | None:
    """Which graph a parameter takes.

    Args:
        rule: of the group.
        group: its settings.
        p: the parameter, or this rank's part of it.
        dims: as a stack of matrices, if known.
        fmts: storage formats of its state, if known.

    Returns:
        None where it is stepped without.
    """
    large = p.numel() >= matrix_views.STACK_LIMIT if rule.reduces else p.numel() > matrix_views.SMALL
    if not large or p.numel() >= MOST or p.dtype not in (torch.float32, torch.float64):
        return None
    if rule.elementwise:
        storage = _storage(rule, group, p, fmts) if group["state_storage"] in CODES else ()
        if storage and p.dtype != torch.float32:
            return None
        return Kind(p.dtype, str(p.device), storage=storage, block=group["storage_block"] if storage else 0)
    if p.ndim < 2 or group.get("role") == "vector":
        return None
    b, m, n = dims or matrix_views.stack_shape(p.shape, conv=not rule.last_two, transposed=group["transposed"])
    turned = group["transposed"] and 2 <= p.ndim <= 3
    return Kind(p.dtype, str(p.device), b > 1, turned) if min(m, n) > 1 and not (b > 1 and turned) else None


def _storage(
    rule: Rule, group: Mapping[str, Any], p: Tensor, forms: Sequence[StateFormat] | None
) -> tuple[Storage, ...]:
    """`Kind.storage` of a parameter of an elementwise rule."""
    if forms is None:
        dims = matrix_views.stack_shape(p.shape)
        slots = rule.state_specs(*dims[1:], vector=p.ndim < 2).values()
        forms = [formats.format_of(slot, p.shape, dims, p.dtype, group) for slot in slots]
    return tuple(f.name if f.is_quantized else "fp32" for f in forms) if any(f.is_quantized for f in forms) else ()


def run_graph(rule: Rule, kind: Kind, tensors: Sequence[Tensor], t: int, size: float) -> None:
    """Take the step of one parameter.

    Args:
        rule: with the group's settings.
        kind: of the parameter.
        tensors: the parameter, its gradient and its state, flat or as stacks of matrices; where state is quantized,
            `[blocks, block]` of two blocks or more, and then the scales, `[blocks, 1]`. All but the gradient are
            written.
        t: number of the step.
        size: what the direction is multiplied by.
    """
    graph = _graph_of(rule, kind)
    numbers = [float(t), size, 1 - rule.lr * rule.weight_decay, rule.lr]
    most = max(PIECE // kind.block, 4) if kind.storage and kind.device == "cpu" else MOST  # four: no piece of one block
    count = -(-tensors[0].shape[0] // most)
    for piece in zip(*(x.tensor_split(count) for x in tensors), strict=True) if count > 1 else (tensors,):
        graph(piece, numbers)


def step_param(group: GroupStep, step: ParamStep) -> slice | None:
    """Step one parameter by a compiled graph, if its group asks for that and there is one.

    Args:
        group: of the parameter.
        step: the parameter.

    Returns:
        The elements that were stepped, in memory order: all, or those in whole blocks of scales; None for none.
    """
    rule, settings, plan = group.rule, group.group, step.plan
    if not settings["compile"] or plan.replicas is not None or plan.pieces or plan.blocks[0].rows is not None:
        return None
    if rule.skips_update(step.t) or refusal(rule, settings) is not None:
        return None
    p, fmts = step.local(), plan.formats
    kind = kind_of(rule, settings, p, plan.dims, list(fmts.values()))
    if kind is None or not all(fmt.is_quantized or fmt.is_compute_format(p.device) for fmt in fmts.values()):
        return None
    g, state = step.gradient(), [step.local_state(key) for key in fmts]
    plain = [x for x, fmt in zip(state, fmts.values(), strict=True) if not fmt.is_quantized and x.shape == p.shape]
    if not matrix_views.same_strides([p, g, *plain]) or ((rule.reduces or kind.storage) and not p.is_contiguous()):
        return None
    size = rule.lr * plan.factor
    if kind.storage:
        return _step_blocks(group, step, kind, [p, g, *state], size)

    def viewed(x: Tensor) -> Tensor:
        if rule.elementwise:
            return (x if p.is_contiguous() else x.permute(matrix_views.dense_order(p))).view(-1)
        if x.shape == p.shape:
            return matrix_views.transpose_if(x, kind.is_transposed).view(plan.dims)
        return x.view(plan.dims[0], *x.shape[-2:])

    run_graph(rule, kind, [viewed(x) for x in (p, g, *state)], step.t, size)
    return slice(0, p.numel())


def _step_blocks(group: GroupStep, step: ParamStep, kind: Kind, tensors: Sequence[Tensor], size: float) -> slice | None:
    """Step whole blocks of scales of one parameter by a graph; see `step_param`."""
    fmts = {key: fmt for key, fmt in step.plan.formats.items() if fmt.is_quantized}
    scales = [step.local_state(scale_key(key)) for key in fmts]
    fmt, count = next(iter(fmts.values())), tensors[0].numel()
    start = first_index(group.rule, step.plan, fmt)
    first = -start % kind.block
    blocks = (count - first) // kind.block
    if blocks < 2 or any(x.numel() != num_scales(fmt, tensors[0], start) for x in scales):
        return None  # quantized in other blocks: the walk raises
    done = slice(first, first + blocks * kind.block)
    if done != slice(0, count):
        tensors = [x.view(-1)[done] for x in tensors]
        at = (start + first) // kind.block - start // kind.block
        scales = [x[at : at + blocks] for x in scales]
    rows = [x.view(-1, kind.block) for x in tensors] + [x.view(-1, 1) for x in scales]
    run_graph(group.rule, kind, rows, step.t, size)
    return done


def _graph_of(rule: Rule, kind: Kind) -> Compiled:
    """The graph for a parameter; that of the one before it in the step, which has the same rule, is not looked up."""
    global _recent
    if _recent[0] is not rule:
        _recent = rule, {}
    kept, key = _recent[1], (kind, torch.get_num_threads())
    if key not in kept:
        kept[key] = _graph(_open(rule), *key)
    return kept[key]


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
    specs = rule.state_specs(m, n)
    narrow = {k: form for k, form in zip(specs, kind.storage, strict=False) if form in CODES}
    coded: dict[str, tuple[quantize.Format, bool]]
    coded = {k: (cast("quantize.Format", form), specs[k].nonnegative) for k, form in narrow.items()}
    shapes = [(b, m, n), (b, m, n), *((b, *spec.shape(m, n)) for spec in specs.values())]
    if rule.elementwise:
        shapes = [(m * n // kind.block, kind.block) if coded else (m * n,)] * len(shapes)
    dtypes = [kind.dtype, kind.dtype, *(CODES[coded[k][0]] if k in coded else kind.dtype for k in specs)]
    made = [torch.empty(s, dtype=d, device=kind.device) for s, d in zip(shapes, dtypes, strict=True)]
    full = [x.shape == made[0].shape for x in made]
    examples = [
        x.mT.contiguous().mT if kind.is_transposed and whole else x for x, whole in zip(made, full, strict=True)
    ]
    examples += [torch.empty((shapes[0][0], 1), device=kind.device) for _ in coded]
    tables = [quantize.table(form, nonnegative, torch.device(kind.device)) for form, nonnegative in coded.values()]

    def update(p: Tensor, g: Tensor, *rest: Tensor) -> None:
        stored, (t, size, keep, lr) = dict(zip(specs, rest, strict=False)), rest[-4:]
        scales, maps = (dict(zip(coded, rest[k : k + len(coded)], strict=True)) for k in (len(specs), -4 - len(coded)))
        values = {**stored, **{k: quantize.looked_up(stored[k], scales[k], maps[k]) for k in coded}}
        traced = replace(cast("Any", rule), lr=lr)
        if rule.decay == "coupled" and rule.weight_decay:
            g = g.add(p, alpha=rule.weight_decay)
        s = SimpleNamespace(**values, vector=False, vote=torch.sign, mean=_as_is)
        d = traced.update(g, s, p if rule.reads_param else None, t)
        d = d if isinstance(d, Tensor) else d(slice(0, p.shape[-2]))
        if rule.decay == "before" and rule.weight_decay:
            p.mul_(keep)
        p.sub_(d * size)
        if rule.decay == "after" and rule.weight_decay:
            p.mul_(keep)
        ids = {id(x) for x in values.values()}
        after = {k: getattr(s, k) for k in specs}
        after = {k: x.clone() if id(x) in ids and x is not values[k] else x for k, x in after.items()}
        for key, value in after.items():
            if key in coded:
                form, nonnegative = coded[key]
                codes, scale = quantize.computed(value, form, nonnegative=nonnegative)
                stored[key].copy_(codes)
                scales[key].copy_(scale)
            elif value is not values[key]:
                values[key].copy_(value)

    graph = compiled(update, [*examples, *tables], 4, {kind.block, 256} if coded else ())
    return (lambda tensors, numbers: graph([*tensors, *tables], numbers)) if coded else graph


def _as_is(x: Tensor) -> Tensor:
    return x
