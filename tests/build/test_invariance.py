"""The assignment does not depend on what wraps or shards a model, or on a resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from lightning_optim import assign, build_optimizer
from lightning_optim.build import measurement
from tests.helpers.tiny_models import tiny

NAMES = [
    "LlamaForCausalLM",
    "Qwen3MoeForCausalLM",
    "GptOssForCausalLM",
    "Phi3ForCausalLM",
    "GPT2LMHeadModel",
    "GPTNeoXForCausalLM",
    "FalconForCausalLM",
    "BertForSequenceClassification",
    "BartForSequenceClassification",
    "ViTForImageClassification",
]
pytestmark = pytest.mark.filterwarnings("ignore")  # of the models, peft and torch.compile


@pytest.fixture(scope="module", autouse=True)
def one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("ranks") / "store"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def assignment(model: nn.Module) -> dict[str, Any]:
    """What every parameter is and how muon would get it, by its name without wrappers, measured again."""
    measurement._KNOWN.clear()
    out = {}
    for a in assign(model, "muon", "adamw"):
        name = a.name
        for prefix in ("module.", "_orig_mod.", "base_model.model.", "base_layer."):
            name = name.replace(prefix, "")
        out[name] = a.rule, a.role, a.blocks, a.transposed, a.trait.source
    return out


def wrapped(model: Any, how: str) -> Any:
    if how == "sharded":
        for layer in next(m for m in model.modules() if isinstance(m, nn.ModuleList)):
            fully_shard(layer)
        return fully_shard(model)
    if how == "adapted":
        linear = "c_fc|fc1|dense|o_proj|q_proj"
        adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=rf".*\.({linear})"))
        for name, p in adapted.named_parameters():
            p.requires_grad_("lora_" not in name)
        return adapted
    return torch.compile(model) if how == "compiled" else DistributedDataParallel(model)


@pytest.mark.parametrize("name", NAMES)
def test_wrappers_do_not_matter(name: str) -> None:
    expected = assignment(tiny(name))
    assert {x[-1] for x in expected.values()} >= {"measured"}
    for how in ("replicated", "compiled", "adapted", "sharded"):
        assert assignment(wrapped(tiny(name), how)) == expected, how


@pytest.mark.parametrize("name", NAMES)
def test_a_resume_has_the_same_assignment(name: str) -> None:
    model = tiny(name)
    optimizer = build_optimizer(model, "muon", lr=1e-3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    measurement._KNOWN.clear()
    again = build_optimizer(tiny(name), "muon", lr=1e-3)
    again.load_state_dict(optimizer.state_dict())
    keys = ("name", "rule", "role", "blocks", "transposed", "param_names", "role_sources")
    groups = [[{k: g[k] for k in keys} for g in o.param_groups] for o in (optimizer, again)]
    assert groups[0] == groups[1]
