"""The words of the guides and of the code: a spell checker and a prose linter, with the project's vocabulary."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers import guides
from tests.helpers.paths import ROOT

PAGES = (*guides.GUIDES, "CONTRIBUTING.md", "CHANGELOG.md", "examples/diagnostics/README.md")


def test_words_are_spelled() -> None:
    """Codespell, with the words in `pyproject.toml`."""
    pytest.importorskip("codespell_lib", reason="codespell is not installed")
    command = (sys.executable, "-m", "codespell_lib", "--toml", "pyproject.toml")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prose_is_clear(tmp_path: Path) -> None:
    """Proselint, without its checks of typography: plain ASCII is the project's."""
    pytest.importorskip("proselint", reason="proselint is not installed")
    for page in PAGES:
        (tmp_path / page.replace("/", "-")).write_text(guides.prose(guides.read(page)), encoding="utf-8")
    (tmp_path / "config.json").write_text('{"checks": {"typography": false, "lexical_illusions": false}}')
    command = (sys.executable, "-m", "proselint", "check", "--config", "config.json", ".")
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
