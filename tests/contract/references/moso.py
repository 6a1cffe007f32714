import torch

from tests.contract.references import due

SETTINGS = [
    {"lr": 0.01, "weight_decay": 0.1, "momentum": 0.9, "beta2": 0.9, "shampoo_beta": 0.8},
    {"lr": 0.01, "refresh": "fixed:1", "clip_rms": 0.5},
]
FIRST_STEP = (0.2, 0.2 * 0.05**-0.5 * 1.001)  # 1 / sqrt(1 - beta2) of what it tends to


def step(p, g, state, t, h):
    left = p.shape[0] <= p.shape[1]
    beta, shampoo = h["beta2"], h["beta2"] if h["shampoo_beta"] is None else h["shampoo_beta"]
    m = state["m"] = h["momentum"] * state.get("m", 0) + (1 - h["momentum"]) * g
    x, weight = m if left else m.T, (1 - shampoo) / (1 - shampoo**t)
    c = state["c"] = (1 - weight) * state.get("c", 0) + weight * x @ x.T
    v = state.get("v", torch.zeros_like(x))
    if t == 1:
        state["q"] = torch.linalg.eigh(c).eigenvectors
    elif due(h, t):
        q = state["q"]
        order = torch.diag(q.T @ c @ q).argsort(descending=True)
        v, state["q"] = v[order], torch.linalg.qr(c @ q[:, order]).Q
    y = state["q"].T @ x
    v = state["v"] = beta * v + (1 - beta) * y**2
    d = state["q"] @ (y / (v.sqrt() + h["inner_eps"]))
    if h["clip_rms"] is not None:
        d = d / max(1.0, float(d.square().mean() ** 0.5) / h["clip_rms"])
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * (d if left else d.T)
