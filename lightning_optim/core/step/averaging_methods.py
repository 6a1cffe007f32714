"""Averaging methods that wrap any optimizer: look-ahead gradients, weight averages for evaluation, outer optimizers.

Each method is a frozen dataclass of settings with pure functions on one parameter; `weight_averaging` applies them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor

from lightning_optim.core.rule import check_value, nearest
from lightning_optim.core.state.formats import compute_dtype_of

COUNTERS: dict[str, Any] = {"train_mode": True, "average_step": 0, "average_shift": 0.0, "average_count": 0}
"""Keys and start values that wrapping adds to every param group."""


@dataclass(frozen=True)
class AveragingMethod:
    """Base of the methods by which an optimizer can be wrapped."""

    name: ClassVar[str]
    keys: ClassVar[tuple[str, ...]]
    """Keys of its state tensors in `state[p]`, shaped like the parameter."""
    takes_low_precision: ClassVar[bool] = False
    """Whether the method supports bfloat16 and float16 weights."""

    def __post_init__(self) -> None:
        """Check the settings."""
        hints = get_type_hints(type(self))
        for f in fields(self):
            check_value(f"{self.name}: {f.name}", getattr(self, f.name), hints[f.name])

    def init(self, key: str, x: Tensor) -> Tensor:
        """The start value of a state tensor.

        Args:
            key: key of the state tensor.
            x: this rank's shard of a parameter.

        Returns:
            A new tensor.
        """
        del key
        return x.to(compute_dtype_of(x.dtype), copy=True)

    def after_step(self, x: Tensor, s: Mapping[str, Tensor], t: int, count: int) -> None:
        """Update the state after a step, or change the parameter.

        Args:
            x: this rank's shard of the parameter, after the step.
            s: state tensors of the method, on this rank.
            t: number of earlier steps.
            count: number of earlier steps that a `TailEMA` has averaged.
        """

    def is_active(self, t: int, total: int | None) -> bool:
        """Whether the method is applied after a step.

        Args:
            t: number of earlier steps.
            total: number of steps of the run, if known.

        Returns:
            True if `after_step` is to be called.
        """
        return True

    def eval_weights(self, x: Tensor, s: Mapping[str, Tensor]) -> Tensor:
        """The averaged weights.

        Args:
            x: training weights without a look-ahead.
            s: state tensors of the method, on this rank.

        Returns:
            The training weights themselves, or averaged ones.
        """
        return x


@dataclass(frozen=True)
class EMANesterov(AveragingMethod):
    """EMA-Nesterov: gradients are evaluated at weights extrapolated along their recent motion.

    B <- beta B + (1 - beta) (W - W_before), after every step; the next gradient is that at W + step_size (lr / lr_0) B,
    and the step is taken from there

    lr is that of group 0, lr_0 its initial value. Weights are extrapolated from step `start` on and before step `stop`
    (counted from 0; a float is a fraction of the run, `optimizer.total_steps`). `step(closure)` extrapolates for the
    closure only; after a step without one, the weights stay extrapolated until `eval()`. State: two tensors as large as
    the weights, which must be float32.

    Source: arXiv:2605.25395; modded-nanogpt, track 3, pull requests 308, 309, 321: 0.3 on SOAP-Muon, 0.6 on Muon.
    """

    step_size: float = 0.3
    beta: float = 0.99
    start: int | float = 300
    stop: int | float | None = None

    name: ClassVar = "ema_nesterov"
    keys: ClassVar = ("lookahead", "anchor")

    def init(self, key: str, x: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros_like(x) if key == "lookahead" else x.clone()

    def after_step(self, x: Tensor, s: Mapping[str, Tensor], t: int, count: int) -> None:  # noqa: D102
        s["lookahead"].lerp_(x - s["anchor"], 1 - self.beta)
        s["anchor"].copy_(x)

    def ahead(self, t: int, total: int | None, ratio: float) -> float:
        """The factor of B by which weights are extrapolated for the gradient of a step.

        Args:
            t: number of earlier steps.
            total: number of steps of the run, if known.
            ratio: lr / lr_0.

        Returns:
            The factor; 0 outside of `start` to `stop`.
        """
        stop = _resolve_step(self.stop, total)
        has_begun = (start := _resolve_step(self.start, total)) is not None and t >= start
        return self.step_size * ratio if has_begun and (stop is None or t < stop) else 0.0


@dataclass(frozen=True)
class TailEMA(AveragingMethod):
    """Tail EMA: average the weights towards the end of a run, and evaluate a mix of weights and average.

    E <- E + (W - E) / tau, from step `start` on, where E is W; evaluate (1 - weight) W + weight E

    `start` as a float is a fraction of the run, `optimizer.total_steps`, which then must be set. Embeddings keep their
    training weights in evaluation. State: one tensor as large as the weights, one more while evaluating.

    Source: modded-nanogpt, track 3, pull requests 325 and 328.
    """

    start: int | float = 0
    tau: float = 150.0
    weight: float = 0.6

    name: ClassVar = "tail_ema"
    keys: ClassVar = ("tail",)
    takes_low_precision: ClassVar = True

    def is_active(self, t: int, total: int | None) -> bool:  # noqa: D102
        start = _resolve_step(self.start, total)
        return start is not None and t >= start

    def after_step(self, x: Tensor, s: Mapping[str, Tensor], t: int, count: int) -> None:  # noqa: D102
        weights = x.to(s["tail"].dtype)
        if count == 0:
            s["tail"].copy_(weights)
        s["tail"].lerp_(weights, 1 / max(1.0, self.tau))

    def eval_weights(self, x: Tensor, s: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return x.to(s["tail"].dtype).lerp(s["tail"], self.weight).to(x.dtype)


@dataclass(frozen=True)
class MuLoCo(AveragingMethod):
    """MuLoCo with one worker: an outer Nesterov step along the displacement of every `every` steps.

    D = S - W;  u <- momentum u + lr D;  W <- S - momentum u - lr D;  S <- W        every `every` steps

    With lr 1 and momentum 0 this is the inner optimizer. State: two tensors as large as the weights, which must be
    float32.

    Source: Therien et al. 2025, arXiv:2505.23725; constants as in modded-nanogpt, track 3, pull request 277.
    """

    every: int = 30
    lr: float = 0.7
    momentum: float = 0.5

    name: ClassVar = "muloco"
    keys: ClassVar = ("outer_momentum", "outer_anchor")

    def init(self, key: str, x: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros_like(x) if key == "outer_momentum" else x.clone()

    def after_step(self, x: Tensor, s: Mapping[str, Tensor], t: int, count: int) -> None:  # noqa: D102
        if (t + 1) % max(1, self.every) == 0:
            displacement = s["outer_anchor"] - x
            s["outer_momentum"].mul_(self.momentum).add_(displacement, alpha=self.lr)
            x.copy_(s["outer_anchor"])
            x.add_(s["outer_momentum"], alpha=-self.momentum).add_(displacement, alpha=-self.lr)
            s["outer_anchor"].copy_(x)


AVERAGES: dict[str, type[AveragingMethod]] = {cls.name: cls for cls in (EMANesterov, TailEMA, MuLoCo)}
"""Methods by name, as in `build_optimizer(..., averaging={"tail_ema": {"start": 0.9}})`."""


def averages_of(settings: Mapping[str, Mapping[str, Any]]) -> list[AveragingMethod]:
    """Make averaging methods from plain settings.

    Args:
        settings: settings of each method, by the names of `AVERAGES`.

    Returns:
        The averaging methods.

    Raises:
        ValueError: an unknown name or setting.
    """
    out = []
    for name, kwargs in settings.items():
        if name not in AVERAGES:
            raise ValueError(f"averaging: unknown name {name!r}; {nearest(name, list(AVERAGES))}")
        names = [f.name for f in fields(AVERAGES[name])]
        for key in kwargs:
            if key not in names:
                raise ValueError(f"{name} has no setting {key!r}; {nearest(key, names)}")
        out.append(AVERAGES[name](**kwargs))
    return out


def _resolve_step(step: float | None, total: int | None) -> float | None:
    """Convert a step that may be a fraction of the run; None where there is none, or the run's length is unknown."""
    if step is None or isinstance(step, int):
        return step
    return None if total is None else step * total
