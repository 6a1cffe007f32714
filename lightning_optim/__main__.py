"""Command line: `python -m lightning_optim list | plan`."""

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
    planning = commands.add_parser("plan", help="print which rule every parameter of a model gets, why, and its state")
    planning.add_argument("--model", required=True, help="directory or hub id of a Transformers model; only its config")
    planning.add_argument("--optim", required=True, metavar="NAME")
    planning.add_argument("--rest", default="adamw", metavar="NAME", help="rule of what the main one does not take")
    planning.add_argument("--last_layer", default="rest", choices=("rest", "rule"))
    planning.set_defaults(run=print_plan)
    args = parser.parse_args()
    args.run(args)


def list_optimizers(args: argparse.Namespace) -> None:
    """Print one line per optimizer."""
    del args
    for name, rule in sorted(REGISTRY.items()):
        print(f"{name:12} {kind(rule):9} {state_bytes(rule):5.2f} B/weight  {summary(rule)}")


def print_plan(args: argparse.Namespace) -> None:
    """Print the plan of a model that is never allocated."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from lightning_optim.plan import plan

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(args.model))
    print(plan(model, args.optim, rest=args.rest, last_layer=args.last_layer))


if __name__ == "__main__":
    main()
