"""The part of the mapping for rules that are shown more than gradients: see `tests.golden.mapping`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor

from lightning_optim import Executor, SophiaG, SophiaH
from tests.golden.common import Case, Params


def _sophia_g(params: Params, h: dict[str, Any], case: Case) -> Executor:
    """Of the authors: step(bs) with a default of 5120."""
    h["tokens"] = h.pop("bs", 5120)
    return _shown(SophiaG(params.items(), **h), params)


def _sophia_paper(params: Params, h: dict[str, Any], case: Case) -> Executor:
    """The estimate itself is recorded, whichever it was."""
    h["rho"] = h.pop("gamma", 0.01)
    return _shown(SophiaH(params.items(), **h), params)


def _shown(optimizer: Executor, params: Params) -> Executor:
    optimizer.fed = True

    def update_hessian(found: dict[str, Tensor], t: int) -> None:
        optimizer.observe({params[name]: SimpleNamespace(value=x, count=1) for name, x in found.items()})

    optimizer.update_hessian = update_hessian  # pyright: ignore[reportAttributeAccessIssue]
    return optimizer


FAMILIES: dict[str, Callable[[Params, dict[str, Any], Case], Executor]] = {
    "Sophia-G": _sophia_g,
    "Sophia-paper": _sophia_paper,
}
