"""A training batch that is evaluated again beside training, and parts of it."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from lightning_optim.diagnostics.undisturbed import RandomState, unchanged_attributes


@dataclass(frozen=True)
class RecordedBatch:
    """A batch, and the random numbers from which training computes its loss.

    Losses that draw noise or masks thus draw the same in all evaluations, and those that training draws.

    Args:
        inputs: what the loss takes.
        random: at the time of the batch.
    """

    inputs: Any
    random: RandomState

    def evaluate(self, loss: Callable[[Any], Tensor], model: nn.Module) -> Tensor:
        """The loss of the batch. Buffers, metrics and counters of the model are as before.

        Args:
            loss: of the inputs.
            model: the model.

        Returns:
            A scalar.
        """
        self.random.restore()
        with unchanged_attributes(model):
            return loss(self.inputs)


def tensors_of(batch: Any) -> Iterator[Tensor]:
    """The tensors of a batch.

    Args:
        batch: tensors in any nesting of mappings, sequences and dataclasses.

    Yields:
        Tensors, in the order of the nesting.
    """
    found: list[Tensor] = []
    map_tensors(batch, lambda t: found.append(t) or t)
    yield from found


def map_tensors(batch: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a batch's containers with other tensors.

    Args:
        batch: tensors in any nesting of mappings, sequences and dataclasses; other objects are kept.
        function: of a tensor.

    Returns:
        The same nesting, of the same types.
    """
    if isinstance(batch, Tensor):
        return function(batch)
    if isinstance(batch, PackedSequence):  # its parts have different lengths
        return batch
    if isinstance(batch, Mapping):
        out = copy.copy(batch) if isinstance(batch, MutableMapping) else dict(batch)
        for key, value in batch.items():
            out[key] = map_tensors(value, function)
        return out
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(map_tensors(x, function) for x in batch))
    if type(batch) in (list, tuple):
        return type(batch)(map_tensors(x, function) for x in batch)
    if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
        fields = {f.name: getattr(batch, f.name) for f in dataclasses.fields(batch) if f.init}
        return dataclasses.replace(batch, **{k: map_tensors(v, function) for k, v in fields.items()})
    return batch


def first_rows(batch: Any, share: float = 1.0, *, count: int | None = None) -> Any:
    """The first rows of a batch.

    Args:
        batch: tensors in any nesting; those with as many rows as the first one are cut.
        share: share of the rows, rounded up.
        count: number of rows, in place of a share.

    Returns:
        The same nesting of views; the batch itself where nothing is cut.
    """
    rows = next((len(t) for t in tensors_of(batch) if t.ndim > 0), 0)
    wanted = math.ceil(rows * share) if count is None else count
    if wanted >= rows:
        return batch
    return map_tensors(batch, lambda t: t[:wanted] if t.ndim > 0 and len(t) == rows else t)
