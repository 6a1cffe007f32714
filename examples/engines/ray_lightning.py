"""Pretrain on the workers of Ray Train with Lightning: the same lines as without it but for the strategy.

    pip install 'lightning-optim[all]' 'ray[train]'
    python examples/engines/ray_lightning.py --workers 2
    python examples/engines/ray_lightning.py --workers 1

Both print the same losses: every batch of 8 rows is spread over the workers. A worker is a process on the CPU here;
with GPUs give `ScalingConfig` `use_gpu=True` and leave out `accelerator`.
"""

# pyright: reportMissingImports=false, reportArgumentType=false
from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import lightning as L
import ray
import torch
from ray.train import ScalingConfig, get_context
from ray.train.lightning import RayDDPStrategy, RayLightningEnvironment, prepare_trainer
from ray.train.torch import TorchTrainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_optim import configure_optimizers

ROWS, CONTEXT, VOCABULARY = 8, 32, 128


class Model(L.LightningModule):
    """Predicts the next byte of a module of the standard library, from an embedding and two layers."""

    def __init__(self, optim: str, steps: int) -> None:
        super().__init__()
        self.optim, self.steps, self.losses = optim, steps, list[float]()
        self.embedding, self.out = nn.Embedding(VOCABULARY, 32), nn.Linear(32, VOCABULARY)
        self.layers = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32))

    def training_step(self, rows: Tensor, index: int) -> Tensor:
        """The loss of this worker's share; the mean over all is kept."""
        hidden = self.embedding(rows[:, :-1])
        loss = nn.functional.cross_entropy(self.out(hidden + self.layers(hidden)).flatten(0, 1), rows[:, 1:].flatten())
        self.losses.append(float(self.trainer.strategy.reduce(loss.detach(), reduce_op="mean")))
        return loss

    def configure_optimizers(self) -> Any:
        """What concerns the optimizer."""
        return configure_optimizers(
            self, self.optim, lr=1e-2, schedule={"schedule": "cosine", "total_steps": self.steps}
        )


def batches(steps: int) -> list[Tensor]:
    """This worker's share of every batch."""
    text = torch.tensor(list(Path(json.__file__).read_bytes()))
    starts = torch.randint(len(text) - CONTEXT, (steps, ROWS), generator=torch.Generator().manual_seed(0))
    context = get_context()
    share = starts.chunk(context.get_world_size(), dim=1)[context.get_world_rank()]
    return [torch.stack([text[start : start + CONTEXT] for start in row]) for row in share]


def train(config: dict[str, Any]) -> None:
    """Run by every worker."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = Model(config["optim"], config["steps"])
    trainer = L.Trainer(
        strategy=RayDDPStrategy(), plugins=[RayLightningEnvironment()], accelerator="cpu", devices="auto",
        max_steps=config["steps"], use_distributed_sampler=False, logger=False, enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip
    prepare_trainer(trainer).fit(model, DataLoader(batches(config["steps"]), batch_size=None))
    if trainer.is_global_zero:
        Path(config["record"]).write_text(json.dumps(model.losses))


def main() -> None:
    """Start the workers, and print the losses."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--optim", default="muon")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args()
    ray.init(num_cpus=args.workers + 1)
    with tempfile.TemporaryDirectory() as folder:  # all workers are on this machine
        config = {"optim": args.optim, "steps": args.steps, "record": f"{folder}/losses.json"}
        TorchTrainer(train, train_loop_config=config, scaling_config=ScalingConfig(num_workers=args.workers)).fit()
        losses = json.loads(Path(config["record"]).read_text())
    for step, loss in enumerate(losses, 1):
        print(f"{step:3} {loss:.6f}")


if __name__ == "__main__":
    main()
