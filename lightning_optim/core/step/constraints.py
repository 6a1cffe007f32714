"""Constraints on the norms of weights and updates, per matrix or row: hyperball, update floor, radial damping, pin.

With O the step per unit learning rate, k = (1 - radial_damping) min(<O, W>, 0) / |W|^2 and |.| the Frobenius norm of
one matrix, in this order:

    O <- O - k W                                           radial_damping: of the component that increases |W|
    O <- O max(1, uw_floor |W| / |O|)                      uw_floor: of a matrix or of each of its rows
    hyperball:  W' = W - lr |W| O / |O|;  W <- W' |W| / |W'|
    pin:        W' = W - lr O;            W <- W' (|W| - lr <O, W> / |W|) / |W'|

Norms, k and the signs of cautious decay are those before the step. Decay is applied where the rule has it, before or
after W - lr O, and always before the norm is set; cautious decay before W - lr O, or after everything else
(`cautious_when="after_pin"`). This is the order of modded-nanogpt, track 3, pull request 328.

Under hyperball (arXiv:2606.16899) lr is an angle. With `lr_convention="adamw"` lr |W| becomes lr 0.2 sqrt(mn), the
step that AdamW would take. All factors follow from three sums over each row, <W, W>, <O, W> and <O, O>, so a parameter
is read once before it is written, and shards exchange a few numbers per matrix, or per row with `uw_floor_by="row"`.

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
from lightning_optim.core.parallel import collectives, element_positions
from lightning_optim.core.rule import ADAMW_RMS
from lightning_optim.core.state.formats import RADIUS
from lightning_optim.core.step.records import GroupStep, ParamStep

TINY = 1e-8
"""Lower bound of norms in denominators; 1e-10 and, squared, 1e-12 where the published code has those."""


def check_first(groups: Sequence[GroupStep]) -> None:
    """Check before their first step that no matrix under hyperball is zero; on a mesh a collective call.

    Args:
        groups: groups of this step, with allocated state.

    Raises:
        ValueError: a matrix of zeros under hyperball, which would stay zero.
    """
    for group in groups:
        for s in group.params if group.group["constraint"] == "hyperball" else ():
            if s.grad is not None and not int(s.state["step"]):
                rows = _Rows(s, s.local(), None, by_row=False)
                if not rows.sums(lambda x, *_: (x * x,)).all():
                    raise ValueError(f"{s.plan.name}: {ZERO_MATRIX}")


class Step(NamedTuple):
    """Learning rate and decay of a step, from which the factors are computed."""

    lr: float
    factor: float
    """Factor of the direction, by the learning-rate convention."""
    keep: float
    """Factor of the weights, by isotropic decay."""
    cautious: float
    """Factor of the weights to which cautious decay applies before the step; 1 for no such decay."""
    late: bool
    """Whether isotropic decay follows the step."""


class Factors(NamedTuple):
    """W <- (keep c + lift) W - step d, with c the factor of cautious decay; each broadcasts over the local shard."""

    keep: Tensor
    lift: Tensor
    step: Tensor
    brake: Tensor
    """The sign of the step is that of d - brake W."""


def factors(group: Mapping[str, Any], param: ParamStep, d: Tensor, step: Step, compensation: Tensor | None) -> Factors:
    """Compute the factors of one parameter; on a mesh a collective call.

    Args:
        group: settings of its group.
        param: the parameter, before the step.
        d: its direction, on this rank.
        step: learning rate and decay.
        compensation: rounding error of the weights, if it is stored.

    Returns:
        The factors, in the compute dtype.
    """
    rows = _Rows(param, d, compensation, by_row=group["uw_floor"] > 0 and group["uw_floor_by"] == "row")
    total, per_row = rows.total, rows.per_row
    ww, dw, dd = rows.sums(lambda x, d, _: (x * x, d * x, d * d))
    norm = total(ww).sqrt()
    brake, inner, square = torch.zeros_like(ww), dw, dd
    if is_damped := group["radial_damping"] != 1:
        brake = per_row((1 - group["radial_damping"]) * total(dw).clamp(max=0) / total(ww).clamp(min=1e-12))
        inner, square = dw - brake * ww, (dd - 2 * brake * dw + brake.square() * ww).clamp(min=0)
    scaled_factor = torch.full_like(ww, step.factor)
    if group["uw_floor"]:
        min_update = group["uw_floor"] * ww.sqrt().clamp(min=TINY)
        scaled_factor = (min_update / (step.factor * square.sqrt()).clamp(min=TINY)).clamp(min=1) * step.factor
    keep, length, radius = step.keep, step.lr * scaled_factor, norm
    if group["constraint"] == "hyperball":
        radius = rows.radius(norm)
        target = step.lr * (radius if group["lr_convention"] == "native" else ADAMW_RMS * rows.sizes.sqrt())
        length = per_row(target / total(scaled_factor.square() * square).sqrt().clamp(min=1e-10)) * scaled_factor
    elif group["pin"]:
        new_norm = norm - step.lr * total(scaled_factor * inner) / norm.clamp(min=1e-12)
        radius = new_norm.clamp(min=TINY)
    length = length * keep if step.late else length
    lift = length * brake if is_damped else brake
    factor: Any = keep + lift if is_damped else keep
    scale = torch.ones_like(ww)
    if group["constraint"] == "hyperball" or group["pin"]:
        after = factor**2 * ww - 2 * factor * length * dw + length.square() * dd
        if step.cautious != 1:  # correct the sums for the elements that decay, which depend on signs only
            ww_decayed, dw_decayed = rows.sums(_decayed_terms, rows.local(brake))
            cautious: Any = keep * step.cautious + lift
            after = after + (cautious**2 - factor**2) * ww_decayed - 2 * (cautious - factor) * length * dw_decayed
        scale = radius / total(after).clamp(min=0).sqrt().clamp(min=1e-10)
        if group["pin"]:
            scale = torch.where(norm > 0, scale, 1.0)
        scale = per_row(scale)
    local = (rows.local(x) for x in (scale * keep, scale * lift, scale * length, brake))
    return Factors(*(element_positions.part_of_rows(param.plan.param, x) for x in local))


def _decayed_terms(x: Tensor, d: Tensor, brake: Tensor) -> Sequence[Tensor]:
    """Terms of <W, W> and <d, W> over the elements that the step moves towards zero, or not at all."""
    mask = (d - brake * x) * x >= 0
    return mask * x * x, mask * d * x


class _Rows:
    """Sums and factors of one parameter, one per matrix or one per row of its matrices."""

    def __init__(self, param: ParamStep, d: Tensor, compensation: Tensor | None, *, by_row: bool):
        self.plan, self.state, self.by_row = param.plan, param.state, by_row
        plan = param.plan
        self.is_single = not by_row and len(plan.blocks) == plan.blocks[0].dims[0] == 1
        """Whether there is only one factor, for one matrix."""
        self.x, self.d = (self._rows_of(t) for t in (param.local(), d))
        self.compensation = None if compensation is None else self._rows_of(compensation)
        self.dtype = plan.compute_dtype
        shape = tuple(matrix_views.transpose_if(torch.empty(plan.shape, device="meta"), plan.transposed).shape)
        row_ndim, columns = int(len(shape) > 1), plan.blocks[0].dims[2]
        while math.prod(shape[row_ndim:]) != columns:
            row_ndim += 1
        self.row_shape, self.row_ndim = shape[:row_ndim], row_ndim
        """Leading dimensions of the parameter, which index its rows."""
        at = tuple(slice(*bounds) for bounds in element_positions.bounds_of_rows(plan.param))
        is_transposed = plan.transposed and 2 <= len(at) <= 3
        self.local_rows = (at[:-2] + (at[-1], at[-2]) if is_transposed else at)[:row_ndim]

    def _rows_of(self, part: Tensor) -> Tensor:
        """Whole rows of what this rank has, as rows x columns."""
        return matrix_views.transpose_if(element_positions.whole_rows(self.plan.param, part), self.plan.transposed)

    @property
    def sizes(self) -> Tensor:
        """Number of elements of each matrix."""
        like = {"device": self.x.device, "dtype": torch.float64}
        return torch.cat([torch.full((b,), float(m * n), **like) for b, m, n in (x.dims for x in self.plan.blocks)])

    def sums(self, terms: Callable[..., Sequence[Tensor]], rows: Tensor | None = None) -> Tensor:
        """Sums over every row, or over every matrix, of terms in the weights, the direction and a factor per row.

        Returns:
            float64 `[terms, rows or matrices]`, over the whole mesh.
        """
        dims = tuple(range(self.row_ndim, self.x.ndim))
        rows = None if rows is None else matrix_views.transpose_if(rows, self.plan.transposed)
        chunks = []

        def reduced(*tensors: Tensor | None) -> Tensor:
            return torch.stack([t.sum() if self.is_single else t.sum(dims) if dims else t for t in terms(*tensors)])

        for at in self._chunks():
            x = self.x[at].to(self.dtype) if self.row_ndim else self.x.to(self.dtype)
            d = self.d[at] if self.row_ndim else self.d
            if self.compensation is not None:
                x = x + (self.compensation[at] if self.row_ndim else self.compensation)
            k = None if rows is None else rows[at] if self.row_ndim else rows
            part = reduced(x, d, k)
            if part.is_cpu and not part.isfinite().all():  # squares of a long direction overflow
                part = reduced(x.double(), d.double(), None if k is None else k.double())
            chunks.append(part)
        chunks = [part.double() for part in chunks]
        if self.is_single:
            return collectives.add_up(torch.stack(chunks, 1).sum(1, keepdim=True, dtype=torch.float64), self.plan.param)
        local_sums = torch.cat(chunks, 1) if self.row_ndim else chunks[0]
        out = local_sums.new_zeros((local_sums.shape[0], *self.row_shape), dtype=torch.float64)
        # the shape of an empty shard may differ from its bounds (FSDP2 over tensor parallelism)
        if self.x.numel():
            out[(slice(None), *self.local_rows)] = local_sums.double()
        out = out.reshape(len(out), -1) if self.by_row else torch.stack([self._sum_by_matrix(t) for t in out])
        return collectives.add_up(out, self.plan.param)

    def _chunks(self) -> list[slice]:
        """Ranges of the first dimension that stay in cache."""
        size = self.x.shape[0] if self.row_ndim else 1
        step = size
        if self.x.device.type == "cpu" and self.x.numel() > matrix_views.BLOCK:
            step = max(1, matrix_views.BLOCK * size // self.x.numel())
        return [slice(i, min(i + step, size)) for i in range(0, max(size, 1), max(step, 1))]

    def _sum_by_matrix(self, rows: Tensor) -> Tensor:
        blocks = self.plan.blocks
        return torch.cat([x.view_of(rows.unsqueeze(-1), False).reshape(x.dims[:2]).sum(1) for x in blocks])

    def _expand_to_rows(self, matrices: Tensor) -> Tensor:
        out, first = matrices.new_empty((*self.row_shape, 1)), 0
        for block in self.plan.blocks:
            b, m, _ = block.dims
            target = block.view_of(out, False)
            target.copy_(matrices[first : first + b].view(b, 1, 1).expand(b, m, 1).reshape(target.shape))
            first += b
        return out.squeeze(-1)

    def total(self, x: Tensor) -> Tensor:
        """Add up values per row to values per matrix, where factors are per row."""
        return self._sum_by_matrix(x.view(self.row_shape)) if self.by_row else x

    def per_row(self, x: Tensor) -> Tensor:
        """Expand one value per matrix to one per row, where factors are per row."""
        return self._expand_to_rows(x).flatten() if self.by_row else x

    def local(self, x: Tensor) -> Tensor:
        """One value per row of this rank's shard, shaped to broadcast over it."""
        if self.is_single:
            return x.to(self.dtype).view([1] * self.x.ndim)
        if not self.x.numel():
            return matrix_views.transpose_if(torch.zeros_like(self.x, dtype=self.dtype), self.plan.transposed)
        rows = (x.view(self.row_shape) if self.by_row else self._expand_to_rows(x))[self.local_rows]
        rows = rows.reshape((*rows.shape, *[1] * (self.x.ndim - self.row_ndim)))
        return matrix_views.transpose_if(rows, self.plan.transposed).to(self.dtype)

    def radius(self, norm: Tensor) -> Tensor:
        """Norms to keep: the current ones, or those before low-precision weights were first rounded."""
        radius = self.state.get(RADIUS)
        if radius is None:
            return norm
        radius.copy_(torch.where(radius > 0, radius, norm))
        return radius.double()
