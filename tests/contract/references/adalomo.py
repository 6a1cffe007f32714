from tests.contract.references.adafactor import rms

SETTINGS = [
    {"lr": 0.02, "weight_decay": 0.1},
    {"lr": 0.5, "clip_threshold": 0.5, "eps": (1e-6, 0.5), "decay_rate": -0.5},
    {"lr": 1e-2, "scale_parameter": False},
]


def step(p, g, state, t, h):
    eps1, eps2 = h["eps"]
    b = 1 - t ** h["decay_rate"]
    square = g**2 + eps1
    if p.ndim < 2:
        v = state["v"] = b * state.get("v", 0) + (1 - b) * square
    else:
        row = state["row"] = b * state.get("row", 0) + (1 - b) * square.mean(1)
        column = state["column"] = b * state.get("column", 0) + (1 - b) * square.mean(0)
        v = row[:, None] * column[None, :] / row.mean()
    u = g / v.sqrt()
    u = u / max(1.0, rms(u) / h["clip_threshold"])
    a = h["lr"] * (max(eps2, rms(p)) if h["scale_parameter"] else 1.0)
    return (1 - a * h["weight_decay"]) * p - a * u
