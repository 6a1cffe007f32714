"""Tables are drawn on a terminal, and plain lines where another program reads them."""

from __future__ import annotations

import sys

import pytest

from lightning_optim.terminal import print_table

ROWS = [("a", "[b]", "c d"), ("long", "x", "e")]


def test_piped_lines_are_rows_alone(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(ROWS, ("one", "two", "three"), 2)
    assert capsys.readouterr().out == "  a     [b]  c d\n  long  x    e\n"
    print_table([], ("one",))
    assert not capsys.readouterr().out


def test_a_terminal_gets_a_table_with_its_heading(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("rich")
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    print_table(ROWS, ("one", "two", "three"))
    out = capsys.readouterr().out
    assert "three" in out and "[b]" in out and "─" in out


def test_a_terminal_without_rich_gets_plain_lines(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setattr("lightning_optim.terminal.find_spec", lambda name: None)
    print_table(ROWS, ("one", "two", "three"))
    assert capsys.readouterr().out == "a     [b]  c d\nlong  x    e\n"
