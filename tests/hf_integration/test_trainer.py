"""The stock Transformers Trainer with our optimizers: tiny random models, real checkpoints, one killed process."""

import dataclasses
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from accelerate.utils.fsdp_utils import fsdp2_switch_optimizer_parameters
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Trainer,
    TrainerCallback,
)

from hf_integration import KeepSchedule, TrainingArguments, create_optimizer, last_checkpoint
from lightning_optim import RuleOptimizer
from tests.helpers.paths import ROOT

VOCABULARY, CONTEXT = 96, 16


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Matrices as small as these are slower with more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


class Tokens(Dataset[dict[str, Tensor]]):
    """Random rows that are always the same."""

    def __init__(self, rows: int = 20) -> None:
        self.rows = torch.randint(VOCABULARY, (rows, CONTEXT), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def llama(*, tied: bool = True, dropout: float = 0.0) -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT,
            attention_dropout=dropout,
            tie_word_embeddings=tied,
        )
    )


def gpt2() -> PreTrainedModel:
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_positions=CONTEXT, n_embd=32, n_layer=1, n_head=4, eos_token_id=0, bos_token_id=0
        )
    )


def arguments(folder: Path, **settings: Any) -> TrainingArguments:
    defaults: dict[str, Any] = {
        "output_dir": str(folder),
        "optim": "muon",
        "learning_rate": 1e-2,
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(**(defaults | settings))


def trainer_of(model: PreTrainedModel, args: TrainingArguments, *callbacks: TrainerCallback) -> Trainer:
    return Trainer(
        model,
        args,
        train_dataset=Tokens(),
        callbacks=list(callbacks),
        optimizer_cls_and_kwargs=args.optimizer_cls_and_kwargs(),
    )


def model_of(trainer: Trainer) -> nn.Module:
    return cast("nn.Module", trainer.model)


def groups_of(trainer: Trainer) -> dict[str, dict[str, Any]]:
    return {g["name"]: g for g in cast("RuleOptimizer", trainer.optimizer).param_groups}


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def assert_same(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    differing = [name for name in expected if not torch.equal(actual[name], expected[name])]
    assert not differing, f"not bitwise equal: {differing}"


def logged(trainer: Trainer, key: str) -> list[float]:
    return [entry[key] for entry in trainer.state.log_history if key in entry]


# -- the flag ---------------------------------------------------------------------------------------------------------


def parse(*argv: str) -> TrainingArguments:
    return HfArgumentParser(cast("Any", TrainingArguments)).parse_args_into_dataclasses(
        list(argv), look_for_args_file=False
    )[0]


def test_our_name_on_the_command_line(tmp_path: Path):
    args = parse("--output_dir", str(tmp_path), "--optim", "muon", "--learning_rate", "2e-5", "--weight_decay", "0.1")
    result = args.optimizer_cls_and_kwargs()
    assert result is not None
    factory, settings = result
    optimizer = factory()(llama(), **settings)
    assert [(g["name"], g["lr"], g["weight_decay"]) for g in optimizer.param_groups] == [
        ("muon/hidden", 2e-5, 0.1),
        ("adamw/embedding", 2e-5, 0.1),
        ("adamw/vector", 2e-5, 0.0),
    ]
    assert json.loads(args.to_json_string())["optim"] == "muon"  # what TensorBoard and training_args.bin show
    again = dataclasses.replace(args, learning_rate=1e-4)
    assert again.optim == "muon" and again.optimizer_cls_and_kwargs() is not None


def test_the_settings_of_both_rules(tmp_path: Path):
    args = parse(
        *("--output_dir", str(tmp_path), "--optim", "muon", "--learning_rate", "3e-4", "--rest_learning_rate", "1e-4"),
        *("--optim_args", "momentum=0.9, nesterov=False", "--adam_beta2", "0.95", "--lr_convention", "native"),
    )
    trainer = trainer_of(llama(), args)
    trainer.create_optimizer()
    groups = groups_of(trainer)
    hidden, embedding = groups["muon/hidden"], groups["adamw/embedding"]
    assert (hidden["lr"], hidden["momentum"], hidden["nesterov"], hidden["lr_convention"]) == (
        3e-4,
        0.9,
        False,
        "native",
    )
    assert (embedding["lr"], embedding["betas"]) == (1e-4, (0.9, 0.95))
    args = parse("--output_dir", str(tmp_path), "--optim", "muon", "--rest_optim", "lion", "--adam_beta2", "0.95")
    with pytest.raises(ValueError, match="--adam_beta2 0.95 is for rules with Adam's betas"):
        trainer_of(llama(), args).create_optimizer()
    args.adam_beta2 = 0.999
    trainer = trainer_of(llama(), args)
    trainer.create_optimizer()
    assert groups_of(trainer)["lion/embedding"]["betas"] == (0.9, 0.99)  # Lion's own
    args = parse("--output_dir", str(tmp_path), "--optim", "adamw", "--adam_beta1", "0.8", "--adam_epsilon", "1e-6")
    trainer = trainer_of(llama(), args)
    trainer.create_optimizer()
    assert {(g["betas"], g["eps"]) for g in groups_of(trainer).values()} == {((0.8, 0.999), 1e-6)}


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--optim", "muonn"], "unknown optimizer 'muonn'; did you mean 'muon'"),
        (["--optim", "adamw_torhc"], "did you mean 'adamw_torch'"),
        (["--optim", "muon", "--rest_optim", "adanw"], "unknown optimizer 'adanw'; did you mean 'adamw'"),
        (["--optim", "muon", "--optim_args", "0.9"], "optim_args must be name=value"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_loaded(argv: list[str], message: str):
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        parse(*argv)


def test_an_unknown_setting_names_the_nearest(tmp_path: Path):
    trainer = trainer_of(llama(), arguments(tmp_path, optim_args="momentun=0.9"))
    with pytest.raises(ValueError, match="muon has no setting 'momentun'; did you mean 'momentum'"):
        trainer.train()


@pytest.mark.parametrize("optim", ["lomo", "muon"])
def test_fused_backward_trains_as_ordinary_steps_do(tmp_path: Path, optim: str):
    models = {}
    for fused in (False, True):
        text = f"fused_backward={fused}, clip_norm=None"
        trainer = trainer_of(llama(), arguments(tmp_path, optim=optim, optim_args=text, max_grad_norm=0.0))
        trainer.train()
        assert (cast("RuleOptimizer", trainer.optimizer).optimizer.fused is not None) == fused  # pyright: ignore
        models[fused] = weights(model_of(trainer))
    assert_same(models[True], models[False])
    start = weights(llama())
    assert not any(torch.equal(start[name], p) for name, p in models[True].items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [({"gradient_accumulation_steps": 2}, "raise the batch size"), ({}, "clip_norm in optim_args")],
)
def test_fused_backward_is_refused_where_gradients_are_needed(tmp_path: Path, flags: dict[str, Any], message: str):
    args = arguments(tmp_path, optim="lomo", optim_args="fused_backward=True", **flags)
    with pytest.raises(ValueError, match=message):
        args.optimizer_cls_and_kwargs()


@pytest.mark.parametrize("optim", ["lomo", "adalomo"])
def test_names_for_which_the_trainer_has_another_backward_pass(tmp_path: Path, optim: str):
    args = arguments(tmp_path, optim=optim, max_steps=1)
    again = TrainingArguments(output_dir=str(tmp_path), optim=args.to_dict()["optim"])
    assert args.optim == again.optim == f"lightning_optim.{optim}"
    trainer = trainer_of(llama(), args)
    trainer.train()
    assert {group["rule"] for group in groups_of(trainer).values()} == {optim}


def test_a_name_of_transformers_passes_through(tmp_path: Path):
    args = parse("--output_dir", str(tmp_path), "--optim", "adamw_torch", "--max_steps", "1", "--use_cpu")
    assert args.optimizer_cls_and_kwargs() is None
    trainer = trainer_of(llama(), args)
    assert type(trainer.create_optimizer()) is torch.optim.AdamW
    assert args.to_dict()["optim"] == "adamw_torch"


def test_a_forgotten_factory_is_an_error_not_adamw(tmp_path: Path):
    trainer = Trainer(llama(), arguments(tmp_path), train_dataset=Tokens())
    with pytest.raises(ValueError, match="unsupported optimizer: muon"):
        trainer.train()


# -- what the Trainer does with it ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
def test_every_role_lands_in_its_group(tmp_path: Path, tied: bool):
    trainer = trainer_of(llama(tied=tied), arguments(tmp_path, max_steps=1))
    trainer.train()
    groups = groups_of(trainer)
    names = {name: set(g["param_names"]) for name, g in groups.items()}
    projections = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
    norms = {f"model.layers.{i}.{x}_layernorm.weight" for i in (0, 1) for x in ("input", "post_attention")}
    assert names == {
        "muon/hidden": {f"model.layers.{i}.{x}.weight" for i in (0, 1) for x in projections},
        "adamw/embedding": {"model.embed_tokens.weight"},
        **({} if tied else {"adamw/head": {"lm_head.weight"}}),
        "adamw/vector": {"model.norm.weight"} | norms,
    }
    assert {name: g["rule"] for name, g in groups.items()} == {name: name.split("/")[0] for name in names}
    assert next(iter(groups)) == "muon/hidden"  # group 0, whose learning rate the Trainer logs


def test_gpt2s_transposed_linear_layers_are_matrices(tmp_path: Path):
    model = gpt2()
    before = weights(model)
    trainer = trainer_of(model, arguments(tmp_path))
    trainer.train()
    linear = ("attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    groups = groups_of(trainer)
    assert set(groups["muon/hidden/transposed"]["param_names"]) == {f"transformer.h.0.{x}.weight" for x in linear}
    assert groups["muon/qkv/transposed/3 blocks"]["param_names"] == ["transformer.h.0.attn.c_attn.weight"]
    assert set(groups["adamw/embedding"]["param_names"]) == {"transformer.wte.weight", "transformer.wpe.weight"}
    assert all(not torch.equal(p, before[name]) for name, p in model.named_parameters())


class Watch(TrainerCallback):
    """Notes every group's learning rate and the gradient's norm as the optimizer is about to use them."""

    def __init__(self) -> None:
        self.rates: list[dict[str, float]] = []
        self.norms: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.rates.append({g["name"]: g["lr"] for g in kwargs["optimizer"].param_groups})
        gradients = [p.grad for p in kwargs["model"].parameters()]
        self.norms.append(float(torch.nn.utils.get_total_norm(gradients)))


WARMUP, STEPS = 2, 8

SCHEDULES: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {
    "linear": ({}, lambda t: (STEPS - t) / (STEPS - WARMUP)),
    "cosine": ({}, lambda t: (1 + math.cos(math.pi * (t - WARMUP) / (STEPS - WARMUP))) / 2),
    "constant_with_warmup": ({}, lambda t: 1.0),
    "inverse_sqrt": ({}, lambda t: math.sqrt(WARMUP / t)),
    "warmup_stable_decay": (
        {"num_decay_steps": 4, "decay_type": "linear"},
        lambda t: min(1.0, (STEPS - t) / 4),
    ),
}
"""Settings, and the factor after the warmup."""


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_every_schedule_reaches_every_group(tmp_path: Path, schedule: str):
    watch, (settings, factor) = Watch(), SCHEDULES[schedule]
    args = arguments(
        tmp_path,
        max_steps=STEPS,
        warmup_steps=WARMUP,
        lr_scheduler_type=schedule,
        lr_scheduler_kwargs=settings,
        rest_learning_rate=1e-3,
    )
    trainer = trainer_of(llama(), args, watch)
    trainer.train()
    factors = [t / WARMUP if t < WARMUP else factor(t) for t in range(STEPS)]
    base = {"muon/hidden": 1e-2, "adamw/embedding": 1e-3, "adamw/vector": 1e-3}
    assert watch.rates == [pytest.approx({k: lr * f for k, lr in base.items()}) for f in factors]
    assert logged(trainer, "learning_rate") == [rates["muon/hidden"] for rates in watch.rates]


def test_the_gradient_is_clipped_before_the_step(tmp_path: Path):
    watch, model = Watch(), llama()
    before = weights(model)
    args = arguments(
        tmp_path,
        optim="sgd",
        lr_convention="native",
        learning_rate=0.5,
        max_steps=1,
        max_grad_norm=0.01,
        warmup_steps=0,
    )
    trainer = trainer_of(model, args, watch)
    trainer.train()
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in model.named_parameters()])
    assert logged(trainer, "grad_norm")[0] > 0.1  # before clipping
    assert watch.norms == [pytest.approx(0.01, rel=1e-3)]
    assert float(moved.norm()) == pytest.approx(0.5 * 0.01, rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [{"optim": "muon", "optim_args": "ns_dtype=float32"}, {"optim": "sgd", "learning_rate": 1.0}],
    ids=["muon", "sgd"],
)
def test_accumulated_batches_are_one_large_batch(tmp_path: Path, settings: dict[str, Any]):
    start, trained = weights(llama()), []
    for batch, accumulated in ((8, 1), (2, 4)):
        model = llama()
        size = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulated, "max_steps": 2}
        trainer_of(model, arguments(tmp_path, **size, **settings)).train()
        trained.append(weights(model))
    for name, large in trained[0].items():
        moved, apart = float((large - start[name]).norm()), float((trained[1][name] - large).norm())
        assert moved > 1e-4 and apart < 1e-3 * moved, f"{name}: moved {moved}, apart {apart}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("optim", ["muon", "adamw", "adafactor"])
def test_resuming_inside_an_epoch_is_exact(tmp_path: Path, optim: str, dtype: torch.dtype):
    def run(folder: str, resume: str | None) -> Trainer:
        args = arguments(tmp_path / folder, optim=optim, max_steps=14, save_strategy="steps", save_steps=6)
        model = llama(dropout=0.1)  # dropout: the random state must come back, too
        cast("nn.Module", model).to(dtype)
        if resume:
            torch.nn.utils.vector_to_parameters(torch.zeros(model.num_parameters(), dtype=dtype), model.parameters())
        trainer = trainer_of(model, args)
        trainer.train(resume)
        return trainer

    whole = run("whole", None)
    checkpoint = tmp_path / "whole" / "checkpoint-6"  # of 10 steps per epoch
    resumed = run("resumed", str(checkpoint))
    assert len(logged(resumed, "loss")) == 14
    assert logged(resumed, "loss") == logged(whole, "loss")
    assert_same(weights(model_of(resumed)), weights(model_of(whole)))

    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    assert {g["rule"] for g in saved["param_groups"]} == ({"muon", "adamw"} if optim == "muon" else {optim})
    assert len(saved["state"]) == len(list(model_of(whole).parameters()))
    for state in [*saved["state"].values(), *cast("RuleOptimizer", resumed.optimizer).state.values()]:
        assert {value.dtype for key, value in state.items() if key != "step"} == {torch.float32}
    assert {p.dtype for p in model_of(resumed).parameters()} == {dtype}


class Scale(TrainerCallback):
    """Notes the loss scale, the learning rate and the weights after every step, taken or skipped."""

    def __init__(self) -> None:
        self.scales: list[float] = []
        self.rates: list[float] = []
        self.weights: list[dict[str, Tensor]] = []

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.scales.append(kwargs["optimizer"].scaler.get_scale())
        self.rates.append(kwargs["optimizer"].param_groups[0]["lr"])
        self.weights.append(weights(kwargs["model"]))


def test_the_scaler_of_fp16_skips_steps(tmp_path: Path):
    """Accelerate makes no scaler on a CPU (`--fp16` is float32 there), so the Trainer is given torch's."""
    seen = Scale()
    args = arguments(tmp_path, fp16=True, max_steps=16, lr_scheduler_type="linear", warmup_steps=0)
    trainer = trainer_of(llama(), args, seen)
    assert trainer.accelerator.scaler is None
    trainer.accelerator.native_amp = True
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**24, growth_interval=100)  # pyright: ignore[reportPrivateImportUsage]
    trainer.accelerator.scaler = scaler
    seen.weights.append(weights(model_of(trainer)))
    trainer.train()
    skipped = [now < before for before, now in zip([2.0**24, *seen.scales], seen.scales, strict=False)]
    assert 3 <= sum(skipped) <= 12
    taken = 0
    for t, skip in enumerate(skipped):
        assert seen.rates[t] == pytest.approx(1e-2 * (1 - taken / 16))  # the schedule waits
        for name, p in seen.weights[t + 1].items():
            assert torch.equal(p, seen.weights[t][name]) == skip, f"step {t}: {name}"
        taken += not skip
    assert {float(state["step"]) for state in cast("RuleOptimizer", trainer.optimizer).state.values()} == {taken}


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path):
    class Spoil(TrainerCallback):
        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            for group in kwargs["optimizer"].param_groups:
                group["lr"] = 1e-3 if state.global_step < 4 else 5.0

    args = arguments(
        tmp_path,
        max_steps=8,
        save_strategy="steps",
        eval_strategy="steps",
        save_steps=2,
        eval_steps=2,
        load_best_model_at_end=True,
        per_device_train_batch_size=8,
    )
    trainer = Trainer(
        llama(),
        args,
        train_dataset=Tokens(),
        eval_dataset=Tokens(),
        callbacks=[Spoil()],
        optimizer_cls_and_kwargs=args.optimizer_cls_and_kwargs(),
    )
    trainer.train()
    losses = dict(zip(range(2, 9, 2), logged(trainer, "eval_loss"), strict=True))
    assert min(losses, key=lambda step: losses[step]) == 4 and losses[8] > losses[4] + 0.1
    assert trainer.state.best_model_checkpoint == str(tmp_path / "checkpoint-4")
    saved = load_file(tmp_path / "checkpoint-4" / "model.safetensors")
    assert_same({k: v for k, v in weights(model_of(trainer)).items() if k in saved}, saved)


DISTRIBUTED = """
import sys
from pathlib import Path

import torch
from accelerate.utils import broadcast

from tests.hf_integration.test_trainer import arguments, llama, model_of, trainer_of, weights

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)


def train(folder, resume=None, **settings):
    flags = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "optim_args": "ns_dtype=float32"}
    args = arguments(Path(folder), ddp_backend="gloo", **flags)
    trainer = trainer_of(llama(), args)
    trainer.train(resume)
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel" and args.world_size == 2
    return weights(model_of(trainer)), trainer.optimizer.optimizer


whole, optimizer = train("whole")
first = {name: broadcast(p.clone(), 0) for name, p in whole.items()}
assert all(first[name].equal(p) for name, p in whole.items()), "the ranks have different weights"
resumed, again = train("resumed", "whole/checkpoint-3")
assert all(resumed[name].equal(p) for name, p in whole.items()), "resuming is not exact"
for mine, other in zip(optimizer.state.values(), again.state.values(), strict=True):
    assert mine.keys() == other.keys() and all(mine[k].equal(other[k]) for k in mine)
if len(sys.argv) > 1 and torch.distributed.get_rank() == 0:
    torch.save(whole, sys.argv[1])
torch.distributed.destroy_process_group()
"""


@pytest.mark.dist
def test_two_processes_train_as_one_and_resume_exactly(tmp_path: Path):
    (tmp_path / "script.py").write_text(DISTRIBUTED)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*launch, "script.py", "weights.pt"],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    distributed, start = torch.load(tmp_path / "weights.pt", weights_only=True), weights(llama())
    model = llama()
    args = arguments(tmp_path, max_steps=6, per_device_train_batch_size=4, optim_args="ns_dtype=float32")
    trainer_of(model, args).train()
    for name, p in weights(model).items():
        moved, apart = float((p - start[name]).norm()), float((p - distributed[name]).norm())
        assert apart < 1e-3 * moved, f"{name}: moved {moved}, apart {apart}"


# -- a checkpoint of AdamW --------------------------------------------------------------------------------------------


def stopped_adamw(folder: Path, model: PreTrainedModel, **settings: Any) -> Trainer:
    """Transformers' own AdamW, with a checkpoint in the middle of its run."""
    flags: dict[str, Any] = {"optim": "adamw_torch_fused", "weight_decay": 0.1, "max_steps": 8, "warmup_steps": 2}
    flags |= {"save_strategy": "steps", "save_steps": 4}
    trainer = trainer_of(model, arguments(folder, **(flags | settings)))
    trainer.train()
    return trainer


class Unfreeze(TrainerCallback):
    """Somebody's gradual unfreezing."""

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 2:
            kwargs["model"].model.layers[0].requires_grad_(True)


def test_parameters_unfrozen_while_training_are_named(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model: Any = llama()
    model.model.layers[0].requires_grad_(False)
    trainer = trainer_of(model, arguments(tmp_path, max_steps=4), Unfreeze(), KeepSchedule())
    with caplog.at_level("WARNING", "hf_integration"):
        trainer.train()
    said = [r.getMessage() for r in caplog.records if "not in the optimizer" in r.getMessage()]
    assert len(said) == 1 and "model.layers.0.self_attn.q_proj.weight" in said[0] and "add_param_group" in said[0]


@pytest.mark.parametrize("schedule", ["reduce_lr_on_plateau", "greedy"])
def test_a_schedule_that_follows_a_metric_goes_on_from_adamw(tmp_path: Path, schedule: str):
    bound = {"min_lr": 1e-5, "threshold": 1e3, "threshold_mode": "abs"}  # no loss is ever better
    flags: dict[str, Any] = {
        "lr_scheduler_type": schedule,
        "lr_scheduler_kwargs": {"factor": 0.5, "patience": 0, **bound},
    }
    flags |= {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "metric_for_best_model": "loss",
        "warmup_steps": 0,
        "max_steps": 8,
    }

    def made(**more: Any) -> Trainer:
        args = arguments(tmp_path, save_strategy="steps", save_steps=4, **flags | more)
        data: Any = {"train_dataset": Tokens(), "eval_dataset": Tokens()}
        factory = args.optimizer_cls_and_kwargs()
        return Trainer(llama(), args, callbacks=[KeepSchedule()], optimizer_cls_and_kwargs=factory, **data)

    theirs = made(optim="adamw_torch", max_steps=4)
    theirs.train()
    before = cast("Any", theirs.optimizer).param_groups[0]["lr"]
    assert before != theirs.args.learning_rate, "the schedule has moved"
    ours = made(optim="muon", rest_learning_rate=theirs.args.learning_rate / 2)
    ours.train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    logged = [x["learning_rate"] for x in ours.state.log_history if "learning_rate" in x and x["step"] > 4]
    assert len(logged) == 4 and logged[0] == pytest.approx(before) and len(set(logged)) > 1
    rates = {g["name"]: g["lr"] for g in cast("Any", ours.optimizer).param_groups}
    assert rates["adamw/vector"] == pytest.approx(max(rates["muon/hidden"] / 2, 1e-5))


@pytest.mark.parametrize(("optim", "make"), [("adamw_torch_fused", llama), ("adamw_torch", lambda: llama(tied=False))])
def test_adamw_goes_on_from_adamw(tmp_path: Path, make: Callable[[], PreTrainedModel], optim: str):
    """In the same `output_dir`; bit for bit where the kernel is the same."""
    theirs = stopped_adamw(tmp_path, make(), optim=optim)
    shutil.rmtree(tmp_path / "checkpoint-8")
    args = arguments(tmp_path, optim="adamw", weight_decay=0.1, max_steps=8, warmup_steps=2)
    ours = trainer_of(make(), args, KeepSchedule())
    ours.train(last_checkpoint(tmp_path))
    assert logged(ours, "learning_rate") == logged(theirs, "learning_rate")
    if optim == "adamw_torch_fused":
        assert_same(weights(model_of(ours)), weights(model_of(theirs)))
        assert logged(ours, "loss") == logged(theirs, "loss")
    else:
        assert logged(ours, "loss") == pytest.approx(logged(theirs, "loss"), rel=1e-4)


def test_muon_goes_on_from_adamw(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """What AdamW still owns keeps its moments, the matrices begin again, and the schedule continues."""
    stopped_adamw(tmp_path, llama())
    checkpoint = tmp_path / "checkpoint-4"
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)

    class Look(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            optimizer = kwargs["optimizer"].optimizer
            self.groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
            names = {id(p): name for name, p in kwargs["model"].named_parameters()}
            self.state = {names[id(p)]: {k: v.clone() for k, v in s.items()} for p, s in optimizer.state.items()}

    look = Look()
    flags: dict[str, Any] = {"max_steps": 8, "warmup_steps": 2, "rest_learning_rate": 1e-3, "adam_beta2": 0.95}
    trainer = trainer_of(llama(), arguments(tmp_path, **flags), KeepSchedule(), look)
    trainer.train(str(checkpoint))
    assert set(look.state) == {n for n, _ in model_of(trainer).named_parameters() if "proj" not in n}
    # the Trainer's order: what decays (tied embedding, then the projections of two layers), then the norms
    embedding, norm = look.state["model.embed_tokens.weight"], look.state["model.norm.weight"]
    for mine, theirs in ((embedding, saved["state"][0]), (norm, saved["state"][len(saved["state"]) - 1])):
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)
    assert [(g["initial_lr"], g["lr"]) for g in look.groups] == [
        pytest.approx((lr, lr * 4 / 6)) for lr in (1e-2, 1e-3, 1e-3)
    ]
    assert look.groups[1]["betas"] == (0.9, 0.95)  # settings are this run's
    assert logged(trainer, "learning_rate")[4:] == pytest.approx([1e-2 * (8 - t) / 6 for t in range(4, 8)])
    assert "moments of 6 of 20 parameters; muon starts from scratch" in caplog.text
    state = cast("RuleOptimizer", trainer.optimizer).state
    for name, group in groups_of(trainer).items():
        assert {float(state[p]["step"]) for p in group["params"]} == {4.0 if name == "muon/hidden" else 8.0}


@pytest.mark.parametrize("groups", ["all", "named"])
def test_a_state_dict_of_torchs_adamw_loads(groups: str):
    """One group of all parameters, in the model's order, or any with names; here with GPT-2's transposed layers."""
    model = gpt2()
    named = [{"params": [pair]} for pair in reversed(list(model.named_parameters()))]
    theirs = torch.optim.AdamW(cast("Any", model.parameters() if groups == "all" else named), lr=1e-3)
    cast("nn.Module", model)(**{k: v[None] for k, v in Tokens()[0].items()}).loss.backward()
    theirs.step()
    ours = create_optimizer(model, "soap", lr=1e-2)
    ours.load_state_dict(theirs.state_dict())
    snapshot = {p for g in ours.param_groups for p in g["params"] if g["rule"] == "adamw"}
    assert set(ours.state) == snapshot and {g["lr"] for g in ours.param_groups} == {1e-2}
    for p in snapshot:
        assert all(torch.equal(ours.state[p][k], theirs.state[p][k]) for k in ("step", "exp_avg", "exp_avg_sq"))
    ours.step()
    assert {float(s["step"]) for s in ours.state.values()} == {1.0, 2.0}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"params": [0]}, r"groups of \[1\] parameters, for this model they would be \[\d+\]"),
        ({"maximize": True}, "maximize=True"),
        ({"decoupled_weight_decay": False}, "has the L2 form"),
        ({"state1": True}, "not torch's AdamW: it has state1"),
    ],
)
def test_what_cannot_go_on_is_refused(change: dict[str, Any], message: str):
    model = llama()
    saved = torch.optim.AdamW(model.parameters(), weight_decay=0.1).state_dict()
    if "state1" in change:
        saved["state"] = {0: {"state1": torch.zeros(1)}}
    else:
        saved["param_groups"][0].update(change)
    optimizer = create_optimizer(model, "muon", lr=1e-2)
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(saved)
    assert not optimizer.state


def test_a_checkpoint_of_another_optimizer_is_refused(tmp_path: Path):
    trainer_of(llama(), arguments(tmp_path, save_strategy="steps", save_steps=2)).train()
    with pytest.raises(ValueError, match="muon"):
        trainer_of(llama(), arguments(tmp_path, optim="adamw")).train(str(tmp_path / "checkpoint-2"))


def test_parameters_swapped_by_accelerate_still_train(tmp_path: Path):
    """FSDP2 replaces `param_groups`' parameters, in place and by address, after the optimizer was built."""

    def run(folder: str, *, swap: bool) -> dict[str, Tensor]:
        model = llama()
        trainer = trainer_of(model, arguments(tmp_path / folder))
        optimizer = trainer.create_optimizer()
        if swap:
            address = {name: p.data_ptr() for name, p in model.named_parameters()}
            for group in optimizer.param_groups:
                for i, p in enumerate(group["params"]):
                    group["params"][i] = torch.empty(1)
                    group["params"][i].data_ptr = p.data_ptr()
            for module in list(model.modules()):
                for name, p in list(module.named_parameters(recurse=False)):
                    setattr(module, name, nn.Parameter(p.detach().clone()))
            model.tie_weights()
            new = dict(model.named_parameters())
            fsdp2_switch_optimizer_parameters(optimizer, {address[name]: p for name, p in new.items()})
        trainer.train()
        return weights(model)

    assert_same(run("swapped", swap=True), run("plain", swap=False))


# -- the example ------------------------------------------------------------------------------------------------------


def test_a_half_written_checkpoint_is_not_the_last(tmp_path: Path):
    assert last_checkpoint(tmp_path / "missing") is None
    for step, state in (
        (4, "{}"),
        (5, '{"global_step": 5}'),
        (10, '{"global_step": 10}'),
        (20, '{"global_st'),
        (30, None),
    ):
        (tmp_path / f"checkpoint-{step}").mkdir()
        if state is not None:
            (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(state)
    (tmp_path / "checkpoint-best").mkdir()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-10")
    assert last_checkpoint(tmp_path, before=10) == str(tmp_path / "checkpoint-5")


def make_model(folder: Path, text: Path) -> None:
    """A byte-level BPE tokenizer of a text and a random model for it, as files."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<end>"],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train([str(text)], trainer)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>").save_pretrained(folder)
    model = llama(dropout=0.1)
    model.resize_token_embeddings(320)
    model.save_pretrained(folder)


def command(*argv: str) -> list[str]:
    return [sys.executable, str(ROOT / "examples" / "finetune_hf.py"), *argv]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def scalars(folder: Path, tag: str) -> dict[int, set[float]]:
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    out: dict[int, set[float]] = {}
    for event in events.Scalars(tag):
        out.setdefault(event.step, set()).add(event.value)
    return out


def test_a_killed_run_continues_bit_for_bit(tmp_path: Path):
    text = Path(dataclasses.__file__)
    make_model(tmp_path / "model", text)
    flags = ["--model", str(tmp_path / "model"), "--data", str(text), "--optim", "muon", "--learning_rate", "1e-3"]
    flags += ["--max_steps", "120", "--per_device_train_batch_size", "8", "--logging_steps", "1", "--save_steps", "10"]
    flags += ["--use_cpu", "--disable_tqdm", "true", "--resume_from_checkpoint", "true", "--output_dir"]

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = subprocess.run(command(*flags, str(whole)), env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr

    process = subprocess.Popen(
        command(*flags, str(killed)), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while last_checkpoint(killed) is None and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    last = last_checkpoint(killed)
    assert last is not None and not (killed / "model.safetensors").exists()
    shutil.copytree(last, killed / "checkpoint-115", ignore=shutil.ignore_patterns("trainer_state.json"))

    for start in (int(last.rpartition("-")[2]), 110):  # then the finished run once more, from before its last step
        again = subprocess.run(
            command(*flags, str(killed)), env=ENVIRONMENT, capture_output=True, text=True, timeout=120
        )
        assert again.returncode == 0, again.stderr
        assert again.stdout.count("{'loss'") == 120 - start

    def losses(folder: Path) -> dict[int, float]:
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return {entry["step"]: entry["loss"] for entry in history if "loss" in entry}

    assert list(losses(whole)) == list(range(1, 121))
    assert losses(killed) == losses(whole)
    curve = scalars(whole / "tensorboard", "train/loss")
    assert list(curve) == list(range(1, 121))
    assert scalars(killed / "tensorboard", "train/loss") == curve
    assert_same(load_file(killed / "model.safetensors"), load_file(whole / "model.safetensors"))

    assert scalars(killed / "tensorboard", "eval/loss") == scalars(whole / "tensorboard", "eval/loss")
    before, after = (scalars(whole / "tensorboard", "eval/loss")[step] for step in (0, 120))
    assert min(before) - max(after) > 0.5
    for line in ("muon/hidden", "adamw/embedding", "adamw/vector", "evaluation before", "evaluation after"):
        assert line in done.stdout


def test_the_example_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    import finetune_hf  # examples/ is on pytest's path

    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit, match=r"is missing; `python examples/pretrain_lightning.py` makes it"):
        finetune_hf.load(finetune_hf.parse(["--use_cpu"])[0])
    with pytest.raises(SystemExit, match="2"):
        finetune_hf.parse(["--optim", "muonn", "--use_cpu"])
    assert "unknown optimizer 'muonn'; did you mean 'muon'" in capsys.readouterr().err.splitlines()[-1]
