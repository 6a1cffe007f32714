"""Which rule owns each parameter of a model, and how it gets it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from lightning_optim.build.overrides import Override, checked, matches, why_unmatched
from lightning_optim.build.param_role import MATRIX_ROLES, ParamRole, Role
from lightning_optim.build.role_report import roles
from lightning_optim.core import options
from lightning_optim.core.matrix_views import Blocks, counts_columns, frozen
from lightning_optim.core.rule import Rule, check_value, lookup


@dataclass(frozen=True)
class Assignment:
    """One trainable parameter, what it is and its owner."""

    name: str
    param: Tensor
    trait: ParamRole
    rule: str
    group: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Of an override, and of queries and keys that a rule takes by head."""
    blocks: Blocks = None
    """How the rule gets it cut into matrices."""
    transposed: bool = False
    """Whether it gets rows and columns exchanged."""

    @property
    def role(self) -> Role:
        """The parameter's role."""
        return self.trait.role


def assign(
    model: nn.Module,
    rule: str,
    rest: str,
    overrides: Sequence[Override] = (),
    *,
    last_layer: Literal["rest", "rule"] = "rest",
    blocks: Literal["layers", "heads"] = "layers",
    constrained: bool = False,
    by_rule: Mapping[str, Mapping[str, Any]] | None = None,
    example_inputs: object = None,
) -> list[Assignment]:
    """Give every trainable parameter exactly one owner.

    Rules that need whole matrices, or take no vectors, own the roles of `MATRIX_ROLES`, `rest` everything else; other
    rules own everything.
    Overrides come first, in order; the first match wins.

    Args:
        model: any module.
        rule: name of the main rule.
        rest: name of the rule for what the main rule does not take.
        overrides: (pattern or role, rule or None, settings). A role may also be a kind of vectors, `gain`, `bias` or
            `output_bias` (of attention). A pattern is a shell-style glob over parameter names, with
            or without what DDP, `torch.compile` and PEFT put before them. Settings may say what a parameter is:
            `role`, `blocks` and `transposed`.
        last_layer: who owns an untied output layer when the main rule does not take everything.
        blocks: what is a matrix to a rule that needs whole ones: `"layers"` or attention `"heads"`, which rules that
            only reduce follow, too. Also a setting of an override, where these follow `"layers"`, as well.
        constrained: whether norms of the main rule's matrices are to be kept, so that it sees matrices even if it is
            elementwise.
        by_rule: hyperparameters by rule. A rule with `head_settings` gets these for queries and keys, cut into heads,
            unless it is given others, or norms are constrained.
        example_inputs: see `roles`.

    Returns:
        One assignment per trainable parameter, in the order of `named_parameters`.

    Raises:
        ValueError: an unknown rule, no trainable parameter, an override that matches nothing, or heads for a rule that
            works on whole layers.
    """
    main, other = lookup(rule), lookup(rest)
    if blocks == "heads" and main.needs_all_gradients:
        raise ValueError(f"{main.name} works on whole layers, so that blocks='heads' would do nothing; leave it out")
    if last_layer not in ("rest", "rule"):
        raise ValueError(f"last_layer must be 'rest' or 'rule', got {last_layer!r}")
    check_value("blocks", blocks, Literal["layers", "heads"])
    takes_all = ((main.elementwise or main.reduces) and main.vectors) or main.curvature_input == "loss"
    taken = MATRIX_ROLES | ({"head"} if last_layer == "rule" else set())
    requested = [checked(o) for o in overrides]
    roles_by_name = roles(model, example_inputs)
    if not roles_by_name:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    used: set[int] = set()
    params, out = dict(model.named_parameters()), []
    for name, trait in roles_by_name.items():
        match = next((i for i, x in enumerate(requested) if matches(x[0], name, trait.role, trait.kind)), None)
        pattern, named, settings = ("", None, {}) if match is None else requested[match]
        used.add(-1 if match is None else match)
        label = [] if pattern in ("", trait.role) else [pattern]
        trait, settings = _as_requested(name, trait, settings)
        owner = named or (main.name if takes_all or trait.role in taken else other.name)
        keeps_norms = any(k in settings for k in options.CONSTRAINTS)
        normed = keeps_norms or (constrained and owner == main.name and trait.role in MATRIX_ROLES)
        view = _view(lookup(owner), trait, settings, blocks, (by_rule or {}).get(owner, {}), normed=normed)
        group = "/".join([owner, *label, pattern if pattern == trait.role else trait.role, *view.labels])
        out.append(Assignment(name, params[name], trait, owner, group, view.settings, view.blocks, view.transposed))
    for i, (pattern, _, _) in enumerate(requested):
        if i not in used:
            raise ValueError(
                f"override {pattern!r} applies to no parameter: {why_unmatched(pattern, roles_by_name, model)}"
            )
    return out


def _as_requested(name: str, trait: ParamRole, settings: Mapping[str, Any]) -> tuple[ParamRole, Mapping[str, Any]]:
    """What a parameter is, where an override says so, and the override's other settings."""
    role, is_transposed, blocks = (settings.get(k) for k in ("role", "transposed", "blocks"))
    check_value(f"{name}: role", role, Role | None)
    check_value(f"{name}: transposed", is_transposed, bool | None)
    settings = {k: v for k, v in settings.items() if k not in ("role", "transposed")}
    if role is None and is_transposed is None and (blocks is None or isinstance(blocks, str)):
        return trait, settings
    if role is not None and role != trait.role:  # what was known is of another role
        trait = ParamRole(role, "an override says so", trait.transposed, kind=trait.kind, decays=trait.decays)
    turned = trait.transposed if is_transposed is None else is_transposed
    return replace(trait, source="user", transposed=turned), settings


class _View(NamedTuple):
    """How a rule gets a parameter."""

    blocks: Blocks
    transposed: bool
    settings: Mapping[str, Any]
    labels: list[str]
    """Of the group's name."""


def _view(
    rule: type[Rule],
    trait: ParamRole,
    settings: Mapping[str, Any],
    common: str,
    group_settings: Mapping[str, Any],
    *,
    normed: bool,
) -> _View:
    """How a rule gets a parameter cut and turned, and its settings for it."""
    blind = (rule.elementwise or rule.curvature_input == "loss") and not normed
    cut = None if blind else _blocks(rule, trait, settings.get("blocks"), common)
    if not normed:
        by_head, of_heads = _by_head(rule, trait, settings, common, group_settings)
        cut, settings = by_head or cut, {**of_heads, **settings}
    is_transposed = trait.transposed and not blind
    labels = ["transposed"] * is_transposed
    if cut:
        labels.append(f"{cut} blocks" if isinstance(cut, int) else f"{'-'.join(map(_run, cut))} rows")
    if cut and counts_columns(cut):
        labels[-1] = f"{-cut if isinstance(cut, int) else len(cut)} blocks of columns"
    if not trait.decays and "weight_decay" not in settings:
        settings = {**settings, "weight_decay": 0.0}
        labels.append("not decayed")
    return _View(cut, is_transposed, {k: v for k, v in settings.items() if k != "blocks"}, labels)


def applicable_overrides(
    model: nn.Module, first: Sequence[Override], more: Sequence[Override], example_inputs: object = None
) -> list[Override]:
    """Those overrides of a preset that some parameter is left for, after the user's own.

    Returns:
        Some of `more`.
    """
    taken: set[int] = set()
    patterns = [o[0] for o in (*first, *more)]
    for name, trait in roles(model, example_inputs).items():
        taken.update([next((i for i, x in enumerate(patterns) if matches(x, name, trait.role, trait.kind)), -1)])
    return [o for i, o in enumerate(more, len(first)) if i in taken]


def _blocks(rule: type[Rule], trait: ParamRole, setting: Any, common: str) -> Blocks:
    """How a rule gets a parameter cut, given an override's setting and the common one."""
    if setting is not None and not isinstance(setting, str):
        return frozen(setting)
    if setting is not None:
        check_value("blocks", setting, Literal["layers", "heads"])
    elif rule.reduces and common == "layers":
        return None
    return trait.heads or trait.blocks if (setting or common) == "heads" else trait.blocks


def _by_head(
    rule: type[Rule], trait: ParamRole, settings: Mapping[str, Any], common: str, group_settings: Mapping[str, Any]
) -> tuple[Blocks, Mapping[str, Any]]:
    """How a rule that treats queries and keys by head gets them cut, and its settings for them."""
    setting = settings.get("blocks")
    cut = trait.heads if (setting or common) == "heads" else trait.by_head if setting is None else None
    if cut is None or any({**group_settings, **settings}.get(k, v) != v for k, v in rule.head_settings.items()):
        return None, {}
    return (cut, rule.head_settings) if rule.head_settings else (None, {})


def _run(rows: int | tuple[int, int]) -> str:
    """One number of `blocks` in a group's name: rows, or a number of blocks of so many."""
    return f"{rows[1]}x{rows[0]}" if isinstance(rows, tuple) else str(rows)
