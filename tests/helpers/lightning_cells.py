"""Modules and trainers of Lightning, one for each way of training, for tests of all of them."""

from __future__ import annotations

import csv
import functools
import io
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lightning_optim import build_optimizer, configure_optimizers
from lightning_optim.callbacks import CurvatureCallback, HessianBlocks, diagnostics
from lightning_optim.diagnostics.undisturbed import undisturbed
from lightning_optim.diagnostics.view import unwrap_optimizer
from tests.helpers.lightning_jobs import Pooled
from tests.test_lightning import trainer

RULES = {"muon": 1e-2, "sophia_g": 1e-2, "sophia_h": 1e-2, "kfac": 0.05, "lbfgs": 0.3, "hessian_free": 0.3}
"""Learning rate of each rule."""
STEPS = 10
"""Optimizer steps of a run."""


class Classifier(L.LightningModule):
    """Automatic optimization, with a metric, a buffer, a counter and everything that it can log to."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rule, self.lr, self.batch_size, self.calls = rule, RULES[rule], 64, 0
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4))
        self.seen: list[tuple[Tensor, int]] = []
        """Batches and their numbers, since a callback has cleared it."""
        self.mean, self.queue = torchmetrics.MeanMetric(), nn.Buffer(torch.zeros(2))
        self.noise = torch.randn(64, 6, generator=torch.Generator().manual_seed(1))
        self.x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0))

    def loss(self, x: Tensor) -> Tensor:
        """Of rows whose classes are partly noise, so that it has a minimum."""
        noise = self.noise.repeat(2, 1)[: len(x)]
        return F.cross_entropy(self.net(x), (x + 2 * noise)[:, :4].argmax(1))

    def training_step(self, x: Tensor, i: int) -> Any:
        return self.noted(self.loss(x) * (1.0 + i % 2), x, i)  # by the number of the batch

    def by_hand(self, x: Tensor, i: int) -> Tensor:
        """The loss of a batch, from `training_step`."""
        return self.training_step(x, i)

    def noted(self, loss: Tensor, x: Tensor, i: int) -> Tensor:
        """A loss of which everything takes note that can."""
        self.calls += 1
        self.seen.append((x, i))
        self.mean(loss.detach())
        self.queue += 1
        self.log("loss", self.mean, on_step=False, on_epoch=True, batch_size=len(x))
        for logger in self.loggers:
            logger.log_metrics({"calls": self.calls})
        return loss

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.rule, lr=self.lr)

    def train_dataloader(self) -> Any:
        times = STEPS * self.trainer.accumulate_grad_batches * self.batch_size // len(self.x)
        return DataLoader(self.x.repeat(times, 1), batch_size=self.batch_size)  # pyright: ignore


class Manual(Classifier):
    def __init__(self, rule: str) -> None:
        super().__init__(rule)
        self.automatic_optimization = False

    def training_step(self, x: Tensor, i: int) -> Any:
        optimizer: Any = self.optimizers()
        loss = self.noted(self.loss(x), x, i)
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()

    def by_hand(self, x: Tensor, i: int) -> Tensor:
        """The loss of a batch: `training_step` would step the optimizer."""
        return self.loss(x)


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
        loss = self.noted(self.loss(x), x, i)
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

    def by_hand(self, x: Tensor, i: int) -> Tensor:
        return self.training_step(iter([(x, i, 0)]))


class Compared(L.Callback):
    """Compares, at every step of a rule that searches, what is measured with what has been trained, to 1e-5.

    That is the loss that `backward` got and the gradient that it left, and, by the trace of the Hessian, the loss that
    `training_step` makes of the batches once more.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.count = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        pl_module.seen = []  # a finder's

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        self.losses.append(float(loss.detach()) * trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: Any, optimizer: Any) -> None:
        this: Any = unwrap_optimizer(optimizer)
        losses, self.losses = self.losses, []
        if this.estimator is None:  # the generator's
            return
        estimator, params = this.estimator, [p for group in this.param_groups for p in group["params"]]
        estimator.estimate()
        loss, gradient = this.loss_oracle.gradient(params)
        assert loss == pytest.approx(sum(losses) / len(losses), rel=1e-5)
        expected = torch.cat([p.grad.flatten() for p in params])
        assert (torch.cat([g.flatten() for g in gradient]) - expected).norm() <= 1e-5 * expected.norm()
        measured, _ = estimator._hutchinson(params, this.loss_oracle.batches)
        terms = self.products(pl_module, params, estimator._seed(0, everywhere=True))
        assert sum(float(x.double().sum()) for x in measured) == pytest.approx(
            float(terms.sum()), abs=1e-5 * float(terms.abs().sum())
        )
        pl_module.seen, self.count = [], self.count + 1

    def products(self, module: Any, params: list[Tensor], seed: int) -> Tensor:
        """U H u of every parameter, of the mean loss of the batches of the step."""
        generator = torch.Generator().manual_seed(seed)
        u = [(torch.randint(2, p.shape, generator=generator, dtype=torch.int8) * 2 - 1).to(p.dtype) for p in params]
        with undisturbed(module):
            module.log = lambda *args, **kwargs: None
            loss = torch.stack([module.by_hand(*batch) for batch in list(module.seen)]).mean()
            del module.log
            grads = torch.autograd.grad(loss, params, create_graph=True)
            rows = torch.autograd.grad(sum((g * v).sum() for g, v in zip(grads, u, strict=True)), params)  # pyright: ignore
        return torch.stack([(v * h).double().sum() for v, h in zip(u, rows, strict=True)])


def kept(module: Any, made: L.Trainer, folder: Path) -> dict[str, Any]:
    """What must not depend on probes: weights, buffers, optimizer state, metrics, counters, logs, random numbers."""
    out: dict[str, Any] = dict(module.state_dict())
    out |= {f"{i}/{k}": v for o in made.optimizers for i, s in enumerate(o.state.values()) for k, v in s.items()}
    out |= {"mean": module.mean.compute() if module.mean.update_called else None, "calls": module.calls}
    out |= {
        "batches": torch.cat([x for x, _ in module.seen]),
        "logged": made.callback_metrics.get("loss"),
        "steps": made.global_step,
    }
    out |= {"random": torch.rand(3), "python": random.random(), "numpy": float(np.random.rand())}
    log = folder / "metrics.csv"  # of the first process
    with log.open() if log.exists() else io.StringIO() as file:
        rows = [{k: row.get(k) for k in ("calls", "loss")} for row in csv.DictReader(file)]
    out["logs"] = [row for row in rows if any(row.values())]
    return out


def watched_run(folder: Path, way: Run, watching: list[Any]) -> dict[str, Any]:
    """Train with callbacks; see `kept`."""
    random.seed(0)
    np.random.seed(0)
    logger = CSVLogger(folder, name="", version="")
    module, made, *_ = way(folder, "muon", watching, logger=logger)
    return kept(module, made, folder)


def run(
    folder: Path,
    rule: str,
    watching: list[Any],
    kind: type[Classifier] = Classifier,
    extra: Any = (),
    batch_size: int = 64,
    **settings: Any,
) -> Any:
    """Train; the module, the trainer, and the loss of all rows before and after."""
    module: Any = kind(rule)
    module.batch_size = batch_size
    before = float(module.loss(module.x).detach())
    made = trainer(folder, callbacks=[*watching, *extra], max_epochs=1, log_every_n_steps=1, **settings)
    made.fit(module)
    return module, made, before, float(module.loss(module.x).detach())


def own_loss(module: Any, x: Tensor) -> Tensor:
    """The argument `loss` of callbacks, for manual optimization."""
    return module.loss(x)


def blocks(way: str = "automatic") -> HessianBlocks:
    """The callback that evaluates the loss, of few probes."""
    return HessianBlocks(every=3, probes=2, steps=2, loss=own_loss if way.startswith(("manual", "GAN")) else None)


def ddp(*args: Any, **more: Any) -> Any:
    """A run on two processes."""
    strategy = DDPStrategy(process_group_backend="gloo")
    return run(*args, devices=2, strategy=strategy, plugins=[Pooled()], use_distributed_sampler=False, **more)


def job(rank: int, world: int, folder: str, rule: str, preset: str | None) -> list[float]:
    """The losses of a run under DDP."""
    return list(ddp(Path(folder), rule, diagnostics(preset, steps=STEPS) if preset else [])[2:])


def compared_job(rank: int, world: int, folder: str) -> int:
    """How many steps under DDP `Compared` has compared."""
    compared = Compared()
    ddp(Path(folder), "lbfgs", [compared], batch_size=32)
    return compared.count


def watched_job(rank: int, world: int, folder: str) -> list[dict[str, Any]]:
    """What is kept of runs under DDP, without and with probes."""
    hessian = blocks()
    watching = [[], [*diagnostics("matrix", steps=STEPS), hessian]]
    runs = [watched_run(Path(folder) / str(len(some)) / str(rank), ddp, some) for some in watching]
    assert hessian.probe.measured >= 1  # pyright: ignore[reportAttributeAccessIssue]
    return runs


Run = Callable[..., Any]
WAYS: dict[str, Run] = {
    "automatic": run,
    "accumulation": functools.partial(run, accumulate_grad_batches=2),
    "manual": functools.partial(run, kind=Manual),
    "manual, with loss=": lambda *a, **k: run(*a, kind=Manual, extra=[CurvatureCallback(loss=own_loss)], **k),
    "GAN": lambda *a, **k: run(*a, kind=Adversarial, extra=[CurvatureCallback()], **k),
    "GAN, with loss=": lambda *a, **k: run(*a, kind=Adversarial, extra=[CurvatureCallback(loss=own_loss)], **k),
    "BatchSizeFinder": lambda *a, **k: run(
        *a, extra=[BatchSizeFinder(max_trials=1, init_val=64, steps_per_trial=1)], **k
    ),
    "LearningRateFinder": lambda *a, **k: run(
        *a, extra=[LearningRateFinder(num_training_steps=4, min_lr=1e-3, max_lr=0.1, attr_name="lr")], **k
    ),
    "dataloader_iter": functools.partial(run, kind=Drawing),
}
