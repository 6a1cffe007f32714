import torch

from lightning_optim.ops.orthogonal import SCHEDULES

STRICT = {"ns_dtype": "float64"}
NARROW = {"ns_dtype": "float32"}
SETTINGS = [
    {"lr": 0.02, "momentum": 0.9, "betas": (0.8, 0.99), "schedule_steps": 4, "weight_decay": 0.1},
    {"lr": 0.02, "length": 1.0, "direction_scale": 0.5, "ns_steps": 5, "ns_coefficients": "polar_express"},
]


def orthogonal(x, h):
    table = SCHEDULES[h["ns_coefficients"]]
    y = x / (float(x.norm()) * (1.02 if h["ns_coefficients"] == "polar_express" else 1))
    for i in range(h["ns_steps"]):
        a, b, c = table[min(i, len(table) - 1)]
        y = a * y + b * (y @ y.T) @ y + c * (y @ y.T) @ (y @ y.T) @ y
    return y


def step(p, g, state, t, h):
    (b1, b2), lr = h["betas"], h["lr"]
    if t == 1:
        state["a"] = state["start"] = state["r"] = p.norm(dim=1)
    a, r = state["a"], state["r"]
    new = torch.empty_like(p)
    across = torch.empty_like(p)
    along = torch.empty_like(a)
    for i in range(len(p)):
        u = p[i] / a[i]
        along[i] = g[i] @ u
        across[i] = a[i] / r[i] * (g[i] - along[i] * u)
    m = state["m"] = h["momentum"] * state.get("m", 0) + across
    o = orthogonal(across + h["momentum"] * m, h)
    state["ma"] = b1 * state.get("ma", 0) + (1 - b1) * along
    state["va"] = b2 * state.get("va", 0) + (1 - b2) * along**2
    adam = state["ma"] / (1 - b1**t) / ((state["va"] / (1 - b2**t)) ** 0.5 + h["eps"])
    state["a"] = a - lr * adam - lr * h["weight_decay"] * a
    for i in range(len(p)):
        v = p[i] / a[i] * r[i] - lr * h["direction_scale"] * max(p.shape) ** 0.5 * o[i]
        new[i] = state["a"][i] * v / v.norm()
    q = min((t - 1) / (h["schedule_steps"] - 1), 1) if h["schedule_steps"] > 1 else 1
    state["r"] = state["start"] + q * q * (3 - 2 * q) * (h["length"] - state["start"])
    return new
