"""Memory of a training step by category."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, ClassVar

import torch

from lightning_optim.core.parallel import sharding
from lightning_optim.diagnostics import memory
from lightning_optim.diagnostics.memory import MIB
from lightning_optim.diagnostics.probes.base import Probe
from lightning_optim.diagnostics.probes.context import TrainingContext
from lightning_optim.diagnostics.report import Report, over_ranks


class Memory(Probe):
    """Bytes of this rank by category, in MiB.

    * `memory/parameters`, `buffers`, `gradients`, `state` (and by slot in the table), `state_predicted` (what the
      rules declare, over all ranks);
    * `memory/activations`: saved for the backward pass of one batch;
    * `memory/temporary`: the peak of the step (with clipping) beside the new state;
    * `memory/communication`: DDP's buckets; `memory/checkpoint`: the last one on disk;
    * on CUDA `memory/peak_forward`, `_backward`, `_step`, `_run`, `allocated`, `reserved` and the shares
      `fragmentation`, `rounding`; else `memory/resident`, `resident_peak` of the process;
    * `memory/unattributed`: allocated (resident on a CPU) bytes outside all categories; growth indicates a leak;
    * with several ranks `memory/all_ranks/<category>` and `memory/largest_rank/<category>`.

    Args:
        every: steps between measurements.
        max_overhead: share of training time above which the interval doubles.
        touch_peak: whether the allocator's peak counter may be reset in measured steps; other code may read it, too.
        temporary: whether the step's temporaries are tracked operation by operation where the allocator has no peak
            counter; such a step is about 15 % slower.
        snapshot: file for the allocator's history when training runs out of memory (CUDA).
        detail: whether every measure is also a scalar, not only those of the charts.
    """

    name = "memory"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "memory by category (MiB)": [r"memory/(parameters|gradients|state|activations|temporary|communication)"],
        "peaks, and what is in no category (MiB)": [r"memory/(peak_.*|resident_peak|unattributed)"],
    }

    def __init__(
        self,
        every: int = 100,
        max_overhead: float = 0.005,
        touch_peak: bool = True,
        temporary: bool = True,
        snapshot: Path | str | None = None,
        detail: bool = False,
    ) -> None:
        super().__init__(every, max_overhead, detail)
        self.touch_peak, self.temporary = touch_peak, temporary
        self.snapshot = None if snapshot is None else Path(snapshot)
        self._saved: memory.SavedActivations | None = None
        self._live: memory.LiveStorages | None = None
        self._phases: memory.Phases | None = None
        self._activations: int | None = None
        self._growth = 0
        self._will_measure = False

    def prepare(self, context: TrainingContext) -> None:  # noqa: D102
        cuda = next(context.model.parameters()).device.type == "cuda"
        if cuda and self.touch_peak:
            self._phases = memory.Phases(torch.cuda.memory_stats, torch.cuda.reset_peak_memory_stats)
        if cuda and self.snapshot is not None:
            torch.cuda.memory._record_memory_history()

    def clear(self) -> None:  # noqa: D102
        self._exit()
        self._phases, self._will_measure = None, False

    def _exit(self) -> None:
        contexts, self._saved, self._live = (self._saved, self._live), None, None
        with ExitStack() as stack:
            for context in contexts:
                if context is not None:
                    stack.push(context)

    def on_exception(self, error: BaseException) -> None:  # noqa: D102
        if isinstance(error, torch.OutOfMemoryError) and self.snapshot is not None:
            torch.cuda.memory._dump_snapshot(str(self.snapshot))

    def begin_batch(self) -> None:  # noqa: D102
        super().begin_batch()
        self._will_measure = self.context is not None and self.budget.due(self.step + 1)

    def record_batch(self, batch: Any) -> None:  # noqa: D102
        if self._will_measure and self.context is not None and self._saved is None:
            if self._phases is not None:
                self._phases.begin()
            if not _compiled(self.context):
                self._saved = memory.SavedActivations(self.context.model)
                self._saved.__enter__()

    def after_forward(self) -> None:  # noqa: D102
        if self._saved is not None:
            saved, self._saved = self._saved, None
            saved.__exit__(None, None, None)
            if saved.error is not None:
                raise saved.error
            self._activations = saved.bytes
            if self._phases is not None:
                self._phases.mark("forward")

    def before_optimizer_step(self) -> None:  # noqa: D102
        if not self._will_measure or self.context is None:
            return
        if self._phases is not None:
            self._phases.mark("backward")
        elif self.temporary and not torch.cuda.is_available():
            self._live = memory.LiveStorages()
            self._live.__enter__()

    def measure(self, context: TrainingContext) -> Report | None:  # noqa: D102
        temporary: float | None = None
        if self._live is not None:
            live, self._live = self._live, None
            live.__exit__(None, None, None)
            if live.error is not None:
                raise live.error
            temporary = live.peak - live.current
        self._exit()
        self._will_measure = False
        sizes: dict[str, float] = {k: float(v) for k, v in memory.categories(context.model, context.optimizer).items()}
        table = {k.removeprefix("state."): v for k, v in sizes.items() if k.startswith("state.")}
        sizes = {k: v for k, v in sizes.items() if not k.startswith("state.")}
        if self._activations is not None:
            sizes["activations"] = float(self._activations)
        ddp = context.extra.get("ddp")
        if ddp is not None and not getattr(ddp, "gradient_as_bucket_view", False):
            sizes["communication"] = sizes["gradients"]
        if self._phases is not None:
            self._phases.mark("step")
            temporary = self._phases.growth["step"]
        if temporary is not None:
            sizes["temporary"] = temporary
        report = Report()
        values = dict(sizes)
        values |= self._process(context, sizes)
        predicted = memory.predicted_state(context.optimizer)
        if predicted is not None:
            values["state_predicted"] = float(predicted)
        size = _checkpoint(context.extra.get("checkpoint"))
        if size is not None:
            values["checkpoint"] = float(size)
        report.scalars = {f"memory/{k}": v if k in SHARES else v / MIB for k, v in values.items()}
        if context.ranks > 1:
            report.scalars |= _across(context, sizes)
        report.texts["memory/table"] = _markdown(values, table)
        return report

    def _process(self, context: TrainingContext, sizes: Mapping[str, float]) -> dict[str, float]:
        device = next(context.model.parameters()).device
        attributed = sum(sizes.get(k, 0.0) for k in ("parameters", "buffers", "gradients", "state", "communication"))
        attributed -= sizes.get("state_host", 0.0)
        if device.type != "cuda":
            process = memory.resident()
            out = {"resident": process.get("rss", 0), "resident_peak": process.get("rss_peak", 0)}
            return {k: float(v) for k, v in out.items() if v} | (
                {"unattributed": process["rss"] - attributed} if "rss" in process else {}
            )
        stats = memory.allocator(torch.cuda.memory_stats(device))
        out = {k: v for k, v in stats.items() if k in ("allocated", "reserved", *SHARES)}
        if self._phases is not None:
            out |= {f"peak_{k}": v for k, v in self._phases.peaks.items()} | {"peak_run": self._phases.run_peak}
        else:
            out["peak_run"] = stats["allocated_peak"]
        return out | {"unattributed": stats["allocated"] - attributed}


SHARES = ("fragmentation", "rounding")


def _compiled(context: TrainingContext) -> bool:
    return any(getattr(m, "_compiled_call_impl", None) is not None for m in context.model.modules())


def _checkpoint(find: Callable[[], Path | None] | None) -> int | None:
    """Bytes of the last checkpoint, a file or a directory."""
    path = find() if find is not None else None
    if path is None or not path.exists():
        return None
    files = [path] if path.is_file() else [p for p in path.rglob("*") if p.is_file()]
    return sum(p.stat().st_size for p in files)


def _across(context: TrainingContext, sizes: Mapping[str, float]) -> dict[str, float]:
    """Sums and maxima over ranks."""
    keys = sorted(sizes)
    device = sharding.local(next(context.model.parameters())).device
    table = torch.zeros(context.ranks, len(keys), dtype=torch.float64, device=device)
    table[context.rank] = torch.tensor([sizes[k] for k in keys], dtype=torch.float64)
    table = over_ranks(table.flatten()).cpu().view(context.ranks, -1) / MIB
    out = {f"memory/all_ranks/{k}": v for k, v in zip(keys, table.sum(0).tolist(), strict=True)}
    return out | {f"memory/largest_rank/{k}": v for k, v in zip(keys, table.amax(0).tolist(), strict=True)}


def _markdown(values: Mapping[str, float], slots: Mapping[str, float]) -> str:
    lines = ["| category | MiB |", "|---|---|"]
    lines += [f"| {k} | {v / MIB:.3f} |" for k, v in values.items() if k not in SHARES]
    lines += [f"| state: {k} | {v / MIB:.3f} |" for k, v in slots.items()]
    return "\n".join(lines)
