"""A check before collective calls outside a training step: a call made on some ranks only raises and never hangs.

Ranks meet by counters in the store of the default process group, which needs no collective itself.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist


def fingerprint(bits: Iterable[bool]) -> int:
    """A 52-bit hash of a sequence of bits.

    Returns:
        An integer that a float64 holds exactly.
    """
    return int.from_bytes(hashlib.blake2b(bytes(bits), digest_size=8).digest(), "big") >> 12


class CollectiveGuard:
    """A rendezvous before a collective outside a training step, so that a call on one rank raises and never hangs."""

    def __init__(self, timeout: timedelta = timedelta(seconds=120)):
        """Set the timeout.

        Args:
            timeout: how long to wait for the other ranks.
        """
        self.timeout = timeout

    def wait_for(self, ranks: Sequence[int], what: str, content: str) -> None:
        """Wait until every rank has made a collective call as often as this rank.

        Args:
            ranks: global ranks that must take part.
            what: name of the collective call that follows, for the error message.
            content: description of the optimizer, equal on every rank; calls of different optimizers are counted apart.

        Raises:
            RuntimeError: some rank did not make the call before the timeout; the call is then not counted.
        """
        store, place = _store(), _digest(repr((what, content, tuple(ranks))))
        calls = f"lightning_optim/{place}/{dist.get_rank()}"
        key = f"lightning_optim/{place}/call/{store.add(calls, 1)}"
        try:
            self._gather(store, key, len(ranks))
        except RuntimeError as error:
            store.add(calls, -1)
            raise RuntimeError(
                f"{what} is a collective call: make it on every rank, then save on one (where replicas shard the work, "
                "consolidate() on every rank lets one call it alone)"
            ) from error

    def compare(self, ranks: Sequence[int], lines: Sequence[str]) -> None:
        """Check that every rank has the same param groups.

        Args:
            ranks: global ranks that must take part.
            lines: descriptions of the groups, one per group.

        Raises:
            RuntimeError: on every rank, if some rank has other groups or does not arrive before the timeout.
        """
        store, place = _store(), _digest(repr(tuple(ranks)))
        calls = store.add(f"lightning_optim/groups/{place}/{dist.get_rank()}", 1)
        key = f"lightning_optim/groups/{place}/call/{calls}"
        same_lines = f"{key}/{_digest(repr(lines))}"
        if dist.get_rank() == ranks[0]:
            store.set(f"{key}/first", "\n".join(lines))
        store.add(same_lines, 1)
        try:
            self._gather(store, key, len(ranks))
        except RuntimeError as error:
            raise RuntimeError("not every rank reached the optimizer's first step") from error
        if store.add(same_lines, 0) == len(ranks):
            return
        first = store.get(f"{key}/first").decode().split("\n")
        differing = next(
            (k for k in range(max(len(first), len(lines))) if first[k : k + 1] != list(lines)[k : k + 1]), None
        )
        message = f"this rank has the groups of rank {ranks[0]}"
        if differing is not None:
            here, there = (x[differing : differing + 1] for x in (list(lines), first))
            message = f"here {here}, on rank {ranks[0]} {there}"
        raise RuntimeError(f"param groups differ between ranks; nothing was updated: {message}")

    def _gather(self, store: Any, key: str, count: int) -> None:
        """Wait until `count` ranks have arrived."""
        if store.add(key, 1) == count:
            store.set(f"{key}/all", "1")
        try:
            store.wait([f"{key}/all"], self.timeout)
        except RuntimeError:
            store.add(key, -1)
            raise


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
