"""How closely AdamW with 8-bit state follows AdamW in float32: ours, bitsandbytes' and torchao's on one workload.

    pip install bitsandbytes==0.50.2 torchao==0.18.0
    python examples/benchmark/eight_bit.py

A row is a workload: the distance between the weights of the two runs after its steps, over the distance the float32
run has gone, mean of several seeds. All see the same weights and gradients, float32 is `torch.optim.AdamW`. Packages
that are not installed are left out; torchao's step is compiled, which needs a C++ compiler.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import AdamW

Make = Callable[[Parameter], torch.optim.Optimizer]
SETTINGS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}


def contenders() -> dict[str, Make]:
    """Constructors by name, float32 first."""
    out: dict[str, Make] = {"torch float32": lambda p: torch.optim.AdamW([p], **SETTINGS)}
    for storage in ("int8", "int8_grid", "fp8"):
        out[storage] = functools.partial(_ours, storage)
    try:
        from bitsandbytes.optim import AdamW8bit  # pyright: ignore[reportMissingImports]

        out["bitsandbytes"] = lambda p: AdamW8bit([p], **SETTINGS)
    except ImportError:
        pass
    try:
        from torchao.optim import AdamW8bit as AdamW8bitAO  # pyright: ignore[reportMissingImports]

        out["torchao"] = lambda p: AdamW8bitAO([p], **SETTINGS)
    except ImportError:
        pass
    return out


def _ours(storage: Any, p: Parameter) -> torch.optim.Optimizer:
    return AdamW([p], state_storage=storage, **SETTINGS)


def plain(t: int, draw: Callable[[], Tensor]) -> Tensor:
    """White noise of one size: the workload of the published comparisons."""
    del t
    return 0.1 * draw()


def trained(t: int, draw: Callable[[], Tensor]) -> Tensor:
    """A slow signal under noise whose size differs from row to row by up to a thousand."""
    rows = torch.logspace(-3, 0, 64).unsqueeze(1)
    signal = torch.sin(torch.arange(64 * 128).view(64, 128) * 0.37 + 0.01 * t)
    return 0.1 * rows * (draw() + 0.5 * signal)


def sparse(t: int, draw: Callable[[], Tensor]) -> Tensor:
    """Mostly nothing, as the rows of an embedding see it: one entry in ten."""
    del t
    return 0.1 * draw() * (draw() > 1.28)


WORKLOADS = {
    "noise, 20 steps": (plain, 20),
    "rows of 1e-3 to 1, 100 steps": (trained, 100),
    "sparse, 100 steps": (sparse, 100),
}


def displaced(make: Make, gradient: Callable[[int, Callable[[], Tensor]], Tensor], steps: int, seed: int) -> Any:
    """Run one contender.

    Returns:
        (weights after the steps less those before, bytes of state per parameter).
    """
    made = torch.Generator().manual_seed(seed)
    draw = functools.partial(torch.randn, 64, 128, generator=made)
    p = Parameter(draw())
    before, optimizer = p.detach().clone(), make(p)
    for t in range(steps):
        p.grad = gradient(t, draw)
        optimizer.step()
    return p.detach() - before, sum(map(held, optimizer.state[p].values())) / p.numel()


def held(x: Any) -> int:
    """Bytes of a state tensor; torchao's has its parts as attributes."""
    if hasattr(x, "codes"):
        return x.codes.nbytes + x.scale.nbytes
    # bitsandbytes keeps its table beside every state; it is one object for all
    return x.nbytes if isinstance(x, Tensor) and x.numel() not in (1, 256) else 0


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=8, help="default %(default)s")
    args = parser.parse_args()
    actual, (exact, *rest) = contenders(), contenders()
    print("| workload | " + " | ".join(rest) + " |")
    print("|---" * (len(rest) + 1) + "|")
    size: dict[str, float] = {}
    for workload, (gradient, steps) in WORKLOADS.items():
        errors: dict[str, list[float]] = {name: [] for name in rest}
        for seed in range(args.seeds):
            truth, _ = displaced(actual[exact], gradient, steps, seed)
            for name in rest:
                moved, size[name] = displaced(actual[name], gradient, steps, seed)
                errors[name].append(((moved - truth).norm() / truth.norm()).item())
        means = [torch.tensor(errors[name]) for name in rest]
        print(f"| {workload} | " + " | ".join(f"{x.mean():.4f} ± {x.std():.4f}" for x in means) + " |")
    print("| bytes of state per parameter | " + " | ".join(f"{size[name]:.2f}" for name in rest) + " |")


if __name__ == "__main__":
    main()
