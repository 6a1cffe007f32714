"""What is learned in every regime, as rows of tokens: text, completions of prompts, and preferences.

Completions and preferences come from the user's jsonl, or from Python's standard library: the prompt is a function's
head and the first line of its docstring, the completion its body; a rejected completion is another function's.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import json
import os
import shutil
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torchmetrics.classification import MulticlassAccuracy
from transformers import PreTrainedTokenizerFast

from lightning_optim.bench.models import shape
from lightning_optim.bench.space import Setup
from lightning_optim.data.text import read, standard_library, texts
from lightning_optim.data.tokenizer import PAD, encode, train_tokenizer

IGNORE = -100
EVAL_ROWS = 64


@dataclass(frozen=True)
class Rows:
    """Tokens and what is to be predicted, `[rows, context]` each; the model shifts the labels."""

    ids: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, indices: Tensor, device: str) -> dict[str, Tensor]:
        """Some rows, as arguments of the model.

        Args:
            indices: indices.
            device: where to.

        Returns:
            `input_ids` and `labels`.
        """
        return {"input_ids": self.ids[indices].to(device), "labels": self.labels[indices].to(device)}


@dataclass(frozen=True)
class Task:
    """Data of a setup."""

    train: Rows
    held_out: Rows
    tokenizer: PreTrainedTokenizerFast
    facts: dict[str, Any]
    """For the line of a trial."""
    preferences: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    """For DPO: to train on and held out."""


def load(setup: Setup, start: Setup | None, cache: Path) -> Task:
    """Read, tokenize and cut the data of a setup.

    Args:
        setup: names it.
        start: of the pretraining that is gone on from, whose tokenizer is used.
        cache: directory for tokenizers and tokens.

    Returns:
        The task.

    Raises:
        ValueError: data that does not fit the regime.
    """
    first = start or setup
    train, held_out = _texts(first.data)
    tokenizer = _tokenizer(tuple(train), shape(first).vocabulary, cache)
    context, preferences = shape(setup).context, ([], [])
    if setup.regime == "pretrain":
        rows = _streams(train, held_out, tokenizer, context, cache)
    elif setup.regime == "continue":
        rows = _streams(*_other_texts(setup.data), tokenizer, context, cache)
    else:
        records = _records(setup)
        split = max(1, len(records) // 8)
        rows = tuple(_completions(part, tokenizer, context) for part in (records[split:], records[:split]))
        if setup.regime == "dpo":
            short = [record | {"prompt": _end(record["prompt"], tokenizer, context // 2)} for record in records]
            preferences = (short[split:], short[:split])
    if min(map(len, rows)) == 0:
        raise ValueError(f"--data {' '.join(setup.data)}: too little text for rows of {context} tokens")
    step = max(1, len(rows[1]) * context // setup.val_tokens)
    validation = Rows(rows[1].ids[::step], rows[1].labels[::step])
    facts = {
        "dataset": list(setup.data) or "sources of Python's standard library",
        "digest": _digest("".join(train), "".join(map(str, rows[0].ids[:64].flatten().tolist()))),
        "tokenizer": f"byte-level BPE trained on the text, {len(tokenizer)} ids",
        "vocabulary": len(tokenizer),
        "context": context,
        "train_rows": len(rows[0]),
        "validation_rows": len(validation),
    }
    return Task(rows[0], validation, tokenizer, facts, preferences)


@torch.no_grad()
def evaluate(model: nn.Module, rows: Rows, device: str, precision: str) -> dict[str, float]:
    """Loss per predicted token, and the share of them that is predicted right, where the model tells.

    Args:
        model: takes `input_ids` and `labels`.
        rows: held out.
        device: of the model.
        precision: of the setup.

    Returns:
        `loss` and, if the model's output has logits, `score`.
    """
    training = model.training
    model.eval()
    total, count, accuracy = 0.0, 0, None
    for indices in torch.arange(len(rows)).split(EVAL_ROWS):
        batch = rows.take(indices, device)
        with torch.autocast(device, torch.bfloat16, enabled=precision == "autocast"):
            out = model(**batch)
        labels = batch["labels"][:, 1:]
        predicted = int((labels != IGNORE).sum())
        total, count = total + float(out.loss) * predicted, count + predicted
        if (logits := getattr(out, "logits", None)) is not None:
            if accuracy is None:
                accuracy = MulticlassAccuracy(logits.shape[-1], average="micro", ignore_index=IGNORE).to(device)
            accuracy.update(logits[:, :-1].argmax(-1), labels)
    model.train(training)
    metrics = {"loss": total / count}
    return metrics if accuracy is None else metrics | {"score": float(accuracy.compute())}


def write(value: Any, path: Path) -> None:
    """Save, so that no other process ever sees half a file.

    Args:
        value: what `torch.save` takes.
        path: of the file; its directory is made.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}-{os.getpid()}")
    torch.save(value, part)
    part.replace(path)


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]


@functools.lru_cache(4)
def _texts(files: tuple[str, ...]) -> tuple[list[str], list[str]]:
    hub = [name for name in files if name.startswith("hub:")]
    if not hub:
        return texts(files)
    contents = [text for name in hub for text in _hub(name)]
    return contents[len(contents) // 20 :], contents[: len(contents) // 20]


def _hub(name: str) -> list[str]:
    """Texts of `hub:NAME[:SPLIT[:COLUMN]]`."""
    from datasets import load_dataset

    parts = name.split(":")[1:]
    path, split, column = [*parts, *("", "train", "text")[len(parts) :]]
    rows = cast("Any", load_dataset(path, split=split))
    if column not in rows.column_names:
        raise ValueError(f"--data {name}: no column {column!r}; it has {', '.join(rows.column_names)}")
    return [text for text in rows[column] if text.strip()]


def _other_texts(files: tuple[str, ...]) -> tuple[list[str], list[str]]:
    """Text that the pretraining has not seen."""
    if files:
        return _texts(files)
    texts_of_files = read(standard_library("finetune"))
    return [t for i, t in enumerate(texts_of_files) if i % 10 != 1], texts_of_files[1::10]


@functools.lru_cache(4)
def _tokenizer(corpus: tuple[str, ...], vocabulary: int, cache: Path) -> PreTrainedTokenizerFast:
    folder = cache / "tokenizers" / f"{_digest(*corpus)}-{vocabulary}"
    if not (folder / "tokenizer.json").is_file():
        temporary = folder.with_name(f"{folder.name}-{os.getpid()}")
        train_tokenizer(corpus, vocabulary).save_pretrained(temporary)
        try:
            temporary.rename(folder)
        except OSError:  # another process was first
            shutil.rmtree(temporary)
    return PreTrainedTokenizerFast.from_pretrained(folder)


def _streams(
    train: Sequence[str], held_out: Sequence[str], tokenizer: PreTrainedTokenizerFast, context: int, cache: Path
) -> tuple[Rows, Rows]:
    return _stream(tuple(train), tokenizer, context, cache), _stream(tuple(held_out), tokenizer, context, cache)


@functools.lru_cache(8)
def _stream(corpus: tuple[str, ...], tokenizer: PreTrainedTokenizerFast, context: int, cache: Path) -> Rows:
    path = cache / "tokens" / f"{_digest(*corpus, tokenizer.backend_tokenizer.to_str())}-{context}.pt"
    if not path.is_file():
        write(encode(tokenizer, corpus, context).to(torch.int32), path)
    ids = torch.load(path).long()
    return Rows(ids, ids)


def _records(setup: Setup) -> list[dict[str, str]]:
    """Prompts and completions; for DPO also what is rejected."""
    needed = ("prompt", "chosen", "rejected") if setup.regime == "dpo" else ("prompt", "completion")
    if not setup.data:
        records = [record for text in read(standard_library("finetune")) for record in functions(text)]
        if setup.regime == "dpo":
            other = records[1:] + records[:1]
            pairs = zip(records, other, strict=True)
            records = [
                {"prompt": a["prompt"], "chosen": a["completion"], "rejected": b["completion"]} for a, b in pairs
            ]
        return records
    lines = [line for file in setup.data for line in Path(file).read_text(encoding="utf-8").splitlines()]
    records = [json.loads(line) for line in lines if line.strip()]
    if any(key not in record for record in records for key in needed):
        raise ValueError(f"--data {' '.join(setup.data)}: every line needs {', '.join(needed)} for {setup.regime!r}")
    return records


def functions(source: str) -> list[dict[str, str]]:
    """Functions of a Python file that have a docstring and a body.

    Args:
        source: of the file.

    Returns:
        `prompt`, the head and the docstring's first line, and `completion`, the rest.
    """
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError):
        return []
    lines, records = source.splitlines(), []
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and len(node.body) > 1 and (docstring := ast.get_docstring(node)):
            head = textwrap.dedent("\n".join(lines[node.lineno - 1 : node.body[0].lineno - 1]))
            body = textwrap.dedent("\n".join(lines[node.body[1].lineno - 1 : node.end_lineno]))
            if head.strip() and body.strip():
                prompt = f'{head}\n    """{docstring.splitlines()[0]}"""\n'
                records.append({"prompt": prompt, "completion": textwrap.indent(body, "    ")})
    return records


def _end(text: str, tokenizer: PreTrainedTokenizerFast, most: int) -> str:
    """The last tokens of a text: TRL drops pairs whose prompt leaves no room for an answer."""
    return cast("str", tokenizer.decode(cast("list[int]", tokenizer(text)["input_ids"])[-most:]))


def _completions(records: Sequence[dict[str, str]], tokenizer: PreTrainedTokenizerFast, context: int) -> Rows:
    """Rows of a prompt's end and a completion's beginning, half the context each at most, filled up."""
    ids, labels = torch.full((len(records), context), PAD), torch.full((len(records), context), IGNORE)
    for row, record in enumerate(records):
        answer = record.get("completion", record.get("chosen", ""))
        prompt, completion = (cast("list[int]", tokenizer(text)["input_ids"]) for text in (record["prompt"], answer))
        completion = [*completion, cast("int", tokenizer.eos_token_id)][: context // 2]
        prompt = prompt[-(context - len(completion)) :]
        end = len(prompt) + len(completion)
        ids[row, :end] = torch.tensor(prompt + completion)
        labels[row, len(prompt) : end] = torch.tensor(completion)
    return Rows(ids, labels)
