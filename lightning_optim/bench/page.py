"""A report as blocks, written as Markdown and as one HTML page that needs nothing else."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

COLORS = (
    "#000000", "#d62728", "#1f77b4", "#2ca02c", "#ff7f0e", "#9467bd",
    "#8c564b", "#e377c2", "#17becf", "#bcbd22", "#7f7f7f", "#003f5c",
)  # fmt: skip
"""Of lines; the first is AdamW's."""
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 1080px; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; margin: 1em 0; font-size: 13px; display: block; overflow-x: auto }
th, td { border: 1px solid #ccc; padding: 3px 8px; text-align: left; vertical-align: top }
th { background: #f2f2f2 } svg { display: block; margin: 1em 0; max-width: 100%; height: auto }
"""

Cell = str | float | int | None
Points = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the page's."""

    text: str
    level: int = 2


@dataclass(frozen=True)
class Text:
    """A paragraph, or `not measured`."""

    text: str


@dataclass(frozen=True)
class Table:
    """Rows of cells; an empty table says `not measured`."""

    head: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Chart:
    """Lines, or points with names, over two axes; only the HTML page shows it."""

    title: str
    x: str
    y: str
    lines: Mapping[str, Points]
    log_x: bool = False
    points: bool = False


Block = Heading | Text | Table | Chart
NOTHING = "not measured"


def cell(value: Cell) -> str:
    """What a table shows.

    Args:
        value: numbers are rounded to four digits; None and nan become a dash.

    Returns:
        Text.
    """
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def markdown(blocks: Sequence[Block]) -> str:
    """Write blocks as Markdown, without the charts.

    Args:
        blocks: of the report.

    Returns:
        Text that ends with a newline.
    """
    out = []
    for block in blocks:
        if isinstance(block, Heading):
            out.append(f"{'#' * block.level} {block.text}")
        elif isinstance(block, Text):
            out.append(block.text)
        elif isinstance(block, Table) and block.rows:
            rows = [[cell(x).replace("|", "\\|") for x in row] for row in block.rows]
            lines = [list(block.head), ["---"] * len(block.head), *rows]
            out.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
        elif isinstance(block, Table):
            out.append(NOTHING)
    return "\n\n".join(out) + "\n"


def page(blocks: Sequence[Block]) -> str:
    """Write blocks as one HTML page.

    Args:
        blocks: of the report.

    Returns:
        The page; styles and pictures are in it.
    """
    title = next((b.text for b in blocks if isinstance(b, Heading)), "Report")
    body = "\n".join(_html(block) for block in blocks)
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f"<!doctype html>\n<html lang=en><head>{head}</head><body>\n{body}\n</body></html>\n"


def _html(block: Block) -> str:
    if isinstance(block, Heading):
        return f"<h{block.level}>{html.escape(block.text)}</h{block.level}>"
    if isinstance(block, Text):
        return f"<p>{html.escape(block.text)}</p>"
    if isinstance(block, Chart):
        return svg(block)
    if not block.rows:
        return f"<p>{NOTHING}</p>"
    head = "".join(f"<th>{html.escape(x)}</th>" for x in block.head)
    rows = "\n".join(f"<tr>{''.join(f'<td>{html.escape(cell(x))}</td>' for x in row)}</tr>" for row in block.rows)
    return f"<table><tr>{head}</tr>\n{rows}</table>"


def ticks(low: float, high: float, log: bool) -> list[float]:
    """Where an axis has numbers.

    Args:
        low: end.
        high: other end.
        log: whether the axis is logarithmic.

    Returns:
        About five values inside: 1, 2 or 5 times powers of ten.
    """
    if log:
        powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        values = [m * 10.0**k for k in powers for m in (1, 2, 5)]
    else:
        raw = (high - low) / 5
        power = 10.0 ** math.floor(math.log10(raw))
        size = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
        values = [k * size for k in range(math.ceil(low / size), math.floor(high / size) + 1)]
    return [x for x in values if low <= x <= high]


def svg(chart: Chart) -> str:
    """Draw a chart.

    Args:
        chart: with at least one point.

    Returns:
        An `svg` element, or a paragraph that says `not measured`.
    """
    every = [point for points in chart.lines.values() for point in points]
    if not every:
        return f"<p>{html.escape(chart.title)}: {NOTHING}</p>"
    width, height, left, top, right, bottom = 760, 380, 70, 34, 170, 50
    (x0, x1), (y0, y1) = (_range([p[i] for p in every], log=chart.log_x and i == 0) for i in (0, 1))

    def across(x: float) -> float:
        a, b, c = (math.log(v) for v in (x, x0, x1)) if chart.log_x else (x, x0, x1)
        return left + (a - b) / (c - b) * (width - left - right)

    def down(y: float) -> float:
        return height - bottom - (y - y0) / (y1 - y0) * (height - top - bottom)

    out = [f'<svg viewBox="0 0 {width} {height}" width="{width}" role="img" font-family="sans-serif" font-size="11">']
    out.append(f'<text x="{left}" y="18" font-size="14">{html.escape(chart.title)}</text>')
    for x in ticks(x0, x1, chart.log_x):
        out.append(f'<path d="M{across(x):.1f} {top}V{height - bottom}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{across(x):.1f}" y="{height - bottom + 16}" text-anchor="middle">{x:g}</text>')
    for y in ticks(y0, y1, False):
        out.append(f'<path d="M{left} {down(y):.1f}H{width - right}" stroke="#e4e4e4"/>')
        out.append(f'<text x="{left - 6}" y="{down(y) + 4:.1f}" text-anchor="end">{y:g}</text>')
    out.append(f'<text x="{(left + width - right) / 2}" y="{height - 12}" text-anchor="middle">{chart.x}</text>')
    middle = (top + height - bottom) / 2
    out.append(f'<text x="16" y="{middle}" text-anchor="middle" transform="rotate(-90 16 {middle})">{chart.y}</text>')
    for i, (name, points) in enumerate(chart.lines.items()):
        color, label = COLORS[i % len(COLORS)], html.escape(name)
        places = [(across(x), down(y)) for x, y in points]
        if chart.points:
            for x, y in places:
                out.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{color}"><title>{label}</title></circle>')
                out.append(f'<text x="{x + 6:.1f}" y="{y + 4:.1f}">{label}</text>')
            continue
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in places)
        dash = ' stroke-dasharray="5 3"' if i >= len(COLORS) else ""
        out.append(f'<path d="{path}" fill="none" stroke="{color}" stroke-width="{2.5 if i == 0 else 1.5}"{dash}/>')
        y = top + 14 * i
        out.append(f'<path d="M{width - right + 10} {y}h18" stroke="{color}" stroke-width="2"{dash}/>')
        out.append(f'<text x="{width - right + 34}" y="{y + 4}">{label}</text>')
    return "".join([*out, "</svg>"])


def _range(values: Sequence[float], *, log: bool) -> tuple[float, float]:
    low, high = min(values), max(values)
    if log:
        return low / 1.1, high * 1.1
    margin = (high - low) * 0.05 or abs(high) * 0.1 or 1.0
    return low - margin, high + margin
