"""Bounds of rows over ranks that need not exist are those of torch's own cuts."""

from __future__ import annotations

import itertools

import torch

from lightning_optim.core.parallel.hypothetical_mesh import rows_over


def test_rows_are_cut_as_by_torch_chunk() -> None:
    for rows, ranks in itertools.product(range(1, 12), range(1, 8)):
        chunks = torch.arange(rows).chunk(ranks)
        for rank in range(ranks):
            ((first, end), columns) = rows_over(ranks).shard_slices((rows, 3), rank)
            expected = chunks[rank].tolist() if rank < len(chunks) else []
            assert list(range(first, end)) == expected and columns == (0, 3)
            assert first <= rows, "an empty shard lies at the end"
