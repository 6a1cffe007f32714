"""Time of one optimizer step, ours beside the nearest reference, in one run: ratios, never bare times.

    python examples/benchmark/step_time.py --optim muon adamw lion adafactor --shapes gpt2

Contenders share parameters and gradients and take turns, step by step; gradients are copied afresh before every step,
so that caches are cold for all. The floor is what the machine allows in the same run: for `muon` the products of
Newton-Schulz at the measured bfloat16 matmul rate, for the others the bytes of one pass over parameters, gradients
and state at the rate of torch's fused AdamW (28 bytes per parameter), which moves memory as fast as a copy.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import Executor
from lightning_optim.core.rule import REGISTRY
from lightning_optim.docs import state_bytes
from lightning_optim.optimizers import CLASSES

Shapes = list[tuple[int, ...]]


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> tuple[Shapes, Shapes]:
    """GPT-2 small.

    Returns:
        Shapes of the hidden matrices and of the rest.
    """
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    biases = [(3 * width,), (width,), (4 * width,), (width,), *[(width,)] * 4]
    return block * layers, [(vocabulary, width), (context, width), *biases * layers, (width,), (width,)]


def llama60m(layers: int = 8, width: int = 512, mlp: int = 1376, vocabulary: int = 32000) -> tuple[Shapes, Shapes]:
    """LLaMA 60M, untied.

    Returns:
        Shapes of the hidden matrices and of the rest.
    """
    block = [*[(width, width)] * 4, (mlp, width), (mlp, width), (width, mlp)]
    return block * layers, [*[(vocabulary, width)] * 2, *[(width,)] * (2 * layers + 1)]


SETS: dict[str, Callable[[], tuple[Shapes, Shapes]]] = {
    "gpt2": gpt2,
    "gpt2-2layers": lambda: gpt2(layers=2, vocabulary=4096),
    "llama60m": llama60m,
}


@dataclass
class Contender:
    """One optimizer, or several that make one step together."""

    optimizers: Sequence[torch.optim.Optimizer]

    def step(self) -> None:
        """Take one step."""
        for optimizer in self.optimizers:
            optimizer.step()


def ours(name: str, hidden: list[Parameter], rest: list[Parameter]) -> Executor:
    """Our optimizer over all parameters, AdamW for what the rule does not take.

    Returns:
        The optimizer.
    """
    rule = REGISTRY[name]
    if rule.elementwise or rule.reduces:
        return CLASSES[name]([*hidden, *rest])
    groups = [{"params": hidden, "rule": name, "lr": 1e-6}, {"params": rest, "rule": "adamw", "lr": 1e-6}]
    return Executor(groups)


def references(name: str, hidden: list[Parameter], rest: list[Parameter]) -> list[torch.optim.Optimizer]:
    """What torch has for the same algorithm.

    Returns:
        Optimizers that make one step together; none if torch has no such algorithm.
    """
    everything = [*hidden, *rest]
    if name == "muon":
        return [torch.optim.Muon(hidden, lr=1e-6, weight_decay=0.0), torch.optim.AdamW(rest, lr=1e-6, fused=True)]
    if name == "adafactor":
        return [torch.optim.Adafactor(everything, lr=1e-6)]
    fused: dict[str, Callable[[], torch.optim.Optimizer]] = {
        "adamw": lambda: torch.optim.AdamW(everything, lr=1e-6, fused=True),
        "adam": lambda: torch.optim.Adam(everything, lr=1e-6, fused=True),
        "sgd": lambda: torch.optim.SGD(everything, lr=1e-6, fused=True),
    }
    return [fused[name]()] if name in fused else []


def newton_schulz_flops(hidden: list[Parameter], steps: int = 5) -> float:
    """Operations of the plain quintic iteration: 4 s^2 l + 2 s^3 per step and matrix, s the smaller side.

    Returns:
        Floating-point operations.
    """
    sides = [sorted(p.shape) for p in hidden]
    return float(sum(steps * (4 * s * s * long + 2 * s**3) for s, long in sides))


def matmul_rate(size: int = 1536) -> float:
    """Measured bfloat16 matrix product.

    Returns:
        Floating-point operations per second.
    """
    a = torch.randn(size, size).bfloat16()
    times = []
    for _ in range(7):
        start = time.perf_counter()
        _ = a @ a
        times.append(time.perf_counter() - start)
    return 2 * size**3 / statistics.median(times)


def take_turns(contenders: list[Contender], params: list[Parameter], grads: list[Tensor], rounds: int) -> list[float]:
    """Time contenders step by step.

    Args:
        contenders: take turns in this order.
        params: shared by all.
        grads: copied into the parameters' gradients before every step.
        rounds: timed steps of each, after two untimed ones.

    Returns:
        Median seconds of each contender's step.
    """
    times: list[list[float]] = [[] for _ in contenders]
    for turn in range(rounds + 2):
        for contender, taken in zip(contenders, times, strict=True):
            for p, g in zip(params, grads, strict=True):
                p.grad = g.clone()
            start = time.perf_counter()
            contender.step()
            if turn >= 2:
                taken.append(time.perf_counter() - start)
    return [statistics.median(t) for t in times]


def profile_adamw(params: list[Parameter], grads: list[Tensor]) -> None:
    """Print every operation of an `adamw` step that touches as much memory as a parameter.

    Args:
        params: any.
        grads: one per parameter.
    """
    optimizer = CLASSES["adamw"](params)
    for p, g in zip(params, grads, strict=True):
        p.grad = g.clone()
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        optimizer.step()
    events = [e for e in profile.events() or [] if e.name.startswith("aten::")]
    sized = [e for e in events if "_fused_adamw_" in e.name or any(s and len(s) > 1 for s in e.input_shapes)]
    count = {name: sum(e.name == name for e in sized) for name in {e.name for e in sized}}
    print(f"\noperations of an adamw step over parameter-sized memory, by profile: {count}")


def main() -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", nargs="+", default=["muon", "adamw", "lion", "adafactor"], choices=sorted(REGISTRY))
    parser.add_argument("--shapes", default="gpt2", choices=sorted(SETS))
    parser.add_argument("--rounds", type=int, default=9, help="timed steps of each contender")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    hidden, rest = ([Parameter(0.02 * torch.randn(s)) for s in shapes] for shapes in SETS[args.shapes]())
    params = [*hidden, *rest]
    grads = [1e-3 * torch.randn_like(p) for p in params]
    count = sum(p.numel() for p in params)
    rate = matmul_rate()
    print(
        f"{args.shapes}: {count / 1e6:.1f}M parameters, {args.threads} threads, torch {torch.__version__}, "
        f"bfloat16 matmul {rate / 1e9:.0f} GFLOP/s, median of {args.rounds} alternating steps\n"
    )
    print("| optimizer | / reference | / torch fused AdamW | / floor | floor | state bytes per parameter |")
    print("|---|---|---|---|---|---|")
    for name in args.optim:
        adamw = Contender(references("adamw", hidden, rest))
        mine = Contender([ours(name, hidden, rest)])
        theirs = references(name, hidden, rest)
        contenders = [mine, adamw] + ([Contender(theirs)] if theirs and name != "adamw" else [])
        seconds = take_turns(contenders, params, grads, args.rounds)
        reference = f"{seconds[0] / seconds[-1]:.2f}" if theirs else "-"
        state = sum(t.nbytes for s in mine.optimizers[0].state.values() for t in s.values()) / count
        if name == "muon":
            left = sum(p.numel() for p in rest) / count
            floor, what = newton_schulz_flops(hidden) / rate + left * seconds[1], "Newton-Schulz + AdamW of the rest"
        else:
            moved = 12 + 2 * state_bytes(REGISTRY[name])
            floor, what = seconds[1] * moved / 28, f"{moved:.0f} B per parameter"
        cells = name, reference, f"{seconds[0] / seconds[1]:.2f}", f"{seconds[0] / floor:.2f}", what, f"{state:.2f}"
        print(f"| {' | '.join(cells)} |", flush=True)
    profile_adamw(params, grads)


if __name__ == "__main__":
    main()
