"""The guides as data: their code blocks by language, their commands, and their prose."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from tests.helpers.paths import ROOT

GUIDES = (
    "README.md",
    "hf_integration/README.md",
    "lightning_optim/README.md",
    "lightning_optim/ARCHITECTURE.md",
    "lightning_optim/bench/README.md",
    "callbacks/README.md",
    "examples/README.md",
)
"""What a user reads; pages of measurements are beside the records."""

NOT_RUN = {
    "pip install": "downloads packages",
    "python3 -m venv": ".ci/run runs the tests' command; the other is the main job, minutes",
    "tensorboard": "serves until it is stopped; tests/examples/test_diagnostics.py asks it for every view",
    "torchrun --nnodes": "needs several machines",
    "srun": "needs SLURM",
}
"""Beginnings of commands that no test runs as they stand, and why."""


@dataclass(frozen=True)
class Block:
    """A fenced block of a guide."""

    section: str
    language: str
    text: str


def read(guide: str) -> str:
    """The text of a guide."""
    return (ROOT / guide).read_text(encoding="utf-8")


def blocks(guide: str, language: str, section: str = "") -> list[Block]:
    """Fenced blocks of a language, in order, of the whole guide or of one section."""
    out, title = [], ""
    for heading, word, text in re.findall(r"^## ([^\n]*)$|^```(\w+)\n(.*?)^```$", read(guide), flags=re.M | re.S):
        title = heading or title
        if word == language and section in ("", title):
            out.append(Block(title, word, text))
    return out


def commands() -> list[tuple[str, str]]:
    """Every command line of the guides, without comments: the guide and the command."""
    lines = [(guide, line) for guide in GUIDES for block in blocks(guide, "bash") for line in block.text.splitlines()]
    return [(guide, line.partition("  #")[0].strip()) for guide, line in lines if line and not line.startswith("#")]


def reason_not_to_run(command: str) -> str | None:
    """Why a command is not run, or None."""
    return next((why for beginning, why in NOT_RUN.items() if command.startswith(beginning)), None)


def prose(text: str) -> str:
    """A page without code, tables, addresses and comments; every line stays where it is."""

    def blank(match: re.Match[str]) -> str:
        return "\n" * match.group().count("\n")

    for pattern in (r"^```.*?^```$", r"<!--.*?-->", r"^\|[^\n]*$", r"`[^`]*`", r"\]\([^)]*\)"):
        text = re.sub(pattern, blank, text, flags=re.M | re.S)
    return text


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
