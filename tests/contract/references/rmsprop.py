SETTINGS = [
    {"weight_decay": 0.1},
    {"momentum": 0.9, "alpha": 0.9, "eps": 1e-3},
    {"momentum": 0.5, "centered": True, "weight_decay": 0.1},
]


def step(p, g, state, t, h):
    g = g + h["weight_decay"] * p
    a = h["alpha"]
    v = state["v"] = a * state.get("v", 0) + (1 - a) * g**2
    if h["centered"]:
        mean = state["mean"] = a * state.get("mean", 0) + (1 - a) * g
        v = v - mean**2
    d = state["d"] = h["momentum"] * state.get("d", 0) + g / (v.sqrt() + h["eps"])
    return p - h["lr"] * d
