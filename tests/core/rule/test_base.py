"""What a rule must declare to be registered, the specs that follow from it, and the checks of hyperparameters."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pytest

from lightning_optim.core.rule import REGISTRY, Rule, eye, hyperparameters, lookup, zeros
from lightning_optim.refresh import RECORD


@pytest.fixture(autouse=True)
def registry() -> Iterator[None]:
    """The registry, restored afterwards."""
    before = dict(REGISTRY)
    yield
    REGISTRY.clear()
    REGISTRY.update(before)


def declare(module: str = __name__, /, *bases: type[Rule], abstract: bool = False, **constants: Any) -> type[Rule]:
    """A rule class of a module, with these class constants."""
    return type("Declared", bases or (Rule,), {"__module__": module, **constants}, abstract=abstract)  # pyright: ignore


@dataclass(frozen=True)
class LowRank(Rule, abstract=True):
    """A base with a rank, a basis and two sides."""

    lr: float = 0.1
    weight_decay: float = 0.0
    rank: int = 4
    betas: tuple[float, float] = (0.9, 0.99)
    refresh: str = "fixed:3"

    state: ClassVar[Any] = {"basis": eye("nr"), "factor": zeros("mm"), "mean": zeros("mn")}
    vector_state: ClassVar[Any] = {"mean": zeros("mn")}
    preconditioners: ClassVar[tuple[str, ...]] = ("basis", "factor")


def test_only_rules_with_a_name_and_a_source_are_registered() -> None:
    assert LowRank not in REGISTRY.values()
    own = declare(__name__, LowRank, name="own", source="somewhere")
    assert lookup("own") is own
    with pytest.raises(TypeError, match="Declared has no `name` of its own: .*class Declared.*, abstract=True"):
        declare(__name__, own)
    with pytest.raises(TypeError, match="no `name` of its own and no `source`"):
        declare()
    with pytest.raises(TypeError, match="has no `source`"):
        declare(name="other")
    assert [name for name, rule in REGISTRY.items() if rule.__module__ == __name__] == ["own"]
    assert declare(abstract=True, name="base", source="x") and "base" not in REGISTRY


def test_a_name_belongs_to_one_module() -> None:
    first = declare(name="taken", source="x")
    with pytest.raises(TypeError, match=f"two rules are named 'taken': {__name__} and elsewhere"):
        declare("elsewhere", name="taken", source="x")
    assert lookup("taken") is first
    again = declare(name="taken", source="x")
    assert lookup("taken") is again, "a module may be run again, as notebooks do"
    with pytest.raises(ValueError, match=r"unknown optimizer 'takn'; did you mean 'taken'"):
        lookup("takn")


def test_declarations_that_contradict_themselves_are_refused() -> None:
    with pytest.raises(TypeError, match="bad: an elementwise rule works on flat blocks; all its state must be 'mn'"):
        declare(name="bad", source="x", elementwise=True, state={"row": zeros("m1")})
    for what in ("elementwise", "reduces"):
        with pytest.raises(TypeError, match="bad: a rule with preconditioners works on whole matrices"):
            declare(name="bad", source="x", **{what: True}, state={"a": zeros("mn")}, preconditioners=("a",))
    assert "bad" not in REGISTRY


def test_specs_have_the_rank_and_the_record_of_refreshes() -> None:
    rule = LowRank()
    specs = rule.state_specs(3, 10)
    assert list(specs) == ["basis", "factor", "mean", "refreshed"]
    assert specs["basis"] == replace(eye("nr"), rank=3), "at most the shorter side"
    assert specs["basis"].shape(3, 10) == (10, 3) and specs["refreshed"].shape(3, 10) == (1, len(RECORD))
    assert LowRank(rank=2).state_specs(3, 10)["basis"].rank == 2
    assert rule.state["basis"].rank is None, "the declaration itself is as it was"
    assert rule.state_specs(1, 10, vector=True) == {"mean": zeros("mn")}, "nothing of it is refreshed"
    assert rule.refresh_cost(3, 10) == 10 * 3 * 10 + 3 * 3 * 3 and rule.refresh_cost(1, 10, vector=True) == 0


def test_hyperparameters_are_checked_by_name() -> None:
    made: Any = dataclass(frozen=True)(declare(__name__, LowRank, name="made", source="x"))
    assert list(hyperparameters(made)) == ["lr", "weight_decay", "rank", "betas", "refresh"]
    made().validate()
    cases: list[tuple[dict[str, Any], str]] = [
        ({"lr": float("nan")}, "made: lr must be a finite number >= 0, got nan"),
        ({"rank": 2.5}, "made: rank must be an integer, got 2.5"),
        ({"betas": (0.9, 1.0)}, r"made: betas must lie in \[0, 1\), got \(0.9, 1.0\)"),
        ({"refresh": "off_diagonal:0.1"}, "made: it has no measure of staleness, so refresh=.* cannot decide"),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=f"^{message}"):
            made(**settings).validate()
    with pytest.raises(ValueError, match="saved with maximize=True, which made does not do"):
        made.translate({"maximize": True})
