"""Batches in an order that a checkpoint finds its place in."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch import Tensor


class Batches:
    """Rows in a given order, each rank's share of every batch.

    Lightning puts `state_dict` into its checkpoints and so finds the place again, on any number of ranks.
    """

    def __init__(self, rows: Tensor, order: Tensor, batch_size: int):
        self.rows, self.order, self.batch_size = rows, order, batch_size
        self.start = self.position = 0  # in rows

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        """Go on from a loaded position; later passes start at the beginning."""
        self.position, self.start = self.start, 0
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        while self.position < len(self.order):
            chosen = self.order[self.position : self.position + self.batch_size]
            self.position += len(chosen)
            yield self.rows[chosen.tensor_split(ranks)[rank]]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps.

        Returns:
            The position.
        """
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next pass start at a saved position.

        Args:
            state_dict: from `state_dict`.
        """
        self.start = state_dict["position"]
