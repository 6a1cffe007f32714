"""A recorded batch has one loss, and parts of batches keep their types."""

from __future__ import annotations

import random
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence
from transformers import BatchEncoding

from lightning_optim.diagnostics.batches import RecordedBatch, first_rows, map_tensors, tensors_of
from lightning_optim.diagnostics.undisturbed import RandomState

Pair = namedtuple("Pair", "x y")


@dataclass
class Item:
    x: Tensor
    name: str


def test_a_batch_has_the_same_loss_in_every_evaluation() -> None:
    """Losses that draw noise, and those that depend on a buffer that they write, are fixed functions of the weights."""
    model: Any = nn.BatchNorm1d(2)

    def loss(x: Tensor) -> Tensor:
        model.num_batches_tracked.add_(1)
        return x.sum() * torch.rand(()) * random.random() * model.num_batches_tracked

    batch = RecordedBatch(torch.ones(3), RandomState(model))
    trained = loss(batch.inputs)
    model.num_batches_tracked.zero_()
    assert [batch.evaluate(loss, model) for _ in range(3)] == [trained] * 3
    assert model.num_batches_tracked == 0


def test_rows_are_cut_in_every_container() -> None:
    packed = pack_padded_sequence(torch.ones(4, 2), torch.tensor([3, 1]))
    batch: Any = {
        "x": torch.arange(8).view(4, 2),
        "encoding": BatchEncoding({"input_ids": torch.arange(4), "text": ["a", "b"]}),
        "pair": Pair(torch.arange(4), torch.tensor(3.0)),
        "item": Item(torch.arange(4), "four"),
        "list": [torch.arange(3), None, packed],
    }
    cut = first_rows(batch, 0.5)
    assert type(cut["encoding"]) is BatchEncoding and cut["encoding"].input_ids.tolist() == [0, 1]
    assert cut["encoding"]["text"] == ["a", "b"] and batch["encoding"].input_ids.tolist() == [0, 1, 2, 3]
    assert cut["pair"].x.tolist() == [0, 1] and cut["pair"].y is batch["pair"].y
    assert type(cut["item"]) is Item and cut["item"].x.tolist() == [0, 1] and len(batch["item"].x) == 4
    assert cut["list"][0] is batch["list"][0] and cut["list"][2] is packed
    assert first_rows(batch, count=1)["x"].tolist() == [[0, 1]] and first_rows(batch, count=9) is batch
    assert first_rows(batch) is batch and first_rows("text", 0.5) == "text"
    recorded = RecordedBatch(batch, RandomState(nn.Linear(1, 1)))
    assert first_rows(recorded, 0.25).inputs["x"].tolist() == [[0, 1]]


def test_tensors_are_copied_and_the_rest_is_kept() -> None:
    other = object()
    batch = (torch.ones(2), {"y": torch.zeros(1), "other": other})
    copied = map_tensors(batch, torch.clone)
    assert copied[1]["other"] is other and copied[1] is not batch[1]
    assert [t.tolist() for t in tensors_of(copied)] == [[1.0, 1.0], [0.0]]
    assert copied[0] is not batch[0]
