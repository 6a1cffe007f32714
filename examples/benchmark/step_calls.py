"""Function calls and Python time of a steady optimizer step: what a reader follows, what it costs besides kernels.

    python examples/benchmark/step_calls.py
    python examples/benchmark/step_calls.py --python_time

Calls are those into this package during the fourth step of one 16 x 16 matrix; a move is a call in another file than
the call before it. torch's own optimizers are counted beside ours. `--python_time` prints microseconds of CPU time per
parameter and step, one thread: 448 LoRA matrices, and the 73 tensors of a LLaMA 60M whose sides are divided by 16, so
that kernels take little. For a comparison of two versions run both in turns, with `PYTHONPATH` set to each.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch.nn import Parameter

import lightning_optim
from lightning_optim.core.rule import REGISTRY


class Trace(NamedTuple):
    """The calls of a step."""

    calls: int
    files: list[str]
    moves: int


def trace(step: Callable[[], Any], root: str) -> Trace:
    """Count the calls of one step.

    Args:
        step: takes it.
        root: part of the path of the files whose functions count.

    Returns:
        Calls, files in the order of their names, and moves from file to file.
    """
    visited: list[str] = []

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        code = frame.f_code
        if event == "call" and root in code.co_filename and not code.co_name.startswith("<"):
            visited.append(code.co_filename.rsplit(root, 1)[-1])

    sys.setprofile(profile)
    try:
        step()
    finally:
        sys.setprofile(None)
    moves = sum(a != b for a, b in zip(visited, visited[1:], strict=False))
    return Trace(len(visited), sorted(set(visited)), moves)


def steady_step(cls: Callable[..., torch.optim.Optimizer], root: str, **settings: Any) -> Trace:
    """The calls of the fourth step of one matrix.

    Args:
        cls: class of the optimizer.
        root: see `trace`.
        **settings: of the optimizer.

    Returns:
        The counts.
    """
    p = Parameter(torch.randn(16, 16))
    optimizer = cls([p], lr=1e-3, **settings)
    for _ in range(3):
        p.grad = torch.randn(16, 16)
        optimizer.step()
    p.grad = torch.randn(16, 16)
    gc.collect()  # what is left of earlier work may be finalized by functions of ours, and not within the step
    return trace(optimizer.step, root)


LORA = [(64, 8), (8, 64)] * 224
LLAMA = [*([(32, 32)] * 4 + [(86, 32)] * 2 + [(32, 86)]) * 8, *[(2000, 32)] * 2, *[(32,)] * 17]
SHAPES: dict[str, list[tuple[int, ...]]] = {"448 LoRA matrices": LORA, "LLaMA 60M / 16": LLAMA}


def python_time(name: str, shapes: list[tuple[int, ...]], steps: int = 25) -> float:
    """CPU time of a step, under a schedule.

    Args:
        name: of the rule of the matrices; vectors get AdamW where it takes none.
        shapes: of the parameters.
        steps: how many are timed.

    Returns:
        Median, in microseconds per parameter.
    """
    torch.manual_seed(0)
    params = [Parameter(torch.randn(*shape) * 0.1) for shape in shapes]
    vectors = name if REGISTRY[name].elementwise else "adamw"
    groups: list[dict[str, Any]] = [
        {"params": [p for p in params if p.ndim > 1], "rule": name},
        {"params": [p for p in params if p.ndim < 2], "rule": vectors},
    ]
    optimizer = lightning_optim.RuleOptimizer([group for group in groups if group["params"]])
    for p in params:
        p.grad = torch.randn_like(p)
    seconds = []
    for t in range(steps + 12):
        for group in optimizer.param_groups:
            group["lr"] *= 0.999
        started = time.thread_time()
        optimizer.step()
        if t >= 12:
            seconds.append(time.thread_time() - started)
    return statistics.median(seconds) / len(params) * 1e6


def main() -> None:
    """Print the counts, or the times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", nargs="+", default=["adamw", "muon", "soap", "lion", "sgd"], metavar="NAME")
    parser.add_argument("--python_time", action="store_true", help="microseconds per parameter in place of calls")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.python_time:
        for label, shapes in SHAPES.items():
            for name in args.optim:
                print(f"{label:18} {name:12} {python_time(name, shapes):7.2f} us per parameter")
        return
    rows = {name: steady_step(lightning_optim.optimizers.CLASSES[name], "lightning_optim/") for name in args.optim}
    rows["torch AdamW"] = steady_step(torch.optim.AdamW, "torch/optim/", foreach=False)
    rows["torch Muon"] = steady_step(torch.optim.Muon, "torch/optim/")
    for name, row in rows.items():
        print(f"{name:12} {row.calls:4} calls  {len(row.files):3} files  {row.moves:3} moves  {' '.join(row.files)}")


if __name__ == "__main__":
    main()
