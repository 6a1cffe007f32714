"""What the references of GaLore, Fira and APOLLO share: singular vectors with settled signs, Adam's moments."""

import torch

from tests.contract.references import due


def sides(shape, side):
    m, n = shape
    shorter = "right" if m >= n else "left"
    longer = "left" if m >= n else "right"
    return {"std": [shorter], "reverse_std": [longer], "full": ["left", "right"]}.get(side, [side])


def settled(new, old):
    for k in range(new.shape[1]):
        sense = new[new[:, k].abs().argmax(), k] if old is None else new[:, k] @ old[:, k]
        if sense < 0:
            new[:, k] = -new[:, k]
    return new


def bases(g, state, t, h, side="std"):
    """The projection of a matrix in force at step t, by side."""
    found = state.setdefault("bases", {})
    if due(h, t):
        u, _, vt = torch.linalg.svd(g, full_matrices=False)
        for k in sides(g.shape, side):
            vectors = (u if k == "left" else vt.T)[:, : h["rank"]].clone()
            found[k] = settled(vectors, found.get(k))
    return found


def project(x, found):
    for k, q in found.items():
        x = q.T @ x if k == "left" else x @ q
    return x


def lift(x, found):
    for k, q in found.items():
        x = q @ x if k == "left" else x @ q.T
    return x


def ratio(x, state, h):
    b1, b2 = h["betas"]
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * x
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * x**2
    return m / (v.sqrt() + h["eps"])


def correction(t, h):
    b1, b2 = h["betas"]
    return (1 - b2**t) ** 0.5 / (1 - b1**t) if h["correct_bias"] else 1.0


def moved(p, d, t, h):
    return (p - h["lr"] * correction(t, h) * d) * (1 - h["lr"] * h["weight_decay"])


def limited(x, state, t, h):
    if h["limit"] is None:
        return x
    last = state.get("norm", 0) + (0 if h["limiter_restarts"] else 1e-8)
    if t > 1 and last > 0:
        x = x * min(1, h["limit"] * last / float(x.norm()))
    state["norm"] = float(x.norm())
    return x
