"""The examples' `--diagnostics`: every view is filled, as a real TensorBoard server shows it."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import sysconfig
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.test_lightning import pytestmark as lightning_warnings

pytestmark = lightning_warnings

ROOT = Path(__file__).parent.parent
STEPS, BATCHES = 24, 2
IMAGES = {
    "health/gradient_rms_by_role",
    "health/update_rms_by_role",
    "health/update_to_weight_by_layer",
    "health/weight_rms_by_role",
    "hessian/coupling",
    "hessian/entries/gate_proj",
    "hessian/frobenius_by_role",
    "hessian/js_distance",
    "hessian/lambda_min_by_role",
    "hessian/spectral_density",
    "hessian/trace_by_role",
    "rank/gradient_captured_by_role",
    "rank/gradient_rank@90_by_role",
    "rank/gradient_rank@90_by_layer",
    "rank/gradient_stable_rank_vs_gaussian_by_role",
    "rank/stable_rank_by_layer",
    "rank/update_stable_rank_by_role",
    "refresh/raster",
    "refresh/reason_by_role",
}
"""Beside that of the noise scale, which a short run may not have: the estimate of |G|^2 may be negative."""
TEXTS = {
    "hessian/measures",
    "hessian/traces",
    "memory/table",
    "noise/measures",
    "rank/table",
    "refresh/measures",
    "roles",
}


def example(name: str, folder: Path, *flags: str) -> None:
    """Run an example in its own process."""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "examples" / name), *flags]
    done = subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert done.returncode == 0, done.stdout


@contextmanager
def tensorboard(folder: Path) -> Iterator[str]:
    """A TensorBoard server on loopback; its address."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    server = subprocess.Popen(
        [*command, "--host", "127.0.0.1", "--load_fast=false", "--samples_per_plugin", "images=100"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}/data"
    finally:
        server.terminate()
        server.wait()


def ask(address: str, patience: float = 120.0) -> Any:
    """JSON from a server that may still be starting or reading."""
    until = time.monotonic() + patience
    while True:
        try:
            with urllib.request.urlopen(address, timeout=10) as answer:
                found = json.load(answer)
            if found:
                return found
        except OSError:
            pass
        assert time.monotonic() < until, f"{address} does not answer"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, trained a little with everything on."""
    folder = tmp_path_factory.mktemp("pretrain")
    library = Path(sysconfig.get_path("stdlib"))
    flags = {"optim": "soap", "max_steps": STEPS, "accumulate": BATCHES, "batch_size": 4, "output_dir": folder / "runs"}
    flags |= {"diagnostics": "curvature", "val_every": 12, "checkpoint_every": 12}
    given = [x for key, value in flags.items() for x in (f"--{key}", str(value))]
    example("pretrain_lightning.py", folder, "--data", str(library / "argparse.py"), str(library / "ast.py"), *given)
    return folder / "runs"


def test_pretraining_fills_every_view(pretrained: Path) -> None:
    with tensorboard(pretrained) as address:
        ((run, tags),) = ask(f"{address}/plugin/scalars/tags").items()
        images = ask(f"{address}/plugin/images/tags")[run]
        texts = ask(f"{address}/plugin/text/tags")[run]
        dashboard = ask(f"{address}/plugin/custom_scalars/layout")
        assert set(images) >= IMAGES
        assert {t.removesuffix("/text_summary") for t in texts} >= TEXTS
        families = {"health", "memory", "refresh", "rank", "noise", "hessian"}
        assert {c["title"] for c in dashboard["category"]} == families | {"diagnostics"}
        assert len([t for t in tags if t.startswith((*families, "diagnostics/"))]) <= 60
        for category in dashboard["category"]:
            for chart in category["chart"]:
                for pattern in chart["multiline"]["tag"]:
                    url = f"{address}/plugin/custom_scalars/scalars?run={run}&tag={urllib.parse.quote(pattern)}"
                    found = ask(url)
                    assert found["regex_valid"] and found["tag_to_events"], f"{chart['title']} is empty"
        url = f"{address}/plugin/images/images?run={run}&tag=hessian/coupling&sample=0"
        samples = ask(url)
        with urllib.request.urlopen(f"{address}/plugin/images/individualImage?{samples[0]['query']}") as answer:
            assert answer.read(8) == b"\x89PNG\r\n\x1a\n"
    for name in ("rank", "hessian", "refresh"):
        assert list(pretrained.rglob(f"diagnostics/{name}-*.npz")), name
    assert {f"diagnostics/share/{f}" for f in families} <= set(tags)


def test_fine_tuning_shows_the_same_tags(pretrained: Path, tmp_path: Path) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    flags = {"model": pretrained / "model", "output_dir": tmp_path / "out", "optim": "soap", "max_steps": STEPS}
    flags |= {"gradient_accumulation_steps": BATCHES, "per_device_train_batch_size": 4, "diagnostics": "curvature"}
    flags |= {"use_cpu": True, "eval_strategy": "no", "data": library / "typing.py"}
    example("finetune_hf.py", tmp_path, *(x for key, value in flags.items() for x in (f"--{key}", str(value))))
    with tensorboard(pretrained) as first, tensorboard(tmp_path / "out") as second:
        ((_, ours),) = ask(f"{first}/plugin/scalars/tags").items()
        found = [x for x in ask(f"{second}/plugin/scalars/tags").values() if "health/gradient_norm" in x]
        images = [set(x) for x in ask(f"{second}/plugin/images/tags").values()]
    families = ("health/", "memory/", "refresh/", "rank/", "noise/", "hessian/", "diagnostics/")
    mine, theirs = ({t for t in x if t.startswith(families) and "noise/scale" not in t} for x in (ours, found[0]))
    assert mine - {"memory/checkpoint"} == theirs - {"memory/checkpoint"}
    assert IMAGES <= images[0]
