"""An exception in a probe never ends the run: it is one warning, and the probe stops measuring on all ranks."""

from __future__ import annotations

import contextlib
import traceback
import warnings
from collections.abc import Callable, Mapping
from typing import Any, ClassVar, TypeVar

import torch

from lightning_optim.diagnostics.probes.context import TrainingContext
from lightning_optim.diagnostics.report import Report, summed

T = TypeVar("T")
ENTRY_POINTS: Mapping[str, Callable[[], Any]] = {
    "start": lambda: None,
    "begin_batch": lambda: None,
    "record_batch": lambda: None,
    "after_forward": lambda: None,
    "after_backward": lambda: None,
    "before_optimizer_step": lambda: None,
    "on_exception": lambda: None,
    "end_batch": lambda: None,
    "stop": lambda: None,
    "layout": dict,
    "state_dict": dict,
    "load_state_dict": lambda: None,
}
"""The methods of a probe that a framework calls, and what they return once the probe has stopped measuring."""


class SettingError(ValueError):
    """A setting that the run cannot honor. It is raised, where any other exception only ends the measuring."""


class OtherRankError(RuntimeError):
    """The probe of another rank has failed."""


class FailureContainment:
    """Base of `Probe` that turns exceptions of its entry points into one warning.

    A failure on one rank reaches the others with the next measurement, at the exchange that all ranks take part in.
    """

    remedy: ClassVar[str] = "leave it out, or change its arguments"
    """What a user can do where the probe fails."""
    _in_entry_point = False
    """True while a method that a framework calls is running."""
    context: TrainingContext | None

    def __init__(self) -> None:
        self.title = type(self).__name__
        """Name of the probe in warnings: the name of its callback."""
        self.stopped = False
        """True once the probe measures no more in this run, after an exception."""
        self._in_exchange = False
        """True while all ranks are in the same part of a measurement, so that the next exchange reports a failure."""
        self._unreported_failure = False
        """True while the other ranks do not know yet that this one has failed."""
        self._handles: list[Any] = []
        self._pending_report: Report | None = None

    def __getattribute__(self, name: str) -> Any:
        """Guard the entry points, whichever class overrides them."""
        value = object.__getattribute__(self, name)
        if name not in ENTRY_POINTS or object.__getattribute__(self, "_in_entry_point"):
            return value
        return lambda *args, **kwargs: self._call_entry_point(name, value, args, kwargs)

    def _call_entry_point(self, name: str, call: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        default = ENTRY_POINTS[name]()
        if name == "load_state_dict":
            return self._load_state(call, *args, **kwargs)
        if self.stopped and name not in ("start", "stop", "state_dict"):
            if self._unreported_failure and name == "end_batch" and self._pending_report is not None:
                self._report_failure()
            if not self._unreported_failure:
                self._remove_hooks()
            return default
        out = self._call_guarded(call, name, args, kwargs)
        return default if self.stopped and out is None else out

    def _load_state(self, load: Callable[[Any], None], state: Mapping[str, Any]) -> None:
        """Continue from a saved state. A probe that had failed saved an empty one."""
        if not state:
            return
        try:
            self._in_entry_point = True
            load(state)
        except Exception as error:
            warnings.warn(
                f"{self.title} starts over, as it cannot read its state in the checkpoint: "
                f"{type(error).__name__}: {error}",
                stacklevel=4,
            )
        finally:
            self._in_entry_point = False

    def safely(self, call: Callable[..., T], *args: Any) -> T | None:
        """Call a function that belongs to measuring. An exception becomes a warning and ends the measuring.

        Args:
            call: a function that writes reports, say.
            *args: its arguments.

        Returns:
            What the call returns; None if the probe has stopped.

        Raises:
            SettingError: a setting that cannot be honored.
        """
        return None if self.stopped else self._call_guarded(call, getattr(call, "__name__", "a call"), args, {})

    def _call_guarded(self, call: Callable[..., T], name: str, args: Any, kwargs: Any) -> T | None:
        outer, self._in_entry_point = self._in_entry_point, True
        try:
            return call(*args, **kwargs)
        except SettingError:
            raise
        except Exception as error:
            if outer:
                raise
            self._in_entry_point = False
            if isinstance(error, OtherRankError):
                self.give_up("it failed on another rank, whose warning says why", alone=False)
            else:
                self.give_up(f"{type(error).__name__}: {error} ({_place_of(error)}, in {name})")
            return None
        finally:
            self._in_entry_point = outer

    def give_up(self, reason: str, *, alone: bool = True) -> None:
        """Stop measuring for the rest of the run, with one warning.

        Args:
            reason: the text of the warning.
            alone: whether the other ranks neither know the reason nor find it themselves.
        """
        if self.stopped:
            return
        self.stopped = True
        self._unreported_failure = alone and self.context is not None and self.context.ranks > 1
        self._release()
        if self._in_exchange:
            self._report_failure()
        warnings.warn(
            f"{self.title} stops measuring, and training continues without it: {reason.rstrip('.')}. "
            f"{self.remedy[0].upper()}{self.remedy[1:]}",
            stacklevel=2,
        )

    def _report_failure(self) -> None:
        """Tell the other ranks, which wait in an exchange, that this one has failed."""
        unreported, self._unreported_failure, self._in_exchange = self._unreported_failure, False, False
        if unreported:
            with contextlib.suppress(OtherRankError):
                self._exchange_failures(failed=True)

    def _exchange_failures(self, *, failed: bool = False) -> None:
        """Raise on all ranks if the probe of one has failed."""
        context = self.context
        if context is None or context.ranks == 1:
            return
        if summed(torch.tensor([float(failed)], device=context.device)).sum() > 0:
            raise OtherRankError

    def _remove_hooks(self) -> None:
        """Remove the optimizer's hooks. It must not be called within one of them, as torch iterates over them."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _release(self) -> None:
        """Call `clear`. An exception in it is only a warning, because there is nothing left to stop."""
        outer, self._in_entry_point = self._in_entry_point, True
        try:
            self.clear()
        except Exception as error:
            warnings.warn(f"{self.title} could not put everything away: {type(error).__name__}: {error}", stacklevel=3)
        finally:
            self._in_entry_point = outer

    def clear(self) -> None:
        """Remove hooks and copies at the end of a run."""


def _place_of(error: BaseException) -> str:
    """File and line where an exception was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    return f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "no traceback"
