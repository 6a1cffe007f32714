"""Command line: `python -m lightning_optim bench run | ablate | transfer | report`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from lightning_optim.bench import report, run


def main(argv: Sequence[str] | None = None) -> bool:
    """Parse the command line and run a command.

    Args:
        argv: without the program's name; default: `sys.argv`.

    Returns:
        False if the minutes were over before everything was done.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_optim bench", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    running = commands.add_parser("run", help="tune optimizers with equal budgets; the same command resumes")
    run.add_arguments(running)
    run.add_setup(running)
    running.set_defaults(run=run.run_command)
    ablating = commands.add_parser("ablate", help="one component of an optimizer in several forms")
    ablating.add_argument("names", nargs="*", metavar="NAME", help="rank, refresh, storage, ...; default: all")
    run.add_arguments(ablating)
    run.add_setup(ablating)
    ablating.set_defaults(run=run.ablate_command)
    transferring = commands.add_parser("transfer", help="print the loss at AdamW's learning rate and at the own best")
    run.add_arguments(transferring)
    transferring.set_defaults(run=report.transfer_command)
    reporting = commands.add_parser("report", help="write report.md and report.html, a page of its own")
    run.add_arguments(reporting)
    reporting.add_argument("--readme", type=Path, help="write a summary between this file's marks, too")
    reporting.set_defaults(run=report.report_command)
    args = parser.parse_args(argv)
    try:
        return args.run(args)
    except ValueError as error:
        return parser.error(str(error))


if __name__ == "__main__":
    main()
