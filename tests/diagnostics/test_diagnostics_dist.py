"""Probes on two processes: data-parallel and sharded runs report what one process reports."""

from __future__ import annotations

import math
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_optim import build_optimizer
from lightning_optim.diagnostics.probes.base import Probe
from lightning_optim.diagnostics.probes.context import TrainingContext
from lightning_optim.diagnostics.probes.curvature import HessianBlocks
from lightning_optim.diagnostics.probes.health import Health
from lightning_optim.diagnostics.probes.memory import Memory
from lightning_optim.diagnostics.probes.noise import GradientNoiseScale
from lightning_optim.diagnostics.probes.rank import GradientRank
from lightning_optim.diagnostics.probes.refresh import PreconditionerRefresh
from lightning_optim.diagnostics.report import Report, over_ranks
from tests.helpers.pool import Pool

pytestmark = pytest.mark.dist
ROWS = 8


class Net(nn.Module):
    """Sides that do not divide by two."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(11, 9)
        self.hidden = nn.Linear(9, 13)
        self.out = nn.Linear(13, 11, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.embedding(x))))


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return nn.functional.cross_entropy(model(batch).flatten(0, 1), (batch.flatten() + 1) % 11)


def probes(curved: bool) -> list[Probe]:
    often: dict[str, Any] = {"every": 2, "max_overhead": 1e9, "detail": True}
    few: dict[str, Any] = {"probes": 2, "steps": 4, "coupling_probes": 1, "exact": (), "sequences": ROWS}
    made = [Health(**often), GradientRank(**often), GradientNoiseScale(**often), PreconditionerRefresh(**often)]
    return [*made, Memory(**often), *([HessianBlocks(**often, **few)] if curved else [])]


def watch(
    model: nn.Module, trained: nn.Module, name: str, parts: int, rank: int, ranks: int, curved: bool = False
) -> dict[str, list[float]]:
    """Four steps of `parts` micro-batches, of which this process sees its share; what was reported."""
    optimizer = build_optimizer(model, name, lr=1e-2)
    ours = probes(curved)
    for probe in ours:
        context = TrainingContext(model, optimizer, lambda batch: loss_of(model, batch), ranks=ranks, rank=rank)
        probe.start(context)
    actual: dict[str, list[float]] = {}
    for step in range(4):
        batch = torch.randint(11, (ROWS, 6), generator=torch.Generator().manual_seed(step))
        mine = batch.chunk(parts)[rank :: ranks if parts > 1 else 1]
        for probe in ours:
            probe.begin_batch()
        optimizer.zero_grad()
        for k, piece in enumerate(mine):
            last = k == len(mine) - 1
            if isinstance(trained, DistributedDataParallel):
                trained.require_backward_grad_sync = last
            for probe in ours:
                probe.record_batch(piece)
            loss = loss_of(trained, piece) / len(mine)
            for probe in ours:
                probe.after_forward()
            loss.backward()
            for probe in ours:
                probe.after_backward()
        for probe in ours:
            probe.before_optimizer_step()
        optimizer.step()
        for probe in ours:
            report = probe.end_batch()
            for tag, value in report.finite().items() if report is not None else ():
                actual.setdefault(tag, []).append(value)
    for probe in ours:
        probe.stop()
    return actual


def plain(rank: int, world: int, name: str, parts: int, curved: bool = False) -> dict[str, list[float]]:
    """A data-parallel run."""
    model = Net().double()
    trained = DistributedDataParallel(model) if world > 1 else model
    return watch(model, trained, name, parts, rank, world, curved)


def sharded(rank: int, world: int, name: str, parts: int, curved: bool = False) -> dict[str, list[float]]:
    """A run under FSDP2."""
    model = Net().double()
    fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    return watch(model, model, name, parts, rank, world, curved)


class Fails(Probe):
    """Talks over ranks, and raises on the second of them in one place."""

    name = "fails"

    def __init__(self, where: str, **settings: Any) -> None:
        super().__init__(**settings)
        self.where = where

    def fail(self, where: str) -> None:
        if self.context is not None and self.context.rank == 1 and where == self.where:
            raise ZeroDivisionError(where)

    def record_batch(self, batch: Any) -> None:
        self.fail("see")

    def before_step(self, context: TrainingContext) -> None:
        self.fail("before")

    def after_every_step(self, context: TrainingContext, advanced: bool) -> None:
        self.fail("always" if self.step != 2 else "always, measured")

    def measure(self, context: TrainingContext) -> Report | None:
        over_ranks(torch.ones(2))
        self.fail("after")
        over_ranks(torch.ones(3))
        return Report({"fails/x": 1.0})

    def complete(self, context: TrainingContext, report: Report) -> None:
        over_ranks(torch.ones(1))
        self.fail("finish")
        over_ranks(torch.ones(2))


PLACES = ["nowhere", "see", "before", "always", "always, measured", "after", "finish"]
PLACES += [f"loss {call}" for call in (1, 3, 6, 9)]


def failing_everywhere(rank: int, world: int) -> dict[str, tuple[list[str], list[float], int]]:
    """By place of the failure."""
    return {where: failing(rank, world, where) for where in PLACES}


def failing(rank: int, world: int, where: str) -> tuple[list[str], list[float], int]:
    """Warnings, weights and number of reports of a data-parallel run in which a probe fails on one rank."""
    model = Net().double()
    trained = DistributedDataParallel(model)
    optimizer = build_optimizer(model, "adamw", lr=1e-2)
    often: dict[str, Any] = {"every": 2, "max_overhead": 1e9}
    calls = []

    def loss(batch: Tensor) -> Tensor:
        calls.append(0)
        if rank == 1 and where == f"loss {len(calls)}":
            raise ZeroDivisionError(where)
        return loss_of(model, batch)

    few: dict[str, Any] = {"probes": 2, "steps": 3, "coupling_probes": 1, "exact": (), "sequences": 2}
    ours: list[Probe] = [Fails(where, **often), Health(**often), HessianBlocks(**often, **few)]
    with warnings.catch_warnings(record=True) as warned_record:
        warnings.simplefilter("always")
        for probe in ours:
            probe.start(TrainingContext(model, optimizer, loss, ranks=world, rank=rank))
        reports = 0
        for step in range(8):
            batch = torch.randint(11, (ROWS, 6), generator=torch.Generator().manual_seed(step)).chunk(world)[rank]
            for probe in ours:
                probe.begin_batch()
                probe.record_batch(batch)
            optimizer.zero_grad()
            loss_of(trained, batch).backward()
            optimizer.step()
            reports += sum(probe.end_batch() is not None for probe in ours)
        assert ours[1]._handles
        for probe in ours:
            probe.stop()
    texts = [str(w.message) for w in warned_record if "stops measuring" in str(w.message)]
    return texts, [float(p.detach().sum()) for p in model.parameters()], reports


def sharded_and_warned(rank: int, world: int) -> tuple[list[str], list[str]]:
    """The Hessian's tags and the warnings of a run under FSDP2."""
    with warnings.catch_warnings(record=True) as warned_record:
        warnings.simplefilter("always")
        actual = sharded(rank, world, "adamw", 4, curved=True)
    return [t for t in actual if t.startswith("hessian/")], [str(w.message) for w in warned_record]


def summed(rank: int, world: int) -> list[float]:
    return over_ranks(torch.tensor([1.0, float(rank)])).tolist()


MEASURED = ("health/", "rank/", "noise/")


def compare(
    actual: dict[str, list[float]], expected: dict[str, list[float]], prefixes: tuple[str, ...], soap: bool = False
) -> int:
    """Assert equal values of equal tags.

    Eigenvectors of a null space hang on the last bit; of soap only what precedes its first rotated step is compared.

    Returns:
        How many tags.
    """
    tags = {t for t in expected if t.startswith(prefixes)}
    assert tags == {t for t in actual if t.startswith(prefixes)}
    for tag in sorted(t for t in tags if not soap or not any(x in t for x in ("update", "effective_lr"))):
        assert actual[tag][0] == pytest.approx(expected[tag][0], rel=2e-2 if soap else 2e-3, abs=1e-6), tag
        if not soap:
            assert actual[tag] == pytest.approx(expected[tag], rel=2e-3, abs=1e-6), tag
    return len(tags)


@pytest.fixture(scope="module")
def one() -> dict[str, dict[str, list[float]]]:
    """One process, four micro-batches."""
    return {name: plain(0, 1, name, 4) for name in ("soap", "muon", "adamw")}


@pytest.mark.parametrize("name", ["soap", "muon"])
def test_data_parallel_runs_report_what_one_process_reports(pool: Pool, one: Any, name: str) -> None:
    first, second = pool.run("tests.diagnostics.test_diagnostics_dist:plain", 2, name=name, parts=4)
    assert compare(first, one[name], MEASURED, name == "soap") > 20
    assert compare(second, first, (*MEASURED, "refresh/count", "refresh/age", "refresh/reason")) > 20
    assert first["noise/batch_sequences"] == [ROWS, ROWS]
    if name == "soap":
        assert compare(first, one[name], ("refresh/count", "refresh/age", "refresh/drift", "refresh/stale"), True) > 4
    share = first["memory/all_ranks/parameters"][0]
    assert share == pytest.approx(2 * first["memory/parameters"][0]) and first["memory/largest_rank/state"][0] > 0


@pytest.mark.parametrize("name", ["soap", "muon", "adamw"])
def test_sharded_runs_measure_whole_matrices(pool: Pool, one: Any, name: str) -> None:
    first, second = pool.run("tests.diagnostics.test_diagnostics_dist:sharded", 2, name=name, parts=4)
    assert compare(first, one[name], ("health/", "rank/"), name == "soap") > 10
    assert compare(second, first, MEASURED) > 10
    if name == "soap":
        assert first["refresh/count"] == one[name]["refresh/count"]
        assert first["refresh/age_mean"] == one[name]["refresh/age_mean"]
    total = sum(actual["memory/parameters"][0] for actual in (first, second))
    assert 1 <= total / one[name]["memory/parameters"][0] < 1.25  # FSDP pads odd shards
    # micro-batches of both ranks are averaged before they are seen: two of four sequences instead of four of two
    assert first["noise/batch_sequences"] == [ROWS, ROWS]
    assert math.isfinite(first["noise/gradient_square"][0])


def test_curvature_is_that_of_the_whole_batch(pool: Pool) -> None:
    first, _ = pool.run("tests.diagnostics.test_diagnostics_dist:plain", 2, name="adamw", parts=2, curved=True)
    kinds = ("trace", "lambda_min", "lambda_max", "frobenius", "sharpness", "curvature_along_update", "model_ratio")
    with pytest.warns(UserWarning, match="needs gradient accumulation"):
        whole = plain(0, 1, "adamw", 1, curved=True)
    assert compare(first, whole, tuple(f"hessian/{k}" for k in kinds)) > 12


def test_curvature_of_sharded_weights_is_left_out_with_one_warning(pool: Pool) -> None:
    for tags, warned_record in pool.run("tests.diagnostics.test_diagnostics_dist:sharded_and_warned", 2):
        assert not tags and len([text for text in warned_record if "HessianBlocks logs nothing" in text]) == 1
        assert any("lie in shards (FSDP2)" in text and "under DDP" in text for text in warned_record)


def test_a_probe_that_fails_on_one_rank_stops_on_all(pool: Pool) -> None:
    first, second = pool.run("tests.diagnostics.test_diagnostics_dist:failing_everywhere", 2)
    warned_record, weights, reports = first.pop("nowhere")
    assert not warned_record and reports == 12 and second.pop("nowhere")[1:] == (weights, 12)
    for where, (texts, ours, count) in first.items():
        others, theirs, number = second[where]
        name = "HessianBlocks" if where.startswith("loss") else "Fails"
        assert ours == theirs == weights and 8 <= count == number < 12, where
        assert len(texts) == len(others) == 1, where
        assert texts[0].startswith(f"{name} stops measuring") and "failed on another rank" in texts[0]
        assert others[0].startswith(f"{name} stops measuring") and f"ZeroDivisionError: {where}" in others[0]


def test_sums_over_ranks(pool: Pool) -> None:
    assert pool.run("tests.diagnostics.test_diagnostics_dist:summed", 2) == [[2.0, 1.0]] * 2
    assert over_ranks(torch.tensor([3.0])).tolist() == [3.0]
