import torch

SETTINGS = [
    {"lr": 0.02, "root": "eigh", "weight_decay": 0.1},
    {"lr": 0.02, "root": "eigh", "rescale": "norm"},
    {"lr": 0.02, "iterations": 3},
]


def step(p, g, state, t, h):
    x = g.T if len(g) > g.shape[1] else g
    x = (x - x.mean(1, keepdim=True)) / x.std(1, correction=0, keepdim=True)
    if h["root"] == "eigh":
        u, values, v = torch.linalg.svd(x, full_matrices=False)
        good = values > 1e-7 * values.max()
        d = u[:, good] @ v[good]
    else:
        a = x @ x.T
        y = 1.5 * a / a.norm()
        z = (1.5 / a.norm()).sqrt() * torch.eye(len(a), dtype=a.dtype)
        for _ in range(h["iterations"]):
            step = 1.5 * torch.eye(len(a), dtype=a.dtype) - 0.5 * y
            y, z = step @ y @ step, z @ step
        d = z @ x
    if h["rescale"] == "norm":
        d = d * x.norm() / d.norm()
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * (d.T if len(g) > g.shape[1] else d)
