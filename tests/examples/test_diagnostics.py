"""The examples' `--diagnostics`: every view is filled, as a real TensorBoard server shows it."""

from __future__ import annotations

import io
import json
import math
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

import numpy as np
import pytest
from PIL import Image

from lightning_optim.diagnostics import figures
from tests.helpers.paths import ROOT
from tests.test_lightning import pytestmark as lightning_warnings

pytestmark = lightning_warnings

STEPS, BATCHES = 24, 2
IMAGES = {
    "health/gradient_rms_by_role",
    "health/update_rms_by_role",
    "health/update_to_weight_by_role",
    "health/update_to_weight_by_layer",
    "health/weight_rms_by_role",
    "hessian/coupling",
    "hessian/entries/gate_proj",
    "hessian/frobenius_by_role",
    "hessian/js_distance",
    "hessian/lambda_max_by_role",
    "hessian/lambda_min_by_role",
    "hessian/spectral_density",
    "hessian/trace_by_role",
    "rank/gradient_captured_by_role",
    "rank/gradient_rank@90_by_role",
    "rank/gradient_rank@90_by_layer",
    "rank/gradient_stable_rank_vs_gaussian_by_role",
    "rank/stable_rank_by_layer",
    "rank/update_stable_rank_by_role",
    "refresh/cost",
    "refresh/raster",
    "refresh/reason_by_role",
}
"""Beside that of the noise scale, which a short run may not have: the estimate of |G|^2 may be negative."""
TEXTS = {
    "diagnostics/interval/health",
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
                actual = json.load(answer)
            if actual:
                return actual
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
    settings = [x for key, value in flags.items() for x in (f"--{key}", str(value))]
    example("pretrain_lightning.py", folder, "--data", str(library / "argparse.py"), str(library / "ast.py"), *settings)
    return folder / "runs"


FAMILIES = {"health", "memory", "refresh", "rank", "noise", "hessian"}


def fetch(address: str) -> bytes:
    """What a server that has answered before says."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        return answer.read()


def quoted(run: str, tag: str) -> str:
    """The part of an address that names a tag of a run."""
    return urllib.parse.urlencode({"run": run, "tag": tag})


def check_views(address: str) -> set[str]:
    """Every view of the run of a server that has diagnostics shows something; the tags of its scalars."""
    every = ask(f"{address}/plugin/scalars/tags")
    ((run, tags),) = ((k, set(x)) for k, x in every.items() if "health/gradient_norm" in x)
    ours = {t for t in tags if t.startswith((*(f"{f}/" for f in FAMILIES), "diagnostics/"))}
    assert len(ours) <= 60 and {f"diagnostics/share/{f}" for f in FAMILIES} <= ours
    for tag in ours:
        points = ask(f"{address}/plugin/scalars/scalars?{quoted(run, tag)}")
        assert all(math.isfinite(value) for _, _, value in points), tag
    check_charts(address, run)
    images = ask(f"{address}/plugin/images/tags")[run]
    assert set(images) >= IMAGES
    for tag in images:
        last = ask(f"{address}/plugin/images/images?{quoted(run, tag)}&sample=0")[-1]
        check_picture(tag, fetch(f"{address}/plugin/images/individualImage?{last['query']}"))
    texts = {t.removesuffix("/text_summary"): t for t in ask(f"{address}/plugin/text/tags")[run]}
    assert set(texts) >= TEXTS
    for name in TEXTS:
        html = ask(f"{address}/plugin/text/text?{quoted(run, texts[name])}")[-1]["text"]
        assert "nan" not in html and (html.count("<td") > 3 or name.startswith("diagnostics/interval")), name
    return ours


def check_charts(address: str, run: str) -> None:
    """The dashboard has a category for every callback, and no empty chart."""
    dashboard = ask(f"{address}/plugin/custom_scalars/layout")
    assert {c["title"] for c in dashboard["category"]} == FAMILIES | {"diagnostics"}
    for category in dashboard["category"]:
        for chart in category["chart"]:
            assert chart["title"] and chart["multiline"]["tag"]
            for pattern in chart["multiline"]["tag"]:
                actual = ask(f"{address}/plugin/custom_scalars/scalars?{quoted(run, pattern)}")
                lines = actual["tag_to_events"]
                assert actual["regex_valid"] and lines and all(lines.values()), f"{chart['title']} is empty"


def check_picture(tag: str, data: bytes) -> None:
    """There is more in the frame than in the legend: lines, or cells of which not most are missing."""
    picture = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")).astype(int)
    coloured = int((picture.max(-1) - picture.min(-1) > 40).sum())
    missing = int((picture == figures.MISSING).all(-1).sum())
    least = 1.5 * 19 * 3 * len(figures.LINES)  # of a full legend
    assert coloured > max(least, missing), f"{tag}: {coloured} coloured pixels, {missing} of missing values"


def test_an_empty_picture_is_noticed() -> None:
    def written(picture: figures.Picture) -> bytes:
        Image.fromarray(picture).save(file := io.BytesIO(), "PNG")
        return file.getvalue()

    roles = [f"role {i}" for i in range(9)]
    full, none = np.arange(9.0), np.full(9, np.nan)
    for values in (full, none):
        heat = figures.heat_map([values] * 9, "t", rows=roles, columns=roles, across="x", unit="u")
        lines = figures.curves(full, dict.fromkeys(roles, values), "t", across="x", up="y")
        for picture in (heat, lines):
            if values is full:
                check_picture("full", written(picture))
            else:
                with pytest.raises(AssertionError, match="empty"):
                    check_picture("empty", written(picture))


def test_pretraining_fills_every_view(pretrained: Path) -> None:
    with tensorboard(pretrained) as address:
        check_views(address)
    for name in ("rank", "hessian", "refresh"):
        assert list(pretrained.rglob(f"diagnostics/{name}-*.npz")), name


@pytest.mark.slow
def test_fine_tuning_shows_the_same_tags(pretrained: Path, tmp_path: Path) -> None:
    library = Path(sysconfig.get_path("stdlib"))
    flags = {"model": pretrained / "model", "output_dir": tmp_path / "out", "optim": "soap", "max_steps": STEPS}
    flags |= {"gradient_accumulation_steps": BATCHES, "per_device_train_batch_size": 4, "diagnostics": "curvature"}
    flags |= {"use_cpu": True, "eval_strategy": "no", "data": library / "typing.py"}
    example("finetune_hf.py", tmp_path, *(x for key, value in flags.items() for x in (f"--{key}", str(value))))
    with tensorboard(pretrained) as first, tensorboard(tmp_path / "out") as second:
        theirs = check_views(second)
        ours = {t for x in ask(f"{first}/plugin/scalars/tags").values() for t in x if t.partition("/")[0] in FAMILIES}
        shown = [
            {kind: {t for x in ask(f"{a}/plugin/{kind}/tags").values() for t in x} for kind in ("images", "text")}
            for a in (first, second)
        ]
    chance = {"noise/scale_sequences", "noise/scale_tokens", "memory/checkpoint"}
    assert ours - chance == {t for t in theirs if t.partition("/")[0] in FAMILIES} - chance
    assert {t for t in shown[0]["images"] if "noise" not in t} == {t for t in shown[1]["images"] if "noise" not in t}
    assert shown[0]["text"] == {t for t in shown[1]["text"] if t.partition("/")[0] not in ("args", "model_config")}
