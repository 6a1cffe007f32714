"""Operators that need values have results on the meta device."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_optim.build.dataflow import watch


class Undecided(nn.Module):
    """A forward pass that asks for values."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = (nn.Linear(4, 4, device="meta") for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        y = self.into(x)
        if y.sum().item() > 0 or torch.equal(y, x):
            y = y * 2
        for row in (y > 0).nonzero():
            y = y + row.sum()
        y[y > 1] = 0.0
        y = y + torch.unique_consecutive(y > 0).sum()
        y = y.to("cpu") + y[y > 0].sum() + y.masked_select(y > 0).sum()
        return self.out(y)


def test_a_pass_that_depends_on_values_runs() -> None:
    module = Undecided()
    facts = watch(module, (torch.ones(2, 4),), {})
    assert facts[id(module.out.weight)].is_head and not facts[id(module.into.weight)].is_head
