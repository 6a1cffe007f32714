"""Trainers of Transformers, TRL and sentence-transformers on tiny random models, for tests of all of them."""

from __future__ import annotations

import functools
import importlib
import random
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    set_seed,
)

VOCABULARY = 64
WORDS = ["<pad>", "<eos>", "<unk>"] + [f"w{i}" for i in range(VOCABULARY - 3)]


def config(**settings: Any) -> LlamaConfig:
    sizes: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    heads: dict[str, Any] = dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=64)
    return LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=1, bos_token_id=None, **settings)


def language_model() -> LlamaForCausalLM:
    set_seed(0)
    return LlamaForCausalLM(config())


def rows(count: int = 8) -> list[dict[str, Tensor]]:
    g = torch.Generator().manual_seed(0)
    return [{"input_ids": (ids := torch.randint(3, VOCABULARY, (12,), generator=g)), "labels": ids.clone()}
            for _ in range(count)]  # fmt: skip


def arguments(kind: type[Any], folder: Path, **settings: Any) -> Any:
    defaults: dict[str, Any] = dict(
        output_dir=str(folder),
        per_device_train_batch_size=8,
        max_steps=8,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
        seed=0,
        max_grad_norm=0.0,
        lr_scheduler_type="constant",
    )
    if "bf16" in {f.name for f in kind.__dataclass_fields__.values()}:
        defaults["bf16"] = False
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return kind(**(defaults | settings))


class OwnLoss(Trainer):
    """Trains another loss than the model's own, and keeps account of it."""

    def __init__(self, *args: Any, **settings: Any) -> None:
        super().__init__(*args, **settings)
        self.calls, self.values = 0, []

    def compute_loss(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, model: nn.Module, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        out = model(**inputs)
        labels = torch.full_like(inputs.pop("labels"), 5)
        loss = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
        self.calls += 1
        self.values.append(float(loss.detach()))
        self.log({"own_loss": float(loss.detach())})
        return (loss, out) if return_outputs else loss


def smooth(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """A `compute_loss_func`, summed over the items of the step."""
    logits, y = outputs.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    total = F.cross_entropy(logits, y, reduction="sum", label_smoothing=0.2)
    return total / (len(y) if num_items_in_batch is None else num_items_in_batch)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )


def _saved(folder: Path, model: Any) -> Any:
    """A model with a folder of its own, where trainers look for its tokenizer and make its reference from."""
    home = folder / "model"
    model.save_pretrained(home)
    tokenizer().save_pretrained(home)
    return type(model).from_pretrained(home)


def _sentences(columns: dict[str, int], count: int = 8) -> Any:
    from datasets import Dataset

    rng = random.Random(0)
    table = [{k: " ".join(rng.choice(WORDS[3:]) for _ in range(n)) for k, n in columns.items()} for _ in range(count)]
    return Dataset.from_list(table)


def plain(folder: Path, callbacks: list[Any], kind: type[Trainer] = Trainer, more: Any = None, **settings: Any) -> Any:
    set_seed(0)
    args = arguments(TrainingArguments, folder, **settings)
    return kind(language_model(), args, train_dataset=rows(), callbacks=callbacks, **(more or {}))  # pyright: ignore


def lora(folder: Path, callbacks: list[Any]) -> Any:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(language_model(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"], lora_dropout=0.1))
    args = arguments(TrainingArguments, folder)
    return Trainer(model, args, train_dataset=rows(), callbacks=callbacks)  # pyright: ignore


def seq2seq(folder: Path, callbacks: list[Any]) -> Any:
    set_seed(0)
    sizes: dict[str, Any] = dict(
        vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
    )
    model = T5ForConditionalGeneration(T5Config(**sizes, pad_token_id=0, eos_token_id=1))
    args = arguments(Seq2SeqTrainingArguments, folder)
    return Seq2SeqTrainer(model, args, train_dataset=rows(), callbacks=callbacks)  # pyright: ignore


def sentence_transformer(folder: Path, callbacks: list[Any]) -> Any:
    st, losses, models = (importlib.import_module(f"sentence_transformers{x}") for x in ("", ".losses", ".models"))
    from transformers import BertConfig, BertModel

    set_seed(0)
    sizes: dict[str, Any] = dict(vocab_size=VOCABULARY, hidden_size=16, intermediate_size=32, num_hidden_layers=1)
    home = folder / "model"
    BertModel(BertConfig(**sizes, num_attention_heads=2, pad_token_id=0)).save_pretrained(home)
    tokenizer().save_pretrained(home)
    model = st.SentenceTransformer(modules=[models.Transformer(str(home)), models.Pooling(16)], device="cpu")
    args = arguments(st.SentenceTransformerTrainingArguments, folder)
    data, loss = _sentences({"anchor": 6, "positive": 6}), losses.MultipleNegativesRankingLoss(model)
    return st.SentenceTransformerTrainer(model, args, train_dataset=data, loss=loss, callbacks=callbacks)


def sft(folder: Path, callbacks: list[Any]) -> Any:
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportPrivateImportUsage]

    args = arguments(SFTConfig, folder)
    model = _saved(folder, language_model())
    return SFTTrainer(
        model, args, train_dataset=_sentences({"text": 10}), processing_class=tokenizer(), callbacks=callbacks
    )


def dpo(folder: Path, callbacks: list[Any]) -> Any:
    from trl import DPOConfig, DPOTrainer  # pyright: ignore[reportPrivateImportUsage]

    args = arguments(DPOConfig, folder)
    model = _saved(folder, language_model())
    data = _sentences({"prompt": 4, "chosen": 4, "rejected": 4})
    return DPOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer(), callbacks=callbacks)


def kto(folder: Path, callbacks: list[Any]) -> Any:
    from trl import KTOConfig, KTOTrainer  # pyright: ignore[reportPrivateImportUsage]

    args = arguments(KTOConfig, folder)
    model = _saved(folder, language_model())
    data = _sentences({"prompt": 4, "completion": 4})
    data = data.add_column("label", [i % 2 == 0 for i in range(len(data))])
    return KTOTrainer(model, args=args, train_dataset=data, processing_class=tokenizer(), callbacks=callbacks)


def reward(folder: Path, callbacks: list[Any]) -> Any:
    from trl import RewardConfig, RewardTrainer  # pyright: ignore[reportPrivateImportUsage]

    set_seed(0)
    args = arguments(RewardConfig, folder)
    model = _saved(folder, LlamaForSequenceClassification(config(num_labels=1)))
    data = _sentences({"chosen": 6, "rejected": 6})
    return RewardTrainer(model, args=args, train_dataset=data, processing_class=tokenizer(), callbacks=callbacks)


def _share_of_even_words(completion_ids: list[list[int]], **_: Any) -> list[float | None]:
    return [sum(i % 2 == 0 for i in ids) / max(1, len(ids)) for ids in completion_ids]


def rloo(folder: Path, callbacks: list[Any]) -> Any:
    from trl import RLOOConfig, RLOOTrainer  # pyright: ignore[reportPrivateImportUsage]

    return _online(RLOOTrainer, RLOOConfig, folder, callbacks)


def grpo(folder: Path, callbacks: list[Any]) -> Any:
    from trl import GRPOConfig, GRPOTrainer  # pyright: ignore[reportPrivateImportUsage]

    return _online(GRPOTrainer, GRPOConfig, folder, callbacks)


def _online(trainer: Any, config: Any, folder: Path, callbacks: list[Any]) -> Any:
    args = arguments(config, folder, num_generations=4, max_completion_length=6, num_iterations=2)
    model = _saved(folder, language_model())
    return trainer(
        model, _share_of_even_words, args=args, train_dataset=_sentences({"prompt": 4}), processing_class=tokenizer(),
        callbacks=callbacks,
    )  # fmt: skip


Make = Callable[[Path, list[Any]], Any]
TRANSFORMERS: dict[str, Make] = {
    "plain": plain,
    "own compute_loss": functools.partial(plain, kind=OwnLoss),
    "compute_loss_func": functools.partial(plain, more={"compute_loss_func": smooth}),
    "label smoothing": functools.partial(plain, label_smoothing_factor=0.2),
    "torch_compile": functools.partial(plain, torch_compile=True, torch_compile_backend="aot_eager"),
    "gradient checkpointing": functools.partial(
        plain, gradient_checkpointing=True, gradient_checkpointing_kwargs={"use_reentrant": False}
    ),
    "accumulation": functools.partial(plain, per_device_train_batch_size=2, gradient_accumulation_steps=4),
    "bf16": functools.partial(plain, bf16=True),
    "LoRA": lora,
    "Seq2SeqTrainer": seq2seq,
    "SentenceTransformerTrainer": sentence_transformer,
    "SFTTrainer": sft,
    "DPOTrainer": dpo,
    "KTOTrainer": kto,
    "RewardTrainer": reward,
    "RLOOTrainer": rloo,
    "GRPOTrainer": grpo,
}
