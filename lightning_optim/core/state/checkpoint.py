"""The state of an optimizer in the form of a checkpoint, and back."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_optim.core.momentum_alias import MOMENTUM_NAMES, ParamGroup
from lightning_optim.core.parallel import sharding
from lightning_optim.core.parallel.guard import CollectiveGuard
from lightning_optim.core.parallel.ownership import Owners
from lightning_optim.core.parallel.replicas import Replicas
from lightning_optim.core.parallel.sharding import Sharding
from lightning_optim.core.parallel.stack_sharding import StackSharding
from lightning_optim.core.param_groups import blocks_of, rule_of, validate_loaded
from lightning_optim.core.rule import Rule, lookup
from lightning_optim.core.state import rank_checkpoint, resharding
from lightning_optim.core.state.formats import COMPENSATION, RADIUS, STEP_DTYPE, StateFormat, scale_key
from lightning_optim.core.state.initial_values import to_storage_device
from lightning_optim.core.step.plan import state_formats
from lightning_optim.core.step.records import GroupStep, ParamStep
from lightning_optim.core.step.stacks import first_index

State = dict[Tensor, dict[str, Tensor]]


# -- saving -----------------------------------------------------------------------------------------------------------


def state_to_save(
    groups: Sequence[GroupStep],
    state: Mapping[Tensor, dict[str, Tensor]],
    owners: Owners,
    guard: CollectiveGuard,
    content: str,
    gathered: State,
) -> defaultdict[Tensor, dict[str, Tensor]]:
    """State in the form of a checkpoint. A collective call where matrices have owners.

    Args:
        groups: with all parameters.
        state: of the optimizer.
        owners: of its matrices.
        guard: waits for the other ranks.
        content: describes the optimizer.
        gathered: what `gather_owned` has collected already.

    Returns:
        State by parameter.
    """
    entries = [e for e in _entries(groups, owners, lambda p, key: p in state) if e.param not in gathered]
    entries = [e for e in entries if not e.team.is_saved_by_rank]
    out = defaultdict(dict, {p: dict(tensors) for p, tensors in state.items()})
    for p, key, table in _scale_tables(groups, state):
        out[p][key] = table
    _wait_for_ranks(guard, entries, "state_dict()", content)
    for e, value in resharding.scatter(entries, lambda e: out[e.param][e.key]):
        out[e.param][e.key] = value
    for p, tensors in gathered.items():
        out[p] |= tensors
    rank_checkpoint.keep_own(groups, out, owners)
    return out


def gather_owned(groups: Sequence[GroupStep], saved: Mapping[Tensor, dict[str, Tensor]], owners: Owners) -> State:
    """What replicas that share the work have sent each other, to be saved by one of them alone.

    Args:
        groups: with all parameters.
        saved: what `state_to_save` gave.
        owners: of the matrices.

    Returns:
        State by parameter; that of other owners is on the CPU.
    """
    out: State = {}
    for group in groups:
        for s in group.params:
            p, team = s.plan.param, s.plan.team
            if isinstance(team, Replicas) and p in saved:
                keys = {*s.plan.formats, *map(scale_key, s.plan.formats)}
                sent = {k: v for k, v in saved[p].items() if k in keys}
                out[p] = sent if owners.owns(p, team) else {k: v.cpu() for k, v in sent.items()}
    return out


def _entries(
    groups: Sequence[GroupStep], owners: Owners, is_there: Callable[[Tensor, str], bool]
) -> list[resharding.Entry]:
    """Every state tensor of every parameter with an owner, and the tables of scales of quantized ones."""
    out = []
    for s in (s for group in groups for s in group.params):
        p, team = s.plan.param, s.plan.team
        if team is None or p not in owners:
            continue
        team, owner = team.by_rows if isinstance(team, Sharding) else team, owners[p]
        for key, fmt in s.plan.formats.items():
            scaled = fmt.is_quantized and is_there(p, scale_key(key))
            dtype = fmt.dtype if scaled or not fmt.is_quantized else fmt.compute_dtype
            if is_there(p, key):
                out.append(resharding.Entry(p, key, fmt.shape, dtype, team, owner))
            if scaled:
                table = scale_key(key), resharding.table_shape(fmt), torch.float32
                out.append(resharding.Entry(p, *table, team, owner))
    return out


def _scale_tables(
    groups: Sequence[GroupStep], state: Mapping[Tensor, dict[str, Tensor]]
) -> list[tuple[Tensor, str, Tensor]]:
    """The scales of quantized state as they are in a checkpoint, for state that is on this rank."""
    out = []
    for group in groups:
        for s in group.params:
            plan, tensors = s.plan, state.get(s.plan.param) or {}
            for key, fmt in plan.formats.items() if tensors else ():
                if fmt.is_quantized:
                    quantized, start = sharding.local(tensors[key]), first_index(group.rule, plan, fmt)
                    table = resharding.table_of(fmt, tensors[scale_key(key)], len(torch.atleast_1d(quantized)), start)
                    cut = sharding.sharding_of(plan.param, plan.name) if plan.team is None else None
                    table = table if cut is None else cut.shard(resharding.table_shape(fmt), table)
                    out.append((plan.param, scale_key(key), table))
    return out


def _wait_for_ranks(guard: CollectiveGuard, entries: Sequence[resharding.Entry], call: str, content: str) -> None:
    """Wait for all ranks between which state is going to be sent."""
    for ranks in dict.fromkeys(e.team.ranks for e in entries):
        guard.wait_for(ranks, call, content)


# -- loading ----------------------------------------------------------------------------------------------------------


def complete_saved_groups(
    present: Sequence[dict[str, Any]], saved: Sequence[dict[str, Any]], *, averaging: bool
) -> list[dict[str, Any]]:
    """Groups of a checkpoint with what they lack taken from the present ones.

    Args:
        present: groups of the optimizer.
        saved: groups of the checkpoint.
        averaging: whether the optimizer has averaging methods.

    Returns:
        New groups.

    Raises:
        ValueError: groups of another rule, of an optimizer with averaging methods, or a value out of range.
    """
    out = []
    for now, group in zip(present, saved, strict=False):
        if group.get("rule", now["rule"]) != now["rule"]:
            raise ValueError(
                f"group {now['name']!r} runs {now['rule']!r}, the checkpoint's {group['rule']!r}: "
                "build the optimizer as it was when the checkpoint was saved"
            )
        if not averaging and group.get("average_step"):
            raise ValueError(
                "the checkpoint's optimizer averages weights (EMANesterov, ...): give this one the same averaging"
            )
        settings = _translated(group) if "rule" in group else lookup(now["rule"]).translate(dict(group))
        settings = {k: v for k, v in settings.items() if k in now or k not in MOMENTUM_NAMES}
        kept = {k: v for k, v in now.items() if k != "params"}
        out.append(ParamGroup({**kept, **settings, "compile": now["compile"]}))
        validate_loaded(out[-1])
    return [*out, *saved[len(out) :]]


def without_empty(state: Mapping[int, Any]) -> dict[int, Any]:
    """Saved state without the entries that torch saves as None.

    Args:
        state: of a checkpoint.

    Returns:
        State by the number of its parameter.
    """
    return {
        i: {k: v for k, v in entry.items() if v is not None} if isinstance(entry, Mapping) else entry
        for i, entry in state.items()
    }


EARLIER_NAMES = {"traffic": "comm_dtype"}
"""Options by the names under which earlier versions saved them."""


def _translated(group: Mapping[str, Any]) -> dict[str, Any]:
    """A saved group with the present names of its options."""
    return {EARLIER_NAMES.get(key, key): value for key, value in group.items()}


def validate_state(
    groups: Sequence[GroupStep],
    saved: Sequence[dict[str, Any]],
    loaded_of: Mapping[int, Mapping[str, Any]],
    averages: Iterable[str],
    elsewhere: Collection[int] = (),
) -> None:
    """Check that every loaded state is that of its parameter under the loaded settings.

    Args:
        groups: with all parameters.
        saved: the completed groups of the checkpoint.
        loaded_of: loaded state by the identity of its parameter.
        averages: keys of the state of averaging methods.
        elsewhere: identities of parameters whose state another rank has loaded.

    Raises:
        ValueError: state is missing, or has another shape.
    """
    for group, settings in zip(groups, saved, strict=True):
        rule = rule_of(settings)
        for s in group.params:
            loaded, p, name = loaded_of.get(id(s.plan.param), {}), s.plan.param, s.plan.name
            blocks, _ = blocks_of(rule, settings, p.shape)
            declared = state_formats(rule, settings, p, blocks) if loaded and id(p) not in elsewhere else {}
            for key, shape in _expected(declared, loaded):
                value = loaded.get(key)
                if value is None and float(loaded.get("step", 1)) > 0:
                    raise ValueError(f"{name}: the checkpoint has no {key!r}; was it another optimizer's?")
                if value is not None and (not isinstance(value, Tensor) or tuple(value.shape) != shape):
                    got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                    raise ValueError(f"{name}: the checkpoint's {key!r} has shape {got}, expected {shape}")
            for key in (COMPENSATION, *averages):
                if key in loaded and loaded[key].shape != p.shape:
                    got, shape = tuple(loaded[key].shape), tuple(p.shape)
                    raise ValueError(f"{name}: the checkpoint's {key!r} has shape {got}, expected {shape}")


def _expected(fmts: Mapping[str, StateFormat], loaded: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Key and shape of everything a checkpoint must hold; it may hold the values of quantized state."""
    for key, fmt in fmts.items():
        yield key, fmt.shape
        if fmt.is_quantized and not (isinstance(x := loaded.get(key), Tensor) and x.is_floating_point()):
            yield scale_key(key), resharding.table_shape(fmt)


def install_state(
    groups: Sequence[GroupStep],
    loaded_of: Mapping[int, Mapping[str, Any]],
    state: Mapping[Tensor, dict[str, Tensor]],
    owners: Owners,
    guard: CollectiveGuard,
    content: str,
    averages: Sequence[str],
) -> None:
    """Copy loaded state into place, in the declared dtypes; matrices with an owner are sent to it.

    Args:
        groups: with the parameters that have loaded state, under the loaded settings; their owners are assigned.
        loaded_of: loaded state by the identity of its parameter.
        state: of the optimizer, written; it makes entries that are missing.
        owners: of its matrices.
        guard: waits for the other ranks.
        content: describes the optimizer.
        averages: keys of the state of averaging methods.
    """
    for group in groups:
        for s in group.params:
            _place(group.rule, s, state[s.plan.param], loaded_of[id(s.plan.param)], averages)
    entries = _entries(groups, owners, lambda p, key: key in loaded_of[id(p)])
    described = [(e.key, e.shape, str(e.dtype), e.owner) for e in entries]
    # replicas load alone
    sharded = [e for e in entries if not isinstance(e.team, Replicas) and not e.team.is_saved_by_rank]
    _wait_for_ranks(guard, sharded, "load_state_dict()", f"{content} {described}")
    for e, whole in resharding.collect(entries, lambda e: loaded_of[id(e.param)][e.key]):
        state[e.param][e.key] = whole
    for group in groups:
        for s in group.params:
            _restore_scales(group.rule, s, state[s.plan.param])


def _place(
    rule: Rule, step: ParamStep, tensors: dict[str, Tensor], loaded: Mapping[str, Any], averages: Sequence[str]
) -> None:
    """Copy loaded state to where it is stored, scales still as tables; not what is sent to an owner."""
    plan, device = step.plan, step.local().device
    for key, fmt in plan.formats.items():  # the parameter may have been resized since
        if key in tensors and tensors[key].shape not in (fmt.shape, (0, *fmt.shape)):
            del tensors[key]
    placed = {*plan.formats, *map(scale_key, plan.formats), "step", COMPENSATION, RADIUS, *averages}
    tensors.update({k: v.clone() if isinstance(v, Tensor) else v for k, v in loaded.items() if k not in placed})
    # torch's SGD and Muon count no steps: it was not the first
    tensors["step"] = torch.tensor(float(loaded.get("step", 1.0)), dtype=STEP_DTYPE, device="cpu")
    if COMPENSATION in loaded:
        value = sharding.place_like(loaded[COMPENSATION], plan.param)
        tensors[COMPENSATION] = value.detach().to(device, plan.dtype, copy=True)
    for key in averages:
        if key in loaded:
            tensors[key] = sharding.place_like(loaded[key], plan.param).detach().to(device, copy=True)
    if RADIUS in loaded:
        tensors[RADIUS] = loaded[RADIUS].detach().to(device, torch.float32, copy=True)
    if plan.team is None:
        _place_declared(rule, step, tensors, loaded)


def _place_declared(rule: Rule, step: ParamStep, tensors: dict[str, Tensor], loaded: Mapping[str, Any]) -> None:
    """Copy the state that a rule declares."""
    plan, device = step.plan, step.local().device
    frame = StackSharding(plan.param, plan.dims, plan.name, plan.transposed) if rule.reduces else None
    for key, fmt in plan.formats.items():
        table = loaded.get(scale_key(key)) if fmt.is_quantized else None
        if key in loaded:
            if rule.elementwise:
                value = sharding.place_like(loaded[key], plan.param)
            else:
                value = frame.place(fmt.spec, loaded[key]) if frame else sharding.place(loaded[key], None)
            dtype = fmt.dtype if table is not None or not fmt.is_quantized else fmt.compute_dtype
            tensors[key] = value.detach().to(device, dtype, copy=True)
        if table is not None:
            cut = sharding.sharding_of(plan.param, plan.name)
            tensors[scale_key(key)] = sharding.local(sharding.place(table, cut)).to(device, torch.float32)


def _restore_scales(rule: Rule, step: ParamStep, tensors: dict[str, Tensor]) -> None:
    """Make scales of loaded tables, and move what is stored on the host."""
    device = step.local().device
    for key, fmt in step.plan.formats.items():
        if fmt.is_quantized and scale_key(key) in tensors:
            quantized, start = sharding.local(tensors[key]), first_index(rule, step.plan, fmt)
            tensors[scale_key(key)] = resharding.scales_of(fmt, tensors[scale_key(key)], quantized, start)
        elif key in tensors and fmt.name == "host" and not fmt.is_compute_format(device):
            tensors[key] = to_storage_device(fmt, tensors[key])
