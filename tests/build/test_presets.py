"""The pretraining stacks: what they are, that fine-tuning is spared them, and that they work unchanged everywhere."""

from __future__ import annotations

import io
import logging
import shutil
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import LlamaConfig, LlamaForCausalLM, Trainer

from hf_integration import KeepSchedule, TrainingArguments, attach
from lightning_optim import RuleOptimizer, ScheduleLR, build_optimizer, plan
from lightning_optim.build.recipes import PRESETS
from lightning_optim.callbacks import HybridOptimizer
from lightning_optim.core import options
from lightning_optim.core.rule import REGISTRY, hyperparameters
from tests.helpers import jobs
from tests.helpers.pool import Pool
from tests.hf_integration.test_trainer import Tokens, arguments, gpt2, llama, trainer_of, weights
from tests.test_lightning import STEPS, Net, Rows, assert_same, trainer

pytestmark = [
    # Lightning asks torch's pytree in a way that torch has deprecated.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
]

BUILT = [name for name, preset in PRESETS.items() if preset.rule in REGISTRY]
every_preset = pytest.mark.parametrize("name", BUILT)
BETAS = {
    "embedding": (0.8, 0.99),
    "head": (0.8, 0.99),
    "gain": (0.8, 0.99),
    "bias": (0.8, 0.997),
    "output_bias": (0.8, 0.9965),
}


def rule_of(name: str) -> str:
    return PRESETS[name].rule


def names_by_settings(optimizer: RuleOptimizer) -> dict[str, dict[str, Any]]:
    return {name: g for g in optimizer.param_groups for name in g["param_names"]}


@every_preset
def test_every_preset_is_what_it_says(name: str) -> None:
    preset, model = PRESETS[name], llama(tied=False)
    optimizer = build_optimizer(model, preset.rule, preset=name)
    hidden = [g for g in optimizer.param_groups if g["rule"] == preset.rule]
    names = {*hyperparameters(REGISTRY[preset.rule]), *options.CONSTRAINTS, "cautious_decay", "cautious_when"}
    for key in preset.settings.keys() & names:
        assert {g[key] for g in hidden} == {preset.settings[key]}, key
    others = [g for g in optimizer.param_groups if g["rule"] != preset.rule]
    assert {g["rule"] for g in others} == {"adamw"} and {g["constraint"] for g in others} == {"none"}
    assert {(g["uw_floor"], g["pin"], g["cautious_decay"]) for g in others} == {(0.0, False, 0.0)}
    assert optimizer.curve is not None and optimizer.curve.schedule == "power"
    members = optimizer.averages.members if optimizer.averages else []
    assert {m.name for m in members} == set(preset.settings.get("averaging", {}))
    assert preset.source and str(plan(model, preset.rule, preset=name))


@pytest.mark.parametrize("name", [n for n in BUILT if n in ("pr321", "record46")])
def test_roles_of_the_record(name: str) -> None:
    """Gains, biases and the bias of attention's output layer are told apart by what their modules are."""
    model = gpt2()
    optimizer = build_optimizer(model, rule_of(name), preset=name)
    actual = names_by_settings(optimizer)
    layer = "transformer.h.0"
    both = torch.cat([
        p.detach().flatten() for n, p in model.named_parameters() if n.endswith(("wte.weight", "wpe.weight"))
    ])
    expected = {
        "transformer.wte.weight": (
            "embedding",
            pytest.approx(0.3 * float(both.square().mean().sqrt()), rel=1e-5),
            True,
        ),
        f"{layer}.ln_1.weight": ("gain", 0.01, False),
        f"{layer}.ln_1.bias": ("bias", 0.01, False),
        f"{layer}.attn.c_attn.bias": ("bias", 0.01, False),
        f"{layer}.attn.c_proj.bias": ("output_bias", 0.01, False),
        f"{layer}.mlp.c_proj.bias": ("bias", 0.01, False),
    }
    for key, (kind, lr, corrected) in expected.items():
        group = actual[key]
        assert (group["betas"], group["lr"], group["correct_bias"]) == (BETAS[kind], lr, corrected), key
        assert group["eps"] == 1e-10 and group["cooldown"] == pytest.approx(1413 / 2900)
    separate = names_by_settings(build_optimizer(biased_llama(), rule_of(name), preset=name))
    assert separate["model.layers.0.self_attn.o_proj.bias"]["betas"] == BETAS["output_bias"]
    assert separate["model.layers.0.self_attn.q_proj.bias"]["betas"] == BETAS["bias"]
    assert separate["lm_head.weight"]["lr"] == 1 / 320


def biased_llama() -> nn.Module:
    model: Any = llama(tied=False)
    attention = model.get_submodule("model.layers.0.self_attn")
    for layer in attention.children():
        if isinstance(layer, nn.Linear):
            layer.bias = nn.Parameter(torch.zeros(layer.out_features))
    return model


def test_curve_of_the_record() -> None:
    """Flat until step 514 and 1487 of 2690, then a power of 1.2 towards 2900; the momentum's warm-up as published."""
    settings = PRESETS["record46"].settings["schedule"]
    from lightning_optim.schedule import ScheduleConfig

    curve, rest = ScheduleConfig.of(settings), PRESETS["record46"].settings["rest_settings"]
    for t in (0, 513, 515, 1488, 2000, 2689):
        for group, length in (({}, 2386), (rest, 1413)):
            expected = min(1.0, ((2900 - t) / length) ** 1.2)
            assert curve.factor(t, lambda: 2690, group) == pytest.approx(expected, rel=1e-6)
    assert curve.momentum(150, lambda: 2690, 0.95) == pytest.approx(0.9)
    assert curve.momentum(2689, lambda: 2690, 0.95) == 0.95


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing\\w*. is deprecated:FutureWarning")  # peft's
@every_preset
@pytest.mark.parametrize("case", [{"lr": 2e-5}, {}], ids=["a fine-tuning rate", "adapters"])
def test_fine_tuning_gets_the_rule_only_and_is_told(
    name: str, case: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model: Any = llama()
    if not case:
        model, case = get_peft_model(model, LoraConfig(target_modules="all-linear", r=4)), {"lr": 0.01}
    with caplog.at_level(logging.WARNING):
        optimizer = build_optimizer(model, rule_of(name), preset=name, **case)
    told = [r.getMessage() for r in caplog.records if "is for pretraining" in r.getMessage()]
    assert len(told) == 1 and f"preset {name!r}" in told[0] and "Left out: " in told[0]
    assert optimizer.averages is None and optimizer.curve is None
    for group in optimizer.param_groups:
        assert (group["constraint"], group["uw_floor"], group["pin"], group["cautious_decay"]) == ("none", 0, False, 0)
        assert group["lr_convention"] == "adamw" and group["lr"] == case["lr"]


def test_arguments_go_before_the_preset() -> None:
    model: Any = llama(tied=False)
    optimizer = build_optimizer(
        model,
        "muon",
        preset="muon_h",
        lr=0.03,
        overrides=[("head", None, {"lr": 0.5})],
        schedule={"cooldown": 0.5, "momentum_warmup_steps": 10},
        averaging={"tail_ema": {"start": 5}},
        rest_settings={"betas": (0.9, 0.9)},
    )
    by_role = {g["role"]: g for g in optimizer.param_groups}
    assert by_role["hidden"]["lr"] == 0.03 and by_role["head"]["lr"] == 0.5
    size = model.get_input_embeddings().weight.detach().square().mean().sqrt()
    assert by_role["embedding"]["lr"] == pytest.approx(0.7 * float(size), rel=1e-5)
    assert by_role["vector"]["betas"] == (0.9, 0.9) and by_role["vector"]["eps"] == 1e-10
    curve = optimizer.curve
    assert (curve.schedule, curve.cooldown, curve.momentum_warmup_steps) == ("power", 0.5, 10)
    cosine = build_optimizer(llama(), "muon", preset="muon_h", schedule={"schedule": "cosine"}).curve
    assert (cosine.schedule, cosine.cooldown) == ("cosine", None)
    with pytest.raises(ValueError, match="unknown preset 'muonh'; did you mean 'muon_h'"):
        build_optimizer(llama(), "muon", preset="muonh")
    with pytest.raises(ValueError, match="a recipe or a preset, not both"):
        build_optimizer(llama(), "muon", preset="muon_h", recipe="muon-speedrun")
    with pytest.raises(ValueError, match="recipe 'muon_h' is of 'muon', not of 'adamw'"):
        build_optimizer(llama(), "adamw", preset="muon_h")


def train(model: nn.Module, optimizer: RuleOptimizer, scheduler: ScheduleLR, some: range) -> None:
    for t in some:
        x = torch.randn(4, 7, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        (model(x) - x.flip(1)).square().sum().backward()
        optimizer.step()
        scheduler.step()


def started(name: str, model: nn.Module) -> tuple[RuleOptimizer, ScheduleLR]:
    optimizer = build_optimizer(model, rule_of(name), preset=name, averaging=early(name))
    return optimizer, ScheduleLR(optimizer, total_steps=8)


def early(name: str) -> dict[str, Any] | None:
    """The preset's averages, at work in a run of eight steps."""
    case = PRESETS[name].settings.get("averaging")
    soon = {"ema_nesterov": {"start": 2, "stop": 7}, "tail_ema": {"start": 3}}
    return None if case is None else {k: {**v, **soon[k]} for k, v in case.items()}


@every_preset
def test_resume_is_bitwise(name: str) -> None:
    torch.set_num_threads(1)
    whole, half = jobs.Deep(), jobs.Deep()
    train(whole, *started(name, whole), range(8))
    optimizer, scheduler = started(name, half)
    train(half, optimizer, scheduler, range(4))
    optimizer.eval()
    file = io.BytesIO()
    torch.save([half.state_dict(), optimizer.state_dict(), scheduler.state_dict()], file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    resumed = jobs.Deep()
    optimizer, scheduler = started(name, resumed)
    for x, state in zip((resumed, optimizer, scheduler), saved, strict=True):
        x.load_state_dict(state)
    optimizer.train()
    train(resumed, optimizer, scheduler, range(4, 8))
    assert_same(weights(whole), weights(resumed))
    torch.set_num_threads(2)


@every_preset
def test_a_preset_trains_a_model_of_transformers(name: str) -> None:
    """Whose tied embedding starts at 0.02, not at 1 as the benchmark's."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sizes: Any = {"hidden_size": 64, "intermediate_size": 176, "num_hidden_layers": 1, "num_attention_heads": 2}
    model: Any = LlamaForCausalLM(LlamaConfig(vocab_size=128, tie_word_embeddings=True, **sizes))
    optimizer = build_optimizer(model, rule_of(name), preset=name)
    scheduler, losses = ScheduleLR(optimizer, total_steps=30), []
    ids = (torch.arange(16)[:, None] * 7 + torch.arange(32) ** 2) % 128
    for _ in range(30):
        optimizer.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        scheduler.step()
        losses.append(float(loss.detach()))
    torch.set_num_threads(2)
    assert losses[-1] < 0.75 * losses[0] and max(losses) < 1.2 * losses[0], losses


@pytest.mark.dist
def test_the_rate_of_an_embedding_is_the_same_on_shards(pool: Pool) -> None:
    whole = build_optimizer(embedded(), "muon", preset="muon_h").param_groups
    for actual in pool.run("tests.build.test_presets:sharded_rates", 2):
        assert actual == pytest.approx({g["name"]: g["lr"] for g in whole}, rel=1e-6)


def embedded() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Embedding(13, 8), nn.Linear(8, 8), nn.Linear(8, 13))


def sharded_rates(rank: int, world: int) -> dict[str, float]:
    model: Any = fully_shard(embedded(), mesh=init_device_mesh("cpu", (world,)))
    return {g["name"]: g["lr"] for g in build_optimizer(model, "muon", preset="muon_h").param_groups}


@pytest.mark.dist
@every_preset
@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_ranks_equal_one_process(pool: Pool, name: str, how: str) -> None:
    torch.set_num_threads(1)
    model = jobs.Deep()
    optimizer, scheduler = started(name, model)
    train(model, optimizer, scheduler, range(8))
    optimizer.eval()
    torch.set_num_threads(2)
    start = weights(jobs.Deep())
    for actual in pool.run("tests.build.test_presets:on_ranks", 2, name=name, how=how):
        for key, p in weights(model).items():
            assert (actual[key] - p).norm() <= 1e-4 * (p - start[key]).norm(), key


def on_ranks(rank: int, world: int, name: str, how: str) -> dict[str, Tensor]:
    """The same run on two ranks; the averaged weights."""
    model: Any = nn.parallel.DistributedDataParallel(jobs.Deep()) if how == "ddp" else jobs._deep(world)
    optimizer, scheduler = started(name, model)
    train(model, optimizer, scheduler, range(8))
    optimizer.eval()
    full = {k.removeprefix("module."): p for k, p in model.named_parameters()}
    return {k: (p.full_tensor() if hasattr(p, "full_tensor") else p).detach().clone() for k, p in full.items()}


@every_preset
def test_lightning_validates_saves_and_resumes(tmp_path: Path, name: str) -> None:
    """Validation and the checkpoint see the averaged weights; the resumed run is the same, bit for bit."""

    class Watched(Net):
        validated: list[Tensor]

        def validation_step(self, batch: Tensor, batch_idx: int) -> None:
            self.validated = [*getattr(self, "validated", []), self.hidden.weight.detach().clone()]

    class Save(L.Callback):
        def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int):
            if batch_idx == 4:
                self.trained = weights(pl_module)
                trainer.save_checkpoint(tmp_path / "last.ckpt")

    def net() -> Net:
        return Watched(rule_of(name), PRESETS[name].settings["lr"], preset=name, averaging=early(name))

    whole, resumed, save = net(), net(), Save()
    settings: dict[str, Any] = {"max_steps": STEPS, "val_check_interval": 3, "num_sanity_val_steps": 1}
    first, second = trainer(tmp_path, callbacks=[save], **settings), trainer(tmp_path, **settings)
    validation = [torch.zeros(4, 6, dtype=torch.long)]
    first.fit(whole, Rows(STEPS), validation)
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)
    second.fit(resumed, Rows(STEPS), validation, ckpt_path=tmp_path / "last.ckpt")
    assert_same(weights(whole), weights(resumed))
    averaged = bool(early(name))
    optimizer = first.optimizers[0]
    assert isinstance(optimizer, RuleOptimizer)
    assert whole.lrs[5:] == resumed.lrs and whole.momenta[5:] == resumed.momenta
    tail = "tail_ema" in (early(name) or {})
    assert torch.equal(saved["state_dict"]["hidden.weight"], save.trained["hidden.weight"]) == (not tail)
    assert (optimizer.averages is not None) == averaged
    before = whole.hidden.weight.detach().clone()
    optimizer.train()
    assert torch.equal(before, whole.hidden.weight) == (not tail)


def test_the_callback_takes_a_preset_with_its_schedule(tmp_path: Path) -> None:
    fit = trainer(tmp_path, max_steps=2, callbacks=[HybridOptimizer("muon", preset="muon_h")])
    fit.fit(Net("adamw"), Rows(STEPS))
    optimizer = fit.optimizers[0]
    assert isinstance(optimizer, RuleOptimizer)
    assert optimizer.curve.schedule == "power" and optimizer.param_groups[0]["constraint"] == "hyperball"


def test_lightning_takes_accumulated_gradients_at_one_point(tmp_path: Path) -> None:
    """Ahead of where the weights are, which validation sees."""

    class Watched(Net):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.at = [*getattr(self, "at", []), self.hidden.weight.detach().clone()]
            return super().training_step(batch, batch_idx)

        def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
            self.after = [*getattr(self, "after", []), self.hidden.weight.detach().clone()]

    net = Watched("muon", averaging={"ema_nesterov": {"step_size": 2.0, "beta": 0.5, "start": 1}})
    trainer(tmp_path, max_steps=STEPS // 2, accumulate_grad_batches=2).fit(net, Rows(STEPS))
    for k in range(2, STEPS, 2):
        assert torch.equal(net.at[k], net.at[k + 1])
        assert not torch.equal(net.after[k - 1], net.at[k])
    ahead, b, before = net.after[1], torch.zeros(12, 8), build_start(Net("muon"))
    for k in range(1, STEPS, 2):
        b, before = b.lerp(net.after[k] - before, 0.5), net.after[k]
        ahead = before + 2.0 * b
        if k + 1 < STEPS:
            torch.testing.assert_close(net.at[k + 1], ahead)


def build_start(net: Net) -> Tensor:
    return net.hidden.weight.detach().clone()


@every_preset
def test_the_flag_follows_the_schedule_saves_and_resumes(tmp_path: Path, name: str) -> None:
    """Learning rates by role, the averaged weights in the checkpoint, an exact resume; by `attach` it is the same."""

    def args(**settings: Any) -> Any:
        steps = {
            "max_steps": 8,
            "save_strategy": "steps",
            "save_steps": 5,
            "learning_rate": PRESETS[name].settings["lr"],
        }
        return arguments(tmp_path, **steps, **settings)

    flag = f", averaging={early(name)}" if early(name) else ""
    flagged = args(optim=rule_of(name), optim_args=f"preset={name}{flag}")
    whole: Any = trainer_of(llama(tied=False), flagged, KeepSchedule())
    whole.train()
    optimizer = whole.optimizer.optimizer
    shutil.rmtree(tmp_path / "checkpoint-8", ignore_errors=True)
    rates = {g["name"]: float(g["lr"]) for g in optimizer.param_groups}
    assert optimizer.curve is not None
    for group in optimizer.param_groups:
        factor = optimizer.curve.factor(8, lambda: 8, group)
        assert rates[group["name"]] == pytest.approx(group["initial_lr"] * factor)
    plain: Any = Trainer(llama(tied=False), args(optim="adamw_torch"), train_dataset=Tokens())
    again = attach(plain, rule_of(name), preset=name, averaging=early(name))
    again.train(str(tmp_path / "checkpoint-5"))
    assert_same(weights(whole.model), weights(again.model))
    assert_same_state(whole, again)


def assert_same_state(a: Any, b: Any) -> None:
    one, two = (x.optimizer.state_dict()["state"] for x in (a, b))
    assert one.keys() == two.keys()
    for index in one:
        assert_same(one[index], two[index])


@pytest.mark.parametrize("case", [{}, {"learning_rate": 5e-5}], ids=["no flag", "its default"])
def test_the_flag_of_a_fine_tuning_run_holds_for_a_preset(tmp_path: Path, case: dict[str, Any]) -> None:
    args = TrainingArguments(str(tmp_path), optim="soap_muon", optim_args="preset=record46", use_cpu=True, **case)
    actual = args.optimizer_cls_and_kwargs()
    assert actual is not None and actual[1]["lr"] == 5e-5
    optimizer = actual[0]()(llama(), **actual[1])
    assert optimizer.averages is None and {g["lr"] for g in optimizer.param_groups} == {5e-5}
