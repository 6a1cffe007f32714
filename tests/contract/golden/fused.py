"""Recorded cases of the rules that step within the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_optim import LOMO, AdaLOMO, RuleOptimizer
from tests.contract.golden.common import Case, Params


def _lomo(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    names = {"clip_grad_norm": "clip_norm", "clip_grad_value": "clip_value"}
    return LOMO(params.items(), **{names.get(k, k): v for k, v in h.items()})


def _adalomo(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    return AdaLOMO(params.items(), clip_norm=h.pop("clip_grad_norm", None), **h)


FAMILIES: dict[str, Callable[[Params, dict[str, Any], Case], RuleOptimizer]] = {"AdaLOMO": _adalomo, "LOMO": _lomo}
