"""Fine-tune a causal language model on text files with Transformers' own `Trainer` and any optimizer.

    python examples/pretrain_lightning.py
    python examples/finetune_hf.py --optim muon
    python examples/finetune_hf.py --model DIR --data FILE [FILE ...] --optim muon --learning_rate 2e-5

Without `--model` it continues from the tiny model that the first command makes, without `--data` on files of Python's
standard library that the pretraining has not seen. Every tenth row of tokens is held out and evaluated before and
after. Every flag of `transformers.TrainingArguments` works. A run that was killed continues, bit for bit, with
`--resume_from_checkpoint true` added to its command.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from text import blocks, read, standard_library
from torch import Tensor
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    HfArgumentParser,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    default_data_collator,
)

from hf_integration import TrainingArguments, last_checkpoint

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
    data: list[str] = field(default_factory=list, metadata={"help": "UTF-8 text files; default: Python sources."})
    block_size: int | None = field(
        default=None, metadata={"help": f"Tokens per row; default: the model's context, at most {MAX_BLOCK}."}
    )
    threads: int | None = field(
        default=None, metadata={"help": "Of the CPU; default: 1 for the tiny default model, else PyTorch's choice."}
    )


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of tokens as a causal language model takes them: it shifts the labels itself."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        """Number of rows."""
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """One row, input and label at once."""
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class PrintGroups(TrainerCallback):
    """Prints what the optimizer does with which parameters."""

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Print one line per param group."""
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
    given = parser.parse_known_args(argv)[0]
    parser.set_defaults(output_dir=default_folder(given.optim, given.resume_from_checkpoint not in (None, "false")))
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


def load(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model and its tokenizer.

    Args:
        name: directory or hub id.

    Returns:
        Model and tokenizer.

    Raises:
        SystemExit: the pretrained model was not made yet.
    """
    if name == PRETRAINED and not Path(name, "config.json").is_file():
        raise SystemExit(f"{name} is missing; `python examples/pretrain_lightning.py` makes it, or give --model")
    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def split(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    """Tokenize texts into one stream and cut it into rows.

    Args:
        tokenizer: the model's; its end token, if it has one, follows every text.
        texts: the contents of the files.
        length: tokens per row.

    Returns:
        Rows to train on, and every tenth row, held out.

    Raises:
        SystemExit: there is too little text.
    """
    end = [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []
    ids = cast("list[list[int]]", tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])
    rows = blocks([token for text in ids for token in text + end], length)
    if len(rows) < 2:
        raise SystemExit(f"{len(rows)} rows of {length} tokens are too few; give more text or a smaller --block_size")
    held_out = torch.arange(len(rows)) % 10 == 1
    return rows[~held_out], rows[held_out]


def main() -> None:
    """Fine-tune, evaluate and save."""
    ours, args = parse()
    torch.set_num_threads(ours.threads or (1 if ours.model == PRETRAINED else torch.get_num_threads()))
    resume = checkpoint(args)
    logs = os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(Path(args.output_dir or ".") / "tensorboard"))
    model, tokenizer = load(ours.model)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", MAX_BLOCK)
    texts = read([Path(p) for p in ours.data] or standard_library("finetune"))
    train, evaluation = split(tokenizer, texts, ours.block_size or min(context, MAX_BLOCK))
    trainer = Trainer(
        model,
        args,
        data_collator=default_data_collator,
        train_dataset=Rows(train),
        eval_dataset=Rows(evaluation),
        processing_class=tokenizer,
        callbacks=[PrintGroups()],
        optimizer_cls_and_kwargs=args.optimizer_cls_and_kwargs(),
    )
    before = trainer.evaluate()["eval_loss"]
    trainer.train(resume)
    after = trainer.evaluate()["eval_loss"]
    trainer.save_model()
    trainer.save_state()
    print(f"evaluation before: loss {before:.4f}, perplexity {math.exp(before):.2f}")
    print(f"evaluation after:  loss {after:.4f}, perplexity {math.exp(after):.2f}")
    print(f"model and tokenizer: {args.output_dir}")
    if "tensorboard" in (args.report_to or []):
        print(f"TensorBoard: tensorboard --logdir {logs}")


if __name__ == "__main__":
    main()
