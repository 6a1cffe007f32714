"""The stock Transformers Trainer with our optimizers: tiny random models, real checkpoints, one killed process."""

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
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

from hf_integration import TrainingArguments, last_checkpoint
from lightning_optim import Executor

ROOT = Path(__file__).parents[1]
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
    return {g["name"]: g for g in cast("Executor", trainer.optimizer).param_groups}


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
    found = args.optimizer_cls_and_kwargs()
    assert found is not None
    factory, settings = found
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


def test_the_schedule_multiplies_every_group_and_group_0_is_logged(tmp_path: Path):
    watch = Watch()
    args = arguments(tmp_path, max_steps=6, warmup_steps=2, lr_scheduler_type="linear", rest_learning_rate=1e-3)
    trainer = trainer_of(llama(), args, watch)
    trainer.train()
    factors = [0, 1 / 2, 1, 3 / 4, 2 / 4, 1 / 4]
    base = {"muon/hidden": 1e-2, "adamw/embedding": 1e-3, "adamw/vector": 1e-3}
    assert watch.rates == [pytest.approx({k: lr * factor for k, lr in base.items()}) for factor in factors]
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
    for state in [*saved["state"].values(), *cast("Executor", resumed.optimizer).state.values()]:
        assert {value.dtype for value in state.values()} == {torch.float32}
    assert {p.dtype for p in model_of(resumed).parameters()} == {dtype}


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


def test_the_example_says_what_is_missing(tmp_path: Path):
    for argv, message in (
        ([], "examples/pretrain_lightning.py"),
        (["--optim", "muonn"], "unknown optimizer 'muonn'; did you mean 'muon'"),
    ):
        done = subprocess.run(command(*argv), env=ENVIRONMENT, cwd=tmp_path, capture_output=True, text=True, timeout=60)
        assert done.returncode != 0
        assert message in done.stderr.splitlines()[-1] and "Traceback" not in done.stderr
