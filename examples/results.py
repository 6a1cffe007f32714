"""What a fine-tuning gave, beside those of the other optimizers: the last lines of `finetune_hf.py`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from lightning_optim.terminal import print_table

FILE = "result.json"


@dataclass(frozen=True)
class Result:
    """One run."""

    optimizer: str
    learning_rate: float
    before: float
    """Evaluation loss in nat per token."""
    after: float
    seconds: float
    """Of training, evaluations left out."""
    tokens_per_second: float
    state_bytes: int
    """Of the optimizer, on this process."""
    weights: int
    """Trained."""


def save(result: Result, folder: Path) -> None:
    """Write a result into a run's folder."""
    (folder / FILE).write_text(json.dumps(asdict(result), indent=1) + "\n", encoding="utf-8")


def comparable(result: Result, folder: Path) -> list[tuple[Result, Path]]:
    """The runs beside a run that began at its loss with as many weights to train, itself included.

    Args:
        result: of the run.
        folder: of the run.

    Returns:
        Results and folders, the lowest loss first.
    """
    found = [(json.loads(path.read_text(encoding="utf-8")), path.parent) for path in folder.parent.glob(f"*/{FILE}")]
    runs = [(Result(**values), path) for values, path in found if values.keys() == asdict(result).keys()]
    same = [(r, path) for r, path in runs if abs(r.before - result.before) < 1e-4 and r.weights == result.weights]
    return sorted(same, key=lambda pair: pair[0].after)


def print_comparison(runs: Sequence[tuple[Result, Path]]) -> None:
    """Print a table of runs.

    Args:
        runs: results and folders.
    """
    heading = ("optimizer", "lr", "loss before", "after", "seconds", "tokens/s", "state, MiB", "folder")
    rows = [
        (
            run.optimizer,
            f"{run.learning_rate:g}",
            f"{run.before:.3f}",
            f"{run.after:.3f}",
            f"{run.seconds:.0f}",
            f"{run.tokens_per_second:.0f}",
            f"{run.state_bytes / 2**20:.2f}",
            str(folder),
        )
        for run, folder in runs
    ]
    print_table(rows, heading, heading_when_piped=True)


def print_next(runs: Sequence[tuple[Result, Path]], logs: Path) -> None:
    """Print what to look at and what to try next.

    Args:
        runs: results and folders, the best first.
        logs: folder of the TensorBoard logs of all runs.
    """
    name, rate, tried = runs[0][0].optimizer, runs[0][0].learning_rate, {run.optimizer for run, _ in runs}
    script = "python examples/finetune_hf.py"
    other = next((x for x in ("adamw", "muon", "soap", "normuon") if x not in tried), "lion")
    rows = [
        ("see the runs side by side", f"tensorboard --logdir {logs}"),
        ("compare with another optimizer", f"{script} --optim {other} --learning_rate {rate:g}"),
        (f"twice the rate of {name}", f"{script} --optim {name} --learning_rate {2 * rate:g}"),
        (f"what {name} does", f"python -m lightning_optim show {name}"),
        ("a model and text of your own", f"{script} --model DIR_OR_HUB_ID --data FILE --optim {name}"),
    ]
    print("\nWhat to try next")
    print_table(rows, indent=2)
