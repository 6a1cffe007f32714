"""Final losses of a small model, one optimizer after the other, at AdamW's learning rate.

    python examples/benchmark/tiny.py --optim soap shampoo
    python examples/benchmark/tiny.py --optim galore --optim_args "rank=32"

Each is a run of `examples/pretrain_lightning.py` with its defaults; what it has found is appended to
`examples/benchmark/tiny.jsonl`, a line each, and `tiny.md` says how to read it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent


def run(optim: str, optim_args: str, learning_rate: float, directory: str) -> dict[str, object]:
    """Train once.

    Returns:
        What it was told, validation losses by step, and the largest training loss of a batch after the warm-up.

    Raises:
        subprocess.CalledProcessError: the run failed.
    """
    flags = {"optim": optim, "optim_args": optim_args, "learning_rate": learning_rate, "output_dir": directory}
    flags |= {"diagnostics": "off", "checkpoint_every": 600}
    command = [sys.executable, str(HERE.parent / "pretrain_lightning.py")]
    command += [word for key, value in flags.items() for word in (f"--{key}", str(value))]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    logged = EventAccumulator(directory + "/version_0").Reload()
    losses = {x.step + 1: round(x.value, 4) for x in logged.Scalars("val_loss") if x.step < 600}
    worst = max(x.value for x in logged.Scalars("train_loss") if x.step >= 60)
    return {
        "optim": optim,
        "optim_args": optim_args,
        "learning_rate": learning_rate,
        "val_loss": losses,
        "worst_train_loss": round(worst, 4),
    }


def main() -> None:
    """Run all that is asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", nargs="+", required=True, metavar="NAME")
    parser.add_argument("--optim_args", default="", help="settings of all of them")
    parser.add_argument("--learning_rate", type=float, default=3e-3, help="default %(default)s")
    parser.add_argument("--output", type=Path, default=HERE / "tiny.jsonl", help="appended to")
    args = parser.parse_args()
    for optim in args.optim:
        with tempfile.TemporaryDirectory() as directory:
            actual = run(optim, args.optim_args, args.learning_rate, directory)
        line = json.dumps(actual)
        print(line, flush=True)
        with args.output.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
