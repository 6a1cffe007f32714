STRICT = {"ns_dtype": "float64"}
SETTINGS = [
    {"lr": 0.02, "weight_decay": 0.1, "scale": "match_rms_adamw"},
    {"lr": 0.02, "nesterov": False, "momentum": 0.9, "scale": "spectral"},
    {"lr": 0.02, "ns_steps": 3, "ns_coefficients": (3.0, -3.2, 1.2), "scale": "none"},
]


def newton_schulz(x, h):
    a, b, c = h["ns_coefficients"]
    y = x / max(float(x.norm()), h["eps"])
    for _ in range(h["ns_steps"]):
        y = a * y + b * (y @ y.T) @ y + c * (y @ y.T) @ (y @ y.T) @ y
    return y


def step(p, g, state, t, h):
    mu, (rows, columns) = h["momentum"], p.shape
    m = state["m"] = mu * state.get("m", 0) + (1 - mu) * g
    x = (1 - mu) * g + mu * m if h["nesterov"] else m
    scale = {
        "original": max(1, rows / columns) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        "spectral": (rows / columns) ** 0.5,
        "none": 1.0,
    }[h["scale"]]
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * scale * newton_schulz(x, h)
