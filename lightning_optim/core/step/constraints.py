"""What a step may do to the norms of the matrices of a parameter: hyperball, update floor, radial brake, pin.

With O the step per unit learning rate, k = (1 - radial_damping) min(<O, W>, 0) / |W|^2 and |.| the Frobenius norm of
one matrix, in this order:

    O <- O - k W                                           radial_damping: of what moves the weights outwards
    O <- O max(1, uw_floor |W| / |O|)                      uw_floor, of a matrix or of each of its rows
    hyperball:  W' = W - lr |W| O / |O|;  W <- W' |W| / |W'|
    pin:        W' = W - lr O;            W <- W' (|W| - lr <O, W> / |W|) / |W'|

Norms, k and the signs of cautious decay are those before the step. Decay comes where the rule has it, before or after
W - lr O, and in any case before the norm is set; cautious decay before W - lr O, or after all of this
(`cautious_when="after_pin"`). That is the order of modded-nanogpt, track 3, pull request 328.

Hyperball (arXiv:2606.16899) makes lr an angle. With `lr_convention="adamw"` lr |W| becomes lr 0.2 sqrt(mn), the step
that AdamW would take. Everything follows from three sums over each row, <W, W>, <O, W> and <O, O>, so a parameter is
read once before it is written, and shards exchange a few numbers per matrix, or per row where a floor is one of rows.

Differs: a matrix of zeros is not pinned in its first step, where the published code would hold it at 1e-8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from lightning_optim.core import matrix_views
from lightning_optim.core.parallel import collectives, sharding
from lightning_optim.core.rule import ADAMW_RMS, Rule
from lightning_optim.core.state import formats

if TYPE_CHECKING:
    from lightning_optim.core.step.work import Work


OPTIONS = ("constraint", "uw_floor", "uw_floor_by", "radial_damping", "pin")
"""Settings of a group that are about its matrices; `lightning_optim.core.optimizer.RuleOptimizer` explains them."""
TINY = 1e-8
"""Norms are taken for at least this where they divide; 1e-10 and, squared, 1e-12 where the published code has that."""
_ZERO = (
    "a matrix of zeros, and constraint='hyperball' keeps the norm; initialise it with random numbers, or leave it out "
    "by an override ('NAME', None, {'constraint': 'none'})"
)


def shapes_step(group: Mapping[str, Any]) -> bool:
    """Whether a group asks for any of it.

    Returns:
        True if so.
    """
    return (
        group["constraint"] != "none" or group["uw_floor"] > 0 or group["radial_damping"] != 1.0 or bool(group["pin"])
    )


def validate_constraints(rule: Rule, group: Mapping[str, Any]) -> None:
    """Check the settings of a group against each other.

    Args:
        rule: of the group.
        group: its settings.

    Raises:
        ValueError: two that contradict each other.
    """
    said = f"group {group['name']!r}"
    if group["constraint"] == "hyperball" and (group["pin"] or (group["uw_floor"] and group["uw_floor_by"] != "row")):
        raise ValueError(
            f"{said}: constraint='hyperball' sets the norms of weights and step; leave out pin and uw_floor, "
            "or give uw_floor_by='row'"
        )
    if group["cautious_decay"] is True and rule.weight_decay and rule.decay not in ("before", "after"):
        raise ValueError(
            f"{said}: {rule.name} applies weight_decay itself, so cautious_decay=True cannot mask it; "
            "give weight_decay=0 and cautious_decay a number"
        )


def validate_param(name: str, p: Tensor, group: Mapping[str, Any]) -> None:
    """Check that a parameter can move under a group's constraint.

    Args:
        name: of the parameter.
        p: the parameter.
        group: its settings.

    Raises:
        ValueError: it is zero, and would stay so.
    """
    if (
        group["constraint"] == "hyperball"
        and p.device.type != "meta"
        and sharding.sharding_of(p) is None
        and not p.any()
    ):
        raise ValueError(f"{name}: {_ZERO}")


def check_first(group: Mapping[str, Any], works: Sequence[Work]) -> None:
    """Check before their first step that parameters can move, also those that are cut; on a mesh a collective call.

    Args:
        group: settings.
        works: parameters that are about to step, with their state.

    Raises:
        ValueError: a matrix of zeros under hyperball, which would stay so.
    """
    if group["constraint"] == "hyperball":
        for w in works:
            if not int(w.state["step"]):
                rows = _Rows(w, sharding.local(w.param), None, each=False)
                if not rows.sums(lambda x, *_: (x * x,)).all():
                    raise ValueError(f"{w.name}: {_ZERO}")


class Step(NamedTuple):
    """What the factors below start from."""

    lr: float
    factor: float
    """Of the direction, by the learning-rate convention."""
    keep: float
    """Of the weights, by isotropic decay."""
    held: float
    """Of the weights that cautious decay takes hold of before the step; 1 for none."""
    late: bool
    """Whether isotropic decay follows the step."""


class Factors(NamedTuple):
    """W <- (keep c + lift) W - step d, with c what cautious decay leaves; each broadcasts over the local part."""

    keep: Tensor
    lift: Tensor
    step: Tensor
    brake: Tensor
    """The sign of the step is that of d - brake W."""


def factors(group: Mapping[str, Any], w: Work, d: Tensor, step: Step, carried: Tensor | None) -> Factors:
    """Find the factors of one parameter; on a mesh a collective call.

    Args:
        group: settings.
        w: the parameter, before the step.
        d: its direction, on this rank.
        step: learning rate and decay.
        carried: what rounding left of the weights, if it is kept.

    Returns:
        The factors, in the dtype of the arithmetic.
    """
    rows = _Rows(w, d, carried, each=group["uw_floor"] > 0 and group["uw_floor_by"] == "row")
    total, spread = rows.total, rows.spread
    ww, dw, dd = rows.sums(lambda x, d, _: (x * x, d * x, d * d))
    norm = total(ww).sqrt()
    brake, inner, square = torch.zeros_like(ww), dw, dd
    if damped := group["radial_damping"] != 1:
        brake = spread((1 - group["radial_damping"]) * total(dw).clamp(max=0) / total(ww).clamp(min=1e-12))
        inner, square = dw - brake * ww, (dd - 2 * brake * dw + brake.square() * ww).clamp(min=0)
    grown = torch.full_like(ww, step.factor)
    if group["uw_floor"]:
        least = group["uw_floor"] * ww.sqrt().clamp(min=TINY)
        grown = (least / (step.factor * square.sqrt()).clamp(min=TINY)).clamp(min=1) * step.factor
    keep, length, radius = step.keep, step.lr * grown, norm
    if group["constraint"] == "hyperball":
        radius = rows.radius(norm)
        wanted = step.lr * (radius if group["lr_convention"] == "native" else ADAMW_RMS * rows.sizes.sqrt())
        length = spread(wanted / total(grown.square() * square).sqrt().clamp(min=1e-10)) * grown
    elif group["pin"]:
        moved = norm - step.lr * total(grown * inner) / norm.clamp(min=1e-12)
        radius = moved.clamp(min=TINY)
    length = length * keep if step.late else length
    lift = length * brake if damped else brake
    kept: Any = keep + lift if damped else keep
    scale = torch.ones_like(ww)
    if group["constraint"] == "hyperball" or group["pin"]:
        after = kept**2 * ww - 2 * kept * length * dw + length.square() * dd
        if step.held != 1:  # of the elements that decay before the step, of which only their signs tell
            local = rows.local(brake)
            some, other = rows.sums(_agreeing, local)
            less: Any = keep * step.held + lift
            after = after + (less**2 - kept**2) * some - 2 * (less - kept) * length * other
        scale = radius / total(after).clamp(min=0).sqrt().clamp(min=1e-10)
        if group["pin"]:
            scale = torch.where(norm > 0, scale, 1.0)
        scale = spread(scale)
    return Factors(*(rows.local(x) for x in (scale * keep, scale * lift, scale * length, brake)))


def _agreeing(x: Tensor, d: Tensor, brake: Tensor) -> Sequence[Tensor]:
    """Terms of <W, W> and <d, W> of the elements that the step moves towards zero, or not at all."""
    held = (d - brake * x) * x >= 0
    return held * x * x, held * d * x


class _Rows:
    """The rows of all matrices of one parameter, or the matrices: the level on which the factors are found."""

    def __init__(self, w: Work, d: Tensor, carried: Tensor | None, *, each: bool):
        self.w, self.each = w, each
        self.single = not each and len(w.parts) == w.parts[0].dims[0] == 1
        """Whether the level is one number."""
        self.x, self.d = (matrix_views.transpose_if(t, w.transposed) for t in (sharding.local(w.param), d))
        self.carried = None if carried is None else matrix_views.transpose_if(carried, w.transposed)
        self.dtype = formats.compute_dtype_of(w.param.dtype)
        shape = tuple(matrix_views.transpose_if(torch.empty(w.param.shape, device="meta"), w.transposed).shape)
        lead = len(shape)
        while lead and math.prod(shape[lead:]) != w.parts[0].dims[2]:
            lead -= 1
        self.whole, self.lead = shape[:lead], lead
        here = tuple(slice(*bounds) for bounds in sharding.local_bounds(w.param))
        self.here = (here[:-2] + (here[-1], here[-2]) if w.transposed and 2 <= len(here) <= 3 else here)[:lead]

    @property
    def sizes(self) -> Tensor:
        """Elements of each matrix."""
        like = {"device": self.x.device, "dtype": torch.float64}
        return torch.cat([torch.full((b,), float(m * n), **like) for b, m, n in (x.dims for x in self.w.parts)])

    def sums(self, terms: Callable[..., Sequence[Tensor]], rows: Tensor | None = None) -> Tensor:
        """Sums over every row, or over every matrix, of terms made of weights, direction and a factor per row.

        Returns:
            float64 `[terms, rows or matrices]`, over the whole mesh.
        """
        turn, over = self.w.transposed, tuple(range(self.lead, self.x.ndim))
        rows = None if rows is None else matrix_views.transpose_if(rows, turn)
        found = []
        for at in self._cuts():
            x = self.x[at].to(self.dtype) if self.lead else self.x.to(self.dtype)
            d = self.d[at] if self.lead else self.d
            if self.carried is not None:
                x = x + (self.carried[at] if self.lead else self.carried)
            k = None if rows is None else rows[at] if self.lead else rows
            reduced = [t.sum() if self.single else t.sum(over) if over else t for t in terms(x, d, k)]
            found.append(torch.stack(reduced))
        if self.single:
            return collectives.add_up(torch.stack(found, 1).sum(1, keepdim=True, dtype=torch.float64), self.w.param)
        part = torch.cat(found, 1) if self.lead else found[0]
        out = part.new_zeros((part.shape[0], *self.whole), dtype=torch.float64)
        if (
            self.x.numel()
        ):  # an empty part may have other sizes than its box: FSDP2's, of what tensor parallelism has cut
            out[(slice(None), *self.here)] = part.double()
        out = out.reshape(len(out), -1) if self.each else torch.stack([self._by_matrix(t) for t in out])
        return collectives.add_up(out, self.w.param)

    def _cuts(self) -> list[slice]:
        """Runs of the first dimension that stay in cache."""
        size = self.x.shape[0] if self.lead else 1
        run = size
        if self.x.device.type == "cpu" and self.x.numel() > matrix_views.BLOCK:
            run = max(1, matrix_views.BLOCK * size // self.x.numel())
        return [slice(i, min(i + run, size)) for i in range(0, max(size, 1), max(run, 1))]

    def _by_matrix(self, rows: Tensor) -> Tensor:
        found = [part.of(rows.unsqueeze(-1), False).reshape(part.dims[:2]).sum(1) for part in self.w.parts]
        return torch.cat(found)

    def _by_row(self, matrices: Tensor) -> Tensor:
        out, first = matrices.new_empty((*self.whole, 1)), 0
        for part in self.w.parts:
            b, m, _ = part.dims
            where = part.of(out, False)
            where.copy_(matrices[first : first + b].view(b, 1, 1).expand(b, m, 1).reshape(where.shape))
            first += b
        return out.squeeze(-1)

    def total(self, x: Tensor) -> Tensor:
        """Sums over each matrix."""
        return self._by_matrix(x.view(self.whole)) if self.each else x

    def spread(self, x: Tensor) -> Tensor:
        """The value of its matrix on every row."""
        return self._by_row(x).flatten() if self.each else x

    def local(self, x: Tensor) -> Tensor:
        """One value per row of this rank's part, shaped to broadcast over it."""
        if self.single:
            return x.to(self.dtype).view([1] * self.x.ndim)
        if not self.x.numel():
            return matrix_views.transpose_if(torch.zeros_like(self.x, dtype=self.dtype), self.w.transposed)
        rows = (x.view(self.whole) if self.each else self._by_row(x))[self.here]
        rows = rows.reshape((*rows.shape, *[1] * (self.x.ndim - self.lead)))
        return matrix_views.transpose_if(rows, self.w.transposed).to(self.dtype)

    def radius(self, norm: Tensor) -> Tensor:
        """The norms to keep: the present ones, or those before narrow weights were first rounded."""
        kept = self.w.state.get(formats.RADIUS)
        if kept is None:
            return norm
        kept.copy_(torch.where(kept > 0, kept, norm))
        return kept.double()
