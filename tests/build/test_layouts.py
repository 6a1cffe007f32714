"""Layouts by class name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_optim import register_layout, roles
from lightning_optim.build.layouts import LAYOUTS
from tests.build.test_dataflow import Layers
from tests.build.test_roles import FUSED


@pytest.fixture(autouse=True)
def snapshot(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_optim.build.layouts.LAYOUTS", dict(LAYOUTS))


class CausalSelfAttention(nn.Module):
    """nanoGPT's."""

    def __init__(self) -> None:
        super().__init__()
        self.c_attn, self.c_proj, self.n_head = nn.Linear(16, 48), nn.Linear(16, 16), 4


class Derived(CausalSelfAttention):
    """Another name."""


def test_a_class_is_found_by_the_names_of_its_bases() -> None:
    for kind in (CausalSelfAttention, Derived):
        trait = roles(nn.Sequential(kind()))["0.c_attn.weight"]
        assert (trait.role, trait.blocks, trait.heads, trait.source) == ("qkv", 3, 12, "registry")


def test_a_users_layout_goes_before_what_is_measured() -> None:
    register_layout("Layers.turned", role="hidden", transposed=False)
    register_layout("Layers.qkv", blocks=(12, 6, 6))
    actual = roles(Layers(), torch.arange(6)[None])
    assert (actual["turned"].role, actual["turned"].transposed, actual["turned"].blocks) == ("hidden", False, None)
    assert (actual["qkv"].role, actual["qkv"].blocks, actual["qkv"].source) == ("qkv", (12, 6, 6), "registry")


def test_what_is_measured_goes_before_the_packages_own() -> None:
    config = hf.GPT2Config(n_embd=16, n_layer=1, n_head=4, vocab_size=50, bos_token_id=1, eos_token_id=2)
    with torch.device("meta"):
        trait = roles(hf.GPT2Model(config))["h.0.attn.c_attn.weight"]
    assert (trait.blocks, trait.source) == (3, "measured")


@pytest.mark.filterwarnings("ignore")  # of the models themselves
@pytest.mark.parametrize("name", [x for x in FUSED if not x.startswith("bigcode_")])
def test_the_packages_own_layouts_are_those_of_the_values(name: str) -> None:
    """An attention module alone cannot be run; `test_fused_layers_are_cut_into_query_key_and_value` has the values."""
    cls, config, blocks = FUSED[name]
    with torch.device("meta"):
        model = cls(config)
    (label,) = [n for n, t in roles(model).items() if t.role == "qkv"]
    attention, path = model.get_submodule(label.rsplit(".", 2)[0]), label.rsplit(".", 2)[1]
    trait = roles(nn.ModuleList([attention]))[f"0.{path}.weight"]
    assert (trait.role, trait.blocks, trait.source) == ("qkv", blocks, "registry")


@pytest.mark.parametrize(
    ("key", "settings", "message"),
    [
        ("c_attn", {}, "Class.path"),
        ("A.b", {"role": "heads"}, "unknown role"),
        ("A.b", {"blocks": 0}, "blocks must be"),
        ("A.b", {"blocks": "together"}, "blocks must be"),
    ],
)
def test_mistakes_are_named(key: str, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        register_layout(key, **settings)
