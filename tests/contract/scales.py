"""What every rule makes of gradients from 1e-38 to 1e30: `python -m tests.contract.scales` writes `scales.md`."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import torch
from torch.nn import Parameter

from tests.helpers.rules import NAMES, SEARCHING, gradient, make, params

EXPONENTS = (-38, -30, -25, -20, -15, -10, -5, 0, 5, 10, 15, 18, 20, 25, 30)
STEPS, SPIKE_AT = 6, 3
HEAD = """# Gradients of every size

Six steps of float32 weights (matrices of 5 x 12, 12 x 5 and 8 x 8 and, where the rule takes them, vectors) at a
learning rate of 1e-3 and `lr_convention="adamw"`, other settings at their defaults. Gradients are normal numbers times
10^k in all steps, or, in the second table, in the third alone. A number is the largest change of a weight per learning
rate; `s` says that gradients were scaled down, with a warning, since their squares overflow, `x` that the step was
refused before anything was written. `NaN` does not occur, and `tests/contract/test_scales.py` sees to that. Written by
`python -m tests.contract.scales`.

"""


def outcome(name: str, scale: float, *, spike: bool = False) -> str:
    """Take six steps.

    Args:
        name: of the rule.
        scale: of gradients.
        spike: whether of one step's only.

    Returns:
        The largest change of a weight per learning rate, `x` for a refused step, `NaN` if a weight is not finite.
    """
    ps, starts = params(name), params(name)
    optimizer = make(name, ps, lr=1e-3, lr_convention="adamw")
    said = ""
    for t in range(1, STEPS + 1):
        for key, p in ps.items():
            size = scale if not spike or t == SPIKE_AT else 1.0
            p.grad = (gradient(p, key, t).double() * size).to(p.dtype)
        with warnings.catch_warnings(record=True) as record:
            warnings.simplefilter("always", RuntimeWarning)
            before = {key: p.detach().clone() for key, p in ps.items()}
            try:
                optimizer.step()
            except FloatingPointError:
                is_whole = all(torch.equal(before[key], p) for key, p in ps.items())
                return "x" if is_whole else "half-taken"
        said = "s" if any("scaled down" in str(x.message) for x in record) else said
        if not all(p.isfinite().all() for p in ps.values()):
            return "NaN"
    return f"{moved(ps, starts) / 1e-3:.2g}{said}"


def moved(ps: dict[str, Parameter], starts: dict[str, Parameter]) -> float:
    """The largest change of a weight."""
    return max(float((p - starts[key]).detach().abs().max()) for key, p in ps.items())


def table(*, spike: bool) -> str:
    """A table of all rules."""
    lines = ["| | " + " | ".join(f"1e{k}" for k in EXPONENTS) + " |", "|---" * (len(EXPONENTS) + 1) + "|"]
    for name in [*NAMES, *SEARCHING]:
        cells = [outcome(name, 10.0**k, spike=spike) for k in EXPONENTS]
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines)


def main() -> None:
    """Write the tables."""
    torch.set_num_threads(1)
    text = f"{HEAD}## In all steps\n\n{table(spike=False)}\n\n## In one step\n\n{table(spike=True)}\n"
    Path(__file__).with_name("scales.md").write_text(text)


if __name__ == "__main__":
    main()
