"""Which parameter of a checkpoint is which of an optimizer: by name, where both have names and they differ."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

_log = logging.getLogger(__name__)

SHOWN = 6
"""Names in a message."""


def match_by_name(present: Sequence[Mapping[str, Any]], saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint with the groups and the order of parameters of an optimizer.

    Parameters have the same name if they have it after the prefixes of wrappers (`module.`, `_orig_mod.`). A parameter
    that the checkpoint lacks, or that another rule updated there, starts from scratch, and a warning names it. Settings
    are the checkpoint's for groups of the same name and rule.

    Args:
        present: groups of the optimizer.
        saved: the checkpoint, as `state_dict` returns it.

    Returns:
        The checkpoint itself where the names are the same in the same groups, or where one side has none.

    Raises:
        ValueError: no parameter of the optimizer is in the checkpoint.
    """
    groups = saved["param_groups"]
    if not all("param_names" in group and "rule" in group for group in [*present, *groups]):
        return saved
    here, there = ([[_bare(x) for x in group["param_names"]] for group in side] for side in (present, groups))
    same_sizes = [len(names) for names in here] == [len(names) for names in there]
    if same_sizes and all(_ends_alike(a, b) for a, b in zip(chain(*here), chain(*there), strict=True)):
        return saved
    number = dict(zip(chain(*there), chain.from_iterable(g["params"] for g in groups), strict=True))
    rule = {name: group["rule"] for group, names in zip(groups, there, strict=True) for name in names}
    pairs = [(group["rule"], name) for group, names in zip(present, here, strict=True) for name in names]
    taken = {name for rule_here, name in pairs if rule.get(name) == rule_here}
    if not taken:
        raise ValueError(
            f"no parameter of the checkpoint is one of this optimizer under the same rule: it has {_few(number)}, "
            f"and here are {_few(list(chain(*here)))}"
        )
    _warn(here, rule, taken)
    settings_of = {(g.get("name"), g["rule"]): g for g in groups}
    out, count = [], 0
    for group, names in zip(present, here, strict=True):
        like = settings_of.get((group.get("name"), group["rule"]), group)
        ids = list(range(count, count := count + len(names)))
        out.append({**like, "params": ids, "param_names": list(group["param_names"])})
    known = {i: number[name] for i, (_, name) in enumerate(pairs) if name in taken}
    state = {i: saved["state"][k] for i, k in known.items() if k in saved["state"]}
    return {**saved, "state": state, "param_groups": out}


def _warn(here: Sequence[Sequence[str]], rule_of: Mapping[str, str], taken: set[str]) -> None:
    """Say what starts from scratch, and what of the checkpoint is left."""
    names = list(chain(*here))
    unknown = [name for name in names if name not in rule_of]
    other = [name for name in names if name in rule_of and name not in taken]
    left = [name for name in rule_of if name not in set(names)]
    lists = {
        "not in the checkpoint, from scratch": unknown,
        "of another rule there, from scratch": other,
        "in the checkpoint only": left,
    }
    said = [f"{what}: {_few(found)}" for what, found in lists.items() if found]
    _log.warning(
        "state of %s of %s parameters is continued; %s", len(taken), len(names), "; ".join(said) or "groups differ"
    )


def _few(names: Any) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")


def _ends_alike(a: str, b: str) -> bool:
    """Whether two names are one, perhaps of a module and of one that holds it."""
    return a == b or a.endswith(f".{b}") or b.endswith(f".{a}")


def _bare(name: str) -> str:
    """A name without the prefixes of wrappers."""
    return ".".join(part for part in name.removeprefix("module.").split(".") if part != "_orig_mod")
