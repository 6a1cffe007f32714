"""Steps within the backward pass: every gradient is applied as soon as it is computed, then freed.

A hook on each parameter takes an ordinary step of this one parameter.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_optim.core.parallel import collectives, sharding
from lightning_optim.core.parallel.flat_parameters import is_flat
from lightning_optim.core.rule import Rule
from lightning_optim.core.step.records import GroupStep, ParamStep
from lightning_optim.ops.lapack import failures
from lightning_optim.refresh import parse

_hooks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Owner and hook of each parameter that is stepped in the backward pass: (weak `FusedBackward` reference, handle)."""

PREVIOUS = "previous_norm"
"""Key in a param group with clipping: the norm of its gradients in the previous step."""


class SteppedOptimizer(Protocol):
    """The part of an optimizer that a fused backward pass uses."""

    param_groups: list[dict[str, Any]]
    fused: FusedBackward | None
    _step_supports_amp_scaling: bool

    def group_steps(self) -> list[GroupStep]:
        """Every group with its rule and its trainable parameters."""
        ...

    def validate_shapes(self, groups: Sequence[GroupStep]) -> None:
        """Check that every parameter still has the shape of its state."""
        ...

    def take_step(self, groups: Sequence[GroupStep], clip: Callable[[Sequence[GroupStep]], None]) -> bool:
        """The phases of a step."""
        ...


class FusedBackward:
    """Steps each parameter of an optimizer within the backward pass; made by `RuleOptimizer.fuse_backward`.

        optimizer.fuse_backward()
        loss.backward()      # steps; every gradient is None afterwards
        optimizer.step()     # ends the pass; schedulers step after it, as usual

    Without clipping the weights are bitwise those of ordinary steps. Exactly one backward pass belongs to each
    `step()`: freed gradients cannot be accumulated, and a second pass raises an error. `step()` itself steps parameters
    whose gradient was assigned, or that were frozen or replaced since the last step.

    The norm of a group (`clip_norm`) is not known before its last gradient. Each gradient is clipped by the larger of
    its own norm and the group's norm in the previous step, which is saved with the group; or by the group's current
    norm, as published by Lv et al. 2023 (arXiv:2306.09782), at the cost of a second backward pass:

        with optimizer.fuse_backward().norm_pass():
            loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()

    `on_nonfinite="raise"` checks each gradient before its parameter is written; parameters earlier in the pass have
    then been updated. After a norm pass nothing has. To continue after an error call `zero_grad()` and `step()`.

    Refused: refresh policies that decide about all parameters together (`fixed` and combinations of it do not), so
    that `refresh="fixed:200"` is GaLore's, Fira's and Apollo's update layer by layer; rules with `curvature_input`;
    rules for whole matrices whose parameters are sharded, since these are exchanged together; `on_nonfinite="skip"`;
    parameters that are whole on several ranks (DDP, FSDP1), whose gradients are not reduced yet when the hook runs; a
    `GradScaler`. FSDP2 is supported.

    Args:
        optimizer: optimizer whose parameters are stepped in the backward pass until `close`. A parameter is stepped by
            the optimizer that was fused last. Copies and unpickled optimizers take ordinary steps.

    Raises:
        ValueError: a rule, option or parameter that is refused.
    """

    def __init__(self, optimizer: SteppedOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._steps: dict[int, GroupStep] = {}
        """Steps of this pass, one per parameter, by its id; empty between passes."""
        self._done: set[int] = set()
        self._only_norms = False
        self._squares: dict[str, Tensor] = {}
        """Squared norm of the gradients of this pass, by group."""
        self._norms: dict[str, float] = {}
        """Norm from a norm pass, by group."""
        for group in optimizer.group_steps():
            validate_fusion(group.rule, group.group, group.params)
        optimizer._step_supports_amp_scaling = True  # so that GradScaler calls `step`, and `finish` can refuse it
        self.watch()

    @property
    def optimizer(self) -> SteppedOptimizer:
        """The optimizer whose parameters are stepped."""
        optimizer = self._optimizer()
        assert optimizer is not None
        return optimizer

    def watch(self) -> None:
        """Register the hook on every trainable parameter that does not have it yet."""
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            owner, handle = _hooks.get(p) or (None, None)
            if p.requires_grad and p.is_leaf and (owner is None or owner() is not self):
                if handle is not None:
                    handle.remove()
                _hooks[p] = weakref.ref(self), _register_hook(p, weakref.ref(self))

    def close(self) -> None:
        """Remove the hooks, so that the optimizer takes ordinary steps."""
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            owner, handle = _hooks.get(p) or (None, None)
            if owner is not None and handle is not None and owner() is self:
                handle.remove()
                del _hooks[p]
        for group in self.optimizer.param_groups:
            group.pop(PREVIOUS, None)
        del self.optimizer._step_supports_amp_scaling
        self.optimizer.fused = None

    @contextmanager
    def norm_pass(self) -> Iterator[dict[str, float]]:
        """Measure the norms in a separate backward pass, which steps nothing.

        Yields:
            A dictionary that has the norm of every group by its name once the block has ended.

        Raises:
            FloatingPointError: a gradient is not finite under `on_nonfinite="raise"`; nothing was written.
            RuntimeError: a backward pass has begun to step.
        """
        if self._steps:
            raise RuntimeError("norm_pass: a backward pass has stepped already; call step() first")
        norms: dict[str, float] = {}
        self._only_norms = True
        try:
            yield norms
            norms.update({k: math.sqrt(x.item()) for k, x in self._squares.items()})
        finally:
            self._only_norms = False
            self._end()
        for group in self.optimizer.param_groups:
            if group["on_nonfinite"] == "raise" and not math.isfinite(norms.get(group["name"], 0.0)):
                raise FloatingPointError(f"gradient not finite in group {group['name']!r}; nothing was updated")
        self._norms = norms

    @torch.no_grad()
    def use(self, p: Tensor) -> None:
        """Step a parameter whose gradient has just been computed, and free the gradient.

        Args:
            p: the parameter.

        Raises:
            FloatingPointError: the gradient is not finite under `on_nonfinite="raise"`.
            RuntimeError: a second gradient before `step()`, or one that is not reduced yet.
        """
        if not self._steps:
            self._begin(self.optimizer.group_steps())
        step = self._steps.get(id(p))
        if step is None:
            return  # it was removed from its group
        if id(p) in self._done:
            raise RuntimeError(
                f"{step.params[0].plan.name}: a second gradient before step(). A fused backward pass applies each "
                "gradient at once and cannot accumulate: call step() after every backward pass "
                "(gradient_accumulation_steps=1, accumulate_grad_batches=1, no reentrant checkpointing), or remove "
                "fused_backward"
            )
        self._step(step)
        self._done.add(id(p))

    def finish(self, groups: Sequence[GroupStep]) -> None:
        """End the pass: step parameters that still have a gradient, and save the norms.

        Args:
            groups: groups of this step.

        Raises:
            RuntimeError: a GradScaler calls the step.
        """
        optimizer = self.optimizer
        if hasattr(optimizer, "found_inf"):
            raise RuntimeError(
                "a fused backward pass has applied gradients of a scaled loss, so the weights are wrong: no GradScaler "
                "(precision 16-mixed, --fp16) with fused_backward; train in bfloat16, or without fused_backward"
            )
        remaining = [group.only([s]) for group in groups for s in group.params if s.grad is not None]
        if remaining and not self._steps:
            self._begin(groups)
        for step in remaining:
            self._step(step)
        for group in optimizer.param_groups:
            if group["clip_norm"] is not None and group["name"] in self._squares:
                group[PREVIOUS] = math.sqrt(self._squares[group["name"]].item())
        self._norms = {}
        self._end()
        self.watch()

    def _begin(self, groups: Sequence[GroupStep]) -> None:
        self.optimizer.validate_shapes(groups)
        for group in groups:
            validate_fusion(group.rule, group.group, group.params)
            for s in group.params:
                if collectives.is_replicated(s.plan.param):
                    raise RuntimeError(
                        f"{s.plan.name}: every rank has this parameter whole, so DDP, FSDP1 or ZeRO reduces its "
                        "gradient after a fused backward pass has applied it; nothing was updated. Use FSDP2 "
                        "(fully_shard) or remove fused_backward"
                    )
        self._steps = {id(s.plan.param): group.only([s]) for group in groups for s in group.params}

    def _end(self) -> None:
        self._steps, self._squares = {}, {}
        self._done.clear()

    def _step(self, group: GroupStep) -> None:
        """Step the one parameter of a group."""
        s = group.params[0]
        s.grad = sharding.local_gradient(s.plan.param)
        if self._only_norms:
            self._measure(s, group.group)
        else:
            failures.depth += 1
            try:
                self.optimizer.take_step([group], self._clip)
            except FloatingPointError as error:
                reason = str(error).partition(";")[0]
                raise FloatingPointError(
                    f"{reason}; it was not updated, parameters before it in the pass were"
                ) from None
            finally:
                failures.depth -= 1
                if failures.named or failures.unnamed:
                    failures.warn()
        s.plan.param.grad = s.grad = None  # `s` is kept until the pass ends

    def _measure(self, step: ParamStep, group: dict[str, Any]) -> Tensor:
        norm = collectives.norm(step.plan.param, step.gradient())
        total = self._squares.get(group["name"])
        square = norm.square()
        self._squares[group["name"]] = square if total is None else total + square.to(total.device)
        return norm

    def _clip(self, groups: Sequence[GroupStep]) -> None:
        """Clip `p.grad`, which is freed after the step; the factor stays on the device."""
        for group in groups:
            settings, s = group.group, group.params[0]
            if settings["clip_norm"] is not None:
                norm = self._measure(s, settings)
                group_norm = self._norms.get(settings["name"])
                if group_norm is None:
                    norm = norm.clamp(min=settings.get(PREVIOUS, 0.0))
                else:
                    norm = torch.full_like(norm, group_norm)
                scale = (settings["clip_norm"] / (norm + 1e-6)).clamp(max=1.0)
                collectives.scale_gradient(s.plan.param, scale)
                s.grad = sharding.local_gradient(s.plan.param)


def _register_hook(p: Tensor, fused: weakref.ref[FusedBackward]) -> RemovableHandle:
    def hook(p: Tensor) -> None:
        if (owner := fused()) is not None:
            owner.use(p)

    return p.register_post_accumulate_grad_hook(hook)


def validate_fusion(rule: Rule, group: dict[str, Any], steps: Sequence[ParamStep]) -> None:
    """Check that a group can be stepped within the backward pass.

    Args:
        rule: rule of the group.
        group: settings of the group.
        steps: parameters of the group.

    Raises:
        ValueError: the rule, an option or a parameter does not allow it.
    """
    label = f"group {group['name']!r}: fused_backward"
    if rule.preconditioners and parse(group["refresh"]).needs_all:
        raise ValueError(
            f"{label} steps one parameter at a time, and refresh={group['refresh']!r} of {rule.name} spreads refreshes "
            'over all of them; give a policy that decides about each alone, as refresh="fixed:200"'
        )
    if rule.curvature_input:
        raise ValueError(f"{label} is not for {rule.name}, which needs a curvature estimate before a step")
    if group["on_nonfinite"] == "skip":
        raise ValueError(f'{label} cannot skip a step that has begun (on_nonfinite="skip"); "raise" can stop it')
    for s in steps:
        if is_flat(s.plan.param):
            raise ValueError(f"{s.plan.name}: fused_backward needs FSDP2, not FSDP1 or ZeRO")
        if s.plan.team is not None:
            raise ValueError(
                f"{s.plan.name}: fused_backward is not for {rule.name} on shards: its matrices are exchanged together"
            )
