"""Kronecker factors for K-FAC: outer products of layer inputs and output gradients, from training's own passes."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_optim.build.output_layers import is_linear
from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.parallel import collectives
from lightning_optim.core.step.curvature_input import Estimate
from lightning_optim.diagnostics.undisturbed import measuring


class LayerFactors:
    """Sums of outer products of a layer's inputs and output gradients.

    Args:
        module: `nn.Linear`, `nn.Conv2d` or Transformers' Conv1D.
        bias: bias of the module, if it is to be part of the inputs' factor.
        reduce: whether positions are summed, rather than counted as rows of their own.
    """

    def __init__(self, module: nn.Module, bias: Tensor | None, reduce: bool) -> None:
        self.module, self.bias, self.reduce = module, bias, reduce
        self.weight: Tensor = module.weight  # pyright: ignore[reportAttributeAccessIssue]
        m = self.weight.shape[0 if isinstance(module, nn.Linear | nn.Conv2d) else 1]
        self.sides = self.weight.numel() // m + (bias is not None), m
        self.clear()

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the sums: float32 or wider."""
        return torch.promote_types(self.weight.dtype, torch.float32)

    def clear(self) -> None:
        """Forget the sums, and measure nothing until `is_due` is set."""
        self.rows, self.is_due = 0, False
        self.inputs = self.outputs = torch.empty(0)

    def allocate(self) -> None:
        """Allocate the sums before the first pass. Later calls do nothing."""
        if not self.rows:
            n, m = self.sides
            self.inputs = torch.zeros(n, n, dtype=self.dtype, device=self.weight.device)
            self.outputs = torch.zeros(m, m, dtype=self.dtype, device=self.weight.device)

    def add(self, inputs: Tensor, g: Tensor) -> None:
        """Add one pass through the layer.

        Args:
            inputs: inputs of the layer.
            g: gradient with respect to its output.
        """
        if isinstance(self.module, nn.Conv2d):
            c: Any = self.module
            inputs = F.unfold(inputs, c.kernel_size, c.dilation, c.padding, c.stride).mT
            g = g.flatten(2).mT
        if self.reduce and g.ndim > 2:
            positions = tuple(range(1, g.ndim - 1))
            inputs, g = inputs.to(self.dtype).mean(positions), g.to(self.dtype).sum(positions)
        a, q = inputs.reshape(-1, inputs.shape[-1]).to(self.dtype), g.reshape(-1, g.shape[-1]).to(self.dtype)
        if self.bias is not None:
            a = torch.cat([a, a.new_ones(len(a), 1)], -1)
        self.allocate()
        self.inputs.addmm_(a.mT, a)
        self.outputs.addmm_(q.mT, q)
        self.rows += len(a)


class KFACFactors:
    """The factors of every layer whose rule needs them, summed by hooks in the passes of training.

    Args:
        model: the module with these layers.
        optimizer: the optimizer whose rules need factors; it learns which bias belongs to which weight.
    """

    def __init__(self, model: nn.Module, optimizer: RuleOptimizer) -> None:
        self.seconds = 0.0
        """Time spent in hooks since it was last reset."""
        self.layers = _layers_with_factors(model, optimizer)
        if self.layers and "torch._dynamo" in sys.modules:
            torch.compiler.reset()  # graphs that were compiled before do not call the hooks
        after_forward: Any = self._after_forward  # pyright: ignore[reportAttributeAccessIssue]
        self._hooks = [
            x.module.register_forward_hook(functools.partial(after_forward, x), with_kwargs=True) for x in self.layers
        ]
        optimizer.bias_of.update({x.weight: x.bias for x in self.layers if x.bias is not None})

    def select(self, weights: Collection[Tensor]) -> None:
        """Choose the layers that are measured in the coming passes.

        Args:
            weights: weights of these layers.
        """
        for x in self.layers:
            x.is_due = x.weight in weights

    def is_due(self) -> bool:
        """Whether any layer is measured in this step.

        Returns:
            True from `select` until `estimates`.
        """
        return any(x.is_due for x in self.layers)

    def estimates(self, loss_scale: float, group: Any) -> dict[Tensor, Estimate]:
        """The factors of one large batch, over micro-batches and ranks; its mean loss is the sum of theirs.

        Args:
            loss_scale: factor of mixed precision by which the gradients are scaled.
            group: process group of the ranks that train together.

        Returns:
            Estimates by weight; empty if one of them is not finite.

        Raises:
            RuntimeError: the layers have gradients, but no pass through them was seen.
        """
        layers = [x for x in self.layers if x.is_due]
        scale = loss_scale * collectives.world_size(group)
        counts = torch.tensor([x.rows for x in layers], dtype=torch.float64, device=layers[0].weight.device)
        collectives.sum_([counts], group)
        used = [(x, n) for x, n in zip(layers, counts.tolist(), strict=True) if n]  # by any rank
        if not used and any(x.weight.grad is not None for x in layers):
            raise RuntimeError(
                "the curvature estimator saw no pass through the layers it measures, though they have gradients; "
                "nothing was updated. Call them as modules, not by their weights, between record_batch(batch) and "
                "estimate(). A model that was compiled before calls no hooks: train without torch.compile, or with a "
                "rule that needs no factors of layers, such as soap"
            )
        for x, _ in used:
            x.allocate()
        collectives.sum_([t for x, _ in used for t in (x.inputs, x.outputs)], group)
        out = {x.weight: Estimate(inputs=x.inputs / n, outputs=x.outputs / (n * scale**2)) for x, n in used}
        for x in layers:
            x.clear()
        return out if all(bool(t.isfinite().all()) for one in out.values() for t in vars(one).values()) else {}

    def close(self) -> None:
        """Remove the hooks."""
        for hook in self._hooks:
            hook.remove()

    @torch.compiler.disable
    def _after_forward(self, layer: LayerFactors, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        """Pair the gradient of a layer's output with the inputs that it belongs to.

        A forward pass that is recomputed for activation checkpointing gets no gradient, or is the only one that does.
        """
        if layer.is_due and not measuring() and torch.is_grad_enabled() and out.requires_grad:
            inputs = (*args, *kwargs.values())[0].detach()
            out.register_hook(lambda g: self._after_backward(layer, inputs, g.detach()))

    def _after_backward(self, layer: LayerFactors, inputs: Tensor, g: Tensor) -> None:
        started = time.perf_counter()
        with torch.no_grad():
            layer.add(inputs, g)
        self.seconds += time.perf_counter() - started


def _layers_with_factors(model: nn.Module, optimizer: RuleOptimizer) -> list[LayerFactors]:
    """The layers whose factors a rule needs."""
    groups = [group for group in optimizer.group_steps() if group.rule.curvature_input == "factors"]
    params = {id(s.plan.param): (group.rule, s.plan) for group in groups for s in group.params}
    out: dict[int, LayerFactors] = {}
    for module in model.modules() if params else ():
        if id(getattr(module, "weight", None)) in params and _has_factors(module):
            rule: Any = params[id(module.weight)][0]
            bias: Any = getattr(module, "bias", None)
            bias = bias if id(bias) in params else None
            out[id(module.weight)] = LayerFactors(module, bias, rule.sequence == "reduce")
    for key, (rule, plan) in params.items():
        if plan.param.ndim > 1 and key not in out:
            raise ValueError(
                f"{plan.name}: {rule.name} needs the weight of an nn.Linear, an nn.Conv2d (one group, padded by zeros) "
                "or Transformers' Conv1D; give it to another rule (overrides)"
            )
    return list(out.values())


def _has_factors(module: nn.Module) -> bool:
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros" and not isinstance(module.padding, str)
    return is_linear(module)
