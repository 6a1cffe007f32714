import torch

SETTINGS = [
    {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1},
    {"lr": 1e-2, "block": "matrix", "weight_decay": 0.1},
    {"lr": 1e-2, "statistic": "max"},
    {"lr": 1e-2, "statistic": "min", "block": "matrix"},
    {"lr": 1e-2, "statistic": "l1"},
]


def step(p, g, state, t, h):
    b1, b2 = h["betas"]
    of = {"mean": torch.mean, "max": torch.amax, "min": torch.amin, "l1": torch.sum}[h["statistic"]]
    if h["block"] == "matrix":
        square = of(g**2)
    else:
        square = of(g**2, 1, keepdim=True) if p.ndim == 2 else g**2
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * square
    d = (m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + h["eps"])
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * d
