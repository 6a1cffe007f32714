"""ReLoRA: what a merge does to the model, the optimizer and the learning rate, and exact resume in both trainers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainerCallback

import hf_integration
from hf_integration import TrainingArguments
from lightning_optim import build_optimizer, callbacks
from lightning_optim.relora import ReLoRA

pytestmark = [
    # Lightning asks torch's pytree in a way that torch has deprecated.
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    # peft and accelerate use names that transformers has deprecated.
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing\\w*. is deprecated:FutureWarning"),
]

VOCABULARY, CONTEXT, RANK = 32, 8, 2


def adapted(**settings: Any) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=CONTEXT,
    )
    targets = {"r": RANK, "target_modules": ["q_proj", "v_proj", "down_proj"], **settings}
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(**targets))  # pyright: ignore[reportArgumentType]


def rows(k: int) -> Tensor:
    return torch.randint(VOCABULARY, (4, CONTEXT), generator=torch.Generator().manual_seed(k))


def loss_of(model: Any, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss


def train(model: Any, optimizer: torch.optim.Optimizer, steps: range, *, after: Callable[[], None] = lambda: None):
    for k in steps:
        optimizer.zero_grad()
        loss_of(model, rows(k)).backward()
        optimizer.step()
        after()


def base_weights(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters() if "base_layer" in n}


def everything(model: nn.Module) -> dict[str, Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_a_merge_keeps_the_function_and_begins_anew() -> None:
    model = adapted(lora_alpha=8)
    optimizer = build_optimizer(model, "adamw", lr=1e-2)
    relora = ReLoRA(model, optimizer, every=100)
    train(model, optimizer, range(3))
    before, old = loss_of(model, rows(9)), everything(model)
    relora.merge()
    torch.testing.assert_close(loss_of(model, rows(9)), before, rtol=1e-6, atol=0)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            assert not p.any() and old[name].any()
        elif "lora_A" in name:
            bound = p.shape[1] ** -0.5
            assert not torch.equal(p, old[name]) and p.abs().max() < bound and p.std() > 0.4 * bound
        else:
            assert torch.equal(p, old[name]) == ("base_layer" not in name), name


def test_the_sum_of_adapters_has_a_higher_rank() -> None:
    model = adapted()
    optimizer = build_optimizer(model, "adamw", lr=1e-2)
    start = base_weights(model)
    ReLoRA(model, optimizer, every=4, warmup_steps=1)
    train(model, optimizer, range(12))
    for name, w in base_weights(model).items():
        assert torch.linalg.matrix_rank(w - start[name], rtol=1e-4) == 3 * RANK, name


@pytest.mark.parametrize("by", ["magnitude", "random"])
@pytest.mark.parametrize("ours", [True, False])
def test_a_share_of_the_state_stays(by: Any, ours: bool) -> None:
    model = adapted()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = build_optimizer(model, "adamw", lr=1e-2) if ours else torch.optim.AdamW(trained, lr=1e-2)
    relora = ReLoRA(model, optimizer, every=100, prune=0.75, by=by)
    train(model, optimizer, range(3))
    old = {p: {k: x.clone() for k, x in optimizer.state[p].items()} for p in trained}
    relora.merge()
    for p in trained:
        state = optimizer.state[p]
        snapshot = state["exp_avg_sq"] != 0
        assert snapshot.sum() == p.numel() // 4 and torch.equal(snapshot, state["exp_avg"] != 0) and state["step"] == 3
        assert torch.equal(state["exp_avg"][snapshot], old[p]["exp_avg"][snapshot])
        least, most = old[p]["exp_avg"][snapshot].abs().min(), old[p]["exp_avg"][~snapshot].abs().max()
        assert (least >= most) == (by == "magnitude")
    train(model, optimizer, range(3, 5))


def test_state_that_has_no_parts_is_dropped() -> None:
    model = adapted()
    optimizer = build_optimizer(model, "soap", lr=1e-2)
    relora = ReLoRA(model, optimizer, every=100)
    train(model, optimizer, range(3))
    relora.merge()
    train(model, optimizer, range(3, 4))
    steps = {int(s["step"]) for s in optimizer.state.values()}
    assert steps == {1}


def test_learning_rates_warm_up_after_each_merge_and_the_schedule_goes_on() -> None:
    model = adapted()
    optimizer = build_optimizer(model, "adamw", lr=1.0)
    seen: list[float] = []
    ReLoRA(model, optimizer, every=4, warmup_steps=3)
    optimizer.register_step_pre_hook(lambda opt, *_: seen.append(opt.param_groups[0]["lr"]))
    scheduler = LambdaLR(optimizer, lambda t: 0.9**t)
    train(model, optimizer, range(10), after=scheduler.step)
    factors = [1, 1, 1, 1, 1 / 3, 2 / 3, 1, 1, 1 / 3, 2 / 3]
    assert seen == pytest.approx([f * 0.9**t for t, f in enumerate(factors)])
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.9**10)


def test_settings_and_models_that_do_not_fit_are_told() -> None:
    wrong: Any = (
        ({"every": 0}, "every >= 1"),
        ({"every": 2, "prune": 1.5}, "prune in"),
        ({"every": 2, "by": "size"}, "unknown value 'size'"),
        ({"every": 2, "warmup_steps": 1.5}, "must be an integer"),
    )
    for settings, message in wrong:
        for make in (callbacks.ReLoRA, hf_integration.ReLoRA):
            with pytest.raises(ValueError, match=message):
                make(**settings)
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))])
    for model, message in (
        (nn.Linear(2, 2), "no LoRA adapter"),
        (adapted(use_dora=True), "DoraLinearVariant is not plain LoRA"),
        (adapted(target_modules=["embed_tokens"]), "embeddings are not supported"),
    ):
        with pytest.raises(ValueError, match=message):
            ReLoRA(model, optimizer, every=2)
    model = adapted()
    with pytest.raises(ValueError, match="averages cannot follow"):
        ReLoRA(model, build_optimizer(model, "muon", lr=1e-2, averaging={"tail_ema": {}}), every=2)


# -- Transformers -----------------------------------------------------------------------------------------------------


class Stop(TrainerCallback):
    def __init__(self, at: int):
        self.at = at

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        control.should_training_stop = state.global_step == self.at


class Tokens(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": rows(index)[0], "labels": rows(index)[0]}


def hf(folder: Path, *extra: TrainerCallback, **settings: Any) -> Trainer:
    args = TrainingArguments(
        output_dir=str(folder),
        optim="adamw",
        learning_rate=1e-2,
        lr_scheduler_type="cosine",
        max_steps=9,
        per_device_train_batch_size=2,
        save_steps=1,
        use_cpu=True,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        report_to=[],
        logging_strategy="no",
        **settings,
    )
    relora = hf_integration.ReLoRA(every=3, warmup_steps=2, prune=0.5)
    return Trainer(
        adapted(lora_dropout=0.1),
        args,
        train_dataset=Tokens(),
        callbacks=[relora, *extra],
        optimizer_cls_and_kwargs=args.optimizer_cls_and_kwargs(),
    )


@pytest.mark.parametrize("at", [2, 3, 7])
def test_trainer_resumes_exactly_across_a_merge(tmp_path: Path, at: int) -> None:
    straight = hf(tmp_path / "straight", save_strategy="no")
    straight.train()
    hf(tmp_path / "cut", Stop(at)).train()
    resumed = hf(tmp_path / "cut", save_strategy="no")
    resumed.train(resume_from_checkpoint=str(tmp_path / "cut" / f"checkpoint-{at}"))
    assert_same(everything(straight.model), everything(resumed.model))  # pyright: ignore[reportArgumentType]
    moved = {n for n, w in base_weights(adapted()).items() if not torch.equal(w, everything(resumed.model)[n])}  # pyright: ignore
    assert len(moved) == 3


def test_trainer_refuses_adapters_without_their_weights(tmp_path: Path) -> None:
    hf(tmp_path, Stop(4)).train()
    (tmp_path / "checkpoint-4" / "relora.safetensors").unlink()
    with pytest.raises(ValueError, match="no relora.safetensors in .*checkpoint-4"):
        hf(tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))


# -- Lightning --------------------------------------------------------------------------------------------------------


class Module(L.LightningModule):
    def __init__(self, epoch: int) -> None:
        super().__init__()
        self.model, self.epoch = adapted(), epoch

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        return loss_of(self.model, batch)

    def train_dataloader(self) -> Any:
        data: Any = [rows(k) for k in range(self.epoch)]
        return torch.utils.data.DataLoader(data, batch_size=None)

    def configure_optimizers(self) -> Any:
        optimizer = build_optimizer(self.model, "adamw", lr=1e-2)
        schedule = {"scheduler": LambdaLR(optimizer, lambda t: 0.9**t), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}


class Save(L.Callback):
    def __init__(self, path: Path, at: int):
        self.path, self.at = path, at

    def on_train_batch_end(self, trainer: L.Trainer, *_: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        if trainer.global_step == self.at:
            trainer.save_checkpoint(self.path)


def fit(steps: int, epoch: int, *extra: L.Callback, resume: Path | None = None) -> Module:
    relora = callbacks.ReLoRA(every=3, warmup_steps=2, prune=0.5)
    quiet: dict[str, Any] = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    settings: dict[str, Any] = {"accelerator": "cpu", "devices": 1, "max_epochs": -1, "enable_checkpointing": False}
    trainer = L.Trainer(max_steps=steps, callbacks=[relora, *extra], **settings, **quiet)
    module = Module(epoch)
    trainer.fit(module, ckpt_path=resume, weights_only=True)
    return module


@pytest.mark.parametrize("at", [3, 4])
def test_lightning_resumes_exactly_across_a_merge(tmp_path: Path, at: int) -> None:
    straight = fit(8, at)
    fit(at + 1, at, Save(tmp_path / "saved", at))
    resumed = fit(8, at, resume=tmp_path / "saved")
    assert_same(everything(straight), everything(resumed))
    assert not torch.equal(base_weights(resumed).popitem()[1], base_weights(adapted()).popitem()[1])
