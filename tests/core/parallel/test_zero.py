"""Under DeepSpeed ZeRO every rule steps as in one process that has the same gradients, and resumes bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest

from lightning_optim.core.rule import REGISTRY
from tests.helpers.pool import opened
from tests.helpers.zero_trainer import LOSS, check

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")

ULP = 2.0**-25
"""Of weights from 0.25 to 0.5 in float32: the norms of gradients are summed in another order."""
BF16 = {"bf16": {"enabled": True}}
INT8 = {"state_storage": "int8", "rest_settings": {"state_storage": "fp32"}}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
CASES: list[dict[str, Any]] = [
    {"name": "muon", "stage": 1, "gradient_clipping": 0.01},
    {"name": "soap", "stage": 2, **BF16, "zero": OFFLOAD},
    {"name": "adafactor", "stage": 3, "init": True},
    {"name": "galore", "stage": 3, "zero": {"sub_group_size": 40}, **BF16},
    {"name": "muon", "stage": 2, "make": "tied", "settings": {"constraint": "hyperball"}},
    {"name": "adamw", "stage": 1, "settings": {"clip_norm": 0.01, "state_storage": "bf16", "pin": True}},
    {"name": "shampoo", "stage": 3, "make": "tied", "settings": INT8},
]


@needs_deepspeed
@pytest.mark.dist
def test_rules_step_and_resume_as_in_one_process_and_a_trainer_as_under_ddp(tmp_path: Path) -> None:
    with opened() as pool:  # DeepSpeed stays in its processes, whatever runs there next
        ranks = pool.run("tests.helpers.zero_trainer:beside_one_process", 2, cases=CASES, folder=str(tmp_path))
    check([trainer for _, trainer in ranks], {3: LOSS})
    assert ranks[0][0] == ranks[1][0]
    for case, (difference, moved, resumed) in zip(CASES, ranks[0][0], strict=True):
        assert difference <= ULP < 1e-3 < moved and resumed == 0, (case, difference, moved, resumed)


@needs_deepspeed
@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("more", [{}, BF16, {"init": True}], ids=["float32", "bf16", "zero.Init"])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_every_rule_steps_and_resumes_as_in_one_process(
    stage: int, more: dict[str, Any], world: int, tmp_path: Path
) -> None:
    if "init" in more and stage < 3:
        pytest.skip("zero.Init is for stage 3")
    cases = [{"name": n, "stage": stage, **more} for n, rule in sorted(REGISTRY.items()) if not rule.curvature_input]
    with opened() as pool:
        ranks = pool.run("tests.helpers.zero_jobs:compare", world, cases=cases, folder=str(tmp_path))
    assert len(cases) > 40
    for case, (difference, moved, resumed) in zip(cases, ranks[0], strict=True):
        assert difference <= ULP < 1e-3 < moved and resumed == 0, (case, difference, moved, resumed)
