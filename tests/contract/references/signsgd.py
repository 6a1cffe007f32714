SETTINGS = [{"lr": 1e-2, "weight_decay": 0.1}]


def step(p, g, state, t, h):
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * g.sign()
