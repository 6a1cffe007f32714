"""Memory by category: bytes from storages, peaks from the allocator.

A byte is counted once, by the storage that holds it: tied weights and views add nothing.
"""

from __future__ import annotations

import os
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves

from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.parallel import sharding
from lightning_optim.core.param_groups import blocks_of, rule_of
from lightning_optim.core.state import formats
from lightning_optim.core.step.plan import state_formats

MIB = 2**20
Key = tuple[str, int, int]


def inner_tensors(t: Tensor) -> Iterator[Tensor]:
    """The plain tensors a tensor is made of: its shard, or the parts of a quantized subclass.

    Args:
        t: any tensor.

    Yields:
        Tensors with a storage.
    """
    t = sharding.local(t)
    if is_traceable_wrapper_subclass(t):
        for name in t.__tensor_flatten__()[0]:  # pyright: ignore[reportAttributeAccessIssue]
            yield from inner_tensors(getattr(t, name))
    else:
        yield t


def storages(tensors: Iterable[Tensor]) -> dict[Key, int]:
    """The storages behind tensors on this rank, each once.

    Args:
        tensors: any; those on the meta device have none.

    Returns:
        (device, address, bytes) to bytes.
    """
    out: dict[Key, int] = {}
    for whole in tensors:
        for t in inner_tensors(whole):
            if t.device.type == "meta" or t.layout != torch.strided:
                continue
            storage = t.untyped_storage()
            if storage.nbytes():
                out[str(t.device), storage.data_ptr(), storage.nbytes()] = storage.nbytes()
    return out


def state_storages(optimizer: torch.optim.Optimizer) -> dict[str, dict[Key, int]]:
    """Storages of an optimizer's state by slot, without those of parameters.

    Args:
        optimizer: any; state may be nested in dictionaries, lists and objects.

    Returns:
        Slot to storages.
    """
    weights = storages(p for g in optimizer.param_groups for p in g["params"])
    out: dict[str, dict[Key, int]] = {}
    for slots in optimizer.state.values():
        for slot, value in slots.items() if isinstance(slots, Mapping) else ():
            of_slot = storages(_tensors(value, set()))
            out.setdefault(str(slot), {}).update({k: v for k, v in of_slot.items() if k not in weights})
    return out


def _tensors(value: Any, visited: set[int]) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif id(value) not in visited:
        visited.add(id(value))
        if isinstance(value, Mapping):
            inner: Iterable[Any] = value.values()
        elif isinstance(value, (list, tuple, set)):
            inner = value
        else:
            inner = vars(value).values() if hasattr(value, "__dict__") else ()
        for x in inner:
            yield from _tensors(x, visited)


def predicted_state(optimizer: torch.optim.Optimizer) -> int | None:
    """Bytes of state the rules declare for the trained parameters, over all ranks, step counts included.

    Returns:
        A pure function of shapes; None for an optimizer that is not ours.
    """
    if not isinstance(optimizer, RuleOptimizer):
        return None
    total = 0
    for group in optimizer.param_groups:
        rule = rule_of(group)
        for p in group["params"]:
            if p.requires_grad:
                parts, _ = blocks_of(rule, group, p.shape)
                total += formats.STEP_DTYPE.itemsize
                total += sum(form.nbytes for form in state_formats(rule, group, p, parts).values())
                total += p.numel() * p.dtype.itemsize if formats.compensated(p.dtype, group) else 0
    return total


def categories(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, int]:
    """Bytes on this rank: `parameters`, `buffers`, `gradients`, `state`, `state_host` and `state.<slot>`.

    Args:
        model: the module that is trained.
        optimizer: its optimizer.

    Returns:
        Category to bytes; `state_host` is the part of `state` that lies on the CPU while parameters do not.
    """
    params = list(model.parameters())
    owned = storages(params)
    buffers = {k: v for k, v in storages(model.buffers()).items() if k not in owned}
    gradients = storages(p.grad for p in params if p.grad is not None)
    slots = state_storages(optimizer)
    state = {k: v for of_slot in slots.values() for k, v in of_slot.items()}
    out = {"parameters": owned, "buffers": buffers, "gradients": gradients, "state": state}
    if any(p.device.type != "cpu" for p in params):
        out["state_host"] = {k: v for k, v in state.items() if k[0] == "cpu"}
    out |= {f"state.{slot}": of_slot for slot, of_slot in slots.items()}
    return {name: sum(sizes.values()) for name, sizes in out.items()}


class SavedActivations:
    """Bytes saved for the backward pass, as a context around a forward pass; tensors are not touched.

    It does not count attributes of custom autograd functions and reentrant checkpoints.
    """

    def __init__(self, model: nn.Module) -> None:
        """Start counting at zero.

        Args:
            model: whose parameters and buffers are not activations.
        """
        self._weights = set(storages([*model.parameters(), *model.buffers()]))
        self._saved: dict[Key, int] = {}
        self._hooks: saved_tensors_hooks | None = None
        self.error: Exception | None = None
        """The exception of the counting, which training must not raise."""

    @property
    def bytes(self) -> int:
        """Bytes saved so far."""
        return sum(self._saved.values())

    def _pack(self, t: Tensor) -> Tensor:
        try:
            self._saved.update({k: v for k, v in storages([t]).items() if k not in self._weights})
        except Exception as error:
            self.error = error
        return t.detach()  # what a node saves of its own result would keep the graph alive where nothing goes back

    def __enter__(self) -> SavedActivations:
        """Watch what autograd saves."""
        hooks = saved_tensors_hooks(self._pack, lambda t: t)
        hooks.__enter__()
        self._hooks = hooks
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching."""
        if self._hooks is not None:
            self._hooks.__exit__(kind, error, trace)
            self._hooks = None


class LiveStorages(TorchDispatchMode):
    """Bytes of storages that operations have made and that are still alive, and their peak; about 15 % slower.

    `with LiveStorages() as live: ...` counts what is allocated inside, on any device.
    """

    def __init__(self) -> None:
        super().__init__()
        self.current = self.peak = 0
        self._alive: set[int] = set()
        self.error: Exception | None = None
        """The exception of the counting, which the operations must not raise."""

    def _free(self, key: int, size: int) -> None:
        self._alive.discard(key)
        self.current -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run an operation and count the storages it makes."""
        before = self._safely(self._storage_ids, (args, kwargs)) or set()
        out = func(*args, **(kwargs or {}))
        self._safely(self._count, out, before)
        return out

    def _safely(self, call: Callable[..., Any], *args: Any) -> Any:
        try:
            return None if self.error is not None else call(*args)
        except Exception as error:
            self.error = error

    def _storage_ids(self, value: Any) -> set[int]:
        return {id(t.untyped_storage()) for t in _flat(value) if t.layout == torch.strided}

    def _count(self, out: Any, before: set[int]) -> None:
        for t in _flat(out):
            if t.device.type == "meta" or t.layout != torch.strided:
                continue
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._alive or id(storage) in before or not size:
                continue
            self._alive.add(key)
            self.current += size
            weakref.finalize(storage, self._free, key, size)
        self.peak = max(self.peak, self.current)


def _flat(value: Any) -> list[Tensor]:
    return [t for t in tree_leaves(value) if type(t) in (Tensor, nn.Parameter)]


def allocator(stats: Mapping[str, Any]) -> dict[str, float]:
    """The figures of `torch.cuda.memory_stats()`, in bytes and shares.

    Args:
        stats: its dictionary.

    Returns:
        `allocated`, `allocated_peak`, `reserved`, `reserved_peak`, `active_peak`, `retries`, `ooms`, and the shares
        `fragmentation` (reserved but not allocated), `split` (in split blocks that cannot be given back) and
        `rounding` (allocated but not requested); what the dictionary does not have is left out.
    """
    names = {
        "allocated": "allocated_bytes.all.current",
        "allocated_peak": "allocated_bytes.all.peak",
        "reserved": "reserved_bytes.all.current",
        "reserved_peak": "reserved_bytes.all.peak",
        "active_peak": "active_bytes.all.peak",
        "retries": "num_alloc_retries",
        "ooms": "num_ooms",
    }
    out = {name: float(stats[key]) for name, key in names.items() if key in stats}
    reserved, allocated = out.get("reserved", 0.0), out.get("allocated", 0.0)
    if reserved:
        out["fragmentation"] = 1 - allocated / reserved
        if "inactive_split_bytes.all.current" in stats:
            out["split"] = stats["inactive_split_bytes.all.current"] / reserved
    if allocated and "requested_bytes.all.current" in stats:
        out["rounding"] = 1 - stats["requested_bytes.all.current"] / allocated
    return out


class Phases:
    """Peaks of the parts of a training step on a device whose allocator counts them.

    Every `mark` ends a phase and resets the allocator's peak counter; `run_peak` keeps what a reset would lose.
    """

    def __init__(self, stats: Callable[[], Mapping[str, Any]], reset: Callable[[], None]) -> None:
        """Take the allocator's two functions.

        Args:
            stats: `torch.cuda.memory_stats`, say.
            reset: `torch.cuda.reset_peak_memory_stats`.
        """
        self._stats, self._reset = stats, reset
        self.run_peak = 0.0
        self.peaks: dict[str, float] = {}
        self.growth: dict[str, float] = {}
        self._start = 0.0

    def begin(self) -> None:
        """Start the first phase of a step."""
        self._next(allocator(self._stats()))

    def mark(self, phase: str) -> None:
        """End a phase and start the next.

        Args:
            phase: its name.
        """
        stats = allocator(self._stats())
        self.peaks[phase] = stats.get("allocated_peak", 0.0)
        self.growth[phase] = self.peaks[phase] - self._start
        self._next(stats)

    def _next(self, stats: Mapping[str, float]) -> None:
        self.run_peak = max(self.run_peak, stats.get("allocated_peak", 0.0))
        self._start = stats.get("allocated", 0.0)
        self._reset()


def resident() -> dict[str, int]:
    """Bytes of this process in main memory.

    Returns:
        `rss` now and `rss_peak` over the process's life; fewer where the system does not tell.
    """
    out: dict[str, int] = {}
    status = Path("/proc/self/status")
    if status.exists():
        keys = {"VmRSS:": "rss", "VmHWM:": "rss_peak"}
        for line in status.read_text().splitlines():
            key, _, rest = line.partition("\t")
            if key in keys:
                out[keys[key]] = int(rest.split()[0]) * 1024
    elif os.name == "posix":
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        out["rss_peak"] = peak if sys.platform == "darwin" else peak * 1024
    return out
