"""The shaped step of one matrix, in the order of the published scripts; everything off is the plain step."""

OFF = {
    "constraint": "none",
    "uw_floor": 0.0,
    "uw_floor_by": "matrix",
    "radial_damping": 1.0,
    "pin": False,
    "cautious_decay": 0.0,
    "cautious_when": "before",
    "lr_convention": "native",
}


def step(w, o, h):
    """W after a step, O the direction per unit lr."""
    h = {**OFF, "weight_decay": 0.0, "decay": "before", **h}
    lr, before, size = h["lr"], w.clone(), w.numel()
    c = (o * w).sum() / w.square().sum().clamp(min=1e-12)
    if c < 0:
        o = (o - c * w) + h["radial_damping"] * c * w
    if h["uw_floor_by"] == "row" and w.ndim == 2:
        for i in range(w.shape[0]):
            o[i] = o[i] * max(1, h["uw_floor"] * w[i].norm().clamp(min=1e-8) / o[i].norm().clamp(min=1e-8))
    elif o.norm() < h["uw_floor"] * w.norm():
        o = o * h["uw_floor"] * w.norm() / o.norm()
    radius = w.norm() - lr * (o * w).sum() / w.norm()
    keep = 1 - lr * h["weight_decay"]
    if h["decay"] == "before":
        w = keep * w
    if h["cautious_when"] == "before" and h["cautious_decay"]:
        w = w * (1 - lr * h["cautious_decay"] * (o * before >= 0).to(w.dtype))
    if h["constraint"] == "hyperball":
        length = before.norm() if h["lr_convention"] == "native" else 0.2 * size**0.5
        w = w - lr * length * o / o.norm().clamp(min=1e-10)
    else:
        w = w - lr * o
    if h["decay"] == "after":
        w = keep * w
    if h["constraint"] == "hyperball":
        w = w * before.norm() / w.norm().clamp(min=1e-10)
    if h["pin"]:
        w = w * radius / w.norm()
    if h["cautious_when"] == "after_pin":
        w = w * (1 - lr * h["cautious_decay"] * (o * before > 0).to(w.dtype))
    return w
