import torch

from tests.contract.references import due

SETTINGS = [
    {"lr": 0.01, "betas": (0.8, 0.9, 0.95), "refresh": "fixed:3:3", "weight_decay": 0.1},
    {"lr": 0.01, "refresh": "fixed:1", "correct_bias": True},
]


def step(p, g, state, t, h):
    x, (b1, b2, b3) = (g if len(g) <= g.shape[1] else g.T), h["betas"]
    q = state["q"] = b3 * state.get("q", 0) + (1 - b3) * x @ x.T
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * x
    if due(h, t):
        state["u"] = torch.linalg.eigh(q).eigenvectors.flip(1)
    u = state["u"]
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * (u.T @ x) ** 2
    if h["correct_bias"]:
        m, v = m / (1 - b1**t), v / (1 - b2**t)
        h = {**h, "eps": h["eps"] / (1 - b2**t) ** 0.5}
    d = u @ ((u.T @ m) / (v.sqrt() + h["eps"]))
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * (d if d.shape == p.shape else d.T)
