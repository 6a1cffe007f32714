"""A tokenizer trained on any text, rows of tokens, and their order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from lightning_optim.data.text import blocks

SPECIAL = {"eos_token": "<|endoftext|>", "pad_token": "<|pad|>"}
EOS, PAD = 0, 1  # token ids: training numbers the special tokens first


def train_tokenizer(corpus: Sequence[str], vocabulary: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer; the same text gives the same tokenizer.

    Args:
        corpus: texts.
        vocabulary: the largest number of token ids.

    Returns:
        A Transformers tokenizer with the special tokens `EOS` and `PAD`.
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
        tokenizer: the tokenizer.
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
    """The order in which rows are trained on: one permutation after another.

    Args:
        rows: number of rows.
        count: number of indices; a larger count begins with the same ones.
        seed: random seed of the permutations.

    Returns:
        int64, `[count]`.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randperm(rows, generator=generator) for _ in range(-(-count // rows))])[:count]
