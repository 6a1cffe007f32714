"""One pool of gloo processes for the whole test session: jobs are functions of this package, called on every rank."""

from __future__ import annotations

import faulthandler
import importlib
import io
import multiprocessing
import tempfile
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 600
"""Seconds for a job, the start of its processes included: it is for jobs that hang, not for slow machines."""
GRACE = 15
"""Seconds for the other ranks, once one has failed: they may wait for it, in a collective, for ever."""


def _dump(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _worker(connection: Connection, rank: int) -> None:
    torch.set_num_threads(1)
    faulthandler.enable()  # says where, if a signal ends the process
    while (job := connection.recv()) is not None:
        where, world, store, kwargs = job
        module, name = where.split(":")
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
            result = (True, getattr(importlib.import_module(module), name)(rank, world, **_load(kwargs)))
        except BaseException:
            result = (False, traceback.format_exc())
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
        connection.send_bytes(_dump(result))


class Pool:
    """Processes that wait for jobs; started when first needed."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.jobs = folder, 0
        self.workers: list[tuple[Any, Connection]] = []

    def run(self, job: str, world: int, **kwargs: Any) -> list[Any]:
        """Call `module:function` on `world` ranks as `function(rank, world, **kwargs)`; the results by rank."""
        context = multiprocessing.get_context("spawn")
        if not all(process.is_alive() for process, _ in self.workers):
            self.close()  # gloo can end a process after its job, while the others disconnect
        while len(self.workers) < world:
            here, there = context.Pipe()
            process = context.Process(target=_worker, args=(there, len(self.workers)), daemon=True)
            process.start()
            there.close()  # else a write to, or a wait for, a process that has ended would never return
            self.workers.append((process, here))
        self.jobs += 1
        store = self.folder / f"store-{self.jobs}"
        for _, connection in self.workers[:world]:
            with suppress(BrokenPipeError):  # told of where the answer is missing
                connection.send((job, world, str(store), _dump(kwargs)))
        results, failed = self._answers(world)
        if failed:
            raise RuntimeError("\n".join(f"{job}: {what}" for what in failed))
        return results

    def _answers(self, world: int) -> tuple[list[Any], list[str]]:
        """What every rank returned, and what happened to those that did not; the processes end if any is stuck."""
        results: list[Any] = [None] * world
        waiting = {connection: rank for rank, (_, connection) in enumerate(self.workers[:world])}
        failed: list[str] = []
        begun, limit = time.monotonic(), float(TIMEOUT)
        while waiting:
            ready = wait(list(waiting), max(0.0, begun + limit - time.monotonic()))
            if not ready:
                failed.append(f"ranks {sorted(waiting.values())} did not answer in {limit:.0f} s")
                break
            for connection in (c for c in list(waiting) if c in ready):
                rank = waiting.pop(connection)
                try:
                    ok, results[rank] = _load(connection.recv_bytes())
                except (EOFError, ConnectionError):
                    self.workers[rank][0].join()
                    ok, results[rank] = False, f"ended with {self.workers[rank][0].exitcode}"
                if not ok:
                    failed.append(f"rank {rank}: {results[rank]}")
                    limit = min(limit, time.monotonic() - begun + GRACE)
        if waiting:
            self.close()
        return results, failed

    def close(self) -> None:
        """End the processes."""
        for process, connection in self.workers:
            process.kill()
            process.join()
            connection.close()
        self.workers.clear()


@contextmanager
def opened() -> Iterator[Pool]:
    """A pool that is closed at the end."""
    with tempfile.TemporaryDirectory() as folder:
        pool = Pool(Path(folder))
        try:
            yield pool
        finally:
            pool.close()
