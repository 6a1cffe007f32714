"""Lightning's real trainer: one optimizer under automatic optimization, exact resume, and the pretraining example."""

from __future__ import annotations

import math
import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    LearningRateMonitor,
)
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.plugins import MixedPrecision
from lightning.pytorch.strategies import DeepSpeedStrategy, FSDPStrategy
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, AutoTokenizer

import lightning_optim
from lightning_optim import RuleOptimizer, build_optimizer, configure_optimizers
from lightning_optim.callbacks import HybridOptimizer

pytestmark = [
    # Lightning asks torch's pytree in a way that torch has deprecated.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]

ROOT = Path(__file__).parent.parent
VOCABULARY = 16
STEPS = 8


class Rows:
    """Deterministic batches; Lightning saves and restores the position."""

    def __init__(self, count: int):
        self.count, self.position, self.start = count, 0, 0

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Tensor]:
        for k in range(self.start, self.count):
            self.position = k + 1
            yield self.row(k)
        self.start = 0

    def row(self, k: int) -> Tensor:
        return torch.randint(VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(k))

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self.start = state_dict["position"]


class Unsized:
    """Batches of unknown number."""

    def __iter__(self) -> Iterator[Tensor]:
        yield from Rows(STEPS)


class Net(L.LightningModule):
    """One parameter of every role, and a record of what Lightning called."""

    def __init__(self, name: str, lr: float = 1e-2, **settings: Any):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.hidden = nn.Linear(8, 12)
        self.out = nn.Linear(12, 8, bias=False)
        self.head = nn.Linear(8, VOCABULARY, bias=False)
        self.name, self.lr, self.settings = name, lr, settings
        self.seen: list[Tensor] = []
        self.lrs: list[list[float]] = []
        self.momenta: list[list[Any]] = []

    def loss(self, batch: Tensor) -> Tensor:
        x = self.embedding(batch)
        logits = self.head(x + self.out(torch.tanh(self.hidden(x))))
        return nn.functional.cross_entropy(logits.flatten(0, 1), (batch.flatten() + 1) % VOCABULARY)

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        self.seen.append(batch)
        return self.loss(batch)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.lrs.append([group["lr"] for group in optimizer.param_groups])
        self.momenta.append([group.get("momentum", group.get("betas")) for group in optimizer.param_groups])

    def configure_optimizers(self) -> Any:
        return configure_optimizers(self, self.name, lr=self.lr, **self.settings)


def trainer(path: Path, **settings: Any) -> L.Trainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
    where = {"accelerator": "cpu", "devices": 1, "logger": False, "default_root_dir": path}
    return L.Trainer(**{**where, **quiet, **settings})


def of_precision(precision: Any) -> dict[str, Any]:
    """The trainer's argument; by name, Lightning takes bf16 on a CPU for 16-mixed."""
    if precision != "16-mixed":
        return {"precision": precision}
    return {"plugins": [MixedPrecision(precision, "cpu", torch.amp.GradScaler("cpu"))]}


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def cosine(step: int, warmup: int, total: int, least: float = 0.0) -> float:
    if step < warmup:
        return (step + 1) / warmup
    return least + (1 - least) * 0.5 * (1 + math.cos(math.pi * (step - warmup) / (total - warmup)))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-mixed"])
@pytest.mark.parametrize(("clip", "accumulate"), [(None, 1), (0.05, 1), (0.05, 2)])
@pytest.mark.parametrize("name", ["muon", "sgd"])
def test_automatic_optimization_equals_a_plain_loop(
    tmp_path: Path, name: str, clip: float | None, accumulate: int, precision: Any
) -> None:
    net, plain = Net(name, schedule={"schedule": "cosine", "warmup_steps": 2}), Net(name)
    fit = trainer(
        tmp_path, max_steps=4, gradient_clip_val=clip, accumulate_grad_batches=accumulate, **of_precision(precision)
    )
    fit.fit(net, Rows(4 * accumulate))

    optimizer = build_optimizer(plain, name, lr=1e-2)
    schedule = LambdaLR(optimizer, lambda step: cosine(step, 2, 4))
    rows = list(Rows(4 * accumulate))
    scaler = torch.amp.GradScaler("cpu", enabled=precision == "16-mixed")
    dtype = torch.float16 if precision == "16-mixed" else torch.bfloat16
    for k, row in enumerate(rows):
        with torch.autocast("cpu", dtype, enabled=precision != "32-true"):
            loss = plain.loss(row)
        scaler.scale(loss / accumulate).backward()
        if (k + 1) % accumulate == 0:
            scaler.unscale_(optimizer)
            if clip is not None:
                in_order = [p for g in optimizer.param_groups for p in g["params"]]  # the Trainer's
                assert nn.utils.clip_grad_norm_(in_order, clip) > clip
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            schedule.step()

    assert_same(weights(net), weights(plain))
    assert len(fit.optimizers) == 1
    assert isinstance(fit.optimizers[0], RuleOptimizer)
    assert fit.global_step == len(net.lrs) == 4
    assert len(net.seen) == len(rows)  # the closure ran once per step, and each batch once
    assert all(torch.equal(a, b) for a, b in zip(net.seen, rows, strict=True))


@pytest.mark.parametrize("run", [{"max_steps": STEPS}, {"max_epochs": 2}, {"max_epochs": 2, "total_steps": STEPS}])
def test_schedule_has_exact_learning_rates(tmp_path: Path, run: dict[str, int]) -> None:
    case = {"total_steps": run.pop("total_steps")} if "total_steps" in run else {}
    net = Net("muon", rest_lr=5e-3, schedule={"schedule": "cosine", "warmup_steps": 3, "min_lr_ratio": 0.1, **case})
    trainer(tmp_path, **run).fit(net, Rows(STEPS if "max_steps" in run else STEPS // 2))
    main, *rest = zip(*net.lrs, strict=True)
    factors = [cosine(step, 3, STEPS, least=0.1) for step in range(STEPS)]
    assert main == pytest.approx([1e-2 * f for f in factors], rel=1e-14)
    assert len(rest) == 3
    for lrs in rest:
        assert lrs == pytest.approx([5e-3 * f for f in factors], rel=1e-14)


def test_linear_and_constant_schedules(tmp_path: Path) -> None:
    linear, constant = (
        Net("adamw", schedule={"schedule": "linear", "warmup_steps": 1}),
        Net("adamw", schedule={"warmup_steps": 2}),
    )
    for net in (linear, constant):
        trainer(tmp_path, max_steps=5).fit(net, Rows(5))
    assert [lrs[0] for lrs in linear.lrs] == pytest.approx([1e-2 * f for f in (1, 1, 0.75, 0.5, 0.25)], rel=1e-14)
    assert [lrs[0] for lrs in constant.lrs] == pytest.approx([1e-2 * f for f in (0.5, 1, 1, 1, 1)], rel=1e-14)


@pytest.mark.parametrize(("run", "loader"), [({"max_epochs": -1}, Rows(STEPS)), ({"max_epochs": 1}, Unsized())])
def test_schedule_of_a_run_of_unknown_length_raises(tmp_path: Path, run: dict[str, int], loader: Any) -> None:
    with pytest.raises(ValueError, match="give total_steps in schedule="):
        trainer(tmp_path, **run).fit(Net("adamw", schedule="cosine"), loader)


WARM = [0.85 + 0.1 * k / 4 for k in range(4)] + [0.95] * 4


def test_momentum_warm_up_is_linear_and_of_the_main_rule(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    settings = {"logger": logger, "callbacks": [LearningRateMonitor(log_momentum=True)], "log_every_n_steps": 1}
    muon = Net("muon", schedule={"momentum_warmup_steps": 4}, overrides=[("out.*", "muon", {"momentum": 0.9})])
    trainer(tmp_path, max_steps=STEPS, **settings).fit(muon, Rows(STEPS))
    ours, other, *rest = zip(*muon.momenta, strict=True)
    assert ours == pytest.approx(WARM, rel=1e-14)
    assert other == pytest.approx([0.85 + 0.05 * min(1, k / 4) for k in range(STEPS)], rel=1e-14)
    assert {betas for group in rest for betas in group} == {(0.9, 0.999)}
    actual = scalars(tmp_path)
    logged = [actual["lr-Muon/muon/hidden-momentum", step][0] for step in range(STEPS)]
    assert logged == pytest.approx(WARM, rel=1e-6)

    adamw = Net("adamw", schedule={"momentum_warmup_steps": 2, "momentum_start": 0.5}, betas=(0.9, 0.95))
    trainer(tmp_path, max_steps=4).fit(adamw, Rows(4))
    for betas in zip(*adamw.momenta, strict=True):
        assert betas == ((0.5, 0.95), (0.7, 0.95), (0.9, 0.95), (0.9, 0.95))


@pytest.mark.parametrize(
    ("name", "schedule", "settings", "message"),
    [
        ("adafactor", {}, {}, "adafactor has no momentum"),
        ("sgd", {}, {}, r"below the momentum of group 'sgd/\w+', 0.0; got 0.85"),
        ("muon", {}, {"momentum": 0.8}, "0.8; got 0.85"),
        ("muon", {"momentum_start": -0.1}, {}, "0.95; got -0.1"),
        ("muon", {"momentum_warmup_steps": -1}, {}, "must be >= 0, got -1"),
    ],
)
def test_momentum_warm_up_that_cannot_be_raises(
    name: str, schedule: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        configure_optimizers(Net(name), name, lr=1e-3, schedule={"momentum_warmup_steps": 4, **schedule}, **settings)


class Sized(Net):
    """Brings its data, in batches of a size that a finder may change."""

    batch_size = 2

    def train_dataloader(self) -> Any:
        rows: Any = torch.cat([Rows(1).row(k) for k in range(8)])
        return torch.utils.data.DataLoader(rows, batch_size=self.batch_size)


class Midway(BatchSizeFinder):
    """Searches when training has begun, as in Lightning's documentation."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        pass

    def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.current_epoch == 0:
            self.scale_batch_size(trainer, pl_module)


@pytest.mark.parametrize(
    ("finder", "settings", "factor"),
    [
        (BatchSizeFinder, {"schedule": "linear"}, lambda step: 1 - step / 8),
        (Midway, {"schedule": "linear"}, lambda step: 1 - step / 8),
        (
            BatchSizeFinder,
            {"schedule": {"schedule": "power", "cooldown": 16}},
            lambda step: (8 - step) / 16,
        ),  # the first step's, too
        (BatchSizeFinder, {"schedule": "cosine", "averaging": {"tail_ema": {"start": 0.5}}}, lambda t: cosine(t, 0, 8)),
    ],
    ids=["linear", "midway", "power", "averages"],
)
def test_a_search_for_the_batch_size_is_not_the_run(
    tmp_path: Path, finder: type[BatchSizeFinder], settings: dict[str, Any], factor: Any
) -> None:
    net = Sized("muon", **settings)
    search = finder(max_trials=3, steps_per_trial=3)
    fit = trainer(tmp_path, max_epochs=2, callbacks=[search], num_sanity_val_steps=0)
    fit.fit(net)
    assert (net.batch_size, fit.global_step) == (8, 8)
    assert [lrs[0] for lrs in net.lrs[-8:]] == pytest.approx([1e-2 * factor(step) for step in range(8)])
    assert len(net.lrs) > 8


def test_the_momentum_falls_at_the_end_of_the_run_not_of_the_search(tmp_path: Path) -> None:
    net = Sized("muon", schedule={"momentum_cooldown_steps": 4})
    search = BatchSizeFinder(max_trials=3, steps_per_trial=3)
    trainer(tmp_path, max_epochs=2, callbacks=[search], num_sanity_val_steps=0).fit(net)
    assert [m[0] for m in net.momenta[-8:]] == pytest.approx([0.95] * 5 + [0.925, 0.9, 0.875])


@pytest.mark.parametrize("warmup_steps", [0, 2])
def test_a_found_learning_rate_is_the_peak_of_the_schedule(tmp_path: Path, warmup_steps: int) -> None:
    net = Sized("muon", schedule={"schedule": "cosine", "warmup_steps": warmup_steps})
    search = LearningRateFinder(num_training_steps=16, min_lr=1e-4, max_lr=1.0)
    fit = trainer(tmp_path, max_epochs=1, callbacks=[search], num_sanity_val_steps=0)
    fit.fit(net)
    assert net.lr != 1e-2 and search.optimal_lr is not None and net.lr == search.optimal_lr.suggestion()
    factors = [cosine(step, warmup_steps, 16) for step in range(16)]
    assert [lrs[0] for lrs in net.lrs[-16:]] == pytest.approx([net.lr * f for f in factors])


def test_a_second_fit_has_a_length_of_its_own(tmp_path: Path) -> None:
    class Tested(Net):
        def test_step(self, batch: Tensor, batch_idx: int) -> None:
            pass

    fit, net = trainer(tmp_path, max_epochs=1), Tested("muon", schedule={"schedule": "power", "cooldown": 8})
    for batches, epochs in ((8, 1), (2, 2)):
        fit.fit_loop.max_epochs = epochs
        fit.fit_loop.epoch_progress.reset()
        net.lrs.clear()
        fit.test(net, Rows(1), verbose=False)
        fit.fit(net, Rows(batches))
        total = batches * epochs
        assert [lrs[0] for lrs in net.lrs] == pytest.approx([1e-2 * (total - t) / 8 for t in range(total)])


@pytest.mark.parametrize("most", [-1, 3])
def test_an_accumulation_that_changes_counts_in_the_length(tmp_path: Path, most: int) -> None:
    net = Net("muon", schedule="linear")
    accumulation = GradientAccumulationScheduler({0: 1, 1: 3})
    trainer(tmp_path, max_epochs=2, max_steps=most, callbacks=[accumulation]).fit(net, Rows(4))
    total = 6 if most == -1 else most  # four steps, then one of three batches and one of the last
    assert [lrs[0] for lrs in net.lrs] == pytest.approx([1e-2 * (1 - t / total) for t in range(total)])


def test_a_schedule_that_asks_at_once_resumes_within_an_epoch(tmp_path: Path) -> None:
    """Asking the trainer for the length of the run before it starts would lose the loader's position."""

    class Save(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if trainer.global_step == 3:
                trainer.save_checkpoint(tmp_path / "at.ckpt")

    whole, resumed = (Net("muon", schedule={"schedule": "power", "cooldown": 12}) for _ in range(2))
    trainer(tmp_path, max_epochs=1, callbacks=[Save()]).fit(whole, Rows(5))
    trainer(tmp_path, max_epochs=1).fit(resumed, Rows(5), ckpt_path=tmp_path / "at.ckpt")
    assert len(resumed.seen) == 2 and len(whole.seen) == 5
    assert all(torch.equal(a, b) for a, b in zip(resumed.seen, whole.seen[3:], strict=True))
    assert resumed.lrs == whole.lrs[3:]
    assert_same(weights(resumed), weights(whole))


def test_the_monitor_shows_the_momentum_of_every_group(tmp_path: Path) -> None:
    def shown(make: Any) -> list[float]:
        class Own(Net):
            def configure_optimizers(self) -> Any:
                return make(self)

        monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
        settings = {"logger": TensorBoardLogger(tmp_path), "callbacks": [monitor], "log_every_n_steps": 1}
        trainer(tmp_path, max_steps=2, **settings).fit(Own(""), Rows(2))
        return [float(x) for x in monitor.last_momentum_values.values()]  # pyright: ignore[reportArgumentType]

    assert shown(lambda net: lightning_optim.AdamW(net.parameters())) == [0.9]
    assert shown(lambda net: lightning_optim.SGD(net.parameters(), momentum=0.8)) == [0.8]
    assert shown(lambda net: configure_optimizers(net, "adamw", lr=1e-3)) == [0.9] * 4
    assert shown(lambda net: configure_optimizers(net, "muon", lr=1e-3)) == [0.95, 0.9, 0.9, 0.9]
    assert shown(lambda net: build_optimizer(net, "soap", lr=1e-3, rest="sgd")) == [0.95, 0, 0, 0]
    rest = {"rest": "sgd", "rest_settings": {"momentum": 0.5}}
    assert shown(lambda net: build_optimizer(net, "muon", lr=1e-3, **rest)) == [0.95, 0.5, 0.5, 0.5]


def test_unknown_schedule_raises() -> None:
    with pytest.raises(ValueError, match="unknown schedule 'cosin'.*cosine"):
        configure_optimizers(Net("adamw"), "adamw", lr=1e-3, schedule="cosin")


def test_learning_rate_monitor_names_every_group(tmp_path: Path) -> None:
    logger = TensorBoardLogger(tmp_path, name="", version="")
    settings = {"logger": logger, "callbacks": [LearningRateMonitor()], "log_every_n_steps": 1}
    trainer(tmp_path, max_steps=3, **settings).fit(Net("muon", schedule={"warmup_steps": 2}), Rows(3))
    actual = scalars(tmp_path)
    tags = [f"lr-Muon/{group}" for group in ("muon/hidden", "adamw/embedding", "adamw/head", "adamw/vector")]
    assert sorted({tag for tag, _ in actual if tag.startswith("lr-")}) == sorted(tags)
    expected = {0: 0.5e-2, 1: 1e-2, 2: 1e-2}
    for tag in tags:
        for step, lr in expected.items():
            assert actual[tag, step] == [pytest.approx(lr, rel=1e-6)], (tag, step)  # TensorBoard keeps float32


@pytest.mark.parametrize("run", [{"max_steps": STEPS}, {"max_epochs": 1}])
@pytest.mark.parametrize(
    ("name", "momentum_warmup_steps"),
    [("adamw", 0), ("adamw", 5), ("adafactor", 0), ("muon", 0), ("muon", 5)],  # elements, sums, matrices
)
def test_resume_is_bitwise(tmp_path: Path, name: str, momentum_warmup_steps: int, run: dict[str, int]) -> None:
    class Save(L.Callback):
        def on_train_batch_end(
            self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
        ) -> None:
            if batch_idx == 2:
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    def net() -> Net:
        settings = {"momentum_warmup_steps": momentum_warmup_steps, "momentum_start": 0.5}
        return Net(name, weight_decay=0.1, schedule={"schedule": "cosine", "warmup_steps": 2, **settings})

    whole, resumed = net(), net()
    first, second = trainer(tmp_path, callbacks=[Save()], **run), trainer(tmp_path, **run)
    first.fit(whole, Rows(STEPS))
    torch.load(tmp_path / "last.ckpt", weights_only=True)  # nothing of ours is pickled
    second.fit(resumed, Rows(STEPS), ckpt_path=tmp_path / "last.ckpt")

    assert whole.lrs[3:] == resumed.lrs
    assert whole.momenta[3:] == resumed.momenta
    assert len(resumed.seen) == STEPS - 3
    assert all(torch.equal(a, b) for a, b in zip(whole.seen[3:], resumed.seen, strict=True))
    assert_same(weights(whole), weights(resumed))
    a, b = (t.optimizers[0].state_dict() for t in (first, second))
    assert a["param_groups"] == b["param_groups"]
    assert a["state"].keys() == b["state"].keys()
    assert len(a["state"]) == len(list(whole.parameters()))
    for index in a["state"]:
        assert_same(a["state"][index], b["state"][index])


# The scaler leaves out the first step, and torch then takes the scheduler's for premature.
@pytest.mark.filterwarnings(r"ignore:Detected call of `lr_scheduler.step\(\)` before `optimizer.step\(\)`")
def test_step_that_the_scaler_skips_changes_nothing(tmp_path: Path) -> None:
    class Overflowing(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.before = getattr(self, "before", []) + [(weights(self), len(self.optimizers().state))]  # pyright: ignore
            loss = super().training_step(batch, batch_idx)
            return loss * 1e30 if batch_idx == 0 else loss

    net = Overflowing("muon")
    fit = trainer(tmp_path, max_steps=3, gradient_clip_val=1.0, **of_precision("16-mixed"))
    fit.fit(net, Rows(3))
    (initial, none), (skipped, still_none), (stepped, some) = net.before
    assert none == still_none == 0
    assert some == len(initial)
    assert_same(initial, skipped)
    assert not any(torch.equal(skipped[name], stepped[name]) for name in skipped)
    assert fit.precision_plugin.state_dict()["scale"] == 2.0**15


def test_presets_have_the_published_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import pretrain_lightning as example

    actual = {}
    for name, preset in example.PRESETS.items():
        with torch.device("meta"):
            model = example.build_model(preset.vocabulary, preset)
        actual[name] = sum(p.numel() for p in model.parameters())
    assert actual == {
        "micro": 166_208,
        "tiny": 533_120,
        "small": 12_415_872,
        "9m": 8_995_968,
        "60m": 58_073_600,
        "130m": 134_105_856,
        "350m": 367_969_280,
        "1b": 1_339_082_752,
    }
    # Table 3 of arXiv:2502.07752: GiB of bfloat16 weights and both moments of Adam
    published = {"60m": 0.32, "130m": 0.75, "350m": 2.05, "1b": 7.48}
    for name, size in published.items():
        assert actual[name] * 3 * 2 / 2**30 == pytest.approx(size, abs=0.01), name


def test_optim_args_of_the_example_reach_the_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "examples")
    import pretrain_lightning as example

    case = ["--optim", "alice", "--optim_args", "rank=8, leading=4, refresh=fixed:5, switch=False"]
    monkeypatch.setattr(sys, "argv", ["pretrain_lightning.py", *case])
    module = example.Pretraining(example.build_model(64, example.PRESETS["tiny"]), example.arguments())
    groups = module.configure_optimizers()["optimizer"].param_groups
    (matrices,) = [g for g in groups if g["rule"] == "alice"]
    assert {k: matrices[k] for k in ("rank", "leading", "refresh", "switch")} == {
        "rank": 8,
        "leading": 4,
        "refresh": "fixed:5",
        "switch": False,
    }


def scalars(directory: Path) -> dict[tuple[str, int], list[float]]:
    """Values of every event file under a directory by tag and step; what a resumed run repeats is there twice."""
    actual = defaultdict(list)
    for file in sorted(directory.rglob("events.out.tfevents.*")):
        events = EventAccumulator(str(file)).Reload()
        for tag in events.Tags()["scalars"]:
            for event in events.Scalars(tag):
                actual[tag, event.step].append(event.value)
    return actual


def start(output: Path, *flags: str) -> subprocess.Popen[str]:
    """The example, in its own process, on three files of the standard library."""
    library = Path(sysconfig.get_path("stdlib"))
    data = [str(library / name) for name in ("argparse.py", "ast.py", "typing.py")]
    settings = {"optim": "muon", "max_steps": 40, "warmup_steps": 4, "momentum_warmup_steps": 15, "batch_size": 8}
    settings |= {"val_every": 10, "checkpoint_every": 10, "log_every": 1, "output_dir": output}
    command = [sys.executable, str(ROOT / "examples" / "pretrain_lightning.py"), "--data", *data, *flags]
    for key, value in settings.items():
        command += [f"--{key}", str(value)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, cwd=output.parent, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def finish(process: subprocess.Popen[str]) -> str:
    """Its output; it must have succeeded."""
    record, _ = process.communicate(timeout=120)
    assert process.returncode == 0, record
    return record


def kill_at(process: subprocess.Popen[str], output: Path, step: int) -> Path:
    """End it without warning once a checkpoint is there; returns the checkpoint."""
    deadline = time.monotonic() + 120
    while not (actual := list(output.rglob(f"step={step}.ckpt"))):
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was faster than its killer: give it more steps"
    return actual[0]


def test_example_killed_and_resumed_equals_uninterrupted(tmp_path: Path) -> None:
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    uninterrupted = start(straight)
    kill_at(start(broken, "--resume"), broken, 10)
    checkpoint = kill_at(start(broken, "--resume"), broken, 20)
    checkpoint.write_bytes(checkpoint.read_bytes()[:-1000])  # as if killed while writing
    record, resumed = finish(uninterrupted), finish(start(broken, "--resume"))
    assert "step=10.ckpt" in resumed
    assert all(len([*run.rglob("step=*.ckpt")]) == 2 for run in (straight, broken))

    expected, actual = scalars(straight), scalars(broken)
    for tag, steps in {
        "train_loss": range(40),
        "val_loss": (9, 19, 29, 39, 40),
        "lr-Muon/muon/hidden": range(40),
    }.items():
        assert [step for name, step in sorted(expected) if name == tag] == list(steps)
        for step in steps:
            assert len(expected[tag, step]) == 1
            assert set(actual[tag, step]) == set(expected[tag, step]), (tag, step)
    assert expected["val_loss", 39] == expected["val_loss", 40]  # the last one in training, and the final one
    assert expected["val_loss", 40][0] < expected["val_loss", 9][0]
    (printed,) = re.findall(r"validation loss: (\d+\.\d{4}) nat", record)
    assert float(printed) == pytest.approx(expected["val_loss", 40][0], abs=1e-4)

    a, b = (AutoModelForCausalLM.from_pretrained(run / "model") for run in (straight, broken))
    assert_same(a.state_dict(), b.state_dict())
    tokenizer = AutoTokenizer.from_pretrained(straight / "model")
    text = "def run(self):\n    return 'é'\n"
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    assert ids.numel() < len(text)
    assert a(input_ids=ids, labels=ids).loss < math.log(len(tokenizer))


def test_fused_backward_trains_as_ordinary_steps_do(tmp_path: Path) -> None:
    nets = [
        Net("muon", fused_backward=fused, schedule={"schedule": "cosine", "warmup_steps": 2}) for fused in (False, True)
    ]
    for net in nets:
        trainer(tmp_path, max_steps=4).fit(net, Rows(4))
    assert_same(weights(nets[0]), weights(nets[1]))
    assert nets[0].lrs == nets[1].lrs and nets[1].hidden.weight.grad is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"accumulate_grad_batches": 2}, "raise the batch size"),
        ({"gradient_clip_val": 1.0}, "give clip_norm"),
        (of_precision("16-mixed"), "use bf16-mixed"),
    ],
)
def test_fused_backward_is_refused_where_gradients_are_needed(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(tmp_path, max_steps=1, **settings).fit(Net("lomo", fused_backward=True), Rows(1))


OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}


@pytest.mark.parametrize(
    ("name", "strategy", "match"),
    [
        ("muon", lambda: FSDPStrategy(), "muon: strategy 'fsdp' is FSDP1.*use FSDP2"),
        ("adamw", lambda: FSDPStrategy(), "adamw: strategy 'fsdp' is FSDP1.*use FSDP2"),
        ("muon", lambda: DeepSpeedStrategy(stage=1), None),
        ("lion", lambda: DeepSpeedStrategy(stage=2), None),
        ("lion", lambda: DeepSpeedStrategy(config=dict(OFFLOAD)), "DeepSpeedCPUAdam in the place of 'lion'"),
    ],
)
def test_strategies_that_flatten_parameters_are_refused(tmp_path: Path, name: str, strategy: Any, match: Any) -> None:
    """They need a card: the trainer gets the strategy when it is there."""
    if "FSDP1" not in str(match):
        pytest.importorskip("deepspeed", reason="DeepSpeedStrategy needs deepspeed")
    module, run = Net(name), trainer(tmp_path, max_steps=2)
    module.trainer = run
    run._accelerator_connector.strategy = strategy()
    if match is None:
        assert module.configure_optimizers()["optimizer"].param_groups[0]["rule"] == name
        return
    with pytest.raises(ValueError, match=match):
        module.configure_optimizers()
    with pytest.raises(ValueError, match=match):
        HybridOptimizer(name, lr=1e-2).setup(run, module, "fit")
    assert "configure_optimizers" not in vars(module)
