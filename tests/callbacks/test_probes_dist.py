"""Diagnostic callbacks with the real trainers on two processes: the tags of one process, with its values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.callbacks.test_probes import events, scalars
from tests.helpers import callback_jobs
from tests.helpers.pool import Pool
from tests.hf_integration.test_trainer import one_thread  # noqa: F401
from tests.test_lightning import pytestmark as lightning_warnings

pytestmark = [*lightning_warnings, pytest.mark.dist]

TRAINERS = ["lightning", "transformers"]
ACCUMULATED = ("health/", "rank/", "noise/")


def log_of(folder: Path) -> Path:
    """Where a run has logged."""
    return next(p.parent for p in folder.rglob("events.out.tfevents*"))


@pytest.mark.parametrize("framework", TRAINERS)
def test_two_processes_report_what_one_reports(tmp_path: Path, pool: Pool, framework: str) -> None:
    """Two micro-batches on each of two ranks, or four in one process, with clipping: the same numbers."""
    getattr(callback_jobs, framework)(0, 1, str(tmp_path / "one"), "adamw")
    a, b = pool.run(f"tests.helpers.callback_jobs:{framework}", 2, folder=str(tmp_path / "two"), name="adamw")
    assert all(torch.equal(a[k], b[k]) for k in a)
    logs = [log_of(tmp_path / x) for x in ("one", "two")]
    one, two = (scalars(log) for log in logs)
    ranks = {t for t in two if t.startswith(("memory/all_ranks/", "memory/largest_rank/"))}
    assert set(one) | ranks | {"memory/communication"} == set(two) and ranks
    tags = {t for t in one if t.startswith(ACCUMULATED)}
    assert tags == {t for t in two if t.startswith(ACCUMULATED)} and len(tags) > 60
    for tag in sorted(tags):
        assert two[tag] == pytest.approx(one[tag], rel=5e-3, abs=1e-6), tag
    assert two["noise/batch_sequences"] == one["noise/batch_sequences"] and one["health/clip_rate"][-1] == 1
    assert two["memory/communication"] == two["memory/gradients"]  # the buckets of DDP
    assert two["memory/all_ranks/parameters"][0] == pytest.approx(2 * one["memory/parameters"][0])
    assert {t for t in events(logs[0]).Tags()["images"]} == {t for t in events(logs[1]).Tags()["images"]}


@pytest.mark.parametrize("framework", [pytest.param("lightning", marks=pytest.mark.slow), "transformers"])
def test_ranks_refresh_together_within_a_time_budget(tmp_path: Path, pool: Pool, framework: str) -> None:
    """The callback tells the optimizer who its replicas are; their clocks differ, their weights do not."""
    job = f"tests.helpers.callback_jobs:{framework}"
    a, b = pool.run(job, 2, folder=str(tmp_path), name="soap", policy="time_budget:0.2")
    assert all(torch.equal(a[k], b[k]) for k in a)
    actual = scalars(log_of(tmp_path))
    matrices = actual["refresh/count"][0]
    assert actual["refresh/reason/first"] == [matrices] and actual["refresh/reason/budget"][0] > 0
