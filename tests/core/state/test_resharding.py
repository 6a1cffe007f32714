"""Scales in a checkpoint are a table by rows, which any number of ranks can cut and put together."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_optim.core.rule import zeros
from lightning_optim.core.state.formats import StateFormat, format_of
from lightning_optim.core.state.quantized_view import dequantize, encode, num_scales
from lightning_optim.core.state.resharding import scales_of, table_of, table_shape

CPU = torch.device("cpu")
SHAPES = [(12, 5), (7, 16), (5, 32), (6, 40), (4, 3), (9, 1)]
"""Rows shorter than a block of 16, of one and two blocks, of two and a half; vectors have rows of one element."""


def format_for(shape: tuple[int, int], storage: str = "int8") -> StateFormat:
    group = {"state_storage": storage, "storage_block": 16, "storage_min": 1}
    return format_of(zeros("mn"), shape, (1, *shape), torch.float32, group)


def encoded(fmt: StateFormat, x: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of consecutive rows."""
    codes = torch.empty(x.shape, dtype=fmt.dtype)
    scale = torch.empty(num_scales(fmt, codes, start))
    encode(fmt, x.reshape(-1), codes.view(-1), scale, start)
    return codes, scale


def drawn(shape: tuple[int, int]) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_scales_come_back_from_their_table(shape: tuple[int, int], storage: str) -> None:
    fmt = format_for(shape, storage)
    codes, scale = encoded(fmt, drawn(shape), 0)
    table, kept = table_of(fmt, scale, shape[0], 0), codes.clone()
    assert table.shape == table_shape(fmt)
    for i in range(shape[0]):  # a row's entries are the scales of the blocks that it touches, in order
        blocks = range(i * shape[1] // 16, ((i + 1) * shape[1] - 1) // 16 + 1)
        assert table[i, : len(blocks)].tolist() == scale[list(blocks)].tolist()
    assert torch.equal(scales_of(fmt, table, codes, 0), scale) and torch.equal(codes, kept)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_any_rows_of_the_table_are_that_of_these_rows(shape: tuple[int, int]) -> None:
    fmt = format_for(shape)
    codes, scale = encoded(fmt, drawn(shape), 0)
    table = table_of(fmt, scale, shape[0], 0)
    for first, end in [(0, 1), (1, 3), (2, shape[0]), (3, 3)]:
        start, some = first * shape[1], codes[first:end].clone()
        found = scales_of(fmt, table[first:end], some, start)
        block = start // 16
        assert torch.equal(found, scale[block : block + found.numel()]) and torch.equal(some, codes[first:end])
        assert found.numel() == num_scales(fmt, some, start)
        if end > first:
            assert torch.equal(table_of(fmt, found, end - first, start), table[first:end])


@pytest.mark.parametrize("shape", [(12, 5), (6, 40)], ids=str)
def test_a_block_that_was_cut_is_quantized_again_and_no_other(shape: tuple[int, int]) -> None:
    fmt, x, cut = format_for(shape), drawn(shape), 3
    x[cut:] *= 3
    parts = [encoded(fmt, x[:cut], 0), encoded(fmt, x[cut:], cut * shape[1])]
    values = torch.cat([
        dequantize(fmt, *parts[0], 0, CPU),
        dequantize(fmt, *parts[1], cut * shape[1], CPU),
    ])
    tables = [table_of(fmt, parts[0][1], cut, 0), table_of(fmt, parts[1][1], shape[0] - cut, cut * shape[1])]
    codes = torch.cat([parts[0][0], parts[1][0]])
    kept = codes.clone()
    scale = scales_of(fmt, torch.cat(tables), codes, 0)
    found = dequantize(fmt, codes, scale, 0, CPU)
    mixed = torch.zeros(x.numel(), dtype=torch.bool)
    mixed[cut * shape[1] // 16 * 16 : (cut * shape[1] // 16 + 1) * 16] = True
    mixed = mixed.view(shape)
    assert (codes != kept)[mixed].any() and torch.equal(codes[~mixed], kept[~mixed])
    assert torch.equal(found[~mixed], values[~mixed])
    assert ((found - values)[mixed].abs() <= 0.04 * values[mixed].abs().max()).all()
