"""Real processes, really killed: the elastic agent restarts them, and what was being written does not count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.test_distributed import compare, straight

pytestmark = pytest.mark.dist
ROOT = Path(__file__).parent.parent


def test_killed_in_mid_step_and_while_saving_and_restarted_by_torchrun(tmp_path: Path) -> None:
    ranks = ["--standalone", "--nproc_per_node", "2", "--max_restarts", "2"]
    command = [sys.executable, "-m", "torch.distributed.run", *ranks, "-m", "tests.elastic", str(tmp_path)]
    # torch 2.13 keeps one store for all attempts, where gloo then finds the addresses of processes that are dead
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 0, done.stderr[-4000:]
    attempts = [json.loads((tmp_path / f"attempt-{k}-{rank}.json").read_text()) for k in range(3) for rank in range(2)]
    assert [a["from"] for a in attempts] == [0, 0, 2, 2, 4, 4]
    assert [a["cut_off"] for a in attempts[4:]] == [[6], [6]], "a checkpoint was there, cut off"
    compare("muon", torch.load(tmp_path / "final.pt"), straight("muon", 8))
