"""What the mappings share: types, and how the references' scripts split parameters."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import Parameter

from lightning_optim import RuleOptimizer

Params = dict[str, Parameter]
Case = dict[str, Any]


def split(params: Params) -> tuple[list[tuple[str, Parameter]], list[tuple[str, Parameter]]]:
    """Hidden matrices and the rest, as the references' scripts split them: by dimensions, embedding and head apart."""
    edge = ("embed", "lm_head")
    hidden = [(n, p) for n, p in params.items() if p.ndim >= 2 and not any(e in n for e in edge)]
    taken = {n for n, _ in hidden}
    return hidden, [(n, p) for n, p in params.items() if n not in taken]


def _inject_basis(optimizer: torch.optim.Optimizer, params: Params, case: Case) -> None:
    """Set the recorded first eigenbases after step 1."""
    for name, p in params.items():
        if int(optimizer.state[p]["step"]) == 1:
            sides = ("left", "right") if p.ndim == 2 else ("right",)
            for i, side in enumerate(sides):
                basis = case["inject"].get(f"basis{i}_1/{name}")
                if basis is not None and f"basis_{side}" in optimizer.state[p]:
                    optimizer.state[p][f"basis_{side}"].copy_(basis)


def injected(optimizer: RuleOptimizer, params: Params, case: Case) -> RuleOptimizer:
    """The optimizer, which takes over the recorded first eigenbases, if there are any."""
    if case.get("inject"):
        optimizer.register_step_post_hook(lambda opt, *_: _inject_basis(opt, params, case))
    return optimizer
