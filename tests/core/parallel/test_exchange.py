"""FSDP2 on gloo processes equals one process, whatever a rule needs; a checkpoint outlives the number of ranks."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_optim.core import matrix_views
from lightning_optim.core.rule import REGISTRY, Rule
from lightning_optim.core.state.formats import stored_shape
from tests.helpers import jobs
from tests.helpers.pool import Pool
from tests.helpers.rules import NAMES as ALL_NAMES
from tests.helpers.rules import make, others_slow

pytestmark = pytest.mark.dist
NAMES = [n for n in ALL_NAMES if not REGISTRY[n].needs_all_gradients]  # the others need whole parameters
every_rule = pytest.mark.parametrize("name", others_slow(NAMES))
WHOLE = [n for n in NAMES if not REGISTRY[n].elementwise and not REGISTRY[n].reduces]
STATEFUL = [n for n in WHOLE if REGISTRY[n]().state_specs(5, 12)]
ONE_OF_EACH = ["lion", "adafactor", "muon"]


def straight(
    name: str,
    steps: int,
    dtype: torch.dtype = torch.float32,
    missing: dict[int, str] | None = None,
    shapes: jobs.Shapes | None = None,
    **settings: Any,
) -> jobs.Model:
    """The same run in this process."""
    torch.set_num_threads(1)
    model = jobs.Model(name, dtype, shapes)
    jobs.take_steps(model, make(name, model.parameters(), **settings), range(1, steps + 1), missing)
    torch.set_num_threads(2)
    return model


def compare(name: str, actual: dict[str, Tensor], model: jobs.Model) -> None:
    """Bitwise, but for sums over ranks and torch's fused kernels, which round by an element's place in a vector."""
    rule = REGISTRY[name]
    for key, p in model.named_parameters():
        fused = rule.kernel is not Rule.kernel and p.dtype == torch.float32
        if rule.reduces or fused:
            start = jobs.Model(name, p.dtype, model.shapes).get_parameter(key)
            assert (actual[key] - p).norm() <= 1e-6 * (p - start).norm() + 2e-7 * p.norm(), key
        else:
            assert torch.equal(actual[key], p), f"{key}: {(actual[key] - p).abs().max()}"


@every_rule
def test_two_ranks_equal_one_process(pool: Pool, name: str) -> None:
    results = pool.run("tests.helpers.jobs:train", 2, name=name, steps=12, dtype=torch.float32)
    for actual, _ in results:
        compare(name, actual, straight(name, 12))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_late_and_missing_gradients(pool: Pool, name: str) -> None:
    missing = {1: "odd", 2: "odd", 4: "tall"}
    results = pool.run("tests.helpers.jobs:train", 2, name=name, steps=6, dtype=torch.float32, missing=missing)
    for actual, _ in results:
        compare(name, actual, straight(name, 6, missing=missing))


@pytest.mark.parametrize("name", ["adafactor", "muon", "soap"])
def test_transposed_matrices(pool: Pool, name: str) -> None:
    settings: dict[str, Any] = {"transposed": True}
    for actual, _ in pool.run(
        "tests.helpers.jobs:train", 2, name=name, steps=4, dtype=torch.float32, settings=settings
    ):
        compare(name, actual, straight(name, 4, **settings))


@pytest.mark.parametrize("name", ["adafactor", "lamb"])
def test_convolutions(pool: Pool, name: str) -> None:
    """A stack over the last two dimensions, or one matrix cut by rows; fewer rows than ranks in both."""
    shapes = {"kernel": (7, 2, 3, 3), "line": (5, 3, 4), "single": (1, 2, 3, 3)}
    model = jobs.Model(name, shapes=shapes)
    start = {k: p.detach().clone() for k, p in model.named_parameters()}
    jobs.take_steps(model, make(name, model.parameters()), range(1, 5))
    for actual, _ in pool.run("tests.helpers.jobs:train", 2, name=name, steps=4, dtype=torch.float32, shapes=shapes):
        for key, p in model.named_parameters():
            assert (actual[key] - p).norm() <= 1e-6 * (p - start[key]).norm() + 2e-7 * p.norm(), key


@pytest.mark.parametrize("name", ["adamw", "lion", "muon"])
def test_bfloat16_rounding_draws_the_same_bits_on_any_mesh(pool: Pool, name: str) -> None:
    for actual, _ in pool.run("tests.helpers.jobs:train", 2, name=name, steps=4, dtype=torch.bfloat16):
        compare(name, actual, straight(name, 4, torch.bfloat16))


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_hsdp_replicas_stay_equal(pool: Pool, name: str) -> None:
    for actual, _ in pool.run("tests.helpers.jobs:train", 4, name=name, steps=4, dtype=torch.float32, replicas=2):
        compare(name, actual, straight(name, 4))


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")  # torch, of every load in one process
@every_rule
def test_save_on_two_load_on_one_and_three(pool: Pool, name: str, tmp_path: Path) -> None:
    dtype, folder = torch.float32, str(tmp_path / "checkpoint")
    common = {"name": name, "folder": folder, "steps": 3, "dtype": dtype}
    expected = straight(name, 6)
    for actual in pool.run("tests.helpers.jobs:save", 2, **common):
        compare(name, actual, expected)
    model = jobs.Model(name)
    optimizer = make(name, model.parameters(), lr=77.0)
    torch.set_num_threads(1)
    jobs.load_into(model, optimizer, folder)
    jobs.take_steps(model, optimizer, range(4, 7))
    torch.set_num_threads(2)
    compare(name, jobs.weights(model), expected)
    for actual in pool.run("tests.helpers.jobs:load", 3, **common):
        compare(name, actual, expected)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_bfloat16_checkpoint_on_other_ranks(pool: Pool, name: str, tmp_path: Path) -> None:
    folder = str(tmp_path / "checkpoint")
    common = {"name": name, "folder": folder, "steps": 3, "dtype": torch.bfloat16}
    saved, loaded = pool.run("tests.helpers.jobs:save", 2, **common), pool.run("tests.helpers.jobs:load", 3, **common)
    for key, value in saved[0].items():
        if REGISTRY[name].reduces:
            torch.testing.assert_close(loaded[0][key], value)
        else:
            assert torch.equal(loaded[0][key], value)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_full_state_dict_broadcast_from_rank_0(pool: Pool, name: str) -> None:
    for (actual, shapes), rank in zip(
        pool.run("tests.helpers.jobs:full_state", 2, name=name, steps=3), (0, 1), strict=True
    ):
        compare(name, actual, straight(name, 6))
        if rank == 0:
            slot = next(iter(REGISTRY[name]().state_specs(5, 12)))
            assert f"wide.{slot}" in shapes
            whole = {"muon": (5, 12), "lion": (5, 12), "adafactor": (5, 1)}
            assert shapes[f"wide.{slot}"] == whole[name]


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_flattened_state_dict(pool: Pool, name: str) -> None:
    for actual in pool.run("tests.helpers.jobs:flattened", 2, name=name, steps=3):
        compare(name, actual, straight(name, 6))


def test_elementwise_rules_move_nothing_and_reducing_rules_only_sums(pool: Pool) -> None:
    assert pool.run("tests.helpers.jobs:collectives", 2, name="lion") == [(0, 0)] * 2
    for calls, largest in pool.run("tests.helpers.jobs:collectives", 2, name="adafactor"):
        assert calls > 0 and largest <= 12, "the column sums of the widest matrix, or of two stacked ones"


@pytest.mark.parametrize("name", STATEFUL)
def test_each_matrix_has_one_owner_and_the_checkpoint_is_sharded(pool: Pool, name: str) -> None:
    results = pool.run("tests.helpers.jobs:owners", 2, name=name)
    shapes = {k: tuple(p.shape) for k, p in jobs.Model(name).named_parameters()}
    owned = [set(actual) for actual, _, _ in results]
    assert owned[0] | owned[1] == set(shapes)
    assert not owned[0] & owned[1]
    assert owned[0] and owned[1]
    for actual, parts, tight in results:
        for key, content in actual.items():
            dims = matrix_views.stack_shape(shapes[key])
            slots = REGISTRY[name]().state_specs(*dims[1:], vector=len(shapes[key]) < 2)
            assert content == {k: stored_shape(slot, shapes[key], dims) for k, slot in slots.items()}
        assert all(sharded == (slot != "step") for slots in parts.values() for slot, (_, sharded) in slots.items())
        assert tight, "a saved shard owns exactly its storage"


@pytest.mark.parametrize("name", WHOLE)
def test_ranks_that_disagree_raise_together(pool: Pool, name: str) -> None:
    for message, same, actual in pool.run("tests.helpers.jobs:disagree", 2, name=name):
        assert "disagree" in message
        assert same
        compare(name, actual, straight(name, 4))


@pytest.mark.parametrize("name", ["adafactor", "muon"])
def test_a_nan_on_one_rank_is_agreed_by_all(pool: Pool, name: str) -> None:
    (first, same, *_), (second, also, *_) = pool.run("tests.helpers.jobs:not_finite", 2, name=name)
    assert "parameter 0" in first
    assert "another rank" in second
    assert same and also


@pytest.mark.parametrize("name", ["muon", "soap", "galore"])
def test_state_dict_on_one_rank_raises(pool: Pool, name: str) -> None:
    (first, saved), (second, also) = pool.run("tests.helpers.jobs:lonely_state_dict", 2, name=name)
    assert "collective" in first and second == ""
    assert saved == also == len(list(jobs.Model(name).parameters())), "the next call on all ranks works"


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_freezing_on_a_mesh(pool: Pool, name: str) -> None:
    model = jobs.Model(name)
    optimizer = make(name, model.parameters())
    jobs.take_steps(model, optimizer, range(1, 6), {3: "odd"})
    for actual in pool.run("tests.helpers.jobs:frozen", 2, name=name):
        compare(name, actual, model)


@pytest.mark.parametrize("name", ONE_OF_EACH)
def test_state_is_spread_over_ranks(pool: Pool, name: str) -> None:
    """Together the ranks hold the declared bytes, beside one step count per parameter and rank."""
    model = straight(name, 1)
    optimizer = make(name, model.parameters())
    jobs.take_steps(model, optimizer, range(1, 2))
    declared = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    content = sum(size for _, size in pool.run("tests.helpers.jobs:train", 2, name=name, steps=1, dtype=torch.float32))
    replicated = sum(4 * math.prod(s[1:]) for s in jobs.SHAPES.values() if len(s) == 2) if name == "adafactor" else 0
    assert content == declared + 8 * len(list(model.parameters())) + replicated
