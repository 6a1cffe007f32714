"""Roles out of a forward pass, of classes of which nothing is known."""

from __future__ import annotations

import torch
import transformers as hf

from lightning_optim import assign, roles
from tests.build.test_dataflow import Layers


def test_plain_parameters() -> None:
    model = Layers(2)
    actual = roles(model, torch.arange(6)[None])
    assert {n: t.role for n, t in actual.items() if not n.startswith("heads")} == {
        "table": "embedding",
        "qkv": "qkv",
        "back": "hidden",
        "turned": "gate_up",
        "down": "hidden",
        "route": "router",
        "experts": "experts",
        "shift": "other",
    }
    assert {t.source for n, t in actual.items() if t.role not in ("vector", "other")} == {"measured"}
    assert (actual["qkv"].blocks, actual["qkv"].heads) == (3, 3)
    assert (actual["turned"].blocks, actual["turned"].transposed) == (2, True)
    assert {t.role for n, t in actual.items() if n.startswith("heads") and n.endswith("weight")} == {"head"}
    assert {t.role for t in roles(model).values()} == {"other", "vector", "head"}


def test_matrices_of_experts_in_one_parameter() -> None:
    """DBRX keeps all experts in one matrix, the last ones inputs x outputs."""
    ffn = {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2}
    attention = {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4}
    config = hf.DbrxConfig(
        d_model=16, n_heads=4, n_layers=1, vocab_size=50, attn_config=attention, ffn_config=ffn, pad_token_id=None
    )
    with torch.device("meta"):
        model = hf.DbrxForCausalLM(config)
    actual = {n.rsplit(".", 1)[1]: t for n, t in roles(model).items() if "experts" in n}
    assert {n: (t.role, t.blocks, t.transposed) for n, t in actual.items()} == {
        "w1": ("experts", 4, False),
        "v1": ("experts", 4, False),
        "w2": ("experts", -4, True),
    }
    owners = {a.name.rsplit(".", 1)[1]: a for a in assign(model, "muon", "adamw") if "experts" in a.name}
    assert {a.rule for a in owners.values()} == {"muon"} and owners["w2"].group.endswith(
        "transposed/4 blocks of columns"
    )
