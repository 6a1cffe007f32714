"""Ways of training in Lightning x rules and probes: see `test_trainers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.callbacks import diagnostics
from tests.helpers.lightning_cells import RULES, STEPS, WAYS, Classifier, Compared, blocks, watched_run
from tests.helpers.pool import Pool

PRESETS = ("cheap", "matrix", "curvature")
NEEDS_LOSS = r"training_step of manual optimization steps the optimizer.*give CurvatureCallback\(loss=\.\.\.\)"
SEVERAL = "kfac takes its factors from all passes of a training step, which with several optimizers"
REFUSED = {
    **{(way, rule): NEEDS_LOSS for way in ("manual", "GAN") for rule in RULES if rule not in ("muon", "kfac")},
    ("GAN", "kfac"): SEVERAL,
    ("GAN, with loss=", "kfac"): SEVERAL,
    ("GAN, with loss=", "hessian_free"): "the loss calls none of torch's .* or lbfgs",
}
CORE = {("BatchSizeFinder", "sophia_h"), ("LearningRateFinder", "sophia_g"), ("dataloader_iter", "lbfgs"),
        ("GAN", "sophia_h"), ("GAN, with loss=", "sophia_h"), ("GAN", "curvature"), ("manual", "kfac")}  # fmt: skip

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*(gradient noise scale needs|no labels can be drawn):UserWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning", "ignore::pytest.PytestUnraisableExceptionWarning"),
    pytest.mark.filterwarnings("ignore:.*(num_workers|bottleneck|dataloader_iter|batch_size|loggers?).*"),
]


def cells() -> list[Any]:
    every = [(way, column) for way in WAYS for column in (*RULES, *PRESETS)]
    return [pytest.param(*cell, marks=() if cell in CORE else pytest.mark.slow) for cell in every]


@pytest.mark.parametrize(("way", "column"), cells())
def test_the_loss_falls_or_is_refused_before_training(tmp_path: Path, way: str, column: str) -> None:
    rule, watching = (column, []) if column in RULES else ("muon", diagnostics(column, steps=STEPS))
    if (way, column) in REFUSED:
        with pytest.raises(ValueError, match=REFUSED[way, column]):
            WAYS[way](tmp_path, rule, watching)
        return
    if column == "curvature" and (way.startswith("manual") or way.startswith("GAN")):
        with pytest.warns(UserWarning, match="HessianBlocks stops measuring, .* under manual optimization"):
            _, trainer, before, after = WAYS[way](tmp_path, rule, watching)
    else:
        _, trainer, before, after = WAYS[way](tmp_path, rule, watching)
    assert trainer.global_step >= STEPS and after < before


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("column", [*RULES, *PRESETS])
def test_the_loss_falls_under_ddp(tmp_path: Path, pool: Pool, column: str) -> None:
    rule, preset = (column, None) if column in RULES else ("muon", column)
    for before, after in pool.run(
        "tests.helpers.lightning_cells:job", 2, folder=str(tmp_path), rule=rule, preset=preset
    ):
        assert after < before


COMPARED = (
    "automatic",
    "accumulation",
    "manual, with loss=",
    "GAN, with loss=",
    "LearningRateFinder",
    "dataloader_iter",
)


@pytest.mark.parametrize(
    "way", [pytest.param(x, marks=() if x == "GAN, with loss=" else pytest.mark.slow) for x in COMPARED]
)
def test_loss_gradient_and_trace_equal_those_by_hand(tmp_path: Path, way: str) -> None:
    compared = Compared()
    WAYS[way](tmp_path, "lbfgs", [compared], batch_size=32)
    assert compared.count >= STEPS


@pytest.mark.slow
@pytest.mark.dist
def test_loss_gradient_and_trace_equal_those_by_hand_under_ddp(tmp_path: Path, pool: Pool) -> None:
    assert all(
        count >= STEPS for count in pool.run("tests.helpers.lightning_cells:compared_job", 2, folder=str(tmp_path))
    )


def same(run: dict[str, Any], other: dict[str, Any]) -> None:
    assert run["steps"] >= STEPS and run["logs"] and run.keys() == other.keys()
    for key, value in run.items():
        assert torch.equal(value, other[key]) if isinstance(value, Tensor) else value == other[key], key


@pytest.mark.parametrize("way", [pytest.param(x, marks=() if x == "automatic" else pytest.mark.slow) for x in WAYS])
def test_a_run_with_probes_is_bitwise_the_run_without(tmp_path: Path, way: str) -> None:
    plain = watched_run(tmp_path / "plain", WAYS[way], [])
    hessian = blocks(way)
    same(plain, watched_run(tmp_path / "watched", WAYS[way], [*diagnostics("matrix", steps=STEPS), hessian]))
    assert hessian.probe.measured >= 1  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.slow
@pytest.mark.dist
def test_a_run_with_probes_is_bitwise_the_run_without_under_ddp(tmp_path: Path, pool: Pool) -> None:
    for plain, watched in pool.run("tests.helpers.lightning_cells:watched_job", 2, folder=str(tmp_path)):
        same(plain | {"logs": plain["logs"] or True}, watched | {"logs": watched["logs"] or True})  # one process logs


@pytest.mark.parametrize("rule", ["sophia_h", "lbfgs"])
def test_measuring_for_a_rule_counts_nothing(tmp_path: Path, rule: str) -> None:
    """As many calls, metric updates and writes to the buffer as batches."""
    module, _, _, _ = WAYS["automatic"](tmp_path, rule, [])
    assert isinstance(module, Classifier) and module.calls == STEPS and module.queue.tolist() == [STEPS, STEPS]
