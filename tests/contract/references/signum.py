SETTINGS = [{"lr": 1e-2, "weight_decay": 0.1}, {"lr": 1e-2, "momentum": 0.5}]


def step(p, g, state, t, h):
    m = state["m"] = h["momentum"] * state.get("m", 0) + (1 - h["momentum"]) * g
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * m.sign()
