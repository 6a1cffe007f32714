"""`python -m lightning_optim show NAME`: everything about one rule, recipe or preset, on one page."""

from __future__ import annotations

import inspect
import json
import re
import textwrap
import typing
from functools import cache
from importlib.resources import files
from typing import Any

from lightning_optim import catalog
from lightning_optim.build.factory import build_optimizer
from lightning_optim.build.recipes import PRESETS, RECIPES, Recipe, find
from lightning_optim.core.options import OPTIONS, Options
from lightning_optim.core.rule import REGISTRY, Rule, lookup, nearest
from lightning_optim.optimizers import CLASSES
from lightning_optim.terminal import print_table

NEEDS = {
    "gauss_newton": "a gradient under labels that the model draws itself",
    "hutchinson": "products with the Hessian",
    "factors": "the inputs and output gradients of every layer",
    "loss": "the loss at other weights",
}
"""What `Rule.curvature_input` stands for. The integrations measure it; other loops take `CurvatureEstimator`."""

SIZES = "tiny: 533,120 weights, micro: 166,208"
RECORDS = "examples/benchmark"
"""In the repository: every run that `measured` tells of."""


@cache
def measured() -> dict[str, list[str]]:
    """What was measured of rules and presets, with its scale; `lightning_optim.bench.measured` writes it.

    Returns:
        Name to sentences.
    """
    return json.loads((files("lightning_optim") / "measured.json").read_text(encoding="utf-8"))


def settings(rule: type[Rule]) -> list[tuple[str, str, str]]:
    """The hyperparameters of a rule.

    Returns:
        Rows of name, default and meaning, which ends with the values where there are only some.
    """
    hints, sentences, out = typing.get_type_hints(rule), catalog.meanings(rule), []
    for name, default in catalog.defaults(rule).items():
        choices = [x for part in (hints[name], *typing.get_args(hints[name])) for x in _choices(part)]
        values = f" One of {', '.join(map(repr, choices))}." if len(choices) > 1 else ""
        out.append((name, repr(default), sentences[name] + values))
    return out


def _choices(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def argument_meanings() -> dict[str, str]:
    """What the arguments of `build_optimizer` and the options of a param group mean.

    Returns:
        Name to the first sentence of its documentation.
    """
    arguments = re.findall(r"^    (\w+): (.*(?:\n {8}.*)*)", inspect.getdoc(build_optimizer) or "", flags=re.MULTILINE)
    words = {name: " ".join(text.split()) for name, text in arguments} | catalog.attribute_docstrings(Options)
    return {name: text.split(". ")[0].rstrip(".") + "." for name, text in words.items()}


def show_options() -> None:
    """Print the options that every optimizer has beside its own settings."""
    sentences = argument_meanings()
    print_table([(k, repr(v), sentences[k]) for k, v in OPTIONS.items()], ("option", "default", "meaning"))


def usage(rule: type[Rule], recipe: str | None = None) -> list[tuple[str, str]]:
    """How a rule, or a recipe of it, is switched on.

    Args:
        rule: class.
        recipe: name of a recipe or preset of the rule.

    Returns:
        Rows of a framework and what to write there.
    """
    name, more, flag = rule.name, "", ""
    rate = "3e-4" if catalog.follows_adamw(rule) else f"{rule().lr:g}"
    if recipe:
        keyword = "preset" if find(recipe).pretraining else "recipe"
        rate = f"{find(recipe).settings['lr']:g}"
        more, flag = f', {keyword}="{recipe}"', f' --learning_rate {rate} --optim_args "{keyword}={recipe}"'
    out = [
        ("Trainer, any script", f"python -m hf_integration SCRIPT.py --optim lightning_optim.{name}{flag}"),
        ("Trainer, in code", f'hf_integration.attach(trainer, "{name}"{more}).train()'),
        ("Lightning", f'return configure_optimizers(self, "{name}", lr={rate}{more})'),
        ("plain PyTorch", f'build_optimizer(model, "{name}", lr={rate}{more})'),
    ]
    if not recipe:
        out.append(("as published", f"lightning_optim.{CLASSES[name].__name__}(params, lr={rule().lr:g})"))
    if rule.curvature_input:
        needs = f"{NEEDS[rule.curvature_input]}: lightning_optim.curvature.CurvatureEstimator(model, optimizer, loss)"
        out.append(("needs in a loop of your own", needs))
    return out


def show(name: str) -> None:
    """Print the page of a rule, a recipe or a preset.

    Args:
        name: of it.

    Raises:
        ValueError: there is none of this name; the message gives the nearest ones.
    """
    recipes = RECIPES | PRESETS
    if name not in REGISTRY and name not in recipes:
        raise ValueError(f"show: no optimizer, recipe or preset {name!r}; {nearest(name, [*REGISTRY, *recipes])}")
    if name in recipes:
        _show_recipe(name, recipes[name])
    else:
        _show_rule(lookup(name))


def _show_rule(rule: type[Rule]) -> None:
    print(f"{rule.name}, {rule.family}\n\n{inspect.cleandoc(rule.__doc__ or '')}")
    print("\nSettings")
    print_table(settings(rule), ("setting", "default", "meaning"), 2)
    bytes_per_weight = catalog.state_bytes(rule)
    print(f"\nState\n  {catalog.state_formula(rule)} elements per m x n matrix;", end=" ")
    print(f"{bytes_per_weight:.2f} bytes per weight of a 1024 x 1024 one; works on {catalog.kind(rule)}")
    print("  (s and l are the shorter and the longer side, r the rank)")
    _show_rest(rule.name, rule.source, usage(rule))
    if names := [key for key, recipe in (RECIPES | PRESETS).items() if recipe.rule == rule.name]:
        print(f"\nRecipes and presets\n  {', '.join(names)}")


def _show_recipe(name: str, recipe: Recipe) -> None:
    kind = "preset for pretraining" if recipe.pretraining else "recipe"
    print(f"{name}, {kind} of {recipe.rule}: {catalog.summary(lookup(recipe.rule))}\n\nSettings")
    sentences = argument_meanings() | catalog.meanings(lookup(recipe.rule))
    rows = [(key, sentences[key], repr(value)) for key, value in recipe.settings.items()]
    print_table(rows, ("setting", "meaning", "value"), 2)
    _show_rest(name, recipe.source, usage(lookup(recipe.rule), name))
    print(f"\nThe rule itself\n  python -m lightning_optim show {recipe.rule}")


def _show_rest(name: str, source: str, rows: list[tuple[str, str]]) -> None:
    print(f"\nSource\n  {source}\n\nMeasured on Python sources ({SIZES}; all of it: {RECORDS})")
    for sentence in measured().get(name, ["Nothing yet."]):
        print(textwrap.fill(sentence, 116, initial_indent="  ", subsequent_indent="    "))
    print("\nHow to switch it on")
    print_table(rows, ("where", "what to write"), 2)
