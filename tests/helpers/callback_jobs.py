"""What the processes of the pool do with the diagnostic callbacks, in both trainers."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, GradientState
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor

import hf_integration
from lightning_optim import callbacks
from tests.callbacks.test_probes import ALWAYS, CURVATURE, Batches, Module
from tests.helpers.lightning_jobs import Pooled
from tests.hf_integration.test_trainer import arguments, llama, model_of, trainer_of
from tests.test_lightning import trainer, weights

STEPS, MICRO = 4, 4
"""Optimizer steps, and micro-batches of each over all ranks."""


class Share(Batches):
    """Every `world`-th batch of those that one process would see."""

    def __init__(self, rank: int, world: int) -> None:
        super().__init__(STEPS * MICRO // world)
        self.rank, self.world = rank, world

    def __iter__(self) -> Iterator[Tensor]:
        whole = list(Batches(STEPS * MICRO))
        yield from whole[self.rank :: self.world]


def watching(kinds: Any, policy: str | None) -> list[Any]:
    """All diagnostic callbacks, each in every step."""
    return [
        kinds.OptimizerHealth(**ALWAYS),
        kinds.MemoryLogger(**ALWAYS),
        kinds.PreconditionerRefresh(policy, **ALWAYS),
        kinds.GradientRank(**ALWAYS),
        kinds.GradientNoiseScale(**ALWAYS),
        kinds.HessianBlocks(**CURVATURE | ALWAYS, exact=()),
    ]


def lightning(rank: int, world: int, folder: str, name: str, policy: str | None = None) -> dict[str, Tensor]:
    """Weights after a run of Lightning's trainer with every callback."""
    module = Module(name, weight_decay=0.1)
    run = trainer(
        Path(folder),
        devices=world,
        max_steps=STEPS,
        accumulate_grad_batches=MICRO // world,
        gradient_clip_val=0.05,
        log_every_n_steps=1,
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=watching(callbacks, policy),
        **({"strategy": DDPStrategy(process_group_backend="gloo"), "plugins": [Pooled()]} if world > 1 else {}),
    )
    run.fit(module, Share(rank, world))
    return weights(module)


def transformers(rank: int, world: int, folder: str, name: str, policy: str | None = None) -> dict[str, Tensor]:
    """Weights after a run of Transformers' trainer with every callback."""
    with launched(rank, world):
        args = arguments(
            Path(folder),
            optim=name,
            max_steps=STEPS,
            gradient_accumulation_steps=MICRO // world,
            max_grad_norm=0.05,
            weight_decay=0.1,
            report_to=["tensorboard"],
            ddp_backend="gloo" if world > 1 else None,
        )
        assert args.world_size == world
        made = trainer_of(llama(), args, *watching(hf_integration, policy))
        made.train()
        return weights(model_of(made))


@contextmanager
def launched(rank: int, world: int) -> Iterator[None]:
    """What torchrun tells a process, and Accelerate remembers."""
    told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_PORT": 29500}
    given = {k: str(v) for k, v in told.items()} | {"MASTER_ADDR": "127.0.0.1"} if world > 1 else {}
    before = dict(os.environ)
    os.environ |= given
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
