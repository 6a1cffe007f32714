"""What a training run measures: its losses, how it ended, and the time it took."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch


@dataclass
class Stopwatch:
    """Wall-clock time and processor time of everything inside `with watch.running():`.

    Processor time is that of all threads. Runs on a busy machine can be compared by it. On an accelerator it means
    little, and the clocks are read after the device has finished.
    """

    device: str
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    _begin: tuple[float, float] = (0.0, 0.0)

    def now(self) -> tuple[float, float]:
        """Both clocks.

        Returns:
            (wall-clock time, processor time), in seconds.
        """
        if self.device != "cpu":
            torch.accelerator.synchronize()
        return time.perf_counter(), time.process_time()

    def start(self, *_: Any) -> None:
        """Start the watch. Arguments are ignored, so that this can be a hook of an optimizer."""
        self._begin = self.now()

    def stop(self, *_: Any) -> None:
        """Stop the watch, and add up."""
        end = self.now()
        self.seconds += end[0] - self._begin[0]
        self.cpu_seconds += end[1] - self._begin[1]

    @property
    def spent(self) -> float:
        """The time that counts against a budget in seconds: processor time on a CPU."""
        return self.cpu_seconds if self.device == "cpu" else self.seconds

    @contextmanager
    def running(self) -> Iterator[None]:
        """Measure a block.

        Yields:
            Nothing.
        """
        self.start()
        try:
            yield
        finally:
            self.stop()


@dataclass
class TrialResult:
    """Losses, status and times of a run, filled in while the model trains."""

    training: Stopwatch
    """Training without evaluation."""
    stepping: Stopwatch
    """The optimizer alone."""
    status: str = "ok"
    why: str = ""
    steps: int = 0
    tokens: int = 0
    clipped: int = 0
    """Steps whose gradient was clipped."""
    curve: list[dict[str, float]] = field(default_factory=list)

    def add_point(self, **metrics: float) -> None:
        """Append a point to the loss curve, with the progress and the times so far.

        Args:
            **metrics: the validation loss and other numbers.
        """
        progress = {"step": self.steps, "tokens": self.tokens}
        clocks = {"seconds": self.training.seconds, "cpu_seconds": self.training.cpu_seconds}
        self.curve.append(progress | clocks | metrics)

    def diverged(self, why: str) -> None:
        """End the run with a divergence.

        Args:
            why: the reason, in words.
        """
        self.status, self.why = "diverged", why
