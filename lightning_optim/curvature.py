"""A curvature feed: it measures for an optimizer what its rules observe beside gradients.

A trainer, or your own loop, shows it every batch and tells it when the optimizer is about to step; in the steps that a
rule's policy names it takes extra passes over a part of the same batches, with the weights the gradient was taken at.
Training does not notice: gradients, modes, random numbers and logs are as without it.
"""

from __future__ import annotations

import functools
import inspect
import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_optim.build.output_layers import is_linear
from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.parallel import collectives, sharding
from lightning_optim.core.parallel.flat_parameters import is_flat
from lightning_optim.core.rule import REGISTRY
from lightning_optim.core.step.curvature_input import Estimate
from lightning_optim.diagnostics.hessian import (
    TOLERANCE,
    GaussNewton,
    Hessian,
    Method,
    NoSecondDerivativeError,
    apart,
    differences_may_help,
    frozen,
    graph_nodes,
    hutchinson,
    measuring,
    signs,
)
from lightning_optim.ops.rounding import hash_key

SHARE = {"gauss_newton": 0.5, "hutchinson": 0.125, "loss": 1.0}
"""Of the rows of a batch that are measured; a product with the Hessian costs as much as three or four gradients."""
CHUNK = 2**22
NO_SECOND_DERIVATIVE = (
    "a kernel of the model has no second derivative, or a false one (its own attention, say): give the curvature feed "
    "method='auto' or method='difference', or load the model with attn_implementation='sdpa' or 'eager'"
)
LABELLED = "cross_entropy, nll_loss, binary_cross_entropy_with_logits and mse_loss"

FeedMethod = Literal["auto"] | Method
T = TypeVar("T")


class CurvatureEstimator:
    """Measures what the rules of an optimizer observe.

        feed = Feed(model, optimizer, lambda batch: loss_of(model, batch))
        for batch in data:
            feed.see(batch)  # every micro-batch, where gradients are accumulated
            loss_of(model, batch).backward()
            feed.ready()
            optimizer.step()
            optimizer.zero_grad()

    Over micro-batches and data-parallel ranks the estimate is that of one large batch. The loss is taken without
    dropout; labels are drawn anew wherever it calls torch's `cross_entropy`, `nll_loss`,
    `binary_cross_entropy_with_logits` or `mse_loss`.

    Args:
        model: the plain module, inside DDP or a compiled wrapper.
        optimizer: ours; one whose rules observe nothing is left alone.
        loss: the mean training loss of a batch, without side effects.
        share: of the rows of every batch that is measured, in (0, 1]; half for labels drawn anew, an eighth for
            products with the Hessian, all for rules that search by the loss, if not given.
        method: of products with the Hessian and the Gauss-Newton matrix: `"exact"`, `"difference"` of gradients or
            predictions for models with kernels that have no second derivative, or `"auto"`, if not given: exact until a
            kernel turns out to have none, and differences from then on, of which one warning tells.
        weight: of a batch in the mean over micro-batches and ranks; the number of its labels, if not given.
        trained: the loss by which the batch is trained, if that is known apart from `loss`: the two are compared on the
            first batch that is measured.
        loss_scale: the present factor of mixed precision; None without.
        rank: of this process among those that train together.
        group: process group of those; all processes, if not given.

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
        method: FeedMethod = "auto",
        weight: Callable[[Any], float] | None = None,
        trained: Callable[[Any], Tensor] | None = None,
        loss_scale: Callable[[], float | None] = lambda: None,
        rank: int = 0,
        group: Any = None,
    ) -> None:
        check_settings(share, method)
        self.model, self.optimizer, self.loss = model, optimizer, loss
        self.share, self.loss_scale, self.rank, self.group = share, loss_scale, rank, group
        self.method: FeedMethod = method
        self.weight, self.trained = weight, trained
        self.seconds = 0.0
        """Spent on measurements so far."""
        self._believed = False
        """Whether second derivatives have been compared with differences of first ones."""
        self._differences = method == "difference"
        """Whether differences are taken."""
        self._undrawn = False
        """Whether the loss has turned out to call nothing whose labels can be drawn."""
        self._hooked = 0.0
        """Of this step, within the backward pass."""
        self._due: dict[str, list[Tensor]] | None = None
        self._batches: list[Any] = []
        _check_params(model, optimizer)
        self._layers = _layers(model, optimizer)
        self._hooks = [
            x.module.register_forward_hook(functools.partial(self._forward, x), with_kwargs=True) for x in self._layers
        ]
        optimizer.bias_of.update({x.weight: x.bias for x in self._layers if x.bias is not None})
        optimizer.has_curvature = True

    def record_batch(self, batch: Any) -> None:
        """A batch is about to be trained on.

        Args:
            batch: what `loss` takes: tensors, in any nesting, rows first.
        """
        if self._due is None:
            self._due = self.optimizer.pending_curvature()
            wanted = set(self._due.get("factors", ()))
            for x in self._layers:
                x.due = x.weight in wanted
        if self._due:
            self._batches.append(batch)

    def estimate(self) -> dict[str, float]:
        """The optimizer is about to step: measure what is due, and show it.

        Returns:
            Numbers to be logged, such as Sophia's `win_rate`; empty if nothing was due.

        Raises:
            ValueError: a loss that the feed cannot draw labels for, or one that is not the loss that is trained.
            RuntimeError: no batch was seen, or a kernel or a way of checkpointing stands in the way; the message says
                what to change.
        """
        due, batches = dict(self._due or {}), self._batches
        self._due, self._batches = None, []
        if not due:
            return {}
        if not batches:
            raise RuntimeError("the curvature feed saw no batch of this step; call see(batch) before the forward pass")
        started = time.perf_counter()
        said: dict[str, float] = {}
        if self.trained is not None and set(due) - {"factors"}:
            self._compare_losses(self.trained, batches[0])
            self.trained = None
        if due.pop("loss", None):
            self.optimizer.loss_oracle = BatchLossOracle(
                self, [first_rows(batch, self.share or SHARE["loss"]) for batch in batches]
            )
            if not due:
                return {}
        if any(x.due for x in self._layers):
            self._show_factors([x for x in self._layers if x.due])
        for kind, params in ((k, v) for k, v in due.items() if k != "factors"):
            seen = None if self._undrawn and kind == "gauss_newton" else self._measured(kind, params, batches)
            if seen is None:  # no labels can be drawn
                seen = self._measured("hutchinson", params, batches)
            if seen:
                said |= self.optimizer.update_curvature(seen)
        spent = time.perf_counter() - started + self._hooked
        self.seconds += spent
        self._hooked = 0.0
        return {f"curvature/{key}": value for key, value in {**said, "seconds": spent}.items()}

    def close(self) -> None:
        """Stop; the rules then refuse to step."""
        for hook in self._hooks:
            hook.remove()
        self.optimizer.has_curvature, self.optimizer.loss_oracle = False, None
        self._due, self._batches = None, []

    # -- factors, in hooks of the training's own passes -----------------------------------------------------------

    def _forward(self, layer: Layer, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Have the gradient by a layer's output come with the inputs it belongs to.

        What is recomputed for activation checkpointing gets no gradient, or is the only one that does.
        """
        if layer.due and not measuring() and torch.is_grad_enabled() and out.requires_grad:
            inputs = (*args, *kwargs.values())[0].detach()
            out.register_hook(lambda g: self._backward(layer, inputs, g.detach()))

    def _backward(self, layer: Layer, inputs: Tensor, g: Tensor) -> None:
        started = time.perf_counter()
        with torch.no_grad():
            layer.add(inputs, g)
        self._hooked += time.perf_counter() - started

    def _show_factors(self, layers: Sequence[Layer]) -> None:
        """Over micro-batches and ranks, the factors of one large batch, of whose mean loss each had a part."""
        scale = (self.loss_scale() or 1.0) * collectives.world_size(self.group)
        counts = torch.tensor([x.rows for x in layers], dtype=torch.float64, device=layers[0].weight.device)
        collectives.sum_([counts], self.group)
        used = [(x, n) for x, n in zip(layers, counts.tolist(), strict=True) if n]  # by any rank
        if not used and any(x.weight.grad is not None for x in layers):
            raise RuntimeError(
                "the curvature feed saw no pass through the layers it measures, though they have gradients; call them "
                "as modules, not by their weights, between see(batch) and ready()"
            )
        for x, _ in used:
            x.begin()
        collectives.sum_([t for x, _ in used for t in (x.inputs, x.outputs)], self.group)
        seen = {}
        for x, n in used:
            seen[x.weight] = Estimate(inputs=x.inputs / n, outputs=x.outputs / (n * scale**2))
        for x in layers:
            x.clear()
        broken = not all(bool(t.isfinite().all()) for one in seen.values() for t in vars(one).values())
        if seen and not broken:
            self.optimizer.update_curvature(seen)

    # -- estimates ------------------------------------------------------------------------------------------------

    def _compare_losses(self, trained: Callable[[Any], Tensor], batch: Any) -> None:
        with frozen(self.model, twice=False):
            with Labels() as labels:
                ours = self.loss(batch)
            theirs = trained(batch)
        dtypes = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        compare_losses(float(ours.detach()), float(theirs.detach()), dtypes | labels.dtypes)

    def _measured(self, kind: str, params: Sequence[Tensor], batches: Sequence[Any]) -> dict[Tensor, Estimate] | None:
        """What is shown to the rules.

        Returns:
            Nothing of what is not finite; None where no labels can be drawn.
        """
        measure = {"gauss_newton": self._gauss_newton, "hutchinson": self._hutchinson}[kind]
        with _explained():
            values, count = measure(params, [first_rows(batch, self.share or SHARE[kind]) for batch in batches])
        broken = not all(bool(x.isfinite().all()) for x in values)  # by a loss scale that is too large, say
        undrawn = kind == "gauss_newton" and self._undrawn
        broken, undrawn = collectives.all_reduce_max([float(broken), float(undrawn)], params)
        if undrawn:
            self._fall_back_to_hutchinson(params)
            return None
        diagonal = kind == "hutchinson"
        seen = {p: Estimate(value=x, count=count, diagonal=diagonal) for p, x in zip(params, values, strict=True)}
        return {} if broken else seen

    def _fall_back_to_hutchinson(self, params: Sequence[Tensor]) -> None:
        why = (
            f"the loss calls none of torch's {LABELLED}, so no labels can be drawn for the Gauss-Newton-Bartlett "
            "estimate"
        )
        if any(sharding.local(p) is not p for p in params):
            raise ValueError(
                f"{why}, and the other estimate needs products with the Hessian, which FSDP2 does not support; use one "
                "of these (no fused loss kernel), or train under DDP"
            )
        self._undrawn = True
        warnings.warn(
            f"sophia_g: {why}; Hutchinson's estimate of the Hessian's diagonal is measured instead, as for sophia_h "
            "(a setting tokens has no effect on it)",
            stacklevel=5,
        )

    def _gauss_newton(self, params: Sequence[Tensor], batches: Sequence[Any]) -> tuple[list[Tensor], float]:
        """The gradient under labels drawn from the model, and over how many of them it is the mean."""

        def measure(batch: Any, i: int) -> tuple[list[Tensor], float]:
            if self._undrawn:
                return [torch.zeros_like(sharding.local(p)) for p in params], 0.0
            scale = self.loss_scale() or 1.0
            owned = list(self.model.parameters())  # under FSDP2, others between forward and backward pass
            with frozen(self.model, twice=False):
                with Labels(self._seed(i)) as labels:
                    loss = self.loss(batch)
                labels.keep_used(loss)
                self._undrawn = not labels.inputs
                found = _gradients(loss * scale, params, owned)  # collective under FSDP2, so not left out
            if not labels.count:  # nothing to draw, or not in this batch
                return [torch.zeros_like(x) for x in found], 0.0
            return [x / scale for x in found], float(labels.count)

        return self._averaged(measure, params, batches)

    def _hutchinson(self, params: Sequence[Tensor], batches: Sequence[Any]) -> tuple[list[Tensor], float]:
        """U * (H u) with the same random signs u for every micro-batch and rank."""
        draw = torch.Generator(params[0].device).manual_seed(self._seed(0, everywhere=True))
        u = [signs(p.detach(), draw) for p in params]

        def measure(batch: Any, i: int) -> tuple[list[Tensor], float]:
            scale = self.loss_scale() or 1.0

            def product(method: Method) -> tuple[list[Tensor], Labels]:
                with Labels() as labels:
                    hessian = Hessian(lambda: self.loss(batch) * scale, params, method)
                found = hutchinson(hessian, [range(len(params))], [u])[2]
                if method == "exact" and self._doubted(labels, params):
                    near = Hessian(hessian.loss, hessian.params, "difference")
                    self._compare(found, hutchinson(near, [range(len(u))], [u])[2])
                return found, labels

            with frozen(self.model):
                found, labels = self._twice(product)
            return [x / scale for x in found], self._weight(batch, labels)

        return self._averaged(measure, params, batches)

    def _weight(self, batch: Any, labels: Labels) -> float:
        return float(labels.count or 1) if self.weight is None else self.weight(batch)

    def _twice(self, measure: Callable[[Method], T]) -> T:
        """What needs second derivatives, by differences where there are none."""
        if self._differences:
            return measure("difference")
        try:
            return measure("exact")
        except Exception as error:
            if self.method == "exact" and isinstance(error, NoSecondDerivativeError):
                raise RuntimeError(NO_SECOND_DERIVATIVE) from error
            if self.method == "exact" or not differences_may_help(error):
                raise
            second = isinstance(error, NoSecondDerivativeError)
            reason = "a kernel has none, or a false one" if second else str(error)
        found = measure("difference")  # raises again what has another cause
        self._differences = True
        warnings.warn(
            f"the curvature feed takes differences of gradients in place of second derivatives: {reason}",
            stacklevel=6,
        )
        return found

    def _doubted(self, labels: Labels, params: Sequence[Tensor]) -> bool:
        """Whether second derivatives are to be compared with differences, which tell little in low precision."""
        narrow = labels.autocast or any(p.dtype.itemsize < 4 for p in params)
        return not self._believed and not narrow

    def _compare(self, found: Sequence[Tensor], near: Sequence[Tensor]) -> None:
        """Once, with differences: a kernel may leave its second derivative out without a word."""
        if apart(found, near) > TOLERANCE:
            raise NoSecondDerivativeError
        self._believed = True

    def _averaged(
        self,
        measure: Callable[[Any, int], tuple[list[Tensor], float]],
        params: Sequence[Tensor],
        batches: Sequence[Any],
    ) -> tuple[list[Tensor], float]:
        """The mean over micro-batches and ranks, each weighted by its number of labels, and that number of all."""
        sharded = any(sharding.local(p) is not p for p in params)
        sums = [torch.zeros_like(sharding.local(p), dtype=_wide(p.dtype)) for p in params]
        total = torch.zeros(1, dtype=torch.float64, device=sums[0].device)
        for i, batch in enumerate(batches):
            found, count = measure(batch, i)
            n = torch.full_like(total, count)
            if sharded:  # their gradients are means over ranks already
                collectives.sum_([n], self.group)
            for x, g in zip(sums, found, strict=True) if n else ():  # the mean over no label is not a number
                x.add_(g, alpha=float(n))
            total += n
        if not sharded:
            collectives.sum_([*sums, total], self.group)
        count = float(total)
        return [x / count for x in sums], count

    def _seed(self, i: int, *, everywhere: bool = False) -> int:
        """Of the random numbers of micro-batch i in the coming step: a resumed run draws the same."""
        steps = [int(s["step"]) for s in self.optimizer.state.values() if "step" in s]
        seed = self.optimizer.param_groups[0]["seed"]
        return hash_key(seed, max(steps, default=0), i, 0 if everywhere else 1 + self.rank)


class BatchLossOracle:
    """The loss of the coming step's batches, for rules that search.

    It implements `lightning_optim.core.step.line_search.LossOracle`: the mean over micro-batches and ranks, without
    dropout; no `.grad` is touched.

    Args:
        feed: that measures it.
        batches: micro-batches.
    """

    def __init__(self, feed: CurvatureEstimator, batches: Sequence[Any]) -> None:
        self.feed, self.batches = feed, batches
        self._matrices: dict[int, tuple[GaussNewton, Labels]] = {}

    def gradient(self, params: Sequence[Tensor]) -> tuple[float, list[Tensor]]:
        """The loss at the present weights, and its gradients.

        Args:
            params: of the optimizer.

        Returns:
            (loss, one tensor per parameter, float32 or wider).
        """
        self._matrices = {}  # their graphs hold other weights

        def measure(batch: Any, i: int) -> tuple[list[Tensor], float]:
            scale = self.feed.loss_scale() or 1.0
            with frozen(self.feed.model, twice=False):
                with Labels() as labels:
                    loss = self.feed.loss(batch)
                found = _gradients(loss * scale, params, ())
            return [loss.detach(), *(x / scale for x in found)], self.feed._weight(batch, labels)

        like = torch.zeros((), dtype=torch.float64, device=params[0].device)
        value, *found = self._measured(measure, [like, *params])
        return float(value), found

    def product(self, params: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
        """The Gauss-Newton matrix of the loss at the present weights times a vector.

        Args:
            params: of the optimizer.
            v: one tensor per parameter.

        Returns:
            Likewise, float32 or wider.

        Raises:
            ValueError: a loss whose predictions the feed does not see.
            RuntimeError: a kernel stands in the way; the message says what to change.
        """

        def measure(batch: Any, i: int) -> tuple[list[Tensor], float]:
            def multiplied(method: Method) -> tuple[list[Tensor], Labels]:
                matrix = self._matrices[i][0] if i in self._matrices else None
                if matrix is None or matrix.method != method:
                    self._matrices[i] = self._matrix(params, batch, v, method)
                matrix, labels = self._matrices[i]
                return matrix.product(v), labels

            with frozen(self.feed.model):
                found, labels = self.feed._twice(multiplied)
            if not labels.inputs:
                raise ValueError(
                    f"the loss calls none of torch's {LABELLED}, so the Gauss-Newton matrix cannot be told from the "
                    "Hessian; use one of these (no fused loss kernel), or lbfgs, which needs the loss only"
                )
            return found, self.feed._weight(batch, labels)

        return self._measured(measure, params)

    def _matrix(
        self, params: Sequence[Tensor], batch: Any, v: Sequence[Tensor], method: Method
    ) -> tuple[GaussNewton, Labels]:
        """Of one micro-batch, and what its loss was given."""
        labels = Labels()

        def passes() -> tuple[Tensor, list[Tensor]]:
            labels.clear()
            with labels:
                loss = self.feed.loss(batch)
            labels.keep_used(loss)
            return loss, labels.inputs

        passes()  # tells which predictions are used; passes of a difference have no graph
        matrix = GaussNewton(passes, params, method)
        if method == "exact" and labels.inputs and self.feed._doubted(labels, params):
            self.feed._compare(matrix.pushed(v), GaussNewton(passes, params, "difference").pushed(v))
            matrix = GaussNewton(passes, params)  # the difference has written to what the graph holds
        return matrix, labels

    def _measured(self, measure: Callable[[Any, int], tuple[list[Tensor], float]], like: Sequence[Tensor]) -> Any:
        started = time.perf_counter()
        try:
            with _explained():
                return self.feed._averaged(measure, like, self.batches)[0]
        finally:
            self.feed.seconds += time.perf_counter() - started


@contextmanager
def _explained() -> Iterator[None]:
    """Say what to do about activation checkpointing of the kind that cannot be measured."""
    try:
        yield
    except RuntimeError as error:
        if "use_reentrant" not in str(error):
            raise
        raise RuntimeError(
            "the curvature feed cannot work with reentrant activation checkpointing; give checkpoint() "
            "use_reentrant=False (Transformers: gradient_checkpointing_kwargs={'use_reentrant': False})"
        ) from error


class Layer:
    """Sums of outer products of a layer's inputs and output gradients.

    Args:
        module: `nn.Linear`, `nn.Conv2d` or Transformers' Conv1D.
        bias: of the module, if it is to be part of the inputs' factor.
        reduce: whether positions are summed, rather than rows of their own.
    """

    def __init__(self, module: nn.Module, bias: Tensor | None, reduce: bool) -> None:
        self.module, self.bias, self.reduce = module, bias, reduce
        self.weight: Tensor = module.weight  # pyright: ignore[reportAttributeAccessIssue]
        m = self.weight.shape[0 if isinstance(module, nn.Linear | nn.Conv2d) else 1]
        self.sides = self.weight.numel() // m + (bias is not None), m
        self.clear()

    def clear(self) -> None:
        """Start anew."""
        self.rows, self.due = 0, False
        self.inputs = self.outputs = torch.empty(0)

    def begin(self) -> None:
        """Have sums, of nothing before the first pass."""
        if not self.rows:
            n, m = self.sides
            dtype, device = _wide(self.weight.dtype), self.weight.device
            self.inputs = torch.zeros(n, n, dtype=dtype, device=device)
            self.outputs = torch.zeros(m, m, dtype=dtype, device=device)

    def add(self, inputs: Tensor, g: Tensor) -> None:
        """Add one pass through the layer.

        Args:
            inputs: of the layer.
            g: gradient by its output.
        """
        if isinstance(self.module, nn.Conv2d):
            c: Any = self.module
            inputs = F.unfold(inputs, c.kernel_size, c.dilation, c.padding, c.stride).mT
            g = g.flatten(2).mT
        dtype = _wide(self.weight.dtype)
        if self.reduce and g.ndim > 2:
            positions = tuple(range(1, g.ndim - 1))
            inputs, g = inputs.to(dtype).mean(positions), g.to(dtype).sum(positions)
        a, q = inputs.reshape(-1, inputs.shape[-1]).to(dtype), g.reshape(-1, g.shape[-1]).to(dtype)
        if self.bias is not None:
            a = torch.cat([a, a.new_ones(len(a), 1)], -1)
        self.begin()
        self.inputs.addmm_(a.mT, a)
        self.outputs.addmm_(q.mT, q)
        self.rows += len(a)


def _layers(model: nn.Module, optimizer: RuleOptimizer) -> list[Layer]:
    """The layers whose factors a rule observes."""
    groups = [group for group in optimizer.group_steps() if group.rule.curvature_input == "factors"]
    wanted = {id(s.plan.param): (group.rule, s.plan) for group in groups for s in group.params}
    out: dict[int, Layer] = {}
    for module in model.modules() if wanted else ():
        if id(getattr(module, "weight", None)) in wanted and _has_factors(module):
            rule: Any = wanted[id(module.weight)][0]
            bias: Any = getattr(module, "bias", None)
            bias = bias if id(bias) in wanted else None
            out[id(module.weight)] = Layer(module, bias, rule.sequence == "reduce")
    for key, (rule, plan) in wanted.items():
        if plan.param.ndim > 1 and key not in out:
            raise ValueError(
                f"{plan.name}: {rule.name} needs the weight of an nn.Linear, an nn.Conv2d (one group, padded by zeros) or "
                "Transformers' Conv1D; give it to another rule (overrides)"
            )
    return list(out.values())


def _has_factors(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return is_linear(module)


def check_settings(share: float | None, method: str) -> None:
    """Check the settings of a feed.

    Args:
        share: see `CurvatureEstimator`.
        method: see `CurvatureEstimator`.

    Raises:
        ValueError: one of them is out of range.
    """
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"share must lie in (0, 1], got {share}")
    if method not in ("auto", "exact", "difference"):
        raise ValueError(f"method must be 'auto', 'exact' or 'difference', got {method!r}")


def compare_losses(measured: float, trained: float, dtypes: Iterable[torch.dtype]) -> None:
    """Check that the loss that is measured is the one that is trained.

    Args:
        measured: the loss of a batch that the feed was given.
        trained: the trainer's loss of the same batch, in the same mode and with the same random numbers.
        dtypes: of the weights and of the computation; the narrowest decides how far they may be apart.

    Raises:
        ValueError: they differ.
    """
    tolerance = max([torch.finfo(dtype).eps for dtype in dtypes], default=1e-7) ** 0.5
    if not math.isclose(measured, trained, rel_tol=tolerance, abs_tol=tolerance * 1e-3) and measured == measured:
        raise ValueError(
            f"CurvatureFeed(loss=...) is not the loss that is trained: on the first batch it is {measured:.6g}, and "
            f"the trainer's is {trained:.6g}; leave loss out, or give the trainer's own. Nothing was updated"
        )


def curvature_input(optimizer: Any) -> bool:
    """Whether an optimizer needs a feed.

    Returns:
        True for ours with such a rule.
    """
    return isinstance(optimizer, RuleOptimizer) and any(
        REGISTRY[g["rule"]].curvature_input for g in optimizer.param_groups
    )


def _check_params(model: nn.Module, optimizer: RuleOptimizer) -> None:
    for group in optimizer.group_steps():
        if group.rule.curvature_input:
            flat = optimizer.known_params.flat_tensors(group.group)
            for plan in (s.plan for s in group.params):
                if is_flat(plan.param) or any(plan.param is p for p in flat):
                    raise ValueError(
                        f"{plan.name}: {group.rule.name} cannot be measured in the flat parameters of FSDP1 and ZeRO; "
                        f"use DDP{' or FSDP2 (fully_shard)' if group.rule.curvature_input == 'gauss_newton' else ''}"
                    )
                if group.rule.curvature_input != "gauss_newton" and sharding.local(plan.param) is not plan.param:
                    raise ValueError(
                        f"{plan.name}: {group.rule.name} needs a double backward pass, which FSDP2 does not support; "
                        "use DDP, or sophia_g"
                    )
                if sharding.is_tensor_parallel(plan.param, model):
                    raise ValueError(
                        f"{plan.name}: {group.rule.name} counts the labels of all ranks, which see the same batches under "
                        "tensor parallelism; use DDP or FSDP2 alone"
                    )


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _gradients(loss: Tensor, params: Sequence[Tensor], owned: Sequence[Tensor]) -> list[Tensor]:
    """Gradients of a loss on this rank, no `.grad` touched."""
    if any(sharding.local(p) is not p for p in params):  # FSDP2 reduces in hooks of an ordinary backward pass
        kept = [(p, p.grad) for p in owned]
        try:
            for p, _ in kept:
                p.grad = None
            loss.backward()
            found = [sharding.local_gradient(p) for p in params]
        finally:
            for p, g in kept:
                p.grad = g
        return [torch.zeros_like(sharding.local(p)) if g is None else g for p, g in zip(params, found, strict=True)]
    found = torch.autograd.grad(loss, params, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]


def first_rows(batch: Any, share: float) -> Any:
    """The first rows of a batch.

    Args:
        batch: tensors in any nesting; those with as many rows as the first one are cut.
        share: of the rows, rounded up.

    Returns:
        The same nesting of views.
    """
    sizes = [len(t) for t in tree_leaves(dict(batch) if isinstance(batch, Mapping) else batch) if _has_rows(t)]
    if share == 1 or not sizes:
        return batch
    rows, count = sizes[0], math.ceil(sizes[0] * share)

    def cut(t: Any) -> Any:
        return t[:count] if _has_rows(t) and len(t) == rows else t

    return tree_map(cut, dict(batch) if isinstance(batch, Mapping) else batch)


def _has_rows(t: Any) -> bool:
    return isinstance(t, Tensor) and t.ndim > 0


class Labels(TorchFunctionMode):
    """Counts the labels that losses within the block are given, and draws them anew from the predictions.

    For a mean of squared differences the predictions are those of a normal distribution of variance one half, whose
    negative log-likelihood the square is.

    Args:
        seed: of the draws; labels stay as they are if not given.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.seed, self.autocast = seed, False
        self.dtypes: set[torch.dtype] = set()
        """Of autocast, where it was on."""
        self._used: list[bool] | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the losses so far."""
        self.inputs: list[Tensor] = []
        """What the losses were given for predictions."""
        self._counts: list[int] = []
        self._losses: list[Any] = []

    @property
    def count(self) -> int:
        """The number of labels."""
        return sum(self._counts)

    def keep_used(self, loss: Tensor) -> None:
        """Forget the losses that another loss is not made of, such as a model's own, where a trainer takes its logits.

        Args:
            loss: what the block has computed; without a graph, the losses of the call before are kept.
        """
        if loss.grad_fn is not None:
            nodes = set(graph_nodes([loss]))
            self._used = [getattr(x, "grad_fn", None) in nodes for x in self._losses]
        used = self._used or []
        if len(used) == len(self._losses):
            self.inputs = [x for x, u in zip(self.inputs, used, strict=True) if u]
            self._counts = [n for n, u in zip(self._counts, used, strict=True) if u]
        self._losses = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Change the labels of a loss; everything else goes on as it is.

        Args:
            func: of torch.
            types: not looked at.
            args: of the function.
            kwargs: of the function.

        Returns:
            What the function returns.
        """
        kwargs = kwargs or {}
        if func not in (F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits, F.mse_loss):
            return func(*args, **kwargs)
        bound = inspect.signature(func).bind(*args, **kwargs)
        bound.apply_defaults()
        given = bound.arguments
        self.inputs.append(given["input"])
        x, y = given["input"].detach(), given["target"]
        if torch.is_autocast_enabled(x.device.type):
            self.autocast = True
            self.dtypes.add(torch.get_autocast_dtype(x.device.type))
        if func in (F.cross_entropy, F.nll_loss):
            by_index = not y.is_floating_point()
            counted = y != given["ignore_index"] if by_index else torch.ones(y.movedim(_classes(x), -1).shape[:-1])
            self._counts.append(int(counted.sum()))
            if self.seed is not None:
                drawn = categorical(x.movedim(_classes(x), -1), self._generator(x))
                given["target"] = torch.where(counted, drawn, y) if by_index else drawn
        else:
            self._counts.append(y.numel())
            if self.seed is not None and func is F.mse_loss:
                noise = torch.randn(x.shape, generator=self._generator(x), device=x.device, dtype=_wide(x.dtype))
                given["target"] = x + (0.5**0.5 * noise).to(x.dtype)
            elif self.seed is not None:
                given["target"] = torch.bernoulli(x.sigmoid(), generator=self._generator(x))
        if self.seed is not None and "label_smoothing" in given:
            given["label_smoothing"] = 0.0
        out = func(*bound.args, **bound.kwargs)
        self._losses.append(out)
        return out

    def _generator(self, like: Tensor) -> torch.Generator:
        """New numbers for every loss of the block."""
        assert self.seed is not None
        return torch.Generator(like.device).manual_seed(hash_key(self.seed, self.count))


def _classes(x: Tensor) -> int:
    return 0 if x.ndim == 1 else 1


def categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Draw from softmax(logits), by the inverse of the distribution function.

    Args:
        logits: `[..., classes]`.
        generator: on their device.

    Returns:
        Indices, int64, `[...]`.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    out = []
    for part in flat.split(max(1, CHUNK // flat.shape[-1])):
        below = part.to(_wide(part.dtype)).softmax(-1).cumsum_(-1)
        u = torch.rand(len(part), 1, generator=generator, device=part.device, dtype=below.dtype) * below[:, -1:]
        out.append(torch.searchsorted(below, u, right=True).clamp_(max=flat.shape[-1] - 1))
    return (
        torch.cat(out).view(logits.shape[:-1]) if out else flat.new_empty(0, dtype=torch.int64).view(logits.shape[:-1])
    )
