"""Sizes of gradients, updates and weights: does the optimizer move the weights by a healthy amount?"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim.core.parallel import sharding
from lightning_optim.core.rule import ADAMW_RMS
from lightning_optim.diagnostics import figures, view
from lightning_optim.diagnostics.probes.base import Probe
from lightning_optim.diagnostics.probes.context import TrainingContext
from lightning_optim.diagnostics.probes.history import ColumnHistory
from lightning_optim.diagnostics.report import Report, over_ranks

SAMPLE = 2**16
"""Elements per parameter by which the update is measured; all of them in smaller parameters."""


class Health(Probe):
    """Sizes of gradients, updates and weights by role, and steps that went wrong. Cheap.

    * `health/gradient_rms`, `update_rms`, `weight_rms`, `update_to_weight` by role. The update is the change
      of the weights, decay and learning rate included; 1e-3 of the weights is usual. Of large parameters 65536
      elements are measured (0.3 % error).
    * `health/gradient_norm`: of all gradients as the optimizer received them, after clipping.
    * `health/clip_rate`: share of the measured steps whose norm was at the clipping threshold.
    * `health/skipped_steps`, `nonfinite_steps`: since the start; steps that the optimizer skipped are counted in every
      step, gradients that are not finite in measured steps.
    * `health/effective_lr`: RMS of the update / 0.2, the learning rate at which AdamW takes steps of this size; it
      includes trust ratios, shape scales and clipping.
    * `health/loss_scale`, `health/loss_scale_drops`: of float16 training.

    Args:
        every: steps between measurements.
        max_overhead: share of training time above which the interval doubles.
        image_every: measurements between pictures; early ones come with the 2nd, 4th, 8th ... measurement.
        detail: whether every measure is also a scalar, not only those of the charts.
    """

    name = "health"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "RMS of update / RMS of weight, by role": [r"health/update_to_weight/.*"],
        "gradient norm": ["health/gradient_norm"],
        "effective learning rate": ["health/effective_lr"],
        "share of clipped steps": ["health/clip_rate"],
        "skipped and non-finite steps": [r"health/(skipped|nonfinite)_steps"],
        "loss scale": [r"health/loss_scale(_drops)?"],
    }
    curves: ClassVar[Mapping[str, tuple[str, str]]] = {
        "health/gradient_rms": ("RMS of the gradient, by role", "RMS"),
        "health/update_rms": ("RMS of the update, by role", "RMS"),
        "health/weight_rms": ("RMS of the weights, by role", "RMS"),
        "health/update_to_weight": ("RMS of update / RMS of weight, by role", "ratio"),
    }

    def __init__(
        self, every: int = 10, max_overhead: float = 0.01, image_every: int = 10, detail: bool = False
    ) -> None:
        super().__init__(every, max_overhead, detail)
        self.picture_every = image_every
        self.skipped = self.nonfinite = self.clipped = self.measured = self.drops = 0
        self.history = ColumnHistory()
        self._samples: dict[int, Tensor] = {}
        self._scale: float | None = None

    def clear(self) -> None:  # noqa: D102
        self._samples = {}

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        counts = {k: getattr(self, k) for k in ("skipped", "nonfinite", "clipped", "measured", "drops")}
        return super().state_dict() | counts

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(state)
        for key in ("skipped", "nonfinite", "clipped", "measured", "drops"):
            setattr(self, key, state[key])

    def before_step(self, context: TrainingContext) -> None:  # noqa: D102
        self._samples = {id(e.param): _sample(sharding.local(e.param)).clone() for e in context.entries()}

    def after_every_step(self, context: TrainingContext, advanced: bool) -> None:  # noqa: D102
        self.skipped += not advanced
        scale = context.loss_scale()
        if scale is not None and self._scale is not None and scale < self._scale:
            self.drops += 1
        self._scale = scale

    def measure(self, context: TrainingContext) -> Report | None:  # noqa: D102
        entries = [e for e in context.entries() if id(e.param) in self._samples]
        if not entries:
            return None
        counts = [e.param.numel() for e in entries]

        def squared_change(e: view.Entry) -> Tensor:
            weight, start = sharding.local(e.param), self._samples[id(e.param)]
            part = (_sample(weight) - start).square().sum(dtype=torch.float64)
            return part * (weight.numel() / max(1, start.numel()))

        weights = view.reduce_local(entries, lambda e: _square(sharding.local(e.param)), context.ranks)
        updates = view.reduce_local(entries, squared_change, context.ranks)
        gradients = view.reduce_local(entries, lambda e: _square(sharding.local_gradient(e.param)), context.ranks)
        sums = over_ranks(torch.cat([weights, updates, gradients])).cpu().view(3, -1)
        self._samples = {}
        present = [e.param.grad is not None for e in entries]
        report = Report()
        ratios = (sums[1] / sums[0]).sqrt()
        for role, members in view.by_role(entries).items():
            size = sum(counts[i] for i in members)
            weight, update, gradient = (sums[k, members].sum().item() for k in range(3))
            report.scalars[f"health/weight_rms/{role}"] = math.sqrt(weight / size)
            report.scalars[f"health/update_rms/{role}"] = math.sqrt(update / size)
            if weight > 0:
                report.scalars[f"health/update_to_weight/{role}"] = math.sqrt(update / weight)
            if any(present[i] for i in members):
                report.scalars[f"health/gradient_rms/{role}"] = math.sqrt(gradient / size)
        report.scalars["health/effective_lr"] = math.sqrt(sums[1].sum().item() / sum(counts)) / ADAMW_RMS
        if any(present):
            norm = math.sqrt(sums[2].sum().item())
            self.measured += 1
            self.nonfinite += not math.isfinite(norm)
            report.scalars["health/gradient_norm"] = norm
            if context.clip:
                self.clipped += norm >= context.clip * (1 - 1e-4)
                report.scalars["health/clip_rate"] = self.clipped / self.measured
        report.scalars["health/skipped_steps"] = float(self.skipped)
        report.scalars["health/nonfinite_steps"] = float(self.nonfinite)
        if self._scale is not None:
            report.scalars |= {"health/loss_scale": self._scale, "health/loss_scale_drops": float(self.drops)}
        self._draw(entries, ratios, report)
        return report

    def _draw(self, entries: list[view.Entry], ratios: Tensor, report: Report) -> None:
        self.history.add(self.step, ratios.clamp(min=1e-12).log10().tolist())
        if self.draws_pictures():
            report.images["health/update_to_weight_by_layer"] = figures.heat_map(
                self.history.table(),
                "RMS of update / RMS of weight, by layer",
                rows=figures.short([e.name for e in entries]),
                columns=[str(s) for s in self.history.steps],
                across="optimizer step",
                unit="log10 of ratio",
            )


def _sample(t: Tensor) -> Tensor:
    """Evenly spaced elements; an odd distance, so that all columns of a matrix take part."""
    flat = t.detach().reshape(-1)
    return flat[:: (flat.numel() // SAMPLE) | 1] if flat.numel() > SAMPLE else flat


def _square(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.linalg.vector_norm(t.detach().float()).double().square()
