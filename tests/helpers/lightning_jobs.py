"""What the processes of the pool do with Lightning: `HybridOptimizer` under DDP and FSDP2."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from lightning_optim import RuleOptimizer, build_optimizer
from lightning_optim.callbacks import HybridOptimizer
from tests.test_lightning import Net, Rows, trainer

SETTINGS: dict[str, Any] = {"lr": 1e-2, "schedule": {"schedule": "cosine", "warmup_steps": 2}, "weight_decay": 0.1}


class Pooled(LightningEnvironment):
    """The pool has started the processes."""

    creates_processes_externally = True  # pyright: ignore

    def local_rank(self) -> int:
        return dist.get_rank()


class Share(Rows):
    """Every `world`-th row of those that one process would see."""

    def __init__(self, count: int, rank: int, world: int):
        super().__init__(count)
        self.rank, self.world = rank, world

    def row(self, k: int) -> Tensor:
        return super().row(k * self.world + self.rank)


class Sharded(Net):
    """Shards its layers where it is asked to."""

    configure_optimizers = L.LightningModule.configure_optimizers

    def configure_model(self) -> None:
        mesh = self.device_mesh
        if mesh is not None and not isinstance(self.head.weight, DTensor):
            for layer in self.children():  # Lightning calls training_step, never the module's own forward
                fully_shard(layer, mesh=mesh["data_parallel"])


class Save(L.Callback):
    """A checkpoint in the middle of an epoch."""

    def __init__(self, path: Path, step: int = 3):
        self.path, self.step = path, step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self.step:
            trainer.save_checkpoint(self.path)


def whole(module: nn.Module) -> dict[str, Tensor]:
    """Whole weights, on every rank."""
    full = {k: p.full_tensor() if isinstance(p, DTensor) else p for k, p in module.named_parameters()}
    return {k: p.detach().clone() for k, p in full.items()}


def fit(rank: int, world: int, folder: str, strategy: str, resume: str | None = None, **settings: Any) -> Any:
    """Six steps with the callback, a checkpoint after three; the weights, batches seen and learning rates."""
    net = Sharded("")
    parallel = ModelParallelStrategy(world, 1) if strategy == "fsdp2" else DDPStrategy(process_group_backend="gloo")
    run = trainer(
        Path(folder),
        devices=world,
        strategy=parallel,
        plugins=[Pooled()],
        max_steps=6,
        logger=TensorBoardLogger(folder, name="", version=""),
        callbacks=[HybridOptimizer("muon", **SETTINGS), *([] if resume else [Save(Path(folder, "last.ckpt"))])],
        **settings,
    )
    run.fit(net, Share(6, rank, world), ckpt_path=resume)
    return whole(net), len(net.seen), net.lrs


def interchange(rank: int, world: int, folder: str, lrs: list[list[float]]) -> Any:
    """Go on in plain torch from Lightning's checkpoint, and save one for Lightning that plain torch has made.

    Returns:
        Whole weights after six steps, and after three from the start.
    """
    ended = []

    def schedule(optimizer: RuleOptimizer, step: int) -> None:
        for group, lr in zip(optimizer.param_groups, lrs[step], strict=True):
            group.update(lr=lr, initial_lr=SETTINGS["lr"])

    for theirs in (True, False):
        net = Sharded("")
        mesh = init_device_mesh("cpu", (world,))
        for layer in net.children():
            fully_shard(layer, mesh=mesh)
        settings = {k: v for k, v in SETTINGS.items() if k != "schedule"}
        optimizer = build_optimizer(net, "muon", **settings)
        if theirs:
            state = {"state_dict": get_model_state_dict(net), "optimizer_0": get_optimizer_state_dict(net, optimizer)}
            state_dict_loader.load(state, checkpoint_id=f"{folder}/last.ckpt")
            set_model_state_dict(net, state["state_dict"])
            set_optimizer_state_dict(net, optimizer, state["optimizer_0"])
        rows = Share(6, rank, world)
        for k in range(3, 6) if theirs else range(3):
            schedule(optimizer, k)
            net.loss(rows.row(k)).backward()
            optimizer.step()
            optimizer.zero_grad()
        ended.append(whole(net))
        if not theirs:
            schedule(optimizer, 3)
            state = {"state_dict": get_model_state_dict(net), "optimizer_0": get_optimizer_state_dict(net, optimizer)}
            state_dict_saver.save(state, checkpoint_id=f"{folder}/plain.ckpt")
    return ended
