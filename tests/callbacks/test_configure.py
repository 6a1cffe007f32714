"""Lightning's other entry points: the callback, LightningCLI, Fabric; and what Lightning may do to a module."""

from __future__ import annotations

import dataclasses
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
import yaml
from lightning.fabric import Fabric
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging, LearningRateMonitor, WeightAveraging
from lightning.pytorch.cli import LightningCLI, OptimizerCallable
from lightning.pytorch.loggers import TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn

import lightning_optim
from lightning_optim import RuleOptimizer, ScheduleConfig, TailEMA, build_optimizer
from lightning_optim.callbacks import HybridOptimizer
from lightning_optim.lightning import OptimizerConfig
from tests.helpers import guides
from tests.helpers.lightning_jobs import SETTINGS, Save
from tests.helpers.pool import Pool
from tests.test_lightning import Net, Rows, assert_same, of_precision, scalars, trainer, weights
from tests.test_lightning import pytestmark as lightning_warnings

pytestmark = [
    *lightning_warnings,
    # LightningCLI calls jsonargparse in ways that its version 5 will no longer have.
    pytest.mark.filterwarnings(r"ignore:\s*By default only one JsonargparseDeprecationWarning"),
    pytest.mark.filterwarnings(r"ignore:[\s\S]*was deprecated in v4\.\d+\.0 and will be removed in v5"),
]

LR = 1e-2
SCHEDULE: dict[str, Any] = {"schedule": {"schedule": "cosine", "warmup_steps": 2}}


class Without(Net):
    """A module that says nothing of optimizers."""

    configure_optimizers = L.LightningModule.configure_optimizers


class Other(Without):
    """A module with an optimizer of its own."""

    def configure_optimizers(self) -> Any:
        raise AssertionError("asked for its own optimizer")


class Brings(Without):
    """A module that brings the callback along."""

    def configure_callbacks(self) -> Any:
        return hybrid()


def hybrid(**settings: Any) -> HybridOptimizer:
    return HybridOptimizer("muon", lr=LR, **SCHEDULE, weight_decay=0.1, momentum=0.9, **settings)


def same_as_hybrid() -> Net:
    return Net("muon", **SCHEDULE, weight_decay=0.1, momentum=0.9)


class Record(L.Callback):
    """Weights after every step."""

    def __init__(self) -> None:
        self.seen: list[dict[str, Tensor]] = []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(weights(pl_module))


def assert_same_run(a: L.Trainer, b: L.Trainer) -> None:
    """Same weights and optimizers, to the bit."""
    assert_same(weights(a.lightning_module), weights(b.lightning_module))
    x, y = (t.optimizers[0].state_dict() for t in (a, b))
    assert x["param_groups"] == y["param_groups"]
    assert x["state"].keys() == y["state"].keys()
    for index in x["state"]:
        assert_same(x["state"][index], y["state"][index])


# -- the callback -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Without, Other, Brings])
def test_callback_equals_configure_optimizers(tmp_path: Path, kind: type[Net]) -> None:
    settings = {"max_steps": 4, "gradient_clip_val": 0.05, "accumulate_grad_batches": 2, "log_every_n_steps": 1}
    logger = TensorBoardLogger(tmp_path, name="", version="")
    own = [] if kind is Brings else [hybrid()]
    net = kind("")
    first = trainer(tmp_path, **settings, logger=logger, callbacks=[LearningRateMonitor(), *own])
    first.fit(net, Rows(8))
    second = trainer(tmp_path, **settings)
    second.fit(same_as_hybrid(), Rows(8))

    assert_same_run(first, second)
    assert isinstance(first.optimizers[0], RuleOptimizer) and len(first.optimizers) == 1
    assert first.global_step == 4 and len(net.seen) == 8
    assert net.lrs == second.lightning_module.lrs  # pyright: ignore
    actual = scalars(tmp_path)  # once per micro-batch
    for step, lrs in enumerate(net.lrs):
        for value in actual["lr-Muon/muon/hidden", step]:
            assert value == pytest.approx(lrs[0], rel=1e-6)
    assert "configure_optimizers" not in vars(net)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "16-mixed"])
def test_callback_resumes_bitwise(tmp_path: Path, precision: Any) -> None:
    def start(*callbacks: L.Callback) -> L.Trainer:
        settings = {"max_steps": 6, "gradient_clip_val": 0.5, **of_precision(precision)}
        return trainer(tmp_path, callbacks=list(callbacks), **settings)

    first = start(hybrid(), Save(tmp_path / "last.ckpt"))
    first.fit(Without(""), Rows(6))
    second = start(hybrid())
    second.fit(Without(""), Rows(6), ckpt_path=tmp_path / "last.ckpt")
    assert len(second.lightning_module.seen) == 3  # pyright: ignore
    assert_same_run(first, second)
    configured = start()  # the checkpoint is that of a module with our optimizer
    configured.fit(same_as_hybrid(), Rows(6), ckpt_path=tmp_path / "last.ckpt")
    assert_same_run(first, configured)


def test_callback_validates_and_fits_again(tmp_path: Path) -> None:
    class Validated(Without):
        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.log("val_loss", self.loss(batch))

    net, run = Validated(""), trainer(tmp_path, max_epochs=1, callbacks=[hybrid()])
    run.validate(net, Rows(1), verbose=False)
    assert "configure_optimizers" not in vars(net)
    run.fit(net, Rows(2), Rows(1))
    run.validate(net, Rows(1), verbose=False)
    first = run.optimizers[0]
    run.fit_loop.max_epochs = 2
    run.fit(net, Rows(2), Rows(1))
    assert run.global_step == 4
    assert run.optimizers[0] is not first  # as with any configure_optimizers
    assert "configure_optimizers" not in vars(net)


def test_callback_gives_the_module_back_after_an_exception(tmp_path: Path) -> None:
    class Failing(Other):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            raise KeyError("lost")

    def own() -> None: ...

    net = Failing("")
    net.configure_optimizers = own
    with pytest.raises(KeyError, match="lost"):
        trainer(tmp_path, max_steps=1, callbacks=[hybrid()]).fit(net, Rows(1))
    assert net.configure_optimizers is own


class Table(L.Callback):
    """The file as it was after every step."""

    def __init__(self, path: Path):
        self.path, self.seen = path, []

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seen.append(self.path.read_text())


def test_callback_writes_who_owns_what_and_keeps_it_true(tmp_path: Path) -> None:
    class Freeze(L.Callback):
        def on_train_epoch_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
            if trainer.current_epoch == 2:
                pl_module.get_submodule("out").requires_grad_(False)
                pl_module.register_parameter("late", nn.Parameter(torch.zeros(3)))

    table, logger = Table(tmp_path / "roles.md"), TensorBoardLogger(tmp_path, name="", version="")
    callbacks = [Unfreeze("hidden"), hybrid(), Freeze(), table]
    trainer(tmp_path, max_epochs=3, logger=logger, log_every_n_steps=1, callbacks=callbacks).fit(Without(""), Rows(2))
    rows = [{line.split(" | ")[0]: line for line in text.splitlines() if " | " in line} for text in table.seen]
    initial, thawed, frozen = table.seen[::2]
    assert table.seen[1::2] == [initial, thawed, frozen]  # written only when it changed
    assert "| hidden.weight" not in rows[0] and "108 weights frozen: hidden.weight, hidden.bias" in initial
    assert "| 12 x 8 | hidden | muon | 1 of 12 x 8 | momentum_buffer 384 B |" in rows[2]["| hidden.weight"]
    assert "| 12 | vector | adamw |  | exp_avg 48 B, exp_avg_sq 48 B |" in rows[2]["| hidden.bias"]
    assert "| 8 x 12 | hidden | muon |" in rows[2]["| out.weight"]
    assert "weights frozen" not in thawed and "460 trainable weights" in thawed
    assert "| out.weight" not in rows[4] and "96 weights frozen: out.weight" in frozen
    assert "3 weights trainable, but in no group: late" in frozen

    events = EventAccumulator(str(tmp_path), size_guidance={"tensors": 0}).Reload()
    pages = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors("roles/text_summary")}
    assert pages == {0: initial, 2: thawed, 4: frozen}


def test_callback_writes_no_file_where_the_trainer_writes_none(tmp_path: Path) -> None:
    trainer(tmp_path, max_steps=1, callbacks=[hybrid()]).fit(Without(""), Rows(1))
    assert not list(tmp_path.iterdir())
    trainer(tmp_path, max_steps=1, callbacks=[hybrid()], enable_checkpointing=True).fit(Without(""), Rows(1))
    assert (tmp_path / "roles.md").exists()  # the checkpoint is in tmp_path/checkpoints


def test_two_callbacks_raise(tmp_path: Path) -> None:
    net = Without("")
    with pytest.raises(ValueError, match="more than one HybridOptimizer"):
        trainer(tmp_path, max_steps=1, callbacks=[hybrid(), hybrid()]).fit(net, Rows(1))
    assert "configure_optimizers" not in vars(net)


def test_callback_with_an_unknown_name_raises() -> None:
    with pytest.raises(ValueError, match="unknown optimizer 'muno'; did you mean 'muon'"):
        HybridOptimizer("muno", lr=LR)


# -- LightningCLI -----------------------------------------------------------------------------------------------------


class Data(L.LightningDataModule):
    def train_dataloader(self) -> Any:
        return Rows(2)


class Typed(Net):
    def __init__(self, optimizer: OptimizerConfig) -> None:
        super().__init__("")
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self)


class Either(Net):
    def __init__(self, optimizer: OptimizerConfig | OptimizerCallable = lightning_optim.AdamW) -> None:
        super().__init__("")
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        if isinstance(self.optimizer, OptimizerConfig):
            return self.optimizer(self)
        return self.optimizer(self.parameters())


class Stock(Net):
    """As Lightning's documentation writes it."""

    def __init__(self, optimizer: OptimizerCallable = lightning_optim.AdamW) -> None:
        super().__init__("")
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters())


YAML = """
seed_everything: 0
trainer:
  max_steps: 2
  accelerator: cpu
  devices: 1
  logger: false
  enable_checkpointing: false
  enable_progress_bar: false
  enable_model_summary: false
"""
OPTIMIZER_YAML = """
model:
  optimizer:
    name: muon
    lr: 0.01
    schedule: {schedule: cosine, warmup_steps: 1}
    weight_decay: 0.1
    rest_lr: 1e-3
    overrides:
      - [head, null, {lr: 0.005}]
      - ["hidden.*", adamw]
    settings: {momentum: 0.9}
"""


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run a program of one line, `LightningCLI(model, Data)`, with YAML and flags."""
    pytest.importorskip("jsonargparse")

    def call(model: type[Net], text: str, *flags: str) -> L.Trainer:
        file = tmp_path / "run.yaml"
        file.write_text(text)
        root = f"--trainer.default_root_dir={tmp_path}"
        monkeypatch.setattr(sys, "argv", ["program", "fit", f"--config={file}", root, *flags])
        return LightningCLI(model, Data, save_config_kwargs={"overwrite": True}).trainer

    return call


def lrs(run: L.Trainer) -> dict[str, float]:
    return {group["name"]: group["initial_lr"] for group in run.optimizers[0].param_groups}


def test_cli_reads_the_typed_config(tmp_path: Path, cli: Any) -> None:
    run = cli(Typed, YAML + OPTIMIZER_YAML)
    assert run.global_step == 2
    expected = Net(
        "muon",
        schedule={"schedule": "cosine", "warmup_steps": 1},
        weight_decay=0.1,
        rest_lr=1e-3,
        overrides=[("head", None, {"lr": 5e-3}), ("hidden.*", "adamw")],
        momentum=0.9,
    )
    by_hand = trainer(tmp_path, max_steps=2)
    by_hand.fit(expected, Rows(2))
    assert_same_run(run, by_hand)
    assert lrs(run)["adamw/head"] == 5e-3

    saved = (tmp_path / "config.yaml").read_text()  # the CLI's own record starts the same run
    assert yaml.safe_load(saved)["model"]["optimizer"]["settings"] == {"momentum": 0.9}
    assert_same_run(cli(Typed, saved), run)
    assert lrs(cli(Typed, saved, "--model.optimizer.lr=0.5"))["muon/hidden"] == 0.5


def test_cli_takes_config_or_class(cli: Any) -> None:
    assert_same_run(cli(Either, YAML + OPTIMIZER_YAML), cli(Typed, YAML + OPTIMIZER_YAML))
    by_class = """
model:
  optimizer: {class_path: lightning_optim.Lion, init_args: {lr: 0.5}}
"""
    run = cli(Either, YAML + by_class)
    assert type(run.optimizers[0]) is lightning_optim.Lion and run.optimizers[0].param_groups[0]["lr"] == 0.5


def test_cli_takes_our_classes(cli: Any) -> None:
    assert type(cli(Stock, YAML).optimizers[0]) is lightning_optim.AdamW
    for name in ("lightning_optim.Lion", "Lion"):
        run = cli(
            Stock, YAML, f"--model.optimizer={name}", "--model.optimizer.lr=0.5", "--model.optimizer.betas=[0.8,0.9]"
        )
        (group,) = run.optimizers[0].param_groups
        assert (type(run.optimizers[0]), group["lr"], group["betas"]) == (lightning_optim.Lion, 0.5, (0.8, 0.9))


# It says that it overrides the module's method, as asked.
@pytest.mark.filterwarnings("ignore:.*configure_optimizers` will be overridden by `LightningCLI")
def test_cli_takes_the_callback(cli: Any) -> None:
    callback = """
  callbacks:
    - class_path: lightning_optim.callbacks.HybridOptimizer
      init_args: {name: muon, lr: 0.25, rest_lr: 0.125, schedule: linear}
      dict_kwargs: {momentum: 0.5}
"""
    run = cli(Stock, YAML + callback, "--optimizer=torch.optim.SGD", "--optimizer.lr=0.1")
    actual = {g["name"]: (g["initial_lr"], g.get("momentum")) for g in run.optimizers[0].param_groups}
    assert actual["muon/hidden"] == (0.25, 0.5) and actual["adamw/head"][0] == 0.125
    assert "configure_optimizers" in vars(run.lightning_module)  # what the CLI put there is back


@pytest.mark.parametrize("flag", ["name=muno", "schedule=cosin", "lr=fast", "momentum=0.9"])
def test_cli_refuses_what_it_cannot_read(cli: Any, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises((SystemExit, ValueError)) as error:
        cli(Typed, YAML, "--model.optimizer.name=muon", "--model.optimizer.lr=1", f"--model.optimizer.{flag}")
    assert flag.split("=")[-1] in str(error.value) + capsys.readouterr().err


def test_config_checks_names_before_a_model_is_there() -> None:
    for case in ({"name": "muno"}, {"rest": "adamv"}, {"schedule": "cosin"}):
        with pytest.raises(ValueError, match="did you mean .*'(muon|adamw|cosine)'"):
            OptimizerConfig(**{"name": "muon", "lr": LR, **case})


# -- checkpoints with hyperparameters ---------------------------------------------------------------------------------


class Kept(Net):
    """Keeps what it was made of in its checkpoints."""

    def __init__(self, optimizer: OptimizerConfig, others: Any = None) -> None:
        super().__init__("")
        self.save_hyperparameters()
        self.optimizer = optimizer

    def configure_optimizers(self) -> Any:
        return self.optimizer(self)


def config() -> OptimizerConfig:
    """Every kind of value, some from numpy, as sweeps give them."""
    return OptimizerConfig(
        "muon",
        lr=np.float64(1e-2),  # pyright: ignore[reportArgumentType]
        schedule={"schedule": "power", "cooldown": 0.5},
        rest_settings={"betas": (np.float32(0.875), 0.95)},
        overrides=[("head", None, {"lr": np.float64(5e-3)}), ("hidden.*", "adamw")],
        settings={"ns_steps": np.int64(3), "averaging": {"tail_ema": {"start": 2}}},
    )


def test_a_config_of_an_earlier_checkpoint_loads(tmp_path: Path) -> None:
    """The schedule's settings were fields of their own."""
    path, earlier = tmp_path / "config.pt", config()
    fields = {"schedule": "power", "cooldown": 0.5, "warmup_steps": None, "horizon": None}
    vars(earlier).update(fields)
    torch.save(earlier, path)
    assert torch.load(path, weights_only=True) == config()
    vars(earlier).update(fields | {"schedule": None, "cooldown": None})
    torch.save(earlier, path)
    assert torch.load(path, weights_only=True) == dataclasses.replace(config(), schedule=None)


def test_settings_of_the_schedule_have_one_place() -> None:
    with pytest.raises(
        ValueError, match=r"^warmup_steps is a setting of the schedule: give schedule=\{'warmup_steps': 2"
    ):
        lightning_optim.configure_optimizers(Net(""), "muon", lr=LR, warmup_steps=2)


def test_checkpoints_with_a_config_load(tmp_path: Path) -> None:
    others = [ScheduleConfig("power", cooldown=0.5), TailEMA(start=2), {"deep": (config(),)}]
    path = tmp_path / "last.ckpt"
    whole = trainer(tmp_path, max_steps=4, callbacks=[Save(path, 1)])
    whole.fit(Kept(config(), others), Rows(4))

    loaded = torch.load(path, weights_only=True)["hyper_parameters"]
    assert loaded["optimizer"] == config() and loaded["others"] == others
    assert {type(x) for x in (loaded["optimizer"].lr, loaded["optimizer"].settings["ns_steps"])} == {float, int}
    module = Kept.load_from_checkpoint(path, map_location="cpu")
    assert module.optimizer == config()
    resumed = trainer(tmp_path, max_steps=4)
    resumed.fit(module, Rows(4), ckpt_path=path)
    assert resumed.global_step == 4
    assert_same(weights(resumed.lightning_module), weights(whole.lightning_module))


def test_a_config_loads_where_only_the_package_is_imported(tmp_path: Path) -> None:
    """A module with `from __future__ import annotations` does not look at what its annotations name."""
    torch.save({"optimizer": config()}, tmp_path / "a.pt")
    script = (
        "import sys, torch, lightning_optim\n"
        "found = torch.load('a.pt', weights_only=True)['optimizer']\n"
        "assert found.name == 'muon' and 'lightning' not in sys.modules\n"
    )
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-W", "error", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_cli_checkpoints_load(tmp_path: Path, cli: Any) -> None:
    run = cli(Kept, YAML + OPTIMIZER_YAML)
    run.save_checkpoint(tmp_path / "cli.ckpt")
    again = Kept.load_from_checkpoint(tmp_path / "cli.ckpt", map_location="cpu")
    assert again.optimizer.name == "muon" and again.optimizer.settings == {"momentum": 0.9}
    assert_same(weights(again), weights(run.lightning_module))


# -- Fabric -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_fabric_trains_clips_and_resumes_bitwise(tmp_path: Path, precision: Any) -> None:
    class Forward(Net):
        def forward(self, batch: Tensor) -> Tensor:
            return self.loss(batch)

    fabric = Fabric(accelerator="cpu", devices=1, precision=precision)

    def start() -> tuple[Any, Any]:
        net = Forward("").to(torch.bfloat16 if precision == "bf16-true" else None)
        return fabric.setup(net, build_optimizer(net, "muon", lr=LR, weight_decay=0.1))

    def train(model: Any, optimizer: Any, rows: range) -> None:
        for k in rows:
            fabric.backward(model(Rows(9).row(k)))
            norm = fabric.clip_gradients(model, optimizer, max_norm=0.05)
            assert norm is not None and norm > 0.05
            optimizer.step()
            optimizer.zero_grad()

    model, optimizer = start()
    train(model, optimizer, range(3))
    fabric.save(tmp_path / "state", {"model": model, "optimizer": optimizer, "step": 3})
    train(model, optimizer, range(3, 6))

    resumed, again = start()
    state = {"model": resumed, "optimizer": again, "step": 0}
    assert fabric.load(tmp_path / "state", state) == {}
    train(resumed, again, range(state["step"], 6))
    assert_same(weights(model.module), weights(resumed.module))
    a, b = optimizer.state_dict(), again.state_dict()
    assert a["param_groups"] == b["param_groups"] and len(a["state"]) == 5
    for index in a["state"]:
        assert_same(a["state"][index], b["state"][index])

    plain = Net("").to(torch.bfloat16 if precision == "bf16-true" else None)
    by_hand = build_optimizer(plain, "muon", lr=LR, weight_decay=0.1)
    for k in range(6):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            loss = plain.loss(Rows(9).row(k))
        loss.backward()
        nn.utils.clip_grad_norm_([p for g in by_hand.param_groups for p in g["params"]], 0.05)  # in Fabric's order
        by_hand.step()
        by_hand.zero_grad()
    assert_same(weights(model.module), weights(plain))


# -- the guide --------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:No seed found", "ignore:The number of training batches"
)
def test_the_guide_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("jsonargparse", reason="LightningCLI needs it")
    text = guides.read("lightning_optim/README.md")
    section = text[text.index("\n## Lightning\n") : text.index("\n## Plain PyTorch\n")]
    files = ("train.py", "hybrid.py", "cli.py", "fabric.py")
    for name, block in zip(files, guides.blocks("lightning_optim/README.md", "python", "Lightning"), strict=True):
        (tmp_path / name).write_text(block.text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    commands = [shlex.split(line) for line in section.splitlines() if line.startswith("python cli.py")]
    commands.append(["python", "cli.py", "fit", "--config=given.yaml", "--trainer.max_steps=20"])
    case, callback = re.findall(r"`(model: .*?|trainer: .*?)`[ ,.]", section)
    (tmp_path / "given.yaml").write_text(case)

    runs: list[L.Trainer] = []
    fit = L.Trainer.fit
    monkeypatch.setattr(L.Trainer, "fit", lambda self, *a, **k: (fit(self, *a, **k), runs.append(self)))
    for argv in [["python", "train.py"], ["python", "hybrid.py"], *commands]:
        monkeypatch.setattr(sys, "argv", argv[1:])
        runpy.run_path(argv[1], run_name="__main__")
    net = runpy.run_path("fabric.py")["optimizer"]
    assert [run.global_step for run in runs] == [20] * 4
    momenta = [run.optimizers[0].param_groups[0]["momentum"] for run in runs]
    assert momenta == [0.95, 0.95, 0.9, 0.9]
    assert {float(slots["step"]) for slots in net.optimizer.state.values()} == {20.0}
    assert (tmp_path / "lightning_logs" / "version_1" / "roles.md").read_text().startswith("Model at step 0")
    ((entry,),) = (yaml.safe_load(callback)["trainer"]["callbacks"],)
    assert entry["class_path"] == f"lightning_optim.callbacks.{HybridOptimizer.__name__}"
    HybridOptimizer(**{**entry["init_args"], "lr": float(entry["init_args"]["lr"])})
    del sys.modules["train"]


# -- several processes ------------------------------------------------------------------------------------------------


@pytest.mark.dist
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_callback_on_two_processes_equals_one(tmp_path: Path, pool: Pool, strategy: str, clip: float | None) -> None:
    """Two micro-batches are averaged as those of two ranks are, so the weights are the same to the bit under DDP."""
    job = {"folder": str(tmp_path), "strategy": strategy, "gradient_clip_val": clip}
    first = pool.run("tests.helpers.lightning_jobs:fit", 2, **job)
    table = (tmp_path / "roles.md").read_text()
    assert "| 12 x 8 | hidden | muon | 1 of 12 x 8 | momentum_buffer 384 B |" in table
    assert (tmp_path / "last.ckpt").is_dir() == (strategy == "fsdp2")

    net, own = Without(""), HybridOptimizer("muon", **SETTINGS)
    one = trainer(tmp_path, max_steps=6, accumulate_grad_batches=2, gradient_clip_val=clip, callbacks=[own])
    one.fit(net, Rows(12))
    for actual, seen, lrs in first:
        assert (seen, lrs) == (6, net.lrs)
        assert_same(actual, first[0][0])
        for key, value in weights(net).items():
            near = 0.0 if strategy == "ddp" else 1e-6  # FSDP2 sums the norm, and a bias's gradient, in another order
            torch.testing.assert_close(actual[key], value, rtol=near, atol=near)

    for actual, seen, lrs in pool.run("tests.helpers.lightning_jobs:fit", 2, **job, resume=str(tmp_path / "last.ckpt")):
        assert (seen, lrs) == (3, net.lrs[3:])
        assert_same(actual, first[0][0])


@pytest.mark.dist
def test_a_checkpoint_of_ddp_goes_on_under_fsdp2(tmp_path: Path, pool: Pool) -> None:
    """Lightning takes the numbers of parameters in one file for places in the module, and matrices are a group."""
    job: dict[str, Any] = {"folder": str(tmp_path)}
    (expected, _, lrs), _ = pool.run("tests.helpers.lightning_jobs:fit", 2, **job, strategy="ddp")
    last = str(tmp_path / "last.ckpt")
    for actual, seen, others in pool.run("tests.helpers.lightning_jobs:fit", 2, **job, strategy="fsdp2", resume=last):
        assert (seen, others) == (3, lrs[3:])
        for key, value in expected.items():
            torch.testing.assert_close(actual[key], value, rtol=1e-6, atol=1e-6)


@pytest.mark.dist
def test_lightning_and_plain_torch_load_each_others_checkpoints(tmp_path: Path, pool: Pool) -> None:
    """Weights are under `state_dict`, the optimizer is under `optimizer_0`; the trainer's own state is `meta.pt`."""
    job = {"folder": str(tmp_path), "strategy": "fsdp2"}
    (expected, _, lrs), _ = pool.run("tests.helpers.lightning_jobs:fit", 2, **job)
    for actual, _ in pool.run("tests.helpers.lightning_jobs:interchange", 2, folder=str(tmp_path), lrs=lrs):
        assert_same(actual, expected)
    shutil.copy(tmp_path / "last.ckpt" / "meta.pt", tmp_path / "plain.ckpt")
    for actual, seen, _ in pool.run("tests.helpers.lightning_jobs:fit", 2, **job, resume=str(tmp_path / "plain.ckpt")):
        assert seen == 3
        assert_same(actual, expected)


# -- what Lightning does to modules -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["muon", "adamw"])
def test_bf16_true_equals_a_plain_loop(tmp_path: Path, name: str) -> None:
    net, plain = Net(name, weight_decay=0.1), Net(name).bfloat16()
    run = trainer(tmp_path, max_steps=4, precision="bf16-true", gradient_clip_val=0.05)
    run.fit(net, Rows(4))
    optimizer = build_optimizer(plain, name, lr=LR, weight_decay=0.1)
    for row in Rows(4):
        plain.loss(row).backward()
        nn.utils.clip_grad_norm_(plain.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    assert {p.dtype for p in net.parameters()} == {torch.bfloat16}
    assert_same(weights(net), weights(plain))
    state = run.optimizers[0].state
    assert {t.dtype for slots in state.values() for k, t in slots.items() if k != "step"} == {torch.float32}


@pytest.mark.parametrize("callback", [WeightAveraging, EMAWeightAveraging])
@pytest.mark.parametrize("entry", ["module", "callback"])
def test_weight_averaging(tmp_path: Path, callback: Any, entry: str) -> None:
    def start(*callbacks: L.Callback) -> tuple[Net, L.Trainer]:
        own = [hybrid()] if entry == "callback" else []
        net = Without("") if own else same_as_hybrid()
        return net, trainer(tmp_path, max_steps=6, callbacks=[*callbacks, *own])

    settings: dict[str, Any] = {"decay": 0.5} if callback is EMAWeightAveraging else {}
    record = Record()
    plain, run = start(record)
    run.fit(plain, Rows(6))
    averaged, run = start(callback(**settings), Save(tmp_path / "last.ckpt"))
    run.fit(averaged, Rows(6))

    mix = get_ema_avg_fn(0.5) if settings else lambda mean, new, n: mean + (new - mean) / (n + 1)
    mean = deepcopy(record.seen[0])
    for n, seen in enumerate(record.seen[1:], start=1):
        mean = {key: mix(mean[key], seen[key], n) for key in mean}  # pyright: ignore
    for key, value in weights(averaged).items():
        torch.testing.assert_close(value, mean[key])
        assert not torch.equal(value, record.seen[-1][key])

    resumed, again = start(callback(**settings))
    again.fit(resumed, Rows(6), ckpt_path=tmp_path / "last.ckpt")
    assert_same_run(run, again)


class Late(Net):
    """Has no parameter before configure_model."""

    def __init__(self, name: str, **settings: Any):
        super().__init__(name, **settings)
        self.later = dict(self.named_children())
        self._modules.clear()

    def configure_model(self) -> None:
        for name, module in self.later.items():
            self.add_module(name, module)


@pytest.mark.parametrize("entry", ["module", "callback"])
def test_configure_model(tmp_path: Path, entry: str) -> None:
    class LateWithout(Late):
        configure_optimizers = L.LightningModule.configure_optimizers

    own = [hybrid()] if entry == "callback" else []
    late = LateWithout("") if own else Late("muon", **SCHEDULE, weight_decay=0.1, momentum=0.9)
    assert not list(late.parameters())
    first, second = trainer(tmp_path, max_steps=3, callbacks=own), trainer(tmp_path, max_steps=3)
    first.fit(late, Rows(3))
    second.fit(same_as_hybrid(), Rows(3))
    assert_same_run(first, second)


class Unfreeze(BaseFinetuning):
    """Trains one layer from the second epoch on, in the words of Lightning's documentation."""

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def freeze_before_training(self, pl_module: L.LightningModule) -> None:
        self.freeze(pl_module.get_submodule(self.layer))

    def finetune_function(self, pl_module: L.LightningModule, epoch: int, optimizer: Any) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.get_submodule(self.layer), optimizer)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # Any optimizer needs this: a resumed run freezes everything again, and unfreezes it at the start of an epoch.
        for group in trainer.optimizers[0].param_groups:
            for p in group["params"]:
                p.requires_grad_(True)


@pytest.mark.parametrize("layer", ["hidden", "out"])
@pytest.mark.parametrize("name", ["adamw", "muon"])
@pytest.mark.parametrize("entry", ["module", "callback"])
def test_unfreezing(tmp_path: Path, entry: str, name: str, layer: str) -> None:
    settings: dict[str, Any] = {"schedule": "linear", "weight_decay": 0.1, "rest_lr": LR / 4}

    def start(*callbacks: L.Callback, **run: Any) -> tuple[Net, L.Trainer]:
        own = [HybridOptimizer(name, lr=LR, **settings)] if entry == "callback" else []
        net = Without("") if own else Net(name, **settings)
        return net, trainer(tmp_path, max_epochs=3, callbacks=[Unfreeze(layer), *own, *callbacks], **run)

    record = Record()
    logger = TensorBoardLogger(tmp_path, name="", version="")
    watch = {"logger": logger, "log_every_n_steps": 1}
    net, first = start(record, LearningRateMonitor(), Save(tmp_path / "last.ckpt", 5), **watch)
    before = weights(net)
    first.fit(net, Rows(2))
    _, frozen, thawed, *_ = record.seen
    for key in before:
        inside = key.startswith(f"{layer}.")
        assert torch.equal(before[key], frozen[key]) == inside, key
        assert not torch.equal(frozen[key], thawed[key]), key

    groups = {g["name"]: g for g in first.optimizers[0].param_groups}
    joined = list(groups)[len(net.lrs[0]) :]
    assert joined == [f"{name}/hidden_1", "adamw/vector"][: 2 if layer == "hidden" else 1]
    share = {f"{name}/hidden_1": 0.1, "adamw/vector": 0.1 / (4 if name == "muon" else 1)}  # of the main group's lr
    decay = {f"{name}/hidden_1": 0.1, "adamw/vector": 0.0}
    actual = scalars(tmp_path)
    for k, label in enumerate(joined, start=len(net.lrs[0])):
        assert groups[label]["weight_decay"] == decay[label]
        assert [lrs[k] for lrs in net.lrs[2:]] == pytest.approx([share[label] * lrs[0] for lrs in net.lrs[2:]])
        assert actual[f"lr-{type(first.optimizers[0]).__name__}/{label}", 5] == [pytest.approx(net.lrs[5][k])]

    resumed, second = start()
    second.fit(resumed, Rows(2), ckpt_path=tmp_path / "last.ckpt")
    assert_same_run(first, second)


class Plain(Net):
    """One unnamed group, as torch's classes have it."""

    def configure_optimizers(self) -> Any:
        return lightning_optim.SGD([p for p in self.parameters() if p.requires_grad], lr=LR, momentum=0.9)


def test_unfreezing_resumes_with_an_unnamed_group(tmp_path: Path) -> None:
    def start(*callbacks: L.Callback) -> L.Trainer:
        return trainer(tmp_path, max_epochs=3, callbacks=[Unfreeze("out"), *callbacks])

    first, second = start(Save(tmp_path / "last.ckpt", 5)), start()
    first.fit(Plain("sgd"), Rows(2))
    second.fit(Plain("sgd"), Rows(2), ckpt_path=tmp_path / "last.ckpt")  # Lightning replaces `param_groups`
    assert [g["name"] for g in second.optimizers[0].param_groups] == ["sgd", "sgd_1"]
    assert_same_run(first, second)


def test_unfrozen_group_follows_the_schedule(tmp_path: Path) -> None:
    net = Net("muon", schedule="linear")
    trainer(tmp_path, max_epochs=4, callbacks=[Unfreeze("out")]).fit(net, Rows(2))
    main = [LR * (1 - step / 8) for step in range(8)]
    assert [lrs[0] for lrs in net.lrs] == pytest.approx(main, rel=1e-12)
    assert [len(lrs) for lrs in net.lrs] == [4] * 2 + [5] * 6
    assert [lrs[-1] for lrs in net.lrs[2:]] == pytest.approx([lr / 10 for lr in main[2:]], rel=1e-12)
