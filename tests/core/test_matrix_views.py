"""Fused layers move as the matrices in them do, whatever their sizes and the order of their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core import matrix_views
from tests.helpers import jobs
from tests.helpers.pool import Pool
from tests.helpers.rules import gradient, make

# blocks, how the fused rows are made of those of the matrices
LAYOUTS: dict[str, tuple[Any, list[list[int]]]] = {
    "unequal": ((8, 4, 4), [[*range(8)], [*range(8, 12)], [*range(12, 16)]]),
    "apart": ((4, 8, 4), [[*range(4)], [*range(4, 12)], [*range(12, 16)]]),
    "interleaved heads": (
        (2, 2, 2),
        [[h * 6 + part * 2 + i for h in range(3) for i in range(2)] for part in range(3)],
    ),
    "alternate rows": ((1, 1), [[*range(0, 12, 2)], [*range(1, 12, 2)]]),
    "grouped queries": (
        (4, 2, 2),
        [
            [g * 8 + i for g in range(2) for i in range(4)],
            [g * 8 + 4 + i for g in range(2) for i in range(2)],
            [g * 8 + 6 + i for g in range(2) for i in range(2)],
        ],
    ),
    "heads apart, values by row": (
        ((2, 3), (1, 2)),
        [[g * 8 + i for i in rows] for g in range(2) for rows in ([0, 1], [2, 3], [4, 5], [6], [7])],
    ),
}


def fused(layout: str, shape: str) -> tuple[Parameter, bool]:
    """A fused parameter, and whether it is stored inputs x outputs."""
    rows = sum(map(len, LAYOUTS[layout][1]))
    made = torch.Generator().manual_seed(1)
    sizes = {"matrix": (rows, 5), "transposed": (5, rows), "experts": (3, rows, 5), "transposed experts": (3, 5, rows)}
    return Parameter(torch.randn(sizes[shape], generator=made)), "transposed" in shape


def split(t: Tensor, layout: str, transposed: bool) -> list[Tensor]:
    """The matrices in a fused tensor."""
    t = t.mT if transposed else t
    return [t[..., rows, :].contiguous() for rows in LAYOUTS[layout][1]]


@pytest.mark.parametrize("name", ["muon", "soap", "adam_mini"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", ["matrix", "transposed", "experts", "transposed experts"])
def test_a_fused_parameter_moves_as_its_matrices(name: str, layout: str, shape: str) -> None:
    """Also through a checkpoint, and with the scale of the adamw convention, which depends on a matrix's shape."""
    p, transposed = fused(layout, shape)
    alone = [Parameter(x) for x in split(p.detach(), layout, transposed)]
    common: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "lr_convention": "adamw"}
    common |= {"refresh": "fixed:2"} if name == "soap" else {}  # the default refreshes each parameter in another step
    one = make(name, [p], blocks=LAYOUTS[layout][0], transposed=transposed, **common)
    many = make(name, alone, **common)
    for t in range(1, 6):
        p.grad = gradient(p, "fused", t)
        for x, g in zip(alone, split(p.grad, layout, transposed), strict=True):
            x.grad = g
        one.step()
        many.step()
        if t == 3:
            saved = one.state_dict()
            one = make(name, [p], lr=7.0, blocks=LAYOUTS[layout][0], transposed=transposed)
            one.load_state_dict(saved)
    for x, actual in zip(alone, split(p.detach(), layout, transposed), strict=True):
        torch.testing.assert_close(actual, x.detach(), rtol=1e-5, atol=1e-6)
    sizes = [sum(t.numel() for k, t in s.items() if k != "step") for s in many.state.values()]
    assert sum(t.numel() for k, t in one.state[p].items() if k != "step") == sum(sizes)


def test_parts_cover_every_element_once() -> None:
    for blocks, _ in LAYOUTS.values():
        for shape, turned in (((48, 5), False), ((3, 5, 48), True)):
            t = torch.zeros(shape)
            for part in matrix_views.split_blocks(shape, blocks, transposed=turned):
                view = part.view_of(t, turned)
                view += 1
                assert view.reshape(part.dims).shape == part.dims
            assert t.eq(1).all()
    assert matrix_views.split_blocks((12, 5), (4, 4, 4)) == matrix_views.split_blocks((12, 5), 3)


def test_rows_that_do_not_divide_and_meshes_that_cannot() -> None:
    with pytest.raises(ValueError, match=r"12 rows of shape \(12, 5\) do not divide into blocks of \(5, 2\) rows"):
        make("muon", [Parameter(torch.randn(12, 5))], blocks=(5, 2))
    with pytest.raises(ValueError, match="do not divide into blocks"):
        make("muon", [Parameter(torch.randn(12, 5, 2, 2))], blocks=(8, 4))
    with pytest.raises(ValueError, match="blocks must be a positive integer or several"):
        make("muon", [Parameter(torch.randn(12, 5))], blocks=(12, 0))
    assert make("muon", [Parameter(torch.randn(12, 5))], blocks=[8, 2, 2]).param_groups[0]["blocks"] == (8, 2, 2)
    apart = make("muon", [Parameter(torch.randn(12, 5))], blocks=[[4, 2], [1, 4]])
    assert apart.param_groups[0]["blocks"] == ((4, 2), (1, 4))
    with pytest.raises(ValueError, match="blocks must be a positive integer or several"):
        make("muon", [Parameter(torch.randn(12, 5))], blocks=((4, 2), (1, 0)))
    with pytest.raises(ValueError, match="must be"):
        make("muon", [Parameter(torch.randn(12, 5))], blocks=((4, 2, 1), (1, 4)))


@pytest.mark.parametrize("policy", ["staggered:3", "off_diagonal:0.1", "warmup_dense"])
def test_one_decision_refreshes_all_matrices_of_a_parameter(policy: str) -> None:
    p, _ = fused("unequal", "matrix")
    optimizer = make("soap", [p], blocks=(8, 4, 4), refresh=policy)
    events: list[tuple[int, int]] = []
    optimizer.on_refresh = lambda event: events.append((event.t, event.age))
    for t in range(1, 13):
        p.grad = gradient(p, "fused", t)
        optimizer.step()
    by_step = {t: [age for at, age in events if at == t] for t, _ in events}
    assert len(by_step) > 2 and all(len(ages) == 2 and len(set(ages)) == 1 for ages in by_step.values())
    assert {"refreshed", "refreshed.1"} <= set(optimizer.state[p])


class Fused(nn.Module):
    """Fused parameters without a forward pass."""

    def __init__(self) -> None:
        super().__init__()
        made = torch.Generator().manual_seed(0)
        self.unequal = Parameter(torch.randn(16, 5, generator=made))
        self.again = Parameter(torch.randn(16, 5, generator=made))
        self.heads = Parameter(torch.randn(16, 5, generator=made))


def built(name: str, world: int) -> tuple[Any, RuleOptimizer]:
    model = Fused()
    if world > 1:
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    groups = [
        {"params": [model.unequal], "rule": name, "blocks": (8, 4, 4)},
        {"params": [model.again], "rule": name, "blocks": (2, 2), "name": "interleaved"},
        {"params": [model.heads], "rule": name, "blocks": ((2, 2), (1, 4)), "name": "heads"},
    ]
    return model, RuleOptimizer(groups)


def train_and_save(rank: int, world: int, name: str, folder: str) -> dict[str, Tensor]:
    """Three steps, a checkpoint, three more."""
    model, optimizer = built(name, world)
    jobs.take_steps(model, optimizer, range(1, 4))
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    state_dict_saver.save(state, checkpoint_id=folder)
    jobs.take_steps(model, optimizer, range(4, 7))
    return jobs.weights(model)


def load_and_train(rank: int, world: int, name: str, folder: str) -> dict[str, Tensor]:
    """Go on from a checkpoint."""
    model, optimizer = built(name, world)
    state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
    state_dict_loader.load(state, checkpoint_id=folder)
    model.load_state_dict(state["model"])
    set_optimizer_state_dict(model, optimizer, state["optim"])
    jobs.take_steps(model, optimizer, range(4, 7))
    return jobs.weights(model)


@pytest.mark.dist
@pytest.mark.parametrize("name", ["muon", "soap", "adam_mini"])  # the last one's matrices travel where blocks are cut
def test_on_any_number_of_ranks(pool: Pool, name: str, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    model, optimizer = built(name, 1)
    jobs.take_steps(model, optimizer, range(1, 7))
    torch.set_num_threads(2)
    expected = jobs.weights(model)
    folder = str(tmp_path)
    saved = pool.run("tests.core.test_matrix_views:train_and_save", 2, name=name, folder=folder)
    for actual in [*saved, *pool.run("tests.core.test_matrix_views:load_and_train", 3, name=name, folder=folder)]:
        for key in expected:
            assert torch.equal(actual[key], expected[key]), key


@pytest.mark.parametrize("blocks", [-4, (-1,) * 4, (-3, -5), (-8, -2, -2)])
@pytest.mark.parametrize("transposed", [False, True])
def test_blocks_of_columns_are_those_of_rows_of_the_transpose(blocks: Any, transposed: bool) -> None:
    """Every element is in one matrix, as the rows of the transposed parameter are."""
    columns = 8 if blocks == (-3, -5) else 12
    p = torch.arange(2.0 * 5 * columns).view((2, columns, 5) if transposed else (2, 5, columns))
    positive = tuple(-x for x in blocks) if isinstance(blocks, tuple) else -blocks
    by_columns = matrix_views.split_blocks(tuple(p.shape), blocks, transposed=transposed)
    by_rows = matrix_views.split_blocks(tuple(p.shape), positive, transposed=not transposed)
    for x, y in zip(by_columns, by_rows, strict=True):
        (b, m, n), (_, rows, width) = x.dims, y.dims
        assert (m, n) == (width, rows)
        view, other = x.view_of(p, transposed), y.view_of(p, not transposed)
        assert torch.equal(view.reshape(b, m, n), other.reshape(b, n, m).mT)
        assert view.untyped_storage().data_ptr() == p.untyped_storage().data_ptr()


def test_columns_that_do_not_divide() -> None:
    for blocks in (-5, (-5, -2)):
        with pytest.raises(ValueError, match="12 columns"):
            matrix_views.split_blocks((4, 12), blocks)
    assert matrix_views.are_valid(None) and matrix_views.are_valid((-1, -1))
    assert not any(map(matrix_views.are_valid, (0, (0, 1), (1, -1), (), ((2, -1), (1, 1)))))
