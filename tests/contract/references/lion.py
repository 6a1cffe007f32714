SETTINGS = [{"lr": 1e-2, "weight_decay": 0.1}, {"lr": 1e-2, "betas": (0.95, 0.98)}]


def step(p, g, state, t, h):
    b1, b2 = h["betas"]
    m = state.get("m", 0)
    sign = (b1 * m + (1 - b1) * g).sign()
    state["m"] = b2 * m + (1 - b2) * g
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * sign
