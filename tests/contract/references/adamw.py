SETTINGS = [
    {"lr": 1e-2, "betas": (0.9, 0.95), "weight_decay": 0.1},
    {"lr": 1e-2, "amsgrad": True},
    {"lr": 1e-2, "eps": 1e-3, "eps_mode": "uncorrected", "weight_decay": 0.1},
    {"lr": 1e-2, "eps": 1e-3, "correct_bias": False},
]


def moments(g, state, t, h):
    b1, b2 = h["betas"]
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * g**2
    if h["amsgrad"]:
        v = state["top"] = v.maximum(state.get("top", v))
    if not h["correct_bias"]:
        return m / (v.sqrt() + h["eps"])
    correction = (1 - b2**t) ** 0.5
    if h["eps_mode"] == "uncorrected":
        return (m / (1 - b1**t)) * correction / (v.sqrt() + h["eps"])
    return (m / (1 - b1**t)) / (v.sqrt() / correction + h["eps"])


def step(p, g, state, t, h):
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * moments(g, state, t, h)
