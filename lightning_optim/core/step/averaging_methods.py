"""averaging_methods."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, get_type_hints

import torch
from torch import Tensor

from lightning_optim.core.rule import check_value, nearest
from lightning_optim.core.state.formats import compute_dtype_of

COUNTERS: dict[str, Any] = {"train_mode": True, "average_step": 0, "average_shift": 0.0, "average_count": 0}
"""Of every group of a wrapped optimizer."""


@dataclass(frozen=True)
class AveragingMethod:
    """Base of what an optimizer can be wrapped in."""

    name: ClassVar[str]
    slots: ClassVar[tuple[str, ...]]
    """Keys in `state[p]`, shaped like the parameter."""
    narrow: ClassVar[bool] = False
    """Whether bfloat16 and float16 weights are enough for it."""

    def __post_init__(self) -> None:
        """Check the settings."""
        hints = get_type_hints(type(self))
        for f in fields(self):
            check_value(f"{self.name}: {f.name}", getattr(self, f.name), hints[f.name])

    def init(self, key: str, x: Tensor) -> Tensor:
        """The start value of a slot.

        Args:
            key: of the slot.
            x: this rank's part of a parameter.

        Returns:
            A tensor of its own.
        """
        del key
        return x.to(compute_dtype_of(x.dtype), copy=True)

    def after_step(self, x: Tensor, s: Mapping[str, Tensor], t: int, count: int) -> None:
        """Take notice of a step, or change what it has made of a parameter.

        Args:
            x: this rank's part of the parameter, after the step.
            s: its slots, on this rank.
            t: steps before this one.
            count: of them in which `counts` was true.
        """

    def is_active(self, t: int, total: int | None) -> bool:
        """Whether it is at work in a step.

        Args:
            t: steps before this one.
            total: steps of the run, if known.

        Returns:
            True if so.
        """
        return True

    def eval_weights(self, x: Tensor, s: Mapping[str, Tensor]) -> Tensor:
        """What to evaluate in the place of weights.

        Args:
            x: weights that no look-ahead has shifted.
            s: slots on this rank.

        Returns:
            The weights themselves, or others.
        """
        return x


@dataclass(frozen=True)
class EMANesterov(AveragingMethod):
    """EMA-Nesterov: every gradient is taken ahead, where the weights have been going of late.

    B <- beta B + (1 - beta) (W - W_before), after every step; the next gradient is that at W + step_size (lr / lr_0) B,
    where the step is taken, too

    lr is that of group 0, lr_0 its first. Only in steps from `start` on and before `stop` (from 0; a float is a share
    of the run, `optimizer.total_steps`). `step(closure)` looks ahead for the closure only; after a step without one the
    weights are ahead until `eval()`. State: two tensors as large as the weights, which must be float32.

    Source: arXiv:2605.25395; modded-nanogpt, track 3, pull requests 308, 309, 321: 0.3 on SOAP-Muon, 0.6 on Muon.
    """

    step_size: float = 0.3
    beta: float = 0.99
    start: int | float = 300
    stop: int | float | None = None

    name: ClassVar = "ema_nesterov"
    slots: ClassVar = ("lookahead", "anchor")

    def init(self, key: str, x: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros_like(x) if key == "lookahead" else x.clone()

    def after_step(self, x: Tensor, s: Mapping[str, Tensor], t: int, count: int) -> None:  # noqa: D102
        s["lookahead"].lerp_(x - s["anchor"], 1 - self.beta)
        s["anchor"].copy_(x)

    def ahead(self, t: int, total: int | None, ratio: float) -> float:
        """How many B the gradient of a step is taken ahead.

        Args:
            t: steps before it.
            total: steps of the run, if known.
            ratio: lr / lr_0.

        Returns:
            The factor of B; 0 where it rests.
        """
        stop = resolved(self.stop, total)
        begun = (start := resolved(self.start, total)) is not None and t >= start
        return self.step_size * ratio if begun and (stop is None or t < stop) else 0.0


@dataclass(frozen=True)
class TailEMA(AveragingMethod):
    """Tail EMA: towards the end of a run average the weights, and evaluate between them and their average.

    E <- E + (W - E) / tau, from step `start` on, where E is W; evaluate (1 - weight) W + weight E

    `start` as a float is a share of the run, `optimizer.total_steps`, which then must be set. The weights of embeddings
    are left as they are. State: one tensor as large as the weights, one more while evaluating.

    Source: modded-nanogpt, track 3, pull requests 325 and 328.
    """

    start: int | float = 0
    tau: float = 150.0
    weight: float = 0.6

    name: ClassVar = "tail_ema"
    slots: ClassVar = ("tail",)
    narrow: ClassVar = True

    def is_active(self, t: int, total: int | None) -> bool:  # noqa: D102
        start = resolved(self.start, total)
        return start is not None and t >= start

    def after_step(self, x: Tensor, s: Mapping[str, Tensor], t: int, count: int) -> None:  # noqa: D102
        wide = x.to(s["tail"].dtype)
        if count == 0:
            s["tail"].copy_(wide)
        s["tail"].lerp_(wide, 1 / max(1.0, self.tau))

    def eval_weights(self, x: Tensor, s: Mapping[str, Tensor]) -> Tensor:  # noqa: D102
        return x.to(s["tail"].dtype).lerp(s["tail"], self.weight).to(x.dtype)


@dataclass(frozen=True)
class MuLoCo(AveragingMethod):
    """MuLoCo with one worker: every so many steps an outer Nesterov step over the way they have gone.

    D = S - W;  u <- momentum u + lr D;  W <- S - momentum u - lr D;  S <- W        every `every` steps

    With lr 1 and momentum 0 that is the inner optimizer. State: two tensors as large as the weights, which must be
    float32.

    Source: Therien et al. 2025, arXiv:2505.23725; constants as in modded-nanogpt, track 3, pull request 277.
    """

    every: int = 30
    lr: float = 0.7
    momentum: float = 0.5

    name: ClassVar = "muloco"
    slots: ClassVar = ("outer_momentum", "outer_anchor")

    def init(self, key: str, x: Tensor) -> Tensor:  # noqa: D102
        return torch.zeros_like(x) if key == "outer_momentum" else x.clone()

    def after_step(self, x: Tensor, s: Mapping[str, Tensor], t: int, count: int) -> None:  # noqa: D102
        if (t + 1) % max(1, self.every) == 0:
            way = s["outer_anchor"] - x
            s["outer_momentum"].mul_(self.momentum).add_(way, alpha=self.lr)
            x.copy_(s["outer_anchor"]).add_(s["outer_momentum"], alpha=-self.momentum).add_(way, alpha=-self.lr)
            s["outer_anchor"].copy_(x)


AVERAGES: dict[str, type[AveragingMethod]] = {cls.name: cls for cls in (EMANesterov, TailEMA, MuLoCo)}
"""By the names under which `build_optimizer(..., averaging={"tail_ema": {"start": 0.9}})` takes them."""


def averages_of(given: Mapping[str, Mapping[str, Any]]) -> list[AveragingMethod]:
    """Make averages of plain settings.

    Args:
        given: settings by the names of `AVERAGES`.

    Returns:
        The averages.

    Raises:
        ValueError: an unknown name or setting.
    """
    out = []
    for name, settings in given.items():
        if name not in AVERAGES:
            raise ValueError(f"averaging: unknown name {name!r}; {nearest(name, list(AVERAGES))}")
        known = [f.name for f in fields(AVERAGES[name])]
        for key in settings:
            if key not in known:
                raise ValueError(f"{name} has no setting {key!r}; {nearest(key, known)}")
        out.append(AVERAGES[name](**settings))
    return out


def resolved(at: float | None, total: int | None) -> float | None:
    """A step, given as such or as a share of the run.

    Returns:
        The step; None where there is none, or it is not known.
    """
    if at is None or isinstance(at, int):
        return at
    return None if total is None else at * total
