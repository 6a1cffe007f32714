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
import numbers
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from lightning_optim.ops.moments import weighted_sum
from lightning_optim.ops.runs import rows_of
from lightning_optim.refresh import RECORD, parse

ADAMW_RMS = 0.2
"""RMS of AdamW's direction per unit learning rate in language-model training (Liu et al. 2025, arXiv:2502.16982)."""

Observable = Literal["gauss_newton", "hutchinson", "factors", "loss"]
"""What a trainer can measure beside the gradient; `Rule.observe` says what each is, `Searching` what `"loss"` is."""

Rows = Callable[[slice], Tensor]
"""Gives the direction of some rows of every matrix of a stack, `[b, rows, n]`."""

REGISTRY: dict[str, type[Rule]] = {}
"""Every rule that has been imported, by name."""


@dataclass(frozen=True)
class Slot:
    """One state tensor of a rule, declared by letters of its shape.

    Args:
        letters: two out of `m` (rows), `n` (columns), `r` (the rule's rank) and digits.
        fill: start value: a number, or `"eye"` for an identity per matrix.
        dtype: None for float32 (float64 for float64 parameters).
        rank: what `r` stands for; filled in by `Rule.declared`.
        nonnegative: whether no value is ever below zero (second moments); 8-bit storage has a finer map for those.
        exact: whether the values must not rest narrower than declared (a basis); square slots never do.
        size: (rows, columns) where letters do not tell them.
        dims: (matrices, rows, columns) it is for, where a parameter is cut into matrices of several sizes; filled in by
            the executor.
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
        """The shape of this slot for one `m x n` matrix.

        Returns:
            (rows, columns).

        Raises:
            ValueError: the shape has an `r` that nobody has filled in.
        """
        if self.size is not None:
            return self.size
        size = {"m": m, "n": n, "r": self.rank}
        rows, columns = (size[x] if x in size else int(x) for x in self.letters)
        if rows is None or columns is None:
            raise ValueError(f"the rank of slot {self.letters!r} is not known yet; ask Rule.declared")
        return rows, columns


def zeros(letters: str, dtype: torch.dtype | None = None, *, nonnegative: bool = False, exact: bool = False) -> Slot:
    """Declare a slot that starts at zero.

    Returns:
        The declaration.
    """
    return Slot(letters, 0.0, dtype, nonnegative=nonnegative, exact=exact)


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
    last_two: ClassVar[bool] = False
    """Four and more dimensions are a stack over the last two, not one matrix (a convolution)."""
    reads_param: ClassVar[bool] = False
    """`update` gets the parameter (before decay); None otherwise."""
    keeps_weights: ClassVar[bool] = False
    """Its state says what the weights are, or how they came there, so that nothing else may move them between steps."""
    costly: ClassVar[tuple[str, ...]] = ()
    """Slots that `rebuild` computes anew where `update` says `s.refresh(g)` and the policy in the field `refresh`
    (`lightning_optim.refresh`) says that this step is due. Only for rules that need whole matrices."""
    compresses: ClassVar[tuple[str, ...]] = ()
    """Slots that differ between replicas where `Executor.compress` leaves gradients unreduced: `update` reduces what is
    smaller itself, by `s.mean` or `s.vote`. Their mean over the replicas is as good, which is what a checkpoint has."""
    votes: ClassVar[bool] = False
    """Whether `update` calls `s.vote`, so that replicas may vote on signs."""
    observes: ClassVar[Observable | None] = None
    """What a trainer measures beside the gradient and hands to `observe` (`lightning_optim.curvature`)."""
    observed_by: ClassVar[str] = "refresh"
    """The field with the policy that says at which steps. One measurement serves all parameters, so it goes by the
    number of the step alone."""

    never_stale: ClassVar[str] = ""
    """Why `staleness` cannot be asked, where there is costly state and `goes_stale` is False; ends an error message."""
    joint: ClassVar[bool] = False
    """`prepare` sees the gradients of all parameters of the rule at once. Only for parameters that are whole."""

    decay: ClassVar[Literal["before", "after", "coupled", "own"]] = "before"
    """Weight decay multiplies the weight before or after the step, is added to the gradient (L2), or is in `update`."""
    adamw_settings: ClassVar[Mapping[str, Any]] = {}
    """Hyperparameters that `lr_convention="adamw"` sets so that `rms` is known."""
    head_settings: ClassVar[Mapping[str, Any]] = {}
    """Hyperparameters of queries and keys, which `build_optimizer` then cuts into heads, and their other rows into rows
    where they lie in one parameter with the values. Empty for rules to which a head is nothing in particular."""
    signed: ClassVar[frozenset[str]] = frozenset()
    """Hyperparameters that may be negative."""
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"lr": (1.0, 2.0, 0.5, 4.0, 0.25, 8.0, 0.125)}
    """What `python -m lightning_optim bench` tries, likeliest first: under `lr` factors of AdamW's tuned learning rate
    (of the default of `lr`, where `rms` gives no scale), and at most one more hyperparameter."""

    def __init_subclass__(cls) -> None:
        """Register the rule under its name.

        Raises:
            TypeError: two rules claim one name, or an elementwise rule has state of another shape.
        """
        super().__init_subclass__()
        name = cls.__dict__.get("name")
        if name is None:
            return
        if name in REGISTRY and REGISTRY[name].__module__ != cls.__module__:
            raise TypeError(f"two rules are named {name!r}: {REGISTRY[name].__module__} and {cls.__module__}")
        if cls.elementwise and any(slot.letters != "mn" for slot in cls.state.values()):
            raise TypeError(f"{name}: an elementwise rule works on flat blocks; all its state must be 'mn'")
        if cls.costly and (cls.elementwise or cls.reduces):
            raise TypeError(f"{name}: a rule with costly state works on whole matrices")
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

    def declared(self, m: int, n: int, *, vector: bool = False) -> dict[str, Slot]:
        """`slots`, with the rank filled in: the field `rank`, at most the shorter side.

        Args:
            m: rows.
            n: columns.
            vector: whether the parameter has fewer than two dimensions.

        Returns:
            Slot declarations by name.
        """
        rank = min(getattr(self, "rank", 1), m, n)
        slots = dict(self.slots(m, n, vector=vector))
        if any(key in slots for key in self.costly):
            slots["refreshed"] = zeros(f"1{len(RECORD)}")
        return {k: dataclasses.replace(s, rank=rank) if "r" in s.letters else s for k, s in slots.items()}

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor | Rows:
        """The direction d of `p <- p - lr d`, and the new state.

        Args:
            g: gradients `[b, m, n]` (a flat block for elementwise rules), never written.
            s: state by slot name; mutate in place or assign. In a stack also `s.vector`, whether these parameters have
                fewer than two dimensions or the role `vector`. For whole matrices also `s.refresh(g)`, which calls
                `rebuild` if this step is due, and `s.noise("nr", stream=0)`: standard normal numbers `[b, n, r]`
                that depend on the seed, the step and the matrix only, and `s.mean(x)`, the mean over replicas that
                have gradients of their own (`x` itself, where there are none). For single elements also `s.vote(x)`:
                the sign that most replicas have (the sign of `x`, where there are none).
            p: parameters like `g`, before decay, if `reads_param`; else None.
            t: number of this step for these parameters, from 1.

        Returns:
            The direction, shaped like `g`, finite for a zero gradient; ignored where the rule `rests`. A rule that
            reduces may give it by `Rows`, which may read `g`, `p` and the state it left: each run of rows
            (`ops.runs`) is asked for once, before its parameters are written.
        """
        raise NotImplementedError

    def rebuild(self, g: Tensor, s: SimpleNamespace, t: int) -> None:
        """Compute the costly state anew.

        Args:
            g: what `update` gave to `s.refresh`, `[b, m, n]`.
            s: state by slot name; mutate in place or assign.
            t: number of this step for these parameters; at 1 there is no earlier state.
        """
        raise NotImplementedError

    def observe(self, seen: SimpleNamespace, s: SimpleNamespace) -> Mapping[str, Tensor]:
        """Take in what was measured of one parameter, before the step it is due in.

        Args:
            seen: `t`, the number of the coming step, and what was measured, in float32 or wider.

                `"gauss_newton"`: `value`, shaped like the parameter, the gradient of the mean loss under labels drawn
                from the model's own predictions, and `count`, over how many labels that mean was. `"hutchinson"`:
                `value`, an estimate of the Hessian's diagonal, and `count`. `"factors"`: `inputs` and `outputs`, the
                mean outer products of a layer's inputs, with a one if its bias has the same rule, and of the gradients
                by its outputs.
            s: state by slot name, as it rests on this rank; mutate in place or assign.

        Returns:
            Numbers to be logged: tensors whose mean over the elements of all parameters tells something.
        """
        raise NotImplementedError

    def prepare(self, members: Sequence[SimpleNamespace]) -> None:
        """Replace the gradients of all parameters of a rule with `joint`, before `update` sees each.

        Args:
            members: one per parameter with a gradient: `g` `[b, m, n]`, to be assigned and never written; `s`, its
                state as in `update`; `rule`, with the settings of its group; `lr`; `t`; `mated`, whether the bias of
                this layer is measured with it; and `mate`, the member of that bias, None without a gradient.
        """
        raise NotImplementedError

    def staleness(self, g: Tensor, s: SimpleNamespace, t: int) -> Tensor:
        """How far the costly state is from what `rebuild` would give, before `update`.

        Args:
            g: gradients `[b, m, n]`.
            s: state by slot name, not written.
            t: number of this step for these parameters; a measure that samples looks elsewhere at each.

        Returns:
            `[b]`, in [0, 1].
        """
        raise NotImplementedError

    def goes_stale(self) -> bool:
        """Whether `staleness` can be asked.

        Returns:
            False for rules without it, and where costly state does not depend on the gradient.
        """
        return type(self).staleness is not Rule.staleness

    def refresh_cost(self, m: int, n: int, *, vector: bool = False) -> float:
        """Work of one `rebuild` of an `m x n` matrix, in multiply-adds up to a constant.

        Returns:
            The cost; 0 where there is no costly state.
        """
        declared = self.declared(m, n, vector=vector)
        shapes = [declared[key].shape(m, n) for key in self.costly if key in declared]
        return float(sum(a * b * max(a, b) for a, b in shapes))

    @classmethod
    def translate(cls, group: dict[str, Any]) -> dict[str, Any]:
        """Settings of a checkpoint of torch's optimizer of this name, as this rule's.

        Args:
            group: a saved param group without `rule`.

        Returns:
            The group, with the names and values of this rule.

        Raises:
            ValueError: a setting that this rule cannot honour.
        """
        if group.get("maximize"):
            raise ValueError(f"the checkpoint was saved with maximize=True, which {cls.name} does not do")
        return group

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
        hints = typing.get_type_hints(type(self))
        for key in hyperparameters(type(self)):
            check_value(f"{self.name}: {key}", getattr(self, key), hints[key], signed=key in self.signed)
        if self.costly:
            policy = parse(getattr(self, "refresh", "staggered:10"))
            if (policy.measures or policy.compares) and not self.goes_stale():
                reason = self.never_stale or "it has no measure of staleness"
                raise ValueError(f"{self.name}: {reason}, so refresh={policy} cannot decide; take fixed or staggered")
        if self.observes and self.observes != "loss":
            policy = parse(getattr(self, self.observed_by))
            if policy.reads or policy.timed:
                raise ValueError(
                    f"{self.name}: {self.observed_by}={policy} looks at single matrices; one measurement is for all: "
                    "fixed, warmup_dense, or any, all and until of these"
                )
        betas = getattr(self, "betas", ())
        if any(beta >= 1 for beta in betas):
            raise ValueError(f"{self.name}: betas must lie in [0, 1), got {betas!r}")


class Landscape(Protocol):
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


class Searching(Rule):
    """Base of rules that look for the step of all their parameters at once, by the loss of the batch at other weights.

    They implement `find`. A slot `"mn"` is one vector `[N]` there, any other is one row of numbers that belongs to
    all parameters. The loss comes from a curvature feed or, in a loop of one's own, from the closure given to `step`.
    """

    observes: ClassVar[Observable | None] = "loss"
    joint: ClassVar[bool] = True
    decay: ClassVar[Literal["before", "after", "coupled", "own"]] = "own"

    def find(self, at: Landscape, s: SimpleNamespace) -> Tensor:
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


@dataclass(frozen=True, kw_only=True)
class Averaging(Rule):
    """Base of rules with a running mean M of gradients, which may be several: M = sum_k w_k M_k.

        M_k <- beta_k M_k + (1 - beta_k) x

    `momentum_kernel` is ((beta, weight), ...), from step `kernel_steps[0]` + 1 on: up to there M is the one mean of the
    rule's own momentum or betas[0], where all M_k then start. With ((beta, weight, last weight), ...) the weights
    go linearly from the one to the other between the two `kernel_steps`. `ops.moments` has the published kernels.
    A mean of its own for every beta after the first: `exp_avg_1`, ..., shaped like `exp_avg`.
    """

    momentum_kernel: tuple[tuple[float, ...], ...] | None = None
    kernel_steps: tuple[int, int] = (0, 0)

    first_moment: ClassVar[str] = "exp_avg"
    """The slot of M."""

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a kernel that is none, or what `Rule.validate` raises.
        """
        super().validate()
        kernel, (first, last) = self.momentum_kernel, self.kernel_steps
        if kernel is None:
            return
        what = f"{self.name}: momentum_kernel must be ((beta, weight), ...) or ((beta, weight, last weight), ...)"
        if not kernel or {len(k) for k in kernel} not in ({2}, {3}):
            raise ValueError(f"{what}, got {kernel!r}")
        sums = [math.fsum(weights) for weights in list(zip(*kernel, strict=True))[1:]]
        if max(k[0] for k in kernel) >= 1 or any(abs(total - 1) > 1e-4 for total in sums):
            raise ValueError(f"{what} with betas below 1 and weights that add up to 1, got {kernel!r}")
        if len(kernel[0]) == 3 and first >= last:
            raise ValueError(
                f"{self.name}: kernel_steps must say from when to when weights change, got {(first, last)}"
            )

    def declared(self, m: int, n: int, *, vector: bool = False) -> dict[str, Slot]:  # noqa: D102
        slots = super().declared(m, n, vector=vector)
        if self.first_moment not in slots:
            return slots
        return slots | {name: slots[self.first_moment] for name in self.means()[1:]}

    def means(self) -> list[str]:
        """The slots of the means.

        Returns:
            One name per beta of the kernel.
        """
        count = len(self.momentum_kernel or "1")
        return [f"{self.first_moment}_{k}" if k else self.first_moment for k in range(count)]

    def held(self, s: SimpleNamespace) -> list[Tensor]:
        """The means in the state.

        Returns:
            In the order of `means`.
        """
        return [getattr(s, name) for name in self.means()]

    def seen(self, means: Sequence[Tensor], run: slice | None = None) -> SimpleNamespace:
        """A state of nothing but means.

        Args:
            means: as `held` gives them, or the same rows of each.
            run: take only these rows of them.

        Returns:
            What `averaged` and `blended` take for the state.
        """
        views = means if run is None else [rows_of(x, run) for x in means]
        return SimpleNamespace(**dict(zip(self.means(), views, strict=True)))

    def averaged(self, s: SimpleNamespace, x: Tensor, beta: float, t: int) -> Tensor:
        """Take a gradient into the means.

        Args:
            s: state, written.
            x: shaped like M.
            beta: of the one mean.
            t: how often it was done, this time included.

        Returns:
            M: the state itself where it is one mean.
        """
        mean, kernel, first = getattr(s, self.first_moment), self.momentum_kernel, self.kernel_steps[0]
        if kernel is None or t <= first:
            return mean.lerp_(x, 1 - beta)
        start = mean.clone() if t == first + 1 and first else None
        for name, (own, *_) in zip(self.means(), kernel, strict=True):
            part = getattr(s, name)
            if start is not None:
                part.copy_(start)
            part.lerp_(x, 1 - own)
        return self.blended(s, t)

    def blended(self, s: SimpleNamespace, t: int) -> Tensor:
        """M after t gradients.

        Returns:
            The state itself where it is one mean.
        """
        if self.momentum_kernel is None or t <= self.kernel_steps[0]:
            return getattr(s, self.first_moment)
        return weighted_sum([getattr(s, name) for name in self.means()], self._weights(t))

    def mass(self, beta: float, t: int) -> float:
        """The weight of all gradients in M after t of them: what M is divided by to correct its bias.

        Args:
            beta: of the one mean.
            t: number of gradients.

        Returns:
            1 - beta^t for one mean.
        """
        first = self.kernel_steps[0]
        if self.momentum_kernel is None or t <= first:
            return 1 - beta**t
        pairs = zip(self._weights(t), self.momentum_kernel, strict=True)
        return math.fsum(w * (1 - beta**first * k[0] ** (t - first)) for w, k in pairs)

    def _weights(self, t: int) -> list[float]:
        first, last = self.kernel_steps
        done = min((t - first) / max(last - first, 1), 1.0)
        return [k[1] + done * (k[-1] - k[1]) for k in self.momentum_kernel or ()]


def check_value(what: str, value: Any, hint: Any, *, signed: bool = False) -> None:
    """Check a setting against its annotation.

    Args:
        what: names the setting in the message.
        value: its value.
        hint: float, int, bool, str, Literal, tuple of these, or a union.
        signed: whether numbers may be negative.

    Raises:
        ValueError: the value has another type, is not finite, or is negative.
    """
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in inner:
            return
        fitting = [x for x in inner if _fits(value, x)] or [x for x in inner if x is not type(None)][:1]
        check_value(what, value, next((x for x in fitting if _holds(value, x)), fitting[0]), signed=signed)
    elif origin is Literal:
        if value not in inner:
            raise ValueError(f"{what}: unknown value {value!r}; {nearest(str(value), [str(x) for x in inner])}")
    elif origin is tuple:
        if inner[1:] == (Ellipsis,) and isinstance(value, (tuple, list)):
            inner = inner[:1] * len(value)
        if not isinstance(value, (tuple, list)) or len(value) != len(inner):
            raise ValueError(f"{what} must be {len(inner)} numbers, got {value!r}")
        for x, part in zip(value, inner, strict=True):
            check_value(what, x, part, signed=signed)
    elif not _fits(value, hint):
        names = {float: "a number", int: "an integer", bool: "True or False", str: "a name"}
        raise ValueError(f"{what} must be {names.get(hint, hint)}, got {value!r}")
    elif hint in (float, int) and not (math.isfinite(value) and (signed or value >= 0)):
        raise ValueError(f"{what} must be a finite number{'' if signed else ' >= 0'}, got {value!r}")


def _fits(value: Any, hint: Any) -> bool:
    kinds = {float: numbers.Real, int: numbers.Integral}
    if typing.get_origin(hint) is tuple:
        return isinstance(value, (tuple, list))
    if typing.get_origin(hint) is Literal:
        return isinstance(value, str)
    if hint in kinds:
        return isinstance(value, kinds[hint]) and not isinstance(value, bool)
    return isinstance(value, hint)


def _holds(value: Any, hint: Any) -> bool:
    """Whether the values in a tuple of any length fit, too."""
    inner = typing.get_args(hint)
    return inner[1:] != (Ellipsis,) or all(_fits(x, inner[0]) for x in value)


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
