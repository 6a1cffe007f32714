SETTINGS = [
    {"lr": 0.5, "weight_decay": 0.1, "trust_coefficient": 0.02},
    {"lr": 0.5, "weight_decay": 0.1, "trust_coefficient": 0.02, "nesterov": True, "exclude_vectors": False},
    {"lr": 0.5, "momentum": 0.0, "trust_coefficient": 0.02, "zero_gradient_rate": "one"},
    {"lr": 0.5, "weight_decay": 0.1, "lr_in_momentum": True},
]


def step(p, g, state, t, h):
    wd, rate = h["weight_decay"], 1.0
    if p.ndim < 2 and h["exclude_vectors"]:
        wd = 0.0
    elif float(p.norm()) and float(g.norm()):
        rate = h["trust_coefficient"] * float(p.norm()) / float(g.norm() + wd * p.norm())
    scale = h["lr"] if h["lr_in_momentum"] else 1.0
    x = scale * rate * (g + wd * p)
    v = state["v"] = h["momentum"] * state.get("v", 0) + x
    return p - h["lr"] / scale * (x + h["momentum"] * v if h["nesterov"] else v)
