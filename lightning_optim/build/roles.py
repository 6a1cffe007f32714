"""What each parameter of a model is, and which rule owns it.

Roles are read from what modules are and how they are put together, never from names: a parameter is an embedding
because an `nn.Embedding` holds it, a fused query-key-value projection because its attention module has one other. Only
which of three projections gives the values is read from their names, where these say q, k and v.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from os.path import commonprefix
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lightning_optim.build.output_layers import (
    is_conv1d,
    is_linear,
    is_pretrained,
    of_pretrained,
    output_embeddings,
    output_layers,
)
from lightning_optim.core import options
from lightning_optim.core.matrix_views import Blocks, frozen
from lightning_optim.core.rule import Rule, check_value, lookup, nearest

Role = Literal[
    "hidden",
    "qkv",
    "gate_up",
    "experts",
    "lora_a",
    "lora_b",
    "lora_embedding",
    "embedding",
    "head",
    "router",
    "conv",
    "vector",
    "other",
]

MATRIX_ROLES: frozenset[str] = frozenset({"hidden", "qkv", "gate_up", "experts", "lora_a", "lora_b"})
"""Roles that rules for whole matrices take."""

Override = tuple[str, str | None] | tuple[str, str | None, Mapping[str, Any]]
"""(pattern or role, rule or None to keep it, settings): `("*.gate.*", "adamw", {"lr": 1e-4})`."""


@dataclass(frozen=True)
class ParamRole:
    """What a parameter is."""

    role: Role
    reason: str
    transposed: bool = False
    """Stored as inputs x outputs."""
    blocks: Blocks = None
    """How the outputs are cut into matrices of their own, as the option `blocks` of a group."""
    heads: int | None = None
    """Equal blocks of outputs that are attention heads."""
    by_head: Blocks = None
    """How queries and keys are cut into heads, and values in the same parameter into rows, as the option `blocks`."""
    kind: str = ""
    """Of a vector: `bias` of a layer, `output_bias` of an attention's output layer, `gain` of a norm."""


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


def roles(model: nn.Module) -> dict[str, ParamRole]:
    """What every trainable parameter is.

    * `embedding`: of an `nn.Embedding`, a tied head included;
    * `head`: of an output layer: what `get_output_embeddings()` (Transformers) or `get_classifier()` (timm) returns, or
      the last linear layers outside of pretrained models and repeated blocks (`lightning_optim.build.output_layers`);
    * `qkv`: the larger of the two linear layers of an attention module, query, key and value in one; cut into them
      where the order of the rows is known (`APART`, `GROUPED`);
    * `gate_up`: the larger of the two linear layers of a module, twice as wide as the other's input;
    * `experts`: three-dimensional, of a module that says its number of experts; `router`: one row per expert beside it;
    * `lora_a`, `lora_b`, `lora_embedding`: of a PEFT layer (`ADAPTERS`);
    * `conv`: of a convolution;
    * `hidden`: of any other linear layer (Transformers' Conv1D and `nn.MultiheadAttention`'s projection included);
    * `vector`: fewer than two dimensions, or a matrix with a side of length one, or a bias per expert;
    * `other`: everything else.

    Args:
        model: any module; wrappers (DDP, `torch.compile`, PEFT) do not matter.

    Returns:
        Parameter name, as in `named_parameters`, to its trait.
    """
    role_by_param: dict[int, ParamRole] = {}
    for find in (_linear_layers, _attention_layers, _fused_layers, _heads, _experts, _lora, _embeddings):
        role_by_param.update({id(p): trait for p, trait in find(model) if isinstance(p, Tensor)})
    out: dict[str, ParamRole] = {}
    kinds = {id(p): kind for p, kind in _kinds(model) if isinstance(p, Tensor)}
    for name, p in model.named_parameters():
        if p.requires_grad:
            if p.ndim < 2:
                out[name] = ParamRole("vector", f"{p.ndim} dimensions", kind=kinds.get(id(p), ""))
            else:
                trait = role_by_param.get(id(p), ParamRole("other", "belongs to no known layer"))
                out[name] = ParamRole("vector", "a side of length one") if _is_flat(p, trait.role) else trait
    return out


def _is_flat(p: Tensor, role: Role) -> bool:
    """Whether a parameter of two dimensions or more holds vectors only."""
    if role in MATRIX_ROLES:
        return min(p.shape[-2:]) == 1
    return role == "other" and p.numel() == max(p.shape)


Found = Iterator[tuple[Any, ParamRole]]


def _sides(module: Any) -> tuple[int, int]:
    """Outputs and inputs of a linear layer."""
    rows, columns = module.weight.shape[-2:]
    return (columns, rows) if is_conv1d(module) else (rows, columns)


def _linear_layers(model: nn.Module) -> Found:
    for module in model.modules():
        kind = type(module).__name__
        if isinstance(module, nn.MultiheadAttention):
            heads, reason = module.num_heads, f"input projection of {kind}"
            by_head = (module.head_dim, 2 * heads), (1, module.embed_dim)
            yield module.in_proj_weight, ParamRole("qkv", reason, blocks=3, heads=3 * heads, by_head=by_head)
            for p in (module.q_proj_weight, module.k_proj_weight):
                yield p, ParamRole("hidden", reason, heads=heads, by_head=heads)
            yield module.v_proj_weight, ParamRole("hidden", reason, heads=heads)
        elif isinstance(module, nn.modules.conv._ConvNd):
            yield module.weight, ParamRole("conv", f"weight of {kind}")
        elif is_linear(module) and getattr(module.weight, "ndim", 0) == 2:
            yield module.weight, ParamRole("hidden", f"weight of {kind}", transposed=is_conv1d(module))


APART = {"GPT2Attention", "ModernBertAttention", "MptAttention", "Phi3Attention", "Phi4MultimodalAttention"}
"""Transformers' attention modules whose fused layer has all rows of queries, then of keys, then of values."""
GROUPED = {
    "BloomAttention",
    "FalconAttention",
    "GPTBigCodeAttention",
    "GPTNeoXAttention",
    "GPTNeoXJapaneseAttention",
    "PersimmonAttention",
}
"""Those whose fused layer has, for each key head, its queries, the key and the value."""


def _head_size(module: nn.Module, outputs: int) -> int | None:
    """Rows of one head of an attention module, None of other modules."""
    for key in ("head_dim", "head_size", "attention_head_size", "key_value_proj_dim"):
        if isinstance(getattr(module, key, None), int):
            return getattr(module, key)
    for key in ("num_heads", "num_attention_heads", "n_heads"):
        if isinstance(count := getattr(module, key, None), int) and count and outputs % count == 0:
            return outputs // count
    return None


def _children(parent: nn.Module) -> dict[str, nn.Module]:
    """Linear layers of a module by their names; a layer that has two names has the first."""
    return {k: m for k, m in parent.named_children() if is_linear(m) and getattr(m.weight, "ndim", 0) == 2}


def _value_of(names: Sequence[str]) -> str:
    """Which of three projections gives the values: the one named so beside q and k, or else the last one."""
    start = len(commonprefix(names))
    initials = {name[start : start + 1]: name for name in names}
    return initials["v"] if set(initials) == {"q", "k", "v"} else names[-1]


def _attention_layers(model: nn.Module) -> Found:
    """Query, key and value are the first three linear layers of an attention module, with one input."""
    for parent in model.modules():
        linear = _children(parent)
        names = list(linear)[:3]
        layers = [linear[name] for name in names]
        if len(layers) < 3 or len({_sides(m)[1] for m in layers}) > 1:
            continue
        outputs, size = [_sides(m)[0] for m in layers], _head_size(parent, _sides(layers[0])[0])
        if not size or (len(linear) == 3 and len(set(outputs)) > 1):  # the third may be the output projection
            continue
        value, reason = _value_of(names), f"projection of {type(parent).__name__}"
        for name, m, count in zip(names, layers, outputs, strict=True):
            if count % size == 0:
                heads = count // size
                by_head = None if name == value else heads
                yield m.weight, ParamRole("hidden", reason, is_conv1d(m), heads=heads, by_head=by_head)


def _fused_layers(model: nn.Module) -> Found:
    for parent in model.modules():
        linear = list(_children(parent).values())
        if len(linear) != 2:
            continue
        wide, back = sorted(linear, key=lambda m: -_sides(m)[0])
        (outputs, inputs), (width, inner) = _sides(wide), _sides(back)
        kind, is_transposed, size = type(parent).__name__, is_conv1d(wide), _head_size(parent, inner)
        if inputs != width or outputs <= inner:
            continue
        if size is None:
            if outputs == 2 * inner:
                yield wide.weight, ParamRole("gate_up", f"gate and up of {kind}", is_transposed, 2)
            continue
        keys = (outputs - inner) // 2
        whole = inner % size == keys % size == 0 and outputs == inner + 2 * keys
        if not whole or inner % keys or any(isinstance(m, nn.modules.conv._ConvNd) for m in parent.children()):
            continue  # a state-space layer
        blocks: Blocks = None
        by_head: Blocks = None
        if kind in APART:
            blocks = 3 if keys == inner else (inner, keys, keys)
            by_head = (size, (inner + keys) // size), (1, keys)
        elif kind in GROUPED:
            blocks = (inner // keys * size, size, size)
            by_head = (size, inner // keys + 1), (1, size)
        reason = f"query, key, value of {kind}" + (", in an order that is not known" if blocks is None else "")
        yield wide.weight, ParamRole("qkv", reason, is_transposed, blocks, outputs // size, by_head)


def _kinds(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """Vectors by what their module is: a layer's bias, that of an attention's output layer, the gain of a norm."""
    for parent in model.modules():
        if is_linear(parent) or isinstance(parent, nn.modules.conv._ConvNd):
            yield parent.bias, "bias"
        params = dict(parent.named_parameters(recurse=False))
        if (
            params
            and all(p.ndim == 1 for p in params.values())
            and set(params) <= {"weight", "bias"}
            and "weight" in params
        ):
            yield params["weight"], "gain"
            yield params.get("bias"), "bias"
    for parent in model.modules():
        if isinstance(parent, nn.MultiheadAttention):
            yield parent.in_proj_bias, "bias"
            yield parent.out_proj.bias, "output_bias"
            continue
        linear = list(_children(parent).values())
        apart = len(linear) == 4 and len({_sides(m)[1] for m in linear[:3]}) == 1
        fused = len(linear) == 2 and _sides(linear[0])[0] > _sides(linear[1])[1]
        if (apart or fused) and _head_size(parent, _sides(linear[0])[0]):
            yield linear[-1].bias, "output_bias"


HALVES = {"Llama4TextExperts"}
"""Transformers' experts that do not say that gate and up are the first and the second half of their outputs."""


def _experts(model: nn.Module) -> Found:
    for parent in model.modules():
        for module in parent.children():
            count = getattr(module, "num_experts", None)
            params = list(module.parameters(recurse=False))
            matrices = [p for p in params if p.ndim == 3]
            if not isinstance(count, int) or not matrices:
                continue
            siblings = [m for m in parent.children() if m is not module]
            routers = [p for m in siblings for p in m.parameters(recurse=False) if p.ndim == 2 and p.shape[0] == count]
            width = routers[0].shape[1] if routers else getattr(module, "hidden_size", None)
            is_transposed, kind = _stored_transposed(module, matrices, width), type(module).__name__
            inner = min(p.numel() for p in matrices)
            for p in params:
                fused: Blocks = None
                if p.numel() == 2 * inner and (halves := _gate_and_up_are_halves(module)) is not None:
                    fused = 2 if halves else (1, 1)
                if p.ndim == 3:
                    reason = f"matrices of {kind}"
                    if p.numel() == 2 * inner and fused is None:
                        reason += ", gate and up in an order that is not known"
                    yield p, ParamRole("experts", reason, is_transposed, fused)
                else:
                    yield p, ParamRole("vector", f"biases of {kind}")
            for p in routers:
                yield p, ParamRole("router", f"one row per expert of {kind}")


def _stored_transposed(experts: nn.Module, matrices: Sequence[Tensor], width: int | None) -> bool:
    """Whether experts are stored inputs x outputs, by the shapes where they tell, else by what the module says.

    Gate and up in one, [experts, 2 i, h] beside [experts, h, i], can be read in one way only. Of separate matrices the
    first takes the model's width, if that is known.

    Returns:
        True if so, False if not or if nothing tells.
    """
    first, last = matrices[0].shape, matrices[-1].shape
    if len(matrices) == 2 and matrices[0].numel() == 2 * matrices[1].numel():
        if first[2] == last[1]:
            return False
        if first[1] == last[2]:
            return True
    if hasattr(experts, "is_transposed"):
        return bool(experts.is_transposed)
    return len(matrices) > 1 and first[1] == width != first[2]


def _gate_and_up_are_halves(experts: nn.Module) -> bool | None:
    """Whether they are, rather than take turns.

    A module's function for the gate is asked: on which of eight outputs of gate and up does its first result depend?

    Returns:
        None for a module that says nothing.
    """
    kinds = {c.__name__ for c in type(experts).__mro__}
    if kinds & HALVES:
        return True
    is_concatenated, gate = getattr(experts, "is_concatenated", None), getattr(experts, "_apply_gate", None)
    if not callable(gate):
        return is_concatenated
    probe = torch.full((3, 8), 0.5, device="cpu")
    probe[1, 1], probe[2, 4] = 0.25, 0.25
    try:
        with torch.no_grad():
            plain, second, fifth = torch.as_tensor(gate(probe))[:, 0].tolist()
    except Exception:  # the function is not ours, and need not take what we ask it
        return is_concatenated
    return is_concatenated if (plain != second) == (plain != fifth) else plain != fifth


ADAPTERS: dict[str, Role] = {
    "lora_A": "lora_a",
    "lora_B": "lora_b",
    "lora_embedding_A": "lora_embedding",
    "lora_embedding_B": "lora_embedding",
    "hada_w1_b": "lora_a",
    "hada_w1_a": "lora_b",
    "hada_w2_b": "lora_a",
    "hada_w2_a": "lora_b",
    "lokr_w1": "hidden",
    "lokr_w1_b": "lora_a",
    "lokr_w1_a": "lora_b",
    "lokr_w2": "hidden",
    "lokr_w2_b": "lora_a",
    "lokr_w2_a": "lora_b",
    **{f"{kind}_A": "lora_a" for kind in ("delora", "hira")},
    **{f"{kind}_B": "lora_b" for kind in ("delora", "hira")},
    "trainable_tokens_delta": "embedding",
}
"""Roles of what PEFT's layers keep for each adapter: of LoRA and AdaLoRA, LoHa, LoKr, DeLoRA, HiRA and trained tokens.

Products of two are `lora_b` times `lora_a`; of LoKr's two factors each may also be one matrix.
"""


def _lora(model: nn.Module) -> Found:
    for layer in model.modules():
        if not hasattr(layer, "adapter_layer_names"):
            continue
        kind = type(layer).__name__
        tucker = [name for key in ("hada_t1", "lokr_t2") for name in getattr(layer, key, ())]  # stored otherwise
        for key, role in ADAPTERS.items():
            adapters = getattr(layer, key, None)
            for adapter, value in adapters.items() if isinstance(adapters, (nn.ModuleDict, nn.ParameterDict)) else ():
                p = value.weight if isinstance(value, nn.Linear) else value
                if isinstance(p, Tensor) and p.ndim == 2 and adapter not in tucker:
                    yield p, ParamRole(role, f"adapter of {kind}")
        for module in getattr(layer, "lora_magnitude_vector", nn.ModuleDict()).values():
            for p in module.parameters():
                yield p, ParamRole("vector", f"magnitudes of {kind}")


def _embeddings(model: nn.Module) -> Found:
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield module.weight, ParamRole("embedding", f"weight of {type(module).__name__}")


def _heads(model: nn.Module) -> Found:
    heads: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        if is_pretrained(module) and getattr(module, "base_model", module) is not module:
            layers = of_pretrained(module)
        else:
            layers = output_embeddings(module)
        for layer in layers:
            heads.setdefault(id(layer), (layer, f"output layer of {type(module).__name__}"))
    for layer in output_layers(model):
        heads.setdefault(id(layer), (layer, f"output layer of {type(model).__name__}"))
    if not heads and not any(map(is_pretrained, model.modules())):
        inside = {id(m) for x in model.modules() if isinstance(x, nn.ModuleList) for m in x.modules()}
        rows = max((m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding)), default=0)
        plain = (m for m in model.modules() if isinstance(m, nn.Linear) and id(m) not in inside)
        wide = [m for m in plain if m.out_features == rows]
        if rows and wide:
            yield wide[-1].weight, ParamRole("head", "last linear layer with one output per embedding row")
    for layer, reason in heads.values():
        yield getattr(layer, "weight", None), ParamRole("head", reason)


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
            or without what DDP, `torch.compile` and PEFT put before them.
        last_layer: who owns an untied output layer when the main rule does not take everything.
        blocks: what is a matrix to a rule that needs whole ones: `"layers"` or attention `"heads"`, which rules that
            only reduce follow, too. Also a setting of an override, where these follow `"layers"`, as well.
        constrained: whether norms of the main rule's matrices are to be kept, so that it sees matrices even if it is
            elementwise.
        by_rule: hyperparameters by rule. A rule with `head_settings` gets these for queries and keys, cut into heads,
            unless it is given others, or norms are constrained.

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
    checked = [_override(o) for o in overrides]
    roles_by_name = roles(model)
    if not roles_by_name:
        raise ValueError(f"{type(model).__name__} has no trainable parameter")
    used: set[int] = set()
    params, out = dict(model.named_parameters()), []
    for name, trait in roles_by_name.items():
        owner = main.name if takes_all or trait.role in taken else other.name
        settings: Mapping[str, Any] = {}
        label = trait.role
        for i, (pattern, named, extra) in enumerate(checked):
            if matches(pattern, name, trait.role, trait.kind):
                used.add(i)
                owner, settings = named or owner, extra
                label = pattern if trait.role == pattern else f"{pattern}/{trait.role}"
                break
        normed = constrained and owner == main.name and trait.role in MATRIX_ROLES
        shapeless = lookup(owner).elementwise or lookup(owner).curvature_input == "loss"
        blind = shapeless and not normed and not any(k in settings for k in options.CONSTRAINTS)
        cut = None if blind else _blocks(lookup(owner), trait, settings.get("blocks"), blocks)
        if not normed and not any(k in settings for k in options.CONSTRAINTS):
            by_head, of_heads = _by_head(lookup(owner), trait, settings, blocks, (by_rule or {}).get(owner, {}))
            cut, settings = by_head or cut, {**of_heads, **settings}
        is_transposed = trait.transposed and not blind
        label += "/transposed" * is_transposed
        if cut:
            label += f"/{cut} blocks" if isinstance(cut, int) else f"/{'-'.join(map(_run, cut))} rows"
        settings = {k: v for k, v in settings.items() if k != "blocks"}
        out.append(Assignment(name, params[name], trait, owner, f"{owner}/{label}", settings, cut, is_transposed))
    for i, (pattern, _, _) in enumerate(checked):
        if i not in used:
            hint = nearest(pattern, [*get_args(Role), *roles_by_name]) if len(roles_by_name) < 200 else ""
            raise ValueError(f"override {pattern!r} matches no parameter that an earlier one left; {hint}")
    return out


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


def applicable_overrides(model: nn.Module, first: Sequence[Override], more: Sequence[Override]) -> list[Override]:
    """Those overrides of a preset that some parameter is left for, after the user's own.

    Returns:
        Some of `more`.
    """
    taken: set[int] = set()
    patterns = [o[0] for o in (*first, *more)]
    for name, trait in roles(model).items():
        taken.update([next((i for i, x in enumerate(patterns) if matches(x, name, trait.role, trait.kind)), -1)])
    return [o for i, o in enumerate(more, len(first)) if i in taken]


def matches(pattern: str, name: str, role: str, kind: str = "") -> bool:
    """Whether an override's pattern is a parameter's role or kind or matches its name, wrappers' prefixes or not.

    Returns:
        True if so.
    """
    return pattern in (role, kind) or fnmatchcase(name, pattern) or fnmatchcase(_bare(name), pattern)


def _bare(name: str) -> str:
    """A parameter's name without the prefixes of wrappers."""
    parts = [x for x in name.split(".") if x != "_orig_mod"]
    while parts[:1] == ["module"] or parts[:2] == ["base_model", "model"]:
        parts = parts[1:] if parts[0] == "module" else parts[2:]
    return ".".join(parts)


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


def layerwise_decay(model: nn.Module, factor: float) -> list[Override]:
    """Overrides for learning rates that fall from layer to layer towards the input.

    With L layers, layer i from 0 gets `factor^(L - i)`, what comes before the layers `factor^(L + 1)`, and what comes
    after them 1 (Clark et al. 2020, arXiv:2003.10555). Layers are the members of a `ModuleList` that lies in no other;
    of encoder and decoder each counts for itself.

    Args:
        model: the model that `build_optimizer` will get; wrappers do not matter.
        factor: below 1 to decay.

    Returns:
        Overrides.

    Raises:
        ValueError: the model has no such list, or the factor is negative or no number.
    """
    check_value("factor", factor, float)
    place: dict[int, tuple[str, float]] = {}
    depth, inside = 0, set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) > 1 and id(module) not in inside:
            inside.update(id(m) for m in module.modules())
            depth = max(depth, len(module))
            for i, layer in enumerate(module):
                entry = f"{_literal(prefix)}.{i}.*" if prefix else f"{i}.*", factor ** (len(module) - i)
                place.update({id(p): entry for p in layer.parameters() if id(p) not in place})
    if not place:
        raise ValueError(f"{type(model).__name__} has no ModuleList of layers; write the overrides yourself")
    out: dict[str, float] = {}
    before = True
    for name, p in model.named_parameters():
        before = before and id(p) not in place
        if p.requires_grad and (before or id(p) in place):
            pattern, share = place.get(id(p), (_literal(name), factor ** (depth + 1)))
            out[pattern] = share
    return [(pattern, None, {"lr_factor": share}) for pattern, share in out.items()]


def _literal(name: str) -> str:
    """A pattern for one name."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def lora_plus(ratio: float = 16.0) -> list[Override]:
    """Overrides for LoRA+: the second factors of adapters learn `ratio` times as fast as the first.

    Source: Hayou et al. 2024, arXiv:2402.12354, where 16 is advised.

    Returns:
        Overrides.
    """
    return [("lora_b", None, {"lr_factor": ratio})]


def _override(override: Override) -> tuple[str, str | None, Mapping[str, Any]]:
    if not 2 <= len(override) <= 3 or not isinstance(override[0], str):
        raise ValueError(f"an override is (pattern or role, rule or None, settings), got {override!r}")
    named = lookup(override[1]).name if override[1] is not None else None
    return override[0], named, override[2] if len(override) == 3 else {}
