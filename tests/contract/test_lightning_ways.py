"""Ways of training in Lightning x rules and probes: see `test_trainers`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.callbacks import HessianBlocks, diagnostics
from tests.helpers.lightning_cells import RULES, STEPS, WAYS, Classifier, own_loss
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
    assert trainer.global_step >= STEPS / 2 and after < before


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("column", [*RULES, *PRESETS])
def test_the_loss_falls_under_ddp(tmp_path: Path, pool: Pool, column: str) -> None:
    rule, preset = (column, None) if column in RULES else ("muon", column)
    for before, after in pool.run(
        "tests.helpers.lightning_cells:job", 2, folder=str(tmp_path), rule=rule, preset=preset
    ):
        assert after < before


@pytest.mark.parametrize("way", [pytest.param(x, marks=() if x == "automatic" else pytest.mark.slow) for x in WAYS])
def test_a_run_with_probes_is_bitwise_the_run_without(tmp_path: Path, way: str) -> None:
    runs: list[dict[str, Any]] = []
    for watched in (False, True):
        loss = own_loss if way.startswith(("manual", "GAN")) else None
        blocks = HessianBlocks(every=3, probes=2, steps=2, loss=loss)
        watching = [*diagnostics("matrix", steps=STEPS), blocks] if watched else []
        module, trainer, *_ = WAYS[way](tmp_path / str(watched), "muon", watching)
        out: dict[str, Any] = dict(module.state_dict())
        out |= {f"{i}/{k}": v for o in trainer.optimizers for i, s in enumerate(o.state.values()) for k, v in s.items()}
        mean: Any = module.mean
        out |= {"mean": mean.compute() if mean.update_called else None, "calls": module.calls}
        out |= {"logged": trainer.callback_metrics.get("loss"), "random": torch.rand(3)}
        runs.append(out)
        assert not watched or blocks.probe.measured >= 1  # pyright: ignore[reportAttributeAccessIssue]
    assert runs[0].keys() == runs[1].keys()
    for key, value in runs[0].items():
        other = runs[1][key]
        assert torch.equal(value, other) if isinstance(value, Tensor) else value == other, key


@pytest.mark.parametrize("rule", ["sophia_h", "lbfgs"])
def test_measuring_for_a_rule_counts_nothing(tmp_path: Path, rule: str) -> None:
    """As many calls, metric updates and writes to the buffer as batches."""
    module, _, _, _ = WAYS["automatic"](tmp_path, rule, [])
    assert isinstance(module, Classifier) and module.calls == STEPS and module.queue.tolist() == [STEPS, STEPS]
