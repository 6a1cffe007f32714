"""Passes over a loss beside training that leave training as it was.

`undisturbed` is the one context manager of all of them; `frozen` makes the loss a fixed function within it. What a
single pass changes is put back by `unchanged_attributes`, so that the next one finds the same.
"""

from __future__ import annotations

import math
import random
import sys
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

FEW = 4096
"""Most elements of a tensor in a container, and most members of a container that are looked into."""

_TWICE = (None, "eager", "sdpa")
_CONTAINERS = (dict, list, set, deque)
_PLAIN = (*_CONTAINERS, int, float, str, tuple, Tensor, type(None))
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_buffers"}

_active = 0
_precise = 0


def measuring() -> bool:
    """Whether a pass beside training is under way, so that gradient hooks can stay out of it.

    Returns:
        True inside `undisturbed`.
    """
    return _active > 0


def in_full_precision() -> bool:
    """Whether second derivatives are being taken, for which autocast is to be off.

    Returns:
        True inside `frozen` with `twice`.
    """
    return _precise > 0


class RandomState:
    """The state of all random numbers that a loss may draw: torch's, on the model's devices, Python's and NumPy's.

    Args:
        model: any module.
    """

    def __init__(self, model: nn.Module) -> None:
        devices = {p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"}
        numpy: Any = sys.modules.get("numpy")
        self.torch = torch.get_rng_state()
        self.cuda = {device: torch.cuda.get_rng_state(device) for device in sorted(devices)}
        self.python = random.getstate()
        self.numpy = None if numpy is None else numpy.random.get_state()

    def restore(self) -> None:
        """Continue from this state."""
        torch.set_rng_state(self.torch)
        for device, state in self.cuda.items():
            torch.cuda.set_rng_state(state, device)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


@contextmanager
def undisturbed(model: nn.Module, *owners: Any) -> Iterator[None]:
    """Leave training as it was, whatever passes over the model do within the block.

    Random numbers (torch's, Python's and NumPy's), modes, gradients, which parameters require them, buffers, and what
    modules and owners keep account of are put back; see `unchanged_attributes`. Gradients are out of reach, so that a
    loss that calls `backward()` does not add to them.

    Args:
        model: any module.
        *owners: other objects whose attributes are put back, such as a trainer.

    Yields:
        Nothing.
    """
    global _active
    flags = [(m, m.training) for m in model.modules()]
    params = [(p, p.grad, p.requires_grad) for p in model.parameters()]
    random_state = RandomState(model)
    with unchanged_attributes(model, *owners), torch.enable_grad():
        try:
            _active += 1
            for p, g, _ in params:
                if g is not None:
                    p.grad = None
            yield
        finally:
            _active -= 1
            for m, flag in flags:
                m.training = flag
            for p, g, wanted in params:
                if p.grad is not g:
                    p.grad = g
                if p.requires_grad != wanted:
                    p.requires_grad_(wanted)
            random_state.restore()


@contextmanager
def frozen(model: nn.Module, *, twice: bool = True) -> Iterator[None]:
    """Make a model's loss a fixed, twice differentiable function, and leave training `undisturbed`.

    No module is in training mode (dropout), autocast is off, attention has a second derivative (kernels without one are
    switched for the duration).

    Args:
        model: any module.
        twice: whether there are to be second derivatives; without, kernels, autocast and Transformers' activation
            checkpointing stay as they are.

    Yields:
        Nothing.
    """
    global _precise
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    fused = [(c, k) for c in configs.values() if (k := getattr(c, "_attn_implementation", None)) not in _TWICE]
    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        if twice:
            stack.enter_context(sdpa_kernel(SDPBackend.MATH))
            for kind in sorted({p.device.type for p in model.parameters()} | {"cpu"}):
                stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            _precise += twice
            for m in model.modules():
                m.training = m.training and not twice and getattr(m, "gradient_checkpointing", False) is True
            for c, _ in fused if twice else ():
                c._attn_implementation = "eager"
            yield
        finally:
            _precise -= twice
            for c, kind in fused:
                c._attn_implementation = kind


@contextmanager
def unchanged_attributes(*owners: Any) -> Iterator[None]:
    """Put back what modules and other objects keep among their attributes.

    That is: every buffer, numbers, strings, tensors (the state of metrics of torchmetrics, say) and containers, and in
    containers tensors of up to `FEW` elements; larger ones are metrics' lists of predictions, which only grow. Of a
    module, those of all modules in it; of another object, those of the modules among its attributes as well.
    Parameters are left alone.

    Args:
        *owners: modules, and any objects with a `__dict__`.

    Yields:
        Nothing.
    """
    restores = [_attributes_of(owner) for owner in _with_modules(owners)]
    try:
        yield
    finally:
        with torch.no_grad():
            for restore in restores:
                restore()


def _with_modules(owners: Any) -> list[Any]:
    """The objects and all modules in them, each once."""
    out: dict[int, Any] = {}
    for owner in owners:
        if isinstance(owner, nn.Module):
            out |= {id(m): m for m in owner.modules()}
        elif hasattr(owner, "__dict__"):
            out[id(owner)] = owner
            values = [x for v in vars(owner).values() for x in (v.values() if type(v) is dict else (v,))]
            out |= {id(m): m for x in values if isinstance(x, nn.Module) for m in x.modules()}
    return list(out.values())


def _attributes_of(owner: Any) -> Callable[[], None]:
    """What puts the attributes of an object back."""
    attributes = vars(owner)
    other = _OF_EVERY_MODULE if isinstance(owner, nn.Module) else ()
    before = {k: (v, _contents_of(k, v)) for k, v in attributes.items() if k not in other and _is_plain(v)}

    def restore() -> None:
        for key in [k for k, v in attributes.items() if k not in before and k not in other and _is_plain(v)]:
            del attributes[key]
        for key, (value, restore_contents) in before.items():
            restore_contents()
            attributes[key] = value

    return restore


def _is_plain(value: Any) -> bool:
    return isinstance(value, _PLAIN) and not isinstance(value, nn.Parameter)


def _contents_of(key: str, value: Any) -> Callable[[], None]:
    """What puts the contents of an attribute back."""
    restores: list[Callable[[], Any]] = []
    _add_contents(value, math.inf, math.inf if key == "_buffers" else FEW, restores, set())

    def restore() -> None:
        for restore_one in restores:
            restore_one()

    return restore


def _add_contents(
    value: Any, limit: float, limit_inside: float, restores: list[Callable[[], Any]], visited: set[int]
) -> None:
    """Add what puts a value back, and the values in it: tensors of up to `limit` elements, `limit_inside` in it."""
    if isinstance(value, Tensor):
        # tensors of inference mode cannot be written outside it; those with a graph are results, which nobody writes
        kept = value.is_inference() or value.requires_grad or isinstance(value, nn.Parameter)
        if value.numel() <= limit and not kept:
            restores.append(_tensor_contents(value))
        return
    if not isinstance(value, _CONTAINERS) or id(value) in visited or len(visited) + len(restores) > FEW:
        return
    visited.add(id(value))
    restores.append(_dict_contents(value) if isinstance(value, dict) else _members(value))
    for x in list(value.values()) if isinstance(value, dict) else list(value)[:FEW]:
        _add_contents(x, limit_inside, limit_inside, restores, visited)


def _tensor_contents(value: Tensor) -> Callable[[], Any]:
    copy = value.clone()
    # not in the version, which batch normalization leaves alone and graphs of exact second derivatives rely on
    return lambda: value.data.copy_(copy)


def _dict_contents(value: dict[Any, Any]) -> Callable[[], None]:
    items = dict(value)

    def restore() -> None:
        if len(value) != len(items) or any(value.get(k, value) is not x for k, x in items.items()):
            value.clear()
            value.update(items)

    return restore


def _members(value: Any) -> Callable[[], None]:
    members = list(value)

    def restore() -> None:
        if len(value) != len(members) or any(a is not b for a, b in zip(value, members, strict=True)):
            value.clear()
            (value.update if isinstance(value, set) else value.extend)(members)

    return restore
