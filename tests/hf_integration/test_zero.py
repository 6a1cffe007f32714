"""The stock Trainer on two processes under DeepSpeed ZeRO, by torchrun: the losses of DDP, exact resumes, a killed run.

One case of it is in `tests/core/parallel/test_zero.py`, in processes that have DeepSpeed already.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from hf_integration import last_checkpoint
from tests.helpers.zero_trainer import LOSS, MUON, check, same
from tests.hf_integration.test_trainer import ENVIRONMENT

pytestmark = [
    pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed"),
    pytest.mark.dist,
]


def launched(folder: Path, case: dict[str, Any]) -> subprocess.CompletedProcess[str]:
    launch = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        "-m",
        "tests.helpers.zero_trainer",
    ]
    command = [sys.executable, *launch, str(folder), json.dumps(case)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=900)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize(
    ("case", "stage_3"),
    [
        (MUON, LOSS),
        ({"optim": "soap"}, 1e-3),  # under DDP alone, one last bit of `max_grad_norm` is 7e-4: factors lack full rank
        ({"optim": "lightning_optim.adafactor"}, LOSS),
    ],
    ids=["muon", "soap", "adafactor"],
)
def test_trainers_under_torchrun(tmp_path: Path, case: dict[str, Any], stage_3: float, lora: bool) -> None:
    case = {**case, "lora": lora}
    done = launched(tmp_path, case)
    assert done.returncode == 0, done.stderr[-4000:]
    ranks = [torch.load(tmp_path / f"whole-{rank}.pt") for rank in range(2)]
    check(ranks, {2: LOSS, 3: stage_3})
    for stage in (2, 3):
        assert launched(tmp_path, {**case, "killed": stage}).returncode != 0
        folder = tmp_path / f"killed-{stage}"
        assert (folder / "killed").exists() and str(last_checkpoint(folder)).endswith("checkpoint-3")
        done = launched(tmp_path, {**case, "killed": stage})
        assert done.returncode == 0, done.stderr[-4000:]
        for rank in range(2):
            run = torch.load(tmp_path / f"killed-{stage}-{rank}.pt")["killed"]
            assert same(run["weights"], ranks[rank][f"{stage}"]["weights"])
