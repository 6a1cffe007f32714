import torch

from tests.contract.references import due
from tests.contract.references.muon import shape_scale
from tests.contract.references.soap import rotate, sides
from tests.contract.references.soap_muon import divided

STRICT = {"ns_dtype": "float64", "max_precond_dim": 8}  # see soap
SETTINGS = [
    {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "shampoo_beta": 0.9, "sinkhorn": 3, "lines": "none"},
    {"lr": 0.02, "refresh": "fixed:1", "inner_eps": 1e-6},
]


def balanced(a, steps, eps):
    m, n = a.shape
    e, r, c = a**2 + eps, torch.ones(m, dtype=a.dtype), torch.ones(n, dtype=a.dtype)
    for _ in range(steps):
        r = (1 / m) / (e @ c + eps)
        c = (1 / n) / (e.T @ r + eps)
    return torch.diag(r.sqrt()) @ a @ torch.diag(c.sqrt())


def step(p, g, state, t, h):
    mu, beta = h["momentum"], h["beta2"] if h["shampoo_beta"] is None else h["shampoo_beta"]
    m = state["m"] = mu * state.get("m", 0) + (1 - mu) * g
    factors, bases = state.setdefault("factors", {}), state.setdefault("bases", {})
    for k in sides(p, h):
        factors[k] = beta * factors.get(k, 0) + (1 - beta) * (g @ g.T if k == 0 else g.T @ g)
        if due(h, t):
            bases[k] = torch.linalg.eigh(factors[k]).eigenvectors
    a = balanced(rotate((1 - mu) * g + mu * m, bases), h["sinkhorn"], h["inner_eps"])
    o = rotate(a, bases, back=True)
    o = o * min(p.shape) ** 0.5 / o.norm()
    if h["lines"] != "none" and p.shape[0] != p.shape[1]:
        o = divided(o, state, h["lines_beta"], "longer")
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * shape_scale(p, h) * o
