from tests.contract.references.adafactor import rms

TINY_LR = 5e-5  # the first directions have an RMS of 11
SETTINGS = [
    {"lr": 1e-3, "weight_decay": 0.1, "betas": (0.8, 0.95, 0.99)},
    {"lr": 1e-3, "eps": (1e-6, 1e-3), "clip_threshold": 0.5},
]


def factored(state, key, x, beta, eps):
    row = state[key, 0] = beta * state.get((key, 0), 0) + (1 - beta) * (x**2 + eps).mean(1)
    column = state[key, 1] = beta * state.get((key, 1), 0) + (1 - beta) * (x**2 + eps).mean(0)
    return (row[:, None] * column[None, :] / row.mean()).sqrt()


def step(p, g, state, t, h):
    b1, b2, b3 = h["betas"]
    keep = 1 - h["lr"] * h["weight_decay"]
    if p.ndim < 2:
        v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * (g**2 + h["eps"][0])
        u = g / v.sqrt()
    else:
        u = g / factored(state, "v", g, b2, h["eps"][0])
    u = u / max(1.0, rms(u) / h["clip_threshold"])
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * u
    if p.ndim < 2:
        return keep * p - h["lr"] * m
    return keep * p - h["lr"] * m / factored(state, "s", u - m, b3, h["eps"][1])
