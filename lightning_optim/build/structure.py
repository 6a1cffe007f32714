"""What parameters are by how modules are put together: where nothing is measured, and for what no measurement tells."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import is_parametrized

from lightning_optim.build.output_layers import (
    is_conv1d,
    is_linear,
    is_pretrained,
    of_pretrained,
    output_embeddings,
    output_layers,
)
from lightning_optim.build.param_role import Found, ParamRole, head_size, sides
from lightning_optim.core.matrix_views import Blocks


def linear_layers(model: nn.Module) -> Found:
    """Weights of linear layers and convolutions."""
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
            for p in _originals(module):
                yield p, ParamRole("conv", f"weight of {kind}")
        elif is_linear(module):
            for p in _originals(module):
                if is_lazy(p) or p.ndim == 2:
                    yield p, ParamRole("hidden", f"weight of {kind}", transposed=is_conv1d(module))


def _originals(module: nn.Module) -> list[Tensor]:
    """The parameters that are a layer's weight, or of which a parametrization or an older `weight_norm` makes it."""
    if isinstance(weight := module._parameters.get("weight"), Tensor):
        return [weight]
    if is_parametrized(module, "weight"):
        made_of = module.get_submodule("parametrizations.weight").named_parameters(recurse=False)
        return [p for k, p in made_of if k in ("original", "original1")]
    params = (module._parameters.get(k) for k in ("weight_v", "weight_orig"))
    return [p for p in params if p is not None]


def _children(parent: nn.Module) -> dict[str, nn.Module]:
    """Linear layers of a module by their names; a layer that has two names has the first."""
    return {k: m for k, m in parent.named_children() if is_linear(m) and getattr(m.weight, "ndim", 0) == 2}


def _value_of(names: Sequence[str]) -> str:
    """Which of three projections gives the values: the one named so beside q and k, or else the last one."""
    start = len(commonprefix(names))
    initials = {name[start : start + 1]: name for name in names}
    return initials["v"] if set(initials) == {"q", "k", "v"} else names[-1]


def attention_layers(model: nn.Module) -> Found:
    """Query, key and value are the first three linear layers of an attention module, with one input."""
    for parent in model.modules():
        linear = _children(parent)
        names = list(linear)[:3]
        layers = [linear[name] for name in names]
        if len(layers) < 3 or len({sides(m)[1] for m in layers}) > 1:
            continue
        outputs, size = [sides(m)[0] for m in layers], head_size(parent, sides(layers[0])[0])
        if not size or (len(linear) == 3 and len(set(outputs)) > 1):  # the third may be the output projection
            continue
        value, reason = _value_of(names), f"projection of {type(parent).__name__}"
        for name, m, count in zip(names, layers, outputs, strict=True):
            if count % size == 0:
                heads = count // size
                by_head = None if name == value else heads
                yield m.weight, ParamRole("hidden", reason, is_conv1d(m), heads=heads, by_head=by_head)


def fused_layers(model: nn.Module) -> Found:
    """The wider of the two linear layers of a module: query, key and value, of unknown order, or gate and up."""
    for parent in model.modules():
        linear = list(_children(parent).values())
        if len(linear) != 2:
            continue
        wide, back = sorted(linear, key=lambda m: -sides(m)[0])
        (outputs, inputs), (width, inner) = sides(wide), sides(back)
        kind, is_transposed, size = type(parent).__name__, is_conv1d(wide), head_size(parent, inner)
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
        reason = f"query, key, value of {kind}, in an order that is not known"
        yield wide.weight, ParamRole("qkv", reason, is_transposed, None, outputs // size, source="unknown")


def vector_kinds(model: nn.Module) -> Iterator[tuple[Any, str]]:
    """Vectors by what their module is: a layer's bias, that of an attention's output layer, the gain of a norm."""
    for parent in model.modules():
        if is_linear(parent) or isinstance(parent, nn.modules.conv._ConvNd):
            yield parent._parameters.get("bias"), "bias"
        params = dict(parent.named_parameters(recurse=False))
        if (
            params
            and not any(map(is_lazy, params.values()))
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
        apart = len(linear) == 4 and len({sides(m)[1] for m in linear[:3]}) == 1
        fused = len(linear) == 2 and sides(linear[0])[0] > sides(linear[1])[1]
        if (apart or fused) and head_size(parent, sides(linear[0])[0]):
            yield linear[-1].bias, "output_bias"


def expert_stacks(model: nn.Module) -> Found:
    """Parameters of modules that say their number of experts, and what has one row for each of these beside them."""
    for parent in model.modules():
        for module in parent.children():
            count = getattr(module, "num_experts", None)
            params = [p for p in module.parameters(recurse=False) if not is_lazy(p)]
            matrices = [p for p in params if p.ndim == 3]
            if not isinstance(count, int) or not matrices:
                continue
            siblings = [m for m in parent.children() if m is not module]
            routers = [p for m in siblings for p in m.parameters(recurse=False) if _has_rows(p, count)]
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


def _has_rows(p: Tensor, count: int) -> bool:
    return not is_lazy(p) and p.ndim == 2 and p.shape[0] == count


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


def embeddings(model: nn.Module) -> Found:
    """Tables of embeddings."""
    for module in model.modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            yield module.weight, ParamRole("embedding", f"weight of {type(module).__name__}")


def heads(model: nn.Module) -> Found:
    """Output layers, which models of Transformers name, or which lie outside of pretrained models and blocks."""
    layers_by_id: dict[int, tuple[nn.Module, str]] = {}
    for module in model.modules():
        if is_pretrained(module) and getattr(module, "base_model", module) is not module:
            layers = of_pretrained(module)
        else:
            layers = output_embeddings(module)
        for layer in layers:
            layers_by_id.setdefault(id(layer), (layer, f"output layer of {type(module).__name__}"))
    for layer in output_layers(model):
        layers_by_id.setdefault(id(layer), (layer, f"output layer of {type(model).__name__}"))
    for layer, reason in layers_by_id.values():
        yield getattr(layer, "weight", None), ParamRole("head", reason)
