"""What to say about an assignment that need not be what its user expects, with the override that mends it."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import NamedTuple

from lightning_optim.build.param_role import MATRIX_ROLES
from lightning_optim.core.matrix_views import Blocks
from lightning_optim.core.rule import lookup


class Owned(NamedTuple):
    """A parameter, what it is, and the rule that has it."""

    name: str
    role: str
    shape: Sequence[int]
    rule: str
    blocks: Blocks


def takes_matrices_only(rule: str) -> bool:
    """Whether a main rule leaves something to another one.

    Args:
        rule: its name.

    Returns:
        True for rules that need whole matrices, or take no vectors.
    """
    kind = lookup(rule)
    return not (((kind.elementwise or kind.reduces) and kind.vectors) or kind.curvature_input == "loss")


def warnings_of(rule: str, parameters: Iterable[Owned]) -> list[str]:
    """What a user should know of an assignment.

    Args:
        rule: name of the main rule.
        parameters: all that are trained.

    Returns:
        One message each: that the main rule has no parameter; or less than half of the weights in matrices; and that it
        takes fused attention layers whole, as the order of their rows is not known.
    """
    params = list(parameters)
    if params and all(x.rule != rule for x in params):
        return [without_parameters(rule, ((x.name, x.role, x.shape) for x in params))]
    if not takes_matrices_only(rule):
        return []
    out = []
    matrices = [x for x in params if x.role in MATRIX_ROLES | {"other"}]
    left = [x for x in matrices if x.rule != rule and x.role == "other"]
    total, missed = (sum(math.prod(x.shape) for x in xs) for xs in (matrices, left))
    if 2 * missed > total:
        example = max(left, key=lambda x: math.prod(x.shape)).name
        out.append(
            f"{rule} has {1 - missed / total:.0%} of the weights in matrices: of the others nothing tells how they are "
            f"used, {_list([x.name for x in left])}. Give example_inputs=, or overrides=[({example!r}, {rule!r}, "
            "{'role': 'hidden'})]"
        )
    whole = [x.name for x in params if x.role == "qkv" and x.rule == rule and x.blocks is None]
    if whole:
        out.append(
            f"{rule} takes queries, keys and values as one matrix, as the order of their rows is not known: "
            f"{_list(whole)}. Give example_inputs=, or overrides=[('qkv', None, {{'blocks': 3}})] if they are thirds"
        )
    return out


def _list(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def without_parameters(rule: str, parameters: Iterable[tuple[str, str, Sequence[int]]]) -> str:
    """Why a main rule owns no parameter, and what to do.

    Args:
        rule: its name.
        parameters: name, role and shape of every parameter.

    Returns:
        A message of two sentences.
    """
    params = list(parameters)
    counts = Counter(role for _, role, _ in params)
    here = ", ".join(f"{role} ({count})" for role, count in counts.most_common())
    text = (
        f"{rule} owns no parameter: it takes the roles {', '.join(sorted(MATRIX_ROLES))}, and the ones here are {here}"
    )
    sizes = Counter({r: sum(math.prod(s) for _, x, s in params if x == r) for r in counts if r != "vector"})
    if not sizes:
        return f"{text}. None of them is a matrix; take another optimizer"
    role = next((r for r in ("other", "conv", "head") if r in sizes), sizes.most_common(1)[0][0])
    names = [name for name, x, _ in params if x == role]
    more = ", ..." if len(names) > 3 else ""
    return (
        f"{text}. If it should step those of role {role!r} ({', '.join(names[:3])}{more}), pass "
        f"overrides=[({role!r}, {rule!r})], or patterns of names in place of the role"
    )
