"""Real text that every machine with Python has: the sources of the standard library, split by file."""

from __future__ import annotations

import sysconfig
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

Part = Literal["pretrain", "finetune", "validation"]

_PARTS: tuple[Part, ...] = ("pretrain",) * 8 + ("finetune", "validation")


def standard_library(part: Part) -> list[Path]:
    """The files of one part of the corpus, in a fixed order; no file is in two parts.

    Args:
        part: 8 of 10 files are for pretraining, one each for fine-tuning and validation.

    Returns:
        Paths of Python sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    skipped = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}
    names = [p.relative_to(root).as_posix() for p in root.rglob("*.py")]
    sources = sorted(n for n in names if not skipped & set(n.split("/")))
    return [root / n for n in sources if _PARTS[zlib.crc32(n.encode()) % len(_PARTS)] == part]


def read(paths: Iterable[Path]) -> list[str]:
    """Read text files.

    Args:
        paths: UTF-8 files; bytes that are not UTF-8 are replaced.

    Returns:
        The contents of the files that are not empty.
    """
    texts = (p.read_text(encoding="utf-8", errors="replace") for p in paths)
    return [t for t in texts if t.strip()]


def texts(files: Sequence[str]) -> tuple[list[str], list[str]]:
    """Texts to train on and texts held out.

    Args:
        files: text files, of which the last twentieth is held out. If empty, files of the standard library, some of
            which are held out whole.

    Returns:
        (texts to train on, texts held out).
    """
    if not files:
        return read(standard_library("pretrain")), read(standard_library("validation"))
    contents = read(Path(file) for file in files)
    return [t[: len(t) * 19 // 20] for t in contents], [t[len(t) * 19 // 20 :] for t in contents]


def blocks(token_ids: Sequence[int], length: int) -> Tensor:
    """Cut a stream of tokens into rows.

    Args:
        token_ids: the stream; an incomplete last row is dropped.
        length: tokens per row.

    Returns:
        int64, `[rows, length]`.
    """
    rows = len(token_ids) // length
    return torch.tensor(token_ids[: rows * length], dtype=torch.int64).view(rows, length)


def unigram_entropy(rows: Tensor, vocabulary: int) -> float:
    """Entropy of the token frequencies: the loss of the best model that ignores context.

    Args:
        rows: token ids.
        vocabulary: number of token ids.

    Returns:
        Nats per token.
    """
    share = torch.bincount(rows.flatten(), minlength=vocabulary).double() / rows.numel()
    return float(torch.special.entr(share).sum())
