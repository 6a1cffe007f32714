"""The curvature estimator: it measures for an optimizer what its rules need beside gradients.

A trainer, or your own loop, passes it every batch and calls it before the optimizer steps. In the steps that a rule's
policy names, it takes extra passes over a part of the same batches, with the weights the gradient was taken at.
Training is not affected: gradients, modes, random numbers and logs are as without it.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.parallel import collectives, sharding
from lightning_optim.core.step.curvature_input import Estimate
from lightning_optim.curvature.comparison import LossComparison, validate_search
from lightning_optim.curvature.kfac_factors import KFACFactors
from lightning_optim.curvature.labels import LOSSES_WITH_LABELS, Labels
from lightning_optim.curvature.loss_oracle import BatchLossOracle
from lightning_optim.curvature.measurement import (
    EstimatorMethod,
    LossMeasurement,
    explain_checkpointing,
    gradients,
)
from lightning_optim.curvature.validation import check_params, check_settings
from lightning_optim.diagnostics.batches import RecordedBatch, first_rows
from lightning_optim.diagnostics.hessian import Hessian, Method, hutchinson, signs
from lightning_optim.diagnostics.undisturbed import RandomState, frozen
from lightning_optim.ops.rounding import hash_key

SHARE = {"gauss_newton": 0.5, "hutchinson": 0.125, "loss": 1.0}
"""Share of the rows of a batch that is measured; a Hessian product costs as much as three or four gradients."""


class CurvatureEstimator:
    """Measures the curvature that the rules of an optimizer need.

        estimator = CurvatureEstimator(model, optimizer, lambda batch: loss_of(model, batch))
        for batch in data:
            estimator.record_batch(batch)  # every micro-batch, where gradients are accumulated
            loss_of(model, batch).backward()
            optimizer.step()  # measures what is due; estimator.estimate() does so earlier and returns metrics
            optimizer.zero_grad()

    Where a GradScaler may skip steps, call `estimate` before it does. Over micro-batches and data-parallel ranks the
    estimate is that of one large batch. The loss is computed without dropout; labels are sampled from the model
    wherever the loss calls torch's `cross_entropy`, `nll_loss`, `binary_cross_entropy_with_logits` or `mse_loss`.

    Args:
        model: the plain module, inside DDP or a compiled wrapper.
        optimizer: an optimizer of this package. One whose rules need no curvature is left alone.
        loss: the mean training loss of a batch. Buffers, metrics and counters of the model are as before it.
        share: share of the rows of every batch that is measured, in (0, 1]. The default is a half for sampled labels,
            an eighth for Hessian products, and all rows for rules that search by the loss.
        method: method of products with the Hessian and the Gauss-Newton matrix: `"exact"`; `"difference"` of gradients
            or predictions, for models with kernels that have no second derivative; or `"auto"`, the default: exact
            until a kernel turns out to have none, and differences from then on, with one warning.
        weight: weight of a batch in the mean over micro-batches and ranks; by default the number of its labels.
        compare: whether the loss is compared, in the first step, with what `report_losses` is told, and with itself at
            other weights, if a rule searches.
        repeats: whether the optimizer may take several steps with the same batch.
        loss_scale: the present factor of mixed precision; None without.
        rank: rank of this process among those that train together.
        group: process group of those ranks; all processes by default.

    Raises:
        ValueError: a share out of range, or parameters whose curvature cannot be measured where they are.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: RuleOptimizer,
        loss: Callable[[Any], Tensor],
        *,
        share: float | None = None,
        method: EstimatorMethod = "auto",
        weight: Callable[[Any], float] | None = None,
        compare: bool = False,
        repeats: bool = False,
        loss_scale: Callable[[], float | None] = lambda: None,
        rank: int = 0,
        group: Any = None,
    ) -> None:
        check_settings(share, method)
        self.optimizer, self.share, self.rank, self.repeats = optimizer, share, rank, repeats
        self.measurement = LossMeasurement(
            model, loss, method=method, weight=weight, loss_scale=loss_scale, group=group
        )
        self._has_no_labels = False
        """True once the loss has turned out to call nothing whose labels can be sampled."""
        self._due: dict[str, list[Tensor]] | None = None
        self._batches: list[RecordedBatch] = []
        self._is_measured = False
        """True once the recorded batches have been measured, until the next one is recorded."""
        self._comparison = LossComparison(self.measurement) if compare else None
        self._can_search = not compare
        """True once the loss has turned out to change with the weights."""
        check_params(model, optimizer)
        self._factors = KFACFactors(model, optimizer)
        optimizer.has_curvature, optimizer.estimator = True, self

    @property
    def seconds(self) -> float:
        """Time spent on measurements so far."""
        return self.measurement.seconds

    @property
    def compares(self) -> bool:
        """Whether the losses of the coming step are to be reported."""
        return self._comparison is not None

    def record_batch(self, batch: Any) -> None:
        """Record a batch that is about to be trained on.

        Args:
            batch: what `loss` takes: tensors, in any nesting, rows first.

        Raises:
            ValueError: a loss that is to be compared cannot be measured.
        """
        if self._is_measured:
            self.discard()
        if self._due is None:
            self._due = self.optimizer.pending_curvature()
            self._factors.select(set(self._due.get("factors", ())))
        if self._due.keys() - {"factors"} or self.repeats:
            self._batches.append(RecordedBatch(batch, RandomState(self.measurement.model)))
            if self._comparison is not None:
                with explain_checkpointing():
                    self._comparison.measure(self._batches[-1])

    def report_losses(self, losses: Sequence[Tensor | float]) -> None:
        """Note the trainer's losses of the batch that was recorded last.

        Args:
            losses: see `LossComparison.report`.
        """
        if self._comparison is not None and self._batches:
            self._comparison.report([float(x) for x in losses])

    def discard(self) -> None:
        """Forget the recorded batches, as their step is not going to be taken."""
        self._due, self._batches, self._is_measured = None, [], False
        if self._comparison is not None:
            self._comparison.clear()

    def estimate(self) -> dict[str, float]:
        """Measure what is due and pass it to the optimizer, which is about to step.

        Returns:
            Metrics to be logged, such as Sophia's `win_rate`; empty if nothing was due.

        Raises:
            ValueError: a loss for which no labels can be sampled, or one that is not the loss that is trained.
            RuntimeError: no batch was recorded, or a kernel or a way of checkpointing stands in the way; the message
                says what to change.
        """
        if self._is_measured and self.repeats:  # another step within the same batch
            self._due = self.optimizer.pending_curvature()
            self._due.pop("factors", None)
        due, batches = dict(self._due or {}), self._batches
        self._due, self._is_measured = None, True
        if not self.repeats:
            self._batches = []
        if not due:
            return {}
        if not batches and due.keys() - {"factors"}:
            raise RuntimeError(
                "the curvature estimator has no batch of this step; call record_batch(batch) before the forward pass"
            )
        started = time.perf_counter()
        if self._comparison is not None and batches:
            self._comparison.compare()
            self._comparison = None
        if searching := due.pop("loss", None):
            rows = [first_rows(batch, self.share or SHARE["loss"]) for batch in batches]
            oracle = self.optimizer.loss_oracle = BatchLossOracle(self.measurement, rows)
            if not self._can_search:
                self._can_search = validate_search(oracle, searching)
            if not due:
                return {}
        metrics: dict[str, float] = {}
        if self._factors.is_due():
            self._update(self._factors.estimates(self.measurement.loss_scale(), self.measurement.group))
        for kind, params in ((k, v) for k, v in due.items() if k != "factors"):
            estimates = None
            if kind != "gauss_newton" or not self._has_no_labels:
                estimates = self._estimates(kind, params, batches)
            if estimates is None:  # no labels can be sampled
                estimates = self._estimates("hutchinson", params, batches)
            metrics |= self._update(estimates or {})
        seconds = time.perf_counter() - started + self._factors.seconds
        self.measurement.seconds += seconds
        self._factors.seconds = 0.0
        return {f"curvature/{key}": value for key, value in {**metrics, "seconds": seconds}.items()}

    def close(self) -> None:
        """Stop measuring. The rules then refuse to step."""
        self._factors.close()
        self.optimizer.has_curvature, self.optimizer.loss_oracle, self.optimizer.estimator = False, None, None
        self.discard()

    def _update(self, estimates: dict[Tensor, Estimate]) -> dict[str, float]:
        return self.optimizer.update_curvature(estimates) if estimates else {}

    def _estimates(
        self, kind: str, params: Sequence[Tensor], batches: Sequence[RecordedBatch]
    ) -> dict[Tensor, Estimate] | None:
        """Estimates by parameter: empty if one is not finite, None where no labels can be sampled."""
        measure = {"gauss_newton": self._gauss_newton, "hutchinson": self._hutchinson}[kind]
        with explain_checkpointing():
            values, count = measure(params, [first_rows(batch, self.share or SHARE[kind]) for batch in batches])
        is_broken = not all(bool(x.isfinite().all()) for x in values)  # by a loss scale that is too large, say
        has_no_labels = kind == "gauss_newton" and self._has_no_labels
        is_broken, has_no_labels = collectives.all_reduce_max([float(is_broken), float(has_no_labels)], params)
        if has_no_labels:
            self._fall_back_to_hutchinson(params)
            return None
        if is_broken:
            return {}
        diagonal = kind == "hutchinson"
        return {p: Estimate(value=x, count=count, diagonal=diagonal) for p, x in zip(params, values, strict=True)}

    def _fall_back_to_hutchinson(self, params: Sequence[Tensor]) -> None:
        why = (
            f"the loss calls none of torch's {LOSSES_WITH_LABELS}, so no labels can be drawn for the "
            "Gauss-Newton-Bartlett estimate"
        )
        if any(sharding.local(p) is not p for p in params):
            raise ValueError(
                f"{why}, and the other estimate needs products with the Hessian, which FSDP2 does not support; use one "
                "of these (no fused loss kernel), or train under DDP"
            )
        self._has_no_labels = True
        warnings.warn(
            f"sophia_g: {why}; Hutchinson's estimate of the Hessian's diagonal is measured instead, as for sophia_h "
            "(a setting tokens has no effect on it)",
            stacklevel=5,
        )

    def _gauss_newton(self, params: Sequence[Tensor], batches: Sequence[RecordedBatch]) -> tuple[list[Tensor], float]:
        """The gradient under labels sampled from the model, and over how many of them it is the mean."""
        model = self.measurement.model

        def measure(batch: RecordedBatch, i: int) -> tuple[list[Tensor], float]:
            if self._has_no_labels:
                return [torch.zeros_like(sharding.local(p)) for p in params], 0.0
            scale = self.measurement.loss_scale()
            module_params = list(model.parameters())  # under FSDP2, others between forward and backward pass
            with frozen(model, twice=False):
                with Labels(self._seed(i)) as labels:
                    loss = self.measurement.loss(batch)
                labels.keep_used(loss)
                self._has_no_labels = not labels.inputs
                values = gradients(loss * scale, params, module_params)  # collective under FSDP2, so not left out
            if not labels.count:  # nothing to sample, or not in this batch
                return [torch.zeros_like(x) for x in values], 0.0
            return [x / scale for x in values], float(labels.count)

        return self.measurement.mean(measure, params, batches)

    def _hutchinson(self, params: Sequence[Tensor], batches: Sequence[RecordedBatch]) -> tuple[list[Tensor], float]:
        """U * (H u) with the same random signs u for every micro-batch and rank."""
        generator = torch.Generator(params[0].device).manual_seed(self._seed(0, everywhere=True))
        u = [signs(p.detach(), generator) for p in params]

        def measure(batch: RecordedBatch, i: int) -> tuple[list[Tensor], float]:
            scale = self.measurement.loss_scale()

            def product(method: Method) -> tuple[list[Tensor], Labels]:
                with Labels() as labels:
                    hessian = Hessian(lambda: self.measurement.loss(batch) * scale, params, method)
                values = hutchinson(hessian, [range(len(params))], [u])[2]
                if method == "exact" and self.measurement.must_check(labels, params):
                    by_differences = Hessian(hessian.loss, hessian.params, "difference")
                    self.measurement.check(values, hutchinson(by_differences, [range(len(u))], [u])[2])
                return values, labels

            with frozen(self.measurement.model):
                values, labels = self.measurement.second_order(product)
            return [x / scale for x in values], self.measurement.batch_weight(batch, labels)

        return self.measurement.mean(measure, params, batches)

    def _seed(self, i: int, *, everywhere: bool = False) -> int:
        """Seed of micro-batch i in the coming step: a resumed run draws the same random numbers."""
        steps = [int(s["step"]) for s in self.optimizer.state.values() if "step" in s]
        seed = self.optimizer.param_groups[0]["seed"]
        return hash_key(seed, max(steps, default=0), i, 0 if everywhere else 1 + self.rank)
