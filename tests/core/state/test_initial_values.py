"""State starts at the declared value, in the format and memory layout in which it is kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_optim.core.rule import StateSpec, eye, zeros
from lightning_optim.core.state.formats import StateFormat, format_of
from lightning_optim.core.state.initial_values import initial_scale, initial_value, to_storage_device
from lightning_optim.core.state.quantized_view import dequantize


def formatted(
    spec: StateSpec, shape: tuple[int, ...], storage: str = "fp32", dtype: Any = torch.float32
) -> StateFormat:
    group = {"state_storage": storage, "storage_block": 16, "storage_min": 1}
    dims = (1, *shape) if len(shape) == 2 else shape
    return format_of(spec, shape, dims, dtype, group)  # pyright: ignore[reportArgumentType]


def test_an_identity_per_matrix_that_owns_its_memory() -> None:
    fmt = formatted(eye("mm"), (3, 4, 2))
    x = initial_value(fmt, torch.ones(3, 4, 2), fmt.shape)
    assert x.shape == (3, 4, 4) and all(torch.equal(one, torch.eye(4)) for one in x)
    x[0].zero_()
    assert torch.equal(x[1], torch.eye(4)) and x.is_contiguous()


@pytest.mark.parametrize("storage", ["fp32", "bf16"])
def test_a_number_in_the_layout_of_the_parameter(storage: str) -> None:
    like = torch.ones(4, 6, dtype=torch.bfloat16).T.requires_grad_()
    x = initial_value(formatted(StateSpec("mn", 0.5), (6, 4), storage, like.dtype), like, (6, 4))
    assert x.stride() == like.stride() == (1, 6) and not x.requires_grad and x.eq(0.5).all()
    assert x.dtype == (torch.float32 if storage == "fp32" else torch.bfloat16)
    row = formatted(StateSpec("1n", 2.0), (6, 4), storage, torch.float64)
    assert torch.equal(initial_value(row, like, row.shape), torch.full((1, 4), 2.0, dtype=torch.float64))


@pytest.mark.parametrize("nonnegative", [True, False])
@pytest.mark.parametrize("storage", ["int8", "int8_grid", "fp8"])
@pytest.mark.parametrize("fill", [0.0, 0.75])
def test_quantized_values_of_the_start_value(storage: str, nonnegative: bool, fill: float) -> None:
    fmt = formatted(StateSpec("mn", fill, nonnegative=nonnegative), (5, 7), storage)
    codes = initial_value(fmt, torch.ones(5, 7), (5, 7))
    scale = initial_scale(fmt, codes, 0)
    assert codes.shape == (5, 7) and codes.dtype == fmt.dtype and scale.shape == (3,) and scale.dtype == torch.float32
    value = dequantize(fmt, codes, scale, 0, codes.device)
    if fill:
        torch.testing.assert_close(value, torch.full((5, 7), fill))
    else:
        assert value.abs().max() <= (1e-37 if storage == "int8_grid" else 0)  # that grid has no zero


def test_a_part_has_the_scales_of_the_blocks_it_touches() -> None:
    fmt = formatted(zeros("mn"), (10, 7), "int8")
    codes = torch.zeros(2, 7, dtype=torch.uint8)
    assert [initial_scale(fmt, codes, start).numel() for start in (0, 2, 3, 14)] == [1, 1, 2, 2]
    assert initial_scale(fmt, codes[:0], 14).numel() == 0


def test_values_stay_where_they_are_stored() -> None:
    fmt, value = formatted(zeros("mn"), (5, 7), "bf16"), torch.ones(5, 7)
    assert to_storage_device(fmt, value) is value
    host = formatted(zeros("mn"), (5, 7), "host")
    assert initial_value(host, torch.ones(5, 7), (5, 7)).device.type == "cpu"
