"""From a recorded case to our optimizer: the reference's argument names become ours, never a case's id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import Parameter

from lightning_optim import SGD, Adafactor, Adam, AdamW, Executor, Lion, Muon

Params = dict[str, Parameter]
Case = dict[str, Any]


def make(params: Params, case: Case) -> torch.optim.Optimizer:
    """Build our optimizer for a case.

    Args:
        params: parameters by name, at the recorded start.
        case: an entry of the manifest.

    Returns:
        The optimizer.
    """
    return FAMILIES[case["optimizer"]](params, dict(case["hyperparameters"]), case)


def supports(case: Case) -> bool:
    """Whether the family of a case is in the package."""
    return case["optimizer"] in FAMILIES


def _torch_iteration(case: Case) -> dict[str, Any]:
    """torch iterates in bfloat16, with our order of operations, unless the cast was switched off for the recording."""
    return {"ns_dtype": "float32"} if (case.get("run_options") or {}).get("ns_fp32") else {}


FLOAT32 = {"ns_dtype": "float32"}
"""Jordan's and Moonlight's bfloat16 roundings belong to an order of operations that is not ours (theirs adds outside
the product). Their bfloat16 cases are compared with a float32 iteration, for which the tolerance was recorded."""


def _plain(cls: Callable[..., Executor]) -> Callable[[Params, dict[str, Any], Case], Executor]:
    return lambda params, h, case: cls(params.items(), **h)


def _lion(params: Params, h: dict[str, Any], case: Case) -> Executor:
    if h.pop("decoupled_weight_decay", False):  # lion-pytorch divides by the initial learning rate
        h["weight_decay"] = h.get("weight_decay", 0.0) / h.get("lr", 1e-4)
    return Lion(params.items(), **h)


def _muon_torch(params: Params, h: dict[str, Any], case: Case) -> Executor:
    defaults = {"lr": 1e-3, "weight_decay": 0.1}
    h["scale"] = h.pop("adjust_lr_fn", None) or "original"
    return Muon(params.items(), **{**defaults, **h, **_torch_iteration(case)})


def _muon_keller_jordan(params: Params, h: dict[str, Any], case: Case) -> Executor:
    return Muon(params.items(), **{"lr": 0.02, **h, **FLOAT32})


def _split(params: Params) -> tuple[list[tuple[str, Parameter]], list[tuple[str, Parameter]]]:
    """Hidden matrices and the rest, as the references' scripts split them: by dimensions, embedding and head apart."""
    edge = ("embed", "lm_head")
    hidden = [(n, p) for n, p in params.items() if p.ndim >= 2 and not any(e in n for e in edge)]
    taken = {n for n, _ in hidden}
    return hidden, [(n, p) for n, p in params.items() if n not in taken]


def _hybrid(params: Params, muon: dict[str, Any], adam: dict[str, Any]) -> Executor:
    hidden, rest = _split(params)
    groups = [{"params": hidden, "rule": "muon", **muon}, {"params": rest, "rule": "adamw", **adam}]
    return Executor([g for g in groups if g["params"]])


def _muon_aux_adam(params: Params, h: dict[str, Any], case: Case) -> Executor:
    adam = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
    muon = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, **FLOAT32}
    return _hybrid(params, {**muon, **h["muon"]}, {**adam, **h["adam"]})


def _muon_moonlight(params: Params, h: dict[str, Any], case: Case) -> Executor:
    h = {"lr": 1e-3, "wd": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5, **h}
    shared = {"lr": h["lr"], "weight_decay": h["wd"]}
    muon = {k: h[k] for k in ("momentum", "nesterov", "ns_steps")}
    adam = {"betas": h.get("adamw_betas", (0.9, 0.95)), "eps": h.get("adamw_eps", 1e-8), "eps_mode": "uncorrected"}
    return _hybrid(params, {**shared, **muon, "scale": "match_rms_adamw", **FLOAT32}, {**shared, **adam})


FAMILIES: dict[str, Callable[[Params, dict[str, Any], Case], Executor]] = {
    "Adafactor-torch": _plain(Adafactor),
    "Adam": _plain(Adam),
    "AdamW": _plain(AdamW),
    "Lion": _lion,
    "Muon-KellerJordan": _muon_keller_jordan,
    "Muon-KellerJordan-AuxAdam": _muon_aux_adam,
    "Muon-Moonlight": _muon_moonlight,
    "Muon-torch": _muon_torch,
    "SGD": _plain(SGD),
}
