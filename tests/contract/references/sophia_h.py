import torch

from tests.helpers.rules import shown

SETTINGS = [{"lr": 1e-2, "weight_decay": 0.2}, {"lr": 1e-2, "rho": 3.0, "betas": (0.9, 0.8), "eps": 1e-3}]


def step(p, g, state, t, h):
    return sophia(p, g, shown(g, t), state, t, h)


def sophia(p, g, estimate, state, t, h):
    b1, b2 = h["betas"]
    state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    if t % 2:
        state["h"] = b2 * state.get("h", 0) + (1 - b2) * estimate
    scaled = h["rho"] * state["h"]
    scale = scaled + h["eps"] if h.get("form") == "reference" else torch.clamp(scaled, min=h["eps"])
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * torch.clamp(state["m"] / scale, -1, 1)
