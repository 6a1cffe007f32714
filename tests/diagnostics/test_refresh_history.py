"""The pictures of refreshes: a staggered policy is a diagonal, a reason is a color, and cost has a scale of its own."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from lightning_optim.core.step.records import Refresh
from lightning_optim.diagnostics import figures
from lightning_optim.diagnostics.probes import refresh_history
from lightning_optim.diagnostics.probes.refresh_history import REASONS, RefreshHistory

NAMES = [f"layers.{i}.weight" for i in range(10)]


def noted(first: int, last: int, reason: str = "interval") -> list[tuple[int, Refresh]]:
    """Every matrix each 10 steps, one per step; the k-th takes 10^(k % 3) ms."""
    return [
        (t, Refresh(NAMES[t % 10], t, reason, 10, 10.0 ** (t % 3 - 3), math.nan, math.nan))
        for t in range(first, last + 1)
    ]


def tables(history: RefreshHistory, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """What the pictures draw."""
    drawn: list[np.ndarray] = []
    draw = figures.heat_map
    monkeypatch.setattr(figures, "heat_map", lambda values, *a, **k: drawn.append(values) or draw(values, *a, **k))
    pictures = history.pictures()
    monkeypatch.undo()
    assert list(pictures) == ["refresh/raster", "refresh/cost"] and len(drawn) == 2
    return dict(zip(pictures, drawn, strict=True))


def test_a_staggered_policy_is_a_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    history = RefreshHistory()
    for last in (25, 50, 75, 100):
        history.add(NAMES, noted(last - 24, last), last, torch.device("cpu"))
    seen = tables(history, monkeypatch)
    there = np.isfinite(seen["refresh/raster"])
    assert there.shape == (10, 60) and (there.sum(0) == 1).all() and (there.sum(1) == 6).all()
    steps = np.arange(41, 101)
    assert (there.argmax(0) == steps % 10).all()
    assert set(seen["refresh/raster"][there]) == {REASONS.index("interval")}
    assert seen["refresh/cost"][there].reshape(6, 10)[0].size == 10
    columns = np.nanmax(seen["refresh/cost"], axis=0)
    assert columns == pytest.approx(steps % 3)  # log10 of ms


def test_long_intervals_are_shown_in_wider_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    history = RefreshHistory()
    events = [(t, Refresh(NAMES[0], t, "stale+age", 200, 1e-3, math.nan, math.nan)) for t in range(200, 2001, 200)]
    history.add(NAMES, events, 2000, torch.device("cpu"))
    seen = tables(history, monkeypatch)["refresh/raster"]
    assert seen.shape == (10, 120) and np.isfinite(seen[0]).sum() == 6 and not np.isfinite(seen[1:]).any()
    assert set(seen[0][np.isfinite(seen[0])]) == {REASONS.index("several")}


def test_other_matrices_begin_again() -> None:
    history = RefreshHistory()
    assert history.pictures() == {}
    history.add(NAMES, noted(1, 5), 5, torch.device("cpu"))
    history.add(NAMES[:2], noted(10, 10), 10, torch.device("cpu"))
    assert list(history.steps) == [10]
    assert all(len(reasons) == 2 for reasons, _ in history.steps.values())


def test_scales_in_log10_have_whole_powers() -> None:
    assert figures._scale_ticks(-4.44, -1.55, "log10 of ratio", 5) == [
        (-4.0, "0.0001"),
        (-3.0, "0.001"),
        (-2.0, "0.01"),
    ]
    near = [label for _, label in figures._scale_ticks(-0.4, 0.4, "log10 of ms", 5)]
    assert near == ["0.5", "1", "2"]
    assert [label for _, label in figures._scale_ticks(0.0, 4.0, "rank", 5)] == ["0", "1", "2", "3", "4"]


def test_reasons_have_the_colors_of_their_legend() -> None:
    picture = figures.heat_map(
        [[0.0, 1.0]], "t", rows=["a"], columns=["x", "y"], across="", unit="", categories=REASONS
    )
    for color in figures.LINES[: len(REASONS)]:
        assert (picture == np.array(color, dtype=np.uint8)).all(-1).any()
    assert len(REASONS) <= len(figures.LINES) and refresh_history.COLUMNS > 0
