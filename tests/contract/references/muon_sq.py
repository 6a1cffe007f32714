from tests.contract.references.muon import shape_scale
from tests.contract.references.soap_muon import orthogonal

STRICT = {"ns_dtype": "float64"}
NARROW = {"ns_dtype": "float32"}
SETTINGS = [{"lr": 0.05, "weight_decay": 0.1, "momentum": 0.9, "beta2": 0.99, "inner_eps": 1e-8}]


def step(p, g, state, t, h):
    mu, beta = h["momentum"], h["beta2"]
    m = state["m"] = mu * state.get("m", 0) + (1 - mu) * g
    v = state["v"] = beta * state.get("v", 0) + (1 - beta) * g**2
    o = orthogonal(((1 - mu) * g + mu * m) / (v.sqrt() + h["inner_eps"]), h)
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * shape_scale(p, h) * o
