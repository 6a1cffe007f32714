"""Eight bits per element with one scale per block: the dynamic map of Dettmers et al. and the e4m3 floating format.

A block of consecutive elements is divided by a scale, so that its largest magnitude is the table's (1, or 448), and
every quotient becomes the nearest of 256 values. The dynamic map has seven decades, 10^-7 to 1, with 2^i values in
decade i: few where values are small, many near the maximum. Its signed form is asymmetric (-0.993 to 1), as published.

Differs: a value above zero of a table for non-negative values never becomes zero. Published quantizers round small
second moments to zero, which divides the first moment by eps alone. `"int8_grid"` is the dynamic map as bitsandbytes
0.50 rounds on a CPU: quotients go to the nearest of 65536 evenly spaced points from -1 to 1 first, which is faster
and coarser, moves zeros by 1.5e-5 of the block's largest and holds second moments above that.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

Format = Literal["int8", "int8_grid", "fp8"]

E4M3_MAX = 448.0
TINY = torch.finfo(torch.float32).tiny
LARGEST: dict[Format, float] = dict.fromkeys(("int8", "int8_grid"), torch.finfo(torch.float32).max)
LARGEST["fp8"] = torch.finfo(torch.float32).max / E4M3_MAX
"""The largest scale: that of the largest number."""
GRID_HALF = (2**16 - 1) / 2
"""Half the number of steps of the even grid, by which `"int8_grid"` rounds to -1 ... 1."""
PIECE = 2**17
"""Elements worked on at a time, so that temporaries stay in a CPU's cache."""


@functools.cache
def values(form: Format, nonnegative: bool) -> Tensor:
    """The 256 values of a table, in the order of their codes.

    Args:
        form: `"int8"` is the dynamic map (Dettmers et al. 2022, arXiv:2110.02861), in ascending order, at most 1;
            also of `"int8_grid"`; `"fp8"` is e4m3 (Micikevicius et al. 2022, arXiv:2209.05433), in the order of its
            bit patterns, at most 448.
        nonnegative: the dynamic map without negative values; e4m3 is the same for both.

    Returns:
        float32; NaN for the two patterns of e4m3 that are.
    """
    if form == "fp8":
        return torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    table = [0.0, 1.0]
    for i in range(7):
        ends = torch.linspace(0.1, 1, 2 ** (i + nonnegative) + 1, dtype=torch.float32)
        decade = (ends[:-1] + ends[1:]) / 2 * 10.0 ** (i - 6)
        table += decade.tolist() if nonnegative else [*decade.tolist(), *(-decade).tolist()]
    return torch.tensor(sorted(table), dtype=torch.float32)


@functools.cache
def _tables(form: Format, nonnegative: bool, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Values, and what finds the nearest one in two look-ups.

    A float's upper 16 bits say in which of 65536 intervals it lies. No interval holds two of the midpoints between
    values, so the lower of two candidates is a table entry and one comparison with the midpoint decides.

    Returns:
        (values by code, lower candidate by interval, midpoint above each code).
    """
    table = values(form, nonnegative)
    middle = (table[1:] + table[:-1]) / 2
    if nonnegative:
        middle[0] = 0.0
    top = torch.arange(-(2**15), 2**15, dtype=torch.int32) << 16
    least = torch.where(top < 0, top | 0xFFFF, top).view(torch.float32)  # of each interval
    least[top.view(torch.float32) == -torch.inf] = -torch.inf  # the only number of its interval
    lower = torch.searchsorted(middle, least.nan_to_num(0.0, 2.0, -2.0)).to(torch.uint8)
    above = torch.cat([middle, torch.tensor([torch.inf])])
    return table.to(device), lower.to(device), above.to(device)


@functools.cache
def _grid(nonnegative: bool, device: torch.device) -> Tensor:
    """The code of every point of the even grid."""
    table = values("int8", nonnegative)
    points = torch.arange(2**16, dtype=torch.float64).div_(GRID_HALF).sub_(1).float()
    return torch.searchsorted((table[1:] + table[:-1]) / 2, points).to(torch.uint8).to(device)


def table(form: Format, nonnegative: bool, device: torch.device) -> Tensor:
    """The values of a table on a device.

    Args:
        form: of the codes.
        nonnegative: as for `values`.
        device: where they are wanted.

    Returns:
        float32, by code.
    """
    return _tables(form, nonnegative, device)[0]


def looked_up(codes: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    """The values behind whole blocks of codes: `decode` for a graph, bit for bit.

    Args:
        codes: `[blocks, block]`.
        scale: `[blocks, 1]`.
        values: the table.

    Returns:
        float32, `[blocks, block]`.
    """
    return torch.ops.aten._unsafe_index(values, [codes.int() & 255]) * scale


def computed(x: Tensor, form: Format, *, nonnegative: bool) -> tuple[Tensor, Tensor]:
    """The codes and scales of whole blocks: `encode` for a graph, where arithmetic is faster than look-ups.

    Where a quotient is all but halfway between two values, the code may be the other one's.

    Args:
        x: float32, `[blocks, block]`.
        form: of the codes.
        nonnegative: whether no value is below zero.

    Returns:
        (codes `[blocks, block]`, scales `[blocks, 1]`).
    """
    scale = (x if nonnegative else x.abs()).amax(1, keepdim=True)
    scale = (scale / E4M3_MAX if form == "fp8" else scale).clamp(min=TINY, max=LARGEST[form])
    end = E4M3_MAX if form == "fp8" else 1.0
    quotients = (x / scale).clamp(-end, end)
    if form == "fp8":
        return _patterns(quotients, nonnegative), scale
    if form == "int8_grid":
        quotients = ((quotients * GRID_HALF + GRID_HALF).round() - GRID_HALF) / GRID_HALF
    return _counted(quotients, nonnegative), scale


def _counted(x: Tensor, nonnegative: bool) -> Tensor:
    """The code of the nearest value of the dynamic map: how many midpoints between values lie below.

    With n values in a decade that ends at e, the midpoints between them are e (0.1 + 0.9 j / n): in the decade the
    line n (8/9 + x / 0.9 e) counts them, and the lines of all decades meet at powers of two. Only the midpoint between
    two decades lies above the end of the first, where the line is 0.2 above a power of two.

    Args:
        x: quotients.
        nonnegative: as for `values`.

    Returns:
        uint8.
    """
    counts = [2.0 ** (i + nonnegative) for i in range(7)]
    slopes = [n * 10.0 ** (6 - i) / 0.9 for i, n in enumerate(counts)]
    if not nonnegative:
        slopes[0] = 0.8 / (1e-6 - 2.75e-7)  # the midpoint between zero and the only value of the first decade
    size = x if nonnegative else x.abs()
    line = _bent(size, slopes, [10.0 ** (i - 7) for i in range(1, 7)], counts[-1] * 8 / 9)
    below, lower = line.int(), (line - 0.2).int()
    below = torch.where((below & lower) == 0, lower, below)  # a power of two and the number before share no bit
    top = int(2 * counts[-1])
    below = torch.where(line >= top - 0.25, top, below)
    if nonnegative:
        return torch.where(x > 0, (below - 1).clamp(min=1), 0).to(torch.uint8)
    return (torch.where(x < 0, -below, below) + 127).clamp(min=0).to(torch.uint8)


def _patterns(x: Tensor, nonnegative: bool) -> Tensor:
    """The bit pattern of the nearest e4m3 number.

    Patterns count the numbers above zero: 8 (e + 7) + 8 (x / 2^e - 1) from 2^e on, and 2^9 x below 2^-6.

    Args:
        x: quotients.
        nonnegative: as for `values`.

    Returns:
        int8.
    """
    size = x if nonnegative else x.abs()
    line = _bent(size, [2.0 ** (3 - e) for e in range(-6, 9)], [2.0**e for e in range(-5, 9)], 112.0)
    patterns = line.round().int()  # halves to even, as the format does
    if nonnegative:
        return torch.maximum(patterns, (x > 0).int()).to(torch.int8)
    return torch.where(x < 0, patterns - 128, patterns).to(torch.int8)


def _bent(x: Tensor, slopes: Sequence[float], ends: Sequence[float], offset: float) -> Tensor:
    """A line that bends down at `ends`, and continues from the last of them as `slopes[-1] x + offset`."""
    line = x * slopes[-1] + offset
    for end, steep, flat in zip(ends, slopes, slopes[1:], strict=False):
        line = line - (end - x).relu() * (steep - flat)
    return line


def blocks_of(count: int, block: int, start: int = 0) -> int:
    """How many blocks a run of elements touches.

    Args:
        count: of elements.
        block: elements per block.
        start: index of the first element; blocks begin at multiples of `block`.

    Returns:
        The number of blocks, the first and last of which may be partial.
    """
    return -(-(start % block + count) // block) if count else 0


def encode(x: Tensor, codes: Tensor, scale: Tensor, form: Format, *, nonnegative: bool, block: int, start: int = 0):
    """Write the codes and scales of a run of elements.

    Args:
        x: float32 values, flat.
        codes: 8-bit integers, flat; written.
        scale: float32, one per block that the run touches; written.
        form: of the codes.
        nonnegative: whether no value is below zero.
        block: elements per block, a divisor of `PIECE`.
        start: index of the first element; blocks begin at multiples of `block`.
    """
    for at, first in _pieces(x, block, start):
        _encode(x[at], codes[at], scale[first], form, nonnegative, block, (start + at.start) % block)


def _encode(x: Tensor, codes: Tensor, scale: Tensor, form: Format, nonnegative: bool, block: int, lead: int) -> None:
    count = x.numel()
    tail = scale.numel() * block - lead - count
    rows = (pad(x, (lead, tail)) if lead or tail else x).view(-1, block)
    torch.amax(rows if nonnegative else rows.abs(), dim=1, out=scale)
    if form == "fp8":
        scale.div_(E4M3_MAX)
    scale.clamp_(min=TINY, max=LARGEST[form])  # an infinite one would make zeros NaN
    quotients = (rows / scale.unsqueeze(1)).view(-1)
    if form == "fp8":
        encoded = quotients.clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8)
        if nonnegative:
            encoded = torch.maximum(encoded, (quotients > 0).view(torch.uint8))
    elif form == "int8_grid":
        point = quotients.mul_(GRID_HALF).add_(GRID_HALF).round_().nan_to_num_(0.0).clamp_(0, 2**16 - 1).int()
        encoded = _grid(nonnegative, x.device).index_select(0, point)
    else:
        _, lower, above = _tables(form, nonnegative, x.device)
        interval = (quotients.view(torch.int32) >> 16).add_(2**15)
        encoded = lower.index_select(0, interval)
        encoded += quotients > above.index_select(0, encoded.int())
    codes.copy_(encoded[lead : lead + count].view(codes.dtype))


def decode(codes: Tensor, scale: Tensor, form: Format, *, nonnegative: bool, block: int, start: int = 0) -> Tensor:
    """The values behind codes.

    Args:
        codes: as `encode` wrote them.
        scale: likewise.
        form: of the codes.
        nonnegative: as for `encode`.
        block: elements per block.
        start: index of the first element.

    Returns:
        float32, flat.
    """
    out = torch.empty(codes.shape, dtype=torch.float32, device=codes.device)
    for at, first in _pieces(codes, block, start):
        _decode(codes[at], scale[first], out[at], form, nonnegative, block, (start + at.start) % block)
    return out


def _decode(codes: Tensor, scale: Tensor, out: Tensor, form: Format, nonnegative: bool, block: int, lead: int) -> None:
    torch.index_select(table(form, nonnegative, codes.device), 0, codes.view(torch.uint8).int(), out=out)
    if not lead and out.numel() == scale.numel() * block:
        out.view(-1, block).mul_(scale.unsqueeze(1))
    else:
        out.mul_(scale.repeat_interleave(block)[lead : lead + out.numel()])


def _pieces(x: Tensor, block: int, start: int) -> list[tuple[slice, slice]]:
    """Runs of whole blocks, and where their scales are."""
    lead, count = start % block, x.numel()
    size = PIECE if x.device.type == "cpu" else max(PIECE, count + lead)
    size -= size % block
    ends = [0, *range(size - lead, count, size), count] if count else [0]
    cuts = [slice(a, b) for a, b in zip(ends, ends[1:], strict=False) if b > a]
    return [(c, slice((lead + c.start) // block, -(-(lead + c.stop) // block))) for c in cuts]
