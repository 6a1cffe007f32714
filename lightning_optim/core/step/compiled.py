"""Compiled steps: update and write of a parameter in as few passes over memory as the rule's sums allow.

There is one graph per rule and its settings. Sizes, the step number, the learning rate and the weight decay are inputs
of the graph, so schedules, and parameters of other sizes, do not recompile it. Graphs step large parameters in the
compute dtype; low-precision weights, small tensors and matrices that need sums over shards take ordinary steps.

Quantized state is dequantized, updated and requantized inside the graph, in whole blocks of scales. A block is read
twice, since its scale must be known before its values are quantized; chunks of blocks stay in cache in between.
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
from lightning_optim.core.state.formats import QUANTIZED_DTYPES, StateFormat, Storage, scale_key
from lightning_optim.core.state.quantized_view import num_scales
from lightning_optim.core.step.records import GroupStep, ParamStep
from lightning_optim.core.step.stacks import first_index
from lightning_optim.ops import quantize
from lightning_optim.ops.kernels.graphs import Compiled, compiled

EXAMPLE = (5, 1021, 769)
"""Matrices, rows and columns of the example inputs of a graph, where they are not 1: large, as Inductor uses no threads
for small ones, and all different, as equal sizes would be assumed to be equal in every call."""
MAX_ELEMENTS = 2**31
"""Number of elements from which on indices may overflow the index type of a graph."""
CHUNK = 2**18
"""Elements per call of a graph with quantized state on a CPU, so that intermediate values stay in cache."""
MAX_GRAPHS = 16
"""Graphs of one rule and one `Kind`; more mean that a setting which is no input of a graph changes every step."""

_graph_counts: Counter[Any] = Counter()
_recent: tuple[Rule | None, dict[Any, Compiled]] = None, {}
"""The rule of the last call, and its graphs."""


class Kind(NamedTuple):
    """Key of a graph besides its rule: the properties that its parameters have in common."""

    dtype: torch.dtype
    device: str
    stacked: bool = False
    """Whether there is more than one matrix, for a rule that reduces."""
    is_transposed: bool = False
    """Whether the matrices are stored columns x rows."""
    storage: tuple[Storage, ...] = ()
    """Storage format of each state tensor, where any is quantized; `"fp32"` for those that are not."""
    block: int = 0
    """Number of elements per scale of quantized state."""


def refusal(rule: Rule, group: Mapping[str, Any]) -> str | None:
    """The reason why a group cannot be stepped by graphs.

    Args:
        rule: rule of the group.
        group: settings of the group.

    Returns:
        The end of an error message, with the remedy; None if it can.
    """
    if not (rule.elementwise or rule.reduces):
        return "works on whole matrices, whose products are no faster in a graph; leave compile out"
    if getattr(rule, "momentum_kernel", None) is not None:
        return "has several momenta, whose weights change from step to step; momentum_kernel=None or compile=False"
    if options.has_constraint(group) or group["cautious_decay"]:
        keys = [*options.CONSTRAINTS, "cautious_decay"]
        return f"is given one of {', '.join(keys)}, which need a whole direction; leave them or compile out"
    if group["state_storage"] == "bf16" or (rule.reduces and group["state_storage"] in QUANTIZED_DTYPES):
        return f"stores its state as {group['state_storage']!r}; state_storage='fp32' or compile=False"
    return None


def validate_compile(rule: Rule, group: Mapping[str, Any], params: Sequence[Tensor]) -> None:
    """Compile the graphs of a group, so that errors are raised before training.

    Args:
        rule: rule of the group.
        group: settings of the group.
        params: parameters of the group.

    Raises:
        ValueError: a rule or setting without a graph, or a machine without a compiler.
    """
    prefix = f"group {group['name']!r}: compile=True, but {rule.name}"
    if (reason := refusal(rule, group)) is not None:
        raise ValueError(f"{prefix} {reason}")
    all_kinds = [kind_of(rule, group, p) for p in params if p.device.type != "meta"]
    kinds = {kind for kind in all_kinds if kind is not None}
    has_no_kernel = type(rule).kernel is Rule.kernel or rule.reduces
    from torch.fx.experimental.symbolic_shapes import GuardOnDataDependentSymNode

    for kind in [kind for kind in kinds if has_no_kernel or kind.storage]:
        try:
            _graph_of(rule, kind)
        except GuardOnDataDependentSymNode as error:
            raise ValueError(
                f"{prefix} branches on the step number or a rate, which are inputs of the graph; compile=False"
            ) from error
        except Exception as error:
            text = str(error).strip().splitlines() or [type(error).__name__]
            raise ValueError(
                f"{prefix} cannot be compiled here: {text[0]}. On a CPU torch needs a C++ compiler (install g++, or "
                "name one in the environment variable CXX); compile=False needs none"
            ) from error


def kind_of(
    rule: Rule,
    group: Mapping[str, Any],
    p: Tensor,
    dims: matrix_views.StackShape | None = None,
    fmts: Sequence[StateFormat] | None = None,
) -> Kind | None:
    """The kind of graph that steps a parameter.

    Args:
        rule: rule of the group.
        group: settings of the group.
        p: the parameter, or this rank's shard of it.
        dims: shape as a stack of matrices, if known.
        fmts: storage formats of its state, if known.

    Returns:
        None where it takes ordinary steps.
    """
    is_large = p.numel() >= matrix_views.STACK_LIMIT if rule.reduces else p.numel() > matrix_views.SMALL
    if not is_large or p.numel() >= MAX_ELEMENTS or p.dtype not in (torch.float32, torch.float64):
        return None
    if rule.elementwise:
        storage = _storage(rule, group, p, fmts) if group["state_storage"] in QUANTIZED_DTYPES else ()
        if storage and p.dtype != torch.float32:
            return None
        return Kind(p.dtype, str(p.device), storage=storage, block=group["storage_block"] if storage else 0)
    if p.ndim < 2 or group.get("role") == "vector":
        return None
    b, m, n = dims or matrix_views.stack_shape(p.shape, conv=not rule.last_two, transposed=group["transposed"])
    is_transposed = group["transposed"] and 2 <= p.ndim <= 3
    if min(m, n) == 1 or (b > 1 and is_transposed):
        return None
    return Kind(p.dtype, str(p.device), b > 1, is_transposed)


def _storage(
    rule: Rule, group: Mapping[str, Any], p: Tensor, fmts: Sequence[StateFormat] | None
) -> tuple[Storage, ...]:
    """`Kind.storage` of a parameter of an elementwise rule."""
    if fmts is None:
        dims = matrix_views.stack_shape(p.shape)
        specs = rule.state_specs(*dims[1:], vector=p.ndim < 2).values()
        fmts = [formats.format_of(spec, p.shape, dims, p.dtype, group) for spec in specs]
    return tuple(f.name if f.is_quantized else "fp32" for f in fmts) if any(f.is_quantized for f in fmts) else ()


def run_graph(rule: Rule, kind: Kind, tensors: Sequence[Tensor], t: int, size: float) -> None:
    """Take the step of one parameter.

    Args:
        rule: rule with the group's settings.
        kind: kind of the parameter.
        tensors: the parameter, its gradient and its state, flat or as stacks of matrices; where state is quantized,
            `[blocks, block]` of two blocks or more, followed by the scales, `[blocks, 1]`. All but the gradient are
            written.
        t: number of the step.
        size: factor of the direction.
    """
    graph = _graph_of(rule, kind)
    numbers = [float(t), size, 1 - rule.lr * rule.weight_decay, rule.lr]
    rows = MAX_ELEMENTS
    if kind.storage and kind.device == "cpu":
        rows = max(CHUNK // kind.block, 4)  # at least 4, so that no chunk has only one block
    count = -(-tensors[0].shape[0] // rows)
    for chunk in zip(*(x.tensor_split(count) for x in tensors), strict=True) if count > 1 else (tensors,):
        graph(chunk, numbers)


def step_param(group: GroupStep, step: ParamStep) -> slice | None:
    """Step one parameter by a compiled graph, if its group has `compile` and there is a graph.

    Args:
        group: group of the parameter.
        step: the parameter.

    Returns:
        The elements that were stepped, in memory order: all, or those in whole blocks of scales; None for none.
    """
    rule, settings, plan = group.rule, group.group, step.plan
    if not settings["compile"] or plan.replicas is not None or plan.block_plans or plan.blocks[0].rows is not None:
        return None
    if rule.skips_update(step.t) or refusal(rule, settings) is not None:
        return None
    p, fmts = step.local(), plan.formats
    kind = kind_of(rule, settings, p, plan.dims, list(fmts.values()))
    if kind is None or not all(fmt.is_quantized or fmt.is_compute_format(p.device) for fmt in fmts.values()):
        return None
    g, state = step.gradient(), [step.local_state(key) for key in fmts]
    same_shape = [x for x, fmt in zip(state, fmts.values(), strict=True) if not fmt.is_quantized and x.shape == p.shape]
    if not matrix_views.same_strides([p, g, *same_shape]) or ((rule.reduces or kind.storage) and not p.is_contiguous()):
        return None
    size = rule.lr * plan.factor
    if kind.storage:
        return _step_blocks(group, step, kind, [p, g, *state], size)

    def view(x: Tensor) -> Tensor:
        if rule.elementwise:
            return (x if p.is_contiguous() else x.permute(matrix_views.dense_order(p))).view(-1)
        if x.shape == p.shape:
            return matrix_views.transpose_if(x, kind.is_transposed).view(plan.dims)
        return x.view(plan.dims[0], *x.shape[-2:])

    run_graph(rule, kind, [view(x) for x in (p, g, *state)], step.t, size)
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
        return None  # quantized in other blocks, for which the ordinary step raises an error
    elements = slice(first, first + blocks * kind.block)
    if elements != slice(0, count):
        tensors = [x.view(-1)[elements] for x in tensors]
        first_block = (start + first) // kind.block - start // kind.block
        scales = [x[first_block : first_block + blocks] for x in scales]
    rows = [x.view(-1, kind.block) for x in tensors] + [x.view(-1, 1) for x in scales]
    run_graph(group.rule, kind, rows, step.t, size)
    return elements


def _graph_of(rule: Rule, kind: Kind) -> Compiled:
    """The graph of a rule and kind; the graphs of the rule of the last call are cached by identity, to hash no rule."""
    global _recent
    if _recent[0] is not rule:
        _recent = rule, {}
    graphs, key = _recent[1], (kind, torch.get_num_threads())
    if key not in graphs:
        graphs[key] = _graph(_without_inputs(rule), *key)
    return graphs[key]


def _without_inputs(rule: Rule) -> Rule:
    """The rule with neutral values of the settings that are inputs of its graph."""
    hashable = {k: tuple(v) for k, v in vars(rule).items() if isinstance(v, list)}
    weight_decay = float(rule.weight_decay != 0) if rule.decay in ("before", "after") else rule.weight_decay
    return replace(cast("Any", rule), **hashable, lr=0.0, weight_decay=weight_decay)


@functools.cache
def _graph(rule: Rule, kind: Kind, threads: int) -> Compiled:
    """Compile the update and write of one parameter."""
    _graph_counts[type(rule), kind, threads] += 1
    if _graph_counts[type(rule), kind, threads] > MAX_GRAPHS:
        raise RuntimeError(
            f"{rule.name}: compile=True, and a setting other than lr and weight_decay keeps changing; every value "
            "is compiled into a new graph. Keep it constant, or give compile=False"
        )
    b, m, n = (EXAMPLE[0] if kind.stacked else 1, *EXAMPLE[1:])
    specs = rule.state_specs(m, n)
    names = {k: name for k, name in zip(specs, kind.storage, strict=False) if name in QUANTIZED_DTYPES}
    quantizers: dict[str, tuple[quantize.Format, bool]]
    quantizers = {k: (cast("quantize.Format", name), specs[k].nonnegative) for k, name in names.items()}
    shapes = [(b, m, n), (b, m, n), *((b, *spec.shape(m, n)) for spec in specs.values())]
    if rule.elementwise:
        shapes = [(m * n // kind.block, kind.block) if quantizers else (m * n,)] * len(shapes)
    dtypes = [
        kind.dtype,
        kind.dtype,
        *(QUANTIZED_DTYPES[quantizers[k][0]] if k in quantizers else kind.dtype for k in specs),
    ]
    examples = [torch.empty(s, dtype=d, device=kind.device) for s, d in zip(shapes, dtypes, strict=True)]
    if kind.is_transposed:
        examples = [x.mT.contiguous().mT if x.shape == examples[0].shape else x for x in examples]
    examples += [torch.empty((shapes[0][0], 1), device=kind.device) for _ in quantizers]
    tables = [quantize.table(name, nonnegative, torch.device(kind.device)) for name, nonnegative in quantizers.values()]

    def update(p: Tensor, g: Tensor, *inputs: Tensor) -> None:
        stored, (t, size, keep, lr) = dict(zip(specs, inputs, strict=False)), inputs[-4:]
        count = len(quantizers)
        scales, maps = (dict(zip(quantizers, inputs[k : k + count], strict=True)) for k in (len(specs), -4 - count))
        values = {**stored, **{k: quantize.looked_up(stored[k], scales[k], maps[k]) for k in quantizers}}
        traced = replace(cast("Any", rule), lr=lr)
        if rule.decay == "coupled" and rule.weight_decay:
            g = g.add(p, alpha=rule.weight_decay)
        s = SimpleNamespace(**values, vector=False, vote=torch.sign, mean=_identity)
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
            if key in quantizers:
                name, nonnegative = quantizers[key]
                codes, scale = quantize.computed(value, name, nonnegative=nonnegative)
                stored[key].copy_(codes)
                scales[key].copy_(scale)
            elif value is not values[key]:
                values[key].copy_(value)

    graph = compiled(update, [*examples, *tables], 4, {kind.block, 256} if quantizers else ())
    return (lambda tensors, numbers: graph([*tensors, *tables], numbers)) if quantizers else graph


def _identity(x: Tensor) -> Tensor:
    return x
