import torch

from tests.contract.references import due, exact_root

STRICT = {"eps": 1e-3}  # a smaller one magnifies the rounding of singular factors
SETTINGS = [
    {"lr": 0.02, "accumulate": "sum", "betas": (0.0, 0.0), "graft": "none", "max_dim": None, "weight_decay": 0.1},
    {"lr": 0.02, "max_dim": 5, "graft": "rmsprop", "beta3": 0.5, "refresh": "fixed:2:2", "start": 4},
    {"lr": 0.02, "sides": "short", "root": "newton", "graft": "sgd", "betas": (0.0, 0.9), "decay": "coupled"},
    {"lr": 0.02, "sides": "left", "exponent": 0.5, "graft": "adagrad", "correct_bias": False, "weight_decay": 0.1},
    {"lr": 0.02, "max_dim": 70, "target_dims": 1, "start": 3, "early": "decay", "weight_decay": 0.1},
    {"lr": 0.02, "sides": "right", "betas": (0.5, 0.9), "exponent": 0.3, "graft": "adam", "start": 2},
    {"lr": 0.02, "preconditioner": "eigenvalue", "graft": "none", "sides": "short", "start": 4, "max_dim": 3},
]


def sides(rows, columns, h):
    if rows == 1 or columns == 1:
        return [1] if rows == 1 else [0]
    short = 0 if rows <= columns else 1
    return {"both": [0, 1], "left": [0], "right": [1], "short": [short]}[h["sides"]]


def times(x, roots):
    x = roots[0] @ x if 0 in roots else x
    return x @ roots[1] if 1 in roots else x


def average(old, new, beta, summed):
    return old + new if summed else beta * old + (1 - beta) * new


def tile(g, state, t, h, which):
    (b1, b2), summed = h["betas"], h["accumulate"] == "sum"
    b3 = b1 if h["beta3"] is None else h["beta3"]
    correction = 1 - b2**t if h["correct_bias"] and not summed else 1.0
    factors, roots = state.setdefault("factors", {}), state.setdefault("roots", {})
    for k in which:
        factors[k] = average(factors.get(k, 0), g @ g.T if k == 0 else g.T @ g, b2, summed)
        if (t >= h["start"] and due(h, t)) or t == h["start"]:
            eye = torch.eye(len(factors[k]), dtype=g.dtype)
            if h["preconditioner"] == "eigenvalue":
                roots[k] = torch.linalg.eigh(factors[k] / correction).eigenvectors
            else:
                exponent = h["exponent"] or 1 / (2 * len(which))
                roots[k] = exact_root(factors[k] / correction + h["eps"] * eye, exponent)
    m = state.get("m", 0)
    n = b3 * m + (1 - b3) * g
    state["m"] = b1 * m + (1 - b1) * g
    n = n / (1 - b3 * b1 ** (t - 1)) if h["correct_bias"] else n
    a = n
    if h["graft"] in ("adagrad", "rmsprop", "adam"):
        v = state["v"] = average(state.get("v", 0), g**2, h["graft_beta2"], h["graft"] == "adagrad")
        a = n / ((v / (1 - h["graft_beta2"] ** t if h["graft"] == "adam" else 1.0)).sqrt() + h["graft_eps"])
    if h["preconditioner"] == "eigenvalue":
        turned = times(g, {k: q.T if k == 0 else q for k, q in roots.items()})
        e = state["e"] = average(state.get("e", 0), turned**2, b2, summed)
        d = times(n, {k: q.T if k == 0 else q for k, q in roots.items()}) / ((e / correction).sqrt() + h["eps"])
        d = times(d, {k: q if k == 0 else q.T for k, q in roots.items()})
    elif t < h["start"]:
        return a if h["early"] == "graft" else torch.zeros_like(g)
    else:
        d = times(n, roots)
    return d if h["graft"] == "none" else d * a.norm() / d.norm()


def step(p, g, state, t, h):
    if h["decay"] == "coupled":
        g = g + h["weight_decay"] * p
    x = g.reshape(1, -1) if g.ndim < 2 else g
    most = h["max_dim"] or max(x.shape)
    if h["target_dims"] == 1 and x.numel() <= most:
        x = x.reshape(1, -1)
    which = sides(x.shape[0], x.shape[1], h)
    rows, columns, d = min(most, x.shape[0]), min(most, x.shape[1]), torch.zeros_like(x)
    for i in range(0, x.shape[0], rows):
        for j in range(0, x.shape[1], columns):
            own = state.setdefault((i, j), {})
            d[i : i + rows, j : j + columns] = tile(x[i : i + rows, j : j + columns], own, t, h, which)
    keep = 1 - h["lr"] * h["weight_decay"] if h["decay"] == "before" else 1.0
    return keep * p - h["lr"] * d.reshape(p.shape)
