"""Command line: `python -m lightning_optim list`."""

from __future__ import annotations

import argparse

from lightning_optim.core.rule import REGISTRY
from lightning_optim.docs import kind, state_bytes, summary


def main() -> None:
    """Parse the command line and run a command."""
    parser = argparse.ArgumentParser(prog="python -m lightning_optim", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="print the optimizers, what they work on and their state")
    listing.set_defaults(run=list_optimizers)
    parser.parse_args().run()


def list_optimizers() -> None:
    """Print one line per optimizer."""
    for name, rule in sorted(REGISTRY.items()):
        print(f"{name:12} {kind(rule):9} {state_bytes(rule):5.2f} B/weight  {summary(rule)}")


if __name__ == "__main__":
    main()
