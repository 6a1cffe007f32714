"""The part of the mapping for rules that are shown more than gradients: see `tests.contract.golden.mapping`."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from lightning_optim import KFAC, LBFGS, RuleOptimizer, SophiaG, SophiaH
from lightning_optim.curvature import CurvatureEstimator
from tests.contract.golden import replay
from tests.contract.golden.common import Case, Params


def _sophia_g(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    """Of the authors: step(bs) with a default of 5120."""
    h["tokens"] = h.pop("bs", 5120)
    return _shown(SophiaG(params.items(), **h), params)


def _sophia_paper(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    """The estimate itself is recorded, whichever it was."""
    h["rho"] = h.pop("gamma", 0.01)
    return _shown(SophiaH(params.items(), **h), params)


def _kfac(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    """Of kfac-pytorch and torch's SGD. The estimator needs passes through a module, so they are taken in the step."""
    given, sgd = dict(h["kfac"]), dict(h["sgd"])
    optimizer = KFAC(
        params.items(),
        lr=sgd["lr"],
        momentum=sgd.get("momentum", 0.0),
        weight_decay=sgd.get("weight_decay", 0.0),
        beta=given.get("factor_decay", 0.95),
        damping=given.get("damping", 1e-3),
        kl_clip=given.get("kl_clip", 1e-3),
        mode=given.get("compute_method", "eigen").lower(),
        factors=f"fixed:{given.get('factor_update_steps', 1)}",
        refresh=f"fixed:{given.get('inv_update_steps', 1)}",
    )
    model = nn.Sequential(_linear(params["w1"], params["b1"]), nn.Tanh(), _linear(params["w2"], params["b2"]))
    problem = replay.load_case(case)[2]
    x, y = (problem[key].to(params["w1"].dtype) for key in "xy")

    def loss(batch: Any) -> Tensor:
        return 0.5 * (model(x) - y).square().sum(1).mean()

    estimator, step = CurvatureEstimator(model, optimizer, loss), optimizer.step

    def passing(closure: Any = None) -> Any:
        optimizer.zero_grad()
        estimator.record_batch(x)
        loss(x).backward()
        estimator.estimate()
        return step(closure)

    optimizer.step = passing
    return optimizer


def _lbfgs(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    return LBFGS(params.items(), **{"history_size": 100, **h})


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0])
    layer.weight, layer.bias = weight, bias  # pyright: ignore[reportAttributeAccessIssue]
    return layer


def _shown(optimizer: RuleOptimizer, params: Params) -> RuleOptimizer:
    optimizer.has_curvature = True

    def update_hessian(found: dict[str, Tensor], t: int) -> None:
        optimizer.update_curvature({params[name]: SimpleNamespace(value=x, count=1) for name, x in found.items()})

    optimizer.update_hessian = update_hessian  # pyright: ignore[reportAttributeAccessIssue]
    return optimizer


FAMILIES: dict[str, Callable[[Params, dict[str, Any], Case], RuleOptimizer]] = {
    "KFAC": _kfac,
    "LBFGS": _lbfgs,
    "Sophia-G": _sophia_g,
    "Sophia-paper": _sophia_paper,
}
