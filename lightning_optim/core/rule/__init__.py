"""The contract between an algorithm (a rule) and the optimizer class that runs it."""

from lightning_optim.core.rule.base import (
    ADAMW_RMS,
    REGISTRY,
    CurvatureInput,
    DirectionByRows,
    Rule,
    hyperparameters,
    lookup,
)
from lightning_optim.core.rule.line_search import GlobalStepRule, Objective
from lightning_optim.core.rule.momentum import MomentumRule
from lightning_optim.core.rule.state_spec import StateSpec, eye, zeros
from lightning_optim.core.rule.validation import check_value, nearest

__all__ = [
    "ADAMW_RMS",
    "REGISTRY",
    "CurvatureInput",
    "DirectionByRows",
    "GlobalStepRule",
    "MomentumRule",
    "Objective",
    "Rule",
    "StateSpec",
    "check_value",
    "eye",
    "hyperparameters",
    "lookup",
    "nearest",
    "zeros",
]
