import torch

from tests.contract.references import due, noise

SETTINGS = [
    {"lr": 0.02, "rank": 3, "leading": 1, "betas": (0.8, 0.9, 0.95), "weight_decay": 0.1},
    {"lr": 0.02, "rank": 3, "leading": 2, "compensation": "fira_plus", "refresh": "fixed:2:2"},
    {"lr": 0.02, "rank": 2, "leading": 2, "compensation": "none", "switch": False},
    {"lr": 0.02, "rank": 3, "leading": 2, "limit": 1.0, "normalize": True, "refresh": "fixed:3"},
]


def ordered(matrix):
    return torch.linalg.eigh(matrix).eigenvectors.flip(1)


def basis(g, old, q, t, h):
    rows, rank = len(g), min(h["rank"], len(g))
    b3 = h["betas"][2]
    if t == 1:
        u = ordered(g @ g.T)[:, :rank]
        u = u * torch.stack([c[c.abs().argmax()].sign() for c in u.T])
    else:
        a = b3 * old @ q @ old.T + (1 - b3) * g @ g.T
        first = torch.linalg.qr(a @ old).Q
        u = first @ ordered(first.T @ a @ first)
        u = u * (u * old).sum(0).sign()
    count = min(rank - min(h["leading"], rank), rows - rank)
    if not h["switch"] or not count:
        return u
    complement = torch.linalg.qr(u, mode="complete").Q[:, rank:]
    index = noise((rows, 1), t)[rank:, 0].argsort()[:count]
    return torch.cat([u[:, : rank - count], complement[:, index]], 1)


def step(p, g, state, t, h):
    tall = len(p) > p.shape[1]
    g = g.T if tall else g
    b1, b2, b3 = h["betas"]
    rows, rank = len(g), min(h["rank"], len(g))
    if due(h, t):
        state["u"] = basis(g, state.get("u"), state.get("q"), t, h)
    u = state["u"]
    inner = u.T @ g
    state["q"] = b3 * state.get("q", torch.zeros(rank, rank, dtype=g.dtype)) + (1 - b3) * inner @ inner.T
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * inner
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * inner**2
    w = m / (v.sqrt() + h["eps"])
    d, c = u @ w, torch.zeros_like(g)
    if h["compensation"] == "optimal" and rank < rows:
        left = (g**2).sum(0) - (inner**2).sum(0)
        left = state["p"] = b1 * state.get("p", 0) + (1 - b1) * left
        c = (rows - rank) ** 0.5 * (g - u @ inner) / left.sqrt()
    if h["compensation"] == "fira_plus" and rank < rows:
        c = (g - u @ inner) * w.norm(dim=0) / (inner.norm(dim=0) + 1e-8)
    if c.any():
        if state.get("norm", 0) > 0:
            c = c * min(1.0, h["limit"] * state["norm"] / float(c.norm()))
        state["norm"] = float(c.norm())
        c = c * float(d.norm()) / (float(c.norm()) + 1e-8) if h["compensation"] == "fira_plus" else c
    d = d + h["alpha_c"] * c
    d = h["alpha"] * (d / d.square().mean().sqrt() if h["normalize"] else d)
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * (d.T if tall else d)
