SETTINGS = [
    {"lr": 0.02, "weight_decay": 0.1},
    {"lr": 0.02, "clip_value": 0.5, "loss_scale": 8.0},
]


def step(p, g, state, t, h):
    g = g / h["loss_scale"]
    if h["clip_value"] is not None:
        g = g.clamp(-h["clip_value"], h["clip_value"])
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * g
