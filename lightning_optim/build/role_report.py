"""What each parameter of a model is.

Roles are read from what a model does, in one watched forward pass without weights, from layouts that are registered
for a class, and from how modules are put together; never from the names of parameters. Only which of three projections
gives the values is read from their names, where these say q, k and v.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import cast

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optim.build import structure
from lightning_optim.build.adapters import adapters_of
from lightning_optim.build.layouts import apply_layout, layouts_of
from lightning_optim.build.measured_roles import measured
from lightning_optim.build.measurement import measure
from lightning_optim.build.param_role import MATRIX_ROLES, ParamRole, Role

_UNKNOWN = ParamRole("other", "belongs to no known layer", source="unknown")


@dataclass(frozen=True)
class RoleReport:
    """Roles, and what was run to measure them."""

    roles: dict[str, ParamRole]
    notes: list[str]
    """One line for each module that was run, or could not be."""


def roles(model: nn.Module, example_inputs: object = None) -> dict[str, ParamRole]:
    """What every trainable parameter is.

    * `embedding`: of an `nn.Embedding`, or indexed as one; a tied head included;
    * `head`: reaches the model's output through no other weight, and no such weight is before or after it. Not
      measured: what `get_output_embeddings()` (Transformers) or `get_classifier()` (timm) returns, or the last linear
      layers outside of pretrained models and repeated blocks (`lightning_optim.build.output_layers`);
    * `router`: by its outputs alone something is chosen along them; not measured: one row per expert beside experts;
    * `qkv`: queries, keys and values in one, cut into three where the order of the rows is known;
    * `gate_up`: two parts of its outputs are multiplied with each other;
    * `experts`: three-dimensional, a matrix for each expert, or two-dimensional with one part used at a time;
    * `lora_a`, `lora_b`, `lora_embedding`: of a PEFT layer (`lightning_optim.build.adapters`);
    * `conv`: of a convolution;
    * `hidden`: of any other linear layer or product (Transformers' Conv1D and `nn.MultiheadAttention` included);
    * `vector`: one side longer than one at most, or a bias per expert;
    * `other`: everything else: tables that are added, recurrent layers, the matrices of a state space.

    Left whole, unless an override gives `blocks`: the gates of `nn.LSTM` and `nn.GRU` (role `other`; a rule that should
    step them takes `{"blocks": 4}`, 3 for a GRU), the input projections of state-space layers and gated delta nets,
    the fused keys and values of latent attention (`kv_b_proj`), and rows that only a rotary embedding reads apart.

    Args:
        model: any module; wrappers (DDP, `torch.compile`, FSDP2, PEFT) do not matter.
        example_inputs: for the model's forward pass: keyword arguments as a mapping, positional ones as a tuple, or one
            tensor. Without them, modules that describe their inputs are measured: models of Transformers and timm, and
            LightningModules with an `example_input_array`.

    Returns:
        Parameter name, as in `named_parameters`, to its trait.
    """
    return report(model, example_inputs).roles


def report(model: nn.Module, example_inputs: object = None) -> RoleReport:
    """What every trainable parameter is, and what was run to find out.

    Args:
        model: see `roles`.
        example_inputs: see `roles`.

    Returns:
        Roles, and notes for the user.
    """
    measurement = measure(model, example_inputs)
    by_structure: dict[int, ParamRole] = {}
    for find in (
        structure.linear_layers,
        structure.attention_layers,
        structure.fused_layers,
        structure.heads,
        structure.expert_stacks,
        adapters_of,
        structure.embeddings,
    ):
        by_structure.update({id(p): trait for p, trait in find(model) if isinstance(p, Tensor)})
    layouts = {id(p): (module, path, layout) for p, module, path, layout in layouts_of(model)}
    kinds = {id(p): kind for p, kind in structure.vector_kinds(model) if isinstance(p, Tensor)}
    undecayed = set(_undecayed(model))
    out: dict[str, ParamRole] = {}
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        trait = by_structure.get(id(p))
        if not is_lazy(p) and p.ndim > 1:
            layout = layouts.get(id(p))
            if layout is not None and not layout[2].by_user and trait is not None and trait.role != "head":
                trait = apply_layout(trait, p, *layout)
            trait = measured(trait or _UNKNOWN, p, measurement.facts.get(id(p)))
            if layout is not None and layout[2].by_user:
                trait = apply_layout(trait, p, *layout)
        if not is_lazy(p) and _is_flat(p, (trait or _UNKNOWN).role):
            reason = f"{p.ndim} dimensions" if p.ndim < 2 else "a side of length one"
            trait = ParamRole("vector", reason, kind=kinds.get(id(p), ""))
        trait = trait or ParamRole("vector", "not initialized yet, and no layer's weight", kind=kinds.get(id(p), ""))
        out[name] = replace(trait, decays=False) if id(p) in undecayed else trait
    return RoleReport(out, measurement.notes)


def _is_flat(p: Tensor, role: Role) -> bool:
    """Whether a parameter holds vectors only."""
    if p.ndim < 2 or (role in MATRIX_ROLES and min(p.shape[-2:]) == 1):
        return True
    return role not in ("head", "embedding", "conv") and p.numel() == max(p.shape)


def _undecayed(model: nn.Module) -> Iterator[int]:
    """Ids of parameters that a module excludes from weight decay by `no_weight_decay()`, as timm's do."""
    for module in model.modules():
        exclude = getattr(type(module), "no_weight_decay", None)
        if callable(exclude) and hasattr(module, "reset_classifier"):
            params, names = dict(module.named_parameters()), cast("Iterable[str]", exclude(module))
            yield from (id(params[name]) for name in names if name in params)
