"""Command line: `python -m lightning_optim list | show | recipes | options | plan | bench`."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any

from lightning_optim.build.recipes import PRESETS, RECIPES, find
from lightning_optim.catalog import FAMILIES, kind, state_bytes, summary
from lightning_optim.core.rule import REGISTRY, nearest
from lightning_optim.settings import parse_value
from lightning_optim.terminal import print_table

OVERVIEW = """\
Optimizers for PyTorch, Transformers and Lightning. What you can do here:

  python -m lightning_optim list                      every optimizer: family, what it works on, state
  python -m lightning_optim list --family low-rank    one family: {families}
  python -m lightning_optim list --search muon        by name, description or source
  python -m lightning_optim show muon                 formula, settings, source, what was measured, how to switch it on
  python -m lightning_optim recipes                   published settings and presets by name
  python -m lightning_optim options                   what every optimizer takes beside its own settings
  python -m lightning_optim plan --model DIR_OR_HUB_ID --optim muon
                                                      which rule every parameter gets, and the bytes of state
  python -m lightning_optim bench run --help          compare optimizers with equal tuning

In a script: optimizer = lightning_optim.build_optimizer(model, "muon", lr=3e-4)
With a Transformers script as it is: python -m hf_integration SCRIPT.py --optim muon"""


def main() -> None:
    """Parse the command line and run a command."""
    if sys.argv[1:2] == ["bench"]:
        from lightning_optim.bench.__main__ import main as bench  # needs more than torch

        bench(sys.argv[2:])
        return
    if not sys.argv[1:]:
        print(OVERVIEW.format(families=", ".join(FAMILIES)))
        return
    parser = argparse.ArgumentParser(prog="python -m lightning_optim", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    listing = commands.add_parser("list", help="print the optimizers, what they work on and their state")
    listing.add_argument("--family", metavar="NAME", help=f"only one of: {', '.join(FAMILIES)}")
    listing.add_argument("--search", metavar="TEXT", help="only those whose name, description or source has this text")
    listing.set_defaults(run=list_optimizers)
    showing = commands.add_parser("show", help="print everything about an optimizer, a recipe or a preset")
    showing.add_argument("name", metavar="NAME")
    showing.set_defaults(run=show_one)
    listing = commands.add_parser("options", help="print what every optimizer takes beside its own settings")
    listing.set_defaults(run=list_options)
    listing = commands.add_parser("recipes", help="print the named recipes, their settings and where they are from")
    listing.set_defaults(run=list_recipes)
    commands.add_parser("bench", help="benchmark optimizers with equal tuning budgets", add_help=False)
    planning = commands.add_parser(
        "plan",
        help="print which rule every parameter of a model gets, why, and its state",
        epilog="Any other --SETTING VALUE (or =VALUE) is a hyperparameter or another argument of build_optimizer.",
    )
    planning.add_argument("--model", required=True, help="directory or hub id of a Transformers model; only its config")
    planning.add_argument("--adapter", metavar="DIR", help="directory or hub id of a PEFT adapter; only its config")
    planning.add_argument(
        "--trust-remote-code", "--trust_remote_code", action="store_true", help="run code that comes with the model"
    )
    planning.add_argument("--optim", metavar="NAME", help="default: the recipe's")
    planning.add_argument("--recipe", metavar="NAME", help="published settings; `recipes` prints them")
    planning.add_argument("--rest", metavar="NAME", help="rule of what the main one does not take")
    planning.add_argument("--last_layer", choices=("rest", "rule"))
    planning.add_argument("--world-size", "--world_size", type=int, default=1, help="say what falls on each of N ranks")
    strategies = ("ddp", "fsdp2", "hsdp", "zero1", "zero2", "zero3")
    planning.add_argument("--strategy", choices=strategies, default="fsdp2", help="of these ranks")
    planning.add_argument("--node-size", "--node_size", type=int, default=8, help="ranks of a node, for hsdp")
    planning.set_defaults(run=print_plan)
    args, others = parser.parse_known_args()
    args.settings = {}
    if others and args.run is not print_plan:
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    try:
        args.settings = _settings(others)
        args.run(args)
        sys.stdout.flush()
    except ValueError as error:
        parser.error(str(error))
    except BrokenPipeError:  # `list | head` reads no further
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _settings(words: Sequence[str]) -> dict[str, Any]:
    """Read `--rank 128 --refresh=fixed:200`."""
    values: dict[str, Any] = {}
    left = list(words)
    while left:
        name, equals, value = left.pop(0).partition("=")
        if not name.startswith("--") or not (equals or left):
            raise ValueError(f"expected --SETTING VALUE or --SETTING=VALUE, got {' '.join(words)}")
        key = name.removeprefix("--").replace("-", "_")
        if key in values:
            raise ValueError(f"{name} is given twice")
        values[key] = parse_value(value if equals else left.pop(0), name)
    return values


def list_optimizers(args: argparse.Namespace) -> None:
    """Print one line per optimizer, of a family or with a text if asked for.

    Raises:
        ValueError: there is no such family, or nothing has the text.
    """
    family, text = args.family, (args.search or "").lower()
    if family is not None and family not in FAMILIES:
        raise ValueError(f"list: no family {family!r}; {nearest(family, list(FAMILIES))}")
    rows = [
        (name, rule.family, kind(rule), f"{state_bytes(rule):.2f} B/weight", summary(rule))
        for name, rule in sorted(REGISTRY.items())
        if family in (None, rule.family) and text in f"{name} {rule.__doc__} {rule.source}".lower()
    ]
    if not rows:
        raise ValueError(f"list: no optimizer has {args.search!r} in its name, description or source")
    print_table(rows, ("name", "family", "works on", "state", "algorithm"))


def show_one(args: argparse.Namespace) -> None:
    """Print the page of an optimizer, a recipe or a preset."""
    from lightning_optim.show import show

    show(args.name)


def list_options(args: argparse.Namespace) -> None:
    """Print the options of every optimizer."""
    from lightning_optim.show import show_options

    del args
    show_options()


def list_recipes(args: argparse.Namespace) -> None:
    """Print the recipes and presets."""
    del args
    rows = [
        (name, recipe.rule, ", ".join(f"{k}={v!r}" for k, v in recipe.settings.items()), recipe.source)
        for name, recipe in sorted((RECIPES | PRESETS).items())
    ]
    print_table(rows, ("name", "optimizer", "settings", "source"))


def print_plan(args: argparse.Namespace) -> None:
    """Print the plan of a model that is never allocated.

    Raises:
        ValueError: neither an optimizer nor a recipe is given, or one is unknown.
    """
    from lightning_optim.build.plan import plan

    if args.optim is None and args.recipe is None:
        raise ValueError("plan: give --optim or --recipe")
    name = args.optim or find(args.recipe).rule
    model = model_without_weights(args.model, args.adapter, trust_remote_code=args.trust_remote_code)
    mesh = {"world_size": args.world_size, "strategy": args.strategy, "node_size": args.node_size}
    arguments = {"rest": args.rest, "last_layer": args.last_layer, **args.settings}
    print(plan(model, name, recipe=args.recipe, **mesh, **arguments))


AUTO_CLASSES = (
    *("CausalLM", "Seq2SeqLM", "ImageTextToText", "SpeechSeq2Seq", "CTC", "MaskedLM", "ImageClassification"),
    *("ObjectDetection", "SemanticSegmentation", "AudioClassification", "ZeroShotImageClassification"),
)
"""Tasks of Transformers, in the order in which a configuration without `architectures` is taken for one."""


def model_without_weights(source: str, adapter: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """A model of Transformers with its parameters on the meta device, by its configuration alone.

    Args:
        source: directory or hub id.
        adapter: directory or hub id of a PEFT adapter, whose configuration is applied.
        trust_remote_code: run code that comes with the model.

    Returns:
        The model; its buffers have values.
    """
    import transformers
    from accelerate import init_empty_weights

    config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code)
    named = next(iter(getattr(config, "architectures", None) or ()), "")
    remote = getattr(config, "auto_map", {}) if trust_remote_code else {}
    tasks = [getattr(transformers, f"AutoModelFor{task}") for task in AUTO_CLASSES]
    tasks = [auto for auto in tasks if auto.__name__ in remote or type(config) in auto._model_mapping]
    with init_empty_weights(include_buffers=False):
        if hasattr(transformers, named):
            model = getattr(transformers, named)(config)
        else:
            auto = (tasks or [transformers.AutoModel])[0]
            model = auto.from_config(config, trust_remote_code=trust_remote_code)
        model.tie_weights()
        if adapter is not None:
            import peft

            model = peft.get_peft_model(model, peft.PeftConfig.from_pretrained(adapter))
    return model


if __name__ == "__main__":
    main()
