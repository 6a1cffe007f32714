"""How many directions gradients, momenta, updates and weights have, and how well the optimizer's basis holds them."""

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
from lightning_optim.diagnostics.probes.base import History, Probe, Run, found_entries
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
"""Measures that are curves, and scalars on request."""
BASIS = 32
"""Leading columns of a full basis whose captured energy and drift are followed."""


class GradientRank(Probe):
    """Rank measures of every matrix, whole under DDP and FSDP2.

    Means over the layers of a role, `rank/<kind>_<measure>/<role>`, are curves of four measures and scalars on
    request; `scalars` chooses out of the kinds gradient, momentum, update and weight and the measures of
    `diagnostics.spectrum`. All of them are in the table `rank/table`, layer by layer in the pictures and, with
    singular values' energies, in the arrays.

    * `captured`: share of the gradient's energy in the optimizer's own basis (the 32 leading columns of a full one);
      `captured_at_refresh` and `rank/residual_gap`, what a basis of the present gradient would hold more.
    * `rank/overlap`: chance-adjusted overlap of a basis with that of the measurement before its last change; the
      picture `rank/basis_cosines` has |u_i^T v_i| of its leading columns, by descending eigenvalue, one by one (mean
      over the matrices; where eigenvalues are close columns pair wrongly, so read it beside the overlap).
    * `rank/orthogonality_error`, `singular_min`, `singular_max`, `outside_band`: of updates of rules that
      orthogonalise, without learning rate and shape scale; an error of 0.35 to 0.65 is normal for Newton-Schulz.
    * `rank/suggested`: the least multiple of 8 that holds 90 % of the gradient's energy in three of four matrices.

    Args:
        every: steps between measurements.
        max_overhead: share of training time above which the interval doubles.
        scalars: `kind.measure` pairs that become scalars.
        ranks: of the energies.
        limit: longest small side of which the whole spectrum is computed.
        detail: whether everything measured becomes a scalar, too, not only what the charts show.
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
        known = {*MEASURES, "captured", *(f"energy@{r}" for r in ranks)}
        for text in scalars:
            kind, _, measure = text.partition(".")
            if kind not in KINDS or measure not in known:
                raise ValueError(
                    f"rank: no scalar {text!r}; kinds: {', '.join(KINDS)}; measures: {', '.join(sorted(known))}"
                )
        self.scalars, self.ranks, self.limit = tuple(scalars), tuple(ranks), limit
        self.history, self.cosines = History(), History()
        self._start: dict[int, Tensor] = {}
        self._bases: dict[tuple[str, str], tuple[Tensor, float, float]] = {}

    def _charts(self) -> dict[str, Sequence[str]]:
        own = {f"{text}, by role": [re.escape("rank/" + text.replace(".", "_", 1)) + "/.*"] for text in self.scalars}
        return {**super()._charts(), **own}

    def clear(self) -> None:  # noqa: D102
        self._start, self._bases = {}, {}

    def before(self, run: Run) -> None:  # noqa: D102
        self._start = {id(e.param): e.param.detach().clone() for e in found_entries(run) if e.is_matrix}

    def after(self, run: Run) -> Report | None:  # noqa: D102
        found = [e for e in found_entries(run) if id(e.param) in self._start]
        if not found:
            return None
        keys = [f"{kind}.{m}" for kind in KINDS for m in (*MEASURES, *(f"energy@{r}" for r in self.ranks))]
        keys += ["gradient.captured", "at_refresh", "gap", "overlap", "orth", "smin", "smax", "outside"]
        keys += [f"cosine@{i}" for i in range(1, BASIS + 1)]
        place = {k: i for i, k in enumerate(keys)}
        device = found[0].param.device
        table = torch.full((len(found), len(keys)), math.nan, dtype=torch.float64, device=device)
        owner = _share_out(found, run.ranks)
        for i, e in enumerate(found):
            state = run.optimizer.state.get(e.param, {})
            start = self._start.pop(id(e.param))
            tensors: dict[str, Tensor | None] = {
                "gradient": None if e.param.grad is None else view.whole(e.param.grad),
                "momentum": view.momentum_buffer(e, state),
                "update": view.whole(e.param.detach() - start),
                "weight": view.whole(e.param),
            }
            held = tensors["momentum"]
            if held is not None and held.numel():
                tensors["momentum"] = held = view.whole(held)
            elsewhere = held is not None and not held.numel()
            for kind, t in tensors.items():
                mine = owner[i] == run.rank if kind != "momentum" or not elsewhere else False
                if kind == "momentum" and self._held_by_one(e, state):
                    mine = not elsewhere
                if t is not None and t.numel() and mine:
                    for name, value in self._measures(e.stacks(t), device).items():
                        if (column := place.get(f"{kind}.{name}")) is not None:
                            table[i, column] = value
            if _orthogonalises(e):
                direction = view.whole(e.param.detach() - start * (1 - e.group["lr"] * e.group["weight_decay"]))
                if owner[i] == run.rank:
                    for name, value in _orthogonality(e, direction).items():
                        table[i, place[name]] = value
            gradient = tensors["gradient"]
            if gradient is not None and (self._held_by_one(e, state) or owner[i] == run.rank):
                for name, value in self._basis(e, state, e.stacks(gradient)[0]).items():
                    table[i, place[name]] = value
        self._start = {}
        known = (~table.isnan()).double()
        sums = over_ranks(torch.cat([table.nan_to_num(0.0).flatten(), known.flatten()])).cpu()
        total, count = sums.view(2, len(found), len(keys))
        return self._report(found, total / count, place)

    def _held_by_one(self, e: view.Entry, state: dict[str, Any]) -> bool:
        """Whether a single rank keeps this sharded parameter's state."""
        return e.rule is not None and not e.rule.elementwise and not e.rule.reduces and view.is_cut(e.param)

    def _measures(self, stacks: Sequence[Tensor], device: torch.device) -> dict[str, Tensor]:
        """Means over all matrices of a parameter."""
        rows: list[dict[str, Tensor]] = []
        for x in (x for stack in stacks for x in stack):
            found = spectrum.measures(x, self.generator(device), ranks=self.ranks, limit=self.limit)
            found["stable_rank_vs_gaussian"] = found["stable_rank"] / spectrum.gaussian_stable_rank(*x.shape)
            rows.append(found)
        return {k: torch.stack([row[k].double() for row in rows if k in row]).mean() for k in rows[0]}

    def _basis(self, e: view.Entry, state: dict[str, Any], gradient: Tensor) -> dict[str, Tensor | float]:
        """What the optimizer's bases hold of the gradient; the side that holds less."""
        out: dict[str, Tensor | float] = {}
        for side, q in view.bases_of(e, state):
            r = min(q.shape[-1], BASIS if q.shape[-1] == q.shape[-2] else q.shape[-1])
            if r == q.shape[-2]:
                r = max(1, r // 4)
            q = q[..., :r]
            g = (gradient if side == "left" else gradient.mT).to(q.dtype)
            held = float(subspace.captured(q, g).mean())
            seen = self._bases.get((e.name, side))
            overlap, at_refresh, cosines = math.nan, held, None
            if seen is not None and seen[0].shape == q.shape:
                if torch.equal(seen[0], q):
                    _, overlap, at_refresh = seen
                else:
                    overlap = float(subspace.adjusted_overlap(seen[0], q).mean())
                    cosines = subspace.column_cosines(seen[0], q).flatten(0, -2).mean(0)
            self._bases[e.name, side] = q.clone(), overlap, at_refresh
            if held < out.get("gradient.captured", math.inf):
                best = torch.stack([spectrum.energy(spectrum.singular_values(x), r) for x in g]).mean()
                out = {"gradient.captured": held, "at_refresh": at_refresh, "gap": best - held, "overlap": overlap}
                if cosines is not None:
                    out |= {f"cosine@{i}": c for i, c in enumerate(cosines[:BASIS], start=1)}
        return out

    def _report(self, found: list[view.Entry], table: Tensor, place: dict[str, int]) -> Report:
        report = Report()
        roles = view.by_role(found)

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
        hidden = [i for i, e in enumerate(found) if e.role not in view.NAMED_ROLES] or list(range(len(found)))
        needed = table[hidden, place["gradient.rank@90"]]
        needed = needed[~needed.isnan()]
        if needed.numel():
            report.scalars["rank/suggested"] = 8.0 * math.ceil(float(needed.quantile(0.75)) / 8)
        report.texts["rank/table"] = self._table(roles, mean)
        report.arrays = {"values": table, "columns": list(place), "names": [e.name for e in found]}
        self._draw(found, table, place, report)
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

    def _draw(self, found: list[view.Entry], table: Tensor, place: dict[str, int], report: Report) -> None:
        self.history.add(self.step, table[:, place["gradient.rank@90"]].tolist())
        names = figures.short([e.name for e in found])
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


def _share_out(found: Sequence[view.Entry], ranks: int) -> list[int]:
    """The rank that measures each matrix, by cost."""
    costs = [float(b * m * n * min(m, n)) for b, m, n in (e.dims for e in found)]
    return assign_owners(costs, [0.0] * ranks)


def _orthogonalises(e: view.Entry) -> bool:
    """Whether the rule runs Newton-Schulz, and the scale of its direction is known."""
    known = e.rule is not None and "ns_steps" in hyperparameters(type(e.rule)) and e.rule.decay == "before"
    return known and e.rule is not None and e.rule.rms(*e.dims[1:]) is not None and e.rule.lr > 0


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
