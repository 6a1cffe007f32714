"""Heads of fused layers."""

from __future__ import annotations

import pytest

from lightning_optim.build.param_role import by_head


@pytest.mark.parametrize(
    ("blocks", "outputs", "expected"),
    [
        (3, 48, (12, ((4, 8), (1, 16)))),
        ((16, 8, 8), 32, (8, ((4, 6), (1, 8)))),
        ((8, 4, 4), 32, (8, ((4, 3), (1, 4)))),  # repeated for each key head
        (2, 32, (8, None)),
        (3, 30, (None, None)),
    ],
)
def test_queries_and_keys_by_head(blocks: object, outputs: int, expected: object) -> None:
    assert by_head(blocks, outputs, 4) == expected  # pyright: ignore[reportArgumentType]
