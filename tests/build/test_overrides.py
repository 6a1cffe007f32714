"""What the user says of parameters."""

from __future__ import annotations

import ast
from typing import Any, cast

import pytest
import torch
from torch import nn

from lightning_optim import assign, build_optimizer
from lightning_optim.build.overrides import checked, matches, why_unmatched
from lightning_optim.build.param_role import ParamRole
from tests.build.test_dataflow import Layers


def test_patterns_match_names_roles_and_kinds() -> None:
    assert matches("*.q.*", "module.a.q.weight", "hidden") and matches("a.q.*", "module.a.q.weight", "hidden")
    assert matches("head", "x", "head") and matches("bias", "x", "vector", "bias") and not matches("x.*", "x", "head")
    with pytest.raises(ValueError, match="an override is"):
        checked(("a", "muon", {}, 1))  # pyright: ignore[reportArgumentType]


def test_an_override_says_what_a_parameter_is() -> None:
    overrides: Any = [
        ("turned", None, {"role": "gate_up", "blocks": 2, "transposed": True}),
        ("back", None, {"role": "head"}),
    ]
    owners = {a.name: a for a in assign(Layers(), "muon", "adamw", overrides)}
    turned, back = owners["turned"], owners["back"]
    assert (turned.rule, turned.blocks, turned.transposed, turned.trait.source) == ("muon", 2, True, "user")
    assert (back.rule, back.role, owners["down"].rule) == ("adamw", "head", "adamw")
    with pytest.raises(ValueError, match="turned: role: unknown value 'gate'"):
        assign(Layers(), "muon", "adamw", [("turned", None, {"role": "gate"})])


def test_sources_are_in_the_checkpoint() -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    optimizer = build_optimizer(model, "muon", lr=0.1, example_inputs=torch.ones(1, 4))
    saved: dict[str, str] = {}
    for group in optimizer.state_dict()["param_groups"]:
        saved |= dict(zip(group["param_names"], group["role_sources"], strict=True))
    assert (saved["0.weight"], saved["1.weight"], saved["0.bias"]) == ("measured", "measured", "structure")


def test_a_resume_with_other_roles_is_refused_with_the_override_that_mends_it() -> None:
    model = Layers()
    saved = build_optimizer(model, "muon", lr=0.1, example_inputs=torch.arange(6)[None])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    saved.step()
    state = saved.state_dict()
    unmeasured = build_optimizer(model, "muon", lr=0.1, overrides=[("experts", "muon")])
    with pytest.raises(
        ValueError, match=r"back \(and 4 others\): the checkpoint has it under muon.*under adamw"
    ) as error:
        unmeasured.load_state_dict(state)
    assert not unmeasured.state
    overrides = ast.literal_eval(str(error.value).partition("overrides=")[2])
    assert ("qkv", "muon", {"role": "qkv", "blocks": 3, "transposed": False}) in overrides
    build_optimizer(Layers(), "muon", lr=0.1, example_inputs=torch.arange(6)[None]).load_state_dict(state)
    groups = build_optimizer(Layers(), "muon", lr=0.1, overrides=overrides).param_groups
    owners, expected = (
        {n: (g["rule"], g["blocks"], g["transposed"]) for g in of for n in g["param_names"]}
        for of in (groups, saved.param_groups)
    )
    assert owners == expected


def test_an_override_that_applies_to_nothing_says_why() -> None:
    tied = nn.ModuleDict({"embed": nn.Embedding(8, 4), "layer": nn.Linear(4, 4), "out": nn.Linear(4, 8, bias=False)})
    cast("Any", tied["out"]).weight = tied["embed"].weight
    tied["layer"].weight.requires_grad_(False)
    roles = {name: ParamRole("embedding", "") for name, p in tied.named_parameters() if p.requires_grad}
    assert "shares the weights of another" in why_unmatched("head", roles, tied)
    assert why_unmatched("router", roles, tied) == "no parameter has this role here; the roles are embedding"
    assert why_unmatched("layer.weight", roles, tied) == "what it matches is frozen"
    assert why_unmatched("embed.*", roles, tied).startswith("earlier overrides have taken everything it matches")
    assert why_unmatched("embed.weigt", roles, tied).startswith("did you mean 'embed.weight'")
