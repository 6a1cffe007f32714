"""`--optim muon` in scripts that know nothing of lightning_optim."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import transformers
from transformers import Trainer
from transformers import trainer as of_transformers
from transformers.training_args import OptimizerNames

from hf_integration.arguments import TrainingArguments
from hf_integration.checkpoint import Consolidate, KeepSchedule
from hf_integration.curvature import CurvatureCallback
from hf_integration.factory import OptimizerFactory
from hf_integration.settings import check_settings, settings_of_flag
from hf_integration.startup.optimizer_names import MEMBER_PREFIX, PREFIX, add_names


def register() -> list[str]:
    """Let `--optim` of Transformers' own `TrainingArguments` take our names, for the life of this process.

    import hf_integration
    hf_integration.register()  # before the arguments are parsed
    # ... any script: --optim muon --optim_args "momentum=0.95, rest_lr=1e-4"

    `--optim_args` sets arguments of `build_optimizer`, in the form of `lightning_optim.settings.parse_settings`. It is
    read when the optimizer is built, in `train()`. The learning rate, weight decay and Adam's betas and eps are the
    flags'; `--optim_target_modules` keeps the optimizer to the weights of these modules.

    Names that Transformers has (`sgd`, `adagrad`, `rmsprop`, `adafactor`) stay its own; `lightning_optim.sgd` is ours,
    and every other name may have the prefix, too. A saved `training_args.bin` holds the name as a plain string and
    loads without this package; to train from it, call `register()` again, or the Trainer refuses the name.

    Extends the members of `OptimizerNames`, `Trainer.get_optimizer_cls_and_kwargs`, which the Trainer asks for names of
    its own as before, and the Trainer's list of default callbacks by `KeepSchedule`, `Consolidate` and
    `CurvatureCallback`. Calling it again adds only rules defined since.

    Returns:
        The names that were added.

    Raises:
        RuntimeError: this release of Transformers cannot be extended so; nothing was changed.
    """
    _check_release()
    if not isinstance(Trainer.get_optimizer_cls_and_kwargs, _OptimizerLookup):
        Trainer.get_optimizer_cls_and_kwargs = staticmethod(_OptimizerLookup(Trainer.get_optimizer_cls_and_kwargs))
    callbacks = getattr(of_transformers, "DEFAULT_CALLBACKS", None)
    if isinstance(callbacks, list):
        callbacks.extend(x for x in (KeepSchedule, Consolidate, CurvatureCallback) if x not in callbacks)
    return add_names(OptimizerNames)


def _check_release() -> None:
    """Check that the names and the Trainer's way to an optimizer are as we know them.

    Raises:
        RuntimeError: they are not.
    """
    try:
        sample = OptimizerNames.ADAMW_TORCH
        tables = OptimizerNames._member_map_[sample.name] is OptimizerNames._value2member_map_[sample.value] is sample
        lookup = inspect.signature(Trainer.get_optimizer_cls_and_kwargs).parameters
        if tables and sample.name in OptimizerNames._member_names_ and list(lookup) == ["args", "model"]:
            return
    except (AttributeError, LookupError, TypeError):
        pass
    raise RuntimeError(
        f"register() cannot extend --optim of Transformers {transformers.__version__}; give the optimizer to the "
        'Trainer: optimizer_cls_and_kwargs=(hf_integration.OptimizerFactory, {"name": "muon", "lr": 2e-5})'
    )


class _OptimizerLookup:
    """`Trainer.get_optimizer_cls_and_kwargs` that also knows our names."""

    def __init__(self, theirs: Callable[..., Any]):
        self.theirs = theirs

    def __call__(self, args: Any, model: Any = None) -> Any:
        """The factory and its arguments for a name of ours, else what the Trainer has.

        Returns:
            What the Trainer asks for: a class or factory, and keyword arguments.
        """
        if isinstance(args, TrainingArguments) and (pair := args.optimizer_cls_and_kwargs()):
            return pair
        if not (isinstance(args.optim, OptimizerNames) and args.optim.name.startswith(MEMBER_PREFIX)):
            return self.theirs(args, model)
        name = str(args.optim.value).removeprefix(PREFIX)
        settings = settings_of_flag(args.optim_args)
        check_settings(name, settings)
        return OptimizerFactory, {"name": name, "args": args, **settings}
