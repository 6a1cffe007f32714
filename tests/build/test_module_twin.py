"""A twin shares nothing that a forward pass could change."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from lightning_optim.build.module_twin import SMALL_BUFFER, Twin, unwrapped


class Counting(nn.Module):
    """Keeps a state, a list of layers, a bound method and something that cannot be copied."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.calls = nn.Linear(3, 3), []
        self.layers, self.function, self.foreign = [self.layer], self.apply_layer, object()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("table", torch.zeros(SMALL_BUFFER + 1))

    def apply_layer(self, x: Tensor) -> Tensor:
        return self.layers[0](x)

    def forward(self, x: Tensor) -> Tensor:
        self.calls.append(1)
        self.count += 1
        return self.function(x)


def test_the_model_stays_as_it_is() -> None:
    model, seen = Counting().train(), []
    model.register_forward_hook(lambda *_: seen.append(1))
    twin = Twin(model)
    out = twin.module(torch.ones(2, 3, device="meta"))
    assert out.is_meta and not seen and not model.calls and model.count == 0 and model.training
    copy = twin.module
    assert isinstance(copy, Counting) and copy.calls == [1] and copy.foreign is model.foreign and not copy.training
    assert copy.count == 1 and copy.table.is_meta and copy.layers[0] is copy.layer is not model.layer
    assert twin.originals[id(copy.layer.weight)] is model.layer.weight


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch.compile's own imports
def test_tied_weights_frozen_ones_and_wrappers() -> None:
    model = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 4))
    model[1].weight = model[0].weight
    model.requires_grad_(False)
    wrapped: Any = torch.compile(nn.Sequential(cast("Any", torch.compile(model)), nn.Linear(4, 2)))
    assert unwrapped(wrapped).get_submodule("1").out_features == 2
    twin = Twin(wrapped).module
    inner: Any = twin.get_submodule("0")
    assert type(inner) is nn.Sequential and inner[0].weight is inner[1].weight and inner[0].weight.requires_grad


def test_weights_that_are_made_of_others() -> None:
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 3)), nn.LazyLinear(2))
    twin = Twin(model).module
    assert twin(torch.ones(1, 3, device="meta")).shape == (1, 2)
    assert isinstance(model[1].weight, nn.UninitializedParameter)
