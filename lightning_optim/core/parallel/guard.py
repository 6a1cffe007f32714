"""guard."""

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
        """Set the patience.

        Args:
            timeout: how long to wait for the other ranks.
        """
        self.timeout = timeout

    def wait_for(self, ranks: Sequence[int], what: str, content: str) -> None:
        """Wait until every rank makes the call it has made as often as this one.

        Args:
            ranks: who is to come, by global rank.
            what: the collective call that follows, for the error message.
            content: describes the optimizer, equally on every rank; calls of different optimizers do not mix.

        Raises:
            RuntimeError: not every rank came in time; the call does not count then.
        """
        store, place = _store(), _digest(repr((what, content, tuple(ranks))))
        calls = f"lightning_optim/{place}/{dist.get_rank()}"
        key = f"lightning_optim/{place}/call/{store.add(calls, 1)}"
        try:
            self._gather(store, key, len(ranks))
        except RuntimeError as error:
            store.add(calls, -1)
            raise RuntimeError(
                f"{what} is a collective call: make it on every rank, then save on one (where replicas share the work, "
                "consolidate() on every rank lets one call it alone)"
            ) from error

    def compare(self, ranks: Sequence[int], lines: Sequence[str]) -> None:
        """Check that every rank describes its param groups alike.

        Args:
            ranks: who is to come, by global rank.
            lines: one per group.

        Raises:
            RuntimeError: on every rank, when not all do, or not every rank comes in time.
        """
        store, place = _store(), _digest(repr(tuple(ranks)))
        calls = store.add(f"lightning_optim/groups/{place}/{dist.get_rank()}", 1)
        key = f"lightning_optim/groups/{place}/call/{calls}"
        own = f"{key}/{_digest(repr(lines))}"
        if dist.get_rank() == ranks[0]:
            store.set(f"{key}/first", "\n".join(lines))
        store.add(own, 1)
        try:
            self._gather(store, key, len(ranks))
        except RuntimeError as error:
            raise RuntimeError("not every rank came to the optimizer's first step") from error
        if store.add(own, 0) == len(ranks):
            return
        first = store.get(f"{key}/first").decode().split("\n")
        wrong = next(
            (k for k in range(max(len(first), len(lines))) if first[k : k + 1] != list(lines)[k : k + 1]), None
        )
        said = "this rank's are those of the first" if wrong is None else f"here {lines[wrong : wrong + 1]}"
        there = "" if wrong is None else f", on rank {ranks[0]} {first[wrong : wrong + 1]}"
        raise RuntimeError(f"param groups differ between ranks; nothing was updated: {said}{there}")

    def _gather(self, store: Any, key: str, count: int) -> None:
        """Wait until so many have come."""
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
