"""Labels are counted, replaced where they count, and belong to the losses that are used."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lightning_optim.curvature import Labels, categorical
from lightning_optim.curvature import labels as module


def logits(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()


LOSSES: list[tuple[Any, Tensor, Tensor, int]] = [
    (F.cross_entropy, logits(4, 3), torch.tensor([0, -100, 2, 1]), 3),
    (F.cross_entropy, logits(2, 3, 5), torch.ones(2, 5, dtype=torch.int64), 10),
    (F.cross_entropy, logits(3), torch.tensor(1), 1),
    (F.cross_entropy, logits(4, 3), torch.full((4, 3), 1 / 3, dtype=torch.float64), 4),
    (F.nll_loss, logits(4, 3), torch.tensor([0, 1, 2, 1]), 4),
    (F.binary_cross_entropy_with_logits, logits(4, 3), torch.ones(4, 3, dtype=torch.float64), 12),
    (F.mse_loss, logits(4, 3), torch.ones(4, 3, dtype=torch.float64), 12),
]


@pytest.mark.parametrize(("loss", "x", "y", "count"), LOSSES)
def test_counting_changes_nothing_and_sampling_depends_on_the_seed_only(
    loss: Any, x: Tensor, y: Tensor, count: int
) -> None:
    with Labels() as labels:
        counted = loss(x, y)
    assert torch.equal(counted, loss(x, y)) and labels.count == count and labels.inputs[0] is x
    drawn = []
    kept = y.clone()
    for seed in (1, 1, *range(2, 40)):
        with Labels(seed) as labels:
            drawn.append(loss(x, y).item())
        assert labels.count == count
    assert drawn[0] == drawn[1] and len({*drawn}) > 1 and torch.equal(y, kept)


def test_two_losses_of_a_block_draw_their_own_labels_from_unsmoothed_probabilities() -> None:
    x, y = logits(200, 3), torch.zeros(200, dtype=torch.int64)
    with Labels(0) as labels:
        first, second = F.cross_entropy(x, y), F.cross_entropy(x, y)
    assert labels.count == 400 and first.item() != second.item()
    with Labels(0):
        smoothed = F.cross_entropy(x, y, label_smoothing=0.5)
    assert torch.equal(smoothed, first)
    with Labels() as labels:
        assert torch.equal(F.cross_entropy(x, y, label_smoothing=0.5), F.cross_entropy(x, y, label_smoothing=0.5))


def test_losses_of_which_the_result_is_not_made_do_not_count() -> None:
    x, other, y = logits(4, 3), logits(5, 3), torch.zeros(5, dtype=torch.int64)
    labels = Labels()
    for _ in range(2):
        labels.clear()
        with labels:
            F.cross_entropy(other, y)
            used = 2 * F.cross_entropy(x, y[:4])
        labels.keep_used(used)
        assert labels.count == 4 and len(labels.inputs) == 1 and labels.inputs[0] is x
    with torch.no_grad():
        labels.clear()
        with labels:
            F.cross_entropy(other, y)
            labels.keep_used(F.cross_entropy(x, y[:4]))
    assert labels.count == 4, "without a graph, the same losses as before are used"


def test_draws_do_not_depend_on_the_pieces_in_which_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(4, 25, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    whole = categorical(x, torch.Generator().manual_seed(1))
    monkeypatch.setattr(module, "CHUNK_ELEMENTS", 7 * 3)
    assert torch.equal(categorical(x, torch.Generator().manual_seed(1)), whole)
    assert whole.shape == (4, 25) and whole.dtype == torch.int64 and {*whole.unique().tolist()} == {0, 1, 2}
    sure = torch.full((50, 3), -torch.inf)
    sure[:, 2] = 0.0
    assert (categorical(sure, torch.Generator().manual_seed(1)) == 2).all()
    assert categorical(torch.empty(0, 3), torch.Generator().manual_seed(1)).shape == (0,)


def test_the_dtype_of_autocast_is_noted() -> None:
    x, y = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    labels = Labels()
    with labels:
        F.cross_entropy(x, y)
    assert not labels.autocast and not labels.dtypes
    with labels, torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(x, y)
    assert labels.autocast and labels.dtypes == {torch.bfloat16}
