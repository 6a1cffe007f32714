"""line_search."""

from __future__ import annotations

from types import SimpleNamespace
from typing import ClassVar, Literal, Protocol

from torch import Tensor

from lightning_optim.core.rule.base import CurvatureInput, Rule


class Objective(Protocol):
    """The loss of a step's batches around the present weights, which are one vector `[N]` here.

    Weight decay is part of it: 1/2 wd |x|^2. It is taken without dropout where a feed computes it.
    """

    x: Tensor
    """The present weights; float32 or wider, as are all vectors."""
    value: float
    """The loss there."""
    gradient: Tensor
    """Its gradient there."""

    def at(self, x: Tensor) -> tuple[float, Tensor]:
        """The loss and its gradient at other weights.

        Args:
            x: `[N]`.

        Returns:
            (loss, `[N]`).
        """
        ...

    def product(self, v: Tensor) -> Tensor:
        """The Gauss-Newton matrix at the present weights times a vector.

        Args:
            v: `[N]`.

        Returns:
            `[N]`.

        Raises:
            RuntimeError: only a curvature feed can tell, and there is none.
        """
        ...


class GlobalStepRule(Rule, abstract=True):
    """Base of rules that look for the step of all their parameters at once, by the loss of the batch at other weights.

    They implement `find`. A slot `"mn"` is one vector `[N]` there, any other is one row of numbers that belongs to
    all parameters. The loss comes from a curvature feed or, in a loop of one's own, from the closure given to `step`.
    """

    curvature_input: ClassVar[CurvatureInput | None] = "loss"
    needs_all_gradients: ClassVar[bool] = True
    decay: ClassVar[Literal["before", "after", "coupled", "own"]] = "own"

    def direction(self, at: Objective, s: SimpleNamespace) -> Tensor:
        """The direction d of x <- x - lr d, and the new state.

        Args:
            at: the loss.
            s: state by slot name; mutate in place or assign.

        Returns:
            `[N]`. Not called while lr is 0.
        """
        raise NotImplementedError

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        return g
