"""Real processes, really killed: the elastic agent restarts them, and what was being written does not count."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.core.parallel.test_exchange import compare, straight
from tests.helpers.paths import ROOT
from tests.helpers.pool import Pool

pytestmark = pytest.mark.dist
TIMEOUT = 540
"""Seconds for a run that starts two processes three times, and took 69 where others used the cores."""


def test_killed_in_mid_step_and_while_saving_and_restarted_by_torchrun(tmp_path: Path) -> None:
    ranks = ["--standalone", "--nproc_per_node", "2", "--max_restarts", "4"]
    command = [sys.executable, "-m", "torch.distributed.run", *ranks, "-m", "tests.helpers.elastic", str(tmp_path)]
    # torch 2.13 keeps one store for all attempts, where gloo then finds the addresses of processes that are dead
    environment = os.environ | {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        record, _ = process.communicate(timeout=TIMEOUT)
    except subprocess.TimeoutExpired:
        process.terminate()  # torchrun ends its processes
        pytest.fail(f"torchrun hangs: {process.communicate()[0][-4000:]}")
    assert process.returncode == 0, record[-4000:]
    for rank in range(2):
        actual = sorted(tmp_path.glob(f"attempt-*-{rank}.json"))
        attempts = [json.loads(path.read_text()) for path in actual]
        assert [a["from"] for a in attempts] == [0, 2, 4], record[-4000:]
        assert [a["cut_off"] for a in attempts] == [[], [], [6]], "a checkpoint was there, cut off"
    assert (tmp_path / "killed-in-step").exists() and (tmp_path / "killed-while-saving").exists()
    compare("muon", torch.load(tmp_path / "final.pt"), straight("muon", 8))


LOST = [
    ("raise", r"nobody else knows\s+tests.helpers.jobs:lost: ranks \[0\] did not answer"),
    ("kill", "rank 1: ended with -9"),
]


@pytest.mark.parametrize(("how", "record"), LOST)
def test_the_pool_tells_which_rank_was_lost(pool: Pool, monkeypatch: pytest.MonkeyPatch, how: str, record: str) -> None:
    """Others may wait for it for ever, and rank 0 must not be the one that is blamed."""
    monkeypatch.setattr("tests.helpers.pool.GRACE", 2)
    with pytest.raises(RuntimeError, match=record):
        pool.run("tests.helpers.jobs:lost", 2, how=how)
    assert pool.run("tests.helpers.jobs:lost", 2, how="") == [2.0, 2.0], "the next job has processes again"
