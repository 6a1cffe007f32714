from tests.contract.references import due, noise
from tests.contract.references.apollo_svd import direction
from tests.contract.references.projected import moved, ratio, sides

FIRST_STEP = (0.3, 3)  # random projections lose more or less than they gain
WITHOUT_DRAWS = {"projection": "svd"}
SETTINGS = [
    {"rank": 2, "weight_decay": 0.1, "scale": 2.0},
    {"rank": 3, "scale_type": "tensor", "scale": 4.0, "scale_front": True, "limit": 1.05},
]


def step(p, g, state, t, h):
    if p.ndim < 2 or not h["rank"]:
        return moved(p, ratio(g, state, h), t, h)
    if due(h, t):
        side, rank = sides(p.shape, "std")[0], min(h["rank"], *p.shape)
        length = p.shape[0] if side == "left" else p.shape[1]
        state["bases"] = {side: noise((length, rank), t) / rank**0.5}
    return moved(p, direction(g, state["bases"], state, t, h), t, h)
