"""Rank of gradients, momenta, updates and weights, and how much of them the optimizer's bases capture."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_optim.core.parallel.ownership import assign_owners
from lightning_optim.core.rule import ADAMW_RMS, hyperparameters
from lightning_optim.diagnostics import figures, spectrum, subspace, view
from lightning_optim.diagnostics.probes.base import Probe
from lightning_optim.diagnostics.probes.context import TrainingContext
from lightning_optim.diagnostics.probes.history import ColumnHistory
from lightning_optim.diagnostics.report import Report, over_ranks

KINDS = ("gradient", "momentum", "update", "weight")
MEASURES = (
    "stable_rank", "stable_rank_vs_gaussian", "eff_rank", "participation", "nuc_rank", "rank@90", "rank@99", "cond",
    "spec", "rms",
)  # fmt: skip
SHOWN = {
    "gradient.rank@90": ("rank that holds 90 % of the gradient's energy, by role", "rank"),
    "gradient.stable_rank_vs_gaussian": ("stable rank of the gradient / of a Gaussian matrix, by role", "ratio"),
    "update.stable_rank": ("stable rank of the update, by role", "rank"),
    "gradient.captured": ("gradient's energy captured by the optimizer's basis, by role", "share"),
}
"""Measures that are curves, and scalars on request. Title and vertical axis of each."""
BASIS = 32
"""Number of leading columns of a full basis whose captured energy and drift are measured."""


class GradientRank(Probe):
    """Rank measures of every matrix, whole under DDP and FSDP2.

    Means over the layers of a role, `rank/<kind>_<measure>/<role>`, are curves of four measures and scalars on
    request; `scalars` chooses out of the kinds gradient, momentum, update and weight and the measures of
    `diagnostics.spectrum`. All of them are in the table `rank/table`, layer by layer in the pictures and, with
    singular values' energies, in the arrays.

    * `captured`: share of the gradient's energy in the optimizer's basis (the 32 leading columns of a full one);
      `captured_at_refresh`, and `rank/residual_gap`, the share that a basis of the present gradient would add.
    * `rank/overlap`: chance-adjusted overlap of a basis with that of the measurement before its last change; the
      picture `rank/basis_cosines` has |u_i^T v_i| of its leading columns, by descending eigenvalue, one by one (mean
      over the matrices; where eigenvalues are close columns pair wrongly, so read it beside the overlap).
    * `rank/orthogonality_error`, `singular_min`, `singular_max`, `outside_band`: of updates of rules that
      orthogonalize, without learning rate and shape scale; an error of 0.35 to 0.65 is normal for Newton-Schulz.
    * `rank/suggested`: the smallest multiple of 8 that captures 90 % of the gradient's energy in 3 of 4 matrices.

    Args:
        every: steps between measurements.
        max_overhead: share of training time above which the interval doubles.
        scalars: `kind.measure` pairs that become scalars.
        ranks: of the energies.
        limit: longest small side of which the whole spectrum is computed.
        detail: whether every measure is also a scalar, not only those of the charts.
    """

    name = "rank"
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "suggested rank": ["rank/suggested"],
        "energy that a new basis would hold more": ["rank/residual_gap"],
        "overlap of a basis with the one before": ["rank/overlap"],
        "updates' distance from orthogonality, largest singular value": [r"rank/(orthogonality_error|singular_max)"],
    }
    curves: ClassVar[Mapping[str, tuple[str, str]]] = {
        f"rank/{pair.replace('.', '_', 1)}": shown for pair, shown in SHOWN.items()
    }

    def __init__(
        self,
        every: int = 100,
        max_overhead: float = 0.02,
        scalars: Sequence[str] = (),
        ranks: Sequence[int] = (8, 32, 128),
        limit: int = spectrum.LIMIT,
        detail: bool = False,
    ) -> None:
        super().__init__(every, max_overhead, detail)
        names = {*MEASURES, "captured", *(f"energy@{r}" for r in ranks)}
        for text in scalars:
            kind, _, measure = text.partition(".")
            if kind not in KINDS or measure not in names:
                raise ValueError(
                    f"rank: no scalar {text!r}; kinds: {', '.join(KINDS)}; measures: {', '.join(sorted(names))}"
                )
        self.scalars, self.ranks, self.limit = tuple(scalars), tuple(ranks), limit
        self.history, self.cosines = ColumnHistory(), ColumnHistory()
        self._start: dict[int, Tensor] = {}
        self._bases: dict[tuple[str, str], tuple[Tensor, float, float]] = {}

    def all_charts(self) -> dict[str, Sequence[str]]:  # noqa: D102
        more = {f"{text}, by role": [re.escape("rank/" + text.replace(".", "_", 1)) + "/.*"] for text in self.scalars}
        return {**super().all_charts(), **more}

    def clear(self) -> None:  # noqa: D102
        self._start, self._bases = {}, {}

    def before_step(self, context: TrainingContext) -> None:  # noqa: D102
        self._start = {id(e.param): e.param.detach().clone() for e in context.entries() if e.is_matrix}

    def measure(self, context: TrainingContext) -> Report | None:  # noqa: D102
        entries = [e for e in context.entries() if id(e.param) in self._start]
        if not entries:
            return None
        keys = [f"{kind}.{m}" for kind in KINDS for m in (*MEASURES, *(f"energy@{r}" for r in self.ranks))]
        keys += ["gradient.captured", "at_refresh", "gap", "overlap", "orth", "smin", "smax", "outside"]
        keys += [f"cosine@{i}" for i in range(1, BASIS + 1)]
        place = {k: i for i, k in enumerate(keys)}
        device = entries[0].param.device
        table = torch.full((len(entries), len(keys)), math.nan, dtype=torch.float64, device=device)
        owners = _assign_owners(entries, context.ranks)
        for i, e in enumerate(entries):
            state = context.optimizer.state.get(e.param, {})
            start = self._start.pop(id(e.param))
            tensors: dict[str, Tensor | None] = {
                "gradient": None if e.param.grad is None else view.whole(e.param.grad),
                "momentum": view.momentum_buffer(e, state),
                "update": view.whole(e.param.detach() - start),
                "weight": view.whole(e.param),
            }
            for name, value in self._row(e, state, start, tensors, context.rank == owners[i]).items():
                if name in place:
                    table[i, place[name]] = value
        self._start = {}
        is_measured = (~table.isnan()).double()
        sums = over_ranks(torch.cat([table.nan_to_num(0.0).flatten(), is_measured.flatten()])).cpu()
        total, count = sums.view(2, len(entries), len(keys))
        return self._report_of(entries, total / count, place)

    def _row(
        self,
        e: view.Entry,
        state: dict[str, Any],
        start: Tensor,
        tensors: dict[str, Tensor | None],
        is_owner: bool,
    ) -> dict[str, Tensor | float]:
        """The measures of one parameter that this rank computes. All ranks gather, the owner computes."""
        row: dict[str, Tensor | float] = {}
        momentum = tensors["momentum"]
        if momentum is not None and momentum.numel():
            tensors["momentum"] = momentum = view.whole(momentum)
        is_elsewhere = momentum is not None and not momentum.numel()
        for kind, t in tensors.items():
            is_mine = is_owner and not (kind == "momentum" and is_elsewhere)
            if kind == "momentum" and self._is_on_one_rank(e):
                is_mine = not is_elsewhere
            if t is not None and t.numel() and is_mine:
                measures = self._measures(e.stacks(t), e.param.device)
                row |= {f"{kind}.{name}": value for name, value in measures.items()}
        if _orthogonalizes(e):
            direction = view.whole(e.param.detach() - start * (1 - e.group["lr"] * e.group["weight_decay"]))
            if is_owner:
                row |= _orthogonality(e, direction)
        gradient = tensors["gradient"]
        if gradient is not None and (self._is_on_one_rank(e) or is_owner):
            row |= self._basis(e, state, e.stacks(gradient)[0])
        return row

    def _is_on_one_rank(self, e: view.Entry) -> bool:
        """Whether a single rank stores the state of this sharded parameter."""
        return e.rule is not None and not e.rule.elementwise and not e.rule.reduces and view.is_sharded(e.param)

    def _measures(self, stacks: Sequence[Tensor], device: torch.device) -> dict[str, Tensor]:
        """Means over all matrices of a parameter."""
        rows: list[dict[str, Tensor]] = []
        for x in (x for stack in stacks for x in stack):
            row = spectrum.measures(x, self.generator(device), ranks=self.ranks, limit=self.limit)
            row["stable_rank_vs_gaussian"] = row["stable_rank"] / spectrum.gaussian_stable_rank(*x.shape)
            rows.append(row)
        return {k: torch.stack([row[k].double() for row in rows if k in row]).mean() for k in rows[0]}

    def _basis(self, e: view.Entry, state: dict[str, Any], gradient: Tensor) -> dict[str, Tensor | float]:
        """The share of the gradient that the optimizer's bases capture, of the side that captures less."""
        out: dict[str, Tensor | float] = {}
        for side, q in view.bases_of(e, state):
            r = min(q.shape[-1], BASIS if q.shape[-1] == q.shape[-2] else q.shape[-1])
            if r == q.shape[-2]:
                r = max(1, r // 4)
            q = q[..., :r]
            g = (gradient if side == "left" else gradient.mT).to(q.dtype)
            share = float(subspace.captured(q, g).mean())
            previous = self._bases.get((e.name, side))
            overlap, at_refresh, cosines = math.nan, share, None
            if previous is not None and previous[0].shape == q.shape:
                if torch.equal(previous[0], q):
                    _, overlap, at_refresh = previous
                else:
                    overlap = float(subspace.adjusted_overlap(previous[0], q).mean())
                    cosines = subspace.column_cosines(previous[0], q).flatten(0, -2).mean(0)
            self._bases[e.name, side] = q.clone(), overlap, at_refresh
            if share < out.get("gradient.captured", math.inf):
                best = torch.stack([spectrum.energy(spectrum.singular_values(x), r) for x in g]).mean()
                out = {"gradient.captured": share, "at_refresh": at_refresh, "gap": best - share, "overlap": overlap}
                if cosines is not None:
                    out |= {f"cosine@{i}": c for i, c in enumerate(cosines[:BASIS], start=1)}
        return out

    def _report_of(self, entries: list[view.Entry], table: Tensor, place: dict[str, int]) -> Report:
        report = Report()
        roles = view.by_role(entries)

        def mean(key: str, members: Sequence[int] | None = None) -> float:
            column = table[:, place[key]] if members is None else table[list(members), place[key]]
            return float(column.nanmean())

        for text in {**SHOWN, **dict.fromkeys(self.scalars)}:
            tag = "rank/" + text.replace(".", "_", 1)
            report.scalars |= {f"{tag}/{role}": mean(text, members) for role, members in roles.items()}
        names = {
            "at_refresh": "captured_at_refresh", "gap": "residual_gap", "overlap": "overlap",
            "orth": "orthogonality_error", "smin": "singular_min", "smax": "singular_max", "outside": "outside_band",
        }  # fmt: skip
        report.scalars |= {f"rank/{name}": mean(key) for key, name in names.items()}
        hidden = [i for i, e in enumerate(entries) if e.role not in view.NAMED_ROLES] or list(range(len(entries)))
        needed = table[hidden, place["gradient.rank@90"]]
        needed = needed[~needed.isnan()]
        if needed.numel():
            report.scalars["rank/suggested"] = 8.0 * math.ceil(float(needed.quantile(0.75)) / 8)
        report.texts["rank/table"] = self._table(roles, mean)
        report.arrays = {"values": table, "columns": list(place), "names": [e.name for e in entries]}
        self._draw(entries, table, place, report)
        report.scalars = report.finite()
        return report

    def _table(self, roles: dict[str, list[int]], mean: Any) -> str:
        head = ["kind", "role", *MEASURES]
        lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
        for kind in KINDS:
            for role, members in roles.items():
                values = [mean(f"{kind}.{m}", members) for m in MEASURES]
                if not all(math.isnan(v) for v in values):
                    cells = ["" if math.isnan(v) else figures.number(v) for v in values]
                    lines.append("| " + " | ".join([kind, role, *cells]) + " |")
        return "\n".join(lines)

    def _draw(self, entries: list[view.Entry], table: Tensor, place: dict[str, int], report: Report) -> None:
        self.history.add(self.step, table[:, place["gradient.rank@90"]].tolist())
        names = figures.short([e.name for e in entries])
        if any(not math.isnan(x) for x in self.history.columns[-1]):
            report.images["rank/gradient_rank@90_by_layer"] = figures.heat_map(
                self.history.table(),
                "rank that holds 90 % of the gradient's energy, by layer",
                rows=names,
                columns=[str(s) for s in self.history.steps],
                across="optimizer step",
                unit="rank",
            )
        cosines = torch.stack([table[:, place[f"cosine@{i}"]].nanmean() for i in range(1, BASIS + 1)])
        if not cosines.isnan().all():
            self.cosines.add(self.step, cosines.tolist())
            report.images["rank/basis_cosines"] = figures.heat_map(
                self.cosines.table(),
                "|cosine| of each column of the basis (rows, by eigenvalue) with itself one measurement before",
                rows=[str(i) for i in range(1, BASIS + 1)],
                columns=[str(s) for s in self.cosines.steps],
                across="optimizer step",
                unit="|cosine|",
                bounds=(0.0, 1.0),
            )
        columns = [k for k in KINDS if not table[:, place[f"{k}.stable_rank_vs_gaussian"]].isnan().all()]
        report.images["rank/stable_rank_by_layer"] = figures.heat_map(
            torch.stack([table[:, place[f"{k}.stable_rank_vs_gaussian"]] for k in columns], 1).numpy(),
            f"stable rank / that of a Gaussian matrix, by layer, step {self.step}",
            rows=names,
            columns=columns,
            across="of what",
            unit="ratio",
        )


def _assign_owners(entries: Sequence[view.Entry], ranks: int) -> list[int]:
    """The rank that measures each matrix, by cost."""
    costs = [float(b * m * n * min(m, n)) for b, m, n in (e.dims for e in entries)]
    return assign_owners(costs, [0.0] * ranks)


def _orthogonalizes(e: view.Entry) -> bool:
    """Whether the rule runs Newton-Schulz, and the scale of its direction is known."""
    iterates = e.rule is not None and "ns_steps" in hyperparameters(type(e.rule)) and e.rule.decay == "before"
    return iterates and e.rule is not None and e.rule.rms(*e.dims[1:]) is not None and e.rule.lr > 0


def _orthogonality(e: view.Entry, direction: Tensor) -> dict[str, Tensor]:
    """Measures of a step without learning rate and shape scale."""
    assert e.rule is not None
    values = []
    for stack in e.stacks(direction):
        m, n = stack.shape[-2:]
        rms = ADAMW_RMS if e.group["lr_convention"] == "adamw" else e.rule.rms(m, n) or 1.0
        values.append(spectrum.singular_values(stack.double() / (e.rule.lr * rms * max(m, n) ** 0.5)).flatten())
    s = torch.cat(values)
    return {
        "orth": spectrum.orthogonality_error(s),
        "smin": s.min(),
        "smax": s.max(),
        "outside": spectrum.outside_band(s),
    }
