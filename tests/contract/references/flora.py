from tests.contract.references import due, noise
from tests.contract.references.adafactor import rms
from tests.contract.references.adafactor_hf import ratio, size
from tests.contract.references.projected import sides

WITHOUT_DRAWS = {"rank": 0}
SETTINGS = [
    {"rank": 2, "weight_decay": 0.1, "clip_threshold": 0.5},
    {"rank": 3, "scale_parameter": True, "relative_step": True, "beta1": 0.5},
    {"beta1": None},
]


def step(p, g, state, t, h):
    a, u, b = size(p, t, h), ratio(g, state, t, h), h["beta1"] or 0
    if p.ndim < 2 or b == 0 or min(p.shape) <= h["rank"]:
        w = state["m"] = b * state.get("m", 0) + (1 - b) * u
    else:
        w = (1 - b) * u + b * up(state)
        if due(h, t):
            side = sides(p.shape, "std")[0]
            old = up(state)
            length = p.shape[0] if side == "left" else p.shape[1]
            state["side"], state["basis"] = side, noise((length, h["rank"]), t) / h["rank"] ** 0.5
            state["c"] = down(old, state) if t > 1 else 0
        state["c"] = b * state["c"] + (1 - b) * down(u, state)
    w = w / max(1.0, rms(w) / h["clip_threshold"])
    return p - a * h["weight_decay"] * p - a * w


def down(x, state):
    return state["basis"].T @ x if state["side"] == "left" else x @ state["basis"]


def up(state):
    if "c" not in state:
        return 0
    return state["basis"] @ state["c"] if state["side"] == "left" else state["c"] @ state["basis"].T
