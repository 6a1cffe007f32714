"""Declaration of a rule's state tensors: shape in letters, start value, and what storage formats they allow."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class StateSpec:
    """Declaration of one state tensor of a rule, with its shape in letters.

    Args:
        letters: two out of `m` (rows), `n` (columns), `r` (the rule's rank) and digits.
        fill: start value: a number, or `"eye"` for an identity per matrix.
        dtype: None for float32 (float64 for float64 parameters).
        rank: value of `r`; filled in by `Rule.state_specs`.
        nonnegative: whether no value is ever below zero (second moments); 8-bit storage has a finer map for them.
        exact: whether the values must be stored in full precision (a basis); square state tensors always are.
        size: (rows, columns) where letters cannot express them.
        dims: (matrices, rows, columns) to which it belongs, where a parameter is split into matrices of several sizes;
            filled in by the optimizer.
    """

    letters: str
    fill: float | Literal["eye"] = 0.0
    dtype: torch.dtype | None = None
    rank: int | None = None
    nonnegative: bool = False
    exact: bool = False
    size: tuple[int, int] | None = None
    dims: tuple[int, int, int] | None = None

    def shape(self, m: int, n: int) -> tuple[int, int]:
        """The shape of this state tensor for one `m x n` matrix.

        Returns:
            (rows, columns).

        Raises:
            ValueError: the shape has an `r`, and `rank` is not filled in.
        """
        if self.size is not None:
            return self.size
        size = {"m": m, "n": n, "r": self.rank}
        rows, columns = (size[x] if x in size else int(x) for x in self.letters)
        if rows is None or columns is None:
            raise ValueError(f"the rank of state {self.letters!r} is not known yet; use Rule.state_specs")
        return rows, columns


def zeros(
    letters: str, dtype: torch.dtype | None = None, *, nonnegative: bool = False, exact: bool = False
) -> StateSpec:
    """Declare a state tensor that starts at zero.

    Returns:
        The declaration.
    """
    return StateSpec(letters, 0.0, dtype, nonnegative=nonnegative, exact=exact)


def eye(letters: str, dtype: torch.dtype | None = None) -> StateSpec:
    """Declare a square state tensor that starts as the identity.

    Returns:
        The declaration.
    """
    return StateSpec(letters, "eye", dtype)
