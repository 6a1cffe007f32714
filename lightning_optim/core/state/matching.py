"""Which parameter of a checkpoint is which of an optimizer: by name, where both have names and they differ."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from lightning_optim.core.matrix_views import frozen

_log = logging.getLogger(__name__)

SHOWN = 6
"""Names in a message."""


def match_by_name(present: Sequence[Mapping[str, Any]], saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """A checkpoint with the groups and the order of parameters of an optimizer.

    Parameters have the same name if they have it without the prefixes of wrappers (`bare_name`). A parameter that the
    checkpoint lacks, or that another rule updated there, starts from scratch, and a warning names it. Settings are the
    checkpoint's for groups of the same name and rule.

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
    here, there = ([[bare_name(x) for x in group["param_names"]] for group in side] for side in (present, groups))
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
        own = {key: list(group[key]) for key in ("param_names", "role_sources") if key in group}
        out.append({**like, "params": ids, **own})
    known = {i: number[name] for i, (_, name) in enumerate(pairs) if name in taken}
    state = {i: saved["state"][k] for i, k in known.items() if k in saved["state"]}
    return {**saved, "state": state, "param_groups": out}


def validate_matrices(present: Sequence[Mapping[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Check that the parameters of a checkpoint are taken as the matrices that they were when it was saved.

    Roles are measured when an optimizer is built, and another version of a library may give another result. What the
    user gives to another rule is not meant: there, somebody else says what the parameter is, or nobody another thing.

    Args:
        present: groups of the optimizer.
        saved: groups of the checkpoint; without names of parameters nothing is checked.

    Raises:
        ValueError: a parameter is taken otherwise; the message has the overrides with which it is not.
    """
    now, then = _matrices_by_name(present), _matrices_by_name(saved)
    both = [name for name in then if name in now and then[name][:3] != now[name][:3]]
    different = [
        name
        for name in both
        if then[name][0] == now[name][0] or ("" not in (a := {then[name][3], now[name][3]}) and len(a | {"user"}) == 3)
    ]
    if not different:
        return
    role_of = {bare_name(name): group["role"] for group in saved for name in group["param_names"]}
    says = [f"{x[0]} with blocks={x[1]!r}, transposed={x[2]!r}" for x in (then[different[0]], now[different[0]])]
    overrides = [
        (name, then[name][0], {"role": role_of[name], "blocks": then[name][1], "transposed": then[name][2]})
        for name in different
    ]
    also = f" (and {len(different) - 1} others)" if len(different) > 1 else ""
    raise ValueError(
        f"{different[0]}{also}: the checkpoint has it under {says[0]}, this optimizer under {says[1]}. To continue as "
        f"it was saved, build the optimizer with overrides={overrides!r}"
    )


def _matrices_by_name(groups: Sequence[Mapping[str, Any]]) -> dict[str, tuple[str, Any, bool, str]]:
    """Rule, blocks, whether transposed, and who says so."""
    out = {}
    for group in groups:
        if not all(key in group for key in ("rule", "role", "blocks", "transposed", "param_names")):
            return {}
        names = group["param_names"]
        sources = group.get("role_sources") or [""] * len(names)
        view = group["rule"], frozen(group["blocks"]), group["transposed"]
        out |= {bare_name(name): (*view, source) for name, source in zip(names, sources, strict=False)}
    return out


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


def bare_name(name: str) -> str:
    """The name of a parameter without the prefixes of wrappers: DDP, `torch.compile` and PEFT.

    Args:
        name: of `named_parameters`.

    Returns:
        The name in the wrapped model.
    """
    parts = [part for part in name.split(".") if part != "_orig_mod"]
    while parts[:1] == ["module"] or parts[:2] == ["base_model", "model"]:
        parts = parts[1:] if parts[0] == "module" else parts[2:]
    return ".".join(parts)
