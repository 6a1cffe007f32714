"""The contract between an algorithm (a rule) and the executor that runs it.

A rule is a frozen dataclass. Its fields are the hyperparameters, class constants declare what it needs, and
`update` is the published algorithm on a stack of equal matrices `[b, m, n]` (`b` is often 1; a vector of length
n is `[1, 1, n]`). Elementwise rules get flat blocks instead and must not look at the shape.

From the declared state, and from nothing a gradient tells, the executor allocates, shards, checkpoints and prices
every tensor. A rule never sees a param group, `p.grad`, a process group or a DTensor check, and never writes the
gradient.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

ADAMW_RMS = 0.2
"""RMS of AdamW's direction per unit learning rate in language-model training (Liu et al. 2025, arXiv:2502.16982)."""

REGISTRY: dict[str, type[Rule]] = {}
"""Every rule that has been imported, by name."""


@dataclass(frozen=True)
class Slot:
    """One state tensor of a rule, declared by letters of its shape.

    Args:
        letters: two letters out of `m` (rows), `n` (columns), `r` (the rule's rank) and `1`.
        fill: start value: a number, or `"eye"` for an identity per matrix.
        dtype: None for float32 (float64 for float64 parameters).
    """

    letters: str
    fill: float | Literal["eye"] = 0.0
    dtype: torch.dtype | None = None

    def shape(self, m: int, n: int, rank: int = 1) -> tuple[int, int]:
        """The shape of this slot for one `m x n` matrix.

        Returns:
            (rows, columns).
        """
        size = {"m": m, "n": n, "r": rank, "1": 1}
        return size[self.letters[0]], size[self.letters[1]]


def zeros(letters: str, dtype: torch.dtype | None = None) -> Slot:
    """Declare a slot that starts at zero.

    Returns:
        The declaration.
    """
    return Slot(letters, 0.0, dtype)


def eye(letters: str, dtype: torch.dtype | None = None) -> Slot:
    """Declare a square slot that starts as the identity.

    Returns:
        The declaration.
    """
    return Slot(letters, "eye", dtype)


class Rule:
    """Base of every algorithm; see the module docstring for the contract.

    Subclasses are frozen dataclasses with at least the fields `lr` and `weight_decay`, and are registered under
    `name` when their module is imported.
    """

    lr: float
    weight_decay: float

    name: ClassVar[str]
    source: ClassVar[str]
    """Author, year and address of the publication the rule follows."""

    state: ClassVar[Mapping[str, Slot]] = {}
    vector_state: ClassVar[Mapping[str, Slot] | None] = None
    """State of parameters with fewer than two dimensions, where it differs."""

    elementwise: ClassVar[bool] = False
    """Every element is worked on alone: runs on shards as they lie."""
    reduces: ClassVar[bool] = False
    """Needs only row, column or whole sums: runs on DTensors as they lie."""
    vectors: ClassVar[bool] = True
    """Takes parameters with fewer than two dimensions."""
    reads_param: ClassVar[bool] = False
    """`update` gets the parameter (before decay); None otherwise."""

    decay: ClassVar[Literal["before", "after", "coupled"]] = "before"
    """Weight decay multiplies the weight before or after the step, or is added to the gradient (L2)."""
    adamw_settings: ClassVar[Mapping[str, Any]] = {}
    """Hyperparameters that `lr_convention="adamw"` sets so that `rms` is known."""
    signed: ClassVar[frozenset[str]] = frozenset()
    """Hyperparameters that may be negative."""

    def __init_subclass__(cls) -> None:
        """Register the rule under its name.

        Raises:
            TypeError: two rules claim one name.
        """
        super().__init_subclass__()
        name = cls.__dict__.get("name")
        if name is None:
            return
        if name in REGISTRY and REGISTRY[name].__module__ != cls.__module__:
            raise TypeError(f"two rules are named {name!r}: {REGISTRY[name].__module__} and {cls.__module__}")
        REGISTRY[name] = cls

    def slots(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, Slot]:
        """The state this rule keeps for a parameter, a pure function of its hyperparameters and the shape.

        Args:
            m: rows of its matrices; elementwise rules must not look at it.
            n: columns.
            vector: whether the parameter has fewer than two dimensions.

        Returns:
            Slot declarations by name.
        """
        return self.vector_state if vector and self.vector_state is not None else self.state

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:
        """The direction d of `p <- p - lr d`, and the new state.

        Args:
            g: gradients `[b, m, n]` (a flat block for elementwise rules), never written.
            s: state by slot name; mutate in place or assign.
            p: parameters like `g`, before decay, if `reads_param`; else None.
            t: number of this step for these parameters, from 1.

        Returns:
            The direction, shaped like `g`, finite for a zero gradient; ignored where the rule `rests`.
        """
        raise NotImplementedError

    def rests(self, t: int) -> bool:
        """Whether step t only updates state and leaves the parameters alone, decay included.

        Returns:
            True for, say, a first step that only initialises a preconditioner.
        """
        return False

    def kernel(self, p: list[Tensor], g: list[Tensor], s: Mapping[str, list[Tensor]], t: int) -> Literal[True] | None:
        """Do the whole step, decay included, with a kernel of torch's, for tensors of equal dtype and strides.

        Args:
            p: parameters, written.
            g: gradients.
            s: state tensors by slot, one per parameter.
            t: number of this step for these parameters, from 1.

        Returns:
            True if it was done; None where there is no such kernel, and `update` is called.
        """
        return None

    def rms(self, m: int, n: int) -> float | None:
        """The root mean square of the direction for an `m x n` matrix, or None where it has no fixed scale.

        Returns:
            RMS per unit learning rate; `ADAMW_RMS` for the Adam family.
        """
        return None

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a value is NaN, out of range or of the wrong type; the message names it.
        """
        for field in dataclasses.fields(self):  # pyright: ignore[reportArgumentType]
            value = getattr(self, field.name)
            numbers = value if isinstance(value, (tuple, list)) else (value,)
            for x in numbers:
                if isinstance(x, bool) or x is None:
                    continue
                if isinstance(x, str):
                    if not isinstance(field.default, str):
                        raise ValueError(f"{self.name}: {field.name} must be a number, got {value!r}")
                elif not isinstance(x, (int, float)):
                    raise ValueError(f"{self.name}: {field.name} must be a number, got {value!r}")
                elif math.isnan(x) or (x < 0 and field.name not in self.signed):
                    raise ValueError(f"{self.name}: {field.name} must be a number >= 0, got {value!r}")
                elif field.name == "betas" and x >= 1:
                    raise ValueError(f"{self.name}: betas must lie in [0, 1), got {value!r}")


def nearest(name: str, known: Sequence[str]) -> str:
    """The end of an error message about an unknown name.

    Returns:
        The closest known names, or all of them.
    """
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    return f"did you mean {' or '.join(map(repr, close))}?" if close else f"known: {', '.join(sorted(known))}"


def lookup(name: str) -> type[Rule]:
    """Find a rule by its name.

    Returns:
        The rule class.

    Raises:
        ValueError: no rule has this name; the message gives the nearest ones.
    """
    if name not in REGISTRY:
        raise ValueError(f"unknown optimizer {name!r}; {nearest(name, list(REGISTRY))}")
    return REGISTRY[name]


def hyperparameters(rule: type[Rule]) -> dict[str, Any]:
    """The defaults of a rule's fields.

    Returns:
        Field name to default value, in the order of declaration.
    """
    return {f.name: f.default for f in dataclasses.fields(rule)}  # pyright: ignore[reportArgumentType]
