SETTINGS = [
    {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.1},
    {"lr": 0.1, "momentum": 0.9, "dampening": 0.5},
    {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1},
]


def step(p, g, state, t, h):
    g = g + h["weight_decay"] * p
    if h["momentum"]:
        first = "buffer" not in state
        buffer = state["buffer"] = g if first else h["momentum"] * state["buffer"] + (1 - h["dampening"]) * g
        g = g + h["momentum"] * buffer if h["nesterov"] else buffer
    return p - h["lr"] * g
