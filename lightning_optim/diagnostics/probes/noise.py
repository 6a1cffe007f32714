"""The critical batch size, from micro-batches that training computes anyway."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from lightning_optim.core.parallel import sharding
from lightning_optim.diagnostics import noise, view
from lightning_optim.diagnostics.probes.base import MeasurementTimer, Probe
from lightning_optim.diagnostics.probes.context import TrainingContext
from lightning_optim.diagnostics.report import Report, before_exchange, over_ranks
from lightning_optim.diagnostics.undisturbed import measuring


class GradientNoiseScale(Probe):
    """Gradient noise scale from gradient accumulation or data-parallel ranks, in sequences and tokens.

    In a measured step a hook on every parameter records the norm of the increment that each micro-batch adds to the
    gradient, on each rank before the ranks are averaged. `noise/scale_sequences` (and `_tokens`) is tr Sigma / |G|^2
    with both averaged over measurements; the batch size beyond which more data per step pays off less. By role:
    `noise/scale_sequences/<role>`. Nothing is logged with a single micro-batch per step, or where gradients are clipped
    by value. Micro-batches must be independent: packed or repeated sequences are not.

    Args:
        every: steps between measurements.
        max_overhead: share of training time above which the interval doubles.
        beta: of the averages over measurements.
        detail: whether every measure is also a scalar, not only those of the charts.
    """

    name = "noise"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "noise scale and batch, in sequences": ["noise/(scale|batch)_sequences"],
        "noise scale, in tokens": ["noise/scale_tokens"],
    }
    curves: ClassVar[Mapping[str, tuple[str, str]]] = {
        "noise/scale_sequences": ("gradient noise scale, by role", "sequences"),
    }

    def __init__(self, every: int = 20, max_overhead: float = 0.01, beta: float = 0.9, detail: bool = False) -> None:
        super().__init__(every, max_overhead, detail)
        if not 0 <= beta < 1:
            raise ValueError(f"noise: beta must lie in [0, 1), got {beta}")
        self.beta = beta
        self._average: noise.NoiseScale | None = None
        self._saved: dict[str, Any] = {}
        self._roles: list[str] = []
        self._watched: list[Any] = []
        self._entries: list[view.Entry] = []
        self._squares: list[Tensor] = []
        self._sums: list[Tensor] = []
        self._calls: list[int] = []
        self._last: list[Tensor | None] = []
        self._examples = [0.0, 0.0]
        self._warned = False

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        average = self._average.state_dict() if self._average is not None else {}
        return super().state_dict() | {"roles": self._roles, "average": average}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(state)
        self._saved = state

    def clear(self) -> None:  # noqa: D102
        for handle in self._watched:
            handle.remove()
        self._watched, self._entries, self._last = [], [], []

    def begin_batch(self) -> None:  # noqa: D102
        super().begin_batch()
        if self.context is not None and not self._entries and self.budget.due(self.step + 1):
            with MeasurementTimer(self):
                self._watch(self.context)

    def _watch(self, context: TrainingContext) -> None:
        self._entries = context.entries()
        zero = torch.zeros((), dtype=torch.float64)
        self._squares, self._sums = ([zero] * len(self._entries) for _ in range(2))
        self._calls, self._last = [0] * len(self._entries), [None] * len(self._entries)
        self._examples = [0.0, 0.0]
        if not any(view.is_sharded(e.param) for e in self._entries):
            self._watched = [e.param.register_hook(self._hook(i)) for i, e in enumerate(self._entries)]

    def _hook(self, i: int) -> Any:
        def note(increment: Tensor) -> None:
            if not measuring():
                self.safely(self._note, i, increment.detach())

        return note

    def _note(self, i: int, increment: Tensor) -> None:
        square = torch.linalg.vector_norm(increment.float()).double().square()
        self._squares[i] = square + self._squares[i].to(square.device)
        self._sums[i] = increment.sum(dtype=torch.float64) + self._sums[i].to(square.device)
        self._calls[i] += 1

    def record_batch(self, batch: Any) -> None:  # noqa: D102
        if self._entries:
            sequences, tokens = examples(batch)
            self._examples[0] += sequences
            self._examples[1] += tokens

    def after_backward(self) -> None:
        """Note what the batch has added to sharded gradients, which no hook sees on its way."""
        if self._entries and not self._watched:
            with MeasurementTimer(self), torch.no_grad():
                for i, e in enumerate(self._entries):
                    total = sharding.local_gradient(e.param)
                    if total is not None:
                        last = self._last[i]
                        self._note(i, total if last is None else total - last)
                        self._last[i] = total.clone()

    def measure(self, context: TrainingContext) -> Report | None:  # noqa: D102
        entries, watched = self._entries, bool(self._watched)
        if not entries:
            return None
        device = sharding.local(entries[0].param).device
        vectors = [torch.stack([x.to(device) for x in column]) for column in (self._squares, self._sums)]
        calls = torch.tensor(self._calls, dtype=torch.float64, device=device)
        counted = torch.tensor(self._examples, dtype=torch.float64, device=device)
        metric = noise.MicroBatches(len(entries)).to(device)
        if watched:
            metric.update(vectors[0], vectors[1], calls, counted)
            before_exchange()
            result = {k: v.cpu() for k, v in metric.compute().items()}
            finals = [e.param.grad for e in entries]
            square = view.reduce_local(entries, lambda e: _square(sharding.local_gradient(e.param)), context.ranks)
            sums = [torch.zeros(()) if g is None else g.sum(dtype=torch.float64).cpu() for g in finals]
            factor = _common_factor(result["sums"], torch.stack([s.double() for s in sums]))
        else:  # shards: sums over ranks make one process's numbers
            parts = iter(zip(self._squares, self._last, strict=True))
            squares = view.reduce_local(entries, lambda e: next(parts)[0], context.ranks)
            lasts = iter(self._last)
            square = view.reduce_local(entries, lambda e: _square(next(lasts)), context.ranks)
            squares = over_ranks(squares).cpu()
            steps = calls.max().cpu()
            result = {"mean_square": squares * steps, "count": steps, "examples": over_ranks(counted).cpu()}
            factor = 1.0
        square = over_ranks(square).cpu()
        self.clear()
        count = result["count"].item()
        if count < 2:
            if not self._warned:
                warnings.warn(
                    "the gradient noise scale needs gradient accumulation or several ranks; it is not logged",
                    stacklevel=2,
                )
                self._warned = True
            return None
        if factor is None or not math.isfinite(float(square.sum())):
            return None
        scale = 1.0 if not watched else context.loss_scale() or 1.0
        clip = factor * scale
        return self._estimate(entries, result["mean_square"] / scale**2, square / clip**2, count, result["examples"])

    def _estimate(
        self, entries: list[view.Entry], small: Tensor, big: Tensor, count: float, counted: Tensor
    ) -> Report | None:
        roles = view.by_role(entries)
        sequences, tokens = (counted / count).tolist()
        if not sequences:
            return None
        columns = [*roles.values(), list(range(len(entries)))]
        s, g = (torch.stack([x[members].sum() for members in columns]) for x in (small, big))
        square, trace = noise.estimate(s, g, sequences, sequences * count)
        names = [*roles, ""]
        if self._average is None or self._roles != names:
            self._roles, self._average = names, noise.NoiseScale(self.beta, len(names))
            if self._saved.get("roles") == names and self._saved.get("average"):
                self._average.load_state_dict(self._saved["average"])
            self._saved = {}
        self._average.update(square, trace)
        scales = self._average.scale().tolist()
        report = Report()
        report.scalars = {f"noise/scale_sequences/{role}": x for role, x in zip(roles, scales, strict=False)}
        report.scalars |= {
            "noise/scale_sequences": scales[-1],
            "noise/scale_tokens": scales[-1] * tokens / sequences,
            "noise/gradient_square": self._average.square[-1].item() / self._average.weight,
            "noise/trace": self._average.trace[-1].item() / self._average.weight,
            "noise/batch_sequences": sequences * count,
        }
        report.scalars = report.finite()
        return report


def examples(batch: Any) -> tuple[float, float]:
    """How many sequences and tokens a batch has.

    Args:
        batch: tensors in any nesting; `input_ids` counts if there is one, else the first with two dimensions.

    Returns:
        (sequences, tokens); (0, 0) if it has no tensor.
    """
    tensors = [t for t in _tensors(batch) if t.ndim > 0]
    for t in sorted(tensors, key=lambda t: t.ndim < 2):
        return float(t.shape[0]), float(t.shape[0] * (t.shape[1] if t.ndim > 1 else 1))
    return 0.0, 0.0


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Mapping) and isinstance(batch.get("input_ids"), Tensor):
        yield batch["input_ids"]
    leaves = tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch)
    yield from (t for t in leaves if isinstance(t, Tensor))


def _common_factor(before: Tensor, after: Tensor) -> float | None:
    """The factor by which scaling and clipping have multiplied all gradients, from one sum per parameter."""
    if not before.square().sum() > 0:
        return None
    factor = float((before * after).sum() / before.square().sum())
    off = (after - factor * before).square().sum() / after.square().sum().clamp(min=1e-300)
    return factor if factor > 0 and off < 1e-2 else None


def _square(t: Tensor | None) -> Tensor | None:
    return None if t is None else torch.linalg.vector_norm(t.detach().float()).double().square()
