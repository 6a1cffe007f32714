"""Published settings by name, through every entry point."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import transformers as hf
from lightning import LightningModule
from torch import nn
from transformers import trainer_optimizer
from transformers.training_args import OptimizerNames

from hf_integration import TrainingArguments, attach, register
from lightning_optim import OptimizerConfig, RuleOptimizer, build_optimizer, configure_optimizers, plan
from lightning_optim.build.recipes import RECIPES, SIZES, find
from lightning_optim.core.rule import REGISTRY
from tests.build.test_roles import built

GIVEN = {"weight_decay", "rest", "rest_lr", "rest_settings", "lr_convention", "last_layer"}


@pytest.mark.parametrize("recipe", [*RECIPES, *sorted(REGISTRY)])
def test_every_recipe_is_what_it_says(recipe: str) -> None:
    """A rule that does not exist yet is named by the skip, and checked as soon as it does."""
    actual = find(recipe)
    if actual.rule not in REGISTRY:
        pytest.skip(f"there is no rule {actual.rule!r}")
    assert actual.source
    optimizer = build_optimizer(built("llama"), actual.rule, recipe=recipe)
    main = [g for g in optimizer.param_groups if g["rule"] == actual.rule]
    for key in actual.settings.keys() - GIVEN:
        assert {g[key] for g in main} == {actual.settings[key]}, key
    assert {g["lr_convention"] for g in optimizer.param_groups} == {"native"}
    if "rest_lr" in actual.settings:
        assert {g["lr"] for g in optimizer.param_groups if g["rule"] != actual.rule} == {actual.settings["rest_lr"]}
    if actual.settings.get("last_layer") == "rule":
        assert "head" in {g["role"] for g in main}
    assert str(plan(built("llama"), actual.rule, recipe=recipe))


def test_tables_of_the_alice_paper() -> None:
    """Tables 7 to 11, row by row."""
    rows = {
        "60m": (0.02, 128, 0.3, 0.05, 1e-3, 40),
        "130m": (0.02, 256, 0.3, 0.05, 1e-3, 40),
        "350m": (0.02, 256, 0.3, 0.05, 1e-3, 40),
        "1b": (0.01, 512, 0.25, 0.02, 7e-4, 160),
    }
    assert tuple(rows) == SIZES
    for size, (lr, rank, scale, racs, adam, leading) in rows.items():
        galore, fira, alice = (find(f"{rule}-{size}").settings for rule in ("galore", "fira", "alice"))
        assert (galore["lr"], galore["rank"], galore["scale"]) == (lr, rank, scale)
        assert (fira["lr"], fira["rank"], fira["alpha"]) == (lr, rank, scale)
        assert (alice["lr"], alice["rank"], alice["alpha"], alice["leading"]) == (0.02, rank, scale, leading)
        assert (find(f"racs-{size}").settings["alpha"], find(f"adam-{size}").settings["lr"]) == (racs, adam)
        assert {galore["last_layer"], fira["last_layer"], alice["last_layer"]} == {"rule"}
        assert find(f"racs-{size}").settings["last_layer"] == "rest"


def test_what_is_given_wins() -> None:
    optimizer = build_optimizer(
        built("llama"), "muon", recipe="muon-speedrun", lr=0.5, momentum=0.8, rest_settings={"eps": 1e-5}
    )
    groups: dict[str, Any] = {g["rule"]: g for g in optimizer.param_groups}
    assert (groups["muon"]["lr"], groups["muon"]["momentum"]) == (0.5, 0.8)
    assert (groups["adamw"]["lr"], groups["adamw"]["betas"], groups["adamw"]["eps"]) == (1.8e-3, (0.9, 0.95), 1e-5)
    other = build_optimizer(built("llama"), "muon", recipe="muon-speedrun", rest="lion")
    assert {g["betas"] for g in other.param_groups if g["rule"] == "lion"} == {(0.9, 0.99)}


@pytest.mark.parametrize(
    ("name", "recipe", "match"),
    [
        ("muon", "muon-speedrum", "unknown recipe 'muon-speedrum'; did you mean 'muon-speedrun'"),
        ("muon", "soap-speedrun", "recipe 'soap-speedrun' is of 'soap', not of 'muon'"),
        ("muon", None, "muon: give a learning rate"),
    ],
)
def test_one_clear_error(name: str, recipe: str | None, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        build_optimizer(built("llama"), name, recipe=recipe)


@pytest.fixture
def registered() -> Iterator[None]:
    """Our names in Transformers' tables, for one test."""
    tables: list[Any] = [OptimizerNames._member_names_, OptimizerNames._member_map_, OptimizerNames._value2member_map_]
    tables += [trainer_optimizer._OPTIMIZER_HANDLERS, hf.trainer.DEFAULT_CALLBACKS]
    before, members = [copy.copy(table) for table in tables], set(OptimizerNames._member_map_)
    register()
    yield
    for name in set(OptimizerNames._member_map_) - members:
        type.__delattr__(OptimizerNames, name)
    for table, snapshot in zip(tables, before, strict=True):
        table.clear()
        table.extend(snapshot) if isinstance(table, list) else table.update(snapshot)


@pytest.mark.usefixtures("registered")
def test_recipes_are_flags_of_transformers(tmp_path: Any) -> None:
    """Flags that are set win; those at their default are the recipe's."""
    common: Any = {"output_dir": str(tmp_path), "optim": "muon", "report_to": "none", "use_cpu": True}

    def muon(arguments: Any, trainer_of: Any) -> tuple[float, float]:
        optimizer = trainer_of(hf.LlamaForCausalLM(tiny), arguments).create_optimizer()
        assert isinstance(optimizer, RuleOptimizer)
        groups: dict[str, Any] = {g["rule"]: g for g in optimizer.param_groups}
        assert groups["muon"]["momentum"] == 0.95 and groups["muon"]["lr_convention"] == "native"
        return groups["muon"]["lr"], groups["adamw"]["lr"]

    tiny: Any = built("llama").config
    text = "recipe=muon-speedrun"
    ours = TrainingArguments(**common, optim_args=text)
    assert muon(ours, lambda m, a: hf.Trainer(m, a, optimizer_cls_and_kwargs=a.optimizer_cls_and_kwargs())) == (
        0.02,
        1.8e-3,
    )
    assert muon(hf.TrainingArguments(**common, optim_args=text), hf.Trainer) == (0.02, 1.8e-3)
    changed = hf.TrainingArguments(**common, optim_args=text, learning_rate=0.3)
    assert muon(changed, hf.Trainer) == (0.3, 1.8e-3)
    plain = hf.TrainingArguments(**{**common, "optim": "adamw_torch"})
    assert muon(plain, lambda m, a: attach(hf.Trainer(m, a), "muon", recipe="muon-speedrun")) == (0.02, 1.8e-3)


def test_recipes_in_lightning() -> None:
    """The schedule stays the user's; a learning rate that is given wins."""
    module = Module()
    made = configure_optimizers(
        module, "muon", recipe="muon-speedrun", schedule={"schedule": "linear", "total_steps": 4}
    )
    groups: dict[str, Any] = {g["rule"]: g for g in made["optimizer"].param_groups}
    assert (groups["muon"]["lr"], groups["adamw"]["lr"]) == (0.02, 1.8e-3)
    config = OptimizerConfig("muon", recipe="muon-speedrun", lr=0.5)
    assert {g["lr"] for g in config(module)["optimizer"].param_groups} == {0.5, 1.8e-3}
    with pytest.raises(ValueError, match="unknown recipe 'x'"):
        OptimizerConfig("muon", recipe="x")


class Module(LightningModule):
    """A matrix and a bias."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 6)
