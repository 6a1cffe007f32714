"""The contract of rules that compute one step for all their parameters from the loss at other weights (L-BFGS, ...)."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from lightning_optim.core.rule.base import CurvatureInput, Rule


class Objective(Protocol):
    """The loss of a step's batches as a function of all weights, which are one vector `[N]` here.

    It includes weight decay: 1/2 wd |x|^2. Where a curvature estimator computes it, it is evaluated without dropout.
    """

    x: Tensor
    """The current weights; float32 or wider, as are all vectors."""
    value: float
    """The loss at the current weights."""
    gradient: Tensor
    """The gradient at the current weights."""

    def at(self, x: Tensor) -> tuple[float, Tensor]:
        """The loss and its gradient at other weights.

        Args:
            x: `[N]`.

        Returns:
            (loss, `[N]`).
        """
        ...

    def product(self, v: Tensor) -> Tensor:
        """The Gauss-Newton matrix at the current weights times a vector.

        Args:
            v: `[N]`.

        Returns:
            `[N]`.

        Raises:
            RuntimeError: there is no curvature estimator, which alone can compute it.
        """
        ...


class GlobalStepRule(Rule, abstract=True):
    """Base of rules that compute one step for all their parameters at once, from the batch loss at other weights.

    They implement `direction`, in which a state tensor `"mn"` is one vector `[N]` and any other one row of numbers that
    belongs to all parameters. The loss comes from a curvature estimator or, in your own loop, from the closure given to
    `step`.
    """

    curvature_input: ClassVar[CurvatureInput | None] = "loss"
    needs_all_gradients: ClassVar[bool] = True
    decay: ClassVar[Literal["before", "after", "coupled", "own"]] = "own"

    def direction(self, at: Objective, s: SimpleNamespace) -> Tensor:
        """The direction d of x <- x - lr d, and the new state.

        Args:
            at: the loss, with its gradient and curvature.
            s: state tensors by name; mutate in place or assign.

        Returns:
            `[N]`. Not called while lr is 0.
        """
        raise NotImplementedError

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        return g
