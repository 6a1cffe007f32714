import torch

STRICT = {"max_precond_dim": 8}  # a basis of the null space of a rank-deficient factor is arbitrary
SETTINGS = [
    {"lr": 0.01, "refresh": "fixed:2", "weight_decay": 0.1},
    {"lr": 0.01, "refresh": "fixed:1", "normalize_grads": True, "shampoo_beta": 0.9},
    {"lr": 0.01, "refresh": "fixed:3", "correct_bias": False},
    {"lr": 0.01, "refresh": "fixed:1", "sides": "short", "skip_first": False},
    {"lr": 0.01, "sides": "right", "floor": 0.1, "weight_decay": 0.1},
    {"lr": 0.01, "sides": "left", "skip_first": False, "normalize_grads": True, "floor": 0.01},
]


def sides(p, h):
    if p.ndim < 2:
        return []
    short = 0 if p.shape[0] <= p.shape[1] else 1
    chosen = {"both": [0, 1], "left": [0], "right": [1], "short": [short], "none": []}[h["sides"]]
    return [k for k in chosen if p.shape[k] <= h["max_precond_dim"]]


def rotate(x, bases, back=False):
    for k, q in bases.items():
        q = q if back else q.T
        x = q @ x if k == 0 else x @ q.T
    return x


def step(p, g, state, t, h):
    beta = h["betas"][1] if h["shampoo_beta"] is None else h["shampoo_beta"]
    outer = {k: (g @ g.T if k == 0 else g.T @ g) for k in sides(p, h)}
    if t == 1:
        state["factors"] = {k: (1 - beta) * x for k, x in outer.items()}
        state["bases"] = {k: torch.linalg.eigh(x).eigenvectors.flip(1) for k, x in state["factors"].items()}
        if h["skip_first"]:
            return p
    k = t - 1 if h["skip_first"] else t
    b1, b2 = h["betas"]
    bases = state["bases"]
    m = state["m"] = b1 * state.get("m", 0) + (1 - b1) * g  # in the basis of the parameter
    v = state["v"] = b2 * state.get("v", 0) + (1 - b2) * rotate(g, bases) ** 2
    floor = h["floor"] * v.mean().sqrt()
    d = rotate(rotate(m, bases) / (v.sqrt() + h["eps"] + floor), bases, back=True)
    if h["normalize_grads"]:
        d = d / d.square().mean().sqrt()
    if h["correct_bias"]:
        d = d * (1 - b2**k) ** 0.5 / (1 - b1**k)
    for k, x in outer.items() if t > 1 else ():
        factor = state["factors"][k] = beta * state["factors"][k] + (1 - beta) * x
        if (t - 1) % int(h["refresh"].split(":")[1]) == 0:
            order = torch.diag(bases[k].T @ factor @ bases[k]).argsort(descending=True)
            state["v"] = state["v"][order] if k == 0 else state["v"][:, order]
            bases[k] = torch.linalg.qr(factor @ bases[k][:, order]).Q
    return (1 - h["lr"] * h["weight_decay"]) * (p - h["lr"] * d)
