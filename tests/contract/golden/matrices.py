"""The matrix rules' part of the mapping: see `tests.contract.golden.mapping`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import RACS, SWAN, Alice, Alice0, Dion, EigenAdam, PSGDKron, RuleOptimizer, Shampoo
from lightning_optim.core.step import stacked

Params = dict[str, Parameter]
Case = dict[str, Any]


def _racs(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    return RACS(params.items(), limit=h.pop("gamma", 1.01), iterations=h.pop("iters", 5), **h)


def _swan(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    return SWAN(params.items(), **h, root="eigh")  # recorded with the exact root


def _eigen_adam(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    return EigenAdam(params.items(), refresh=_multiples(h.pop("interval", 200)), **h)


def _multiples(interval: int) -> str:
    """The policy that refreshes at step 1 and at the multiples of an interval."""
    return f"fixed:{interval}:{interval}"


def _dion(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    optimizer = Dion(params.items(), momentum=h.pop("mu", 0.95), **h)
    return _injected(optimizer, params, lambda name, t: case["inject"].get(f"Q_{t - 1}/{name}"))


def _injected(optimizer: RuleOptimizer, params: Params, recorded: Callable[[str, int], Tensor | None]) -> RuleOptimizer:
    """Replace the random numbers that rules draw by recorded ones."""
    names, draw, step = {id(p): name for name, p in params.items()}, stacked._noise, optimizer.step

    def noise(group: Any, chunk: Any, frame: Any, letters: str, stream: int = 0) -> Tensor:
        drawn = draw(group, chunk, frame, letters, stream).split(chunk[0].plan.dims[0])
        found = [recorded(names[id(s.plan.param)], s.t) for s in chunk]
        return torch.cat([d if f is None else f.to(d).view(d.shape) for d, f in zip(drawn, found, strict=True)])

    def injecting(closure: Callable[[], Any] | None = None) -> Any:
        with mock.patch.object(stacked, "_noise", noise):
            return step(closure)

    optimizer.step = injecting
    return optimizer


def _cosmos(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    """Vectors run the reference's own Adam, whose first moment has a weight of 0.1 whatever beta1 is."""
    vectors = [(n, p) for n, p in params.items() if p.ndim < 2]
    matrices = [(n, p) for n, p in params.items() if p.ndim >= 2]
    shared = {k: h[k] for k in ("lr", "betas", "weight_decay", "eps") if k in h}
    adam = {"lr": 1e-3, "betas": (0.9, 0.999), "weight_decay": 0.0, **shared}
    if "nestrov" in h:
        h["momentum"] = "nesterov" if h.pop("nestrov") else "gradient"
    groups = [
        {"params": matrices, "rule": "cosmos", **h, "ns_dtype": "float32"},
        {"params": vectors, "rule": "adamw", **adam},
    ]
    return RuleOptimizer([g for g in groups if g["params"]])


def _alice(cls: Callable[..., RuleOptimizer]) -> Callable[[Params, dict[str, Any], Case], RuleOptimizer]:
    def made(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
        optimizer = cls(params.items(), refresh=_multiples(h.pop("interval", 200)), limit=h.pop("gamma", 1.01), **h)
        names, refresh, step = {id(p): name for name, p in params.items()}, stacked.refresh_if_due, optimizer.step

        def recorded(job: Any, chunk: Any, s: Any, g: Tensor) -> None:
            refresh(job, chunk, s, g)
            found = [case["inject"].get(f"U_{x.t}/{names[id(x.plan.param)]}") for x in chunk]
            if all(u is not None for u in found):
                s.basis = torch.stack([u.to(g) for u in found])

        def injecting(closure: Callable[[], Any] | None = None) -> Any:
            with mock.patch.object(stacked, "refresh_if_due", recorded):
                return step(closure)

        optimizer.step = injecting
        return optimizer

    return made


def _psgd_kron(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    """Of pytorch_optimizer: an update counter, so a probability of 0.2 fits at steps 5, 10, 15."""
    interval = round(1 / h.pop("pre_conditioner_update_probability"))
    h.pop("balance_prob", None)
    optimizer = PSGDKron(params.items(), refresh=_multiples(interval), start=interval, init_scale=1.0, **h)
    return _injected(optimizer, params, lambda name, t: case["inject"].get(f"probe_{t}/{name}"))


def _shampoo_distributed(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    """Of facebookresearch/optimizers: a beta2 of 1 is a sum, a start of -1 the first multiple of the interval."""
    beta1, beta2 = h.pop("betas", (0.9, 1.0))
    interval = h.pop("precondition_frequency", 1)
    start = h.pop("start_preconditioning_step", -1)
    graft: Case = h.pop("grafting", None) or {"type": "none"}
    beta3 = h.pop("beta3", -1.0)
    return Shampoo(
        params.items(),
        lr=h.get("lr", 0.01),
        betas=(beta1, 0.0 if beta2 == 1 else beta2),
        beta3=None if beta3 < 0 else beta3,
        eps=h.get("epsilon", 1e-12),
        weight_decay=h.get("weight_decay", 0.0),
        decay="coupled" if h.get("weight_decay_type") == "L2" else "before",
        refresh=_multiples(interval),
        start=interval if start < 0 else start,
        accumulate="sum" if beta2 == 1 else "average",
        correct_bias=h.get("use_bias_correction", True),
        preconditioner="eigenvalue" if str(h.get("preconditioner")).startswith("soap") else "root",
        graft=graft["type"],
        graft_beta2=graft.get("beta2", 0.999),
        graft_eps=graft.get("epsilon", 1e-8),
        max_dim=h.get("max_preconditioner_dim", 1024),
        target_dims=h.get("target_parameter_dimensionality", 1),
    )


def _shampoo_paper(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    """Of pytorch_optimizer: the paper's sums; before the first multiple of the interval only the decay acts."""
    interval = h.get("preconditioning_compute_steps", 1)
    decoupled = h.get("weight_decouple", False)
    return Shampoo(
        params.items(),
        lr=h.get("lr", 1e-3),
        betas=(0.0, 0.0),
        eps=h.get("matrix_eps", 1e-6),
        weight_decay=h.get("weight_decay", 0.0),
        decay="before" if decoupled else "coupled",
        refresh=_multiples(interval),
        start=interval,
        early="decay",
        accumulate="sum",
        graft="none",
        max_dim=None,
    )


FAMILIES: dict[str, Callable[[Params, dict[str, Any], Case], RuleOptimizer]] = {
    "Alice": _alice(Alice),
    "Alice-0": _alice(Alice0),
    "COSMOS": _cosmos,
    "Dion": _dion,
    "EigenAdam": _eigen_adam,
    "PSGD-Kron": _psgd_kron,
    "RACS": _racs,
    "SWAN": _swan,
    "Shampoo-distributed": _shampoo_distributed,
    "Shampoo-pytorch_optimizer": _shampoo_paper,
}
