"""The Hessian of the training loss, block by block, on a fixed batch."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from lightning_optim.build.partition import VIEWS_BY_KIND, PartitionKind, partition
from lightning_optim.build.role_report import roles
from lightning_optim.core import matrix_views
from lightning_optim.core.parallel import collectives
from lightning_optim.diagnostics import figures, hessian, lanczos, view
from lightning_optim.diagnostics.batches import RecordedBatch, first_rows, map_tensors
from lightning_optim.diagnostics.hessian import Hessian
from lightning_optim.diagnostics.probes.base import Probe
from lightning_optim.diagnostics.probes.context import TrainingContext
from lightning_optim.diagnostics.report import Report, before_exchange, over_ranks
from lightning_optim.diagnostics.undisturbed import RandomState, frozen

Blocks = Mapping[str, hessian.Block]
EXACT_LIMIT, AUTO_LIMIT = 512, 64
"""Largest number of weights whose Hessian entries are computed, on request and by default. Each costs a product."""


class HessianBlocks(Probe):
    """Curvature by block of weights, by products with the Hessian on the first sequences of the run's first batch.

    The loss is computed without dropout and in full precision, and attention uses kernels that have a second
    derivative, for the measurement only. Measures by block: `hessian/trace` (Hutchinson, by probes that are zero
    outside the block, so that its coupling to larger ones is no noise), `hessian/lambda_max` and `lambda_min`
    (Lanczos), `hessian/frobenius`. Blocks are the roles, with a curve each, or what `partition` says: rows of the table
    `hessian/traces` and cells of the pictures `hessian/<measure>_by_block`, in which the heads or neurons of a matrix
    are one line. Measures of the whole model:

    * `hessian/sharpness`: largest eigenvalue of P^-1/2 H P^-1/2 over the parameters whose scaling P can be read (Adam
      family and SOAP), learning rate included; `sharpness_ratio`: over its stability threshold (2 + 2 b1) / (1 - b1),
      1 is the edge of stability;
    * `hessian/curvature_along_update`: u^T H u / u^T u; `hessian/model_ratio`: measured change of the loss in this
      step over the one the quadratic model predicts;
    * `hessian/js_shape`, `js_scale`: mean Jensen-Shannon distance between the blocks' spectra, normalized or not;
    * `hessian/block_diagonal_share` and the picture `hessian/coupling`: how much of |H|_F^2 over the blocks' weights
      lies within blocks; `hessian/random_share`: how much of what is off the diagonal would on average lie within
      blocks of the same sizes whose weights are drawn at random, sum_b d_b (d_b - 1) / (d (d - 1));
    * once: the entries of a few weights of four neurons (`hessian/entries/<role>`), their diagonal dominance
      `hessian/tau` and Adam's effect on their condition number `hessian/r`.

    Of the scalars by role, the largest eigenvalue is one by default; the others are curves and tables (`detail`).
    Sharded parameters (FSDP2) are not supported: one warning says so, and nothing is logged.

    Args:
        every: steps between measurements.
        max_overhead: share of training time above which the interval doubles.
        sequences: of the batch; if not given, one, or all where rows may belong together (in trainers of Transformers
            with a `compute_loss` of their own, but for TRL's SFTTrainer: pairs of preferences, say).
        probes: random vectors per block for traces, the starts of the Lanczos recursions among them.
        steps: of Lanczos recursions.
        starts: random start vectors per block, for spectral densities.
        coupling_every: measurements between coupling tables, the first of which comes with the first measurement.
        coupling_probes: random vectors per block for those, at least; they take those for the traces.
        exact: patterns of parameters whose first four rows' entries are computed, 512 at most; `"auto"` is 64 of the
            first MLP matrix, () none.
        method: `"exact"` second derivatives, `"difference"` of gradients, or `"auto"`: exact where kernels allow.
        detail: whether every measure is also a scalar, not only those of the charts.
        partition: what a block is: a `"role"`, or a `"layer"`, `"matrix"`, attention `"head"`, `"neuron"` (a row of
            outputs), `"token"` (of embeddings and output layers) or `"expert"`; see `lightning_optim.build.partition`.
        match: patterns of the names of parameters that are divided into blocks, for all partitions but roles.
        max_blocks: how many blocks are measured; of more of them those at even distances.

    Raises:
        ValueError: a number below one, or an unknown partition.
    """

    name = "hessian"
    needs_loss = True
    charts: ClassVar[Mapping[str, Sequence[str]]] = {
        "largest eigenvalue of the Hessian, by role": [r"hessian/lambda_max/.*"],
        "preconditioned sharpness / stability threshold": ["hessian/sharpness_ratio"],
        "share of the Hessian's squared norm within roles": ["hessian/block_diagonal_share"],
        "heterogeneity of the roles' spectra (Jensen-Shannon distance)": ["hessian/js_shape"],
        "change of the loss / quadratic model's prediction": ["hessian/model_ratio"],
    }
    curves: ClassVar[Mapping[str, tuple[str, str]]] = {
        "hessian/trace": ("trace of the Hessian, by role", "trace"),
        "hessian/lambda_max": ("largest eigenvalue of the Hessian, by role", "eigenvalue"),
        "hessian/lambda_min": ("smallest eigenvalue of the Hessian, by role", "eigenvalue"),
        "hessian/frobenius": ("Frobenius norm of the Hessian's diagonal blocks, by role", "norm"),
    }

    remedy: ClassVar[str] = (
        "give HessianBlocks(loss=...), a function of the model and a batch that returns the training loss and changes "
        "nothing, or leave it out"
    )

    def __init__(
        self,
        every: int = 1000,
        max_overhead: float = 0.02,
        sequences: int | None = None,
        probes: int = 10,
        steps: int = 10,
        starts: int = 1,
        coupling_every: int = 2,
        coupling_probes: int = 4,
        exact: Sequence[str] | Literal["auto"] = "auto",
        method: Literal["auto", "exact", "difference"] = "auto",
        detail: bool = False,
        partition: Literal["role", "layer", "matrix", "head", "neuron", "token", "expert"] = "role",
        match: Sequence[str] = ("*",),
        max_blocks: int = 64,
    ) -> None:
        super().__init__(every, max_overhead, detail)
        counts = {
            "sequences": 1 if sequences is None else sequences,
            "probes": probes,
            "steps": steps,
            "starts": starts,
            "max_blocks": max_blocks,
        }
        if partition not in ("role", *VIEWS_BY_KIND):
            raise ValueError(f"hessian: unknown partition {partition!r}; take one of role, {', '.join(VIEWS_BY_KIND)}")
        for key, value in (counts | {"coupling_every": coupling_every, "coupling_probes": coupling_probes}).items():
            if value < 1:
                raise ValueError(f"hessian: {key} must be at least 1, got {value}")
        self.sequences, self.probes, self.steps, self.starts = sequences, probes, steps, starts
        self.coupling_every, self.coupling_probes = coupling_every, coupling_probes
        self.exact, self.method = exact, method
        self.partition: Literal["role"] | PartitionKind = partition
        self.match, self.max_blocks = tuple(match), max_blocks
        self.measured = 0
        self._batch: RecordedBatch | None = None
        self._start: list[Tensor] = []
        self._warned = self._difference = False

    def state_dict(self) -> dict[str, Any]:  # noqa: D102
        return super().state_dict() | {"measured": self.measured}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: D102
        super().load_state_dict(state)
        self.measured = state["measured"]

    def clear(self) -> None:  # noqa: D102
        self._start = []

    def record_batch(self, batch: Any) -> None:  # noqa: D102
        if self._batch is None and self.context is not None:
            one = None if self.context.extra.get("rows_belong_together") else 1
            count = one if self.sequences is None else self.sequences
            rows = batch if count is None else first_rows(batch, count=count)
            random = RandomState(self.context.model)
            self._batch = RecordedBatch(map_tensors(rows, lambda t: t.detach().clone()), random)

    def before_step(self, context: TrainingContext) -> None:  # noqa: D102
        self._start = [e.param.detach().clone() for e in context.entries()]

    def complete(self, context: TrainingContext, report: Report) -> None:  # noqa: D102
        entries, start, self._start = context.entries(), self._start, []
        params = [e.param for e in entries]
        unusable = any(view.is_sharded(p) for p in params) or len(start) != len(params)
        if context.loss is None or self._batch is None or unusable:
            if not self._warned:
                warnings.warn(self._missing(context, params), stacklevel=2)
                self._warned = True
            return
        loss = functools.partial(self._batch.evaluate, context.loss, context.model)
        with frozen(context.model):
            full = self._hessian(loss, params)
            blocks = self._blocks(context, entries)
            generator = self.generator(params[0].device)
            spectra = self._spectra(full, blocks, generator, report)
            self._probe(full, blocks, spectra, generator, report)
            self._sharpness(full, entries, context, generator, report)
            if self.measured == 0:
                self._entries(full, entries, context, report)
            self._along_update(full, start, report)  # the last one: it moves the weights, which ends the graph
        self.measured += 1
        report.scalars["hessian/products"] = float(full.products)
        report.scalars = report.finite()

    def _missing(self, context: TrainingContext, params: Sequence[Tensor]) -> str:
        if any(view.is_sharded(p) for p in params):
            return (
                "HessianBlocks logs nothing: the weights lie in shards (FSDP2), of which no second derivatives are "
                "taken; watch the curvature in a run of the same model on one device or under DDP"
            )
        if context.loss is None or self._batch is None:
            return "HessianBlocks logs nothing: it has no batch or no loss; give it loss="
        return "HessianBlocks logs nothing of a step in which parameters were frozen or unfrozen"

    def _hessian(self, loss: Callable[[], Tensor], params: Sequence[Tensor]) -> Hessian:
        """The exact one unless that fails, or differs from differences of gradients by more than they can be off."""
        if self._difference or self.method == "difference":
            return Hessian(loss, params, "difference", reduce=_average)
        every = range(len(params))
        z = [hessian.signs(p, self.generator(p.device, 1)) for p in params]
        check = self.method == "auto" and self.measured == 0 and all(p.dtype.itemsize >= 4 for p in params)
        near = Hessian(loss, params, "difference").product(z, every) if check else []
        full, reason = None, ""
        try:
            full = Hessian(loss, params, "exact")
            exact = full.product(z, every) if self.measured == 0 else []
            if near and hessian.apart(exact, near) > hessian.TOLERANCE:
                reason = "second derivatives differ from them"
        except Exception as error:
            if self.method == "exact" or not hessian.differences_may_help(error):
                raise
            reason = str(error)
        flag = torch.tensor([float(bool(reason))], device=params[0].device)
        if over_ranks(flag).sum() > 0 or full is None:  # all ranks take the same products
            return self._fall_back(loss, params, reason or "second derivatives failed on another rank")
        full.average_over(_average)
        full.products = 0
        return full

    def _fall_back(self, loss: Callable[[], Tensor], params: Sequence[Tensor], reason: str) -> Hessian:
        full = Hessian(loss, params, "difference", reduce=_average)  # raises again what has another cause
        warnings.warn(f"HessianBlocks takes differences of gradients: {reason}", stacklevel=2)
        self._difference = True
        return full

    def _blocks(self, context: TrainingContext, entries: Sequence[view.Entry]) -> Blocks:
        """The blocks that are measured, by name."""
        kind = self.partition
        if kind == "role":
            return dict(view.by_role(entries))
        index = {e.name: i for i, e in enumerate(entries)}
        params = {e.name: e.param for e in entries}
        every = partition(params, roles(context.model), kind, self.match)
        if not every:
            raise ValueError(f"hessian: no parameter that matches {list(self.match)} has a {kind}")
        step = max(1.0, len(every) / self.max_blocks)
        chosen = [every[int(k * step)] for k in range(min(len(every), self.max_blocks))]
        return {
            x.name: hessian.ViewBlock(tuple(index[p.param] for p in x.views), tuple(p.view for p in x.views))
            for x in chosen
        }

    def _report_blocks(self, measure: str, blocks: Blocks, values: Sequence[float], report: Report) -> None:
        """One number per block: scalars of roles, or of all blocks with `detail`; else an array and a picture."""
        if self.partition == "role" or self.detail:
            report.scalars |= {f"hessian/{measure}/{name}": x for name, x in zip(blocks, values, strict=True)}
        if self.partition == "role":
            return
        report.arrays |= {"blocks": list(blocks), measure: torch.tensor(values)}
        lines, columns, table = figures.by_line(list(blocks), values)
        report.images[f"hessian/{measure}_by_block"] = figures.heat_map(
            table,
            f"{measure} of the Hessian's diagonal blocks, step {self.step}",
            rows=lines,
            columns=columns,
            across=self.partition,
            unit=measure,
        )

    def _spectra(
        self, full: Hessian, blocks: Blocks, generator: torch.Generator, report: Report
    ) -> list[list[lanczos.Ritz]]:
        spectra: list[list[lanczos.Ritz]] = []
        for name, block in blocks.items():
            starts = [full.random(block, generator) for _ in range(self.starts)]
            runs = [lanczos.lanczos(full.flat(block), x, self.steps) for x in starts]
            spectra.append(runs)
            report.arrays[f"ritz_values/{name}"] = torch.cat([r.values for r in runs])
            report.arrays[f"ritz_weights/{name}"] = torch.cat([r.weights for r in runs])
            report.arrays[f"ritz_residuals/{name}"] = torch.cat([r.residuals for r in runs])
        highest = [max(float(r.values[-1]) for r in runs) for runs in spectra]
        self._report_blocks("lambda_max", blocks, highest, report)
        lowest = [min(float(r.values[0]) for r in runs) for runs in spectra]
        self._report_blocks("lambda_min", blocks, lowest, report)
        if len(spectra) < 2:
            return spectra
        shape = lanczos.js_matrix(spectra, shape=True)
        report.scalars["hessian/js_shape"] = lanczos.mean_distance(shape)
        report.scalars["hessian/js_scale"] = lanczos.mean_distance(lanczos.js_matrix(spectra, shape=False))
        grid, sigma = lanczos.grid_of(spectra)
        every = -(-len(spectra) // view.MAX_ROLES)
        some = [*zip(blocks, spectra, strict=True)][::every]
        lines = {name: lanczos.density(runs, grid, sigma).numpy() for name, runs in some}
        report.images["hessian/spectral_density"] = figures.curves(
            grid.numpy(),
            lines,
            f"spectral density of the Hessian's diagonal blocks, step {self.step}",
            across="eigenvalue",
            up="density",
            scale="log",
        )
        report.images["hessian/js_distance"] = figures.heat_map(
            shape.numpy(),
            f"Jensen-Shannon distance of normalized spectra, step {self.step}",
            rows=list(blocks),
            columns=list(blocks),
            across=self.partition,
            unit="distance",
            bounds=(0.0, 1.0),
        )
        report.arrays |= {"js_shape": shape}
        return spectra

    def _probe(
        self,
        full: Hessian,
        blocks: Blocks,
        spectra: Sequence[Sequence[lanczos.Ritz]],
        generator: torch.Generator,
        report: Report,
    ) -> None:
        """Random vectors within each block: traces, the norm of the Hessian and, when it is due, the coupling table."""
        coupled = self.measured % self.coupling_every == 0
        count = max(self.probes - self.starts, self.coupling_probes if coupled else 1)
        vectors = [[full.signs(block, generator) for _ in range(count)] for block in blocks.values()]
        traces, columns, diagonal = hessian.block_probes(full, list(blocks.values()), vectors)
        self._traces(
            full, blocks, [torch.cat([t, starts_of(runs)]) for t, runs in zip(traces, spectra, strict=True)], report
        )
        squares = hessian.coupling_table(columns)
        report.scalars["hessian/frobenius_all"] = float(squares.sum().sqrt())
        report.arrays["diagonal_square"] = sum(float(d.double().square().sum()) for d in diagonal)
        if coupled:
            self._coupling(full, blocks, squares, report)

    def _traces(self, full: Hessian, blocks: Blocks, samples: Sequence[Tensor], report: Report) -> None:
        means = torch.stack([x.mean() for x in samples])
        errors = torch.stack([x.std() / len(x) ** 0.5 for x in samples])
        self._report_blocks("trace", blocks, means.tolist(), report)
        report.arrays |= {f"{self.partition}s": list(blocks), "trace": means, "trace_error": errors}
        lines = [f"| {self.partition} | weights | trace | standard error |", "|---|---|---|---|"]
        for name, mean, error in zip(blocks, means.tolist(), errors.tolist(), strict=True):
            lines.append(f"| {name} | {full.size(blocks[name]):,} | {figures.number(mean)} | {figures.number(error)} |")
        report.texts["hessian/traces"] = "\n".join(lines)

    def _coupling(self, full: Hessian, blocks: Blocks, squares: Tensor, report: Report) -> None:
        table = hessian.coupling(squares)
        self._report_blocks("frobenius", blocks, squares.diagonal().sqrt().tolist(), report)
        sizes = [full.size(block) for block in blocks.values()]
        pairs = sum(sizes) * (sum(sizes) - 1)
        report.scalars["hessian/random_share"] = sum(d * (d - 1) for d in sizes) / pairs if pairs else 1.0
        report.scalars["hessian/block_diagonal_share"] = hessian.block_diagonal_share(squares)
        report.arrays["coupling_squares"] = squares
        report.images["hessian/coupling"] = figures.heat_map(
            table.clamp(min=1e-12).log10().numpy(),
            f"coupling |H_ij| / sqrt(|H_ii| |H_jj|), step {self.step}",
            rows=list(blocks),
            columns=list(blocks),
            across=self.partition,
            unit="log10 of coupling",
        )

    def _sharpness(
        self,
        full: Hessian,
        entries: Sequence[view.Entry],
        context: TrainingContext,
        generator: torch.Generator,
        report: Report,
    ) -> None:
        roots = [scaling_root(e, context.optimizer.state.get(e.param, {})) for e in entries]
        block = [i for i, root in enumerate(roots) if root is not None]
        if not block:
            return
        sizes = [full.params[i].numel() for i in block]

        def root(v: Tensor) -> Tensor:
            parts = zip(block, v.split(sizes), strict=True)
            return torch.cat([_apply(roots[i], x.view_as(full.params[i])).reshape(-1) for i, x in parts])

        operator = hessian.preconditioned(full.flat(block), root)
        ritz = lanczos.lanczos(operator, full.random(block, generator), self.steps)
        sharpness = float(ritz.values[-1])
        betas = [float(entries[i].group["betas"][0]) for i in block]
        report.scalars["hessian/sharpness"] = sharpness
        report.scalars["hessian/sharpness_ratio"] = sharpness / hessian.stability_threshold(1.0, max(betas))

    def _along_update(self, full: Hessian, start: Sequence[Tensor], report: Report) -> None:
        u = [p.detach() - s for p, s in zip(full.params, start, strict=True)]
        curved, slope = hessian.directional(full, u)
        square = sum(float(x.double().square().sum()) for x in u)
        if not square:
            return
        after = [p.detach().clone() for p in full.params]
        try:
            with torch.no_grad():
                for p, s in zip(full.params, start, strict=True):
                    p.copy_(s)
                before = [full.loss().double().reshape(1)]
        finally:
            with torch.no_grad():
                for p, k in zip(full.params, after, strict=True):
                    p.copy_(k)
        after = [full.value.double().reshape(1)]
        _average(before)
        _average(after)
        measured, predicted = float(after[0] - before[0]), slope - 0.5 * curved * square
        report.scalars["hessian/curvature_along_update"] = curved
        if predicted:
            report.scalars["hessian/model_ratio"] = measured / predicted

    def _entries(self, full: Hessian, entries: Sequence[view.Entry], context: TrainingContext, report: Report) -> None:
        for i in indices_of(entries, self.exact):
            e = entries[i]
            limit = AUTO_LIMIT if self.exact == "auto" else EXACT_LIMIT
            rows = min(len(e.param), 4)
            width = min(e.param[0].numel(), limit // rows)
            if e.transposed or e.param.ndim < 2:
                continue
            block = hessian.exact_block(full, i, slice(0, rows), slice(0, width)).double().cpu()
            report.scalars[f"hessian/tau/{e.role}"] = float(hessian.diagonal_dominance(block))
            second = context.optimizer.state.get(e.param, {}).get("exp_avg_sq")
            if (
                isinstance(second, Tensor)
                and second.shape == e.param.shape
                and not view.bases_of(e, context.optimizer.state[e.param])
            ):
                v = second[:rows].flatten(1)[:, :width].reshape(-1).double().cpu().clamp(min=1e-30)
                report.scalars[f"hessian/r/{e.role}"] = float(hessian.conditioning_ratio(block, v))
            report.arrays[f"entries/{e.name}"] = block
            every = max(1, len(block) // 256)
            size = (block.abs()[::every, ::every] / block.abs().max().clamp(min=1e-300)).clamp(min=1e-6)
            labels = [str(k) for k in range(0, len(block), every)]
            report.images[f"hessian/entries/{e.role}"] = figures.heat_map(
                size.log10().numpy(),
                f"Hessian entries |h_ij|: {width} weights of each of {rows} rows of {e.name}, step {self.step}",
                rows=labels,
                columns=labels,
                across="weight; lines: rows",
                unit="log10 of share of the largest",
                lines=[k * width // every for k in range(1, rows)],
            )


def starts_of(runs: Sequence[lanczos.Ritz]) -> Tensor:
    """z^T H z of the start vectors z of Lanczos recursions, which are signs: n times the mean of the spectral measure.

    Returns:
        One value per recursion, float64.
    """
    return torch.stack([run.size * torch.dot(run.values, run.weights) for run in runs])


def _average(tensors: Sequence[Tensor]) -> None:
    before_exchange()
    collectives.average_(tensors)


def indices_of(entries: Sequence[view.Entry], patterns: Sequence[str] | Literal["auto"]) -> list[int]:
    """Parameters whose entries are computed.

    Args:
        entries: all parameters.
        patterns: shell-style globs over names, or "auto": the first hidden matrix with more rows than columns.

    Returns:
        Indices, the first match of every pattern.
    """
    if patterns == "auto":
        hidden = [i for i, e in enumerate(entries) if e.is_matrix and e.param.ndim == 2]
        hidden = [i for i in hidden if entries[i].role not in view.NAMED_ROLES]
        tall = [i for i in hidden if entries[i].param.shape[0] > entries[i].param.shape[1]]
        return (tall or hidden)[:1]
    hits = ([i for i, e in enumerate(entries) if fnmatchcase(e.name, pattern)][:1] for pattern in patterns)
    return [i for hit in hits for i in hit]


def scaling_root(e: view.Entry, state: Mapping[str, Any]) -> Callable[[Tensor], Tensor] | None:
    """P^-1/2 of a rule of the Adam family, or of SOAP in its basis, with the learning rate in P.

    P = (1 - b1^t) (sqrt(v / (1 - b2^t)) + eps) / lr (arXiv:2207.14484).

    Args:
        e: the parameter.
        state: of the optimizer for it.

    Returns:
        A symmetric map of tensors of the parameter's shape; None for other rules.
    """
    v, betas = state.get("exp_avg_sq"), e.group.get("betas")
    lr, t = float(e.group.get("lr", 0.0)), state.get("step")
    if not isinstance(v, Tensor) or not v.numel() or betas is None or not lr or t is None or len(betas) != 2:
        return None
    bases = view.bases_of(e, dict(state))
    t = max(1.0, float(t) - (1.0 if bases else 0.0))
    corrected = (v / (1 - betas[1] ** t)).sqrt() + float(e.group.get("eps", 0.0) or 0.0)
    root = ((1 - betas[0] ** t) * corrected / lr).clamp(min=1e-30).rsqrt()
    if root.shape == e.param.shape and not bases:
        return lambda x: (x * root).to(x.dtype)
    if root.shape == e.param.shape:
        root = e.stacks(root)[0]
    elif len(e.parts) == 1 and root.ndim > 1 and root.numel() == e.dims[0] * root.shape[-2] * root.shape[-1]:
        root = root.reshape(e.dims[0], *root.shape[-2:])
    else:
        return None
    turns = dict(bases)

    def apply(x: Tensor) -> Tensor:
        y = e.stacks(x)[0].to(root.dtype)
        left, right = turns.get("left"), turns.get("right")
        y = y if left is None else left.mT @ y
        y = y if right is None else y @ right
        y = y * root
        y = y if left is None else left @ y
        y = y if right is None else y @ right.mT
        return matrix_views.transpose_if(
            y.reshape(matrix_views.transpose_if(e.param, e.transposed).shape), e.transposed
        ).to(x.dtype)

    return apply


def _apply(root: Callable[[Tensor], Tensor] | None, x: Tensor) -> Tensor:
    assert root is not None
    return root(x)
