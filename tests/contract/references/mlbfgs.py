import torch

DUE = {"interval": 2, "kl_clip": 10.0}  # longer steps: s is a difference of weights
TINY_LR = 1e-3
BLIND = {"interval": 100}
SETTINGS = [
    {"interval": 1, "history": 2, "beta": 0.5, "weight_decay": 0.1, "bounds": (0.2, 1.1), "damping": 0.0},
    {"interval": 2, "history": 3, "beta": 0.0, "momentum": 0.0, "bounds": None, "kl_clip": None, "lr": 1e-3},
]


def step(p, g, state, t, h):
    """With the inverse Hessian written out: H <- V^T H V + s s^T / (s^T y), V = I - y s^T / (s^T y)."""
    g = g + h["weight_decay"] * p
    x, q = p.reshape(-1), g.reshape(-1)
    b = h["beta"] if t > 1 else 0.0
    mean = b * state.get("mean", 0) + (1 - b) * torch.stack([x, q])
    state["mean"] = mean
    if t == 1:
        state["last"], state["pairs"] = mean, []
    elif (t - 1) % h["interval"] == 0:
        s, y = mean - state["last"]
        state["last"] = mean
        if h["bounds"] is not None:
            low, high = h["bounds"]
            mu, tau = float(s @ y / (s @ s)), 1 - h["damping"]
            if mu <= low:
                tau = min((1 - low) / (1 - mu), tau)
            elif mu >= high:
                tau = min((high - 1) / (mu - 1), tau)
            y = tau * y + (1 - tau) * s
        if s @ y > 1e-8 * s.norm() * y.norm():
            state["pairs"] = [*state["pairs"], (s, y)][-h["history"] :]
    eye = torch.eye(len(q), dtype=torch.float64)
    inverse = eye
    if state["pairs"]:
        s, y = state["pairs"][-1]
        inverse = s @ y / (y @ y) * eye
    for s, y in state["pairs"]:
        v = eye - torch.outer(y, s) / (s @ y)
        inverse = v.T @ inverse @ v + torch.outer(s, s) / (s @ y)
    d = inverse @ q
    if h["kl_clip"] is not None:
        d = d * min(1.0, float(h["kl_clip"] / (q @ d)) ** 0.5)
    state["buffer"] = h["momentum"] * state.get("buffer", 0) + d
    return p - h["lr"] * state["buffer"].view(p.shape)
