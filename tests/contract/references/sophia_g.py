from tests.contract.references import sophia_h
from tests.helpers.rules import shown

SETTINGS = [
    {"lr": 1e-2, "weight_decay": 0.2, "rho": 2.0},
    {"lr": 1e-2, "rho": 1.0, "betas": (0.9, 0.8), "eps": 1e-3, "form": "paper", "tokens": 3.0},
]


def step(p, g, state, t, h):
    tokens = 16.0 if h["tokens"] is None else h["tokens"]
    return sophia_h.sophia(p, g, tokens * shown(g, t) ** 2, state, t, h)
