"""From a model to groups: roles by module identity, overrides, learning rates."""

from __future__ import annotations

import logging
import re
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn
from transformers import get_scheduler

from lightning_optim import RuleOptimizer, assign, build_optimizer, layerwise_decay, lora_plus, roles
from lightning_optim.build.overrides import Override
from lightning_optim.build.plan import describe, plan
from tests.helpers.rules import gradient


class Block(nn.Module):
    """Names that say nothing, or lie."""

    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.lm_head_norm = nn.Embedding(20, 8)
        self.positions = nn.Embedding(10, 8)
        self.embed = nn.Linear(8, 16)
        self.attention = nn.MultiheadAttention(8, 2)
        self.convolution = nn.Conv2d(3, 4, 2)
        self.raw = nn.Parameter(torch.randn(3, 4))
        self.norm = nn.LayerNorm(8)
        self.out = nn.Linear(8, 20, bias=False)
        if tied:
            self.out.weight = self.lm_head_norm.weight


def test_lazy_layers_are_stepped_by_the_main_rule() -> None:
    model: Any = nn.Sequential(nn.LazyLinear(8), nn.Tanh(), nn.LazyLinear(8))
    optimizer = build_optimizer(model, "muon", lr=1e-2)
    model(torch.randn(4, 6)).square().mean().backward()
    before = model[0].weight.detach().clone()
    optimizer.step()
    names = [n for g in optimizer.param_groups if g["rule"] == "muon" for n in g["param_names"]]
    assert names == ["0.weight", "2.weight"]
    assert not torch.equal(before, model[0].weight)


def test_roles_come_from_modules_not_names() -> None:
    actual = {k: trait.role for k, trait in roles(Block()).items()}
    assert actual == {
        "lm_head_norm.weight": "embedding",
        "positions.weight": "embedding",
        "embed.weight": "hidden",
        "embed.bias": "vector",
        "attention.in_proj_weight": "qkv",
        "attention.in_proj_bias": "vector",
        "attention.out_proj.weight": "hidden",
        "attention.out_proj.bias": "vector",
        "convolution.weight": "conv",
        "convolution.bias": "vector",
        "raw": "other",
        "norm.weight": "vector",
        "norm.bias": "vector",
        "out.weight": "head",
    }


def test_tied_head_counts_as_embedding_once() -> None:
    actual = {k: trait.role for k, trait in roles(Block(tied=True)).items()}
    assert actual["lm_head_norm.weight"] == "embedding"
    assert "out.weight" not in actual


def test_frozen_parameters_have_no_role() -> None:
    model = Block()
    model.embed.weight.requires_grad_(False)
    assert "embed.weight" not in roles(model)


def test_matrix_rules_take_hidden_matrices_others_take_everything() -> None:
    owners = {a.name: a.rule for a in assign(Block(), "muon", "adamw")}
    assert {k for k, v in owners.items() if v == "muon"} == {
        "embed.weight",
        "attention.in_proj_weight",
        "attention.out_proj.weight",
    }
    assert set(owners.values()) == {"muon", "adamw"}
    for name in ("lion", "adafactor", "sgd"):
        assert {a.rule for a in assign(Block(), name, "adamw")} == {name}


@pytest.mark.parametrize(
    ("model", "warned_record"),
    [
        (nn.LSTM(8, 8), r"muon owns no parameter: .*hidden.*other \(2\), vector \(2\).*weight_ih_l0.*'other', 'muon'"),
        (nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)), r"conv \(1\).*'conv', 'muon'"),
        (nn.Sequential(nn.LayerNorm(4)), r"vector \(2\)\. None of them is a matrix"),
    ],
)
def test_a_main_rule_without_parameters_is_a_warning(
    model: nn.Module, warned_record: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING, "lightning_optim"):
        optimizer = build_optimizer(model, "muon", lr=1e-3)
    (record,) = caplog.records
    assert re.search(warned_record, record.getMessage())
    assert record.getMessage() in str(describe(model, optimizer)) and record.getMessage() in str(plan(model, "muon"))
    caplog.clear()
    roles_here = {a.role for a in assign(model, "muon", "adamw")}
    if role := next(iter(roles_here & {"other", "conv"}), None):
        advised = build_optimizer(model, "muon", lr=1e-3, overrides=[(role, "muon")])
        assert {g["rule"] for g in advised.param_groups} == {"muon", "adamw"}
        assert not describe(model, advised).warnings
    build_optimizer(model, "soap", lr=1e-3, overrides=[("*", "soap")])
    build_optimizer(model, "adamw", lr=1e-3)
    assert not caplog.records


def test_settings_go_to_their_rule() -> None:
    overrides = [("out.weight", "lion")]
    optimizer = build_optimizer(Block(), "muon", lr=1e-3, rest_settings={"eps": 1e-5}, seed=4, overrides=overrides)
    for group in optimizer.param_groups:
        assert group["seed"] == 4
        assert group.get("eps") == {"adamw": 1e-5, "muon": 1e-7, "lion": None}[group["rule"]]
    with pytest.raises(ValueError, match="adamw has no setting 'epsilon'.*'eps'"):
        build_optimizer(Block(), "muon", lr=1e-3, rest_settings={"epsilon": 1e-5})


def test_overrides_in_order_first_match_wins() -> None:
    overrides = [("embed.weight", "lion", {"lr": 7.0}), ("hidden", None, {"momentum": 0.5}), ("*.bias", "sgd")]
    model = Block()
    optimizer = build_optimizer(model, "muon", lr=1e-3, overrides=overrides)
    names = {id(p): k for k, p in model.named_parameters()}
    where = {names[id(p)]: g for g in optimizer.param_groups for p in g["params"]}
    assert len(where) == len(names)
    assert (where["embed.weight"]["rule"], where["embed.weight"]["lr"]) == ("lion", 7.0)
    assert where["attention.out_proj.weight"]["momentum"] == 0.5
    assert where["attention.in_proj_weight"]["momentum"] == 0.95
    assert where["attention.in_proj_weight"]["blocks"] == 3
    assert where["embed.bias"]["rule"] == "sgd" and where["norm.weight"]["rule"] == "adamw"
    assert len({g["name"] for g in optimizer.param_groups}) == len(optimizer.param_groups)


def test_groups_learning_rates_and_decay() -> None:
    optimizer = build_optimizer(Block(), "muon", lr=1e-3, rest_lr=5e-4, weight_decay=0.1, momentum=0.9, seed=3)
    groups = {g["name"]: g for g in optimizer.param_groups}
    assert optimizer.param_groups[0]["name"] == "muon/hidden"
    assert type(optimizer).__name__ == "Muon"
    assert groups["muon/hidden"]["lr"] == 1e-3 and groups["muon/hidden"]["momentum"] == 0.9
    assert {g["lr"] for k, g in groups.items() if g["rule"] == "adamw"} == {5e-4}
    assert groups["adamw/vector"]["weight_decay"] == 0.0 and groups["adamw/embedding"]["weight_decay"] == 0.1
    assert {g["seed"] for g in optimizer.param_groups} == {3}
    assert {g["lr_convention"] for g in optimizer.param_groups} == {"adamw"}


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "adafactor"])
def test_the_default_convention_moves_as_far_as_adamw(name: str) -> None:
    """Gradients of AdamW's usual signal-to-noise ratio: every rule's update has an RMS near 0.2 per unit lr."""
    model = nn.Linear(32, 48, bias=False)
    weight = model.weight
    optimizer = build_optimizer(model, name, lr=1e-3)
    moved: list[Tensor] = []
    for t in range(1, 61):
        before = weight.detach().clone()
        weight.grad = gradient(weight, "w", t)
        optimizer.step()
        moved.append((weight.detach() - before).square().mean().sqrt() / 1e-3)
    assert 0.1 < torch.stack(moved[40:]).mean() < 0.35 or name == "adafactor"
    if name == "adafactor":  # no momentum: its direction is as noisy as the gradient, 5 times AdamW's before the scale
        assert 0.15 < torch.stack(moved[40:]).mean() < 0.25


def test_native_convention_is_the_published_scale() -> None:
    model = nn.Linear(32, 48, bias=False)
    weight = model.weight
    before = weight.detach().clone()
    optimizer = build_optimizer(model, "lion", lr=1e-3, lr_convention="native")
    weight.grad = gradient(weight, "w", 1)
    optimizer.step()
    torch.testing.assert_close((weight - before).abs(), torch.full_like(before, 1e-3), rtol=1e-3, atol=0)


def test_rules_without_scale_say_so(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        build_optimizer(Block(), "sgd", lr=0.1)
    assert len(caplog.records) == 1 and caplog.records[0].getMessage().startswith("sgd: lr is the published one")
    caplog.clear()
    for name in ("muon", "adafactor", "lion"):
        build_optimizer(Block(), name, lr=0.1)
    build_optimizer(Block(), "sgd", lr=0.1, lr_convention="native")
    assert not caplog.records


OVERRIDES: list[Override] = [("out.*", None, {"weight_decay": 0.3})]


def late(lr: float | None = 0.01, **settings: Any) -> tuple[Block, RuleOptimizer]:
    """A model whose attention, convolution and embedding joined its optimizer later, with a tenth of the lr."""
    torch.manual_seed(0)
    model = Block()
    joins = [model.attention, model.convolution, model.lm_head_norm]
    for module in joins:
        module.requires_grad_(False)
    optimizer = build_optimizer(model, "muon", lr=0.1, rest_lr=0.02, weight_decay=0.1, overrides=OVERRIDES)
    for module in joins:
        module.requires_grad_(True)
    case = {} if lr is None else {"lr": lr}
    optimizer.add_param_group({"params": (p for m in joins for p in m.parameters()), **case, **settings})
    return model, optimizer


def test_group_without_a_rule_is_divided_as_from_the_start() -> None:
    (model, optimizer), whole = late(), Block()
    whole.load_state_dict(model.state_dict())
    expected = build_optimizer(whole, "muon", lr=0.1, rest_lr=0.02, weight_decay=0.1, overrides=OVERRIDES)
    joined = ("attention", "convolution", "lm_head_norm")

    def settings(of: RuleOptimizer) -> dict[str, dict[str, Any]]:
        skip = ("params", "param_names", "role_sources", "name", "lr")
        return {n: {k: v for k, v in g.items() if k not in skip} for g in of.param_groups for n in g["param_names"]}

    assert settings(optimizer) == settings(expected)
    lrs = [{n: g["lr"] for g in o.param_groups for n in g["param_names"]} for o in (optimizer, expected)]
    assert lrs[0] == pytest.approx({n: lr / 10 if n.startswith(joined) else lr for n, lr in lrs[1].items()})
    names = [g["name"] for g in optimizer.param_groups]
    assert len(set(names)) == len(names) and names[-1] == "adamw/conv"


def test_divided_group_keeps_what_it_gives() -> None:
    groups = {g["name"]: g for g in late(None, name="thawed", weight_decay=0.5)[1].param_groups}
    assert {k: (g["lr"], g["weight_decay"]) for k, g in groups.items() if k.startswith("thawed")} == {
        "thawed/muon/hidden": (0.1, 0.5),
        "thawed/muon/qkv/3 blocks": (0.1, 0.5),
        "thawed/adamw/embedding": (0.02, 0.5),
        "thawed/adamw/vector": (0.02, 0.0),
        "thawed/adamw/conv": (0.02, 0.5),
    }


def test_group_of_another_model_gets_the_main_rule_or_an_error() -> None:
    _, optimizer = late()
    count = len(optimizer.param_groups)
    with pytest.raises(ValueError, match="muon needs a matrix, got shape"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    assert len(optimizer.param_groups) == count
    optimizer.add_param_group({"params": nn.Parameter(torch.zeros(3, 2)), "lr": 0.5})
    assert (optimizer.param_groups[-1]["rule"], optimizer.param_groups[-1]["lr"]) == ("muon", 0.5)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))], "rule": "lion"})
    assert optimizer.param_groups[-1]["rule"] == "lion"


def test_plan_of_an_optimizer_follows_what_is_frozen() -> None:
    model, optimizer = late()
    model.out.requires_grad_(False)
    model.extra = nn.Linear(2, 2, bias=False)
    actual = describe(model, optimizer)
    assert len(actual.rows) == len(list(model.parameters())) - 2
    assert actual.frozen == {"out.weight": (20, 8)} and actual.unowned == {"extra.weight": (2, 2)}
    assert "\n160 weights frozen: out.weight\n\n4 weights trainable, but in no group: extra.weight" in str(actual)


def test_a_model_trains() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(13, 16), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 13))
    tokens, loss = torch.arange(13), torch.zeros(())
    for name in ("muon", "adamw", "lion", "adafactor"):
        for layer in model:
            if hasattr(layer, "reset_parameters"):
                layer.reset_parameters()  # pyright: ignore[reportCallIssue]
        optimizer = build_optimizer(model, name, lr=1e-2)
        for _ in range(60):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(tokens), (tokens + 1) % 13)
            loss.backward()
            optimizer.step()
        assert loss.item() < 1.0, name  # from log(13) = 2.6


class Layered(nn.Module):
    """Embedding, layers in a list, output."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.stack = nn.ModuleList([nn.ModuleDict({"a[0]": nn.Linear(8, 8)}) for _ in range(3)])
        self.out = nn.Linear(8, 20, bias=False)


def rates(optimizer: RuleOptimizer) -> dict[str, float]:
    """Learning rate by parameter name."""
    return {n: g["lr"] for g in optimizer.param_groups for n in g["param_names"]}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch.compile's own imports
@pytest.mark.parametrize("wrapper", ["none", "compile", "data parallel"])
def test_learning_rates_fall_towards_the_input(wrapper: str) -> None:
    """Layers are found by structure; a wrapper put on later does not matter."""
    model = Layered()
    overrides = layerwise_decay(model, 0.5)
    wrap = {"none": lambda m: m, "compile": torch.compile, "data parallel": nn.DataParallel}[wrapper]
    actual = rates(build_optimizer(wrap(model), "adamw", lr=1.0, overrides=overrides))
    assert [lr for n, lr in actual.items() if n.endswith("embed.weight")] == [0.5**4]
    assert [lr for n, lr in actual.items() if n.endswith("out.weight")] == [1.0]
    for i in range(3):
        assert {lr for n, lr in actual.items() if f"stack.{i}." in n} == {0.5 ** (3 - i)}
    model.stack[1].requires_grad_(False)
    build_optimizer(model, "adamw", lr=1.0, overrides=layerwise_decay(model, 0.5))
    with pytest.raises(ValueError, match="Linear has no ModuleList"):
        layerwise_decay(nn.Linear(3, 3), 0.5)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "warmup_stable_decay", "inverse_sqrt", "plateau"])
def test_a_learning_rate_factor_survives_schedulers(schedule: str) -> None:
    overrides: Any = [("out.weight", None, {"lr_factor": 0.1}), ("embedding", "lion", {"lr": 3.0, "lr_factor": 2.0})]
    optimizer = build_optimizer(Layered(), "adamw", lr=1.0, rest_lr=7.0, overrides=overrides)
    actual = rates(optimizer)
    assert (actual["out.weight"], actual["embed.weight"]) == (0.1, 6.0)
    scheduler: Any = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0)
    if schedule != "plateau":
        extra: Any = {"num_decay_steps": 3} if schedule == "warmup_stable_decay" else None
        scheduler = get_scheduler(schedule, optimizer, 2, 8, scheduler_specific_kwargs=extra)
    seen = set()
    for _ in range(7):
        optimizer.step()
        scheduler.step(*[1.0] * (schedule == "plateau"))
        now = rates(optimizer)
        seen.add(now["out.weight"])
        for n, start in actual.items():
            assert now[n] == pytest.approx(start * now["stack.0.a[0].weight"])
    assert len(seen) > 2


def test_a_factor_keeps_a_tensor_learning_rate_one_tensor() -> None:
    lr: Any = torch.tensor(0.5)
    optimizer = build_optimizer(Layered(), "adamw", lr=lr, overrides=[("head", None, {"lr_factor": 0.5})])
    assert {float(x) for x in rates(optimizer).values()} == {0.5, 0.25}
    with pytest.raises(ValueError, match="lr_factor must be a finite number >= 0, got -1"):
        build_optimizer(Layered(), "adamw", lr=1.0, overrides=[("head", None, {"lr_factor": -1.0})])


def test_a_learning_rate_per_rms_of_the_weights() -> None:
    model = Layered()
    with torch.no_grad():
        model.embed.weight.copy_(torch.randn(model.embed.weight.shape) * 0.02)
    overrides: Any = [("embedding", None, {"lr_per_rms": 0.3, "lr_factor": 2.0})]
    actual = rates(build_optimizer(model, "adamw", lr=1.0, overrides=overrides))
    rms = float(model.embed.weight.detach().double().square().mean().sqrt())
    assert actual["embed.weight"] == pytest.approx(0.6 * rms, rel=1e-6)
    assert {lr for name, lr in actual.items() if name != "embed.weight"} == {1.0}
    with torch.no_grad():
        model.embed.weight.zero_()
    assert rates(build_optimizer(model, "adamw", lr=1.0, overrides=overrides))["embed.weight"] == 0.6
    assert rates(build_optimizer(model.to("meta"), "adamw", lr=1.0, overrides=overrides))["embed.weight"] == 0.6
    with pytest.raises(ValueError, match="lr_per_rms must be a finite number >= 0, got -1"):
        build_optimizer(Layered(), "adamw", lr=1.0, overrides=[("head", None, {"lr_per_rms": -1.0})])


def test_lora_plus() -> None:
    base = nn.Sequential(nn.Linear(8, 8))
    model = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=["0"]))  # pyright: ignore[reportArgumentType]
    actual = rates(build_optimizer(model, "muon", lr=1e-3, overrides=lora_plus(16)))
    assert {n.split(".")[-3]: lr for n, lr in actual.items()} == {"lora_A": 1e-3, "lora_B": pytest.approx(16e-3)}
    with pytest.raises(ValueError, match="'lora_b' applies to .*no parameter has this role here; the"):
        build_optimizer(nn.Linear(8, 8), "muon", lr=1e-3, overrides=lora_plus(16))


def test_every_parameter_has_one_owner() -> None:
    overrides: Any = [("stack.0.*", "lion"), ("*", None, {"lr": 2.0}), ("head", "sgd")]
    with pytest.raises(ValueError, match="override 'head' applies to no parameter: earlier overrides have taken"):
        build_optimizer(Layered(), "muon", lr=1.0, overrides=overrides)
    model = Layered()
    optimizer = build_optimizer(model, "muon", lr=1.0, overrides=overrides[:2])
    owned = [id(p) for g in optimizer.param_groups for p in g["params"]]
    assert sorted(owned) == sorted(id(p) for p in model.parameters())
