"""What a failure in the middle of a step leaves: a step is taken or it is not.

What can be known before the first write is checked there (`core.step.preflight`) and refuses the whole step. Later,
memory may run out, or a collective call may fail. The parameters of a unit of work (a stack of matrices, an exchange)
are then restored and not counted, all others take the step, and an error names those that did not: the result is that
of a step in which they had no gradient (`Transaction`).

State as large as the weights is not copied for that: it would make a step 1.1 to 2.2 times as long. A block of an
elementwise rule is updated in place after everything that can fail. If the first block fails, the parameter is as it
was; what follows the first write is tried again (`surely`), and only if it fails twice is a parameter left in between,
which the error says (`PartlyWritten`). In rules that reduce, the state of a lone matrix is in between if `update` fails
in its middle, unless it is small and therefore copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from lightning_optim.core.step.records import GroupStep, ParamStep, count_steps
from lightning_optim.core.step.stacks import version

T = TypeVar("T")


class PartlyWritten(RuntimeError):
    """A step of a parameter failed twice in one place, after other parts of the parameter had been written."""


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


def try_again(work: Callable[..., T], *args: Any, error: Exception) -> T:
    """Do something a second time.

    Args:
        work: has failed, and has left everything as it was.
        *args: of `work`.
        error: why.

    Returns:
        What it returns.

    Raises:
        PartlyWritten: it fails again.
    """
    try:
        return work(*args)
    except Exception:
        raise PartlyWritten(f"{type(error).__name__}: {error}") from error


class Backup:
    """Copies of tensors, to be written back without any allocation."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self._pairs = [(t, t.clone()) for t in tensors]

    def restore(self) -> None:
        """Write the copies back."""
        for t, copy in self._pairs:
            t.copy_(copy)


def restoring(tensors: Sequence[Tensor], work: Callable[..., object], *args: Any, copies: bool) -> None:
    """Do something that writes tensors; if it fails, they are as they were, or the error is `PartlyWritten`.

    Args:
        tensors: what it writes before everything that can fail has been done.
        work: what to do.
        *args: of `work`.
        copies: whether to copy the tensors first.

    Raises:
        PartlyWritten: it failed when it had written them, and there are no copies.
    """
    saved, versions = None, [version(t) for t in tensors]
    try:
        saved = Backup(tensors) if copies else None
        work(*args)
    except PartlyWritten:
        raise
    except Exception as error:
        if saved is not None:
            saved.restore()
        elif versions != [version(t) for t in tensors]:
            raise PartlyWritten(f"{type(error).__name__}: {error}") from error
        raise


def state_of(step: ParamStep) -> list[Tensor]:
    """The state tensors of a parameter on this rank that its rule writes.

    Args:
        step: the parameter.

    Returns:
        All but the count of steps, which is written at the end of a step.
    """
    return [step.local_state(key) for key in step.state if key != "step"]


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
