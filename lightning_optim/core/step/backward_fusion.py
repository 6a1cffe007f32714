"""The step within the backward pass: every gradient is used as soon as it is there, then freed.

A hook on each parameter hands the executor a job of this one parameter; what happens then is an ordinary step.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_optim.core.parallel import collectives
from lightning_optim.core.parallel.flat_parameters import is_flat
from lightning_optim.core.rule import Rule
from lightning_optim.core.step.work import Job, Work
from lightning_optim.ops.lapack import failures

if TYPE_CHECKING:
    from lightning_optim.core.optimizer import RuleOptimizer


_hooks: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
"""Who steps a parameter within the backward pass, and the hook by which it does: (weak reference, handle)."""

PREVIOUS = "previous_norm"
"""Key of a param group that clips: the norm of its gradients in the step before."""


class FusedBackward:
    """Steps each parameter of an optimizer within the backward pass; made by `RuleOptimizer.fuse_backward`.

        optimizer.fuse_backward()
        loss.backward()      # steps; every gradient is None afterwards
        optimizer.step()     # ends the pass; schedulers step after it, as ever

    Without clipping the weights are those of ordinary steps, bit for bit. Exactly one backward pass belongs to each
    `step()`: gradients that are gone cannot be accumulated, and a second pass raises. `step()` itself steps parameters
    whose gradient came otherwise: assigned, or of a parameter that was frozen or replaced since the last step.

    The norm of a group (`clip_norm`) is not known before its last gradient. Each gradient is clipped by the larger of
    the norm in the step before, which is saved with the group, and its own; or by the group's own norm, as published
    by Lv et al. 2023 (arXiv:2306.09782), at the price of a second backward pass:

        with optimizer.fuse_backward().norm_pass():
            loss.backward(retain_graph=True)
        loss.backward()
        optimizer.step()

    `on_nonfinite="raise"` looks at each gradient before its parameter is written; parameters that came before it in the
    pass have moved. After a norm pass nothing has. To go on after an error call `zero_grad()` and `step()`.

    Refused: rules with costly state, which is refreshed in turns over all parameters, or with `curvature_input`; rules
    for whole matrices whose parameters are sharded, for they travel together; `on_nonfinite="skip"`; parameters that
    are whole on several ranks (DDP, FSDP1), whose gradients are not reduced yet when the hook runs; a `GradScaler`.
    FSDP2 works.

    Args:
        optimizer: whose parameters are stepped so until `close`. A parameter obeys the last such optimizer. Copies and
            unpickled optimizers take ordinary steps.

    Raises:
        ValueError: something of the above.
    """

    def __init__(self, optimizer: RuleOptimizer) -> None:
        self._optimizer = weakref.ref(optimizer)
        self._jobs: dict[int, Job] = {}
        """Of this pass, one per parameter; empty between passes."""
        self._done: set[int] = set()
        self._only_norms = False
        self._squares: dict[str, Tensor] = {}
        """By group, of the gradients of this pass."""
        self._norms: dict[str, float] = {}
        """By group, from a norm pass."""
        for job in optimizer._jobs():
            validate_fusion(job.rule, job.group, job.works)
        optimizer._step_supports_amp_scaling = True  # GradScaler then leaves it to `finish` to refuse
        self.watch()

    @property
    def optimizer(self) -> RuleOptimizer:
        """Whose parameters these are."""
        found = self._optimizer()
        assert found is not None
        return found

    def watch(self) -> None:
        """Hook every trainable parameter that is not hooked yet."""
        for p in (p for group in self.optimizer.param_groups for p in group["params"]):
            owner, handle = _hooks.get(p) or (None, None)
            if p.requires_grad and p.is_leaf and (owner is None or owner() is not self):
                if handle is not None:
                    handle.remove()
                _hooks[p] = weakref.ref(self), _hooked(p, weakref.ref(self))

    def close(self) -> None:
        """Go back to ordinary steps."""
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
        """Take the norms in a backward pass of its own, which steps nothing.

        Yields:
            A dictionary that holds the norm of every group by its name when the block has ended.

        Raises:
            FloatingPointError: a gradient is not finite and its group asks to raise; nothing was written.
            RuntimeError: a backward pass has begun to step.
        """
        if self._jobs:
            raise RuntimeError("norm_pass: a backward pass has stepped already; call step() first")
        found: dict[str, float] = {}
        self._only_norms = True
        try:
            yield found
            found.update({k: math.sqrt(x.item()) for k, x in self._squares.items()})
        finally:
            self._only_norms = False
            self._end()
        for group in self.optimizer.param_groups:
            if group["on_nonfinite"] == "raise" and not math.isfinite(found.get(group["name"], 0.0)):
                raise FloatingPointError(f"gradient not finite in group {group['name']!r}; nothing was updated")
        self._norms = found

    @torch.no_grad()
    def use(self, p: Tensor) -> None:
        """Step a parameter whose gradient has just come, and free the gradient.

        Args:
            p: the parameter.

        Raises:
            FloatingPointError: the gradient is not finite and its group asks to raise.
            RuntimeError: a second gradient before `step()`, or one that is not reduced yet.
        """
        if not self._jobs:
            self._begin(list(self.optimizer._jobs()))
        job = self._jobs.get(id(p))
        if job is None:
            return  # it left its group
        if id(p) in self._done:
            raise RuntimeError(
                f"{job.works[0].name}: a second gradient before step(). A fused backward pass uses each gradient at "
                "once and cannot accumulate: call step() after every backward pass (gradient_accumulation_steps=1, "
                "accumulate_grad_batches=1, no reentrant checkpointing), or do without fused_backward"
            )
        self._step(job)
        self._done.add(id(p))

    def finish(self, jobs: Sequence[Job]) -> None:
        """End the pass: step parameters that still have a gradient, and keep the norms.

        Args:
            jobs: of all groups.

        Raises:
            RuntimeError: a GradScaler makes the call.
        """
        optimizer = self.optimizer
        if hasattr(optimizer, "found_inf"):
            raise RuntimeError(
                "a fused backward pass has used gradients of a scaled loss: no GradScaler (precision 16-mixed, --fp16) "
                "with fused_backward; train in bfloat16, or without fused_backward. The weights have moved too far"
            )
        left = [w.param for job in jobs for w in job.works if w.has_gradient]
        if left and not self._jobs:
            self._begin(jobs)
        by_param = {id(w.param): Job(job.rule, job.group, [w]) for job in jobs for w in job.works}
        for p in left:
            self._step(by_param[id(p)])
        for group in optimizer.param_groups:
            if group["clip_norm"] is not None and group["name"] in self._squares:
                group[PREVIOUS] = math.sqrt(self._squares[group["name"]].item())
        self._norms = {}
        self._end()
        self.watch()

    def _begin(self, jobs: Sequence[Job]) -> None:
        self.optimizer._check_shapes(jobs)
        for rule, group, works in jobs:
            validate_fusion(rule, group, works)
            for w in works:
                if collectives.is_replicated(w.param):
                    raise RuntimeError(
                        f"{w.name}: every rank has this parameter whole, so DDP, FSDP1 or ZeRO reduces its gradient "
                        "after a fused backward pass has used it; nothing was updated. Use FSDP2 (fully_shard) or do "
                        "without fused_backward"
                    )
        self._jobs = {id(w.param): Job(rule, group, [w]) for rule, group, works in jobs for w in works}

    def _end(self) -> None:
        self._jobs, self._squares = {}, {}
        self._done.clear()

    def _step(self, job: Job) -> None:
        w, group = job.works[0], job.group
        if self._only_norms:
            self._measure(w, group)
        else:
            try:
                with failures.collected():
                    self.optimizer._take([job], self._clip)
            except FloatingPointError as error:
                said = str(error).partition(";")[0]
                raise FloatingPointError(f"{said}; it was not updated, parameters before it in the pass were") from None
        w.param.grad = None

    def _measure(self, w: Work, group: dict[str, Any]) -> Tensor:
        norm = collectives.norm(w.param, w.gradient())
        before = self._squares.get(group["name"])
        square = norm.square()
        self._squares[group["name"]] = square if before is None else before + square.to(before.device)
        return norm

    def _clip(self, jobs: Sequence[Job]) -> None:
        """Clip `p.grad`, which nobody sees again; the factor stays on the device."""
        for _, group, works in jobs:
            if group["clip_norm"] is not None:
                own = self._measure(works[0], group)
                known = self._norms.get(group["name"])
                norm = own.clamp(min=group.get(PREVIOUS, 0.0)) if known is None else torch.full_like(own, known)
                scale = (group["clip_norm"] / (norm + 1e-6)).clamp(max=1.0)
                collectives.scale_gradient(works[0].param, scale)


def _hooked(p: Tensor, fused: weakref.ref[FusedBackward]) -> RemovableHandle:
    def hook(p: Tensor) -> None:
        if (found := fused()) is not None:
            found.use(p)

    return p.register_post_accumulate_grad_hook(hook)


def validate_fusion(rule: Rule, group: dict[str, Any], works: Sequence[Work]) -> None:
    """Check that a group can be stepped within the backward pass.

    Args:
        rule: of the group.
        group: its settings.
        works: its parameters.

    Raises:
        ValueError: it cannot.
    """
    said = f"group {group['name']!r}: fused_backward"
    if rule.preconditioners:
        raise ValueError(f"{said} is not for {rule.name}, whose refreshes are spread over all parameters of a step")
    if rule.curvature_input:
        raise ValueError(f"{said} is not for {rule.name}, which is shown the curvature before a step")
    if group["on_nonfinite"] == "skip":
        raise ValueError(f'{said} cannot leave out a step that has begun (on_nonfinite="skip"); "raise" can stop it')
    for w in works:
        if is_flat(w.param):
            raise ValueError(f"{w.name}: fused_backward needs FSDP2, not FSDP1 or ZeRO")
        if w.team is not None:
            raise ValueError(f"{w.name}: fused_backward is not for {rule.name} on shards: its matrices travel together")
