"""Heat maps and curves with titles, axes and scales as plain images: no plotting library, about 10 ms each."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

Picture = NDArray[np.uint8]
"""`[height, width, 3]`."""

ANCHORS = ((68, 1, 84), (65, 68, 135), (42, 120, 142), (34, 168, 132), (122, 209, 81), (253, 231, 37))
"""Of the colour scale, evenly spaced from low to high: darker is less, also in print."""
INK, PAPER, MISSING, RULE = (30, 30, 30), (255, 255, 255), (215, 215, 215), (225, 225, 225)
LINES = (
    (31, 119, 180), (255, 127, 14), (44, 160, 44), (214, 39, 40), (148, 103, 189), (140, 86, 75),
    (227, 119, 194), (127, 127, 127), (188, 189, 34), (23, 190, 207), (0, 0, 0), (120, 60, 0),
)  # fmt: skip


def colours() -> Picture:
    """The colour scale.

    Returns:
        `[256, 3]`.
    """
    at = np.linspace(0, len(ANCHORS) - 1, 256)
    table = np.array(ANCHORS, dtype=float)
    return np.stack([np.interp(at, np.arange(len(ANCHORS)), table[:, c]) for c in range(3)], 1).astype(np.uint8)


def _font(size: int = 12) -> Any:
    try:
        return ImageFont.load_default(size)
    except (ImportError, OSError):  # a Pillow without FreeType has one size
        return ImageFont.load_default()


def number(x: float) -> str:
    """A number for an axis.

    Returns:
        At most three digits.
    """
    return "0" if x == 0 else f"{x:.3g}"


class _Canvas:
    """A sheet of paper with left, top, right and bottom margins around a frame."""

    def __init__(self, width: int, height: int, left: int, right: int, title: str, top: int = 30) -> None:
        self.font = _font()
        self.left, self.top, self.width, self.height = left, top, width, height
        wide = max(left + width + right, int(self.font.getlength(title)) + 20)
        self.image = Image.new("RGB", (wide, self.top + height + 44), PAPER)
        self.draw = ImageDraw.Draw(self.image)
        self.draw.text((8, 8), title, INK, _font(13))

    def text(self, x: float, y: float, text: str, anchor: str, fill: tuple[int, int, int] = INK) -> None:
        self.draw.text((x, y), text, fill, self.font, anchor=anchor)

    def ticks(self, labels: Sequence[tuple[float, str]], name: str) -> None:
        """Labels below the frame, as many as have room."""
        y, last = self.top + self.height, -1e9
        for x, label in labels:
            half = self.font.getlength(label) / 2
            if self.left + x - half > last + 6:
                self.draw.line([(self.left + x, y), (self.left + x, y + 3)], INK)
                self.text(self.left + x, y + 5, label, "ma")
                last = self.left + x + half
        self.text(self.left + self.width / 2, y + 24, name, "ma")

    def done(self) -> Picture:
        return np.asarray(self.image)


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
) -> Picture:
    """A matrix of numbers as colours, with its scale.

    Args:
        values: `[rows, columns]`; NaN is grey.
        title: of the picture.
        rows: a label per row.
        columns: a label per column.
        across: what the columns are.
        unit: of the values, at the colour scale.
        bounds: of the scale; the smallest and the largest value if not given.
        lines: rows and columns before which a line is drawn.

    Returns:
        The picture.
    """
    table = np.asarray(values, dtype=float)
    table = table.reshape(len(rows), len(columns))
    seen = table[np.isfinite(table)]
    low, high = bounds or ((float(seen.min()), float(seen.max())) if seen.size else (0.0, 1.0))
    span = high - low or 1.0
    index = np.clip(np.nan_to_num((table - low) / span) * 255, 0, 255).astype(int)
    pixels = colours()[index]
    pixels[~np.isfinite(table)] = MISSING
    cell_y = max(1, min(26, max(12 if len(rows) <= 48 else 1, 260 // len(rows))))
    font = _font()
    room = max(60, 8 + int(max(font.getlength(c) for c in columns)))
    cell_x = max(1, min(room, 560 // len(columns)))
    left = 14 + int(max(font.getlength(r) for r in rows))
    canvas = _Canvas(cell_x * len(columns), cell_y * len(rows), left, 60 + int(font.getlength(unit)), title)
    body = Image.fromarray(np.repeat(np.repeat(pixels, cell_y, 0), cell_x, 1))
    canvas.image.paste(body, (left, canvas.top))
    for at in lines:
        x, y = left + at * cell_x, canvas.top + at * cell_y
        canvas.draw.line([(x, canvas.top), (x, canvas.top + canvas.height)], PAPER)
        canvas.draw.line([(left, y), (left + canvas.width, y)], PAPER)
    every = max(1, math.ceil(14 / cell_y))
    for i, label in enumerate(rows):
        if i % every == 0:
            canvas.text(left - 6, canvas.top + (i + 0.5) * cell_y, label, "rm")
    canvas.ticks([((i + 0.5) * cell_x, c) for i, c in enumerate(columns)], across)
    x, bar = left + canvas.width + 16, max(60, canvas.height)
    scale = Image.fromarray(np.repeat(colours()[::-1][:, None], 14, 1)).resize((14, canvas.height))
    canvas.image.paste(scale, (x, canvas.top))
    for share in (0.0, 0.5, 1.0) if bar >= 40 else (0.0, 1.0):
        y = canvas.top + (1 - share) * (canvas.height - 1)
        canvas.text(x + 18, y, number(low + share * span), "lm")
    canvas.text(x, canvas.top + canvas.height + 5, unit, "la")
    return canvas.done()


def curves(
    x: Any, lines: Mapping[str, Any], title: str, *, across: str, up: str, log: bool = False, floor: float = 1e-6
) -> Picture:
    """Lines over one axis, with a legend.

    Args:
        x: `[points]`.
        lines: label to `[points]`.
        title: of the picture.
        across: name and unit of the horizontal axis.
        up: of the vertical one.
        log: whether the vertical axis is logarithmic.
        floor: smallest value of a logarithmic axis, as a share of the largest.

    Returns:
        The picture.
    """
    xs = np.asarray(x, dtype=float)
    ys = {k: np.asarray(v, dtype=float) for k, v in lines.items()}
    whole = np.concatenate([v[np.isfinite(v)] for v in ys.values()]) if ys else np.zeros(1)
    high = float(whole.max()) if whole.size else 1.0
    low = high * floor if log else float(min(whole.min(), 0.0)) if whole.size else 0.0
    if not high > low:
        low, high = low - 0.5, high + 0.5

    def place(v: Any) -> Any:
        share = np.log(np.maximum(v, low) / low) / math.log(high / low) if log else (v - low) / (high - low)
        return np.clip(share, 0, 1)

    font = _font()
    left, right = 70, 40 + int(max((font.getlength(k) for k in ys), default=0))
    canvas = _Canvas(480, 240, left, right, title, 46)
    box = [(left, canvas.top), (left + canvas.width, canvas.top + canvas.height)]
    marks = np.geomspace(low, high, 5) if log else np.linspace(low, high, 5)
    for value in marks:
        y = canvas.top + (1 - float(place(value))) * canvas.height
        canvas.draw.line([(left, y), (left + canvas.width, y)], RULE)
        canvas.text(left - 6, y, number(float(value)), "rm")
    canvas.draw.rectangle(box, outline=INK)
    start, end = float(xs.min()), float(xs.max())
    span = end - start or 1.0
    for i, (label, line) in enumerate(ys.items()):
        colour = LINES[i % len(LINES)]
        points = [
            (left + (a - start) / span * canvas.width, canvas.top + (1 - b) * canvas.height)
            for a, b in zip(xs, place(line), strict=True)
            if math.isfinite(b)
        ]
        canvas.draw.line(points, colour, 2)
        y = canvas.top + 8 + 15 * i
        canvas.draw.line([(left + canvas.width + 10, y), (left + canvas.width + 26, y)], colour, 3)
        canvas.text(left + canvas.width + 30, y, label, "lm")
    canvas.ticks([(canvas.width * k / 4, number(start + span * k / 4)) for k in range(5)], across)
    canvas.text(left, canvas.top - 4, up, "lb")
    return canvas.done()
