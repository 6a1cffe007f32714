"""A second module tree without weights, on which a forward pass can be watched while the model stays as it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_optim.core.parallel.sharding import unsharded_class

SMALL_BUFFER = 2**20
"""Buffers of up to so many elements keep their values (masks, position ids, grids); larger ones have a shape only."""
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module within DDP, DataParallel and `torch.compile`.

    Returns:
        The module that was wrapped.
    """
    while True:
        if isinstance(module, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
            module = module.module
        elif isinstance(inner := module._modules.get("_orig_mod"), nn.Module):
            module = inner
        else:
            return module


class Twin:
    """A module tree that shares nothing with the original that a forward pass could change.

    Modules, containers of modules and small buffers are copied, parameters replaced, other objects shared. The
    copies have no hooks but those of `torch.nn.utils` and lazy modules, which make weights, and are neither wrapped
    (DDP, `torch.compile`) nor sharded: a parameter has its whole shape.

    Args:
        model: the model.
        replace: gives the tensor in the place of a parameter; one without values on the meta device, if not given.
    """

    def __init__(self, model: nn.Module, replace: Callable[[Tensor], Tensor] | None = None) -> None:
        self.originals: dict[int, Tensor] = {}
        """The parameter of the model by the id of the tensor in its place."""
        self._replace = replace or _without_values
        self._copies: dict[int, Any] = {}
        self._shared: list[Any] = []  # keeps ids valid
        self.module: nn.Module = self._module(unwrapped(model))

    def _module(self, module: nn.Module) -> nn.Module:
        module = unwrapped(module)
        if id(module) in self._copies:
            return self._copies[id(module)]
        copy = object.__new__(unsharded_class(module))
        self._copies[id(module)] = copy
        attributes = {k: v for k, v in module.__dict__.items() if k not in ("_parameters", "_buffers", *_HOOKS)}
        copy.__dict__.update({k: self._value(v) for k, v in attributes.items() if k != "_compiled_call_impl"})
        copy.__dict__.update({k: self._hooks(module, k) for k in _HOOKS if k in module.__dict__})
        copy.__dict__.update(_compiled_call_impl=None, training=False)
        forward = module.__dict__.get("forward")
        if forward is not None and not isinstance(forward, (MethodType, partial)):
            copy.__dict__.pop("forward")  # wraps the original's, of which we could not tell what it holds
        copy.__dict__["_parameters"] = {
            k: p if p is None else self._parameter(p) for k, p in module._parameters.items()
        }
        copy.__dict__["_buffers"] = {k: b if b is None else self._buffer(b) for k, b in module._buffers.items()}
        return copy

    def _hooks(self, module: nn.Module, key: str) -> dict[int, Any]:
        hooks = module.__dict__[key]
        items = hooks.items() if "pre_hooks" in key and "with" not in key else ()
        return type(hooks)({k: self._value(h) for k, h in items if _makes_weights(h)})

    def _parameter(self, p: Tensor) -> Tensor:
        if id(p) not in self._copies:
            copy = self._copies[id(p)] = self._replace(p)
            self.originals[id(copy)] = p
        return self._copies[id(p)]

    def _buffer(self, b: Tensor) -> Tensor:
        if id(b) not in self._copies:
            small = not b.is_meta and b.numel() <= SMALL_BUFFER
            self._copies[id(b)] = b.detach().to("cpu", copy=True) if small else torch.empty_like(b, device="meta")
        return self._copies[id(b)]

    def _value(self, value: Any) -> Any:
        """An attribute: with the copies of modules and parameters in the place of these, where we can see them."""
        if isinstance(value, nn.Module):
            return self._module(value)
        if isinstance(value, nn.Parameter):
            return self._parameter(value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self._module(value.__self__))
        if isinstance(value, partial):
            return partial(self._value(value.func), *map(self._value, value.args), **self._value(value.keywords))
        for kind in (list, tuple, set):
            if type(value) is kind:
                return kind(self._value(x) for x in value)
        if isinstance(value, dict) and type(value).__module__ in ("builtins", "collections"):
            copy = value.copy()
            copy.update({k: self._value(v) for k, v in value.items()})
            return copy
        self._shared.append(value)
        return value


def _without_values(p: Tensor) -> Tensor:
    """A tensor on the meta device in the place of a parameter."""
    if is_lazy(p):
        return type(p)(device="meta", dtype=p.dtype)  # pyright: ignore[reportCallIssue]
    trains = p.is_floating_point() or p.is_complex()
    like = torch.empty_strided(p.shape, p.stride(), dtype=p.dtype, device="meta")
    return nn.Parameter(like, requires_grad=trains)  # frozen ones, too: without gradients torch takes fused paths


def _makes_weights(hook: Any) -> bool:
    """Whether a hook before the forward pass computes a weight: `weight_norm`, pruning, a lazy module."""
    module = getattr(hook, "__module__", None) or type(hook).__module__
    return module.startswith(("torch.nn.utils.", "torch.nn.modules.lazy"))
