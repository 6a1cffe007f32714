from tests.contract.references.adamw import moments

SETTINGS = [{"lr": 1e-2, "weight_decay": 0.1}, {"lr": 1e-2, "weight_decay": 0.1, "eps_mode": "uncorrected"}]


def step(p, g, state, t, h):
    return p - h["lr"] * moments(g + h["weight_decay"] * p, state, t, h)
