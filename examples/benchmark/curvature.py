"""What a curvature estimator costs: time per step against AdamW, and the share of it that measurements take.

    python examples/benchmark/curvature.py --preset 9m

Every optimizer takes the same steps on the same random tokens, threads as PyTorch chooses. A step is timed as a whole:
passes, measurements, optimizer. The mean step is put together of the steps in which nothing is due, those that measure,
and those that also decompose (K-FAC): a run of a hundred steps has one of these.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass
from statistics import median

import torch
from torch import Tensor

from lightning_optim import build_optimizer
from lightning_optim.curvature import CurvatureEstimator
from lightning_optim.data.presets import PRESETS, build_model


@dataclass
class Cost:
    """Seconds of the steps of one optimizer."""

    plain: float
    """Nothing is due."""
    measured: float
    """The extra of a step that measures."""
    decomposed: float
    """The extra of a step that computes costly state."""
    measurement: float
    """Of one measurement, as the estimator itself counts."""


def run(name: str, preset: str, rows: int, steps: int) -> Cost:
    """Time the steps of an optimizer.

    Args:
        name: of the optimizer.
        preset: of the model.
        rows: per batch.
        steps: how many; the first one decomposes, as does every hundredth, every tenth measures.

    Returns:
        Its costs.
    """
    torch.manual_seed(0)
    shape = PRESETS[preset]
    model = build_model(shape.vocabulary, shape).train()
    batch = torch.randint(shape.vocabulary, (rows, shape.context))
    optimizer = build_optimizer(model, name, lr=1e-4)
    refreshes: list[float] = []
    optimizer.on_refresh = lambda event: refreshes.append(event.seconds)

    def loss(batch: Tensor) -> Tensor:
        return model(input_ids=batch, labels=batch).loss

    estimator = CurvatureEstimator(model, optimizer, loss)
    seconds: list[float] = []
    spent: list[float] = []
    for _ in range(steps):
        started, before = time.perf_counter(), estimator.seconds
        estimator.record_batch(batch)
        loss(batch).backward()
        estimator.estimate()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - started)
        spent.append(estimator.seconds - before)
    plain = median(s for s, f in zip(seconds[1:], spent[1:], strict=True) if not f)
    due = [(s, f) for s, f in zip(seconds[1:], spent[1:], strict=True) if f]
    measured = median(s for s, _ in due) - plain if due else 0.0
    return Cost(plain, measured, sum(refreshes), median(f for _, f in due) if due else 0.0)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="9m")
    parser.add_argument("--rows", type=int, default=4, help="per batch (default %(default)s)")
    parser.add_argument("--steps", type=int, default=22, help="of each optimizer (default %(default)s)")
    args = parser.parse_args()
    names = ("adamw", "sophia_g", "sophia_h", "kfac")
    actual = {name: run(name, args.preset, args.rows, args.steps) for name in names}
    base = actual["adamw"].plain
    print(f"{args.preset}, {args.rows} rows, {torch.get_num_threads()} threads; measured every 10 steps")
    print("| optimizer | plain step | measurement | decomposition | mean step | over AdamW | share of measurements |")
    print("|---|---|---|---|---|---|---|")
    for name, c in actual.items():
        mean = c.plain + c.measured / 10 + c.decomposed / 100
        share = c.measurement / 10 / mean
        print(
            f"| `{name}` | {c.plain:.3f} s | {c.measured:.3f} s | {c.decomposed:.3f} s | {mean:.3f} s "
            f"| {100 * (mean / base - 1):+.1f} % | {100 * share:.1f} % |"
        )


if __name__ == "__main__":
    main()
