"""Blocks of weights are views that cover what they should once."""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from lightning_optim import roles
from lightning_optim.build.partition import VIEWS_BY_KIND, ModelBlock, PartitionKind, partition

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")  # PEFT asks Transformers for it
SIZES: dict[str, Any] = {"vocab_size": 11, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False}


def gpt2() -> nn.Module:
    """Layers are stored inputs x outputs, queries, keys and values are fused."""
    small: dict[str, Any] = {"n_embd": 8, "n_layer": 1, "n_head": 2, "vocab_size": 11, "n_positions": 6, "n_inner": 12}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**small, bos_token_id=0, eos_token_id=0))


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, **HEADS))


def mixtral() -> nn.Module:
    return hf.MixtralForCausalLM(hf.MixtralConfig(**SIZES, **HEADS, num_local_experts=3))


def lora() -> nn.Module:
    return peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj", "down_proj"]))  # pyright: ignore


MODELS = {"gpt2": gpt2, "llama": llama, "mixtral": mixtral, "lora": lora}


def divided(model: nn.Module, kind: PartitionKind, *patterns: str) -> tuple[dict[str, Tensor], list[ModelBlock]]:
    params: dict[str, Tensor] = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return params, partition(params, roles(model), kind, patterns or ("*",))


def names(model: nn.Module, kind: PartitionKind, *patterns: str) -> list[str]:
    return [block.name for block in divided(model, kind, *patterns)[1]]


@pytest.mark.parametrize("kind", VIEWS_BY_KIND)
@pytest.mark.parametrize("model", MODELS)
def test_no_weight_is_in_two_blocks(model: str, kind: PartitionKind) -> None:
    params, blocks = divided(MODELS[model](), kind)
    marks = {name: torch.zeros(p.shape) for name, p in params.items()}
    for block in blocks:
        for part in block.views:
            part.view(marks[part.param]).add_(1)  # a copy would leave no mark
    assert max(float(mark.max()) for mark in marks.values()) <= 1
    covered, every = sum(float(mark.sum()) for mark in marks.values()), sum(p.numel() for p in params.values())
    matrices = sum(p.numel() for p in params.values() if p.ndim > 1)
    assert covered == {"layer": every, "matrix": matrices}.get(kind, covered) and covered <= every
    assert len({block.name for block in blocks}) == len(blocks)


def test_a_neuron_is_an_output_however_it_is_stored() -> None:
    params, blocks = divided(gpt2(), "neuron", "*c_fc*")
    name = "transformer.h.0.mlp.c_fc.weight"
    assert params[name].shape == (8, 12) and [b.name for b in blocks] == [f"{name}[{i}]" for i in range(12)]
    assert torch.equal(blocks[3].views[0].view(params[name]), params[name][:, 3])


def test_fused_layers_are_cut_into_matrices_and_heads() -> None:
    fused = "transformer.h.0.attn.c_attn.weight"
    params, thirds = divided(gpt2(), "matrix", "*c_attn*")
    assert torch.equal(thirds[1].views[0].view(params[fused]), params[fused][:, 8:16].T)
    params, heads = divided(gpt2(), "head")
    assert len(heads) == 6 and torch.equal(heads[5].views[0].view(params[fused]), params[fused][:, 20:24].T)
    queries = "model.layers.0.self_attn.{}_proj.weight"
    found = names(llama(), "head")
    assert [sum(queries.format(x) in name for name in found) for x in "qkv"] == [4, 2, 2]


def test_an_expert_has_all_its_matrices() -> None:
    params, blocks = divided(mixtral(), "expert")
    assert [b.name for b in blocks] == [f"model.layers.0.mlp.experts[{i}]" for i in range(3)]
    assert [part.param.rpartition(".")[2] for part in blocks[2].views] == ["gate_up_proj", "down_proj"]
    assert torch.equal(blocks[2].views[1].view(params[blocks[2].views[1].param]), params[blocks[2].views[1].param][2])
    gates = names(mixtral(), "matrix", "*gate_up*")
    assert len(gates) == 6, "gate and up of three experts"


def test_tokens_and_layers() -> None:
    assert len(names(llama(), "token")) == 22 and "model.embed_tokens.weight[10]" in names(llama(), "token")
    assert names(llama(), "layer") == ["model.embed_tokens", "model.layers.0", "model.norm", "lm_head"]
    assert not names(llama(), "expert")
