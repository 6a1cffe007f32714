import torch

from tests.contract.references import due, noise

SETTINGS = [
    {"lr": 0.01, "refresh": "fixed:2:2", "start": 2, "weight_decay": 0.1},
    {"lr": 0.01, "init_scale": 1.0, "momentum": 0.5, "step_size": 0.3, "max_triangular": 8},
    {"lr": 0.01, "normalize": True, "max_triangular": 1},
]


def bound(x):
    j = int(x.square().sum(0).argmax())
    v = x @ x[:, j]
    return float((x @ v).norm() / v.norm())


def fitted(q, up, down, h):
    if (q - torch.diag(torch.diag(q))).any() or len(q) <= h["max_triangular"]:
        return q - h["step_size"] * torch.triu(up - down) @ q / bound(up + down)
    up, down = torch.diag(up), torch.diag(down)
    return q - h["step_size"] * torch.diag((up - down) / (up + down).max()) @ q


def step(p, g, state, t, h):
    rows, columns = p.shape
    state["m"] = h["momentum"] * state.get("m", 0) + (1 - h["momentum"]) * g
    m = state["m"] / (1 - h["momentum"] ** t)
    scale = float(m.square().mean() ** -0.125) if h["init_scale"] is None else h["init_scale"]
    start = tuple(scale * torch.eye(n, dtype=g.dtype) for n in (rows, columns))
    left, right = state.get("factors", start)
    if due(h, t) and t >= h["start"]:
        a = left @ m @ right.T
        b = torch.linalg.inv(left).T @ noise(p.shape, t) @ torch.linalg.inv(right)
        left, right = fitted(left, a @ a.T, b @ b.T, h), fitted(right, a.T @ a, b.T @ b, h)
    state["factors"] = left, right
    d = left.T @ left @ m @ right.T @ right
    size = float(d.square().mean().sqrt())
    d = d / size if h["normalize"] else d * min(1.0, h["max_rms"] / (size + 1e-6))
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * d
