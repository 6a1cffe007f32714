"""What the registry says of its rules is what they are."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
import torch

from lightning_optim import catalog
from lightning_optim.core.rule import REGISTRY, hyperparameters
from tests.helpers.rules import make

RULES = [pytest.param(REGISTRY[name], id=name) for name in sorted(REGISTRY)]


def test_kinds() -> None:
    found = {name: catalog.kind(REGISTRY[name]) for name in ("adamw", "adafactor", "muon", "lbfgs", "kfac")}
    expected = {"adamw": "elements", "adafactor": "sums", "muon": "matrices", "lbfgs": "all", "kfac": "matrices"}
    assert found == expected
    assert {catalog.kind(rule) for rule in REGISTRY.values()} == {*expected.values()}


def test_formulas_add_equal_state_up() -> None:
    expected = {"adamw": "2mn", "lion": "mn", "adafactor": "m + n", "signsgd": "0", "sophia_g": "2mn", "muon": "mn"}
    assert {name: catalog.state_formula(REGISTRY[name]) for name in expected} == expected


@pytest.mark.parametrize("rule", RULES)
def test_formula_and_bytes_are_those_of_the_declared_state(rule: type) -> None:
    m, n = 6, 10
    specs = rule().state_specs(m, n)
    sizes = [(a * b, spec.dtype) for spec in specs.values() for a, b in [spec.shape(m, n)]]
    assert catalog.state_bytes(rule, m, n) * m * n == pytest.approx(
        sum(size * (dtype.itemsize if dtype else 4) for size, dtype in sizes)
    )
    letters = Counter(
        "".join(sorted(spec.letters.replace("1", ""))) for spec in rule().state_specs(1024, 1024).values()
    )
    formula = catalog.state_formula(rule)
    terms = Counter({
        t.lstrip("0123456789"): int(t.rstrip("mnr") or 1) for t in formula.split(" + ") if t[-1].isalpha()
    })
    assert terms == Counter({k: v for k, v in letters.items() if k.isalpha()})


@pytest.mark.parametrize("name", ["adamw", "adafactor", "muon", "soap"])
def test_bytes_are_those_that_a_step_allocates(name: str) -> None:
    p = torch.nn.Parameter(torch.ones(6, 10))
    p.grad = torch.ones(6, 10)
    optimizer = make(name, [p])
    optimizer.step()
    held = sum(t.nbytes for k, t in optimizer.state[p].items() if k != "step")
    assert catalog.state_bytes(REGISTRY[name], 6, 10) * 60 == pytest.approx(held)


@pytest.mark.parametrize("rule", RULES)
def test_documentation_has_every_hyperparameter_with_its_default_and_the_source(rule: type) -> None:
    text = catalog.documentation(rule)
    settings = text.split("\n\nHyperparameters: ")[1].split(".\n\nSource: ")[0].rstrip(".")
    for name, default in hyperparameters(rule).items():
        assert f"{name}={default!r}" in settings
    names = [f.name for f in dataclasses.fields(rule) if not f.kw_only]
    assert settings.startswith(f"{names[0]}=") and text.count("Source: ") == 1
    line = catalog.summary(rule)
    assert line and "\n" not in line and not line.endswith(".") and text.startswith(line)
