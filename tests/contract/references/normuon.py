from tests.contract.references.muon import STRICT, orthogonal, shape_scale

__all__ = ["SETTINGS", "STRICT", "step"]
SETTINGS = [
    {"lr": 0.02, "weight_decay": 0.1, "scale": "match_rms_adamw", "beta2": 0.9},
    {"lr": 0.02, "nesterov": False, "scale": "spectral", "ns_coefficients": "polar_express"},
    {"lr": 0.02, "lines": "longer"},
]


def step(p, g, state, t, h):
    o = orthogonal(g, state, h)
    dim = 0 if h["lines"] == "longer" and p.shape[0] < p.shape[1] else 1
    v = state["v"] = h["beta2"] * state.get("v", 0) + (1 - h["beta2"]) * (o**2).mean(dim, keepdim=True)
    u = o / v.sqrt()
    u = u * o.norm() / u.norm()
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * shape_scale(p, h) * u
