"""From text to batches of tokens: the tokenizer, the rows, and an order that a checkpoint finds its place in."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lightning_optim.bench.text import blocks

SPECIAL = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
EOS, PAD = 0, 1  # their ids: a trainer of tokenizers numbers the special ones first


def train_tokenizer(corpus: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same text gives the same one.

    Args:
        corpus: texts.
        vocabulary: token ids at most.

    Returns:
        A tokenizer of Transformers, with the special tokens `EOS` and `PAD`.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **SPECIAL)


def encode(tokenizer: PreTrainedTokenizerFast, corpus: Sequence[str], length: int) -> Tensor:
    """Turn texts into rows of tokens; every text ends with `EOS`.

    Args:
        tokenizer: to use.
        corpus: texts.
        length: tokens per row.

    Returns:
        int64, `[rows, length]`.

    Raises:
        ValueError: the texts do not fill one row.
    """
    ids = cast("list[list[int]]", tokenizer(list(corpus), return_attention_mask=False)["input_ids"])
    rows = blocks([token for text in ids for token in (*text, EOS)], length)
    if not len(rows):
        raise ValueError(f"the text is too short: a part of it has less than {length} tokens")
    return rows


def shuffled(rows: int, count: int, seed: int) -> Tensor:
    """Choose rows, one permutation after another.

    Args:
        rows: to choose from.
        count: how many indices; a larger count begins with the same ones.
        seed: of the permutations.

    Returns:
        int64, `[count]`.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(rows, generator=generator) for _ in range(-(-count // rows))])[:count]


class Batches:
    """Rows in a given order, each rank's share of every batch.

    Lightning puts `state_dict` into its checkpoints and so finds the place again, on any number of ranks.
    """

    def __init__(self, rows: Tensor, order: Tensor, batch_size: int):
        self.rows, self.order, self.batch_size = rows, order, batch_size
        self.start = self.position = 0  # in rows

    def __len__(self) -> int:
        return -(-len(self.order) // self.batch_size)

    def __iter__(self) -> Iterator[Tensor]:
        """Go on from a loaded position; later passes start at the beginning."""
        self.position, self.start = self.start, 0
        rank, ranks = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        while self.position < len(self.order):
            chosen = self.order[self.position : self.position + self.batch_size]
            self.position += len(chosen)
            yield self.rows[chosen.tensor_split(ranks)[rank]]

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint keeps.

        Returns:
            The position.
        """
        return {"position": self.position}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Let the next pass start at a saved position.

        Args:
            state_dict: from `state_dict`.
        """
        self.start = state_dict["position"]
