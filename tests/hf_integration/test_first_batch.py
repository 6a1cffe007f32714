"""A model of one's own under the Trainer is measured by the first record."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Trainer, TrainingArguments

import hf_integration as hi
from hf_integration.first_batch import describes_inputs, first_batch


class Own(nn.Module):
    """Its last layer is registered first, and gives as much as it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.body = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        logits = self.out(self.body(x).relu())
        return {"logits": logits} if labels is None else {"loss": (logits - labels).square().mean(), "logits": logits}


class Records(Dataset[Any]):
    """Draws random numbers."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, i: int) -> dict[str, Tensor]:
        return {"x": torch.randn(8) + random.random(), "labels": torch.zeros(8)}


def trainer_of(folder: Path, data: Any) -> Trainer:
    args = TrainingArguments(str(folder), max_steps=1, report_to="none", use_cpu=True, learning_rate=1e-3)
    return Trainer(Own(), args, train_dataset=data)


def test_roles_by_the_first_record(tmp_path: Path) -> None:
    trainer = hi.attach(trainer_of(tmp_path, Records()), "muon")
    assert not describes_inputs(Own())
    optimizer: Any = trainer.create_optimizer()
    sources = {n: s for g in optimizer.param_groups for n, s in zip(g["param_names"], g["role_sources"], strict=True)}
    roles = {n: g["role"] for g in optimizer.param_groups for n in g["param_names"]}
    assert sources["out.weight"] == "measured" and (roles["out.weight"], roles["body.weight"]) == ("head", "hidden")


def test_the_run_draws_what_it_would_draw(tmp_path: Path) -> None:
    trainer = trainer_of(tmp_path, Records())
    torch.manual_seed(0)
    random.seed(0)
    expected = torch.rand(2).tolist(), random.random()
    torch.manual_seed(0)
    random.seed(0)
    assert (batch := first_batch(trainer)) is not None and set(batch) == {"x", "labels"}
    assert (torch.rand(2).tolist(), random.random()) == expected


def test_data_without_a_first_record(tmp_path: Path) -> None:
    class Broken(Records):
        def __getitem__(self, i: int) -> dict[str, Tensor]:
            raise OSError("not there")

    assert first_batch(trainer_of(tmp_path, Broken())) is None
    trainer = trainer_of(tmp_path, Records())
    trainer.train_dataset = iter(())  # pyright: ignore[reportAttributeAccessIssue]
    assert first_batch(trainer) is None
