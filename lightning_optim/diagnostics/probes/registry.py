"""The registry of probes: a new probe is one class file in this folder and one row here.

Each row becomes a callback class in `lightning_optim.callbacks` and in `hf_integration`, and a member of the lists
that `diagnostics(preset)` returns. `python -m lightning_optim.diagnostics.probes.stubs` then writes the type stubs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Protocol, TypeVar, cast, get_args

from lightning_optim.core.rule import nearest
from lightning_optim.diagnostics.probes.base import Probe
from lightning_optim.diagnostics.probes.curvature import HessianBlocks
from lightning_optim.diagnostics.probes.health import Health
from lightning_optim.diagnostics.probes.memory import Memory
from lightning_optim.diagnostics.probes.noise import GradientNoiseScale
from lightning_optim.diagnostics.probes.rank import GradientRank
from lightning_optim.diagnostics.probes.refresh import PreconditionerRefresh

Preset = Literal["cheap", "matrix", "curvature"]
"""Names of the presets. Each preset contains the ones before it."""
PRESETS: tuple[Preset, ...] = get_args(Preset)


@dataclass(frozen=True)
class ProbeEntry:
    """One row of the registry.

    Args:
        probe: the class that measures.
        callback: name of the callback class in both frameworks.
        preset: the smallest preset that contains the probe.
        budget: largest share of training time in a preset. Together they stay below 1, 3 and 5 %.
        every: optimizer steps between measurements in a preset, fewer in a run too short for a dozen of them.
    """

    probe: type[Probe]
    callback: str
    preset: Preset
    budget: float
    every: int


REGISTRY: tuple[ProbeEntry, ...] = (
    ProbeEntry(Health, "OptimizerHealth", preset="cheap", budget=0.006, every=10),
    ProbeEntry(Memory, "MemoryLogger", preset="cheap", budget=0.002, every=100),
    ProbeEntry(PreconditionerRefresh, "PreconditionerRefresh", preset="matrix", budget=0.004, every=25),
    ProbeEntry(GradientRank, "GradientRank", preset="matrix", budget=0.009, every=100),
    ProbeEntry(GradientNoiseScale, "GradientNoiseScale", preset="curvature", budget=0.003, every=20),
    ProbeEntry(HessianBlocks, "HessianBlocks", preset="curvature", budget=0.026, every=1000),
)


def members(preset: str) -> list[ProbeEntry]:
    """The rows that belong to a preset.

    Args:
        preset: `"cheap"`, `"matrix"` or `"curvature"`; each contains the one before.

    Returns:
        Rows, in the registry's order.

    Raises:
        ValueError: an unknown name.
    """
    if preset not in PRESETS:
        raise ValueError(f"unknown diagnostics {preset!r}; {nearest(preset, list(PRESETS))}")
    return [entry for entry in REGISTRY if PRESETS.index(entry.preset) <= PRESETS.index(preset)]


def preset_settings(entry: ProbeEntry, steps: int | None = None) -> dict[str, Any]:
    """The arguments that a preset gives a probe.

    Args:
        entry: row of the probe.
        steps: length of the run, if it is known.

    Returns:
        Keyword arguments.
    """
    every = entry.every if steps is None else max(1, min(entry.every, steps // 12))
    return {"max_overhead": entry.budget, "every": every}


class CallbackBase(Protocol):
    """What a framework's base class of diagnostic callbacks has."""

    kind: ClassVar[type[Probe]]
    loss_type: ClassVar[Any]
    """Type of the argument `loss` of callbacks whose probe needs a loss."""
    loss_help: ClassVar[str]
    """Its line in their docstring."""
    optimizer_help: ClassVar[str | None]
    """The line of the argument `optimizer` in the docstring; None without one."""


Base = TypeVar("Base", bound=CallbackBase)


def callback_classes(base: type[Base], module: str) -> dict[str, type[Base]]:
    """Make a framework's callback class of every probe.

    Args:
        base: the framework's base class.
        module: name of the module that the classes become attributes of.

    Returns:
        Name to class, with the probe's signature and docstring.
    """
    return {entry.callback: _callback_class(base, module, entry) for entry in REGISTRY}


def _callback_class(base: type[Base], module: str, entry: ProbeEntry) -> type[Base]:
    call = callback_signature(base, entry.probe)

    def __init__(self: Any, *args: Any, **settings: Any) -> None:
        base.__init__(self, *args, **settings)

    self_parameter = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    __init__.__signature__ = call.replace(parameters=[self_parameter, *call.parameters.values()])  # pyright: ignore
    doc = inspect.cleandoc(entry.probe.__doc__ or "")
    if entry.probe.needs_loss:
        doc += f"\n    loss: {base.loss_help}"
    if base.optimizer_help:
        doc += f"\n    optimizer: {base.optimizer_help}"
    body = {"kind": entry.probe, "__init__": __init__, "__doc__": doc, "__module__": module, "__signature__": call}
    return cast("type[Base]", type(entry.callback, (base,), body))


def callback_signature(base: type[CallbackBase], probe: type[Probe]) -> inspect.Signature:
    """The constructor's signature of a callback class, without `self`.

    Args:
        base: the framework's base class.
        probe: class of the probe.

    Returns:
        The probe's arguments with their types, `loss` where the probe needs a loss, and `optimizer`.
    """
    call = inspect.signature(probe, eval_str=True)
    more = [("loss", None, base.loss_type)] if probe.needs_loss else []
    more += [("optimizer", 0, int)] if base.optimizer_help else []
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [inspect.Parameter(name, keyword, default=default, annotation=kind) for name, default, kind in more]
    return call.replace(parameters=[*call.parameters.values(), *added])


def callbacks_of(preset: str, classes: dict[str, type[Base]], steps: int | None, **settings: Any) -> list[Base]:
    """The callbacks of a preset, with the preset's settings.

    Args:
        preset: see `members`.
        classes: from `callback_classes`.
        steps: see `preset_settings`.
        **settings: further arguments of every callback.

    Returns:
        New callbacks.
    """
    make: dict[str, Callable[..., Base]] = dict(classes)
    return [make[entry.callback](**preset_settings(entry, steps), **settings) for entry in members(preset)]
