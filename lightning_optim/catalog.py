"""What the registry of rules says of itself: family, what each works on, its state, settings and documentation.

`python -m lightning_optim list` and `show`, the tables of the guides, the docstrings of the optimizer classes and the
benchmarks use it.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import inspect
import math
import textwrap
from collections import Counter
from typing import Any, Literal

from lightning_optim.core.rule import Rule

Kind = Literal["elements", "sums", "matrices", "all"]

FAMILIES = {
    "first-order": "AdamW and its relatives: the usual baseline",
    "memory-efficient": "less state than AdamW, of about the same step",
    "sign": "steps of equal size in every element; half of AdamW's state or none",
    "low-rank": "state in a projection of the gradient, for full-parameter training in little memory",
    "structured-fisher": "preconditioners of rows and columns: fewer steps, more state and time per step",
    "orthogonalized": "steps of equal singular values, for hidden matrices: fewer steps than AdamW",
    "curvature": "the Hessian, the Gauss-Newton matrix or a line search, beside gradients",
}
"""Family of a rule to what it is for."""

SHARED_MEANINGS = {
    "lr": "Learning rate: the class takes the published scale, factories and flags AdamW's.",
    "betas": "Decay rates of the running means of gradients and of squared gradients.",
    "eps": "Added to the denominator.",
    "momentum": "Decay rate of the running mean, or factor of the sum, of gradients.",
    "nesterov": "Whether the direction looks ahead by one step of the momentum.",
    "momentum_kernel": "((beta, weight), ...): a weighted sum of running means as momentum; None for one mean.",
    "kernel_steps": "Steps from which on `momentum_kernel` applies, and at which its weights have arrived.",
    "correct_bias": "Whether running means are corrected for their start from zero.",
    "refresh": "Policy that says when preconditioners or projections are recomputed.",
    "rank": "Rank of the projection or the step.",
    "basis": "How the projection is found: a decomposition, a randomized one, or subspace iteration.",
    "normalize": "Whether the direction is scaled to a fixed RMS, in place of the published scale.",
    "limit": "Largest growth of the limited norm per step; None for no limit.",
    "limiter_restarts": "Whether a norm may grow freely from zero.",
    "ns_steps": "Newton-Schulz iterations.",
    "ns_coefficients": "Coefficients of the Newton-Schulz iterations, by name or (a, b, c).",
    "ns_dtype": "Dtype of the Newton-Schulz iterations.",
    "ns_divisor": "Norm that the matrix is divided by before the iterations.",
    "scale": "Factor of the direction.",
    "sides": "Which sides of a matrix have a basis.",
    "shampoo_beta": "Decay rate of the factors; None for that of the second moment.",
    "max_precond_dim": "Longest side that is rotated.",
    "rotation_dtype": "Dtype of the products into the basis and back.",
    "clip_threshold": "Largest RMS of an update before it is scaled.",
    "decay_rate": "The decay rate of the second moment at step t is 1 - t^decay_rate.",
    "scale_parameter": "Whether steps are scaled by the RMS of the weights.",
    "kl_clip": "Bound of the predicted change of the outputs per step; None for none.",
    "exclude_vectors": "Whether vectors are neither adapted nor decayed.",
}
"""Meanings of settings that several rules share; a rule's own sentence, below the field, takes precedence."""

DECAY_MEANINGS = {
    "before": "Decoupled weight decay: before a step, weights are multiplied by 1 - lr weight_decay.",
    "after": "Decoupled weight decay: after a step, weights are multiplied by 1 - lr weight_decay.",
    "coupled": "L2 weight decay: weight_decay times the weights is added to the gradient.",
    "own": "Weight decay, within the update as the formula says.",
}


def kind(rule: type[Rule]) -> Kind:
    """What a rule works on.

    Returns:
        Single `elements`, `sums` over rows, columns or parameters, whole `matrices`, or `all` parameters at once.
    """
    if rule.curvature_input == "loss":
        return "all"
    return "elements" if rule.elementwise else "sums" if rule.reduces else "matrices"


def state_formula(rule: type[Rule]) -> str:
    """The number of state elements of an m x n matrix at the rule's defaults, for sides within its block size.

    Returns:
        A sum such as `2mn` or `m + n`; s and l are the shorter and the longer side where it matters which is which, r
        is the rank. `0` without state.
    """
    (wide, constant), (tall, _) = _state_terms(rule, 600, 1000), _state_terms(rule, 1000, 600)
    if wide != tall:
        to_sides = str.maketrans("mn", "sl")
        wide = Counter({"mn" if x == "mn" else "".join(sorted(x.translate(to_sides))): k for x, k in wide.items()})
    terms = [f"{k if k > 1 else ''}{x}" for x, k in wide.items()]
    return " + ".join([*terms, *([str(constant)] if constant else [])]) or "0"


def _state_terms(rule: type[Rule], m: int, n: int) -> tuple[Counter[str], int]:
    """How often each product of sides and ranks occurs in the state, by its sorted letters; and the rest, a number."""
    terms, constant = Counter[str](), 0
    for spec in rule().state_specs(m, n).values():
        letters = "".join(sorted(spec.letters.replace("1", "")))
        if spec.letters.isdigit():
            constant += math.prod(map(int, spec.letters))
        elif letters == "kk":
            rows, side = spec.shape(m, n)
            terms["mm" if side == m else "nn"] += rows // side
        else:
            terms[letters] += 1
    return terms, constant


def state_bytes(rule: type[Rule], m: int = 1024, n: int = 1024) -> float:
    """Bytes of state per element of an m x n float32 matrix at the rule's defaults.

    Returns:
        Bytes per element.
    """
    size = 0
    for spec in rule().state_specs(m, n).values():
        rows, columns = spec.shape(m, n)
        size += rows * columns * (spec.dtype.itemsize if spec.dtype else 4)
    return size / (m * n)


def summary(rule: type[Rule]) -> str:
    """The first line of a rule's docstring.

    Returns:
        One line without its closing full stop.
    """
    return (rule.__doc__ or "").strip().splitlines()[0].rstrip(".")


def documentation(rule: type[Rule]) -> str:
    """What an editor shows for a rule's optimizer class.

    Returns:
        The rule's docstring, its hyperparameters with their defaults, and its source.
    """
    text = inspect.cleandoc(rule.__doc__ or "")
    settings = ", ".join(f"{name}={value!r}" for name, value in defaults(rule).items())
    out = f"{text}\n\nHyperparameters: {settings}."
    return out if "Source: " in text else f"{out}\n\nSource: {rule.source}."


def follows_adamw(rule: type[Rule]) -> bool:
    """Whether a rule takes AdamW's learning rate under `lr_convention="adamw"`.

    Returns:
        False where the direction has no scale, so that the learning rate is the rule's own.
    """
    return rule(**rule.adamw_settings).rms(64, 64) is not None


@functools.cache
def attribute_docstrings(cls: type) -> dict[str, str]:
    """The strings below the annotated attributes of a class, of which Python itself keeps nothing.

    Returns:
        Name to text in one line, for the attributes of the class itself and not of its bases.
    """
    try:
        source = textwrap.dedent(inspect.getsource(cls))
    except (OSError, TypeError):  # made by a program, or without a file
        return {}
    (node,) = (x for x in ast.parse(source).body if isinstance(x, ast.ClassDef))
    out = {}
    for attribute, text in zip(node.body, node.body[1:], strict=False):
        if isinstance(attribute, ast.AnnAssign) and isinstance(attribute.target, ast.Name):
            match text:
                case ast.Expr(value=ast.Constant(value=str(words))):
                    out[attribute.target.id] = " ".join(words.split())
    return out


def meanings(rule: type[Rule]) -> dict[str, str]:
    """What each hyperparameter of a rule means.

    Returns:
        Field name to a sentence, in the order of declaration; empty where neither the rule nor this module says it.
    """
    declared: dict[str, str] = {}
    for cls in reversed(rule.__mro__):
        if issubclass(cls, Rule) and cls is not Rule:
            declared |= attribute_docstrings(cls)
    shared = SHARED_MEANINGS | {"weight_decay": DECAY_MEANINGS[rule.decay]}
    if not follows_adamw(rule):
        shared["lr"] = f"Learning rate of {rule.name}'s own scale, everywhere: not AdamW's."
    shared |= declared
    return {f.name: shared.get(f.name, "") for f in dataclasses.fields(rule)}  # pyright: ignore[reportArgumentType]


def defaults(rule: type[Rule]) -> dict[str, Any]:
    """The defaults of a rule's fields, the positional ones first.

    Returns:
        Field name to value.
    """
    fields = sorted(dataclasses.fields(rule), key=lambda f: bool(f.kw_only))  # pyright: ignore[reportArgumentType]
    return {f.name: f.default for f in fields}
