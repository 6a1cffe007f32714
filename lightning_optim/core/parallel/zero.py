"""Parameters that DeepSpeed ZeRO has put into flat tensors, seen as parameters again while an optimizer works on them.

ZeRO-1, 2 and `BF16_Optimizer` replace the parameters of a group by one flat tensor, of which each rank has a part;
ZeRO-3 by one per sub-group, and steps one at a time. Around `step`, `state_dict` and `load_state_dict` the groups get
fragments instead: tensors of the parameters' shapes, of which this rank has the runs of elements in its flat tensors.
Rules that work element by element keep the flat tensors, unless an option of their group is about parameters.

DeepSpeed is never imported here; parameters say what it made of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from lightning_optim.core.parallel.flat_parameters import KnownParameters, check_fragments, needs_parameters
from lightning_optim.core.parallel.flat_sharding import FlatSharding
from lightning_optim.core.parallel.fragment import Fragment
from lightning_optim.core.rule import lookup

NVME = "offload_optimizer to NVMe, where DeepSpeed moves the state that it knows; offload to the CPU"
ROUND_ROBIN = "round_robin_gradients, under which DeepSpeed says wrongly where parameters are; leave it out"


class Run(NamedTuple):
    """Where a parameter lies on this rank."""

    shape: tuple[int, ...]
    flat: Tensor
    offset: int
    """Of its first element on this rank in the flat tensor."""
    start: int
    stop: int
    """Which of its elements those are."""
    process_group: Any
    fault: str = ""
    """Why this cannot be used."""


def _run_of(p: Tensor, flat: Tensor | None) -> Run | None:
    """What DeepSpeed has made of a parameter.

    Args:
        p: the parameter.
        flat: the flat tensor of its group, under ZeRO-1 and 2.

    Returns:
        None where it is in no flat tensor: it is frozen, or the engine is another.
    """
    if hasattr(p, "ds_id"):
        return _run_in_stage_3(p)
    if flat is None or not hasattr(p, "_hp_mapping"):
        return None
    group, mapping = getattr(p, "_dp_group", None) or dist.group.WORLD, p._hp_mapping  # pyright: ignore
    if mapping is None:  # nothing of it is on this rank
        return Run(tuple(p.shape), flat, 0, 0, 0, group)
    here, of_param = mapping.hp_fragment_address, mapping.lp_fragment_address
    # the low-precision weights are one buffer, whose parts by rank are as long as the flat tensor
    begin = dist.get_rank(group) * flat.numel() + here.start - of_param.start
    moved = p.untyped_storage().nbytes() >= flat.numel() * p.element_size() and p.storage_offset() != begin
    fault = ROUND_ROBIN if moved else ""
    return Run(tuple(p.shape), flat, here.start, of_param.start, of_param.start + of_param.numel, group, fault)


def _run_in_stage_3(p: Any) -> Run | None:
    zero = getattr(p, "_z3_optimizer", None)
    if zero is None or zero.get_param_id(p) not in zero.grad_position:
        return None
    sub_group, offset, size = zero.grad_position[zero.get_param_id(p)]
    group = zero._get_sub_group_process_group(sub_group)
    start = min(size * dist.get_rank(group), p.ds_numel)
    stop, fault = min(start + size, p.ds_numel), NVME if getattr(zero, "swap_optimizer", False) else ""
    return Run(tuple(p.ds_shape), zero.fp32_partitioned_groups_flat[sub_group], offset, start, stop, group, fault)


@dataclass(eq=False)
class _Group:
    """A param group whose parameters are in flat tensors."""

    group: dict[str, Any]
    own: list[Tensor]
    """Parameters with which it was created."""
    runs: list[Run | None]
    """Of each; None for frozen ones."""
    has_fragments: bool
    params: list[Tensor] = field(default_factory=list)
    """What the optimizer works on: fragments and frozen parameters, or flat tensors."""

    def installed(self, installed: set[int]) -> list[Tensor]:
        """What the optimizer works on now.

        Args:
            installed: the flat tensors that the engine has put into groups.

        Returns:
            All fragments, of which those in other flat tensors take no gradient; or the flat tensors.
        """
        if not self.has_fragments:
            return [p for p in self.params if id(p) in installed]
        for p in self.params:
            if isinstance(p, Fragment):
                p.requires_grad_(id(p.flat) in installed)
        return self.params


class FlatGroups:
    """The groups of an optimizer whose parameters DeepSpeed has put into flat tensors."""

    def __init__(self) -> None:
        self._groups: list[_Group] = []

    def __bool__(self) -> bool:
        return bool(self._groups)

    @contextmanager
    def shown(self, optimizer: Any) -> Iterator[None]:
        """Put fragments into an optimizer's groups, and what the engine had there back at the end.

        The first time this is a collective call.

        Args:
            optimizer: with `known_params`, the parameters that it was given.

        Raises:
            ValueError: a rule, an option or a setting of DeepSpeed's that cannot be; on every rank.
        """
        if not self._groups:
            averaging = optimizer.averages is not None
            self._groups = _flat_groups(optimizer.known_params, optimizer.state, averaging=averaging)
        if not self._groups:
            yield
            return
        given = optimizer.param_groups
        installed = {id(p) for group in given for p in group["params"]}
        before = [of.group["params"] for of in self._groups]
        shown = optimizer.param_groups = [of.group for of in self._groups]
        for of in self._groups:
            of.group["params"] = of.installed(installed)
        try:
            yield
        finally:
            for of, group, params in zip(self._groups, optimizer.param_groups, before, strict=True):
                of.group = group  # loading state makes new groups
                group["params"] = params
            optimizer.param_groups = given if optimizer.param_groups is shown else optimizer.param_groups

    def layout(self) -> list[list[list[int] | None]]:
        """Which elements this rank has, for checkpoints.

        Returns:
            By group and parameter, the first element, one past the last, and the number of elements of all; None for
            frozen parameters.
        """
        return [
            [None if run is None else [run.start, run.stop, math.prod(run.shape)] for run in of.runs]
            for of in self._groups
        ]

    def check_layout(self, saved: Sequence[Any]) -> None:
        """Check that a checkpoint was saved with the same runs of elements on this rank.

        Args:
            saved: what `layout` gave then.

        Raises:
            ValueError: it was not.
        """
        if saved != self.layout():
            raise ValueError(
                "the checkpoint is one rank's part of a run under DeepSpeed ZeRO with another number of ranks or other "
                "groups; continue with as many ranks"
            )


def _flat_groups(known: KnownParameters, state: Mapping[Tensor, Any], *, averaging: bool) -> list[_Group]:
    """The groups of an optimizer with the runs of their parameters; empty where no engine has flattened them."""
    out = []
    for group, own in known.held():
        flat = group["params"][0] if len(group["params"]) == 1 else None
        runs = [_run_of(p, flat) for p in own]
        dtype = next((run.flat.dtype for run in runs if run is not None), torch.float32)
        has_fragments = needs_parameters(lookup(group["rule"]), group, dtype)
        out.append(_Group(group, own, runs, has_fragments))
    everything = [run for of in out for run in of.runs if run is not None]
    if not everything:
        return []
    if any(state.get(p) for of in out for p in of.own):
        raise ValueError(
            "DeepSpeed has replaced the parameters of an optimizer that has state already, which would be lost: load "
            "checkpoints after deepspeed.initialize"
        )
    if averaging:
        raise ValueError("DeepSpeed ZeRO: the averages of `with_averaging` would not reach the model; leave them out")
    if any(run.fault == NVME for run in everything):
        raise ValueError(f"DeepSpeed's configuration asks for {NVME}")
    shardings = iter(_shardings([run for of in out if of.has_fragments for run in of.runs if run is not None]))
    for of in out:
        of_runs = [next(shardings) if run is not None and of.has_fragments else None for run in of.runs]
        flats = list({id(run.flat): run.flat for run in of.runs if run is not None}.values())
        check_fragments(of.group, flats, has_fragments=of.has_fragments)
        of.params = list(flats)
        if of.has_fragments:
            of.params = [
                p if run is None or sharding is None else Fragment(run.shape, run.flat, run.offset, sharding)
                for p, run, sharding in zip(of.own, of.runs, of_runs, strict=True)
            ]
    return out


def _shardings(runs: Sequence[Run]) -> list[FlatSharding]:
    """Which run of each parameter every rank has, as they say themselves: a collective call.

    Returns:
        One sharding per run.

    Raises:
        ValueError: a rank found a fault, or parameters are not whole; on every rank.
    """
    out: dict[int, FlatSharding] = {}
    for process_group in dict.fromkeys(run.process_group for run in runs):
        members = [k for k, run in enumerate(runs) if run.process_group is process_group]
        mine = [(runs[k].start, runs[k].stop, runs[k].fault) for k in members]
        everyone: list[Any] = [None] * dist.get_world_size(process_group)
        dist.all_gather_object(everyone, mine, group=process_group)
        fault = next((fault for rank in everyone for *_, fault in rank if fault), "")
        for k, *by_rank in zip(members, *everyone, strict=True):
            if not fault and sum(stop - start for start, stop, _ in by_rank) != math.prod(runs[k].shape):
                fault = f"a way to place parameters that is not known here: {by_rank} of shape {runs[k].shape}"
            out[k] = FlatSharding([(start, stop) for start, stop, _ in by_rank], process_group)
        if fault:
            raise ValueError(f"DeepSpeed's configuration asks for {fault}")
    return [out[k] for k in range(len(runs))]


@contextmanager
def whole_shapes(params: Iterable[Tensor]) -> Iterator[None]:
    """Let parameters that `zero.Init` has emptied show their shapes, with ones for values, which take no memory.

    Args:
        params: parameters of a model.
    """
    emptied = [p for p in params if hasattr(p, "ds_shape") and p.shape != p.ds_shape]  # pyright: ignore
    before = [p.data for p in emptied]
    try:
        for p in emptied:
            p.data = p.data.new_ones(()).expand(p.ds_shape)  # pyright: ignore[reportAttributeAccessIssue]
        yield
    finally:
        for p, data in zip(emptied, before, strict=True):
            p.data = data


def square_of_partition(p: Any) -> float | None:
    """The square of the norm of a parameter that `zero.Init` has partitioned; a collective call.

    Returns:
        None for other parameters.
    """
    if getattr(p, "ds_tensor", None) is None:
        return None
    group = p.ds_process_group
    count = p.ds_numel - dist.get_rank(group) * p.partition_numel()
    square = p.ds_tensor.detach().reshape(-1)[: max(0, count)].double().square().sum()
    dist.all_reduce(square, group=group)
    return float(square)
