"""The format of a state tensor follows from its declaration, its size and the group's options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.core.matrix_views import StackShape
from lightning_optim.core.rule import StateSpec, eye, zeros
from lightning_optim.core.state.formats import (
    compensated,
    compute_dtype_of,
    format_of,
    keeps_radius,
    scale_key,
    stored_shape,
)

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def options(storage: str = "fp32", **settings: Any) -> dict[str, Any]:
    return {"state_storage": storage, "storage_block": 16, "storage_min": 1, **settings}


@pytest.mark.parametrize(
    ("letters", "shape", "dims", "expected"),
    [
        ("mn", (6, 4), (1, 6, 4), (6, 4)),
        ("mm", (6, 4), (1, 6, 4), (6, 6)),
        ("m1", (6, 4), (1, 6, 4), (6, 1)),
        ("nn", (6, 4), (3, 2, 4), (3, 4, 4)),  # three blocks
        ("mm", (5, 6, 4), (5, 6, 4), (5, 6, 6)),  # a stack
        ("mm", (5, 6, 4), (10, 3, 4), (5, 2, 3, 3)),  # a stack with two blocks in each
        ("mm", (6, 4, 3, 3), (1, 6, 36), (6, 6)),  # a convolution
        ("mn", (7,), (1, 1, 7), (7,)),
    ],
)
def test_shapes(letters: str, shape: tuple[int, ...], dims: StackShape, expected: tuple[int, ...]) -> None:
    assert stored_shape(StateSpec(letters), shape, dims) == expected


@pytest.mark.parametrize("storage", ["bf16", "int8", "int8_grid", "fp8"])
def test_what_must_be_exact_keeps_full_precision(storage: str) -> None:
    dims, dtype = (1, 8, 4), torch.float32
    narrow = format_of(zeros("mn"), (8, 4), dims, dtype, options(storage))
    assert (narrow.name, narrow.compute_dtype) == (storage, torch.float32)
    assert narrow.dtype.itemsize == (2 if storage == "bf16" else 1)
    exact = [zeros("mm"), eye("nn"), zeros("m1"), zeros("1n"), zeros("mn", exact=True), zeros("mn", torch.float64)]
    for spec in exact:
        fmt = format_of(spec, (8, 4), dims, dtype, options(storage))
        assert (fmt.name, fmt.dtype) == ("fp32", spec.dtype or torch.float32), spec
    assert format_of(zeros("mn"), (8, 4), dims, dtype, options(storage, storage_min=33)).name == "fp32"
    assert format_of(zeros("mn"), (8, 4), dims, dtype, options(storage, storage_min=32)).name == storage
    sketch = StateSpec("mr", rank=2)
    assert format_of(sketch, (8, 4), dims, dtype, options(storage)).name == storage
    assert format_of(sketch, (8, 4), dims, dtype, options(storage), sums=True).name == "fp32"


def test_bytes_and_scales() -> None:
    sizes = {}
    for storage in ("fp32", "bf16", "int8", "host"):
        fmt = format_of(zeros("mn"), (5, 7), (1, 5, 7), torch.bfloat16, options(storage))
        sizes[storage] = fmt.nbytes, fmt.scales
    assert sizes == {"fp32": (140, 0), "bf16": (70, 0), "int8": (35 + 4 * 3, 3), "host": (140, 0)}
    p = Parameter(torch.ones(5, 7))
    optimizer = RuleOptimizer([{"params": [p], "rule": "lion", **options("int8")}])
    p.grad = torch.ones(5, 7)
    optimizer.step()
    fmt = optimizer.group_steps()[0].params[0].plan.formats["exp_avg"]
    assert fmt.nbytes == sum(optimizer.state[p][key].nbytes for key in ("exp_avg", scale_key("exp_avg")))


def test_which_formats_a_rule_works_on_in_place() -> None:
    def direct(storage: str) -> tuple[bool, bool]:
        fmt = format_of(zeros("mn"), (8, 4), (1, 8, 4), torch.float32, options(storage))
        return fmt.is_compute_format(CPU), fmt.is_compute_format(CUDA)

    assert direct("fp32") == (True, True) and direct("host") == (True, False)
    assert direct("bf16") == direct("int8") == direct("fp8") == (False, False)


def test_what_is_kept_beside_narrow_weights() -> None:
    wide, narrow = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
    assert [compute_dtype_of(x) for x in (*wide, *narrow)] == [*wide, torch.float32, torch.float32]
    for dtype in (*wide, *narrow):
        kahan = {"param_rounding": "kahan", "constraint": "hyperball"}
        assert compensated(dtype, kahan) == (dtype in narrow) and not keeps_radius(dtype, kahan)
        nearest = {"param_rounding": "nearest", "constraint": "hyperball"}
        assert keeps_radius(dtype, nearest) == (dtype in narrow) and not compensated(dtype, nearest)
        assert not keeps_radius(dtype, {**nearest, "constraint": "none"})
