"""Reports of probes in TensorBoard, and as arrays beside its files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_optim.diagnostics.probes.base import Probe
from lightning_optim.diagnostics.report import Report


def layout_of(probes: Sequence[Probe]) -> dict[str, dict[str, list[Any]]]:
    """The layout of TensorBoard's custom scalars: the charts of every probe that have something to show.

    Args:
        probes: of one trainer.

    Returns:
        What `SummaryWriter.add_custom_scalars` takes.
    """
    charts = [(p.prefix, p.name, p.layout()) for p in probes if p.layout()]
    share = {"share of training time, by callback": ["diagnostics/share/.*"]}
    charts += [(prefix, "diagnostics", share) for prefix in sorted({p.prefix for p in probes})]
    return {
        f"{prefix}{name}": {title: ["Multiline", [f"{prefix}{x}" for x in tags]] for title, tags in of_probe.items()}
        for prefix, name, of_probe in charts
    }


def write(report: Report, writer: Any, step: int, folder: Path | None, name: str) -> None:
    """Write the pictures and texts of a report to TensorBoard, and its arrays to a file.

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
