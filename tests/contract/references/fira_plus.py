from tests.contract.references.fira import parts
from tests.contract.references.projected import moved, ratio

FIRST_STEP = (0.9, 1.01)
SETTINGS = [
    {"rank": 2, "weight_decay": 0.1, "alpha_c": 0.2},
    {"rank": 3, "side": "right", "alpha": 0.5},
]


def step(p, g, state, t, h):
    if p.ndim < 2:
        return moved(p, ratio(g, state, h), t, h)
    low, lost = parts(g, state, t, h)
    return moved(p, low + h["alpha_c"] * low.norm() * lost / (lost.norm() + 1e-8), t, h)
