"""What an optimizer will do with a model, before anything is allocated: owners, reasons and bytes of state."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from lightning_optim.build.factory import build_optimizer
from lightning_optim.build.mesh_estimate import MeshEstimate, Strategy, estimate_mesh
from lightning_optim.build.overrides import matches
from lightning_optim.build.param_role import ParamRole
from lightning_optim.build.role_report import report
from lightning_optim.build.role_warnings import Owned, warnings_of
from lightning_optim.build.zero_estimate import estimate_zero
from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.options import has_constraint
from lightning_optim.core.param_groups import blocks_of, rule_of
from lightning_optim.core.state import formats
from lightning_optim.core.step.plan import state_formats


@dataclass(frozen=True)
class Row:
    """One parameter."""

    name: str
    shape: tuple[int, ...]
    role: str
    rule: str
    group: str
    reason: str
    source: str
    """Who says what it is: `user`, `registry`, `measured`, `structure`, or `unknown`."""
    matrices: str
    """How the rule gets it: "3 of 768 x 768", "4 experts x 2 of 24 x 16, transposed"; empty if it sees no matrices."""
    state_bytes: dict[str, int]
    """By slot, scales included; the 8 bytes of the step count apart."""
    host_bytes: int = 0
    """How many of them are stored in host memory, for a model on CUDA."""


@dataclass(frozen=True)
class Plan:
    """One row per trainable parameter that the optimizer has, in the order of the groups; and the others' names."""

    rows: Sequence[Row]
    frozen: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of parameters that are not trained."""
    unowned: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Shapes of parameters that get gradients, but that no group has: they never move."""
    mesh: MeshEstimate | None = None
    """What falls on each rank, if a mesh was asked for."""
    warnings: Sequence[str] = ()
    """What need not be as the user expects: `lightning_optim.build.role_warnings`."""
    notes: Sequence[str] = ()
    """What was run to measure roles, or why it could not be."""

    @property
    def state_bytes(self) -> int:
        """Bytes of state of all parameters, step counts included."""
        return sum(sum(r.state_bytes.values()) + formats.STEP_DTYPE.itemsize for r in self.rows)

    @property
    def host_bytes(self) -> int:
        """Bytes of state that are stored in host memory, for a model on CUDA."""
        return sum(r.host_bytes for r in self.rows)

    @property
    def parameters(self) -> int:
        """Number of trainable weights."""
        return sum(_size(r) for r in self.rows)

    def shares(self) -> dict[str, float]:
        """The share of the trainable weights each rule owns.

        Returns:
            Rule to share, summing to one.
        """
        owned: Counter[str] = Counter()
        for row in self.rows:
            owned[row.rule] += _size(row)
        return {rule: size / self.parameters for rule, size in owned.most_common()}

    def __str__(self) -> str:
        """A Markdown table; repeated layers are one line."""
        lines: dict[tuple[Any, ...], list[Row]] = {}
        for r in self.rows:
            lines.setdefault((_layerless(r.name), r.shape, r.role, r.source, r.rule, r.matrices, r.reason), []).append(
                r
            )
        text = ["| parameter | shape | role | rule | matrices | state | from | reason |", "|" + "---|" * 8]
        for (name, shape, role, source, rule, matrices, reason), same in lines.items():
            label = f"{name} ({len(same)} times)" if len(same) > 1 else same[0].name
            slots = ", ".join(f"{k} {_bytes(v)}" for k, v in same[0].state_bytes.items()) or "none"
            size = " x ".join(map(str, shape)) or "scalar"
            text.append(f"| {label} | {size} | {role} | {rule} | {matrices} | {slots} | {source} | {reason} |")
        owners = ", ".join(f"{rule} {share:.1%}" for rule, share in self.shares().items())
        text.append(f"\n{self.parameters:,} trainable weights: {owners}")
        away = f", {_bytes(self.host_bytes)} of it in host memory" if self.host_bytes else ""
        each = self.state_bytes / max(1, self.parameters)
        text.append(f"{_bytes(self.state_bytes)} of state, {each:.2f} B per weight{away}")
        for title, shapes in (("frozen", self.frozen), ("trainable, but in no group", self.unowned)):
            if shapes:
                alike: dict[str, list[str]] = {}
                for name in shapes:
                    alike.setdefault(_layerless(name), []).append(name)
                listed = (f"{n} ({len(same)} times)" if len(same) > 1 else same[0] for n, same in alike.items())
                text.append(f"\n{sum(map(math.prod, shapes.values())):,} weights {title}: {', '.join(listed)}")
        if self.notes:
            text.append("\nRoles: " + "; ".join(self.notes))
        text += [f"\nWarning: {warning}" for warning in self.warnings]
        return "\n".join([*text, *(_lines(self.mesh) if self.mesh is not None else ())])


def _lines(mesh: MeshEstimate) -> list[str]:
    """What falls on each rank, in words."""
    out = [f"\n{mesh.strategy} on {mesh.world_size} ranks: at most {_bytes(max(mesh.state))} of state on a rank"]
    if mesh.held:
        total = max(map(sum, zip(mesh.state, *mesh.held.values(), strict=True)))
        parts = ", ".join(f"{key} {_bytes(max(by_rank))}" for key, by_rank in mesh.held.items())
        out.append(f"with it {parts}: {_bytes(total)}, without DeepSpeed's buffers and activations")
    matrices = f"matrices: at most {_bytes(max(mesh.sent))} sent by a rank in a step" if max(mesh.sent) else ""
    sums = f"sums: about {_bytes(mesh.summed)} in a step" if mesh.summed else ""
    out.append("; ".join(x for x in (matrices, sums) if x) or "the optimizer sends nothing")
    if mesh.work:
        out.append(
            f"work on whole matrices: {mesh.imbalance:.3f} times the mean on the busiest of {len(mesh.work)} ranks "
            f"({mesh.bound:.3f} is the least that whole parameters allow)"
        )
    return out


def plan(
    model: nn.Module,
    name: str,
    *,
    lr: float | None = None,
    recipe: str | None = None,
    world_size: int = 1,
    strategy: Strategy = "fsdp2",
    node_size: int = 8,
    **settings: Any,
) -> Plan:
    """Say what `build_optimizer` with the same arguments would do.

    Args:
        model: any module; on the meta device nothing is allocated.
        name: of the main rule.
        lr: learning rate; does not matter here.
        recipe: name of published settings.
        world_size: number of ranks; for more than one the plan says what falls on each.
        strategy: `"ddp"`, `"fsdp2"`, `"hsdp"`, `"zero1"`, `"zero2"` or `"zero3"`.
        node_size: ranks of a node, over which HSDP shards.
        **settings: of `build_optimizer`.

    Returns:
        The plan.
    """
    lr = 1e-3 if lr is None and recipe is None and settings.get("preset") is None else lr
    optimizer = build_optimizer(model, name, lr=lr, recipe=recipe, **settings)
    description, shared = describe(model, optimizer), bool(settings.get("shard_work"))
    on_mesh = None
    if strategy in ("zero1", "zero2", "zero3"):
        on_mesh = estimate_zero(optimizer, model, strategy, world_size)
    elif world_size > 1:
        on_mesh = estimate_mesh(optimizer, strategy, world_size, node_size=node_size, shard_work=shared)
    patterns = [pattern for pattern, *_ in settings.get("overrides", ())]
    rows = []
    for row in description.rows:
        match = next((x for x in patterns if matches(x, row.name, row.role)), None)
        rows.append(row if match is None else replace(row, reason=f"{row.reason}; override {match!r}"))
    return replace(description, rows=rows, mesh=on_mesh)


def describe(model: nn.Module, optimizer: RuleOptimizer) -> Plan:
    """Say what an optimizer does with a model now, whatever was frozen, unfrozen or added since it was built.

    Args:
        model: any module.
        optimizer: of this model.

    Returns:
        The plan; printed, it is a Markdown table.
    """
    seen, rows, names = (
        report(model, optimizer.example_inputs),
        [],
        {id(p): name for name, p in model.named_parameters()},
    )
    traits = seen.roles
    for group in optimizer.param_groups:
        rule = rule_of(group)
        sources = group.get("role_sources", ())
        for i, p in enumerate(group["params"]):
            label = names.get(id(p), "")
            if label not in traits:
                continue
            parts, _ = blocks_of(rule, group, p.shape)
            forms = state_formats(rule, group, p, parts)
            state: dict[str, int] = {key: form.nbytes for key, form in forms.items()}
            away = sum(form.nbytes for form in forms.values() if form.name == "host")
            if formats.compensated(p.dtype, group):
                state[formats.COMPENSATION] = p.numel() * p.dtype.itemsize
            if formats.keeps_radius(p.dtype, group):
                state[formats.RADIUS] = 4 * sum(part.dims[0] for part in parts)
            if optimizer.averages is not None:
                width = formats.compute_dtype_of(p.dtype).itemsize
                state |= {key: p.numel() * width for key in optimizer.averages.keys}
            rows.append(_row(label, p, traits[label], group, sources[i] if i < len(sources) else "", state, away))
    owned = {row.name for row in rows}
    others = {name: p for name, p in model.named_parameters() if name not in owned}
    frozen = {name: tuple(p.shape) for name, p in others.items() if name not in traits}
    unowned = {name: tuple(p.shape) for name, p in others.items() if name in traits}
    main, blocks = optimizer.defaults.get("rule"), {g["name"]: g["blocks"] for g in optimizer.param_groups}
    owners = (Owned(row.name, row.role, row.shape, row.rule, blocks[row.group]) for row in rows)
    return Plan(rows, frozen, unowned, warnings=warnings_of(main, owners) if main else (), notes=seen.notes)


def _row(
    name: str,
    p: Tensor,
    trait: ParamRole,
    group: Mapping[str, Any],
    source: str,
    state: dict[str, int],
    host_bytes: int,
) -> Row:
    """The row of a parameter: as it was assigned, where its group says so, else as it is now."""
    role = group.get("role", trait.role)
    reason = trait.reason if role == trait.role else "an override says so"
    matrices = _matrices(group, p, role)
    shape = tuple(p.shape)
    return Row(
        name, shape, role, group["rule"], group["name"], reason, source or trait.source, matrices, state, host_bytes
    )


def _matrices(group: Mapping[str, Any], p: Tensor, role: str) -> str:
    """How a rule gets a parameter, in words."""
    rule = rule_of(group)
    if p.ndim < 2 or (rule.elementwise and not has_constraint(group)):
        return ""
    blocks, is_transposed = blocks_of(rule, group, p.shape)
    stack = p.shape[0] if role == "experts" and p.ndim == 3 else 1
    sizes = ", ".join(f"{block.dims[0] // stack} of {block.dims[1]} x {block.dims[2]}" for block in blocks)
    return (f"{stack} experts x " if stack > 1 else "") + sizes + (", transposed" if is_transposed else "")


class Owners:
    """Who owns what in a run, printed again when it changes."""

    def __init__(self) -> None:
        self._said: Any = None

    def news(self, model: nn.Module, optimizer: RuleOptimizer, step: int) -> str | None:
        """The table, if parameters have been frozen, unfrozen, added or given to another group since the last call.

        Args:
            model: any module.
            optimizer: of this model.
            step: optimizer steps taken.

        Returns:
            Markdown; None if the last table is still true.
        """
        owned = [(group["name"], *map(id, group["params"])) for group in optimizer.param_groups]
        now = [(id(p), p.requires_grad) for p in model.parameters()], owned
        if now == self._said:
            return None
        self._said = now
        return f"{type(model).__name__} at step {step}\n\n{describe(model, optimizer)}\n"


def _size(row: Row) -> int:
    return math.prod(row.shape)


def _layerless(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def _bytes(count: int) -> str:
    value = float(count)
    for unit in ("B", "KiB", "MiB"):
        if value < 1024:
            return f"{value:.4g} {unit}"
        value /= 1024
    return f"{value:.4g} GiB"
