"""The role table of real architectures, tiny and random, with and without adapters and wrappers."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from lightning_optim import Muon, build_optimizer, plan, roles
from lightning_optim.core.rule import REGISTRY
from tests.rules import gradient

LLAMA: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
    "max_position_embeddings": 32,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
BERT: dict[str, Any] = {
    k: LLAMA[k] for k in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
}
SEPARATE = {f"self_attn.{x}_proj": "hidden" for x in "qkvo"}
MLP = {f"mlp.{x}_proj": "hidden" for x in ("gate", "up", "down")}
ENDS = {"embed_tokens": "embedding", "lm_head": "head"}

MODELS: dict[str, tuple[Any, Any, dict[str, str]]] = {
    "llama": (hf.LlamaForCausalLM, hf.LlamaConfig(**LLAMA), SEPARATE | MLP | ENDS),
    "qwen3": (hf.Qwen3ForCausalLM, hf.Qwen3Config(**LLAMA, head_dim=8), SEPARATE | MLP | ENDS),
    "mistral": (hf.MistralForCausalLM, hf.MistralConfig(**LLAMA), SEPARATE | MLP | ENDS),
    "gemma": (hf.GemmaForCausalLM, hf.GemmaConfig(**LLAMA, head_dim=4), SEPARATE | MLP | {"embed_tokens": "embedding"}),
    "gpt2": (
        hf.GPT2LMHeadModel,
        hf.GPT2Config(n_embd=16, n_layer=2, n_head=4, vocab_size=50, n_positions=32, bos_token_id=1, eos_token_id=2),
        {
            "wte": "embedding",
            "wpe": "embedding",
            "attn.c_attn": "qkv",
            "attn.c_proj": "hidden",
            "mlp.c_fc": "hidden",
            "mlp.c_proj": "hidden",
        },
    ),
    "mixtral": (
        hf.MixtralForCausalLM,
        hf.MixtralConfig(**LLAMA, num_local_experts=4),
        SEPARATE | ENDS | {"experts.gate_up_proj": "experts", "experts.down_proj": "experts", "mlp.gate": "router"},
    ),
    "gpt_oss": (
        hf.GptOssForCausalLM,
        hf.GptOssConfig(
            **LLAMA, num_local_experts=4, head_dim=4, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
        ),
        SEPARATE
        | ENDS
        | {
            "experts.gate_up_proj": "experts",
            "experts.down_proj": "experts",
            "experts.gate_up_proj_bias": "vector",
            "experts.down_proj_bias": "vector",
            "mlp.router": "router",
        },
    ),
    "phi3": (
        hf.Phi3ForCausalLM,
        hf.Phi3Config(**LLAMA),
        ENDS | {"qkv_proj": "qkv", "o_proj": "hidden", "gate_up_proj": "gate_up", "down_proj": "hidden"},
    ),
    "gpt_neox": (
        hf.GPTNeoXForCausalLM,
        hf.GPTNeoXConfig(**{k: v for k, v in LLAMA.items() if k != "num_key_value_heads"}),
        {
            "embed_in": "embedding",
            "query_key_value": "qkv",
            "attention.dense": "hidden",
            "dense_h_to_4h": "hidden",
            "dense_4h_to_h": "hidden",
            "lm_head": "head",
        },
    ),
    "mamba": (
        hf.MambaForCausalLM,
        hf.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=2, vocab_size=50, time_step_rank=2),
        {
            "embeddings": "embedding",
            "A_log": "other",
            "conv1d": "conv",
            "in_proj": "hidden",
            "x_proj": "hidden",
            "dt_proj": "hidden",
            "out_proj": "hidden",
        },
    ),
    "bert": (
        hf.BertForSequenceClassification,
        hf.BertConfig(**BERT, vocab_size=50),
        {
            "word_embeddings": "embedding",
            "position_embeddings": "embedding",
            "token_type_embeddings": "embedding",
            "self.query": "hidden",
            "self.key": "hidden",
            "self.value": "hidden",
            "output.dense": "hidden",
            "intermediate.dense": "hidden",
            "pooler.dense": "hidden",
            "classifier": "head",
        },
    ),
    "t5": (
        hf.T5ForConditionalGeneration,
        hf.T5Config(d_model=16, d_ff=32, num_layers=2, num_heads=4, d_kv=4, vocab_size=50),
        {
            "shared": "embedding",
            "relative_attention_bias": "embedding",
            "Attention.q": "hidden",
            "Attention.k": "hidden",
            "Attention.v": "hidden",
            "Attention.o": "hidden",
            "DenseReluDense.wi": "hidden",
            "DenseReluDense.wo": "hidden",
        },
    ),
    "vit": (
        hf.ViTForImageClassification,
        hf.ViTConfig(**BERT, image_size=8, patch_size=4),
        {
            "cls_token": "other",
            "position_embeddings": "other",
            "patch_embeddings.projection": "conv",
            "attention.q_proj": "hidden",
            "attention.k_proj": "hidden",
            "attention.v_proj": "hidden",
            "attention.o_proj": "hidden",
            "mlp.fc1": "hidden",
            "mlp.fc2": "hidden",
            "classifier": "head",
        },
    ),
}
pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated"),  # peft asks transformers
    pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated"),  # torch.compile's own imports
]
every_model = pytest.mark.parametrize("name", MODELS)


def built(name: str) -> nn.Module:
    cls, config, _ = MODELS[name]
    with torch.device("meta"):
        return cls(config)


def expected_role(name: str, parameter: str, p: torch.Tensor) -> str:
    if p.ndim < 2:
        return "vector"
    bare = parameter.removesuffix(".weight")
    matches = {role for end, role in MODELS[name][2].items() if bare.endswith(end)}
    assert len(matches) == 1, f"{parameter}: {matches}"
    return matches.pop()


@every_model
@pytest.mark.parametrize("wrapper", ["none", "compile"])
def test_role_table(name: str, wrapper: str) -> None:
    model = built(name)
    wrapped = torch.compile(model) if wrapper == "compile" else model
    found = roles(wrapped)  # pyright: ignore[reportArgumentType]
    prefix = "_orig_mod." * (wrapper == "compile")
    assert len(found) == len(list(model.parameters()))
    for parameter, p in model.named_parameters():
        assert found[prefix + parameter].role == expected_role(name, parameter, p), parameter


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_neox"])
@pytest.mark.parametrize("dora", [False, True])
def test_role_table_with_adapters(name: str, dora: bool) -> None:
    cls, config, _ = MODELS[name]
    targets = {"gpt2": ["c_attn", "c_fc"], "gpt_neox": ["query_key_value", "dense_h_to_4h"]}
    tied = name == "gpt2"
    settings = peft.LoraConfig(
        r=2,
        target_modules=targets.get(name, ["q_proj", "v_proj"]),
        use_dora=dora,
        modules_to_save=None if tied else ["lm_head"],
        fan_in_fan_out=name == "gpt2",
    )
    model = peft.get_peft_model(cls(config), settings)
    found = roles(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(found)
    for parameter, trait in found.items():
        if "lora_A" in parameter or "lora_B" in parameter:
            assert trait.role == ("lora_a" if "lora_A" in parameter else "lora_b"), parameter
        elif "lora_magnitude_vector" in parameter:
            assert trait.role == "vector"
        else:
            assert trait.role == "head" and "modules_to_save" in parameter, parameter
    seen = {trait.role for trait in found.values()}
    assert seen == {"lora_a", "lora_b"} | ({"vector"} if dora else set()) | (set() if tied else {"head"})


def test_embedding_adapters() -> None:
    cls, config, _ = MODELS["llama"]
    model = peft.get_peft_model(cls(config), peft.LoraConfig(r=2, target_modules=["embed_tokens", "q_proj"]))
    assert {t.role for n, t in roles(model).items() if "lora_embedding" in n} == {"lora_embedding"}


def test_storage_of_fused_and_transposed_layers() -> None:
    gpt2, mixtral, oss, phi = (roles(built(n)) for n in ("gpt2", "mixtral", "gpt_oss", "phi3"))
    attention = gpt2["transformer.h.0.attn.c_attn.weight"]
    assert (attention.transposed, attention.blocks) == (True, 3)
    assert (gpt2["transformer.h.0.mlp.c_fc.weight"].transposed, gpt2["transformer.h.0.mlp.c_fc.weight"].blocks) == (
        True,
        None,
    )
    experts = "model.layers.0.mlp.experts."
    assert (mixtral[experts + "gate_up_proj"].transposed, mixtral[experts + "gate_up_proj"].blocks) == (False, 2)
    assert mixtral[experts + "down_proj"].blocks is None
    assert oss[experts + "gate_up_proj"].transposed and oss[experts + "gate_up_proj"].blocks == (1, 1)  # interleaved
    assert phi["model.layers.0.mlp.gate_up_proj.weight"].blocks == 2


@pytest.mark.parametrize("name", ["muon", "soap", "adafactor", "adam_mini", "lion"])
def test_a_transposed_matrix_moves_as_the_other_does(name: str) -> None:
    """Conv1D and nn.Linear hold one matrix; native scales depend on which side is the output."""
    made = torch.Generator().manual_seed(0)
    linear, conv = nn.Linear(4, 12, bias=False), hf.pytorch_utils.Conv1D(12, 4)
    conv.bias.requires_grad_(False)
    with torch.no_grad():
        linear.weight.copy_(torch.randn(12, 4, generator=made))
        conv.weight.copy_(linear.weight.mT)
    a, b = (build_optimizer(m, name, lr=0.01, lr_convention="native", weight_decay=0.1) for m in (linear, conv))
    for t in range(1, 6):
        linear.weight.grad = gradient(linear.weight, "w", t)
        conv.weight.grad = linear.weight.grad.mT.contiguous()
        a.step()
        b.step()
        saved = b.state_dict()
        b.load_state_dict(saved)
    torch.testing.assert_close(conv.weight.mT, linear.weight, rtol=1e-5, atol=1e-6)


def test_gpt2_attention_is_three_matrices() -> None:
    """Muon on the fused layer moves query, key and value as three layers of their own would."""
    cls, config, _ = MODELS["gpt2"]
    torch.manual_seed(0)
    model = cls(config)
    p = model.transformer.h[0].attn.c_attn.weight
    parts = [nn.Parameter(x.detach().mT.clone()) for x in p.split(16, dim=1)]
    fused = build_optimizer(model, "muon", lr=0.01)
    alone = Muon(parts, lr=0.01, lr_convention="adamw")
    for t in range(1, 4):
        p.grad = gradient(p, "qkv", t)
        for x, g in zip(parts, p.grad.split(16, dim=1), strict=True):
            x.grad = g.mT.contiguous()
        fused.step()
        alone.step()
    torch.testing.assert_close(p.detach(), torch.cat([x.detach().mT for x in parts], dim=1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("optim", sorted(REGISTRY))
@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral"])
def test_predicted_bytes_are_measured_bytes(name: str, optim: str) -> None:
    cls, config, _ = MODELS[name]
    predicted = plan(built(name), optim)
    model = cls(config)
    optimizer = build_optimizer(model, optim, lr=1e-3)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
        p.grad += 1e-3
    optimizer.step()
    measured = sum(t.nbytes for s in optimizer.state.values() for t in s.values())
    assert predicted.state_bytes == measured
    assert predicted.parameters == sum(p.numel() for p in model.parameters())
    assert sum(predicted.shares().values()) == pytest.approx(1)


def test_plan_of_a_large_model_takes_no_memory_and_little_time() -> None:
    start = time.perf_counter()
    with torch.device("meta"):
        model = hf.MixtralForCausalLM(hf.MixtralConfig())
    text = str(plan(model, "muon"))
    assert time.perf_counter() - start < 10
    assert "(32 times) | 8 x 28672 x 4096 | experts | muon |" in text
    assert "46,702,792,704 trainable weights: muon 99.4%" in text


def test_last_layer() -> None:
    owners = {r.role: r.rule for r in plan(built("llama"), "muon", last_layer="rule").rows}
    assert owners["head"] == "muon" and owners["embedding"] == "adamw"
    assert {r.role: r.rule for r in plan(built("llama"), "muon").rows}["head"] == "adamw"


def test_plan_command(tmp_path: Path) -> None:
    MODELS["llama"][1].save_pretrained(tmp_path)
    command = (sys.executable, "-m", "lightning_optim", "plan", "--model", str(tmp_path), "--optim", "soap")
    out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "| model.layers.*.mlp.down_proj.weight (2 times) | 16 x 24 | hidden | soap | exp_avg 1.5 KiB" in out
    assert "B per weight" in out
