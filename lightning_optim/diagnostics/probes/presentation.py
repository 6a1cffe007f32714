"""What of a report becomes a scalar, and what becomes a curve in a picture or a row of a table."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import ClassVar

from lightning_optim.diagnostics import figures
from lightning_optim.diagnostics.probes.history import CurveHistory
from lightning_optim.diagnostics.report import Report


class ReportPresentation:
    """Base of `Probe` that keeps the number of scalar tags small.

    A measure that appears in a chart is a scalar. Any other measure with one value per role is a set of curves in the
    picture `<measure>_by_role`, and the remaining measures are rows of the table `<name>/measures`. Both come with
    every `picture_every`-th measurement, the curves from the second one on, and their numbers are in the arrays.

    Args:
        detail: whether every measure is also a scalar.
    """

    name: ClassVar[str]
    """Prefix of the probe's tags."""
    charts: ClassVar[Mapping[str, Sequence[str]]] = {}
    """Title of a chart in the dashboard to patterns of its tags. These tags are scalars."""
    curves: ClassVar[Mapping[str, tuple[str, str]]] = {}
    """Prefix of tags that end in a role to title and vertical axis of their picture."""
    step: int

    def __init__(self, detail: bool = False) -> None:
        self.detail, self.picture_every = detail, 1
        self.prefix = ""
        """Of all tags that are logged, where a run has several optimizers."""
        self.filled_charts: set[str] = set()
        """Titles of the charts that have something to show."""
        self._curves: dict[str, CurveHistory] = {}
        self._report_count = 0

    def draws_pictures(self) -> bool:
        """Whether the present measurement comes with pictures.

        Returns:
            True every `picture_every` measurements, and at powers of two before the first of these.
        """
        number = self._report_count + 1
        early = 1 < number < self.picture_every and number.bit_count() == 1
        return early or number % self.picture_every == 0

    def layout(self) -> dict[str, Sequence[str]]:
        """The charts that have something to show, without those by role, which pictures draw in a color per role.

        Returns:
            Title to patterns of tags.
        """
        pictures = set() if self.detail else {f"{prefix}/.*" for prefix in self.curves}
        charts = {
            title: patterns for title, patterns in self.all_charts().items() if not pictures.intersection(patterns)
        }
        return {title: patterns for title, patterns in charts.items() if title in self.filled_charts}

    def all_charts(self) -> dict[str, Sequence[str]]:
        """The charts of the dashboard; with `detail` also those of the curves.

        Returns:
            Title to patterns of tags.
        """
        more = {title: [f"{re.escape(start)}/.*"] for start, (title, _) in self.curves.items()} if self.detail else {}
        return {**self.charts, **more}

    def present(self, report: Report) -> None:
        """Move the measures that no chart shows from the scalars to pictures and a table.

        Args:
            report: the report, which is changed.
        """
        patterns = {title: re.compile("|".join(p)) for title, p in self.all_charts().items()}
        rows: dict[str, float] = {}
        by_prefix: defaultdict[str, dict[str, float]] = defaultdict(dict)
        for tag, value in report.finite().items():
            titles = {title for title, pattern in patterns.items() if pattern.fullmatch(tag)}
            self.filled_charts |= titles
            prefix, _, role = tag.rpartition("/")
            if prefix in self.curves:
                by_prefix[prefix][role] = value
            elif not titles:
                rows[tag] = value
            if not titles and not self.detail:
                del report.scalars[tag]
        for prefix, values in by_prefix.items():
            self._curves.setdefault(prefix, CurveHistory()).add(self.step, values)
        with_pictures = self.draws_pictures()
        self._report_count += 1
        if with_pictures:
            self._draw_curves(report, list(by_prefix))
            self._write_table(report, rows)

    def _draw_curves(self, report: Report, prefixes: Sequence[str]) -> None:
        for prefix in prefixes:
            title, up = self.curves[prefix]
            steps, lines = self._curves[prefix].table()
            # the image has another name than the scalars: TensorBoard shows neither if they share one
            report.images[f"{prefix}_by_role"] = figures.curves(
                steps, lines, title, across="optimizer step", up=up, scale=None
            )
            report.arrays |= {f"{prefix}/steps": steps} | {f"{prefix}/{role}": line for role, line in lines.items()}

    def _write_table(self, report: Report, rows: Mapping[str, float]) -> None:
        if rows:
            lines = [f"| {tag.removeprefix(self.name + '/')} | {figures.number(x)} |" for tag, x in rows.items()]
            report.texts[f"{self.name}/measures"] = "\n".join(["| measure | value |", "|---|---|", *lines])
            report.arrays |= rows
