"""Names of optimizers among Transformers' `OptimizerNames`. Imports neither the Trainer nor what needs it."""

from __future__ import annotations

from typing import Any

from lightning_optim.core.rule import REGISTRY

PREFIX = "lightning_optim."
"""Makes a name of `--optim` ours, where Transformers has one that is the same."""
MEMBER_PREFIX = "LIGHTNING_OPTIM_"
"""Of the members that are added to `OptimizerNames`."""


def add_names(names: Any) -> list[str]:
    """Add members for the rules that have none, and for each with the prefix.

    Args:
        names: `transformers.training_args.OptimizerNames`.

    Returns:
        The values that were added.
    """
    values = [*sorted(REGISTRY), *(f"{PREFIX}{name}" for name in sorted(REGISTRY))]
    added = [value for value in values if value not in names._value2member_map_]
    for value in added:
        _add_member(names, value)
    return added


def _add_member(names: Any, value: str) -> None:
    member = str.__new__(names, value)
    vars(member).update(
        _name_=MEMBER_PREFIX + value.replace(".", "_").upper(),  # LION is Transformers' lion_32bit
        _value_=value,
        __objclass__=names,
        _sort_order_=len(names._member_names_),
        # pickled as its value: training_args.bin must load where nobody has called register()
        __reduce_ex__=lambda protocol: (str, (value,)),
    )
    setattr(names, member._name_, member)
    names._member_names_.append(member._name_)
    names._member_map_[member._name_] = member
    names._value2member_map_[value] = member
