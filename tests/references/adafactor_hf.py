from tests.references.adafactor import rms

SETTINGS = [
    {"lr": 0.05, "weight_decay": 0.1, "beta1": 0.9},
    {"lr": 0.02, "relative_step": False, "scale_parameter": False, "clip_threshold": 0.5, "weight_decay": 0.1},
    {"lr": 0.7, "warmup_init": True, "eps": (1e-6, 0.5), "decay_rate": -0.5, "beta1": 0.5},
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
    a = h["lr"]
    if h["relative_step"]:
        a = min(a * 1e-4 * t if h["warmup_init"] else a, t**-0.5)
    if h["scale_parameter"]:
        a = a * max(eps2, rms(p))
    d = a * u
    if h["beta1"] is not None:
        d = state["m"] = h["beta1"] * state.get("m", 0) + (1 - h["beta1"]) * d
    return p - h["weight_decay"] * a * p - d
