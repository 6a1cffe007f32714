from tests.contract.references.adafactor import rms

STRICT = {"rank": 12}  # a full rank leaves nothing to chance
SETTINGS = [
    {"lr": 0.01, "betas": (0.0, 0.9), "clip_threshold": 0.5},
    {"lr": 0.01, "betas": (0.8, 0.95), "weight_decay": 0.0, "eps": 1e-3},
]


def step(p, g, state, t, h):
    b1, b2 = h["betas"]
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    u = g / (v.sqrt() + h["eps"])
    u = u / max(1.0, rms(u) / h["clip_threshold"])
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * u
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * m
