SETTINGS = [
    {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1},
    {"lr": 1e-2, "weight_decay": 0.0, "exclude_vectors": False, "trust_clip": 1.0},
    {"lr": 1e-2, "norm_bounds": (0.5, 5.0), "correct_bias": False, "eps": 1e-3},
]


def step(p, g, state, t, h):
    b1, b2 = h["betas"]
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    if h["correct_bias"]:
        m, v = m / (1 - b1**t), v / (1 - b2**t)
    u = m / (v.sqrt() + h["eps"])
    if p.ndim < 2 and h["exclude_vectors"]:
        return p - h["lr"] * u
    u = u + h["weight_decay"] * p
    length = p.norm().clamp(*h["norm_bounds"]) if h["norm_bounds"] else p.norm()
    ratio = float(length / u.norm()) if float(length) and float(u.norm()) else 1.0
    return p - h["lr"] * min(ratio, h["trust_clip"] or ratio) * u
