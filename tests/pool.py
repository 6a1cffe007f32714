"""One pool of gloo processes for the whole test session: jobs are functions of this package, called on every rank."""

from __future__ import annotations

import importlib
import io
import multiprocessing
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 180


def _dump(value: Any) -> bytes:
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def _load(data: bytes) -> Any:
    return torch.load(io.BytesIO(data), weights_only=False)


def _worker(connection: Connection, rank: int) -> None:
    torch.set_num_threads(1)
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
            connection.send((job, world, str(store), _dump(kwargs)))
        results = []
        for rank, (process, connection) in enumerate(self.workers[:world]):
            if not connection.poll(TIMEOUT):
                self.close()
                raise TimeoutError(f"{job}: rank {rank} did not answer in {TIMEOUT} s")
            try:
                ok, value = _load(connection.recv_bytes())
            except EOFError:
                process.join()
                self.close()
                raise RuntimeError(f"{job}: rank {rank} ended with {process.exitcode}") from None
            results.append((rank, ok, value))
        failed = [f"rank {rank}:\n{value}" for rank, ok, value in results if not ok]
        if failed:
            raise RuntimeError("\n".join(failed))
        return [value for _, _, value in results]

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
