SETTINGS = [
    {"lr": 0.1, "weight_decay": 0.1},
    {"lr": 0.1, "lr_decay": 0.5, "initial_accumulator_value": 0.3, "eps": 1e-2},
]


def step(p, g, state, t, h):
    g = g + h["weight_decay"] * p
    v = state["v"] = state.get("v", h["initial_accumulator_value"]) + g**2
    return p - h["lr"] / (1 + (t - 1) * h["lr_decay"]) * g / (v.sqrt() + h["eps"])
