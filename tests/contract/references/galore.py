from tests.contract.references.projected import bases, lift, moved, project, ratio

FIRST_STEP = (0.9, 1.01)
SETTINGS = [
    {"rank": 2, "weight_decay": 0.1, "scale": 0.5},
    {"rank": 3, "side": "reverse_std", "refresh": "fixed:3", "correct_bias": False},
    {"rank": 2, "side": "left", "betas": (0.8, 0.9), "eps": 1e-2},
    {"rank": 4, "side": "right"},
    {"rank": 3, "side": "full"},
    {"rank": 0, "weight_decay": 0.1},
]


def step(p, g, state, t, h):
    if p.ndim < 2 or not h["rank"]:
        return moved(p, ratio(g, state, h), t, h)
    found = bases(g, state, t, h, h["side"])
    return moved(p, h["scale"] * lift(ratio(project(g, found), state, h), found), t, h)
