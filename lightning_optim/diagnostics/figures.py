"""Heat maps and curves with titles, axes and scales as plain images: no plotting library, about 10 ms each."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
"""`[height, width, 3]`."""

ANCHORS = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))
"""Of the color scale, evenly spaced from low to high: darker is less, also in print."""
INK, PAPER, MISSING, RULE = (30, 30, 30), (255, 255, 255), (215, 215, 215), (225, 225, 225)
LINES = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75),
    (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207), (0, 0, 0), (120, 60, 0),
)  # fmt: skip


def colors() -> Picture:
    """The color scale.

    Returns:
        `[256, 3]`.
    """
    at = np.linspace(0, len(ANCHORS) - 1, 256)
    table = np.array(ANCHORS, dtype=float)
    return np.stack([np.interp(at, np.arange(len(ANCHORS)), table[:, c]) for c in range(3)], 1).astype(np.uint8)


SIZE, TITLE = 13, 15
"""Of the letters, in pixels."""


def _font(size: int = SIZE) -> Any:
    try:
        return ImageFont.load_default(size)
    except (ImportError, OSError):  # a Pillow without FreeType has one size
        return ImageFont.load_default()


def number(x: float) -> str:
    """A number for a table or a scale.

    Returns:
        At most three digits, whole numbers in full.
    """
    return "0" if x == 0 else f"{x:,.0f}" if 1e3 <= abs(x) < 1e7 else f"{x:.3g}"


def short(names: Sequence[str]) -> list[str]:
    """Names of parameters without what all of them begin with, and without ".weight".

    Returns:
        As many names, different where they were.
    """
    begin = os.path.commonprefix(list(names)).rpartition(".")[0] if len(names) > 1 else ""
    if any(name.removeprefix(begin + ".")[:1].isdigit() for name in names):
        begin = begin.rpartition(".")[0]  # the number of a layer says nothing without "layers"
    cut = [name.removeprefix(begin + ".") for name in names]
    bare = [name.removesuffix(".weight") for name in cut]
    return bare if len(set(bare)) == len(set(cut)) else cut


@dataclass(frozen=True)
class _Axis:
    """A scale from `low` to `high`; the signed one is linear up to `linear` and logarithmic beyond, on both sides."""

    low: float
    high: float
    kind: Literal["linear", "log", "signed"] = "linear"
    linear: float = 1.0

    def bend(self, v: Any) -> Any:
        if self.kind == "linear":
            return v
        return np.log10(np.maximum(v, self.low)) if self.kind == "log" else np.arcsinh(np.asarray(v) / self.linear)

    def place(self, v: Any) -> Any:
        """Where a value lies, from 0 to 1."""
        low, high = self.bend(self.low), self.bend(self.high)
        return np.clip((self.bend(v) - low) / ((high - low) or 1.0), 0, 1)

    def ticks(self, count: int = 6) -> list[float]:
        """Round numbers on the axis."""
        if self.kind == "linear":
            return _round(self.low, self.high, count)
        least, most = (self.low, self.high) if self.kind == "log" else (self.linear, max(-self.low, self.high))
        if self.kind == "log" and most < 100 * least:
            fine = [d * 10.0**k for k in _decades(least / 10, most) for d in (1, 2, 5)]
            return [x for x in fine if least <= x <= most * (1 + 1e-9)]
        powers = _decades(least, most)
        both = 2 if self.kind == "signed" and self.low < 0 < self.high else 1
        marks = [10.0**k for k in powers[:: -max(1, math.ceil(len(powers) * both / count))]][::-1]
        if self.kind == "log":
            return marks
        marks = [x for x in marks if x > 3 * self.linear]  # nearer to zero there is no room
        return [-x for x in reversed(marks) if -x >= self.low] + [0.0] + [x for x in marks if x <= self.high]


def _decades(low: float, high: float) -> list[int]:
    return list(range(math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9) + 1))


def _round(low: float, high: float, count: int) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten."""
    size = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * size for m in (1, 2, 5, 10) if (high - low) / (m * size) <= count)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def _axis(values: NDArray[np.float64], kind: Literal["linear", "log"] | None, floor: float) -> _Axis:
    """The scale for some values; without a kind it is logarithmic where they span more than a decade."""
    if not values.size:
        return _Axis(0.0, 1.0)
    low, high = float(values.min()), float(values.max())
    if kind is None:
        sizes = np.abs(values[values != 0])
        wide = sizes.size > 0 and sizes.max() > 10 * sizes.min()
        if wide and low < 0:
            linear = max(float(sizes.min()), floor * float(sizes.max()))
            return _Axis(min(low, 0.0), max(high, 0.0), "signed", linear)
        kind = "log" if wide and low > 0 else "linear"
    if kind == "log" and high > 0:
        low = max(low, high * floor)
        return _Axis(low / 1.1, high * 1.1, "log")
    low, high = min(low, 0.0), max(high, 0.0)
    return _Axis(low, high) if high > low else _Axis(low - 0.5, high + 0.5)


class _Canvas:
    """A sheet of paper with left, top, right and bottom margins around a frame."""

    def __init__(self, width: int, height: int, left: int, right: int, title: str, top: int = 34) -> None:
        self.font = _font()
        self.left, self.top, self.width, self.height = left, top, width, height
        wide = max(left + width + right, int(_font(TITLE).getlength(title)) + 20)
        self.image = Image.new("RGB", (wide, self.top + height + 50), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.draw.text((8, 8), title, INK, _font(TITLE))

    def text(self, x: float, y: float, text: str, anchor: str, fill: tuple[int, int, int] = INK) -> None:
        self.draw.text((x, y), text, fill, self.font, anchor=anchor)

    def ticks(self, labels: Sequence[tuple[float, str]], name: str) -> None:
        """Labels below the frame, as many as have room."""
        y, last = self.top + self.height, -1e9
        for x, label in labels:
            half = self.font.getlength(label) / 2
            if self.left + x - half > last + 8:
                self.draw.line([(self.left + x, y), (self.left + x, y + 3)], INK)
                self.text(self.left + x, y + 5, label, "ma")
                last = self.left + x + half
        self.text(self.left + self.width / 2, y + 27, name, "ma")

    def done(self) -> Picture:
        return np.asarray(self.image)


def by_line(names: Sequence[str], values: Sequence[float]) -> tuple[list[str], list[str], Any]:
    """Numbers of blocks called `matrix[3]` as a table with a line per matrix.

    Args:
        names: of the blocks.
        values: one for each.

    Returns:
        (labels of the lines, labels of the columns, `[lines, columns]`, NaN where there is no block).
    """
    found = [re.fullmatch(r"(.*)\[(\d+)\]", name) for name in names]
    places = [(m[1], int(m[2])) if m else (name, 0) for m, name in zip(found, names, strict=True)]
    lines, columns = list(dict.fromkeys(line for line, _ in places)), sorted({column for _, column in places})
    table = np.full((len(lines), len(columns)), np.nan)
    for (line, column), value in zip(places, values, strict=True):
        table[lines.index(line), columns.index(column)] = value
    return lines, [str(column) for column in columns], table


def heat_map(
    values: Any,
    title: str,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    across: str,
    unit: str,
    bounds: tuple[float, float] | None = None,
    lines: Sequence[int] = (),
    categories: Sequence[str] = (),
    missing: tuple[int, int, int] = MISSING,
) -> Picture:
    """A matrix of numbers as colors, with its scale.

    Args:
        values: `[rows, columns]`; NaN has the color `missing`.
        title: of the picture.
        rows: a label per row.
        columns: a label per column.
        across: what the columns are.
        unit: of the values, at the color scale; of values in log10 its ticks are whole powers of ten.
        bounds: of the scale; the smallest and the largest value if not given.
        lines: rows and columns before which a line is drawn.
        categories: names of the values 0, 1, ..., which then have colors of their own and a legend for the scale.
        missing: red, green and blue from 0 to 255; gray if not given, with an entry at the scale.

    Returns:
        The picture.
    """
    table = np.asarray(values, dtype=float)
    table = table.reshape(len(rows), len(columns))
    finite = table[np.isfinite(table)]
    low, high = bounds or ((float(finite.min()), float(finite.max())) if finite.size else (0.0, 1.0))
    low, high = (low, high) if high > low else (low - 0.5, high + 0.5)
    span = high - low
    index = np.clip(np.nan_to_num((table - low) / span) * 255, 0, 255).astype(int)
    pixels = colors()[index]
    if categories:
        pixels = np.array(LINES, dtype=np.uint8)[np.nan_to_num(table).astype(int)]
    pixels[~np.isfinite(table)] = missing
    cell_y = max(1, min(26, max(15 if len(rows) <= 48 else 1, 320 // len(rows))))
    font = _font()
    room = max(60, 8 + int(max(font.getlength(c) for c in columns)))
    cell_x = room if len(columns) <= 12 else max(1, min(room, 560 // len(columns)))
    left = 14 + int(max(font.getlength(r) for r in rows))
    right = 70 + int(max(map(font.getlength, (unit, *categories))))
    canvas = _Canvas(cell_x * len(columns), max(cell_y * len(rows), 17 * len(categories)), left, right, title)
    body = Image.fromarray(np.repeat(np.repeat(pixels, cell_y, 0), cell_x, 1))
    canvas.image.paste(body, (left, canvas.top))
    for at in lines:
        x, y = left + at * cell_x, canvas.top + at * cell_y
        canvas.draw.line([(x, canvas.top), (x, canvas.top + canvas.height)], PAPER)
        canvas.draw.line([(left, y), (left + canvas.width, y)], PAPER)
    every = max(1, math.ceil(15 / cell_y))
    for i, label in enumerate(rows):
        if i % every == 0:
            canvas.text(left - 6, canvas.top + (i + 0.5) * cell_y, label, "rm")
    canvas.ticks([((i + 0.5) * cell_x, c) for i, c in enumerate(columns)], across)
    for i, category in enumerate(categories):
        _draw_legend_entry(canvas, left + canvas.width + 10, i, category, LINES[i])
    if not categories:
        with_missing = missing == MISSING and not np.isfinite(table).all()
        _draw_color_scale(canvas, left + canvas.width + 16, low, span, unit, with_missing=with_missing)
    return canvas.done()


def _draw_color_scale(canvas: _Canvas, x: float, low: float, span: float, unit: str, *, with_missing: bool) -> None:
    x, bottom = int(x), canvas.top + canvas.height
    scale = Image.fromarray(np.repeat(colors()[::-1][:, None], 14, 1)).resize((14, canvas.height))
    canvas.image.paste(scale, (x, canvas.top))
    for value, label in _scale_ticks(low, low + span, unit, 5 if canvas.height >= 100 else 2):
        y = canvas.top + (1 - (value - low) / span) * (canvas.height - 1)
        canvas.text(x + 18, y, label, "lm")
    unit = unit.removeprefix("log10 of ")
    canvas.text(x, bottom + 8, unit, "la")
    if with_missing:
        canvas.draw.rectangle([(x, bottom + 30), (x + 13, bottom + 43)], MISSING)
        canvas.text(x + 18, bottom + 29, "none", "la")


def _scale_ticks(low: float, high: float, unit: str, count: int) -> list[tuple[float, str]]:
    """Values on a color scale and their labels; of log10, the powers of ten, or their multiples by 2 and 5."""
    if not unit.startswith("log10"):
        return [(float(v), number(float(v))) for v in np.linspace(low, high, count)]
    powers = [float(k) for k in range(math.ceil(low), math.floor(high) + 1)]
    if len(powers) < 2:
        fine = [k + math.log10(d) for k in range(math.floor(low), math.ceil(high) + 1) for d in (1, 2, 5)]
        powers = [v for v in fine if low <= v <= high] or [low, high]
    return [(v, number(10.0**v)) for v in powers[:: max(1, math.ceil(len(powers) / (count + 2)))]]


def curves(
    x: Any,
    lines: Mapping[str, Any],
    title: str,
    *,
    across: str,
    up: str,
    scale: Literal["linear", "log"] | None = "linear",
    floor: float = 1e-6,
    joined: bool = True,
) -> Picture:
    """Lines over one axis, with a legend; dots, too, where there are few points.

    Args:
        x: `[points]`.
        lines: label to `[points]`; NaN is left out.
        title: of the picture.
        across: name and unit of the horizontal axis.
        up: of the vertical one.
        scale: of the vertical axis; None is logarithmic where values span more than a decade, on both sides of zero
            where there are both.
        floor: smallest value of a logarithmic axis, as a share of the largest.
        joined: whether points are joined by lines; otherwise there are dots only.

    Returns:
        The picture.
    """
    xs = np.asarray(x, dtype=float)
    ys = {k: np.asarray(v, dtype=float) for k, v in lines.items()}
    whole = np.concatenate([v[np.isfinite(v)] for v in ys.values()]) if ys else np.zeros(0)
    axis = _axis(whole, scale, floor)
    bend = {"linear": "", "log": ", logarithmic", "signed": ", logarithmic on both sides of 0"}[axis.kind]

    font = _font()
    marks = [(m, number(m)) for m in axis.ticks()]
    left = 16 + int(max((font.getlength(text) for _, text in marks), default=0))
    right = 46 + int(max((font.getlength(k) for k in ys), default=0))
    canvas = _Canvas(480, max(240, 17 * len(ys) + 8), left, right, title, 54)
    for m, text in marks:
        y = canvas.top + (1 - float(axis.place(m))) * canvas.height
        canvas.draw.line([(left, y), (left + canvas.width, y)], RULE)
        canvas.text(left - 6, y, text, "rm")
    canvas.draw.rectangle([(left, canvas.top), (left + canvas.width, canvas.top + canvas.height)], outline=INK)
    start, end = _limits(xs)
    for i, (label, line) in enumerate(ys.items()):
        color = LINES[i % len(LINES)]
        points = [
            (left + (a - start) / (end - start) * canvas.width, canvas.top + (1 - b) * canvas.height)
            for a, b in zip(xs, axis.place(line), strict=True)
            if math.isfinite(b)
        ]
        if joined:
            canvas.draw.line(points, color, 2)
        for a, b in points if len(xs) <= 30 or not joined else ():
            canvas.draw.ellipse([(a - 3, b - 3), (a + 3, b + 3)], color)
        _draw_legend_entry(canvas, left + canvas.width + 10, i, label, color)
    below = sorted({float(v) for v in xs}) if len(xs) == 1 else _round(start, end, 6)
    canvas.ticks([((v - start) / (end - start) * canvas.width, number(v)) for v in below], across)
    canvas.text(left, canvas.top - 5, up + bend, "lb")
    return canvas.done()


def _limits(x: np.ndarray) -> tuple[float, float]:
    """Ends of an axis; of a single point, half a unit on both sides."""
    start, end = (float(x.min()), float(x.max())) if x.size else (0.0, 1.0)
    return (start, end) if start < end else (start - 0.5, end + 0.5)


def _draw_legend_entry(canvas: _Canvas, x: float, i: int, label: str, color: Any) -> None:
    y = canvas.top + 10 + 17 * i
    canvas.draw.line([(x, y), (x + 18, y)], color, 3)
    canvas.text(x + 23, y, label, "lm")
