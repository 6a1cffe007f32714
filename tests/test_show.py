"""`python -m lightning_optim` without arguments, `list`, `show` and `options`: what a newcomer reads on a terminal."""

from __future__ import annotations

import builtins
import sys
from typing import Any

import pytest
from torch import nn

import lightning_optim
from lightning_optim import __main__, catalog
from lightning_optim.build.recipes import PRESETS, RECIPES
from lightning_optim.core.options import OPTIONS
from lightning_optim.core.rule import REGISTRY, hyperparameters, lookup
from lightning_optim.show import usage


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What a command prints."""
    monkeypatch.setattr(sys, "argv", ["lightning_optim", *words])
    __main__.main()
    return capsys.readouterr().out


@pytest.mark.parametrize("name", [*REGISTRY, *PRESETS, *RECIPES])
def test_a_page_has_everything(monkeypatch: Any, capsys: Any, name: str) -> None:
    page = printed(monkeypatch, capsys, "show", name)
    if name in REGISTRY:
        rule = lookup(name)
        names, source, sections = hyperparameters(rule), rule.source, ("Settings", "State", "Source")
        assert f"{catalog.state_formula(rule)} elements per m x n matrix; {catalog.state_bytes(rule):.2f} bytes" in page
    else:
        recipe = (RECIPES | PRESETS)[name]
        names, source, sections = recipe.settings, recipe.source, ("Settings", "Source")
    assert source in page
    assert all(f"\n  {key} " in page for key in names)
    for section in (*sections, "Measured", "How to switch it on"):
        assert f"\n{section}" in page
    assert "Nothing yet." not in page or name in RECIPES


@pytest.mark.parametrize("name", REGISTRY)
def test_every_setting_has_a_meaning(name: str) -> None:
    rule = lookup(name)
    assert rule.family in catalog.FAMILIES
    missing = [key for key, sentence in catalog.meanings(rule).items() if not sentence.endswith((".", '"'))]
    assert not missing, f'write a sentence below the field in {rule.__module__}: """..."""'


def test_the_lines_for_plain_pytorch_run() -> None:
    """For every rule and preset, with the learning rate that the page gives."""
    model = nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))
    uses = [usage(rule) for rule in REGISTRY.values()] + [usage(lookup(r.rule), n) for n, r in PRESETS.items()]
    space = {"build_optimizer": lightning_optim.build_optimizer, "lightning_optim": lightning_optim, "model": model}
    for rows in uses:
        lines = dict(rows)
        assert builtins.eval(lines["plain PyTorch"], space).param_groups[0]["lr"] > 0
        if "as published" in lines:
            builtins.eval(lines["as published"], space | {"params": [model[0].weight]})


def test_the_overview_names_every_command(monkeypatch: Any, capsys: Any) -> None:
    page = printed(monkeypatch, capsys)
    for command in ("list", "show", "recipes", "options", "plan", "bench"):
        assert f"python -m lightning_optim {command} " in page
    assert all(family in page for family in catalog.FAMILIES)


def test_lists_are_filtered(monkeypatch: Any, capsys: Any) -> None:
    sign = printed(monkeypatch, capsys, "list", "--family", "sign").splitlines()
    assert [line.split()[0] for line in sign] == ["lion", "signsgd", "signum"]
    found = {line.split()[0] for line in printed(monkeypatch, capsys, "list", "--search", "MUON").splitlines()}
    assert {"muon", "normuon", "soap_muon", "cosmos"} <= found and "adamw" not in found
    for words, message in [
        (["list", "--family", "signs"], "no family 'signs'; did you mean 'sign'"),
        (["list", "--search", "nobody"], "no optimizer has 'nobody'"),
        (["show", "mouon"], "no optimizer, recipe or preset 'mouon'; did you mean 'muon'"),
    ]:
        with pytest.raises(SystemExit):
            printed(monkeypatch, capsys, *words)
        assert message in capsys.readouterr().err


def test_options_and_recipes_are_listed(monkeypatch: Any, capsys: Any) -> None:
    lines = printed(monkeypatch, capsys, "options").splitlines()
    assert [line.split()[0] for line in lines] == list(OPTIONS) and all(line.endswith(".") for line in lines)
    names = [line.split()[0] for line in printed(monkeypatch, capsys, "recipes").splitlines()]
    assert names == sorted(RECIPES | PRESETS)
