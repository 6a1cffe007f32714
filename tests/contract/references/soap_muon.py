import torch

from lightning_optim.ops.orthogonal import SCHEDULES
from tests.contract.references import due
from tests.contract.references.muon import shape_scale
from tests.contract.references.soap import rotate, sides

STRICT = {"ns_dtype": "float64", "max_precond_dim": 8}  # see soap
NARROW = {"ns_dtype": "float32", "max_precond_dim": 8}
SETTINGS = [
    {"lr": 0.02, "refresh": "fixed:1", "weight_decay": 0.1, "trust_gate": (0.45, 0.85, 2, 4)},
    {
        "lr": 0.02,
        "refresh": "fixed:3",
        "contra": 0.4,
        "lines": "longer",
        "contra_size": "power",
        "restore": "fro",
        "inner_eps_added": True,
    },
    {"lr": 0.02, "sides": "short", "second_moment": "gradient", "nesterov": False, "ns_coefficients": "quintic"},
    {"lr": 0.02, "sides": "none", "restore": "none", "ns_divisor": "fro", "soft": 0.5, "scale": "spectral"},
    {"lr": 0.02, "factors": "kl", "shampoo_beta": 0.8, "aurora": 2, "lines": "rows"},
]


def size(x, kind):
    return float(x.norm() if kind == "fro" else (x @ x.T).norm() ** 0.5)


def iterates(x, h):
    """Of Newton-Schulz."""
    given = h["ns_coefficients"]
    table = SCHEDULES[given] if isinstance(given, str) else (given,)
    out = [x / max(size(x, h["ns_divisor"]), h["eps"])]
    for i in range(h["ns_steps"]):
        (a, b, c), y = table[min(i, len(table) - 1)], out[-1]
        out.append(a * y + b * (y @ y.T) @ y + c * (y @ y.T) @ (y @ y.T) @ y)
    return out


SOFT = [0.1091613623, 0.07085664498, 0.05210528973, 0.05457295795, 0.05011334061, 0.03334622198]
SOFT += [0.05022104481, 0.1053727358, 0.1187323776, 0.1185061091, 0.1185059576, 0.1185059576]


def orthogonal(x, h):
    found = iterates(x, h)
    if not h["soft"]:
        return found[-1]
    total = sum(w * y for w, y in zip(SOFT, found, strict=False))
    return found[-1] + h["soft"] * (total * size(found[-1], "gram") / size(total, "gram") - found[-1])


def equal_rows(x, h):
    m, n = x.shape
    if m < n:
        return equal_rows(x.T, h).T
    if m == n or not h["aurora"]:
        return orthogonal(x, h)
    scale = 1 / x.norm(dim=1)
    for _ in range(h["aurora"] - 1):
        scale = scale * (n / m) ** 0.5 / orthogonal(torch.diag(scale) @ x, h).norm(dim=1)
    return orthogonal(torch.diag(scale) @ x, h)


def spectral(x):
    v = torch.ones(x.shape[1], dtype=x.dtype)
    for _ in range(5):
        v = x.T @ (x @ v)
        v = v / v.norm()
    return float((x @ v).norm())


def mapped(x, h):
    o = equal_rows(x, h)
    if not h["contra"]:
        return o
    kind = "fro" if h["contra_size"] == "power" else "gram"
    length = spectral(x) if h["contra_size"] == "power" else size(x, "gram")
    y = o - h["contra"] / 2 * x / length
    return y * size(o, kind) / size(y, kind)


def divided(o, state, beta, lines):
    dim = 1 if lines == "rows" or o.shape[0] >= o.shape[1] else 0
    v = state["lines"] = beta * state.get("lines", 0) + (1 - beta) * (o**2).mean(dim, keepdim=True)
    return o / v.sqrt() * o.norm() / (o / v.sqrt()).norm()


def cos(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def blended(x, u, g, t, h):
    floor, cap, first, last = h["trust_gate"]
    passed = min(max((t - 1 - first) / (last - first), 0), 1)
    gate = min(max((cos(x, u) - 0.2) / 0.8, 0), 1) * min(max(cos(x, g) / max(cos(u, g), 1e-8), 0), 1)
    gate = min(max(gate, floor * (1 - passed)), cap if passed < 1 else 1)
    y = u + gate * (x - u)
    return y * size(u, "gram") / size(y, "gram")


def rotated(p, h):
    short = p.ndim == 2 and int(p.shape[0] > p.shape[1])
    return [k for k in sides(p, h) if h["sides"] == "both" or (h["sides"] == "short" and k == short)]


def whitened(g, state, h, weight):
    """The other side's basis and inverse roots on one side of g; new factors and roots."""
    bases, roots, out = state["bases"], state["roots"], {}
    for k in bases:
        white, other = g, 1 - k
        if other in bases:
            inverse = torch.diag(roots[other])
            white = g @ bases[1] @ inverse if other == 1 else inverse @ bases[0].T @ g
        outer = white @ white.T / g.shape[1] if k == 0 else white.T @ white / g.shape[0]
        seen = bases[k].T @ white if k == 0 else white @ bases[k]
        values = (1 - weight) / roots[k] ** 2 + weight * (seen**2).mean(1 - k)
        out[k] = (1 - weight) * state["factors"][k] + weight * outer, (values**-0.5).clamp(max=4000)
    for k, (factor, root) in out.items():
        state["factors"][k], roots[k] = factor, root


def turn(p, g, state, t, h, weight):
    """Factors and bases after a step."""
    outer = {k: (g @ g.T if k == 0 else g.T @ g) for k in rotated(p, h)}
    if t == 1:
        kl = h["factors"] == "kl"
        state["factors"] = {k: x / g.shape[1 - k] if kl else weight * x for k, x in outer.items()}
        state["bases"] = {k: torch.linalg.eigh(x).eigenvectors.flip(1) for k, x in state["factors"].items()}
        state["roots"] = {k: torch.full((g.shape[k],), 0.1**-0.5, dtype=g.dtype) for k in outer}
    elif h["factors"] == "kl":
        whitened(g, state, h, weight)
        for k, factor in state["factors"].items():
            state["bases"][k] = torch.linalg.qr(factor @ state["bases"][k]).Q if due(h, t) else state["bases"][k]
    else:
        for k, x in outer.items():
            factor = state["factors"][k] = (1 - weight) * state["factors"][k] + weight * x
            if due(h, t):
                order = torch.diag(state["bases"][k].T @ factor @ state["bases"][k]).argsort(descending=True)
                if "v" in state:
                    state["v"] = state["v"][order] if k == 0 else state["v"][:, order]
                state["bases"][k] = torch.linalg.qr(factor @ state["bases"][k][:, order]).Q


def step(p, g, state, t, h):
    mu = h["momentum"]
    m = state["m"] = mu * state.get("m", 0) + (1 - mu) * g
    x = u = (1 - mu) * g + mu * m if h["nesterov"] else m
    if t > 1 or not rotated(p, h):
        bases = state.get("bases", {})
        y = rotate(u, bases)
        seen = y if h["second_moment"] == "momentum" else rotate(g, bases)
        v = state["v"] = h["beta2"] * state.get("v", torch.zeros_like(y)) + (1 - h["beta2"]) * seen**2
        root = v.sqrt() + h["inner_eps"] if h["inner_eps_added"] else v.sqrt().clamp(min=h["inner_eps"])
        x = rotate(y / root, bases, back=True)
        if h["restore"] != "none":
            x = x * size(u, h["restore"]) / size(x, h["restore"])
        if h["trust_gate"] is not None:
            x = blended(x, u, g, t, h)
    elif "v" not in state:
        state["v"] = torch.zeros_like(g)
    o = mapped(x, h)
    if h["lines"] != "none":
        o = divided(o, state, h["lines_beta"], h["lines"])
    turn(p, g, state, t, h, 1 - (h["beta2"] if h["shampoo_beta"] is None else h["shampoo_beta"]))
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * shape_scale(p, h) * o
