"""The training run that a probe measures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.core.parallel import sharding
from lightning_optim.diagnostics import view


@dataclass
class TrainingContext:
    """Everything of a training run that a probe may read.

    Args:
        model: the plain module, inside DDP or a compiled wrapper.
        optimizer: torch's or ours, inside a framework's wrapper.
        loss: computes the training loss of a batch without side effects.
        clip: the gradient norm that the trainer clips to.
        loss_scale: returns the present loss scale of mixed precision, or None without one.
        step: number of optimizer steps before the run starts.
        ranks: number of data-parallel processes.
        rank: index of this process.
        extra: values that only some frameworks know: `checkpoint`, a function that returns the path of the last
            checkpoint; `ddp`, the wrapper; `group`, the process group; `rows_belong_together`, true where the loss of
            some rows of a batch is not comparable to the loss of all rows.
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    loss: Callable[[Any], Tensor] | None = None
    clip: float | None = None
    loss_scale: Callable[[], float | None] = lambda: None
    step: int = 0
    ranks: int = 1
    rank: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    def entries(self) -> list[view.Entry]:
        """The trained parameters.

        Returns:
            See `view.entries`.
        """
        return view.entries(self.model, self.optimizer)

    @property
    def device(self) -> torch.device:
        """Device of the first parameter of the optimizer."""
        return sharding.local(self.optimizer.param_groups[0]["params"][0]).device
