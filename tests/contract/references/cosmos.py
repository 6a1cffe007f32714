import torch

from tests.contract.references import due
from tests.contract.references.muon import newton_schulz

STRICT = {"ns_dtype": "float64"}
NARROW = {"ns_dtype": "float32"}
SETTINGS = [
    {"lr": 0.02, "rank": 2, "betas": (0.8, 0.9), "weight_decay": 0.1},
    {"lr": 0.02, "rank": 3, "momentum": "momentum", "gamma": 0.5, "lr_ratio": 0.3, "refresh": "fixed:1"},
    {"lr": 0.02, "rank": 2, "momentum": "gradient", "refresh": "fixed:3"},
]


def step(p, g, state, t, h):
    (b1, b2), rank = h["betas"], min(h["rank"], *p.shape)
    m = state["m"] = b1 * state.get("m", 0) + g
    s = state.get("s", torch.zeros(rank, rank, dtype=g.dtype))
    if t == 1:
        state["u"] = torch.linalg.svd(g).Vh[:rank].T
    elif due(h, t):
        old = state["u"]
        state["u"] = torch.linalg.qr(b2 * old @ s + (1 - b2) * g.T @ g @ old).Q
        s = (old.T @ state["u"]).T @ s @ (old.T @ state["u"])
    u = state["u"]
    state["s"] = b2 * s + (1 - b2) * (g @ u).T @ (g @ u)
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * (g @ u) ** 2
    w = sum(b1**k for k in range(t))
    n = {"nesterov": (g + b1 * m) / (1 + b1 * w), "momentum": m / w, "gradient": g / w}[h["momentum"]]
    a = (n @ u) / ((v / (1 - b2**t)).sqrt() + h["eps"]) @ u.T
    d, rest = a, n - n @ u @ u.T
    if rest.norm() > 1e-13 * n.norm():
        b = newton_schulz(rest, {"ns_coefficients": "quintic", "eps": 1e-7, "ns_steps": h["ns_steps"]})
        d = a + h["gamma"] * b / b.square().mean().sqrt()
    d = h["lr_ratio"] * d / d.square().mean().sqrt()
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * d
