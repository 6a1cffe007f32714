"""From a recorded case to our optimizer: the reference's argument names become ours, never a case's id."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lightning_optim import (
    CAME,
    LAMB,
    LARS,
    SGD,
    SOAP,
    Adafactor,
    AdafactorHF,
    Adagrad,
    Adam,
    AdamW,
    AMSGrad,
    EMANesterov,
    Lion,
    Muon,
    NorMuon,
    RMSprop,
    RuleOptimizer,
    SignSGD,
    Signum,
)
from tests.contract.golden import curved, frontier, fused, matrices, projected
from tests.contract.golden.common import Case, Params, injected, split


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


FLOAT32: dict[str, Any] = {"ns_dtype": "float32"}
"""Jordan's and Moonlight's bfloat16 roundings belong to an order of operations that is not ours (theirs adds outside
the product). Their bfloat16 cases are compared with a float32 iteration, for which the tolerance was recorded."""


def _plain(cls: Callable[..., RuleOptimizer]) -> Callable[[Params, dict[str, Any], Case], RuleOptimizer]:
    return lambda params, h, case: cls(params.items(), **h)


def _adafactor(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    if "eps" in h:
        h["eps1"], h["eps2"] = h.pop("eps")
    return Adafactor(params.items(), **h)


def _adafactor_hf(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    return AdafactorHF(params.items(), **{"lr": 1e-2, **{k: v for k, v in h.items() if v is not None}})


def _adam_uncorrected(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    return Adam(params.items(), **h, correct_bias=False)


def _lamb(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    return LAMB(params.items(), **h, exclude_vectors=False)


def _lars_paper(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    h["trust_coefficient"] = h.pop("trust", 1e-3)
    return LARS(params.items(), **h, exclude_vectors=False, lr_in_momentum=True, zero_gradient_rate="one")


def _signsgd(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    momentum = h.pop("momentum", 0.9)
    return Signum(params.items(), momentum=momentum, **h) if momentum else SignSGD(params.items(), **h)


def _lion(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    if h.pop("decoupled_weight_decay", False):  # lion-pytorch divides by the initial learning rate
        h["weight_decay"] = h.get("weight_decay", 0.0) / h.get("lr", 1e-4)
    return Lion(params.items(), **h)


def _muon_torch(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    defaults = {"lr": 1e-3, "weight_decay": 0.1}
    h["scale"] = h.pop("adjust_lr_fn", None) or "original"
    return Muon(params.items(), **{**defaults, **h, **_torch_iteration(case)})


def _muon_keller_jordan(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    return Muon(params.items(), **{"lr": 0.02, **h, **FLOAT32})


def _hybrid(params: Params, muon: dict[str, Any], adam: dict[str, Any]) -> RuleOptimizer:
    hidden, rest = split(params)
    groups = [{"params": hidden, "rule": "muon", **muon}, {"params": rest, "rule": "adamw", **adam}]
    return RuleOptimizer([g for g in groups if g["params"]])


def _muon_aux_adam(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    adam = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-10, "weight_decay": 0.0}
    muon = {"lr": 0.02, "momentum": 0.95, "weight_decay": 0.0, **FLOAT32}
    return _hybrid(params, {**muon, **h["muon"]}, {**adam, **h["adam"]})


def _muon_moonlight(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    h = {"lr": 1e-3, "wd": 0.1, "momentum": 0.95, "nesterov": True, "ns_steps": 5, **h}
    shared = {"lr": h["lr"], "weight_decay": h["wd"]}
    muon = {k: h[k] for k in ("momentum", "nesterov", "ns_steps")}
    adam = {"betas": h.get("adamw_betas", (0.9, 0.95)), "eps": h.get("adamw_eps", 1e-8), "eps_mode": "uncorrected"}
    return _hybrid(params, {**shared, **muon, "scale": "match_rms_adamw", **FLOAT32}, {**shared, **adam})


def _normuon(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    """Of microsoft/dion: momentum without Nesterov and Polar Express by default, the scale under `adjust_lr`."""
    scale: dict[str | None, Any] = {"spectral_norm": "spectral", "rms_norm": "match_rms_adamw", None: "none"}
    polar = h.get("use_polar_express", True)
    fp32 = (case.get("run_options") or {}).get("ns_fp32")  # recorded with the constant quintic
    coefficients = "quintic" if fp32 else "polar_express" if polar else "annealed"
    return NorMuon(
        params.items(),
        lr=h.get("lr", 0.01),
        momentum=h.get("mu", 0.95),
        beta2=h.get("muon_beta2", 0.95),
        nesterov=h.get("nesterov", False),
        weight_decay=h.get("weight_decay", 0.01),
        scale=scale[h.get("adjust_lr", "spectral_norm")],
        cautious_decay=h.get("cautious_wd", False),
        ns_coefficients=coefficients,
        **FLOAT32,
    )


def _adam_mini(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    """Of adam-mini 1.1.1: blocks by the reference's own substrings of lower-cased names, first match wins."""
    dim, heads = h.pop("dim"), h.pop("n_heads")
    h.pop("n_kv_heads", None)
    rows = (
        "embed embd wte lm_head output final_layer v_proj wv value feed_forward linear mlp o_proj wo attn.proj".split()
    )
    groups = []
    for name, p in params.items():
        low, settings = name.lower(), dict(h)
        if any(k in low for k in ("norm", "ln", "bias")):
            settings["weight_decay"] = 0.0
        if "bias" in low:
            settings["block"] = "row"
        elif any(k in low for k in ("k_proj", "q_proj", "wq", "wk", "query", "key")):
            settings |= {"block": "matrix", "blocks": p.numel() * heads // (dim * dim)}
        else:
            settings["block"] = "row" if any(k in low for k in rows) else "matrix"
        groups.append({"params": [(name, p)], "rule": "adam_mini", "name": name, **settings})
    return RuleOptimizer(groups)


def _soap(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    h.pop("merge_dims", None)
    h.pop("data_format", None)
    beta = h.pop("shampoo_beta", -1)
    h["refresh"] = f"fixed:{h.pop('precondition_frequency', 10)}"
    return injected(SOAP(params.items(), **h, shampoo_beta=None if beta < 0 else beta), params, case)


def _adamw8bit_bitsandbytes(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    """Recorded on a CPU, where bitsandbytes rounds to an even grid first."""
    smallest = h.pop("min_8bit_size", 4096)
    return AdamW(params.items(), **h, state_storage="int8_grid", storage_min=smallest)


def _adamw8bit_torchao(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    """torchao quantises only tensors of whole blocks."""
    block = h.pop("block_size", 256)
    whole = {n: p for n, p in params.items() if p.numel() % block == 0}
    groups = [
        {"params": list(whole.items()), "state_storage": "int8", "storage_block": block},
        {"params": [(n, p) for n, p in params.items() if n not in whole]},
    ]
    return AdamW([g for g in groups if g["params"]], **h)


def _ema_nesterov(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    inner = AdamW(params.items(), lr=h["lr"], betas=h["betas"], weight_decay=h["weight_decay"])
    steps = {"start": h["prefill_steps"], "stop": h["rest_steps"]}
    return inner.with_averaging(EMANesterov(h["lookahead_stepsize"], h["lookahead_ema"], **steps))


FAMILIES: dict[str, Callable[[Params, dict[str, Any], Case], RuleOptimizer]] = {
    "CAME": _plain(CAME),
    "AMSGrad": _plain(AMSGrad),
    "Adafactor-HF": _adafactor_hf,
    "Adafactor-torch": _adafactor,
    "Adagrad": _plain(Adagrad),
    "Adam": _plain(Adam),
    "Adam-mini": _adam_mini,
    "AdamNoBiasCorrection": _adam_uncorrected,
    "AdamW": _plain(AdamW),
    "AdamW8bit-bitsandbytes": _adamw8bit_bitsandbytes,
    "AdamW8bit-torchao": _adamw8bit_torchao,
    "EMANesterov": _ema_nesterov,
    "LAMB-paper": _lamb,
    "LARS": _plain(LARS),
    "LARS-paper": _lars_paper,
    "Lion": _lion,
    "Muon-KellerJordan": _muon_keller_jordan,
    "Muon-KellerJordan-AuxAdam": _muon_aux_adam,
    "Muon-Moonlight": _muon_moonlight,
    "Muon-torch": _muon_torch,
    "NorMuon": _normuon,
    "RMSprop": _plain(RMSprop),
    "SGD": _plain(SGD),
    "SOAP": _soap,
    "SignSGD": _signsgd,
    **curved.FAMILIES,
    **frontier.FAMILIES,
    **fused.FAMILIES,
    **matrices.FAMILIES,
    **projected.FAMILIES,
}
