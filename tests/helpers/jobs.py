"""What the processes of the pool do: training steps on sharded parameters with given gradients."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn import Parameter

from lightning_optim import RuleOptimizer, build_optimizer
from lightning_optim.build.mesh_estimate import estimate_mesh
from lightning_optim.core.parallel.element_positions import start_of
from lightning_optim.core.rule import REGISTRY
from lightning_optim.core.step.averaging_methods import averages_of
from tests.helpers.rules import gradient, make

Shapes = dict[str, tuple[int, ...]]
SHAPES: Shapes = {
    "odd": (7, 5),
    "wide": (5, 12),
    "tall": (13, 4),
    "one": (1, 6),
    "again": (7, 5),
    "stack": (4, 6, 3),
    "vector": (9,),
    "bias": (1,),
}
"""Rows that do not divide, a matrix with fewer rows than ranks, two of one shape, a stack of experts, a vector."""


class Model(nn.Module):
    """Parameters without a forward pass; gradients are given."""

    def __init__(self, name: str, dtype: torch.dtype = torch.float32, shapes: Shapes | None = None) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        self.shapes = shapes or SHAPES
        for key, shape in self.shapes.items():
            value = torch.randn(shape, generator=made).to(dtype)
            if REGISTRY[name].vectors or len(shape) >= 2:
                self.register_parameter(key, Parameter(value))


def part_of(whole: Tensor, p: DTensor) -> Tensor:
    """This rank's part of a whole tensor, by `torch.chunk`; FSDP2 cuts what tensor parallelism has cut before."""
    own, cuts = p.device_mesh.get_coordinate() or [], list(enumerate(p.placements))
    strided = [x for x in cuts if not isinstance(x[1], (Shard, Replicate))]
    for d, x in [*(x for x in cuts if isinstance(x[1], Shard)), *strided]:
        dim, parts = cast("Shard", x).dim, whole.chunk(p.device_mesh.size(d), cast("Shard", x).dim)
        whole = parts[own[d]] if own[d] < len(parts) else whole.narrow(dim, 0, 0)
    return whole


def placed(whole: Tensor, p: Tensor) -> Tensor:
    """A gradient, cut like its parameter."""
    if not isinstance(p, DTensor):
        return whole
    part = part_of(whole, p).reshape(p.to_local().shape).clone()
    return DTensor.from_local(part, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def take_steps(model: Model, optimizer: RuleOptimizer, steps: range, missing: dict[int, str] | None = None) -> None:
    """Steps with the same whole gradients on every rank and any mesh."""
    for t in steps:
        for key, p in model.named_parameters():
            p.grad = placed(gradient(torch.empty(p.shape, dtype=p.dtype), key, t), p)
            if (missing or {}).get(t) == key:
                p.grad = None
        optimizer.step()


def whole_of(p: Tensor) -> Tensor:
    """A whole tensor, put together out of the parts of all ranks."""
    if not isinstance(p, DTensor):
        return p.detach().clone()
    index = part_of(torch.arange(p.numel()).view(p.shape), p)
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (index.flatten(), p.to_local().detach().flatten()))
    out = torch.full((p.numel(),), math.nan, dtype=p.dtype)
    for at, values in found:
        assert (out[at].isnan() | (out[at] == values)).all(), "replicas differ"
        out[at] = values
    return out.view(p.shape)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Whole weights, on every rank."""
    return {k: whole_of(p) for k, p in model.named_parameters()}


LAYOUTS = {
    "ddp": 2,
    "shared": 3,
    "fsdp2": 3,
    "hsdp": 4,
    "tp": 2,
    "fsdp2+tp": 4,
    "mixed": 2,
}
"""Every way to lay out a model, with a number of ranks."""


def split(model: nn.Module, mesh: DeviceMesh) -> None:
    """Tensor parallelism: matrices by columns and by rows in turn, vectors by elements."""
    for k, (name, p) in enumerate(list(model.named_parameters(recurse=False))):
        cut = distribute_tensor(p.detach(), mesh, [Shard(1 if k % 2 and p.ndim > 1 else 0)])
        setattr(model, name, Parameter(cut))


def lay_out(model: Model, layout: str, world: int) -> Model:
    """Lay out a model over all ranks."""
    if layout == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    elif layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
        fully_shard(model, mesh=mesh)
    elif layout == "tp":
        split(model, init_device_mesh("cpu", (world,)))
    elif layout == "fsdp2+tp":
        mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("dp", "tp"))
        split(model, mesh["tp"])
        fully_shard(model, mesh=mesh["dp"])
    elif layout == "mixed":
        kept = {p for k, p in model.named_parameters() if k in ("wide", "again", "vector")}
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)), ignored_params=kept)
    return model


def laid_out(rank: int, world: int, layout: str, names: Sequence[str], steps: int, **kwargs: Any) -> Any:
    """Train with every rule; whole weights, or what a rule says that refuses the mesh."""
    out: dict[str, Any] = {}
    for name in names:
        model = lay_out(Model(name, kwargs.get("dtype", torch.float32), kwargs.get("shapes")), layout, world)
        try:
            optimizer = make(name, model.parameters(), **kwargs.get("settings", {}))
            if layout == "shared":
                optimizer.shard_work()
            take_steps(model, optimizer, range(1, steps + 1), kwargs.get("missing"))
            out[name] = weights(model)
        except ValueError as error:
            out[name] = str(error)
    return out


def sharded(
    name: str, world: int, dtype: torch.dtype = torch.float32, *, replicas: int = 1, shapes: Shapes | None = None
) -> Model:
    """A model under FSDP2 over all ranks, or HSDP."""
    model = Model(name, dtype, shapes)
    if replicas > 1:
        mesh = init_device_mesh("cpu", (replicas, world // replicas), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    fully_shard(model, mesh=mesh)
    return model


def train(rank: int, world: int, name: str, steps: int, dtype: torch.dtype, replicas: int = 1, **kwargs: Any) -> Any:
    """Train under FSDP2; the whole weights, bytes of local state and whether the sum over ranks is what is declared."""
    model = sharded(name, world, dtype, replicas=replicas, shapes=kwargs.get("shapes"))
    optimizer = make(name, model.parameters(), **kwargs.get("settings", {}))
    take_steps(model, optimizer, range(1, steps + 1), kwargs.get("missing"))
    held = [t.to_local() if isinstance(t, DTensor) else t for s in optimizer.state.values() for t in s.values()]
    return weights(model), sum(t.nbytes for t in held)


def save(rank: int, world: int, name: str, folder: str, steps: int, dtype: torch.dtype, **kwargs: Any) -> Any:
    """Train, save through DCP, go on."""
    model = lay_out(Model(name, dtype), kwargs.get("layout", "fsdp2"), world)
    optimizer = make(name, model.parameters(), **kwargs.get("settings", {}))
    if kwargs.get("layout") == "shared":
        optimizer.shard_work()
    get_optimizer_state_dict(model, optimizer)  # a fresh save must not count as a step
    take_steps(model, optimizer, range(1, steps + 1))
    state_dict_saver.save(
        {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder
    )
    take_steps(model, optimizer, range(steps + 1, steps + 4))
    return weights(model)


def load_into(model: Model, optimizer: RuleOptimizer, folder: str) -> None:
    """Load what `save` saved."""
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    state_dict_loader.load(state, checkpoint_id=folder, no_dist=not dist.is_initialized())
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])


def load(rank: int, world: int, name: str, folder: str, steps: int, dtype: torch.dtype, **kwargs: Any) -> Any:
    """Load what `save` saved, go on."""
    model = lay_out(Model(name, dtype), kwargs.get("layout", "fsdp2"), world)
    optimizer = make(name, model.parameters(), lr=77.0, **kwargs.get("settings", {}))
    if kwargs.get("layout") == "shared":
        optimizer.shard_work()
    load_into(model, optimizer, folder)
    take_steps(model, optimizer, range(steps + 1, steps + 4))
    return weights(model)


def full_state(rank: int, world: int, name: str, steps: int) -> Any:
    """A full state dict, loaded back by broadcasting from rank 0; then go on."""
    model = sharded(name, world)
    optimizer = make(name, model.parameters())
    take_steps(model, optimizer, range(1, steps + 1))
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole: Any = get_optimizer_state_dict(model, optimizer, options=options)
    fresh = make(name, model.parameters(), lr=77.0)
    fresh.zero_grad()  # torch makes no state while there are gradients
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(model, fresh, whole if rank == 0 else {}, options=options)
    take_steps(model, fresh, range(steps + 1, steps + 4))
    shapes = {f"{k}.{slot}": tuple(v.shape) for k, s in whole.get("state", {}).items() for slot, v in s.items()}
    return weights(model), shapes


def flattened(rank: int, world: int, name: str, steps: int) -> Any:
    """A flattened state dict, loaded back into a fresh optimizer; then go on."""
    model = sharded(name, world)
    optimizer = make(name, model.parameters())
    take_steps(model, optimizer, range(1, steps + 1))
    options = StateDictOptions(flatten_optimizer_state_dict=True)
    saved = get_optimizer_state_dict(model, optimizer, options=options)
    fresh = make(name, model.parameters(), lr=77.0)
    fresh.zero_grad()
    set_optimizer_state_dict(model, fresh, saved, options=options)
    take_steps(model, fresh, range(steps + 1, steps + 4))
    return weights(model)


def collectives(rank: int, world: int, name: str) -> Any:
    """How many collectives one step makes, and the largest number of elements a rank puts into one."""
    model = sharded(name, world)
    optimizer = make(name, model.parameters())
    take_steps(model, optimizer, range(1, 3))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        optimizer.step()
    calls = [e for e in profile.events() or [] if e.name.startswith(("c10d::", "_c10d_functional::all_"))]
    return len(calls), max((math.prod(s) for e in calls for s in e.input_shapes if s), default=0)


@contextmanager
def counted() -> Iterator[dict[str, int]]:
    """Bytes that the optimizer gives to torch.distributed for other ranks."""
    sent = {"all_to_all": 0, "broadcast": 0}
    exchange, broadcast = dist.all_to_all_single, dist.broadcast

    def counting_exchange(output: Tensor, given: Tensor, into: Any, out: list[int], group: Any, **kwargs: Any) -> Any:
        sent["all_to_all"] += (given.numel() - out[dist.get_rank(group)]) * given.itemsize
        return exchange(output, given, into, out, group=group, **kwargs)

    def counting_broadcast(tensor: Tensor, source: int, group: Any, **kwargs: Any) -> Any:
        if source == dist.get_rank():
            sent["broadcast"] += tensor.nbytes * (dist.get_world_size(group) - 1)
        return broadcast(tensor, source, group=group, **kwargs)

    dist.all_to_all_single, dist.broadcast = counting_exchange, counting_broadcast
    try:
        yield sent
    finally:
        dist.all_to_all_single, dist.broadcast = exchange, broadcast


def priced(rank: int, world: int, layout: str, cases: Sequence[Any]) -> list[Any]:
    """`price` of several rules with settings, in both precisions."""
    return [price(rank, world, layout, name, dtype, given) for name, given, dtype in cases]


def price(rank: int, world: int, layout: str, name: str, dtype: torch.dtype, settings: dict[str, Any]) -> Any:
    """Bytes of state here, bytes sent in a step, and what `spread` says of both."""
    members = averages_of((settings := dict(settings)).pop("averaging", {}))
    whole = make(name, Model(name, dtype).parameters(), **settings)
    if members:
        whole.with_averaging(*members)
    strategy: Any = "ddp" if layout == "shared" else layout
    said = estimate_mesh(whole, strategy, world, node_size=world // 2, shard_work=layout == "shared")
    model = lay_out(Model(name, dtype), layout, world)
    optimizer = make(name, model.parameters(), **settings)
    if members:
        optimizer.with_averaging(*members)
    if layout == "shared":
        optimizer.shard_work()
    take_steps(model, optimizer, range(1, 3))
    with counted() as sent:
        take_steps(model, optimizer, range(3, 4))
    held = [t.to_local() if isinstance(t, DTensor) else t for s in optimizer.state.values() for t in s.values()]
    at = rank % len(said.state)
    return sum(t.nbytes for t in held), said.state[at], sum(sent.values()), said.sent[at]


def lost(rank: int, world: int, how: str) -> float:
    """One rank fails while the others wait, or is killed before a collective in which they are."""
    total = torch.ones(())
    if rank == 1 and how == "raise":
        raise ValueError("nobody else knows")
    if rank == 1 and how == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "raise":
        time.sleep(60)
    dist.all_reduce(total)
    return total.item()


def groups_differ(rank: int, world: int, layout: str) -> Any:
    """One rank has another learning rate: what every rank is told, and whether anything moved."""
    model = lay_out(Model("muon"), layout, world)
    optimizer = make("muon", model.parameters(), lr=0.03 if rank == 1 else 0.02)
    if layout == "shared":
        optimizer.shard_work()
    before, message = weights(model), ""
    try:
        take_steps(model, optimizer, range(1, 2))
    except RuntimeError as error:
        message = str(error)
    return message, all(torch.equal(before[k], v) for k, v in weights(model).items())


def consolidated(rank: int, world: int, name: str) -> Any:
    """Shared work: one rank alone may not ask for the state, until all have collected it; a load makes that stale."""
    model = Model(name)
    optimizer = make(name, model.parameters())
    optimizer.shard_work()
    take_steps(model, optimizer, range(1, 4))
    held = sum(t.nbytes for s in optimizer.state.values() for k, t in s.items() if k != "step")
    optimizer._guard.timeout = timedelta(seconds=2)
    message, saved = "", None
    if rank == 1:
        try:
            optimizer.state_dict()
        except RuntimeError as error:
            message = str(error)
    dist.barrier()
    optimizer.consolidate()
    if rank == 1:
        saved = optimizer.state_dict()
    box = [saved]
    dist.broadcast_object_list(box, 1)
    optimizer.load_state_dict(cast("dict[str, Any]", box[0]))
    stale = ""
    if rank == 1:
        try:
            optimizer.state_dict()
        except RuntimeError as error:
            stale = str(error)
    dist.barrier()
    fresh = make(name, model.parameters(), lr=77.0)
    fresh.shard_work()
    fresh.load_state_dict(cast("dict[str, Any]", box[0]))
    take_steps(model, fresh, range(4, 7))
    return (message, stale), held, weights(model)


def narrow_communication(rank: int, world: int, layout: str) -> Any:
    """Whole weights after steps whose gradients and directions travel in bfloat16, and bytes sent in the last."""
    model = lay_out(Model("muon"), layout, world)
    optimizer = make("muon", model.parameters(), comm_dtype="bf16")
    if layout == "shared":
        optimizer.shard_work()
    take_steps(model, optimizer, range(1, 4))
    with counted() as sent:
        take_steps(model, optimizer, range(4, 5))
    return weights(model), sum(sent.values())


def trained_by_loss(rank: int, world: int, offload: bool, reduce_dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Whole weights after steps of muon with the gradients of a loss; every rank has its share of the batch."""
    model, mesh = Deep(), init_device_mesh("cpu", (world,))
    policy = MixedPrecisionPolicy(reduce_dtype=reduce_dtype)
    where = CPUOffloadPolicy(pin_memory=False) if offload else OffloadPolicy()
    for part in (*model.layers, model):
        fully_shard(part, mesh=mesh, mp_policy=policy, offload_policy=where)
    optimizer = build_optimizer(model, "muon", lr=1e-2, ns_dtype="float32")
    for t in range(4):
        model(batch(t).chunk(world)[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return weights(model)


def compressed(rank: int, world: int, name: str, steps: int) -> Any:
    """DDP whose optimizer reduces gradients itself: whole weights, bytes sent per step, what a lone state_dict says."""
    model, sent = Deep(), []
    module = nn.parallel.DistributedDataParallel(model)
    optimizer = build_optimizer(model, name, lr=1e-2, rest="lion" if name != "signum" else None)
    optimizer.compress(module)
    reduce = dist.all_reduce

    def counting(t: Tensor, *args: Any, **kwargs: Any) -> Any:
        if t.dtype != torch.float64:  # what ranks agree on
            sent.append(t.nbytes)
        return reduce(t, *args, **kwargs)

    said = ""
    for t in range(steps):
        module(batch(t).chunk(world)[rank]).square().mean().backward()
        dist.all_reduce, _ = counting, sent.clear()
        optimizer.step()
        dist.all_reduce = reduce
        optimizer.zero_grad()
        if t == 1:  # as if resumed
            try:
                optimizer.state_dict()
            except RuntimeError as error:
                said = str(error)
            optimizer.consolidate()
            saved = optimizer.state_dict()
            optimizer = build_optimizer(model, name, lr=77.0, rest="lion" if name != "signum" else None)
            optimizer.compress(module)
            optimizer.load_state_dict(saved)
    return weights(model), sum(sent), said


def decided(rank: int, world: int, layout: str, policies: Sequence[str], steps: int, told: bool = True) -> Any:
    """By policy, refreshes of two groups and the whole weights; the clock of a rank is faster than the one before."""
    out: dict[str, Any] = {}
    for policy in policies:
        model = lay_out(Model("soap"), layout, world)
        named = list(model.named_parameters())
        groups = [{"params": named[::2]}, {"params": named[1::2], "lr": 0.01}]
        optimizer, events = make("soap", groups, refresh=policy, betas=(0.5, 0.5)), []
        optimizer.on_refresh = events.append
        optimizer._refreshes.clock.now = lambda: (1 + 9 * rank) * time.perf_counter()
        if layout == "shared":
            optimizer.shard_work()
        elif layout == "ddp" and world > 1 and told:
            optimizer.process_group = dist.group.WORLD
        take_steps(model, optimizer, range(1, steps + 1))
        out[policy] = [(e.name, e.t, e.reason) for e in events], weights(model)
    return out


def batch(t: int) -> Tensor:
    """A batch of 12 rows."""
    return gradient(torch.empty(12, 7), "x", t)


def owners(rank: int, world: int, name: str) -> Any:
    """Which parameters have whole state here."""
    model = sharded(name, world)
    optimizer = make(name, model.parameters())
    take_steps(model, optimizer, range(1, 2))
    names: dict[Tensor, str] = {p: k for k, p in model.named_parameters()}
    saved = optimizer.state_dict()["state"]
    parts = {k: {slot: (tuple(v.shape), isinstance(v, DTensor)) for slot, v in s.items()} for k, s in saved.items()}
    owned = {
        names[p]: {k: tuple(v.shape) for k, v in s.items() if k != "step"}
        for p, s in optimizer.state.items()
        if all(v.numel() for v in s.values())
    }
    local = [v.to_local() for s in saved.values() for v in s.values() if isinstance(v, DTensor)]
    tight = all(t.untyped_storage().nbytes() == t.nbytes for t in local)
    return owned, parts, tight


def disagree(rank: int, world: int, name: str, layout: str = "fsdp2") -> Any:
    """One rank has no gradient for one matrix: every rank raises, nothing moves, and the next step works."""
    model = lay_out(Model(name), layout, world)
    optimizer = make(name, model.parameters())
    if layout == "shared":
        optimizer.shard_work()
    take_steps(model, optimizer, range(1, 3))
    before = weights(model)
    take = dict(model.named_parameters())
    for key, p in take.items():
        p.grad = placed(gradient(torch.empty(p.shape), key, 3), p)
    if rank == 1:
        take["wide"].grad = None
    try:
        optimizer.step()
        message = ""
    except RuntimeError as error:
        message = str(error)
    same = all(torch.equal(before[k], v) for k, v in weights(model).items())
    take_steps(model, optimizer, range(3, 5))
    return message, same, weights(model)


def not_finite(rank: int, world: int, name: str, layout: str = "fsdp2") -> Any:
    """A NaN in one rank's shard is agreed by all."""
    model = lay_out(Model(name), layout, world)
    optimizer = make(name, model.parameters(), on_nonfinite="raise")
    if layout == "shared":
        optimizer.shard_work()
    take_steps(model, optimizer, range(1, 3))
    before = weights(model)
    for key, p in model.named_parameters():
        whole = gradient(torch.empty(p.shape), key, 3)
        if key == "odd" and (rank == 0 or layout != "shared"):
            whole[0, 0] = math.nan  # on rank 0
        p.grad = placed(whole, p)
    try:
        optimizer.step()
        message = ""
    except FloatingPointError as error:
        message = str(error)
    same = all(torch.equal(before[k], v) for k, v in weights(model).items())
    return message, same


def resized(rank: int, world: int, name: str, layout: str) -> Any:
    """A parameter resized in place is told on every rank, also where others keep its state; then it starts again."""
    model = lay_out(Model(name), layout, world)
    optimizer = make(name, model.parameters())
    if layout == "shared":
        optimizer.shard_work()
    take_steps(model, optimizer, range(1, 3))
    state = {k: {key: t.clone() for key, t in optimizer.state[p].items()} for k, p in model.named_parameters()}
    p = model.get_parameter("odd")
    larger = torch.randn(9, 5, generator=torch.Generator().manual_seed(3))
    if isinstance(p, DTensor):
        p.data = distribute_tensor(larger, p.device_mesh, p.placements)
    else:
        p.data = larger
    p.grad = None
    before = {k: x.detach().clone() for k, x in model.named_parameters() if k != "odd"}
    messages = []
    for call in (optimizer.step, optimizer.state_dict):
        try:
            call()
        except RuntimeError as error:
            messages.append(str(error))
    same = all(torch.equal(v, model.get_parameter(k)) for k, v in before.items())
    now = {k: optimizer.state[p] for k, p in model.named_parameters()}
    same = same and all(now[k][key].equal(t) for k, slots in state.items() for key, t in slots.items())
    if layout == "fsdp2":  # a DTensor keeps its old part when its data is set: training could not go on
        return messages, same, {}
    optimizer.state.pop(p)
    take_steps(model, optimizer, range(3, 5))
    return messages, same, weights(model)


def lonely_state_dict(rank: int, world: int, name: str) -> Any:
    """`state_dict()` on one rank only raises, and never hangs."""
    model = sharded(name, world)
    optimizer = make(name, model.parameters())
    take_steps(model, optimizer, range(1, 3))
    optimizer._guard.timeout = timedelta(seconds=2)
    message = ""
    if rank == 0:
        try:
            optimizer.state_dict()
        except RuntimeError as error:
            message = str(error)
    dist.barrier()
    together = optimizer.state_dict()["state"]
    return message, len(together)


def frozen(rank: int, world: int, name: str) -> Any:
    """A matrix frozen in mid-run keeps its state through a state dict, and continues where it was."""
    model = sharded(name, world)
    optimizer = make(name, model.parameters())
    take_steps(model, optimizer, range(1, 3))
    model.get_parameter("odd").requires_grad_(False)
    take_steps(model, optimizer, range(3, 4), {3: "odd"})
    saved = optimizer.state_dict()
    fresh = make(name, model.parameters())
    fresh.load_state_dict(saved)
    model.get_parameter("odd").requires_grad_(True)
    take_steps(model, fresh, range(4, 6))
    return weights(model)


def aligned(rank: int, world: int, storage: str) -> Any:
    """Quantised state of an elementwise rule whose rows are whole blocks; with one process, without a mesh."""
    model = nn.Module()
    for key, shape in {"even": (6, 32), "odd": (7, 16), "wide": (3, 64)}.items():
        value = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        model.register_parameter(key, Parameter(value))
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    optimizer = RuleOptimizer(model.parameters(), {"rule": "lion", "state_storage": storage, **ALIGNED})
    for t in range(1, 6):
        for key, p in model.named_parameters():
            p.grad = placed(gradient(torch.empty(p.shape), key, t), p)
        optimizer.step()
    full = {k: p.full_tensor() if isinstance(p, DTensor) else p for k, p in model.named_parameters()}
    return {k: p.detach().clone() for k, p in full.items()}


ALIGNED: dict[str, Any] = {"storage_min": 1, "storage_block": 16}


def begun_within_a_block(rank: int, world: int) -> tuple[int, float]:
    """Codes of rows that are no whole blocks: this rank's first element, how far a graph's steps are from others."""
    whole = torch.randn(260, 131, generator=torch.Generator().manual_seed(0))
    start = distribute_tensor(whole, init_device_mesh("cpu", (world,)), [Shard(0)])
    ps = [Parameter(start.clone()) for _ in range(2)]
    for p, graphs in zip(ps, (True, False), strict=True):
        optimizer = RuleOptimizer([p], {"rule": "adamw", "state_storage": "int8", "compile": graphs})
        for t in range(1, 4):
            p.grad = placed(gradient(torch.empty(whole.shape), "whole", t), p)
            optimizer.step()
    found, expected = (cast("DTensor", p).to_local().detach() for p in ps)
    return start_of(ps[0]), ((found - expected).norm() / (expected - start.to_local()).norm()).item()


class Deep(nn.Module):
    """Three layers under FSDP2, with the gradients of a loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([nn.Linear(7, 5), nn.Linear(5, 6), nn.Linear(6, 7)])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x


def _deep(world: int) -> Deep:
    model, mesh = Deep(), init_device_mesh("cpu", (world,))
    for layer in model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def fused_backward(rank: int, world: int, name: str) -> list[dict[str, Tensor]]:
    """Whole weights after steps within the backward pass, and after ordinary ones."""
    out = []
    for fused in (True, False):
        model = _deep(world)
        optimizer = make(name, list(model.parameters()), clip_norm=0.1)
        for t in range(4):
            x = gradient(torch.empty(4, 7), "x", t * world + rank)
            if fused:
                with optimizer.fuse_backward().norm_pass():
                    model(x).square().sum().backward()
            model(x).square().sum().backward()
            assert all((p.grad is None) == fused for p in model.parameters())
            optimizer.step()
            optimizer.zero_grad()
        out.append({k: cast("DTensor", p).full_tensor().detach() for k, p in model.named_parameters()})
    return out


def refused_in_fused_backward(rank: int, world: int) -> list[str]:
    """What is said to DDP, and to matrices that travel."""
    said = []
    model = nn.parallel.DistributedDataParallel(Deep())
    optimizer = make("lion", list(model.parameters()))
    optimizer.fuse_backward()
    try:
        model(torch.ones(2, 7)).sum().backward()
    except RuntimeError as error:
        said.append(str(error))
    sharded = _deep(world)
    try:
        make("muon", [p for p in sharded.parameters() if p.ndim == 2]).fuse_backward()
    except ValueError as error:
        said.append(str(error))
    return said


def averaged(rank: int, world: int, name: str, folder: str, members: Any) -> dict[str, Tensor]:
    """Train a wrapped optimizer under FSDP2, save in between; the averaged weights."""
    model = sharded(name, world)
    optimizer = make(name, model.parameters()).with_averaging(*members)
    get_optimizer_state_dict(model, optimizer)
    take_steps(model, optimizer, range(1, 5))
    optimizer.eval()
    optimizer.train()
    state_dict_saver.save(
        {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=folder
    )
    take_steps(model, optimizer, range(5, 9))
    optimizer.eval()
    return weights(model)
