"""The whole benchmark on a CPU, stage by stage; the same command continues where the last one stopped.

    python examples/benchmark/suite.py --minutes 40
    python -m lightning_optim bench report --out examples/benchmark/cpu

Two processes share the work with `--shard 0/2` and `--shard 1/2`; a stage that needs what the other has not done yet is
left to the next call.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from lightning_optim.bench.__main__ import main as bench
from lightning_optim.core.rule import REGISTRY

OUT = Path(__file__).parent / "cpu"
FINALISTS = ["adamw", "muon", "soap", "normuon", "lion", "adam_mini", "alice", "racs", "galore", "fira", "shampoo"]
TUNERS = ["adamw", "muon", "soap", "lion", "adam_mini", "galore"]
SEEDS = ["--seeds", "0", "1", "2"]
APART = ["--rest_lr", "0.02"]
"""AdamW's best rate for embeddings and gains (`frontier.py`), for all."""
SEARCHING = sorted(name for name, rule in REGISTRY.items() if rule.curvature_input == "loss")
"""Rules whose trials take ten times as long: they come last."""
OTHERS = sorted({*REGISTRY} - {*SEARCHING})
STAGES: dict[str, list[str]] = {
    "every optimizer that does not search": ["run", *APART, "--trials", "6", "--optim", *OTHERS],
    "finalists on three seeds": ["run", *APART, "--trials", "6", *SEEDS, "--finalists", "10", "--optim", *OTHERS],
    "a second size": ["run", *APART, "--model", "micro", "--trials", "6", "--optim", *FINALISTS, *SEEDS],
    "the finalists of all on the second size": [
        *["run", *APART, "--model", "micro", "--trials", "6", *SEEDS],
        *["--optim", "sink_soap", "cosmos", "kl_soap", "muon_sq", "soap_muon", "moso", "swan"],
    ],
    "what papers claim, on three seeds": ["run", *APART, "--trials", "6", "--optim", *FINALISTS, *SEEDS],
    "the same time": ["run", *APART, "--track", "seconds", "--trials", "6", "--optim", *FINALISTS],
    "the same memory": ["run", *APART, "--track", "memory", "--trials", "6", "--optim", *FINALISTS],
    **{
        f"{regime} after {start}": [
            *["run", "--regime", regime, "--start", start, "--tokens", "65536", "--trials", "4", *SEEDS],
            *["--optim", *TUNERS],
        ]
        for regime in ("full", "lora", "continue")
        for start in ("adamw", "muon")
    },
    "preferences": ["run", "--regime", "dpo", "--start", "adamw", "--tokens", "32768", "--trials", "4"]
    + ["--optim", "adamw", "muon", "lion"],
    "ablations": ["ablate", *APART],
    "rules that search": ["run", *APART, "--trials", "6", "--optim", *SEARCHING],
    "finalists of all": ["run", *APART, "--trials", "6", *SEEDS, "--finalists", "10"],
}
"""What each stage types after `python -m lightning_optim bench`."""


def main() -> None:
    """Run stages until the time is up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--shard", default="0/1")
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--cache", type=Path, default=Path("runs/bench/cache"))
    args = parser.parse_args()
    started = time.monotonic()
    for name, words in STAGES.items():
        left = args.minutes - (time.monotonic() - started) / 60
        if left <= 0:
            break
        print(f"-- {name}", flush=True)
        where = ["--out", str(args.out), "--cache", str(args.cache)]
        try:
            if not bench([*words, *where, "--minutes", str(left), "--shard", args.shard]):
                break
        except SystemExit:  # it has said which pretraining is missing
            continue


if __name__ == "__main__":
    main()
