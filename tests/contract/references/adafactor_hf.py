from tests.contract.references.adafactor import rms

SETTINGS = [
    {"lr": 0.05, "weight_decay": 0.1, "beta1": 0.9},
    {"lr": 0.02, "relative_step": False, "scale_parameter": False, "clip_threshold": 0.5, "weight_decay": 0.1},
    {"lr": 0.7, "warmup_init": True, "eps": (1e-6, 0.5), "decay_rate": -0.5, "beta1": 0.5},
]


def step(p, g, state, t, h):
    a, d = parts(p, g, state, t, h)
    return p - h["weight_decay"] * a * p - d


def parts(p, g, state, t, h):
    """The size of a step and the step without decay, of p's gradient or of a projection of it."""
    u = ratio(g, state, t, h)
    a = size(p, t, h)
    d = a * u / max(1.0, rms(u) / h["clip_threshold"])
    if h["beta1"] is not None:
        d = state["m"] = h["beta1"] * state.get("m", 0) + (1 - h["beta1"]) * d
    return a, d


def ratio(g, state, t, h):
    eps1 = h["eps"][0]
    b = 1 - t ** h["decay_rate"]
    square = g**2 + eps1
    if g.ndim < 2:
        v = state["v"] = b * state.get("v", 0) + (1 - b) * square
    else:
        row = state["row"] = b * state.get("row", 0) + (1 - b) * square.mean(1)
        column = state["column"] = b * state.get("column", 0) + (1 - b) * square.mean(0)
        v = row[:, None] * column[None, :] / row.mean()
    return g / v.sqrt()


def size(p, t, h):
    a = h["lr"]
    if h["relative_step"]:
        a = min(a * 1e-4 * t if h["warmup_init"] else a, t**-0.5)
    return a * max(h["eps"][1], rms(p)) if h["scale_parameter"] else a
