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
"""What a trainer can measure beside the gradient; `Rule.observe` says what each is, `GlobalStepRule` what `"loss"`
is."""

DirectionByRows = Callable[[slice], Tensor]
"""Gives the direction of some rows of every matrix of a stack, `[b, rows, n]`."""

REGISTRY: dict[str, type[Rule]] = {}
"""Every rule that has been imported, by name."""


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

    state: ClassVar[Mapping[str, StateSpec]] = {}
    vector_state: ClassVar[Mapping[str, StateSpec] | None] = None
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
    tracks_weights: ClassVar[bool] = False
    """Its state says what the weights are, or how they came there, so that nothing else may move them between steps."""
    preconditioners: ClassVar[tuple[str, ...]] = ()
    """Slots that `refresh_preconditioner` computes anew where `update` says `s.refresh(g)` and the policy in the field
    `refresh` (`lightning_optim.refresh`) says that this step is due. Only for rules that need whole matrices."""
    compresses: ClassVar[tuple[str, ...]] = ()
    """Slots that differ between replicas where `RuleOptimizer.compress` leaves gradients unreduced: `update` reduces
    what is smaller itself, by `s.mean` or `s.vote`. Their mean over the replicas is as good, which is what a checkpoint
    has."""
    votes: ClassVar[bool] = False
    """Whether `update` calls `s.vote`, so that replicas may vote on signs."""
    curvature_input: ClassVar[CurvatureInput | None] = None
    """What a trainer measures beside the gradient and hands to `observe` (`lightning_optim.curvature`)."""
    curvature_schedule: ClassVar[str] = "refresh"
    """The field with the policy that says at which steps. One measurement serves all parameters, so it goes by the
    number of the step alone."""

    unmeasurable_reason: ClassVar[str] = ""
    """Why `staleness` cannot be asked, where there is costly state and `measures_staleness` is False; ends an error
    message."""
    needs_all_gradients: ClassVar[bool] = False
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
        if cls.elementwise and any(slot.letters != "mn" for slot in cls.state.values()):
            raise TypeError(f"{name}: an elementwise rule works on flat blocks; all its state must be 'mn'")
        if cls.preconditioners and (cls.elementwise or cls.reduces):
            raise TypeError(f"{name}: a rule with costly state works on whole matrices")
        REGISTRY[name] = cls

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:
        """The state this rule keeps for a parameter, a pure function of its hyperparameters and the shape.

        Args:
            m: rows of its matrices; elementwise rules must not look at it.
            n: columns.
            vector: whether the parameter has fewer than two dimensions.

        Returns:
            Slot declarations by name.
        """
        return self.vector_state if vector and self.vector_state is not None else self.state

    def state_specs(self, m: int, n: int, *, vector: bool = False) -> dict[str, StateSpec]:
        """`declare_state`, with the rank filled in: the field `rank`, at most the shorter side.

        Args:
            m: rows.
            n: columns.
            vector: whether the parameter has fewer than two dimensions.

        Returns:
            Slot declarations by name.
        """
        rank = min(getattr(self, "rank", 1), m, n)
        slots = dict(self.declare_state(m, n, vector=vector))
        if any(key in slots for key in self.preconditioners):
            slots["refreshed"] = zeros(f"1{len(RECORD)}")
        return {k: dataclasses.replace(s, rank=rank) if "r" in s.letters else s for k, s in slots.items()}

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor | DirectionByRows:
        """The direction d of `p <- p - lr d`, and the new state.

        Args:
            g: gradients `[b, m, n]` (a flat block for elementwise rules), never written.
            s: state by slot name; mutate in place or assign. In a stack also `s.vector`, whether these parameters have
                fewer than two dimensions or the role `vector`. For whole matrices also `s.refresh(g)`, which calls
                `refresh_preconditioner` if this step is due, and `s.noise("nr", stream=0)`: standard normal numbers
                `[b, n, r]` that depend on the seed, the step and the matrix only, and `s.mean(x)`, the mean over
                replicas that have gradients of their own (`x` itself, where there are none). For single elements also
                `s.vote(x)`: the sign that most replicas have (the sign of `x`, where there are none).
            p: parameters like `g`, before decay, if `reads_param`; else None.
            t: number of this step for these parameters, from 1.

        Returns:
            The direction, shaped like `g`, finite for a zero gradient; ignored where the rule `skips_update`. A rule
            that reduces may give it by `DirectionByRows`, which may read `g`, `p` and the state it left: each run of
            rows (`ops.runs`) is asked for once, before its parameters are written.
        """
        raise NotImplementedError

    def refresh_preconditioner(self, g: Tensor, s: SimpleNamespace, t: int) -> None:
        """Compute the costly state anew.

        Args:
            g: what `update` gave to `s.refresh`, `[b, m, n]`.
            s: state by slot name; mutate in place or assign.
            t: number of this step for these parameters; at 1 there is no earlier state.
        """
        raise NotImplementedError

    def update_curvature(self, seen: SimpleNamespace, s: SimpleNamespace) -> Mapping[str, Tensor]:
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

    def precondition_jointly(self, members: Sequence[SimpleNamespace]) -> None:
        """Replace the gradients of all parameters of a rule with `joint`, before `update` sees each.

        Args:
            members: one per parameter with a gradient: `g` `[b, m, n]`, to be assigned and never written; `s`, its
                state as in `update`; `rule`, with the settings of its group; `lr`; `t`; `mated`, whether the bias of
                this layer is measured with it; and `mate`, the member of that bias, None without a gradient.
        """
        raise NotImplementedError

    def staleness(self, g: Tensor, s: SimpleNamespace, t: int) -> Tensor:
        """How far the costly state is from what `refresh_preconditioner` would give, before `update`.

        Args:
            g: gradients `[b, m, n]`.
            s: state by slot name, not written.
            t: number of this step for these parameters; a measure that samples looks elsewhere at each.

        Returns:
            `[b]`, in [0, 1].
        """
        raise NotImplementedError

    def measures_staleness(self) -> bool:
        """Whether `staleness` can be asked.

        Returns:
            False for rules without it, and where costly state does not depend on the gradient.
        """
        return type(self).staleness is not Rule.staleness

    def refresh_cost(self, m: int, n: int, *, vector: bool = False) -> float:
        """Work of one `refresh_preconditioner` of an `m x n` matrix, in multiply-adds up to a constant.

        Returns:
            The cost; 0 where there is no costly state.
        """
        declared = self.state_specs(m, n, vector=vector)
        shapes = [declared[key].shape(m, n) for key in self.preconditioners if key in declared]
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

    def skips_update(self, t: int) -> bool:
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
        if self.preconditioners:
            policy = parse(getattr(self, "refresh", "staggered:10"))
            if (policy.measures or policy.compares) and not self.measures_staleness():
                reason = self.unmeasurable_reason or "it has no measure of staleness"
                raise ValueError(f"{self.name}: {reason}, so refresh={policy} cannot decide; take fixed or staggered")
        if self.curvature_input and self.curvature_input != "loss":
            policy = parse(getattr(self, self.curvature_schedule))
            if policy.reads or policy.timed:
                raise ValueError(
                    f"{self.name}: {self.curvature_schedule}={policy} looks at single matrices; one measurement is "
                    "for all: fixed, warmup_dense, or any, all and until of these"
                )
        betas = getattr(self, "betas", ())
        if any(beta >= 1 for beta in betas):
            raise ValueError(f"{self.name}: betas must lie in [0, 1), got {betas!r}")


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
