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

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from torch import Tensor

from lightning_optim.core.step.records import Backup
from lightning_optim.core.step.stacks import version

T = TypeVar("T")


class PartlyWritten(RuntimeError):
    """A step of a parameter failed twice in one place, after other parts of the parameter had been written."""


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
