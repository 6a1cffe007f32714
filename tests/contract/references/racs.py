import torch

SETTINGS = [
    {"lr": 0.02, "beta": 0.8, "weight_decay": 0.1, "limit": 1.0},
    {"lr": 0.02, "ema": False, "iterations": 3},
    {"lr": 0.02, "correct_bias": True, "alpha": 0.5},
    {"lr": 0.02, "normalize": True},
]


def step(p, g, state, t, h):
    a = g**2
    q, s = torch.ones(len(g), dtype=g.dtype), torch.ones(g.shape[1], dtype=g.dtype)
    for _ in range(h["iterations"]):
        s = a.T @ q / (q @ q)
        q = a @ s / (s @ s)
    if h["ema"]:
        s = state["s"] = h["beta"] * state.get("s", 0) + (1 - h["beta"]) * s
        q = state["q"] = h["beta"] * state.get("q", 0) + (1 - h["beta"]) * q
    if h["ema"] and h["correct_bias"]:
        s, q = s / (1 - h["beta"] ** t), q / (1 - h["beta"] ** t)
    u = g / q[:, None].sqrt() / s.sqrt()
    if h["normalize"]:
        u = u / u.square().mean().sqrt()
    elif state.get("norm", 0) > 0:
        u = u / max(float(u.norm()) / state["norm"], h["limit"]) * h["limit"]
    state["norm"] = float(u.norm())
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * h["alpha"] * u
