"""What is said of parameters beside their roles."""

from __future__ import annotations

import torch
import transformers as hf
from torch import nn

from lightning_optim import build_optimizer
from lightning_optim.build.role_report import report
from tests.build.test_dataflow import Layers


def test_who_says_what() -> None:
    model = Layers()
    assert not report(model).notes
    measured = report(model, torch.arange(6)[None])
    assert measured.notes[0].startswith("Layers: measured on meta")
    assert measured.roles["shift"].source == "unknown" and measured.roles["back"].source == "measured"
    assert report(nn.Sequential(nn.Linear(3, 3))).roles["0.weight"].source == "structure"


def test_the_output_layer_that_a_pass_does_not_confirm_is_none() -> None:
    """A projection behind the backbone that the forward pass does not end with."""

    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body, self.last = nn.Linear(4, 8), nn.Linear(8, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.body(self.last(x))

    assert report(Inner()).roles["last.weight"].role == "head"
    actual = report(Inner(), torch.ones(1, 8)).roles
    assert (actual["last.weight"].role, actual["body.weight"].role) == ("hidden", "head")


class Tokens(nn.Module):
    """Excludes a table from decay, as timm's models do."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Parameter(torch.ones(1, 4, 8)), nn.Linear(8, 8)

    def no_weight_decay(self) -> set[str]:
        return {"table", "gone"}

    def reset_classifier(self) -> None: ...


def test_what_a_model_excludes_from_decay() -> None:
    optimizer = build_optimizer(nn.ModuleList([Tokens()]), "adamw", lr=0.1, weight_decay=0.5)
    decay = {n: g["weight_decay"] for g in optimizer.param_groups for n in g["param_names"]}
    assert decay == {"0.table": 0.0, "0.layer.weight": 0.5, "0.layer.bias": 0.0}


def test_lazy_and_parametrized_matrices() -> None:
    from torch.nn.utils import parametrizations as p

    lazy = report(nn.Sequential(nn.LazyLinear(8), nn.LazyConv2d(4, 3))).roles
    assert [t.role for t in lazy.values()] == ["hidden", "vector", "conv", "vector"]
    for make in (p.weight_norm, p.spectral_norm, p.orthogonal):
        actual = report(nn.Sequential(make(nn.Linear(8, 8)), nn.Tanh())).roles
        assert sorted(t.role for t in actual.values() if t.role != "vector") == ["hidden"], make
    config = hf.LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=4)
    with torch.device("meta"):
        assert report(hf.LlamaModel(config)).roles["layers.0.mlp.up_proj.weight"].source == "measured"
