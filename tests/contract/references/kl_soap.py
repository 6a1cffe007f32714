from tests.contract.references.soap import STRICT, rotate, sides
from tests.contract.references.soap_muon import turn

__all__ = ["SETTINGS", "STRICT", "step"]
SETTINGS = [
    {"lr": 0.01, "betas": (0.9, 0.95), "shampoo_beta": 0.8, "weight_decay": 0.1, "refresh": "fixed:3"},
    {"lr": 0.01, "refresh": "fixed:1", "correct_bias": True},
]


def step(p, g, state, t, h):
    b1, b2 = h["betas"]
    weight = 1 - (b2 if h["shampoo_beta"] is None else h["shampoo_beta"])
    both = {**h, "sides": "both"}
    if not sides(p, h):
        state["bases"] = {}
    if t == 1:
        turn(p, g, state, t, both, weight)
        return p
    bases = dict(state["bases"])
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g  # in the basis of the parameter
    v = state["v2"] = b2 * state.get("v2", 0) + (1 - b2) * rotate(g, bases) ** 2
    d = rotate(rotate(m, bases) / (v.sqrt() + h["eps"]), bases, back=True)
    if h["correct_bias"]:
        d = d * (1 - b2 ** (t - 1)) ** 0.5 / (1 - b1 ** (t - 1))
    turn(p, g, state, t, both, weight)
    return (1 - h["lr"] * h["weight_decay"]) * (p - h["lr"] * d)
