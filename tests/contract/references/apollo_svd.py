from tests.contract.references.projected import bases, correction, limited, moved, project, ratio

SETTINGS = [
    {"rank": 2, "weight_decay": 0.1, "scale": 2.0},
    {"rank": 3, "scale_type": "tensor", "scale": 4.0, "scale_front": True, "limit": 1.05, "limiter_restarts": False},
    {"rank": 2, "normalize": True, "limit": None, "correct_bias": False},
    {"rank": 0},
]


def step(p, g, state, t, h):
    if p.ndim < 2 or not h["rank"]:
        return moved(p, ratio(g, state, h), t, h)
    return moved(p, direction(g, bases(g, state, t, h), state, t, h), t, h)


def direction(g, found, state, t, h):
    x = project(g, found)
    u = ratio(x, state, h)
    if h["scale_type"] == "tensor":
        y = g * (u.norm() / (x.norm() + 1e-8))
    elif "left" in found:
        y = g * (u.norm(dim=0) / (x.norm(dim=0) + 1e-8))
    else:
        y = g * (u.norm(dim=1) / (x.norm(dim=1) + 1e-8))[:, None]
    if h["normalize"]:
        return h["scale"] ** 0.5 * y / y.square().mean().sqrt() / correction(t, h)
    if h["scale_front"]:
        return limited(h["scale"] ** 0.5 * y, state, t, h)
    return h["scale"] ** 0.5 * limited(y, state, t, h)
