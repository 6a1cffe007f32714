"""What the registry says of its rules is what they are."""

from __future__ import annotations

import dataclasses
import math
import re

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
    expected |= {"galore": "2lr + rs + 6", "shampoo": "2mn + 2mm + 2nn + 5", "eigen_adam": "2mn + 2ss + 5"}
    assert {name: catalog.state_formula(REGISTRY[name]) for name in expected} == expected


@pytest.mark.parametrize("rule", RULES)
def test_formula_and_bytes_are_those_of_the_declared_state(rule: type) -> None:
    m, n = 6, 10
    specs = rule().state_specs(m, n)
    sizes = [(a * b, spec.dtype) for spec in specs.values() for a, b in [spec.shape(m, n)]]
    assert catalog.state_bytes(rule, m, n) * m * n == pytest.approx(
        sum(size * (dtype.itemsize if dtype else 4) for size, dtype in sizes)
    )


@pytest.mark.parametrize(("m", "n"), [(600, 1000), (1000, 600), (512, 1024)])
@pytest.mark.parametrize("rule", RULES)
def test_formula_holds_for_every_aspect_ratio(rule: type, m: int, n: int) -> None:
    """To one part in a thousand; K-FAC's inputs have a constant beside them, which is no letter."""
    sides = {"m": m, "n": n, "s": min(m, n), "l": max(m, n), "r": getattr(rule(), "rank", None) or 0}
    terms = [re.fullmatch(r"(\d*)([mnslr]*)", term) for term in catalog.state_formula(rule).split(" + ")]
    said = sum(int(t[1] or 1) * math.prod(sides[x] for x in t[2]) for t in terms if t)
    held = sum(math.prod(spec.shape(m, n)) for spec in rule().state_specs(m, n).values())
    assert all(terms) and said == pytest.approx(held, rel=2e-3 if rule is REGISTRY["kfac"] else 0)


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
