"""`--optim muon` in scripts that know nothing of lightning_optim."""

from __future__ import annotations

import ast
from typing import Any

from transformers import trainer as of_transformers
from transformers.training_args import OptimizerNames

from hf_integration.arguments import TrainingArguments
from hf_integration.checkpoint import PREFIX, Consolidate, KeepSchedule
from hf_integration.curvature import CurvatureCallback
from hf_integration.factory import OptimizerFactory
from hf_integration.settings import check_settings, with_flags
from lightning_optim.core.rule import REGISTRY

BY_FLAG = {"lr": "--learning_rate", "weight_decay": "--weight_decay"}
BY_CODE = ("rest_settings", "overrides", "averaging", "schedule")


def register() -> list[str]:
    """Let `--optim` of Transformers' own `TrainingArguments` take our names, for the life of this process.

    import hf_integration
    hf_integration.register()  # before the arguments are parsed
    # ... any script: --optim muon --optim_args momentum=0.95,rest_lr=1e-4

    `--optim_args` sets hyperparameters of the rule, options of all groups, and `rest`, `rest_lr` and `lr_convention` of
    `build_optimizer`. Transformers splits it at commas, so a pair is written with a colon: `betas=0.9:0.95`. It is read
    when the optimizer is built, in `train()`. The learning rate, weight decay and Adam's betas and eps are the flags'.

    Names that Transformers has (`sgd`, `adagrad`, `rmsprop`, `adafactor`) stay its own; `OptimizerFactory` and `attach`
    give ours. A saved `training_args.bin` holds the name as a plain string and loads without this package; to train
    from it, call `register()` again, or the Trainer refuses the name.

    Extends two tables of Transformers that are not public, and its list of default callbacks by `KeepSchedule`,
    `Consolidate` and `CurvatureCallback`. Calling it again adds only rules defined since.

    Returns:
        The names that were added.

    Raises:
        RuntimeError: this release of Transformers has no such tables; nothing was changed.
    """
    handlers = _handlers()
    callbacks = getattr(of_transformers, "DEFAULT_CALLBACKS", None)
    if isinstance(callbacks, list):
        callbacks.extend(x for x in (KeepSchedule, Consolidate, CurvatureCallback) if x not in callbacks)
    added = [name for name in sorted(REGISTRY) if name not in OptimizerNames._value2member_map_]
    for name in added:
        handlers[_add_member(name)] = _settings
    return added


def _handlers() -> dict[Any, Any]:
    """The Trainer's table of optimizers by name, if both tables are as we know them."""
    try:
        from transformers.trainer_optimizer import _OPTIMIZER_HANDLERS  # no import, no register(), the rest works

        sample = OptimizerNames.ADAMW_TORCH
        enum = OptimizerNames._member_map_[sample.name] is OptimizerNames._value2member_map_[sample.value] is sample
        if enum and sample.name in OptimizerNames._member_names_ and callable(_OPTIMIZER_HANDLERS[sample]):
            return _OPTIMIZER_HANDLERS
    except (ImportError, AttributeError, LookupError, TypeError):
        pass
    from transformers import __version__

    raise RuntimeError(
        f"register() cannot extend --optim of Transformers {__version__}; give the optimizer to the Trainer: "
        'optimizer_cls_and_kwargs=(hf_integration.OptimizerFactory, {"name": "muon", "lr": 2e-5})'
    )


def _add_member(name: str) -> OptimizerNames:
    member = str.__new__(OptimizerNames, name)
    vars(member).update(
        _name_=f"{PREFIX}{name.upper()}",  # LION is Transformers' lion_32bit
        _value_=name,
        __objclass__=OptimizerNames,
        _sort_order_=len(OptimizerNames._member_names_),
        # pickled as its value: training_args.bin must load where nobody has called register()
        __reduce_ex__=lambda protocol: (str, (name,)),
    )
    setattr(OptimizerNames, member._name_, member)
    OptimizerNames._member_names_.append(member._name_)
    OptimizerNames._member_map_[member._name_] = member
    OptimizerNames._value2member_map_[name] = member
    return member


def _settings(context: Any) -> tuple[type, dict[str, Any]]:
    """What the Trainer asks of a handler: the factory and its arguments."""
    if isinstance(context.args, TrainingArguments) and (pair := context.args.optimizer_cls_and_kwargs()):
        return pair
    name = OptimizerNames(context.args.optim).value
    for key in context.optim_args:
        if key in BY_FLAG:
            raise ValueError(f"optim_args: {key} is set by {BY_FLAG[key]}")
        if key in BY_CODE:
            raise ValueError(f"optim_args cannot express {key}; use hf_integration.OptimizerFactory or attach")
    settings = {key: _value(text) for key, text in context.optim_args.items()}
    check_settings(name, settings)
    return OptimizerFactory, with_flags(context.args, name, settings)


def _value(text: str) -> Any:
    """Read a number, `true`, `None`, a word (`staggered:10` is one), or values with colons between."""
    parts = []
    if text[:1] in ("'", '"'):
        return ast.literal_eval(text)
    for part in text.split(":"):
        try:
            parts.append(ast.literal_eval({"true": "True", "false": "False"}.get(part, part)))
        except (SyntaxError, ValueError):
            return text
    return parts[0] if len(parts) == 1 else tuple(parts)
