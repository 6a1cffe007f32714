"""`examples/results.py`: the table at the end of a fine-tuning, over the runs that can be compared."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import finetune_hf
import pytest
from results import Result, comparable, print_comparison, print_next, save

MUON = Result("muon", 0.0128, 3.884, 2.637, 30.0, 9000.0, 2**21, 533120)


def test_runs_from_one_model_are_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = {
        "muon": MUON,
        "adamw": dataclasses.replace(MUON, optimizer="adamw", after=2.778),
        "other-model": dataclasses.replace(MUON, before=3.5),
        "adapters": dataclasses.replace(MUON, weights=1000),
    }
    for name, result in runs.items():
        (tmp_path / name).mkdir()
        save(result, tmp_path / name)
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "result.json").write_text('{"optimizer": "muon"}')
    found = comparable(MUON, tmp_path / "muon")
    assert [path.name for _, path in found] == ["muon", "adamw"]
    print_comparison(found)
    head, first, second = capsys.readouterr().out.splitlines()
    assert head.split()[:2] == ["optimizer", "lr"]
    assert first.split()[:7] == ["muon", "0.0128", "3.884", "2.637", "30", "9000", "2.00"]
    assert second.startswith("adamw")


def test_what_is_suggested_can_be_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    print_next([(MUON, tmp_path)], Path("runs"))
    lines = capsys.readouterr().out.splitlines()[2:]
    commands = [line.split("  ")[-1].strip() for line in lines]
    assert commands[0] == "tensorboard --logdir runs"
    scripts = [shlex.split(command) for command in commands if "finetune_hf.py" in command]
    parsed = [finetune_hf.parse(words[2:])[1] for words in scripts]
    assert [(args.optim, args.learning_rate) for args in parsed] == [
        ("adamw", 0.0128),
        ("muon", 0.0256),
        ("muon", 2e-4),
    ]
    assert f"python -m lightning_optim show {MUON.optimizer}" in commands
