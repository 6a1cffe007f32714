"""Every layout of parameters over ranks gives the trajectory of one process, and costs what `plan` says."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lightning_optim.build.mesh_estimate import MeshEstimate
from lightning_optim.build.plan import plan
from lightning_optim.core.rule import REGISTRY
from tests.core.parallel.test_exchange import compare, straight
from tests.helpers import jobs
from tests.helpers.pool import Pool
from tests.helpers.rules import KINDS, NAMES, make

pytestmark = pytest.mark.dist
MESHES = [
    pytest.param(layout, world, marks=pytest.mark.slow if layout in ("ddp", "hsdp", "mixed") else ())
    for layout, world in jobs.LAYOUTS.items()
]
PRODUCT = [
    *(("ddp", 2), ("shared", 2), ("shared", 4), ("fsdp2", 2), ("fsdp2", 4), ("hsdp", 4)),
    *(("tp", 3), ("tp", 4), ("fsdp2+tp", 4), ("mixed", 3)),
]
SETTINGS: list[dict[str, Any]] = [{}, {"transposed": True}, {"state_storage": "bf16"}, {"lr_convention": "adamw"}]


def check(pool: Pool, layout: str, world: int, steps: int, every: list[str] = NAMES, **kwargs: Any) -> None:
    """Rules equal one process, unless they refuse the mesh by name."""
    settings, dtype = kwargs.get("settings", {}), kwargs.get("dtype", torch.float32)
    for start in range(0, len(every), 8):  # jobs of seconds: the pool takes one of minutes for one that hangs
        names = every[start : start + 8]
        results = pool.run("tests.helpers.jobs:laid_out", world, layout=layout, names=names, steps=steps, **kwargs)
        for name in names:
            expected = straight(name, steps, dtype, kwargs.get("missing"), **settings)
            for actual in results:
                if isinstance(actual[name], str):
                    assert "parameter 0" in actual[name], "it names what cannot be"
                    assert REGISTRY[name].needs_all_gradients or "8 bits" in actual[name], actual[name]
                else:
                    compare(name, actual[name], expected)


@pytest.mark.parametrize(("layout", "world"), MESHES)
def test_rules_on_every_layout_equal_one_process(pool: Pool, layout: str, world: int) -> None:
    """All of them under FSDP2, one of each kind in the others; all in all of them is `test_the_full_product`."""
    check(pool, layout, world, 12, NAMES if layout == "fsdp2" else KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize(("layout", "world"), PRODUCT)
def test_the_full_product(pool: Pool, layout: str, world: int, settings: dict[str, Any], dtype: torch.dtype) -> None:
    check(pool, layout, world, 12, settings=settings, dtype=dtype, missing={1: "odd", 4: "tall"})


@pytest.mark.parametrize("name", [name for name in NAMES if REGISTRY[name].reduces])
def test_a_rank_may_have_no_columns(pool: Pool, name: str) -> None:
    """Five columns, or a matrix's only one, over four ranks: an operation that needs one would end that rank alone."""
    settings: dict[str, Any] = {"transposed": True}
    job: dict[str, Any] = {"layout": "fsdp2", "names": [name], "steps": 3, "settings": settings}
    for actual in pool.run("tests.helpers.jobs:laid_out", 4, **job):
        compare(name, actual[name], straight(name, 3, **settings))


FEW: jobs.Shapes = {
    "one": (1, 16),
    "two": (2, 16),
    "three": (3, 16),
    "six": (6, 16),
    "narrow": (16, 2),
    "line": (16, 1),
    "experts": (2, 4, 3),
    "expert": (1, 4, 3),
    "flat": (3, 1, 5),
    "pair": (2,),
}
"""LoRA of small rank, heads of few labels, fewer experts than ranks: a rank has no rows, no columns, or nothing."""
CODED: dict[str, Any] = {"state_storage": "int8", "storage_min": 1, "storage_block": 16}


@pytest.mark.parametrize(
    ("layout", "world", "settings"),
    [
        pytest.param(layout, world, settings, marks=() if i == j == 0 else pytest.mark.slow)
        for i, (layout, world) in enumerate([("fsdp2", 3), ("tp", 4), ("fsdp2+tp", 4)])
        for j, settings in enumerate([
            {"lr_convention": "adamw"},
            {"transposed": True},
            {"uw_floor": 0.1, "uw_floor_by": "row"},
        ])
    ],
)
def test_fewer_rows_than_ranks(pool: Pool, layout: str, world: int, settings: dict[str, Any]) -> None:
    names = [name for name in NAMES if REGISTRY[name].reduces]
    job: dict[str, Any] = {"layout": layout, "names": names, "steps": 4, "settings": settings, "shapes": FEW}
    results = pool.run("tests.helpers.jobs:laid_out", world, **job)
    for name in names:
        expected = straight(name, 4, shapes=FEW, **settings)
        for actual in results:
            compare(name, actual[name], expected)


DIVIDED: jobs.Shapes = {key: jobs.SHAPES[key] for key in ("odd", "wide", "tall", "vector")}
"""Cuts between ranks run through blocks of 16 elements."""


@pytest.mark.parametrize("shapes", [{key: FEW[key] for key in ("one", "two", "three", "six")}, DIVIDED], ids=str)
def test_8_bit_state_is_that_of_one_process(pool: Pool, shapes: jobs.Shapes) -> None:
    """With fewer rows than ranks, where blocks of scales are rows, and with blocks that are divided between ranks."""
    names = [name for name in NAMES if REGISTRY[name].reduces or REGISTRY[name].elementwise]
    job: dict[str, Any] = {"layout": "fsdp2", "names": names, "steps": 4, "settings": CODED, "shapes": shapes}
    results = pool.run("tests.helpers.jobs:laid_out", 3, **job)
    for name in names:
        expected = straight(name, 4, shapes=shapes, **CODED)
        for actual in results:
            compare(name, actual[name], expected)


CHAIN = [("fsdp2+tp", 4, "shared", 2), ("tp", 2, "fsdp2", 3), ("shared", 3, "tp", 2), ("hsdp", 4, "fsdp2+tp", 4)]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # torch, of every load in one process
@pytest.mark.parametrize(
    "name", ["adafactor", "soap", *(pytest.param(x, marks=pytest.mark.slow) for x in ("lion", "muon"))]
)
@pytest.mark.parametrize(("layout", "world", "other", "ranks"), CHAIN)
def test_a_checkpoint_goes_on_under_another_strategy(
    pool: Pool, tmp_path: Path, name: str, layout: str, world: int, other: str, ranks: int
) -> None:
    folder = str(tmp_path / "checkpoint")
    common: dict[str, Any] = {"name": name, "folder": folder, "steps": 3, "dtype": torch.float32}
    expected = straight(name, 6)
    for actual in pool.run("tests.helpers.jobs:save", world, layout=layout, **common):
        compare(name, actual, expected)
    for actual in pool.run("tests.helpers.jobs:load", ranks, layout=other, **common):
        compare(name, actual, expected)
    model = jobs.Model(name)
    optimizer = make(name, model.parameters(), lr=77.0)
    jobs.load_into(model, optimizer, folder)
    jobs.take_steps(model, optimizer, range(4, 7))
    compare(name, jobs.weights(model), expected)


QUANTIZED_DTYPES: dict[str, Any] = {"state_storage": "int8", "storage_min": 1, "storage_block": 16}
PRICED: list[tuple[str, dict[str, Any]]] = [
    ("muon", {}),
    ("soap", {}),
    ("shampoo", {"weight_decay": 0.1}),
    ("muon", {"comm_dtype": "bf16"}),
    ("lion", QUANTIZED_DTYPES),
    ("muon", QUANTIZED_DTYPES),
    ("adafactor", {}),
    ("adam_mini", {}),
    ("lion", {"param_rounding": "kahan"}),
    ("muon", {"constraint": "hyperball"}),
    ("soap", {"averaging": {"tail_ema": {}}}),
]


@pytest.mark.parametrize(("layout", "world"), [("ddp", 2), ("shared", 3), ("fsdp2", 2), ("fsdp2", 3), ("hsdp", 4)])
def test_plan_prices_what_every_rank_holds_and_sends(pool: Pool, layout: str, world: int) -> None:
    cases = [(name, settings, dtype) for name, settings in PRICED for dtype in (torch.float32, torch.bfloat16)]
    for results in pool.run("tests.helpers.jobs:priced", world, layout=layout, cases=cases):
        for case, (content, record, sent, price) in zip(cases, results, strict=True):
            assert (content, sent) == (record, price), case


@pytest.mark.parametrize(("layout", "world"), [("fsdp2", 3), ("shared", 2)])
def test_groups_that_differ_are_told_on_every_rank(pool: Pool, layout: str, world: int) -> None:
    results = pool.run("tests.helpers.jobs:groups_differ", world, layout=layout)
    for message, same in results:
        assert "param groups differ between ranks" in message and same
    assert "0.03" in results[1][0] and "0.02" in results[1][0]


@pytest.mark.parametrize(("layout", "world"), [("tp", 2), ("fsdp2+tp", 4), ("shared", 3), ("mixed", 2)])
def test_ranks_raise_together(pool: Pool, layout: str, world: int) -> None:
    """A gradient that one rank lacks, and a NaN that only one can see."""
    for message, same, actual in pool.run("tests.helpers.jobs:disagree", world, name="muon", layout=layout):
        assert "disagree" in message and same
        compare("muon", actual, straight("muon", 4))
    (first, same), *others = pool.run("tests.helpers.jobs:not_finite", world, name="muon", layout=layout)
    assert "parameter 0" in first and same
    assert all("not finite" in message and also for message, also in others)
    assert any("another rank" in message for message, _ in others)


@pytest.mark.parametrize("name", ["muon", "adamw", "adafactor"])
@pytest.mark.parametrize(("layout", "world"), [("shared", 3), ("fsdp2", 2), ("ddp", 2)])
def test_a_resized_parameter_is_told_on_every_rank(pool: Pool, layout: str, world: int, name: str) -> None:
    actual = pool.run("tests.helpers.jobs:resized", world, name=name, layout=layout)
    for messages, same, after in actual:
        assert len(messages) == 2 and same
        assert all("has shape (9, 5)" in m and "has (7, " in m and "expected (9, " in m for m in messages), messages
        assert all(torch.equal(after[k], actual[0][2][k]) for k in after)


@pytest.mark.parametrize("name", ["muon", "soap"])
def test_shared_work_is_collected_before_one_rank_saves(pool: Pool, name: str) -> None:
    expected = straight(name, 6)
    state = make(name, (model := jobs.Model(name)).parameters())
    jobs.take_steps(model, state, range(1, 2))
    declared = sum(t.nbytes for s in state.state.values() for k, t in s.items() if k != "step")
    (_, first, actual), (messages, second, also) = pool.run("tests.helpers.jobs:consolidated", 2, name=name)
    assert all("consolidate()" in message for message in messages)
    assert first + second == declared and first and second
    compare(name, actual, expected)
    compare(name, also, expected)


@pytest.mark.parametrize(("layout", "world", "share"), [("fsdp2", 2, 0.5), ("shared", 2, 0.5)])
def test_narrow_communication(pool: Pool, layout: str, world: int, share: float) -> None:
    """Half the bytes; what bfloat16 rounds of a gradient, 2^-9, grows by the matrix's condition (measured: 2 %)."""
    cases = [("muon", {}, torch.float32)]
    exact = [sent for [(_, _, sent, _)] in pool.run("tests.helpers.jobs:priced", world, layout=layout, cases=cases)]
    results = pool.run("tests.helpers.jobs:narrow_communication", world, layout=layout)
    expected = straight("muon", 4)
    start = jobs.Model("muon")
    for (actual, sent), full in zip(results, exact, strict=True):
        assert sent == full * share
        assert all(torch.equal(results[0][0][k], v) for k, v in actual.items())
        off = {k: (actual[k] - p).norm() / (p - start.get_parameter(k)).norm() for k, p in expected.named_parameters()}
        assert 0 < max(off.values()) <= 0.05, off  # a direction may have been of bfloat16's precision before


@pytest.mark.parametrize(("offload", "reduce_dtype"), [(True, None), (False, torch.float64)])
def test_offloaded_parameters_and_another_dtype_of_sums(
    pool: Pool, offload: bool, reduce_dtype: torch.dtype | None
) -> None:
    model = jobs.Deep()
    optimizer = jobs.build_optimizer(model, "muon", lr=1e-2, ns_dtype="float32")
    for t in range(4):
        model(jobs.batch(t)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for actual in pool.run("tests.helpers.jobs:trained_by_loss", 2, offload=offload, reduce_dtype=reduce_dtype):
        for key, p in model.named_parameters():
            torch.testing.assert_close(actual[key], p.detach(), rtol=1e-4, atol=1e-5)


def test_dion_sends_its_factors_and_follows_the_mean_gradient(pool: Pool) -> None:
    """Equal to Dion on reduced gradients but for the order of sums; `(m + n) rank` numbers travel for each matrix."""
    model = jobs.Deep()
    optimizer = jobs.build_optimizer(model, "dion", lr=1e-2, rest="lion")
    for t in range(5):
        model(jobs.batch(t)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    low, rest = 0, 0
    for group in optimizer.param_groups:
        for p in group["params"]:
            low += 4 * sum(p.shape) * min(p.shape) if group["rule"] == "dion" else 0
            rest += 4 * p.numel() if group["rule"] != "dion" else 0
    for actual, sent, record in pool.run("tests.helpers.jobs:compressed", 2, name="dion", steps=5):
        assert "consolidate()" in record
        assert sent == low + rest
        for key, p in model.named_parameters():
            torch.testing.assert_close(actual[key], p.detach(), rtol=1e-4, atol=1e-5)


def test_signum_votes_with_one_byte_per_weight(pool: Pool) -> None:
    """Alg. 3 of arXiv:1802.04434, written down; momenta become their mean where a checkpoint is made."""
    model, world = jobs.Deep(), 3
    momenta = [{k: torch.zeros_like(p) for k, p in model.named_parameters()} for _ in range(world)]
    for t in range(5):
        for rank in range(world):
            loss = model(jobs.batch(t).chunk(world)[rank]).square().mean()
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            for k, g in zip(momenta[rank], gradients, strict=True):
                momenta[rank][k].mul_(0.9).add_(g, alpha=1 - 0.9)
        for k, p in model.named_parameters():
            votes = torch.stack([m[k].sign() for m in momenta]).sum(0)
            p.data -= 1e-2 * 0.2 * votes.sign()
        if t == 1:
            for k in momenta[0]:
                mean = torch.stack([m[k] for m in momenta]).mean(0)
                momenta = [{**m, k: mean.clone()} for m in momenta]
    size = sum(p.numel() for p in model.parameters())
    for actual, sent, _ in pool.run("tests.helpers.jobs:compressed", world, name="signum", steps=5):
        assert sent == size, "one byte each"
        for key, p in model.named_parameters():
            torch.testing.assert_close(actual[key], p.detach(), rtol=1e-6, atol=1e-6)


def test_compress_says_what_it_needs() -> None:
    model = torch.nn.Linear(4, 4)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        jobs.build_optimizer(model, "dion", lr=1e-3).compress(model)
    with pytest.raises(ValueError, match="clip_norm"):
        jobs.build_optimizer(model, "signum", lr=1e-3, clip_norm=1.0).compress(model)


class Large(torch.nn.Module):
    """The matrices of a LLaMA of 70 billion weights."""

    def __init__(self) -> None:
        super().__init__()
        for layer in range(80):
            shapes = {"q": (8192, 8192), "k": (1024, 8192), "v": (1024, 8192), "o": (8192, 8192)}
            shapes |= {"gate": (28672, 8192), "up": (28672, 8192), "down": (8192, 28672)}
            for key, shape in shapes.items():
                setattr(self, f"{key}{layer}", torch.nn.Linear(shape[1], shape[0], bias=False))
        self.embedding = torch.nn.Embedding(128256, 8192)


@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp"])
def test_plan_of_seventy_billion_weights_on_512_ranks(strategy: Any) -> None:
    started = time.perf_counter()
    with torch.device("meta"):
        model = Large()
    made = plan(model, "muon", world_size=512, strategy=strategy)
    assert time.perf_counter() - started < 60
    actual = made.mesh
    assert isinstance(actual, MeshEstimate)
    mean = sum(actual.work) / len(actual.work)
    assert max(actual.work) <= 1.05 * max(mean, actual.largest)
    assert sum(actual.state) - 8 * len(made.rows) * (len(actual.state) - 1) == made.state_bytes
    assert "at most" in str(made) and "busiest of" in str(made)


def test_plan_refuses_ranks_that_make_no_nodes() -> None:
    with pytest.raises(ValueError, match="12 ranks are not a multiple"):
        plan(torch.nn.Linear(4, 4), "muon", world_size=12, strategy="hsdp")


def test_work_is_not_shared_out_late() -> None:
    p = Parameter(torch.ones(3, 4))
    optimizer = make("muon", [p])
    p.grad = torch.ones(3, 4)
    optimizer.step()
    with pytest.raises(ValueError, match="before the first step"):
        optimizer.shard_work()
