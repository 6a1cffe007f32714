"""Modules and trainers of Lightning, one for each way of training, for tests of all of them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
import torchmetrics
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_optim import build_optimizer, configure_optimizers
from lightning_optim.callbacks import CurvatureCallback, diagnostics
from tests.helpers.lightning_jobs import Pooled
from tests.test_lightning import trainer

RULES = {"muon": 1e-2, "sophia_g": 1e-2, "sophia_h": 1e-2, "kfac": 0.05, "lbfgs": 0.3, "hessian_free": 0.3}
"""Learning rate of each rule."""
STEPS = 8


class Classifier(L.LightningModule):
    """Automatic optimization, with a metric, a buffer, a counter and everything that it can log to."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rule, self.lr, self.batch_size, self.calls = rule, RULES[rule], 64, 0
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
        self.mean, self.queue = torchmetrics.MeanMetric(), nn.Buffer(torch.zeros(2))
        self.noise = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
        self.x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))

    def loss(self, x: Tensor) -> Tensor:
        """Of rows whose classes are partly noise, so that it has a minimum."""
        noise = self.noise.repeat(2, 1)[: len(x)]
        return F.cross_entropy(self.net(x), (x + 2 * noise)[:, :4].argmax(1))

    def training_step(self, x: Tensor, i: int) -> Any:
        loss = self.loss(x) * (1.0 if i == self.trainer.fit_loop.batch_idx else 3.0)  # by the number of the batch
        self.calls += 1
        self.mean(loss.detach())
        self.queue += 1
        self.log("loss", self.mean, on_step=False, on_epoch=True, batch_size=len(x))
        for logger in self.loggers:
            logger.log_metrics({"calls": self.calls})
        return loss

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.rule, lr=self.lr)

    def train_dataloader(self) -> Any:
        return DataLoader(self.x.repeat(STEPS, 1), batch_size=self.batch_size)  # pyright: ignore


class Manual(Classifier):
    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.automatic_optimization = False

    def training_step(self, x: Tensor, i: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = super().training_step(x, i)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()


class Adversarial(Manual):
    """Two optimizers: AdamW for the generator, the first, and the rule for the discriminator."""

    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.generator = nn.Linear(6, 6)

    def loss(self, x: Tensor) -> Tensor:
        real, fake = self.net(x)[:, 0], self.net(self.generator(self.noise).detach())[:, 0]
        return F.softplus(-real).mean() + F.softplus(fake).mean()

    def training_step(self, x: Tensor, i: int) -> Any:
        first, second = self.optimizers()  # pyright: ignore
        loss = self.loss(x)
        second.zero_grad()
        self.manual_backward(loss)
        second.step()
        first.zero_grad()
        self.manual_backward(-0.01 * self.net(self.generator(self.noise))[:, 0].mean())
        first.step()

    def configure_optimizers(self) -> Any:
        return [build_optimizer(self.generator, "adamw", lr=1e-4), build_optimizer(self.net, self.rule, lr=self.lr)]


class Drawing(Classifier):
    def training_step(self, dataloader_iter: Iterator[Any]) -> Any:  # pyright: ignore
        x, i, _ = next(dataloader_iter)
        return super().training_step(x, i)


def run(
    folder: Path, rule: str, watching: list[Any], kind: type[Classifier] = Classifier, extra: Any = (), **settings: Any
) -> Any:
    """Train; the module, the trainer, and the loss of all rows before and after."""
    module: Any = kind(rule)
    before = float(module.loss(module.x).detach())
    made = trainer(folder, callbacks=[*watching, *extra], max_epochs=1, **settings)
    made.fit(module)
    return module, made, before, float(module.loss(module.x).detach())


def own_loss(module: Any, x: Tensor) -> Tensor:
    """The argument `loss` of callbacks, for manual optimization."""
    return module.loss(x)


def job(rank: int, world: int, folder: str, rule: str, preset: str | None) -> list[float]:
    """A run under DDP."""
    strategy = DDPStrategy(process_group_backend="gloo")
    watching = diagnostics(preset, steps=STEPS) if preset else []
    settings: dict[str, Any] = dict(devices=world, strategy=strategy, plugins=[Pooled()], use_distributed_sampler=False)
    return list(run(Path(folder), rule, watching, **settings)[2:])


Run = Callable[[Path, str, list[Any]], Any]
WAYS: dict[str, Run] = {
    "automatic": run,
    "accumulation": functools.partial(run, accumulate_grad_batches=2),
    "manual": functools.partial(run, kind=Manual),
    "manual, with loss=": lambda *args: run(*args, kind=Manual, extra=[CurvatureCallback(loss=own_loss)]),
    "GAN": lambda *args: run(*args, kind=Adversarial, extra=[CurvatureCallback()]),
    "GAN, with loss=": lambda *args: run(*args, kind=Adversarial, extra=[CurvatureCallback(loss=own_loss)]),
    "BatchSizeFinder": lambda *args: run(*args, extra=[BatchSizeFinder(max_trials=1, init_val=64, steps_per_trial=1)]),
    "LearningRateFinder": lambda *args: run(
        *args, extra=[LearningRateFinder(num_training_steps=4, min_lr=1e-3, max_lr=0.1, attr_name="lr")]
    ),
    "dataloader_iter": functools.partial(run, kind=Drawing),
}
