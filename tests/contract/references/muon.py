from lightning_optim.ops.orthogonal import SAFETY, SCHEDULES

STRICT = {"ns_dtype": "float64"}
NARROW = {"ns_dtype": "float32"}
SETTINGS = [
    {"lr": 0.02, "weight_decay": 0.1, "scale": "match_rms_adamw"},
    {"lr": 0.02, "nesterov": False, "momentum": 0.9, "scale": "spectral"},
    {"lr": 0.02, "ns_steps": 3, "ns_coefficients": (3.0, -3.2, 1.2), "scale": "none"},
    {"lr": 0.02, "ns_coefficients": "polar_express", "ns_steps": 6},
    {"lr": 0.02, "ns_coefficients": "annealed"},
]


def newton_schulz(x, h):
    given = h["ns_coefficients"]
    table = SCHEDULES[given] if isinstance(given, str) else (given,)
    y = x / max(SAFETY.get(given, 1.0) * float(x.norm()), h["eps"])
    for i in range(h["ns_steps"]):
        a, b, c = table[min(i, len(table) - 1)]
        y = a * y + b * (y @ y.T) @ y + c * (y @ y.T) @ (y @ y.T) @ y
    return y


def orthogonal(g, state, h):
    mu = h["momentum"]
    m = state["m"] = mu * state.get("m", 0) + (1 - mu) * g
    return newton_schulz((1 - mu) * g + mu * m if h["nesterov"] else m, h)


def shape_scale(p, h):
    rows, columns = p.shape
    return {
        "original": max(1, rows / columns) ** 0.5,
        "match_rms_adamw": 0.2 * max(rows, columns) ** 0.5,
        "spectral": (rows / columns) ** 0.5,
        "none": 1.0,
    }[h["scale"]]


def step(p, g, state, t, h):
    o = orthogonal(g, state, h)
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * shape_scale(p, h) * o
