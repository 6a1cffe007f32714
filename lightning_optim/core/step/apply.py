"""p <- p - lr wd p - lr factor d, with the rounding of narrow weights, and the units of work of a step.

Nothing else writes a parameter. What becomes of a unit that fails is said in `core.step.recovery`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lightning_optim.core.matrix_views import cache_blocks, transpose_if
from lightning_optim.core.rule import DirectionByRows
from lightning_optim.core.state.formats import COMPENSATION
from lightning_optim.core.state.quantized_view import ElementIndex, no_index
from lightning_optim.core.step import constraints
from lightning_optim.core.step.constraints import Factors
from lightning_optim.core.step.records import Backup, GroupStep, ParamStep, count_steps, state_of
from lightning_optim.core.step.recovery import PartlyWritten, try_again
from lightning_optim.ops.rounding import hash_key, stochastic_round
from lightning_optim.ops.row_chunks import row_chunks, take_rows

T = TypeVar("T")


def surely(work: Callable[..., T], *args: Any) -> T:
    """Do something after which a step is complete; if it fails, once more, as temporaries have been freed.

    Args:
        work: leaves everything as it was if it fails, or does the same again. Not a collective call.
        *args: of `work`.

    Returns:
        What it returns.

    Raises:
        PartlyWritten: it fails twice.
    """
    try:
        return work(*args)
    except PartlyWritten:
        raise
    except Exception as error:
        return try_again(work, *args, error=error)


def apply_directions(group: GroupStep, steps: Sequence[ParamStep], directions: Sequence[Tensor]) -> None:
    """Take the steps of parameters with one `stack_id`, given their directions on this rank.

    Args:
        group: of the parameters.
        steps: the parameters.
        directions: shaped like the local parts of the parameters, in the dtype of the arithmetic.
    """
    write = ParamWriter(group, steps[0])
    if not write.is_plain:
        for s, d in zip(steps, directions, strict=True):
            apply_direction(group, s, d)
        return
    params = [s.local() if s.plan.is_sharded else s.plan.param for s in steps]
    if params[0].device.type == "cpu":
        for p, d in zip(params, directions, strict=True):
            write(p, d)
        return
    foreach, decays = cast("Any", torch), write.keep != 1
    if decays and write.decay == "before":
        foreach._foreach_mul_(params, write.keep)
    foreach._foreach_add_(params, list(directions), alpha=-write.step)
    if decays and write.decay == "after":
        foreach._foreach_mul_(params, write.keep)


def apply_direction(group: GroupStep, step: ParamStep, d: Tensor) -> None:
    """Take the step of one parameter, given its direction on this rank.

    Args:
        group: of the parameter.
        step: the parameter.
        d: shaped like the local part of the parameter, in the dtype of the arithmetic.
    """
    write, p = ParamWriter(group, step), step.local()
    rows = None
    if group.plan.has_constraint:
        rows = write.factors(step, d) if step.plan.is_sharded else surely(write.factors, step, d)
    if p.dtype == d.dtype:
        surely(write, p, d, None, None, rows)
        return
    where = ElementIndex(p, step.plan.param) if write.is_stochastic else None
    expanded = [t.expand(p.shape) for t in rows or ()]
    tensors = [p, d, *expanded, *write.compensation, *(where.tensors if where else [])]
    for (pb, db, *rest), cut in cache_blocks(tensors):
        at, rest = rest[: len(expanded)], rest[len(expanded) :]
        compensation, block_index = rest[: len(write.compensation)], rest[len(write.compensation) :]
        index = no_index if where is None else functools.partial(where, pb, cut, block_index)
        surely(write, pb, db, index, compensation[0] if compensation else None, Factors(*at) if at else None)


def apply_by_rows(group: GroupStep, step: ParamStep, direction: DirectionByRows) -> None:
    """Take the step of one parameter in chunks of rows.

    Args:
        group: of the parameter.
        step: a parameter whose memory is that of its matrices.
        direction: gives the direction of some rows.
    """
    write = ParamWriter(group, step)
    p = transpose_if(step.local(), step.plan.transposed).view(step.plan.dims)
    for run in row_chunks(p):
        write(take_rows(p, run), surely(direction, run))


class ParamWriter:
    """Writes blocks of one parameter, or of several with equal plans where `is_plain`."""

    def __init__(self, group: GroupStep, step: ParamStep):
        """Compute the numbers of a step.

        Args:
            group: of the parameter.
            step: the parameter.
        """
        rule, options, plan = group.rule, group.group, step.plan
        masked = options["cautious_decay"]
        self.lr, self.factor = rule.lr, plan.factor
        self.step = self.lr * self.factor
        self.keep = 1.0 if masked is True else 1 - rule.lr * rule.weight_decay
        self.decay = rule.decay
        self.cautious = 1 - rule.lr * (rule.weight_decay if masked is True else masked)
        """What cautious decay leaves of a weight that the step moves towards zero."""
        self.pinned = options["cautious_when"] == "after_pin"
        self.late = self.pinned or (masked is True and rule.decay == "after")
        self.options = options
        self.dtype = plan.compute_dtype
        self.is_stochastic = plan.dtype == torch.bfloat16 and options["param_rounding"] == "stochastic"
        self.key = hash_key(options["seed"], step.t, plan.index) if self.is_stochastic else 0
        self.compensation = [step.local_state(COMPENSATION)] if plan.is_compensated else []
        """The rounding error of the weights, if it is kept."""
        self.is_plain = plan.dtype == self.dtype and self.cautious == 1 and not group.plan.has_constraint
        """The step is p <- keep p - step d."""

    def factors(self, step: ParamStep, d: Tensor) -> Factors:
        """What a constraint makes of the step, for every row.

        Args:
            step: the parameter.
            d: its direction.

        Returns:
            The factors.
        """
        decays = self.decay in ("before", "after")
        keep, cautious = self.keep if decays else 1.0, 1.0 if self.late else self.cautious
        plain = constraints.Step(self.lr, self.factor, keep, cautious, self.decay == "after")
        return constraints.factors(self.options, step, d, plain, self.compensation[0] if self.compensation else None)

    def __call__(
        self,
        p: Tensor,
        d: Tensor,
        index: Callable[[], Tensor] | None = None,
        compensation: Tensor | None = None,
        rows: Factors | None = None,
    ) -> None:
        """Write one block.

        Args:
            p: a view of the parameter.
            d: its direction.
            index: gives the global indices of its elements, where the weights are rounded stochastically.
            compensation: the block of `self.compensation`, if any.
            rows: the block of the factors of a constraint, if any.
        """
        x = p.to(self.dtype)  # p itself, or a copy
        if compensation is not None:
            x.add_(compensation)
        mask = self._cautious_factor(x, d, rows) if self.cautious != 1 else None
        if rows is not None:
            x.mul_(rows.keep + rows.lift if mask is None or self.late else rows.keep * mask + rows.lift)
            x.addcmul_(d, rows.step, value=-1)
        else:
            if self.decay == "before" and self.keep != 1:
                x.mul_(self.keep)
            if mask is not None and not self.late:
                x.mul_(mask)
            x.add_(d, alpha=-self.step)
            if self.decay == "after" and self.keep != 1:
                x.mul_(self.keep)
        if mask is not None and self.late:
            x.mul_(mask)
        if x is p:
            return
        if self.is_stochastic and index is not None:
            p.copy_(stochastic_round(x, index(), self.key))
        else:
            p.copy_(x)
        if compensation is not None:
            compensation.copy_(x.sub_(p))

    def _cautious_factor(self, x: Tensor, d: Tensor, rows: Factors | None) -> Tensor:
        """What cautious decay leaves of every weight: less of those that the step moves towards zero."""
        toward = x * d if rows is None else x * (d - rows.brake * x)
        taken = (toward > 0 if self.pinned else toward >= 0).to(x.dtype)
        return taken.mul_(self.cautious - 1).add_(1)


def is_written_at_once(group: GroupStep, step: ParamStep) -> bool:
    """Whether a weight is written by operations in place that need no memory and no communication.

    Args:
        group: of the parameter.
        step: the parameter.

    Returns:
        False where it is rounded, or its norm or the signs of the step matter.
    """
    plan = step.plan
    return plan.dtype is plan.compute_dtype and not group.group["cautious_decay"] and not group.plan.has_constraint


class Transaction:
    """What became of the units of one step."""

    def __init__(self, groups: Iterable[GroupStep] = ()) -> None:
        """Copy the state of rules that write it for all their parameters at once, before each is stepped.

        Args:
            groups: of the step.
        """
        together = [s for group in groups if group.rule.needs_all_gradients for s in group.params if s.grad is not None]
        self._early = {id(s): Backup(state_of(s)) for s in together}
        self.failed: dict[int, ParamStep] = {}
        """Parameters that did not take the step, by the identity of their record."""
        self.error: Exception | None = None
        self.half_updated: list[ParamStep] = []
        """Those of `failed` that were not restored."""
        self.is_disconnected = False
        """A collective call failed: the others may wait for ever, or raise one by one, and are not made."""

    def run(
        self,
        work: Callable[[], object],
        steps: Sequence[ParamStep],
        backup: Callable[[], Iterable[Tensor]] = tuple,
        *,
        collective: bool = False,
    ) -> None:
        """Do one unit of work.

        Args:
            work: updates parameters.
            steps: the parameters.
            backup: gives the tensors that are written before everything that can fail has been done.
            collective: whether it communicates.
        """
        if collective and self.is_disconnected:
            self.fail(steps, None)
            return
        saved = None
        try:
            saved = Backup(backup())
            work()
        except Exception as error:
            if saved is not None:
                saved.restore()
            self.is_disconnected = self.is_disconnected or collective
            self.fail(steps, error)

    def fail(self, steps: Sequence[ParamStep], error: Exception | None) -> None:
        """Note that parameters did not take the step.

        Args:
            steps: the parameters, which are as they were before the step but for `PartlyWritten`.
            error: why.
        """
        if isinstance(error, PartlyWritten):
            self.half_updated += [s for s in steps if id(s) not in self._early]
        for s in steps:
            s.views = {}  # nothing of it is stored any more
            if id(s) in self._early:
                self._early.pop(id(s)).restore()
        self.failed |= {id(s): s for s in steps}
        self.error = self.error or error

    def keep(self, steps: Iterable[ParamStep]) -> None:
        """Copy weights and state of parameters that several units write, to restore them if one of these fails.

        Args:
            steps: the parameters.
        """
        self._early |= {id(s): Backup([s.local(), *state_of(s)]) for s in steps}

    def taken(self, steps: Sequence[ParamStep]) -> Sequence[ParamStep]:
        """The parameters that took the step.

        Args:
            steps: parameters.

        Returns:
            All but those that failed.
        """
        return [s for s in steps if id(s) not in self.failed] if self.failed else steps

    def finish(self, steps: Sequence[ParamStep]) -> None:
        """Count the step of the parameters that took it, and raise if a unit failed.

        Args:
            steps: parameters with a gradient.

        Raises:
            RuntimeError: with the names of the parameters that did not take the step.
        """
        count_steps(self.taken(steps))
        if self.error is not None:
            half = f", but for parts of {_names(self.half_updated)}" if self.half_updated else ""
            raise RuntimeError(
                f"{_names(list(self.failed.values()))}: not updated{half} ({type(self.error).__name__}: {self.error}). "
                "All other parameters have taken this step: do not take it again"
            ) from self.error


def _names(steps: Sequence[ParamStep]) -> str:
    label = ", ".join([s.plan.name for s in steps[:5]])
    return f"{label} and {len(steps) - 5} more" if len(steps) > 5 else label
