"""The frontier's part of the mapping: see `tests.contract.golden.mapping`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning_optim import KLSOAP, AdamW, Muon, MuonSq, Muown, NorMuon, RuleOptimizer, SinkSOAP
from tests.contract.golden.common import Case, Params, injected

POLAR: dict[str, Any] = {"ns_steps": 12, "ns_coefficients": "converged", "ns_dtype": "float32"}
"""Twelve converged iterations, recorded in float32."""

HYPERBALL: dict[str, Any] = {"constraint": "hyperball", "weight_decay": 0.0}


def _momentum(h: Case) -> dict[str, Any]:
    return {"lr": h["lr"], "momentum": h["mu"], **POLAR}


def _floor(h: Case) -> dict[str, Any]:
    return {"uw_floor": h["target_uw"]} if h.get("target_uw") else {}


def _soap_muon_278(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    """Matrices that are not preconditioned are NorMuon's."""
    contra = {"contra": h["contra_muon"], "contra_size": "power"}
    shared = {**_momentum(h), **_floor(h), **contra, "weight_decay": 0.0}
    soap = {
        "beta2": h["soap_beta2"],
        "refresh": f"fixed:{h['precondition_frequency']}",
        "restore": "fro",
        "ns_divisor": "fro",
        "inner_eps_added": True,
        "lines": "longer",
    }
    chosen = [(n, p) for n, p in params.items() if n in h["soap_params"]]
    others = [(n, p) for n, p in params.items() if n not in h["soap_params"]]
    groups = [
        {"params": chosen, "rule": "soap_muon", **shared, **soap},
        {"params": others, "rule": "normuon", **shared, "lines": "longer"},
    ]
    return injected(RuleOptimizer([g for g in groups if g["params"]]), params, case)


def _soap_muon_321(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    settings = {**_momentum(h), "beta2": h["soap_beta2"], "refresh": f"fixed:{h['precondition_frequency']}"}
    settings |= _floor(h)
    if h.get("row_floor"):
        settings["uw_floor_by"] = "row"
    if h["radial_outward_scale"] != 1:
        settings["radial_damping"] = h["radial_outward_scale"]
    if h["radius_pin"]:
        settings["pin"] = True
    if h.get("cautious_weight_decay"):
        settings |= {"cautious_decay": h["cautious_weight_decay"], "cautious_when": "after_pin"}
    steps = h.get("trust_floor_end_step", 1375), h.get("trust_floor_fade_end_step", 1625)
    gate = (h.get("trust_floor", 0.45), h.get("trust_cap", 0.85), *steps)
    gated = [(n, p) for n, p in params.items() if n in h["trust_gate_params"]]
    others = [(n, p) for n, p in params.items() if n not in h["trust_gate_params"]]
    groups = [
        {"params": gated, "rule": "soap_muon", **settings, "trust_gate": gate},
        {"params": others, "rule": "soap_muon", **settings},
    ]
    return injected(RuleOptimizer([g for g in groups if g["params"]]), params, case)


def _kl_soap_h(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    optimizer = KLSOAP(
        params.items(),
        lr=h["lr"],
        betas=(h["beta1"], h["beta2"]),
        shampoo_beta=h["shampoo_beta"],
        eps=h["eps"],
        refresh=f"fixed:{h['precondition_frequency']}",
        **HYPERBALL,
    )
    return injected(optimizer, params, case)


def _muon_h(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    return Muon(params.items(), **_momentum(h), **HYPERBALL)


def _nor_muon_h(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    return NorMuon(params.items(), **_momentum(h), beta2=h["beta2"], lines="longer", **HYPERBALL)


def _adam_h(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    return AdamW(params.items(), lr=h["lr"], betas=tuple(h["betas"]), eps=h["eps"], **HYPERBALL)


def _muon_sq(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    decay = h.get("weight_decay", 0.0125)
    return MuonSq(params.items(), **_momentum(h), beta2=h["beta2"], inner_eps=h["eps"], weight_decay=decay)


def _contra_muon(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    contra = {"contra": h["contra_muon"], "contra_size": "power", "lines": "longer"}
    return NorMuon(params.items(), **_momentum(h), **_floor(h), **contra)


def _sink_soap(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    return SinkSOAP(
        params.items(),
        lr=h["lr"],
        weight_decay=h["weight_decay"],
        momentum=h["mu"],
        beta2=h["gram_beta"],
        sinkhorn=h["sinkhorn_steps"],
        lines="unequal" if h.get("apply_normuon", True) else "none",
        lines_beta=h["normuon_beta"],
        refresh="fixed:1",
    )


def _muown(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    return Muown(
        params.items(),
        lr=h["lr"],
        momentum=h["momentum"],
        betas=tuple(h["betas"]),
        eps=h.get("adam_eps", 1e-8),
        ns_steps=h["ns_steps"],
        ns_dtype="float32",
        schedule_steps=h["v_norm_schedule_steps"],
        length=h["v_norm_target_scale"],
        direction_scale=h["direction_scale"],
    )


FAMILIES: dict[str, Callable[[Params, dict[str, Any], Case], RuleOptimizer]] = {
    "AdamH": _adam_h,
    "ContraMuon": _contra_muon,
    "KLSOAPH": _kl_soap_h,
    "MuonH": _muon_h,
    "MuonSq": _muon_sq,
    "Muown": _muown,
    "NorMuonH": _nor_muon_h,
    "SOAPMuon-PR278": _soap_muon_278,
    "SOAPMuon-PR321": _soap_muon_321,
    "SOAPMuon-record46": _soap_muon_321,
    "SinkSOAP": _sink_soap,
}
