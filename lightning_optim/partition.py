"""What each parameter of a model is, and which rule owns it.

Roles are read from module identity, never from names: a parameter is an embedding because an `nn.Embedding` holds it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal, get_args

from torch import Tensor, nn

from lightning_optim.core.rule import lookup, nearest

Role = Literal["hidden", "embedding", "head", "vector", "other"]

Override = tuple[str, str | None] | tuple[str, str | None, Mapping[str, Any]]
"""(pattern or role, rule or None to keep it, settings): `("*.gate.*", "adamw", {"lr": 1e-4})`."""


@dataclass(frozen=True)
class Assignment:
    """One trainable parameter, its role and its owner."""

    name: str
    param: Tensor
    role: Role
    rule: str
    reason: str
    group: str
    settings: Mapping[str, Any] = field(default_factory=dict)


def roles(model: nn.Module) -> dict[str, tuple[Role, str]]:
    """The role of every trainable parameter, with the reason.

    * `embedding`: weight of an `nn.Embedding`, a tied head included;
    * `head`: weight of the output layer: what `get_output_embeddings()` returns (Transformers), else the last linear
      layer with as many outputs as the largest embedding has rows;
    * `hidden`: weight of any other linear layer (Transformers' Conv1D and the input projection of
      `nn.MultiheadAttention` included);
    * `vector`: fewer than two dimensions;
    * `other`: everything else (convolutions, parameters that belong to no known module).

    Args:
        model: any module.

    Returns:
        Parameter name, as in `named_parameters`, to (role, reason).
    """
    by_identity: dict[int, tuple[Role, str]] = {}
    linear: list[nn.Module] = []
    rows = 0
    for module in model.modules():
        kind = type(module).__name__
        weight = getattr(module, "weight", None)
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            by_identity[id(module.weight)] = ("embedding", f"weight of {kind}")
            rows = max(rows, module.num_embeddings)
        elif isinstance(module, nn.MultiheadAttention):
            for p in (module.in_proj_weight, module.q_proj_weight, module.k_proj_weight, module.v_proj_weight):
                by_identity.setdefault(id(p), ("hidden", f"input projection of {kind}"))
        elif isinstance(weight, Tensor) and weight.ndim == 2 and _is_linear(module):
            linear.append(module)
            by_identity.setdefault(id(weight), ("hidden", f"weight of {kind}"))
    for head, reason in _heads(model, linear, rows):
        if by_identity.get(id(head.weight), ("", ""))[0] != "embedding":
            by_identity[id(head.weight)] = ("head", reason)
    out: dict[str, tuple[Role, str]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            known = by_identity.get(id(p))
            if p.ndim < 2:
                out[name] = ("vector", f"{p.ndim} dimensions")
            else:
                out[name] = known or ("other", "belongs to no linear layer or embedding")
    return out


def _is_linear(module: nn.Module) -> bool:
    """Linear layers, and Transformers' Conv1D, which is one (stored in x out) and is recognised by its `nf`."""
    return isinstance(module, nn.Linear) or (type(module).__name__ == "Conv1D" and hasattr(module, "nf"))


def _heads(model: nn.Module, linear: Sequence[nn.Module], rows: int) -> list[tuple[Any, str]]:
    found = []
    for module in model.modules():
        getter = getattr(module, "get_output_embeddings", None)
        head = getter() if callable(getter) else None
        if isinstance(getattr(head, "weight", None), Tensor):
            found.append((head, f"output embeddings of {type(module).__name__}"))
    if not found and rows:
        wide = [m for m in linear if isinstance(m, nn.Linear) and m.out_features == rows]
        found = [(m, "last linear layer with one output per embedding row") for m in wide[-1:]]
    return found


def assign(model: nn.Module, rule: str, rest: str, overrides: Sequence[Override] = ()) -> list[Assignment]:
    """Give every trainable parameter exactly one owner.

    Rules that need whole matrices own the hidden matrices, `rest` everything else; other rules own everything.
    Overrides come first, in order; the first match wins.

    Args:
        model: any module.
        rule: name of the main rule.
        rest: name of the rule for what the main rule does not take.
        overrides: (pattern or role, rule or None, settings). A pattern is a shell-style glob over parameter names.

    Returns:
        One assignment per trainable parameter, in the order of `named_parameters`.

    Raises:
        ValueError: an unknown rule, no trainable parameter, or an override that matches nothing.
    """
    main, other = lookup(rule), lookup(rest)
    takes_all = main.elementwise or main.reduces
    checked = [_override(o) for o in overrides]
    found = roles(model)
    if not found:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    used: set[int] = set()
    params, out = dict(model.named_parameters()), []
    for name, (role, reason) in found.items():
        owner = main.name if takes_all or role == "hidden" else other.name
        settings: Mapping[str, Any] = {}
        group = f"{owner}/{role}"
        for i, (pattern, named, extra) in enumerate(checked):
            if role == pattern or fnmatchcase(name, pattern):
                used.add(i)
                owner, settings, reason = named or owner, extra, f"override {pattern!r}"
                group = f"{owner}/{pattern}" if role == pattern else f"{owner}/{pattern}/{role}"
                break
        out.append(Assignment(name, params[name], role, owner, reason, group, settings))
    for i, (pattern, _, _) in enumerate(checked):
        if i not in used:
            hint = nearest(pattern, [*get_args(Role), *found]) if len(found) < 200 else ""
            raise ValueError(f"override {pattern!r} matches no parameter that an earlier one left; {hint}")
    return out


def _override(override: Override) -> tuple[str, str | None, Mapping[str, Any]]:
    if not 2 <= len(override) <= 3 or not isinstance(override[0], str):
        raise ValueError(f"an override is (pattern or role, rule or None, settings), got {override!r}")
    named = lookup(override[1]).name if override[1] is not None else None
    return override[0], named, override[2] if len(override) == 3 else {}
