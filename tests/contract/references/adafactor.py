import torch

SETTINGS = [
    {"lr": 0.02, "weight_decay": 0.1},
    {"lr": 1.0, "d": 0.5, "eps2": 0.1},
    {"lr": 1e-2, "scale_parameter": False, "eps1": 1e-6},
]


def rms(x):
    return float(x.square().mean().sqrt())


def step(p, g, state, t, h):
    eps1 = torch.finfo(p.dtype).eps if h["eps1"] is None else h["eps1"]
    b = 1 - t ** h["beta2_decay"]
    if p.ndim < 2:
        v = state["v"] = b * state.get("v", 0) + (1 - b) * g**2
    else:
        row = state["row"] = b * state.get("row", 0) + (1 - b) * (g**2).mean(1)
        column = state["column"] = b * state.get("column", 0) + (1 - b) * (g**2).mean(0)
        v = row[:, None] * column[None, :] / max(float(row.mean()), eps1)
    u = g / v.clamp(min=eps1**2).sqrt()
    u = u / max(1.0, rms(u) / h["d"])
    scale = max(h["eps2"], rms(p)) if h["scale_parameter"] else 1.0
    return (1 - h["lr"] * h["weight_decay"]) * p - min(h["lr"], t**-0.5) * scale * u
