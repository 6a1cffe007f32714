"""stacking."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

from lightning_optim.core.matrix_views import StackShape, stack


def stack_state(entries: Sequence[Tensor], dims: StackShape) -> Tensor:
    """One stack out of the resting tensors of a slot.

    Args:
        entries: one per parameter of the chunk.
        dims: (matrices per parameter, rows, columns) of the slot.

    Returns:
        `[len(entries) * matrices, rows, columns]`; shares memory with a single entry.
    """
    return stack(entries, dims, entries[0].dtype)


def copy_aliased(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a rule left, safe to write slot by slot: `s.prev = s.cur` must not see the new `cur`.

    Args:
        before: the stored tensors, or stacks of them, by slot.
        after: what the rule left in each slot.

    Returns:
        `after`, with copies of tensors that lie in another slot's memory.
    """
    homes = {k: t.untyped_storage().data_ptr() for k, t in before.items()}
    out = {}
    for key, value in after.items():
        home = value.untyped_storage().data_ptr()
        foreign = any(home == other for k, other in homes.items() if k != key)
        out[key] = value.clone() if foreign else value
    return out


def version(t: Tensor) -> int | None:
    """How often a tensor, or another view of its memory, has been written in place.

    Args:
        t: any.

    Returns:
        torch's count; None for a tensor of inference mode, which has none.
    """
    return None if t.is_inference() else t._version


def store_stack(entries: Sequence[Tensor], after: Tensor) -> None:
    """Store what a rule left in a slot.

    Args:
        entries: one per parameter of the chunk.
        after: what `read` gave, mutated in place, or another tensor.
    """
    if len(entries) == 1 and after.data_ptr() == entries[0].data_ptr():
        return
    for entry, piece in zip(entries, after.split(after.shape[0] // len(entries)), strict=True):
        entry.copy_(piece.reshape(entry.shape))
