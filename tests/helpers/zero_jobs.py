"""What processes do under DeepSpeed ZeRO on the CPU: steps beside one process with the same gradients, checkpoints."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_optim import RuleOptimizer, build_optimizer
from lightning_optim.core.parallel.sharding import local

STEPS = 4


def start_deepspeed(rank: int, world: int) -> Any:
    """DeepSpeed on the CPU, over the process group there is, without compiling anything."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.utils.logger.setLevel("ERROR")
    deepspeed.init_distributed("gloo", verbose=False)
    return deepspeed


def config_of(stage: int, *, zero: Mapping[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A configuration without clipping, which DeepSpeed has by default."""
    return {
        "train_micro_batch_size_per_gpu": 4,
        "zero_optimization": {"stage": stage, **(zero or {})},
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "gradient_clipping": 0.0,
        **more,
    }


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 5))


def batch(step: int, world: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(4 * world, 6, generator=generator), torch.randn(4 * world, 5, generator=generator)


class Run:
    """One model under ZeRO."""

    def __init__(
        self,
        deepspeed: Any,
        config: dict[str, Any],
        build: Callable[[nn.Module], RuleOptimizer],
        make: Callable[[], nn.Module] = net,
        *,
        init: bool = False,
    ) -> None:
        self.full, self.gradient = deepspeed.utils.safe_get_full_fp32_param, deepspeed.utils.safe_get_full_grad
        with deepspeed.zero.Init(config_dict_or_path=config) if init else contextlib.nullcontext():
            model = make()
        self.optimizer = build(model)
        self.engine = deepspeed.initialize(model=model, optimizer=self.optimizer, config=config)[0]
        self.params = [p for p in model.parameters() if p.requires_grad]

    def backward(self, step: int, rank: int, world: int) -> None:
        dtype = torch.bfloat16 if self.engine.bfloat16_enabled() else torch.float32
        x, y = (t.chunk(world)[rank].to(dtype) for t in batch(step, world))
        self.engine.backward((self.engine(x) - y).square().mean())

    def step(self, step: int, rank: int, world: int) -> None:
        self.backward(step, rank, world)
        self.engine.step()

    def weights(self) -> list[Tensor]:
        return [self.full(p).clone() for p in self.params]

    def gradients(self) -> list[Tensor]:
        return [self.gradient(p).float().clone() for p in self.params]


def compare(rank: int, world: int, cases: Sequence[dict[str, Any]], folder: str) -> list[tuple[float, float, float]]:
    """For each case the largest difference from one process, how far that moved, and the difference after a resume."""
    deepspeed = start_deepspeed(rank, world)
    return [_compared(deepspeed, rank, world, dict(case), f"{folder}/{k}") for k, case in enumerate(cases)]


def _compared(deepspeed: Any, rank: int, world: int, case: dict[str, Any], folder: str) -> tuple[float, float, float]:
    name, init, clip = case.pop("name"), case.pop("init", False), case.get("gradient_clipping", 0.0)
    settings, make = case.pop("settings", {}), {"net": net, "tied": tied}[case.pop("make", "net")]
    config = config_of(**case)

    def build(model: nn.Module) -> RuleOptimizer:
        return build_optimizer(model, name, lr=0.01, weight_decay=0.1, **settings)

    run, alone = Run(deepspeed, config, build, make, init=init), make()
    params = [p for p in alone.parameters() if p.requires_grad]
    for p, start in zip(params, run.weights(), strict=True):
        p.data.copy_(start)  # rounded to bfloat16, say
    before, optimizer = [p.detach().clone() for p in params], build(alone)
    for step in range(STEPS):
        run.backward(step, rank, world)
        for p, g in zip(params, run.gradients(), strict=True):
            p.grad = g
        if clip:  # DeepSpeed's formula
            norm = torch.stack([p.grad.norm() for p in params if p.grad is not None]).norm()
            for p in params:
                p.grad = None if p.grad is None else p.grad * (1 / max(1.0, float(norm + 1e-6) / clip))
        run.engine.step()
        optimizer.step()
        if step == STEPS // 2 - 1:
            run.engine.save_checkpoint(folder)
    after = run.weights()
    again = Run(deepspeed, config, build, make, init=init)
    again.engine.load_checkpoint(folder)
    for step in range(STEPS // 2, STEPS):
        again.step(step, rank, world)
    return largest(after, params), largest(before, params), largest(after, again.weights())


def largest(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    return max(float((a.detach() - b.detach()).abs().max()) for a, b in zip(some, others, strict=True))


class tied(nn.Module):
    """A frozen layer, tied weights, a parameter without a use, one without elements on most ranks."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.middle, self.last = nn.Linear(6, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.last.weight = self.middle.weight
        self.unused, self.scale = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(1))
        self.first.weight.requires_grad_(False)
        self.out = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.middle(torch.tanh(self.first(x)))
        return self.out(torch.tanh(self.last(x))) * self.scale + 0 * self.unused.sum()


def measure(rank: int, world: int, cases: Sequence[dict[str, Any]]) -> list[dict[str, int]]:
    """For each case the bytes on this rank: of state after a step, of the rest before it."""
    deepspeed = start_deepspeed(rank, world)
    return [_measured(deepspeed, rank, world, **case) for case in cases]


def _measured(deepspeed: Any, rank: int, world: int, name: str, **config: Any) -> dict[str, int]:
    run = Run(deepspeed, config_of(**config), lambda model: build_optimizer(model, name, lr=0.01))
    zero, params, alive = run.engine.optimizer, run.params, [0]
    for p in params:  # under ZeRO-1 every rank has all gradients, until the end of the backward pass
        p.register_post_accumulate_grad_hook(lambda _: alive.append(bytes_of(p.grad for p in params)))
    run.backward(0, rank, world)
    if config["stage"] == 3:
        held = {"weights": bytes_of(p.ds_tensor for p in cast("Any", params))}
        held["gradients"] = bytes_of([zero.grad_partitions_flat_buffer])
        held["masters"] = bytes_of(zero.fp32_partitioned_groups_flat)
    else:
        here = bytes_of(g for of in zero.averaged_gradients.values() for g in of)
        held = {"weights": bytes_of(params), "gradients": max(alive) if config["stage"] == 1 else here}
        held["masters"] = bytes_of(zero.single_partition_of_fp32_groups)
    run.engine.step()
    return {"state": bytes_of(local(t) for s in run.optimizer.state.values() for t in s.values()), **held}


def bytes_of(tensors: Iterable[Tensor | None]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)
