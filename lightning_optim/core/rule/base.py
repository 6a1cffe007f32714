"""The contract between an algorithm (a rule) and the optimizer that runs it.

A rule is a frozen dataclass. Its fields are the hyperparameters, class constants declare what it needs, and
`update` is the published algorithm on a stack of equal matrices `[b, m, n]` (`b` is often 1; a vector of length
n is `[1, 1, n]`). Elementwise rules get flat blocks instead and must not depend on the shape.

The optimizer allocates, shards, checkpoints and predicts the size of every state tensor from its declaration alone,
without a gradient. A rule never accesses a param group, `p.grad` or a process group, never checks for a DTensor, and
never writes the gradient.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

from torch import Tensor

from lightning_optim.core.rule.state_spec import StateSpec, zeros
from lightning_optim.core.rule.validation import check_value, nearest
from lightning_optim.refresh import RECORD, parse

ADAMW_RMS = 0.2
"""RMS of AdamW's direction per unit learning rate in language-model training (Liu et al. 2025, arXiv:2502.16982)."""

CurvatureInput = Literal["gauss_newton", "hutchinson", "factors", "loss"]
"""Curvature input beyond the gradient; see `Rule.update_curvature` for each kind, and `GlobalStepRule` for `"loss"`."""

DirectionByRows = Callable[[slice], Tensor]
"""A function from a slice of rows to the direction of those rows of every matrix of a stack, `[b, rows, n]`."""

REGISTRY: dict[str, type[Rule]] = {}
"""Every imported rule by its name."""


class Rule:
    """Base of every algorithm; see the module docstring for the contract.

    Subclasses are frozen dataclasses with at least the fields `lr` and `weight_decay`, and are registered under
    `name` when their module is imported.
    """

    lr: float
    weight_decay: float

    name: ClassVar[str]
    source: ClassVar[str]
    """Author, year and address of the publication that the rule implements."""
    family: ClassVar[str] = "first-order"
    """Key of `lightning_optim.catalog.FAMILIES`."""

    state: ClassVar[Mapping[str, StateSpec]] = {}
    vector_state: ClassVar[Mapping[str, StateSpec] | None] = None
    """State of parameters with fewer than two dimensions, where it differs."""

    elementwise: ClassVar[bool] = False
    """Every element is updated independently, so the rule runs on shards in their current placement."""
    reduces: ClassVar[bool] = False
    """The rule needs only sums over rows, columns or matrices, so it runs on DTensors in their current placement."""
    vectors: ClassVar[bool] = True
    """The rule accepts parameters with fewer than two dimensions."""
    last_two: ClassVar[bool] = False
    """Four and more dimensions are a stack of matrices over the last two, not one matrix (a convolution)."""
    reads_param: ClassVar[bool] = False
    """`update` gets the parameter (before decay) as `p`; None otherwise."""
    tracks_weights: ClassVar[bool] = False
    """The state refers to current or past weights, so nothing else may change the weights between steps."""
    preconditioners: ClassVar[tuple[str, ...]] = ()
    """State tensors that `refresh_preconditioner` recomputes when `update` calls `s.refresh(g)` in a step that is due
    by the policy in the field `refresh` (`lightning_optim.refresh`). Only for rules that need whole matrices."""
    compresses: ClassVar[tuple[str, ...]] = ()
    """State tensors that differ between replicas where `RuleOptimizer.compress` leaves gradients unreduced; `update`
    then reduces smaller tensors itself, by `s.mean` or `s.vote`. A checkpoint holds the mean over the replicas, which
    serves as well."""
    votes: ClassVar[bool] = False
    """`update` calls `s.vote`, so that replicas can vote on signs."""
    curvature_input: ClassVar[CurvatureInput | None] = None
    """Kind of curvature estimate that `update_curvature` needs (`lightning_optim.curvature`)."""
    curvature_schedule: ClassVar[str] = "refresh"
    """Field with the policy that decides in which steps curvature is estimated. One estimate serves all parameters,
    so the policy may depend on the step number only."""

    unmeasurable_reason: ClassVar[str] = ""
    """Why preconditioners have no `staleness`, where `measures_staleness` is False; the end of an error message."""
    needs_all_gradients: ClassVar[bool] = False
    """`precondition_jointly` gets the gradients of all parameters of the rule at once, which must be whole."""

    decay: ClassVar[Literal["before", "after", "coupled", "own"]] = "before"
    """Weight decay multiplies the weight before or after the step, is added to the gradient (`"coupled"`, L2), or is
    done by `update` (`"own"`)."""
    adamw_settings: ClassVar[Mapping[str, Any]] = {}
    """Hyperparameters that `lr_convention="adamw"` sets so that `rms` is known."""
    head_settings: ClassVar[Mapping[str, Any]] = {}
    """Hyperparameters for queries and keys, which `build_optimizer` then splits by head. In a fused parameter the
    values are split into rows. Empty for rules that do not treat heads separately."""
    signed: ClassVar[frozenset[str]] = frozenset()
    """Hyperparameters that may be negative."""
    search: ClassVar[dict[str, tuple[Any, ...]]] = {"lr": (1.0, 2.0, 0.5, 4.0, 0.25, 8.0, 0.125)}
    """Values that `python -m lightning_optim bench` tries, likeliest first: for `lr`, factors of AdamW's tuned learning
    rate (of the default of `lr`, where `rms` is None), and values of at most one more hyperparameter."""

    def __init_subclass__(cls, *, abstract: bool = False) -> None:
        """Register the rule under its name.

        Args:
            abstract: whether the class is only a base of several rules, and no rule itself.

        Raises:
            TypeError: the rule has no name of its own or no source, two rules claim one name, or an elementwise rule
                has state of another shape.
        """
        super().__init_subclass__()
        if abstract:
            return
        name: str = cls.__dict__.get("name", "")
        constants = {"`name` of its own": name, "`source`": getattr(cls, "source", None)}
        if missing := " and no ".join(key for key, value in constants.items() if not value):
            raise TypeError(
                f"{cls.__name__} has no {missing}: give the rule `name` and `source` as class constants; a base of "
                f"several rules is `class {cls.__name__}({cls.__bases__[0].__name__}, abstract=True)`"
            )
        if name in REGISTRY and REGISTRY[name].__module__ != cls.__module__:
            raise TypeError(f"two rules are named {name!r}: {REGISTRY[name].__module__} and {cls.__module__}")
        if cls.elementwise and any(spec.letters != "mn" for spec in cls.state.values()):
            raise TypeError(f"{name}: an elementwise rule works on flat blocks; all its state must be 'mn'")
        if cls.preconditioners and (cls.elementwise or cls.reduces):
            raise TypeError(f"{name}: a rule with preconditioners works on whole matrices")
        REGISTRY[name] = cls

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:
        """Declare the state of a parameter, as a pure function of the hyperparameters and the shape.

        Args:
            m: rows of its matrices; elementwise rules must not depend on it.
            n: columns.
            vector: whether the parameter has fewer than two dimensions.

        Returns:
            Specs of the state tensors by name.
        """
        return self.vector_state if vector and self.vector_state is not None else self.state

    def state_specs(self, m: int, n: int, *, vector: bool = False) -> dict[str, StateSpec]:
        """The specs of `declare_state` with the rank filled in: the field `rank`, at most the shorter side.

        Args:
            m: rows.
            n: columns.
            vector: whether the parameter has fewer than two dimensions.

        Returns:
            Specs of the state tensors by name.
        """
        rank = min(getattr(self, "rank", 1), m, n)
        specs = dict(self.declare_state(m, n, vector=vector))
        if any(key in specs for key in self.preconditioners):
            specs["refreshed"] = zeros(f"1{len(RECORD)}")
        return {k: dataclasses.replace(spec, rank=rank) if "r" in spec.letters else spec for k, spec in specs.items()}

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor | DirectionByRows:
        """The direction d of `p <- p - lr d`, and the new state.

        Args:
            g: gradients `[b, m, n]` (a flat block for elementwise rules), never written.
            s: state tensors by name; mutate in place or assign. In a stack also `s.vector`, whether these parameters
                have fewer than two dimensions or the role `vector`. For whole matrices also `s.refresh(g)`, which calls
                `refresh_preconditioner` if this step is due, `s.noise("nr", stream=0)`, standard normal numbers
                `[b, n, r]` that depend on the seed, the step and the matrix only, and `s.mean(x)`, the mean over
                replicas whose gradients are unreduced (`x` itself otherwise). For elementwise rules also `s.vote(x)`,
                the majority sign over such replicas (the sign of `x` otherwise).
            p: parameters like `g`, before decay, if `reads_param`; else None.
            t: number of this step for these parameters, from 1.

        Returns:
            The direction, shaped like `g`, finite for a zero gradient; ignored where the rule `skips_update`. A rule
            that reduces may return a `DirectionByRows`, which may read `g`, `p` and the updated state. It is called
            once for each chunk of rows (`ops.row_chunks`), before the parameters of that chunk are written.
        """
        raise NotImplementedError

    def refresh_preconditioner(self, g: Tensor, s: SimpleNamespace, t: int) -> None:
        """Recompute the preconditioners.

        Args:
            g: the argument of `s.refresh` in `update`, `[b, m, n]`.
            s: state tensors by name; mutate in place or assign.
            t: number of this step for these parameters; at 1 there is no earlier state.
        """
        raise NotImplementedError

    def update_curvature(self, estimate: SimpleNamespace, s: SimpleNamespace) -> Mapping[str, Tensor]:
        """Update the state by a curvature estimate of one parameter, before the step in which it is due.

        Args:
            estimate: `t`, the number of the coming step, and the estimate, in float32 or wider.


                `"gauss_newton"`: `value`, shaped like the parameter, the gradient of the mean loss under labels drawn
                from the model's own predictions, and `count`, the number of labels in that mean. `"hutchinson"`:
                `value`, an estimate of the Hessian's diagonal, and `count`. `"factors"`: `inputs` and `outputs`, the
                mean outer products of a layer's inputs, with a one appended if its bias has the same rule, and of the
                gradients by its outputs.
            s: state tensors by name, those of this rank; mutate in place or assign.

        Returns:
            Metrics to be logged: tensors, of which the mean over the elements of all parameters is logged.
        """
        raise NotImplementedError

    def precondition_jointly(self, params: Sequence[SimpleNamespace]) -> None:
        """Replace the gradients of all parameters of a rule with `needs_all_gradients`, before each `update`.

        Args:
            params: one per parameter with a gradient: `g` `[b, m, n]`, to be assigned and never written in place; `s`,
                its state as in `update`; `rule`, with the settings of its group; `lr`; `t`; `has_bias`, whether the
                bias of this layer is measured with it; and `bias`, the record of that bias, None without a gradient.
        """
        raise NotImplementedError

    def staleness(self, g: Tensor, s: SimpleNamespace, t: int) -> Tensor:
        """Distance of the preconditioners from what `refresh_preconditioner` would compute, measured before `update`.

        Args:
            g: gradients `[b, m, n]`.
            s: state tensors by name, not written.
            t: number of this step for these parameters, by which a measure that samples varies its sample.

        Returns:
            `[b]`, in [0, 1].
        """
        raise NotImplementedError

    def measures_staleness(self) -> bool:
        """Whether the rule implements `staleness`.

        Returns:
            False for rules without it, and where the preconditioners do not depend on the gradient.
        """
        return type(self).staleness is not Rule.staleness

    def refresh_cost(self, m: int, n: int, *, vector: bool = False) -> float:
        """Cost of one `refresh_preconditioner` of an `m x n` matrix, in multiply-adds up to a constant factor.

        Returns:
            The cost; 0 without preconditioners.
        """
        specs = self.state_specs(m, n, vector=vector)
        shapes = [specs[key].shape(m, n) for key in self.preconditioners if key in specs]
        return float(sum(a * b * max(a, b) for a, b in shapes))

    @classmethod
    def translate(cls, group: dict[str, Any]) -> dict[str, Any]:
        """Translate the settings of a checkpoint of torch's optimizer of this name into those of this rule.

        Args:
            group: a saved param group without `rule`.

        Returns:
            The group, with the names and values of this rule.

        Raises:
            ValueError: a setting that this rule cannot honor.
        """
        if group.get("maximize"):
            raise ValueError(f"the checkpoint was saved with maximize=True, which {cls.name} does not do")
        return group

    def skips_update(self, t: int) -> bool:
        """Whether step t updates only the state and leaves the parameters unchanged, without decay.

        Returns:
            True for, say, a first step that only initializes a preconditioner.
        """
        return False

    def kernel(self, p: list[Tensor], g: list[Tensor], s: Mapping[str, list[Tensor]], t: int) -> Literal[True] | None:
        """Take the whole step, decay included, by a fused kernel of torch, for tensors of equal dtype and strides.

        Args:
            p: parameters, written.
            g: gradients.
            s: state tensors by name, one per parameter.
            t: number of this step for these parameters, from 1.

        Returns:
            True if the step was taken; None where there is no such kernel, so that `update` is called.
        """
        return None

    def rms(self, m: int, n: int) -> float | None:
        """The root mean square of the direction for an `m x n` matrix.

        Returns:
            RMS per unit learning rate, `ADAMW_RMS` for the Adam family; None where the direction has no fixed scale.
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
        if self.preconditioners:
            text = getattr(self, "refresh", "staggered:10")
            policy = parse(text)
            if (policy.measures or policy.compares) and not self.measures_staleness():
                reason = self.unmeasurable_reason or "it has no measure of staleness"
                raise ValueError(f"{self.name}: {reason}, so refresh={text!r} cannot decide; take fixed or staggered")
        if self.curvature_input and self.curvature_input != "loss":
            text = getattr(self, self.curvature_schedule)
            policy = parse(text)
            if policy.reads or policy.timed:
                raise ValueError(
                    f"{self.name}: {self.curvature_schedule}={text!r} decides for single matrices, but one "
                    "measurement is for all: use fixed, warmup_dense, or any, all and until of these"
                )
        betas = getattr(self, "betas", ())
        if any(beta >= 1 for beta in betas):
            raise ValueError(f"{self.name}: betas must lie in [0, 1), got {betas!r}")


def lookup(name: str) -> type[Rule]:
    """Find a rule by its name.

    Returns:
        The rule class.

    Raises:
        ValueError: no rule has this name; the message suggests similar ones.
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
