"""Which modules are run, on what, and what is said where none can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_optim.build import measurement
from lightning_optim.build.measurement import measure

BERT: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "vocab_size": 50,
}


class Refusing(nn.Sequential):
    """Runs with values only."""

    def forward(self, input: Tensor) -> Tensor:
        y = super().forward(input)
        return y if float(y.detach().numpy().sum()) < 1e9 else input


def test_inputs_of_the_user_or_nothing() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert measure(model) == measurement.Measurement({}, [])
    measured = measure(model, torch.ones(1, 3))
    assert measured.facts[id(model[2].weight)].is_head and "measured on meta" in measured.notes[0]


def test_a_model_that_needs_values_is_run_with_them_if_it_is_small(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Refusing(nn.Linear(3, 4), nn.Linear(4, 2))
    before = {k: v.clone() for k, v in model.state_dict().items()}
    measured = measure(model, torch.ones(1, 3))
    assert "with its values" in measured.notes[0] and measured.facts[id(model[1].weight)].is_head
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    monkeypatch.setattr(measurement, "REAL_LIMIT", 1)
    measured = measure(model, torch.ones(1, 3))
    assert not measured.facts and "not measured (" in measured.notes[0]


def test_modules_within_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.ModuleDict({"body": hf.BertModel(hf.BertConfig(**BERT)), "out": nn.Linear(16, 3)})
    query = model.get_parameter("body.encoder.layer.0.attention.self.query.weight")
    assert measure(model).facts[id(query)].kinds == {"matmul"}
    monkeypatch.setattr(measurement, "watch", None)  # would raise
    assert (
        measure(model).facts[id(query)].kinds == {"matmul"}
        and id(model.get_parameter("out.weight")) not in measure(model).facts
    )


def test_measuring_draws_no_random_number() -> None:
    model = hf.BertModel(hf.BertConfig(**BERT))
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    measure(model)
    assert torch.equal(torch.rand(3), expected)
