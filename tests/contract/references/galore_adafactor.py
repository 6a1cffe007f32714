from tests.contract.references.adafactor_hf import parts
from tests.contract.references.projected import bases, lift, project

SETTINGS = [
    {"rank": 2, "weight_decay": 0.1, "scale": 0.5, "scale_parameter": True},
    {"rank": 3, "side": "full", "beta1": 0.9, "clip_threshold": 0.5},
    {"rank": 2, "side": "reverse_std", "relative_step": True, "lr": 0.7},
    {"rank": 0, "weight_decay": 0.1},
]


def step(p, g, state, t, h):
    found = bases(g, state, t, h, h["side"]) if p.ndim == 2 and h["rank"] else {}
    a, d = parts(p, project(g, found), state, t, h)
    d = h["scale"] * lift(d, found) if found else d
    return p - h["weight_decay"] * a * p - d
