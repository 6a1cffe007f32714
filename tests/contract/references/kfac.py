import torch

from tests.contract.references import due
from tests.helpers.rules import shown

ALONE = {"kl_clip": None}  # couples all layers
STRICT = {"damping": 0.1}
TINY_LR = 5e-5
SETTINGS = [
    {"lr": 0.02, "weight_decay": 0.1, "mode": "inverse", "beta": 0.5},
    {"lr": 0.02, "pi": True, "momentum": 0.0},
    {"lr": 0.02, "pi": True, "mode": "inverse", "damping": 0.3},
]


def step(p, g, state, t, h):
    d = g if g.ndim < 2 else divided(g, state, t, h)
    state["buffer"] = h["momentum"] * state.get("buffer", 0) + d
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * state["buffer"]


def eye(n):
    return torch.eye(n, dtype=torch.float64)


def divided(g, state, t, h):
    m, n = g.shape
    b, damping = h["beta"], h["damping"]
    if t % 2:
        q = shown(g, t)
        state["A"] = b * state.get("A", eye(n)) + (1 - b) * q.T @ q / m
        state["G"] = b * state.get("G", eye(m)) + (1 - b) * q @ q.T / n
    if due(h, t):
        state["used"] = state["A"], state["G"]
    a, c = state["used"]
    pi = (a.trace() / n / (c.trace() / m)).sqrt() if h["pi"] else 1.0
    da, dc = (damping**0.5 * pi, damping**0.5 / pi) if h["pi"] else (damping, damping)
    if h["mode"] == "inverse" or h["pi"]:
        return torch.linalg.inv(c + dc * eye(m)) @ g @ torch.linalg.inv(a + da * eye(n))
    whole = torch.kron(c, a) + damping * eye(m * n)
    return torch.linalg.solve(whole, g.reshape(-1)).view(m, n)
