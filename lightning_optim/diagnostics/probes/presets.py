"""Which probes belong together, and what they may cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from lightning_optim.core.rule import nearest
from lightning_optim.diagnostics.probes.base import Probe
from lightning_optim.diagnostics.probes.curvature import HessianBlocks
from lightning_optim.diagnostics.probes.health import Health
from lightning_optim.diagnostics.probes.memory import Memory
from lightning_optim.diagnostics.probes.noise import GradientNoiseScale
from lightning_optim.diagnostics.probes.rank import GradientRank
from lightning_optim.diagnostics.probes.refresh import PreconditionerRefresh

Preset = Literal["cheap", "matrix", "curvature"]

MEMBERS: Mapping[str, Mapping[type[Probe], float]] = {
    "cheap": {Health: 0.006, Memory: 0.002},
    "matrix": {Health: 0.006, Memory: 0.002, PreconditionerRefresh: 0.004, GradientRank: 0.009},
    "curvature": {
        Health: 0.006,
        Memory: 0.002,
        PreconditionerRefresh: 0.004,
        GradientRank: 0.009,
        GradientNoiseScale: 0.003,
        HessianBlocks: 0.026,
    },
}
"""Probes of a preset and the largest share of training time of each: below 1, 3 and 5 % in all."""

USUAL: Mapping[type[Probe], int] = {
    Health: 10,
    Memory: 100,
    PreconditionerRefresh: 25,
    GradientRank: 100,
    GradientNoiseScale: 20,
    HessianBlocks: 1000,
}
"""Steps between measurements; fewer in a run that is too short for a dozen of them."""


def preset(name: str, steps: int | None = None) -> list[tuple[type[Probe], dict[str, Any]]]:
    """The probes of a preset and their settings.

    Args:
        name: `"cheap"`, `"matrix"` or `"curvature"`; each contains the one before.
        steps: length of the run, if it is known.

    Returns:
        (probe, settings).

    Raises:
        ValueError: an unknown name.
    """
    if name not in MEMBERS:
        raise ValueError(f"unknown diagnostics {name!r}; {nearest(name, list(get_args(Preset)))}")
    out = []
    for kind, limit in MEMBERS[name].items():
        settings: dict[str, Any] = {"max_overhead": limit, "every": USUAL[kind]}
        if steps is not None:
            settings["every"] = max(1, min(USUAL[kind], steps // 12))
        out.append((kind, settings))
    return out


def layout_of(probes: Sequence[Probe]) -> dict[str, dict[str, list[Any]]]:
    """TensorBoard's custom scalars: charts by probe, those that have something to show.

    Args:
        probes: of one trainer.

    Returns:
        What `SummaryWriter.add_custom_scalars` takes.
    """
    found = {p.name: p.layout() for p in probes if p.layout()}
    found["diagnostics"] = {"share of training time, by callback": ["diagnostics/share/.*"]}
    return {name: {title: ["Multiline", list(tags)] for title, tags in own.items()} for name, own in found.items()}


def write(report: Any, writer: Any, step: int, folder: Path | None, name: str) -> None:
    """Write what is no scalar of a report to TensorBoard and, the arrays, beside it.

    Args:
        report: the report.
        writer: a `SummaryWriter`, or None.
        step: of the measurement.
        folder: of the log, or None.
        name: of the probe.
    """
    if writer is not None:
        for tag, picture in report.images.items():
            writer.add_image(tag, picture, step, dataformats="HWC")
        for tag, text in report.texts.items():
            writer.add_text(tag, text, step)
    if folder is not None:
        report.save_arrays(folder, name, step)
