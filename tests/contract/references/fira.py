from tests.contract.references.projected import bases, correction, lift, limited, moved, project, ratio

SETTINGS = [
    {"rank": 2, "weight_decay": 0.1},
    {"rank": 2, "side": "left", "residual_uses_alpha": True, "correct_bias": False, "refresh": "fixed:3"},
    {"rank": 3, "side": "reverse_std", "limiter_restarts": False, "limit": 1.1},
    {"rank": 2, "normalize": True, "limit": None},
    {"rank": 0},
]


def parts(g, state, t, h):
    """The low-rank step and the scaled residual."""
    found = bases(g, state, t, h, h["side"])
    x = project(g, found)
    u = ratio(x, state, h)
    lost = g - (h["alpha"] if h["residual_uses_alpha"] else 1) * lift(x, found)
    if lost.norm() < 1e-12 * g.norm():
        lost = 0 * lost
    if "left" in found:
        lost = lost * (u.norm(dim=0) / (x.norm(dim=0) + 1e-8))
    else:
        lost = lost * (u.norm(dim=1) / (x.norm(dim=1) + 1e-8))[:, None]
    return h["alpha"] * lift(u, found), lost


def step(p, g, state, t, h):
    if p.ndim < 2 or not h["rank"]:
        return moved(p, ratio(g, state, h), t, h)
    low, lost = parts(g, state, t, h)
    d = low + limited(lost, state, t, h)
    if h["normalize"]:
        d = h["alpha"] * d / d.square().mean().sqrt() / correction(t, h)
    return moved(p, d, t, h)
