"""Time of one step of every preset beside Muon and SOAP, in one run: ratios to Muon's step, never bare times.

    python examples/benchmark/preset_cost.py --width 256 --layers 2
    python examples/benchmark/preset_cost.py --width 2048 --layers 4 --device cuda

The model is made of LLaMA's blocks without a forward pass, its gradients are random. Contenders take turns, step by
step; the first steps, in which state is made, do not count. State is that of the whole optimizer, averages included.
On a CPU time is processor time of one thread, which neighbours on the machine change little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lightning_optim import RuleOptimizer, build_optimizer
from lightning_optim.build.recipes import PRESETS
from lightning_optim.core.rule import REGISTRY


def blocks(width: int, layers: int, vocabulary: int, device: str) -> nn.Module:
    """Embedding, linear layers and head, with gradients.

    Returns:
        The model.
    """
    inner = 8 * width // 3 // 16 * 16
    sides = [*[(width, width)] * 4, (width, inner), (width, inner), (inner, width)] * layers
    linear = [nn.Linear(a, b, bias=False) for a, b in sides]
    head = nn.Linear(width, vocabulary, bias=False)
    model = nn.Sequential(nn.Embedding(vocabulary, width), *linear, head).to(device)
    draw = torch.Generator(device).manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=draw, device=device)
    return model


def step_ms(optimizer: RuleOptimizer, device: str) -> float:
    """Take a step.

    Returns:
        Milliseconds.
    """
    clock = time.process_time if device == "cpu" else time.perf_counter
    start = clock()
    optimizer.step()
    if device == "cuda":
        torch.cuda.synchronize()
    return 1e3 * (clock() - start)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--vocabulary", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    s = parser.parse_args(argv)
    torch.manual_seed(0)
    torch.set_num_threads(1)
    names = {name: preset.rule for name, preset in PRESETS.items() if preset.rule in REGISTRY}
    made: dict[str, tuple[nn.Module, RuleOptimizer]] = {}
    for label in ("muon", "soap", "soap, every step", *names):
        model = blocks(s.width, s.layers, s.vocabulary, s.device)
        if label in names:
            averages = {k: {**v, "start": 0} for k, v in PRESETS[label].settings.get("averaging", {}).items()}
            optimizer = build_optimizer(model, names[label], preset=label, averaging=averages)
            optimizer.total_steps = 1000  # all averages are at work in the first steps of so many
        else:
            settings: dict[str, Any] = {"refresh": "fixed:1"} if "," in label else {}
            optimizer = build_optimizer(model, label.split(",")[0], lr=1e-3, **settings)
        made[label] = model, optimizer
    times: dict[str, list[float]] = {label: [] for label in made}
    for k in range(s.rounds + 3):
        for label, (_, optimizer) in made.items():
            took = step_ms(optimizer, s.device)
            if k >= 3:
                times[label].append(took)
    base = statistics.median(times["muon"])
    print(f"{s.layers} layers of width {s.width}, vocabulary {s.vocabulary}, {s.device}")
    print("| optimizer | step / muon | state bytes per weight |\n|---|---|---|")
    for label, (model, optimizer) in made.items():
        content = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        size = sum(p.numel() for p in model.parameters())
        print(f"| {label} | {statistics.median(times[label]) / base:.2f} | {content / size:.2f} |")


if __name__ == "__main__":
    main()
