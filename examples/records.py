"""From records to rows of tokens: text, prompts with completions and conversations, with a loss where it belongs."""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from lightning_optim.data.text import blocks

IGNORE = -100
"""Label of a token without a loss."""

Record = Mapping[str, Any]
Row = dict[str, Tensor]


def read_records(paths: Iterable[Path]) -> list[Record]:
    """Read a directory of the `datasets` library (`save_to_disk`; its `train` split), jsonl, or text, a record a file.

    Args:
        paths: files and directories; which of them are jsonl says their suffix.

    Returns:
        Records that are not empty.

    Raises:
        ValueError: a line is not a JSON object.
    """
    actual: list[Record] = []
    for path in paths:
        if path.is_dir():
            from datasets import DatasetDict, load_from_disk  # only these need the library

            loaded = load_from_disk(path)
            actual += cast("list[Record]", loaded["train"] if isinstance(loaded, DatasetDict) else loaded)
        elif path.suffix == ".jsonl":
            for i, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
                actual += [_parsed(line, f"{path}:{i}")] if line.strip() else []
        elif (text := path.read_text(encoding="utf-8", errors="replace")).strip():
            actual.append({"text": text})
    return actual


def _parsed(line: str, where: str) -> Record:
    try:
        record = json.loads(line)
    except ValueError as e:
        raise ValueError(f"{where}: {e}") from e
    if not isinstance(record, dict):
        raise ValueError(f"{where}: not a JSON object")
    return record


def stream(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], length: int) -> list[Row]:
    """Join texts to one stream and cut it into rows; attention goes over the joints.

    Args:
        tokenizer: its end token, if it has one, follows every text.
        texts: any number.
        length: tokens per row; an incomplete last row is dropped.

    Returns:
        Rows that are labels, too: the model shifts them itself.
    """
    if not texts:
        return []
    ids = cast("list[list[int]]", tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"])
    rows = blocks([token for text in ids for token in text + _end(tokenizer)], length)
    return [{"input_ids": row, "labels": row} for row in rows]


def sample(tokenizer: PreTrainedTokenizerBase, record: Record, length: int) -> Row | None:
    """Tokenize one record.

    * `text`: every token is learned;
    * `prompt`, `completion`: strings, of which the completion and the end token are learned, or lists of messages;
    * `messages` (and `tools`): rendered by the tokenizer's chat template; what the assistant says is learned.

    Args:
        tokenizer: a fast one.
        record: see above.
        length: tokens at most; what is longer is cut off.

    Returns:
        A row, or None if nothing in it is learned.

    Raises:
        ValueError: a record of another kind, or a template that cannot tell what the assistant says.
    """
    if "messages" in record:
        ids, labels = _chat(tokenizer, record["messages"], 0, record.get("tools"))
    elif isinstance(prompt := record.get("prompt"), list):
        ids, labels = _chat(tokenizer, prompt + record["completion"], len(prompt), record.get("tools"))
    elif isinstance(prompt, str) and isinstance(completion := record.get("completion"), str):
        learned = [(len(prompt), len(prompt) + len(completion))]
        ids, labels = _labelled(tokenizer, prompt + completion, learned, special=True)
    elif isinstance(text := record.get("text"), str):
        ids, labels = _labelled(tokenizer, text, [(0, len(text))], special=False)
    else:
        raise ValueError(f"a record needs text, prompt and completion, or messages; this one has {', '.join(record)}")
    ids, labels = ids[:length], [IGNORE, *labels[1:length]]  # nothing predicts a first token
    if all(label == IGNORE for label in labels):
        return None
    return {"input_ids": torch.tensor(ids), "labels": torch.tensor(labels)}


def samples(tokenizer: PreTrainedTokenizerBase, records: Iterable[Record], length: int) -> list[Row]:
    """Tokenize records one by one; says how many it leaves out because nothing in them is learned.

    Args:
        tokenizer: a fast one.
        records: see `sample`.
        length: tokens per row at most.

    Returns:
        Rows of different lengths.
    """
    actual = [sample(tokenizer, record, length) for record in records]
    rows = [row for row in actual if row is not None]
    if len(rows) < len(actual):
        print(f"{len(actual) - len(rows)} records left out: nothing in their first {length} tokens is to be learned")
    return rows


def _end(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    return [tokenizer.eos_token_id] if isinstance(tokenizer.eos_token_id, int) else []


def _labelled(
    tokenizer: PreTrainedTokenizerBase, text: str, learned: Sequence[tuple[int, int]], *, special: bool | None
) -> tuple[list[int], list[int]]:
    """Token ids, and labels of tokens that begin in a span of characters; an end token unless `special` is None."""
    actual: Any = tokenizer(text, add_special_tokens=bool(special), return_offsets_mapping=True, verbose=False)
    ids: list[int] = actual["input_ids"]
    inside = [a < b and any(start <= a < stop for start, stop in learned) for a, b in actual["offset_mapping"]]
    labels = [token if yes else IGNORE for token, yes in zip(ids, inside, strict=True)]
    if special is None:
        return ids, labels
    end = _end(tokenizer)
    if end and ids[-1:] == end:  # some tokenizers put it there
        return ids, labels[:-1] + end
    return ids + end, labels + end


def _chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Record], first: int, tools: Any
) -> tuple[list[int], list[int]]:
    """A conversation, in which what the assistant says from message `first` on is learned."""
    warned_record = [
        {k: v for k, v in message.items() if v is not None} for message in messages
    ]  # Arrow fills with None

    def render(count: int, **options: Any) -> Any:
        return tokenizer.apply_chat_template(warned_record[:count], tools=tools, **options)

    text: str = render(len(warned_record), tokenize=False)
    turns = [i for i, message in enumerate(warned_record) if i >= first and message["role"] == "assistant"]
    if re.search(r"\{%-?\s*generation", cast("str", tokenizer.get_chat_template())):
        actual = render(len(warned_record), tokenize=True, return_dict=True, return_assistant_tokens_mask=True)
        before = len(render(first, tokenize=True, return_dict=True)["input_ids"]) if first else 0
        ids: list[int] = actual["input_ids"]
        learned = [i >= before and mask for i, mask in enumerate(actual["assistant_masks"])]
        return ids, [token if yes else IGNORE for token, yes in zip(ids, learned, strict=True)]
    spans = []
    for i in turns:
        start = render(i, tokenize=False, add_generation_prompt=True) if i else ""
        stop = render(i + 1, tokenize=False)
        if not (text.startswith(stop) and stop.startswith(start)):
            raise ValueError("the chat template rewrites earlier turns; mark the assistant's by {% generation %} in it")
        spans.append((len(start), len(stop)))
    return _labelled(tokenizer, text, spans, special=None)


def pack(samples: Iterable[Row], length: int) -> Iterator[Row]:
    """Put samples together, longest first, each where it leaves the least room.

    Args:
        samples: none longer than `length`.
        length: tokens per row at most.

    Yields:
        Rows with `position_ids` that begin again with every sample: Transformers' models then attend inside each only.
    """
    rows: list[list[Row]] = []
    room: list[tuple[int, int]] = []  # (tokens left, row), sorted
    for one in sorted(samples, key=lambda s: -len(s["input_ids"])):
        size = len(one["input_ids"])
        at = bisect.bisect_left(room, (size, -1))
        left, row = room.pop(at) if at < len(room) else (length, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(one)
        bisect.insort(room, (left - size, row))
    for row in rows:
        joined = {key: torch.cat([one[key] for one in row]) for key in ("input_ids", "labels")}
        yield joined | {"position_ids": torch.cat([torch.arange(len(one["input_ids"])) for one in row])}


def collate(rows: Sequence[Row], pad: int) -> Row:
    """Fill rows of a batch up to the longest.

    Args:
        rows: of `stream`, `sample` or `pack`.
        pad: token id to fill with.

    Returns:
        `[batch, tokens]` each; an `attention_mask` where the filling needs one.
    """
    fill = {"input_ids": pad, "labels": IGNORE, "position_ids": 0}
    batch = {key: pad_sequence([row[key] for row in rows], True, fill[key]) for key in rows[0]}
    if "position_ids" not in batch and len({len(row["input_ids"]) for row in rows}) > 1:
        batch["attention_mask"] = pad_sequence([torch.ones_like(row["input_ids"]) for row in rows], True, 0)
    return batch
