"""A rule sees values where codes are stored: loaded, changed and stored again, whole or by blocks."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor

from lightning_optim.core.rule import zeros
from lightning_optim.core.state.formats import StateFormat, format_of
from lightning_optim.core.state.quantized_view import (
    ElementIndex,
    QuantizedView,
    convert,
    dequantize,
    no_index,
    num_scales,
    offset,
    scales_at,
)

BLOCK = 16
CPU = torch.device("cpu")


def format_for(shape: tuple[int, int], storage: str, *, nonnegative: bool = False) -> StateFormat:
    group = {"state_storage": storage, "storage_block": BLOCK, "storage_min": 1}
    return format_of(zeros("mn", nonnegative=nonnegative), shape, (1, *shape), torch.float32, group)


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def view_of(fmt: StateFormat, *, start: int = 0, key: int = 1, rows: int | None = None) -> QuantizedView:
    """A view of new memory; of some rows, where given."""
    part = torch.zeros(fmt.shape if rows is None else (rows, fmt.shape[1]), dtype=fmt.dtype)
    scale = torch.zeros(num_scales(fmt, part, start)) if fmt.is_quantized else None
    return QuantizedView(fmt, part, scale, start=start, key=key, device=CPU, param=None)


@pytest.mark.parametrize("start", [0, 5, 16, 30])
@pytest.mark.parametrize("storage", ["int8", "int8_grid", "fp8"])
@pytest.mark.parametrize("nonnegative", [True, False])
def test_values_come_back_and_stored_again_they_stay(storage: str, nonnegative: bool, start: int) -> None:
    x = drawn(9, 7).square() if nonnegative else drawn(9, 7)
    view = view_of(format_for((9, 7), storage, nonnegative=nonnegative), start=start)
    view.store_all(x)
    loaded = view.load(view.part)
    assert loaded.dtype == torch.float32 and ((loaded - x).abs() <= 0.04 * x.abs().max()).all()
    assert not nonnegative or (loaded > 0).all()
    if storage != "fp8" and not nonnegative:  # the least value is -0.993 of the scale
        return
    codes = view.part.clone()
    view.store_all(loaded)
    torch.testing.assert_close(view.load(view.part), loaded, rtol=1e-5, atol=1e-6)
    assert torch.equal(view.part, codes)


@pytest.mark.parametrize("start", [0, 5, 16])
def test_blocks_are_loaded_and_stored_as_in_the_whole(start: int) -> None:
    x, fmt = drawn(12, 8), format_for((12, 8), "int8")
    whole, pieces = view_of(fmt, start=start), view_of(fmt, start=start)
    whole.store_all(x)
    first = -start % BLOCK
    for at, end in [(0, first), (first, first + BLOCK), (first + BLOCK, 96)]:
        if end > at:
            pieces.store(pieces.part.view(-1)[at:end], x.view(-1)[at:end], no_index, at)
    assert torch.equal(pieces.part, whole.part)
    assert whole.scale is not None and pieces.scale is not None and torch.equal(pieces.scale, whole.scale)
    for at, end in [(0, 96), (first, 90), (first + BLOCK, first + BLOCK + 3), (7, 11)]:
        assert torch.equal(whole.load(whole.part.view(-1)[at:end], at), whole.load(whole.part).view(-1)[at:end])
        scale = scales_at(fmt, whole.scale, start, at, end - at)
        blocks = [start // BLOCK, (start + at) // BLOCK, (start + end - 1) // BLOCK]
        assert scale is not None and torch.equal(scale, whole.scale[blocks[1] - blocks[0] : blocks[2] - blocks[0] + 1])
    found = scales_at(fmt, whole.scale, start, first, BLOCK)
    assert found is not None
    found.fill_(9.0)
    assert whole.scale[(start + first) // BLOCK - start // BLOCK] == 9
    assert scales_at(fmt, None, start, 0, 96) is None


def test_bfloat16_state_is_rounded_by_its_key_and_place_alone() -> None:
    x, fmt = drawn(40, 30), format_for((40, 30), "bf16")
    one, same, other = view_of(fmt, key=1), view_of(fmt, key=1), view_of(fmt, key=2)
    for view in (one, other):
        view.store_all(x)
    where = ElementIndex(same.part)
    for rows in (slice(0, 7), slice(7, 40)):
        block = same.part[rows]
        index = functools.partial(where, block, rows, [])
        same.store(block, x[rows], index, offset(block, rows))
    assert torch.equal(same.part, one.part) and not torch.equal(other.part, one.part)
    assert (one.load(one.part) - x).abs().max() < x.abs().max() * 2.0**-7
    with pytest.raises(AssertionError, match="only rounding to bfloat16 asks for indices"):
        one.store(one.part, x, no_index)


def test_state_is_converted_between_formats() -> None:
    x, fine, narrow = drawn(9, 7), format_for((9, 7), "fp32"), format_for((9, 7), "int8")
    view = view_of(narrow)
    convert(narrow, x, None, view.part, view.scale, 0)
    back = torch.empty(9, 7)
    convert(fine, view.part, view.scale, back, None, 0)
    assert torch.equal(back, dequantize(narrow, view.part, view.scale, 0, CPU))
    assert (back - x).abs().max() < 0.04 * x.abs().max()
    before, wrong = back.clone(), torch.ones(2)
    with pytest.raises(RuntimeError, match="quantized in other blocks than storage_block says"):
        convert(fine, view.part, wrong, back, None, 0)
    assert torch.equal(back, before)
