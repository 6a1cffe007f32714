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
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_optim.core import matrix_views
from lightning_optim.core.options import ZERO_MATRIX
from lightning_optim.core.parallel import collectives, sharding
from lightning_optim.core.rule import ADAMW_RMS
from lightning_optim.core.state.formats import RADIUS
from lightning_optim.core.step.records import GroupStep, ParamStep

TINY = 1e-8
"""Norms are taken for at least this where they divide; 1e-10 and, squared, 1e-12 where the published code has that."""


def check_first(groups: Sequence[GroupStep]) -> None:
    """Check before their first step that parameters can move, also sharded ones; on a mesh a collective call.

    Args:
        groups: of this step, with complete state.

    Raises:
        ValueError: a matrix of zeros under hyperball, which would stay so.
    """
    for group in groups:
        for s in group.params if group.group["constraint"] == "hyperball" else ():
            if s.grad is not None and not int(s.state["step"]):
                rows = _Rows(s, s.local(), None, each=False)
                if not rows.sums(lambda x, *_: (x * x,)).all():
                    raise ValueError(f"{s.plan.name}: {ZERO_MATRIX}")


class Step(NamedTuple):
    """What the factors below start from."""

    lr: float
    factor: float
    """Of the direction, by the learning-rate convention."""
    keep: float
    """Of the weights, by isotropic decay."""
    cautious: float
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


def factors(group: Mapping[str, Any], param: ParamStep, d: Tensor, step: Step, compensation: Tensor | None) -> Factors:
    """Find the factors of one parameter; on a mesh a collective call.

    Args:
        group: settings.
        param: the parameter, before the step.
        d: its direction, on this rank.
        step: learning rate and decay.
        compensation: what rounding left of the weights, if it is kept.

    Returns:
        The factors, in the dtype of the arithmetic.
    """
    rows = _Rows(param, d, compensation, each=group["uw_floor"] > 0 and group["uw_floor_by"] == "row")
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
    factor: Any = keep + lift if damped else keep
    scale = torch.ones_like(ww)
    if group["constraint"] == "hyperball" or group["pin"]:
        after = factor**2 * ww - 2 * factor * length * dw + length.square() * dd
        if step.cautious != 1:  # of the elements that decay before the step, of which only their signs tell
            local = rows.local(brake)
            some, other = rows.sums(_agreeing, local)
            less: Any = keep * step.cautious + lift
            after = after + (less**2 - factor**2) * some - 2 * (less - factor) * length * other
        scale = radius / total(after).clamp(min=0).sqrt().clamp(min=1e-10)
        if group["pin"]:
            scale = torch.where(norm > 0, scale, 1.0)
        scale = spread(scale)
    return Factors(*(rows.local(x) for x in (scale * keep, scale * lift, scale * length, brake)))


def _agreeing(x: Tensor, d: Tensor, brake: Tensor) -> Sequence[Tensor]:
    """Terms of <W, W> and <d, W> of the elements that the step moves towards zero, or not at all."""
    taken = (d - brake * x) * x >= 0
    return taken * x * x, taken * d * x


class _Rows:
    """The rows of all matrices of one parameter, or the matrices: the level on which the factors are found."""

    def __init__(self, param: ParamStep, d: Tensor, compensation: Tensor | None, *, each: bool):
        self.plan, self.state, self.each = param.plan, param.state, each
        plan = param.plan
        self.single = not each and len(plan.blocks) == plan.blocks[0].dims[0] == 1
        """Whether the level is one number."""
        self.x, self.d = (matrix_views.transpose_if(t, plan.transposed) for t in (param.local(), d))
        self.compensation = None if compensation is None else matrix_views.transpose_if(compensation, plan.transposed)
        self.dtype = plan.compute_dtype
        shape = tuple(matrix_views.transpose_if(torch.empty(plan.shape, device="meta"), plan.transposed).shape)
        lead = len(shape)
        while lead and math.prod(shape[lead:]) != plan.blocks[0].dims[2]:
            lead -= 1
        self.whole, self.lead = shape[:lead], lead
        here = tuple(slice(*bounds) for bounds in sharding.local_bounds(plan.param))
        self.here = (here[:-2] + (here[-1], here[-2]) if plan.transposed and 2 <= len(here) <= 3 else here)[:lead]

    @property
    def sizes(self) -> Tensor:
        """Elements of each matrix."""
        like = {"device": self.x.device, "dtype": torch.float64}
        return torch.cat([torch.full((b,), float(m * n), **like) for b, m, n in (x.dims for x in self.plan.blocks)])

    def sums(self, terms: Callable[..., Sequence[Tensor]], rows: Tensor | None = None) -> Tensor:
        """Sums over every row, or over every matrix, of terms made of weights, direction and a factor per row.

        Returns:
            float64 `[terms, rows or matrices]`, over the whole mesh.
        """
        turn, over = self.plan.transposed, tuple(range(self.lead, self.x.ndim))
        rows = None if rows is None else matrix_views.transpose_if(rows, turn)
        chunks = []
        for at in self._cuts():
            x = self.x[at].to(self.dtype) if self.lead else self.x.to(self.dtype)
            d = self.d[at] if self.lead else self.d
            if self.compensation is not None:
                x = x + (self.compensation[at] if self.lead else self.compensation)
            k = None if rows is None else rows[at] if self.lead else rows
            reduced = [t.sum() if self.single else t.sum(over) if over else t for t in terms(x, d, k)]
            chunks.append(torch.stack(reduced))
        if self.single:
            return collectives.add_up(torch.stack(chunks, 1).sum(1, keepdim=True, dtype=torch.float64), self.plan.param)
        part = torch.cat(chunks, 1) if self.lead else chunks[0]
        out = part.new_zeros((part.shape[0], *self.whole), dtype=torch.float64)
        if (
            self.x.numel()
        ):  # an empty part may have other sizes than its box: FSDP2's, of what tensor parallelism has cut
            out[(slice(None), *self.here)] = part.double()
        out = out.reshape(len(out), -1) if self.each else torch.stack([self._by_matrix(t) for t in out])
        return collectives.add_up(out, self.plan.param)

    def _cuts(self) -> list[slice]:
        """Runs of the first dimension that stay in cache."""
        size = self.x.shape[0] if self.lead else 1
        run = size
        if self.x.device.type == "cpu" and self.x.numel() > matrix_views.BLOCK:
            run = max(1, matrix_views.BLOCK * size // self.x.numel())
        return [slice(i, min(i + run, size)) for i in range(0, max(size, 1), max(run, 1))]

    def _by_matrix(self, rows: Tensor) -> Tensor:
        blocks = self.plan.blocks
        return torch.cat([x.view_of(rows.unsqueeze(-1), False).reshape(x.dims[:2]).sum(1) for x in blocks])

    def _by_row(self, matrices: Tensor) -> Tensor:
        out, first = matrices.new_empty((*self.whole, 1)), 0
        for part in self.plan.blocks:
            b, m, _ = part.dims
            where = part.view_of(out, False)
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
            return matrix_views.transpose_if(torch.zeros_like(self.x, dtype=self.dtype), self.plan.transposed)
        rows = (x.view(self.whole) if self.each else self._by_row(x))[self.here]
        rows = rows.reshape((*rows.shape, *[1] * (self.x.ndim - self.lead)))
        return matrix_views.transpose_if(rows, self.plan.transposed).to(self.dtype)

    def radius(self, norm: Tensor) -> Tensor:
        """The norms to keep: the present ones, or those before narrow weights were first rounded."""
        radius = self.state.get(RADIUS)
        if radius is None:
            return norm
        radius.copy_(torch.where(radius > 0, radius, norm))
        return radius.double()
