import torch

from tests.contract.references import noise

SETTINGS = [{"lr": 0.02, "rank": 3, "momentum": 0.8, "weight_decay": 0.1}, {"lr": 0.02, "rank": 1}]


def step(p, g, state, t, h):
    rows, columns = p.shape
    q = state.get("q", noise((columns, min(rows, columns, h["rank"])), 1))
    m = state.get("m", 0) + g
    left = torch.linalg.qr(m @ q).Q
    r = m.T @ left
    state["m"] = m - (1 - h["momentum"]) * left @ r.T
    state["q"] = r / (r.norm(dim=0) + h["eps"])
    d = (rows / columns) ** 0.5 * left @ state["q"].T
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * d
