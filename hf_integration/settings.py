"""Arguments of `build_optimizer`: what they may be, and which of them Transformers' arguments give."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Container, Mapping
from dataclasses import fields
from typing import Any

import transformers

from lightning_optim import build_optimizer
from lightning_optim.build.overrides import Override, checked
from lightning_optim.core.options import OPTION_TYPES, expand_options
from lightning_optim.core.param_groups import settings_of
from lightning_optim.core.rule import Rule, check_value, hyperparameters, lookup, nearest
from lightning_optim.settings import parse_settings

ADAM = ("adam", "adamw")
"""Rules whose state is AdamW's."""
ADAM_FLAGS = {"adam_beta1": "betas", "adam_beta2": "betas", "adam_epsilon": "eps"}
"""The setting that each of Adam's flags is."""
BY_FLAG = {"lr": "--learning_rate", "weight_decay": "--weight_decay"}
"""Arguments of `build_optimizer` that `--optim_args` may not give, as the Trainer has flags for them."""


def settings_of_flag(optim_args: str | None) -> dict[str, Any]:
    """Read `--optim_args`.

    Args:
        optim_args: text as `parse_settings` takes it.

    Returns:
        Arguments of `build_optimizer`.

    Raises:
        ValueError: text of another form, or a setting that another flag gives.
    """
    settings = parse_settings(optim_args)
    for key in settings.keys() & BY_FLAG.keys():
        raise ValueError(f"optim_args: {key} is set by {BY_FLAG[key]}")
    return settings


def with_flags(args: transformers.TrainingArguments, name: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Complete the settings of an optimizer by `--learning_rate`, `--weight_decay` and the `--adam_*` flags.

    Args:
        args: the Trainer's.
        name: of the main rule.
        settings: of `build_optimizer`; they win over the flags.

    Returns:
        Keyword arguments of `OptimizerFactory`. With a `recipe` or `preset`, flags at their default do not count, but
        for the learning rate beside a preset: it tells whether weights are fine-tuned.

    Raises:
        ValueError: `fused_backward` beside a flag that needs whole sets of gradients, or one of Adam's flags beside a
            recipe or preset.
    """
    if settings.get("fused_backward"):
        _refuse_what_needs_gradients(args)
    flags = {"name": name, "lr": args.learning_rate, "weight_decay": args.weight_decay}
    if settings.get("recipe") is not None or settings.get("preset") is not None:
        default = {f.name: f.default for f in fields(transformers.TrainingArguments)}
        changed = {k for k in ("learning_rate", "weight_decay") if getattr(args, k) != default[k]}
        changed |= {"learning_rate"} if settings.get("preset") is not None else set()
        _refuse_adam_flags(args, "recipe" if settings.get("recipe") is not None else "preset")
        flags = {k: v for k, v in flags.items() if {"lr": "learning_rate"}.get(k, k) in {"name", *changed}}
        return flags | dict(settings)
    of_rest = adam_settings(args, settings.get("rest", "adamw")) | dict(settings.get("rest_settings") or {})
    told = {lookup(name), lookup(settings.get("rest", "adamw"))}
    overrides = [_with_adam_flags(args, o, told) for o in settings.get("overrides") or ()]
    of_overrides = {"overrides": overrides} if overrides else {}
    return flags | adam_settings(args, name) | dict(settings) | of_overrides | {"rest_settings": of_rest}


def adam_settings(args: transformers.TrainingArguments, name: str) -> dict[str, Any]:
    """What the `--adam_*` flags say to a rule.

    Args:
        args: the Trainer's.
        name: of the rule.

    Returns:
        `betas` and `eps`, each where the rule has Adam's: the default of its publication is that of the flags.
    """
    settings = hyperparameters(lookup(name))
    of = transformers.TrainingArguments
    default, chosen = ({"betas": (x.adam_beta1, x.adam_beta2), "eps": x.adam_epsilon} for x in (of, args))
    return {key: chosen[key] for key in default if settings.get(key) == default[key]}


def _with_adam_flags(args: transformers.TrainingArguments, override: Override, told: Container[type[Rule]]) -> Override:
    """An override with what Adam's flags say to its rule, unless that has been told already."""
    pattern, rule, settings = checked(override)
    if rule is None or lookup(rule) in told:
        return override
    return pattern, rule, adam_settings(args, rule) | dict(settings)


def _refuse_adam_flags(args: transformers.TrainingArguments, source: str) -> None:
    for flag, key in ADAM_FLAGS.items():
        if getattr(args, flag) != getattr(type(args), flag):
            raise ValueError(
                f"--{flag} {getattr(args, flag)} is not used beside a {source}, whose {key} are published; leave it "
                f"out, or give {key} in optim_args, or in rest_settings where the rest's are meant"
            )


def check_settings(name: str, settings: Mapping[str, Any]) -> None:
    """Check keyword arguments of `build_optimizer` before there is a model.

    Args:
        name: of the main rule.
        settings: hyperparameters of the rule and arguments of `build_optimizer`.

    Raises:
        ValueError: an unknown name, or a value out of range or of the wrong type.
    """
    rule = lookup(name)
    of_builder = set(inspect.signature(build_optimizer).parameters) - {"model", "name", "settings"}
    hints = OPTION_TYPES | typing.get_type_hints(rule) | typing.get_type_hints(build_optimizer)
    names = [*settings_of(rule), *sorted(of_builder)]
    for key, value in expand_options(settings).items():
        if key not in names:
            raise ValueError(f"{name} has no setting {key!r}; {nearest(key, names)}")
        if key not in ("overrides", "rest_settings", "averaging", "schedule"):  # build_optimizer checks what is inside
            check_value(f"{name}: {key}", value, hints[key], signed=key in rule.signed or key == "seed")
    lookup(settings.get("rest", "adamw"))


def _refuse_what_needs_gradients(args: transformers.TrainingArguments) -> None:
    wrong = {
        "--gradient_accumulation_steps > 1 (its gradients are used at once: raise the batch size instead)": (
            args.gradient_accumulation_steps > 1
        ),
        "--max_grad_norm > 0 (give 0, and clip_norm in optim_args)": args.max_grad_norm > 0,
        "--fp16 (its gradients are scaled: use --bf16)": args.fp16,
    }
    for what, there in wrong.items():
        if there:
            raise ValueError(f"fused_backward does not work with {what}")
