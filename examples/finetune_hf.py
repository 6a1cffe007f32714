"""Fine-tune a causal language model with Transformers' own `Trainer` and any optimizer.

    python examples/pretrain_lightning.py
    python examples/finetune_hf.py --optim muon
    python examples/finetune_hf.py --model DIR --data chats.jsonl --lora --packing --optim muon --learning_rate 2e-5

Without `--model` it continues from the tiny model that the first command makes, without `--data` on files of Python's
standard library that the pretraining has not seen. `--data` takes text files, jsonl with `text`, `prompt` and
`completion`, or `messages`, and directories that `datasets` saved with the same columns; only completions and what the
assistant says are learned. Every tenth row, or `--eval_data`, is held out and evaluated before and after.

Every flag of `transformers.TrainingArguments` works: `--bf16`, `--gradient_checkpointing`, `--report_to`, ... A run
that was killed continues, bit for bit, with `--resume_from_checkpoint true` added to its command; so does a run of
Transformers' AdamW with `--optim muon`, its schedule and AdamW's moments kept.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from peft import LoraConfig, get_peft_model
from records import Row, collate, pack, read_records, samples, stream
from results import Result, comparable, print_comparison, print_next, save
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    set_seed,
)
from transformers.utils.logging import disable_progress_bar

from hf_integration import (
    Consolidate,
    CurvatureCallback,
    KeepSchedule,
    RoleTable,
    TrainingArguments,
    diagnostics,
    last_checkpoint,
)
from lightning_optim.data.text import standard_library

PRETRAINED = "runs/pretrain/model"
MAX_BLOCK = 1024

DEFAULTS = {
    "learning_rate": 2e-4,
    "warmup_steps": 0.1,
    "weight_decay": 0.01,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 48,
    "per_device_eval_batch_size": 64,
    "logging_steps": 10,
    "save_steps": 50,
    "save_total_limit": 2,
    "report_to": ["tensorboard"],
    "dataloader_pin_memory": torch.accelerator.is_available(),
}
"""Where this script's defaults differ from Transformers'."""


@dataclass
class Arguments:
    """What is fine-tuned, and on what."""

    model: str = field(default=PRETRAINED, metadata={"help": "Directory or hub id of a causal language model."})
    dtype: str = field(default="auto", metadata={"help": "Of the weights: bfloat16, ...; default: as they were saved."})
    data: list[str] = field(
        default_factory=list,
        metadata={"help": "Text files, .jsonl, or directories of `datasets`; default: Python sources."},
    )
    eval_data: list[str] = field(default_factory=list, metadata={"help": "The same; default: every tenth row of data."})
    chat_template: str | None = field(
        default=None, metadata={"help": "Jinja file, for `messages` and a tokenizer that has no chat template."}
    )
    block_size: int | None = field(
        default=None, metadata={"help": f"Tokens per row; default: the model's context, at most {MAX_BLOCK}."}
    )
    diagnostics: Literal["off", "cheap", "matrix", "curvature"] = field(
        default="cheap", metadata={"help": "What TensorBoard shows of the optimizer."}
    )
    packing: bool = field(
        default=False, metadata={"help": "Several records per row, or all as one stream, as text files always are."}
    )
    lora: bool = field(default=False, metadata={"help": "Train low-rank adapters; the model itself stays as it is."})
    lora_rank: int = field(default=16, metadata={"help": "Rank of the adapters."})
    lora_alpha: int = field(default=32, metadata={"help": "Their factor, times the rank."})
    lora_target: list[str] = field(
        default_factory=list, metadata={"help": "Names of the layers that get one; default: all linear ones."}
    )
    threads: int | None = field(
        default=None, metadata={"help": "Of the CPU; default: 1 for the tiny default model, else PyTorch's choice."}
    )


class PrintGroups(TrainerCallback):
    """Prints what the optimizer does with which parameters."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print one line per param group."""
        if not state.is_world_process_zero:
            return
        for i, group in enumerate(kwargs["optimizer"].param_groups):
            count = sum(p.numel() for p in group["params"])
            lr, decay = group.get("initial_lr", group["lr"]), group.get("weight_decay", 0.0)
            print(f"{group.get('name', f'group {i}'):20} {count:12,} parameters  lr {lr:g}  weight decay {decay:g}")


def default_folder(optim: str, resume: bool) -> str:
    """`runs/finetune-OPTIM`, `runs/finetune-OPTIM-2`, ...: the first that is free, or the last to resume in.

    Args:
        optim: name of the optimizer.
        resume: whether a run is continued.

    Returns:
        The directory.
    """
    names = [f"runs/finetune-{optim}", *(f"runs/finetune-{optim}-{i}" for i in range(2, 1000))]
    free = next(i for i, name in enumerate(names) if not Path(name).exists())
    return names[max(0, free - 1) if resume else free]


def parse(argv: Sequence[str] | None = None) -> tuple[Arguments, TrainingArguments]:
    """Read the command line; exits with one line about a value that cannot be.

    Args:
        argv: without the program's name; default: `sys.argv`.

    Returns:
        Our arguments and the Trainer's.
    """
    parser = HfArgumentParser((Arguments, TrainingArguments), description=__doc__)  # pyright: ignore[reportArgumentType]
    parser.set_defaults(**DEFAULTS)
    settings = parser.parse_known_args(argv)[0]
    parser.set_defaults(
        output_dir=default_folder(settings.optim, settings.resume_from_checkpoint not in (None, "false"))
    )
    try:
        ours, training = parser.parse_args_into_dataclasses(argv)
    except ValueError as e:
        parser.exit(2, f"{parser.prog}: {e}\n")
    return ours, training


def checkpoint(args: TrainingArguments) -> str | None:
    """The checkpoint to continue from.

    Returns:
        Its path, or None for a fresh start.

    Raises:
        SystemExit: a fresh start would mix its checkpoints with those of another run.
    """
    folder, wanted = args.output_dir or ".", args.resume_from_checkpoint
    if wanted in (None, "false"):
        if last := last_checkpoint(folder):
            raise SystemExit(f"{last} exists: add --resume_from_checkpoint true, or take another --output_dir")
        return None
    if wanted != "true":
        return wanted
    return last_checkpoint(folder, before=args.max_steps if args.max_steps > 0 else None)


def load(ours: Arguments) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        ours: names them.

    Returns:
        Model and tokenizer.

    Raises:
        SystemExit: the pretrained model was not made yet, or cannot take packed rows.
    """
    if ours.model == PRETRAINED and not Path(ours.model, "config.json").is_file():
        raise SystemExit(f"{ours.model} is missing; `python examples/pretrain_lightning.py` makes it, or give --model")
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(ours.model, dtype=ours.dtype)
    if ours.packing and "position_ids" not in inspect.signature(model.forward).parameters:
        raise SystemExit(f"--packing: {type(model).__name__} takes no position_ids, which keep packed records apart")
    tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(ours.model)
    if ours.chat_template:
        tokenizer.chat_template = Path(ours.chat_template).read_text(encoding="utf-8")
    return model, tokenizer


def rows(ours: Arguments, tokenizer: PreTrainedTokenizerBase, length: int) -> tuple[list[Row], list[Row]]:
    """Read, tokenize and cut the data.

    Args:
        ours: names it.
        tokenizer: the model's.
        length: tokens per row.

    Returns:
        Rows to train on and rows held out.

    Raises:
        SystemExit: there is too little data, or a record that cannot be read.
    """
    paths = [Path(p) for p in ours.data] or standard_library("finetune")
    files = all(path.is_file() and path.suffix != ".jsonl" for path in paths)
    try:
        data, held_out = read_records(paths), read_records([Path(p) for p in ours.eval_data])
        plain = all("text" in r and not {"messages", "prompt"} & r.keys() for r in [*data, *held_out])
        if plain and (files or ours.packing):
            train, evaluation = (stream(tokenizer, [r["text"] for r in part], length) for part in (data, held_out))
        else:
            train, evaluation = (samples(tokenizer, part, length) for part in (data, held_out))
    except ValueError as e:
        raise SystemExit(str(e)) from e
    if not held_out:
        train, evaluation = [row for i, row in enumerate(train) if i % 10 != 1], train[1::10]
    if not train or not evaluation:
        raise SystemExit(f"too little data for rows of {length} tokens; give more, or a smaller --block_size")
    if ours.packing and not plain:
        train, evaluation = (list(pack(part, length)) for part in (train, evaluation))
    return train, evaluation


def shown(preset: str, steps: int) -> list[TrainerCallback]:
    """The callbacks that show the optimizer at work.

    Args:
        preset: of `hf_integration.diagnostics`, or "off".
        steps: of the run, or -1.

    Returns:
        New callbacks.
    """
    return [] if preset == "off" else [*diagnostics(preset, steps if steps > 0 else None), RoleTable()]


def say(trainer: Trainer, phase: str) -> None:
    """Print what begins, once."""
    if trainer.is_world_process_zero():
        print(phase, flush=True)


def state_bytes(optimizer: Any) -> int:
    """Bytes of an optimizer's state on this process."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def main() -> None:
    """Fine-tune, evaluate and save."""
    ours, args = parse()
    disable_progress_bar()  # of loading and saving; training keeps its own
    torch.set_num_threads(ours.threads or (1 if ours.model == PRETRAINED else torch.get_num_threads()))
    resume = checkpoint(args)
    logs = os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(args.output_dir or ".") / "tensorboard"))
    set_seed(args.seed)
    model, tokenizer = load(ours)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", MAX_BLOCK)
    train, evaluation = rows(ours, tokenizer, ours.block_size or min(context, MAX_BLOCK))
    adapters = LoraConfig(
        r=ours.lora_rank,
        lora_alpha=ours.lora_alpha,
        target_modules=ours.lora_target or "all-linear",
        task_type="CAUSAL_LM",
    )
    pad = tokenizer.pad_token_id if isinstance(tokenizer.pad_token_id, int) else 0
    trainer = Trainer(
        get_peft_model(model, adapters) if ours.lora else model,
        args,
        data_collator=partial(collate, pad=pad),
        train_dataset=cast("Dataset[Row]", train),
        eval_dataset=cast("Dataset[Row]", evaluation),
        processing_class=tokenizer,
        callbacks=[
            PrintGroups(),
            KeepSchedule(),
            Consolidate(),
            CurvatureCallback(),
            *shown(ours.diagnostics, args.max_steps),
        ],
        optimizer_cls_and_kwargs=args.optimizer_cls_and_kwargs(),
    )
    tokens = sum(len(row["input_ids"]) for row in train)
    say(trainer, f"evaluating {ours.model} on {len(evaluation)} rows")
    before = trainer.evaluate()["eval_loss"]
    # Accelerate would take the evaluated model for prepared: DDP would not wrap it, and every rank would train alone.
    trainer.accelerator.free_memory()
    trainer.model._is_accelerate_prepared = False  # pyright: ignore
    say(trainer, f"fine-tuning on {len(train)} rows of {tokens / len(train):.0f} tokens on average")
    metrics = trainer.train(resume).metrics
    say(trainer, "evaluating again")
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    trainer.save_state()
    if trainer.is_world_process_zero():
        print(f"evaluation before: loss {before:.4f}, perplexity {math.exp(before):.2f}")
        print(f"evaluation after:  loss {after:.4f}, perplexity {math.exp(after):.2f}")
        print(f"model and tokenizer: {args.output_dir}; TensorBoard logs: {logs}\n")
        optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        result = Result(
            optimizer=args.optim,
            learning_rate=args.learning_rate,
            before=before,
            after=after,
            seconds=metrics["train_runtime"],
            tokens_per_second=metrics["train_samples_per_second"] * tokens / len(train),
            state_bytes=state_bytes(optimizer),
            weights=sum(p.numel() for group in optimizer.param_groups for p in group["params"]),
        )
        folder = Path(args.output_dir or ".")
        save(result, folder)
        runs = comparable(result, folder)
        print_comparison(runs)
        print_next(runs, folder.parent)


if __name__ == "__main__":
    main()
