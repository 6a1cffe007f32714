"""The role table of real architectures, tiny and random, with and without adapters and wrappers."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn

from lightning_optim import Muon, build_optimizer, lora_plus, plan, roles
from lightning_optim.__main__ import print_plan
from lightning_optim.core import matrix_views
from lightning_optim.core.rule import REGISTRY
from lightning_optim.optimizers import CLASSES
from tests.helpers.rules import gradient

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
            "embed_out": "head",  # its name in Transformers 5.2
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
            "cls_token": "vector",  # one row
            "position_embeddings": "other",
            "patch_embeddings.projection": "conv",
            "attention.q_proj": "hidden",
            "attention.k_proj": "hidden",
            "attention.v_proj": "hidden",
            "attention.o_proj": "hidden",
            "mlp.fc1": "hidden",
            "mlp.fc2": "hidden",
            **dict.fromkeys(("attention.query", "attention.key", "attention.value"), "hidden"),  # in Transformers 5.2
            **dict.fromkeys(("output.dense", "intermediate.dense"), "hidden"),
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
    actual = roles(wrapped)  # pyright: ignore[reportArgumentType]
    prefix = "_orig_mod." * (wrapper == "compile")
    assert len(actual) == len(list(model.parameters()))
    for parameter, p in model.named_parameters():
        assert actual[prefix + parameter].role == expected_role(name, parameter, p), parameter


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
        modules_to_save=None if tied else ["lm_head", "embed_out"],
        fan_in_fan_out=name == "gpt2",
    )
    model = peft.get_peft_model(cls(config), settings)
    actual = roles(model)
    assert {n for n, p in model.named_parameters() if p.requires_grad} == set(actual)
    for parameter, trait in actual.items():
        if "lora_A" in parameter or "lora_B" in parameter:
            assert trait.role == ("lora_a" if "lora_A" in parameter else "lora_b"), parameter
        elif "lora_magnitude_vector" in parameter:
            assert trait.role == "vector"
        else:
            assert trait.role == "head" and "modules_to_save" in parameter, parameter
    seen = {trait.role for trait in actual.values()}
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


EXPERTS: dict[str, tuple[str, bool, Any]] = {  # module, whether stored inputs x outputs, gate and up
    "MixtralExperts": ("mixtral", False, 2),
    "Qwen3MoeExperts": ("qwen3_moe", False, 2),
    "DeepseekV3Experts": ("deepseek_v3", False, 2),
    "GraniteMoeExperts": ("granitemoe", False, 2),
    "PhimoeExperts": ("phimoe", False, 2),
    "GptOssExperts": ("gpt_oss", True, (1, 1)),
    "Llama4TextExperts": ("llama4", True, 2),
    "AriaExperts": ("aria", True, 2),
    "OpenAIPrivacyFilterExperts": ("openai_privacy_filter", True, 2),
    "DeepseekV4Experts": ("deepseek_v4", False, 2),
    "MiniMaxM3VLExperts": ("minimax_m3_vl", False, 2),
    "Step3p7Experts": ("step3p7", False, 2),
}


def experts(name: str, width: int, inner: int) -> nn.Module:
    """Two experts of a class of Transformers."""
    module = f"transformers.models.{EXPERTS[name][0]}.modeling_{EXPERTS[name][0]}"
    if find_spec(module.rpartition(".")[0]) is None or not hasattr(importlib.import_module(module), name):
        pytest.skip(f"this version of Transformers has no {name}")
    config = SimpleNamespace(
        **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 2),
        **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), inner),
        **dict.fromkeys(("hidden_act", "hidden_activation"), "silu"),
        hidden_size=width,
        swiglu_limit=7.0,
        swiglu_alpha=1.702,
        _experts_implementation="eager",
    )
    torch.manual_seed(0)
    made = getattr(importlib.import_module(module), name)(config)
    for label, p in made.named_parameters():
        nn.init.zeros_(p) if "bias" in label else nn.init.normal_(p)
    return made


@pytest.mark.parametrize("inner", [6, 4, 8])  # half as wide as the model, too, and as wide
@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_cut_into_gate_and_up(name: str, inner: int) -> None:
    """Told by what they do: without a gate nothing comes out."""
    made = experts(name, 8, inner)
    actual = roles(nn.Sequential(made))
    gate_up, down = actual["0.gate_up_proj"], actual["0.down_proj"]
    assert (gate_up.role, down.role, down.blocks) == ("experts", "experts", None)
    assert (gate_up.transposed, gate_up.blocks) == EXPERTS[name][1:] and down.transposed == gate_up.transposed
    tokens = torch.randn(2 if name == "Llama4TextExperts" else 4, 8)
    case = () if name == "Llama4TextExperts" else (torch.arange(4)[:, None] % 2, torch.ones(4, 1))
    with torch.no_grad():
        assert made(tokens, *case).any()
        p = made.get_parameter("gate_up_proj")
        for part in matrix_views.split_blocks(p.shape, gate_up.blocks, transposed=gate_up.transposed):
            view = part.view_of(p, gate_up.transposed)
            (view.unflatten(-2, (2, -1)).select(-3, 0) if part.rows is None else view.select(-4, 0)).zero_()
        assert not made(tokens, *case).any()


class Unknown(nn.Module):
    """Experts of a class that says nothing."""

    def __init__(self, *shapes: tuple[int, int], hidden_size: int | None = None) -> None:
        super().__init__()
        self.num_experts, self.hidden_size = 2, hidden_size
        for i, shape in enumerate(shapes):
            self.register_parameter(f"w{i}", nn.Parameter(torch.zeros(2, *shape)))


def test_experts_that_say_nothing() -> None:
    """Gate and up stay whole; the shapes tell how they are stored, of separate matrices beside the model's width."""
    cases: list[tuple[nn.Module, bool]] = [
        (Unknown((12, 8), (8, 6)), False),
        (Unknown((8, 12), (6, 8)), True),
        (Unknown((8, 8), (8, 4)), False),
        (Unknown((8, 8), (4, 8)), True),
        (Unknown((6, 8), (6, 8), (8, 6), hidden_size=8), False),
        (Unknown((8, 6), (8, 6), (6, 8), hidden_size=8), True),
        (Unknown((8, 6), (6, 8)), False),
        (Unknown((8, 8), (8, 8), hidden_size=8), False),
    ]
    for module, transposed in cases:
        actual = roles(nn.Sequential(module)).values()
        assert {(t.role, t.transposed, t.blocks) for t in actual} == {("experts", transposed, None)}
    routed = nn.Sequential(Unknown((8, 6), (6, 8)), nn.Linear(8, 2))
    assert roles(routed)["0.w0"].transposed and roles(routed)["1.weight"].role == "router"
    snapshot = Unknown((12, 8), (8, 6))
    snapshot.__dict__["_apply_gate"] = lambda gate_up, extra: gate_up  # cannot be asked
    assert roles(nn.Sequential(snapshot))["0.w0"].blocks is None


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            peft.AdaLoraConfig(init_r=4, target_modules=["q_proj"], total_step=10),
            {"lora_A": "lora_a", "lora_B": "lora_b", "lora_E": "vector"},
        ),
        (
            peft.LoHaConfig(r=4, target_modules=["q_proj"]),
            {"hada_w1_a": "lora_b", "hada_w1_b": "lora_a", "hada_w2_a": "lora_b", "hada_w2_b": "lora_a"},
        ),
        (peft.LoKrConfig(r=64, target_modules=["q_proj"]), {"lokr_w1": "hidden", "lokr_w2": "hidden"}),
        (
            peft.LoKrConfig(r=1, target_modules=["up_proj"]),
            {"lokr_w1": "hidden", "lokr_w2_a": "vector", "lokr_w2_b": "vector"},
        ),
        (
            peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
            {"ia3_l": "vector"},
        ),
        (
            peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[1, 2]),
            {"lora_A": "lora_a", "lora_B": "lora_b", "trainable_tokens_delta": "embedding"},
        ),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, peft.PeftConfig) else "",
)
def test_adapters_of_other_kinds(config: peft.PeftConfig, expected: dict[str, str]) -> None:
    cls, base, _ = MODELS["llama"]
    actual = roles(peft.get_peft_model(cls(base), config))
    kinds = {key for name in actual for key in name.split(".") if key in expected}
    assert kinds == set(expected)
    for name, trait in actual.items():
        assert {expected[key] for key in name.split(".") if key in expected} == {trait.role}, name


def test_flat_parameters_are_not_decayed() -> None:
    """Whatever holds them, and however many sides of length one they have."""
    cls, base, _ = MODELS["llama"]
    config = peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])
    model = nn.ModuleDict({"ia3": peft.get_peft_model(cls(base), config)})
    model.register_parameter("token", nn.Parameter(torch.ones(1, 1, 8)))
    model.register_parameter("table", nn.Parameter(torch.ones(1, 4, 8)))
    optimizer = build_optimizer(model, "adamw", lr=0.1, weight_decay=0.5)
    decay = {name: g["weight_decay"] for g in optimizer.param_groups for name in g["param_names"]}
    assert decay.pop("table") == 0.5 and len(decay) == 1 + 2 * 2 and set(decay.values()) == {0.0}


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


TINY: dict[str, Any] = {k: v for k, v in LLAMA.items() if k not in ("num_hidden_layers", "num_key_value_heads")}
FALCON = {k: v for k, v in TINY.items() if k not in ("intermediate_size", "max_position_embeddings")}
GPT2: dict[str, Any] = {"n_embd": 16, "n_layer": 1, "n_head": 4, "vocab_size": 50, "n_positions": 32}
FUSED: dict[str, tuple[Any, Any, Any]] = {
    "gpt2": (hf.GPT2Model, hf.GPT2Config(**GPT2), 3),
    "phi3": (hf.Phi3Model, hf.Phi3Config(**TINY, num_hidden_layers=1, num_key_value_heads=2), (16, 8, 8)),
    "mpt": (hf.MptModel, hf.MptConfig(d_model=16, n_layers=1, n_heads=4, vocab_size=50, max_seq_len=32), 3),
    "modernbert": (hf.ModernBertModel, hf.ModernBertConfig(**TINY, num_hidden_layers=1), 3),
    "gpt_neox": (hf.GPTNeoXModel, hf.GPTNeoXConfig(**TINY, num_hidden_layers=1), (4, 4, 4)),
    "bloom": (hf.BloomModel, hf.BloomConfig(hidden_size=16, n_layer=1, n_head=4, vocab_size=50), (4, 4, 4)),
    "persimmon": (hf.PersimmonModel, hf.PersimmonConfig(**TINY, num_hidden_layers=1), (4, 4, 4)),
    "falcon": (hf.FalconModel, hf.FalconConfig(**FALCON, num_hidden_layers=1, multi_query=True), (16, 4, 4)),
    "falcon_180b": (
        hf.FalconModel,
        hf.FalconConfig(**FALCON, num_hidden_layers=1, new_decoder_architecture=True, num_kv_heads=2),
        (8, 4, 4),
    ),
    "bigcode": (hf.GPTBigCodeModel, hf.GPTBigCodeConfig(**GPT2, multi_query=True), (16, 4, 4)),
    "bigcode_mha": (hf.GPTBigCodeModel, hf.GPTBigCodeConfig(**GPT2, multi_query=False), (4, 4, 4)),
}


@pytest.mark.filterwarnings("ignore")  # of the models themselves
@pytest.mark.parametrize("name", FUSED)
def test_fused_layers_are_cut_into_query_key_and_value(name: str) -> None:
    """Told by what they do: without values nothing reaches the output layer; without queries or keys, the mean does."""
    cls, config, blocks = FUSED[name]
    config._attn_implementation = "eager"
    torch.manual_seed(0)
    model = cls(config).eval()
    (label, trait), *others = [(n, t) for n, t in roles(model).items() if t.role == "qkv"]
    assert not others and trait.blocks == blocks
    p, parent = model.get_parameter(label), model.get_submodule(label.rsplit(".", 2)[0])
    heads = max(p.shape) if p.shape[0] == p.shape[1] else p.shape[1] if trait.transposed else p.shape[0]
    assert trait.heads == heads // 4
    out = next(m for m in parent.children() if getattr(m, "weight", p).shape != p.shape and m.weight.ndim == 2)
    seen: list[torch.Tensor] = []
    out.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().clone()))
    with torch.no_grad():
        for n, x in model.named_parameters():
            x.normal_() if n == label else x.zero_() if n.endswith("bias") else None
        snapshot, parts = p.clone(), matrix_views.split_blocks(p.shape, trait.blocks, transposed=trait.transposed)
        for without in (None, 0, 1, 2):
            p.copy_(snapshot)
            matrices = [m for part in parts for m in _matrices(part, p.detach(), trait.transposed)]
            assert len(matrices) == 3
            if without is not None:
                matrices[without].zero_()
            model(torch.arange(3, 9)[None])
    whole, queries, keys, values = seen
    assert not values.any()
    assert queries.any() and not torch.allclose(whole, queries)
    torch.testing.assert_close(queries, keys)


def _matrices(part: matrix_views.MatrixBlock, t: torch.Tensor, transposed: bool) -> list[torch.Tensor]:
    """Views of the matrices of a part."""
    view = part.view_of(t, transposed)
    return list(view.unflatten(-2, part.dims[:2]) if part.rows is None else view)


@pytest.mark.parametrize("optim", ["muon", "soap"])
@pytest.mark.parametrize("name", ["gpt2", "phi3", "gpt_neox", "falcon_180b"])
def test_fused_attention_moves_as_three_layers(name: str, optim: str) -> None:
    cls, config, _ = FUSED[name]
    torch.manual_seed(0)
    model = cls(config)
    (label, trait), *_ = [(n, t) for n, t in roles(model).items() if t.role == "qkv"]
    p = model.get_parameter(label)
    parts = matrix_views.split_blocks(p.shape, trait.blocks, transposed=trait.transposed)

    def split(t: torch.Tensor) -> list[torch.Tensor]:
        actual = [m for part in parts for m in _matrices(part, t, trait.transposed)]
        return [m.reshape(-1, p.shape[0] if trait.transposed else p.shape[1]).clone() for m in actual]

    alone = [nn.Parameter(x) for x in split(p.detach())]
    common: dict[str, Any] = {"lr": 0.01, "lr_convention": "adamw", "weight_decay": 0.0}
    # the default refreshes each parameter in another step; bfloat16 rounds by how a matrix lies in memory
    common |= {"refresh": "fixed:2"} if optim == "soap" else {"ns_dtype": "float32"}
    fused, separate = build_optimizer(model, optim, **common), CLASSES[optim](alone, **common)
    for t in range(1, 4):
        p.grad = gradient(p, "qkv", t)
        for x, g in zip(alone, split(p.grad), strict=True):
            x.grad = g
        fused.step()
        separate.step()
    for x, actual in zip(alone, split(p.detach()), strict=True):
        torch.testing.assert_close(actual, x.detach(), rtol=1e-5, atol=1e-6)


def test_a_state_space_layer_is_no_attention() -> None:
    with torch.device("meta"):
        config = hf.Mamba2Config(hidden_size=16, head_dim=4, num_heads=8, n_groups=1, state_size=4, num_hidden_layers=1)
        model = hf.Mamba2ForCausalLM(config)
    assert {t.role for n, t in roles(model).items() if "_proj" in n and t.role != "vector"} == {"hidden"}


@pytest.mark.parametrize(
    ("name", "heads"),
    [
        ("llama", {"q_proj": 4, "k_proj": 2, "v_proj": 2, "o_proj": None, "up_proj": None}),
        ("bert", {"query": 4, "key": 4, "value": 4, "output.dense": None}),
        ("t5", {"Attention.q": 4, "Attention.v": 4, "Attention.o": None}),
        ("vit", {"q_proj": 4, "k_proj": 4, "o_proj": None, "fc1": None}),
        ("gpt2", {"c_attn": 12, "c_fc": None}),
        ("phi3", {"qkv_proj": 8, "gate_up_proj": None}),
    ],
)
def test_attention_heads(name: str, heads: dict[str, int | None]) -> None:
    actual = roles(built(name))
    for end, count in heads.items():
        assert {t.heads for n, t in actual.items() if n.removesuffix(".weight").endswith(end)} == {count}, end


def test_heads_are_matrices_if_asked() -> None:
    cls, config, _ = MODELS["llama"]
    torch.manual_seed(0)
    model = cls(config)
    p = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    alone = [nn.Parameter(x.detach().clone()) for x in p.split(4)]
    by_head, separate = build_optimizer(model, "muon", lr=0.01, blocks="heads"), Muon(alone, lr_convention="adamw")
    for t in range(1, 4):
        p.grad = gradient(p, "q", t)
        for x, g in zip(alone, p.grad.split(4), strict=True):
            x.grad = g
        for group in separate.param_groups:
            group["lr"] = 0.01
        by_head.step()
        separate.step()
    torch.testing.assert_close(p.detach(), torch.cat([x.detach() for x in alone]), rtol=1e-5, atol=1e-6)
    groups = {g["name"]: g["blocks"] for g in by_head.param_groups if g["rule"] == "muon"}
    assert groups == {"muon/hidden": None, "muon/hidden/4 blocks": 4, "muon/hidden/2 blocks": 2}
    overrides: Any = [("*.[qk]_proj.weight", None, {"block": "matrix", "blocks": "heads"})]
    mini = build_optimizer(model, "adam_mini", lr=0.01, overrides=overrides)
    assert {g["blocks"] for g in mini.param_groups if g["block"] == "matrix"} == {2, 4}
    with pytest.raises(ValueError, match="blocks: unknown value 'head'.*'heads'"):
        build_optimizer(model, "muon", lr=0.01, blocks="head")  # pyright: ignore[reportArgumentType]


BART: dict[str, Any] = {
    f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 24))
}
BART |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "d_model": 16, "vocab_size": 50, "bos_token_id": 0}


def test_which_projection_gives_the_values() -> None:
    """By the names, where they say it: BART registers the queries last."""
    with torch.device("meta"):
        bart = hf.BartModel(hf.BartConfig(**BART, pad_token_id=1, eos_token_id=2, decoder_start_token_id=2))
    for model in (bart, built("llama"), built("bert"), built("t5"), built("vit")):
        values = ("v_proj", "value", "Attention.v")
        actual = {
            n.removesuffix(".weight"): t for n, t in roles(model).items() if t.heads is not None and t.blocks is None
        }
        assert any(name.endswith(values) for name in actual)
        for name, trait in actual.items():
            assert trait.by_head == (None if name.endswith(values) else trait.heads), name


def by_head(p: torch.Tensor, trait: Any, size: int) -> list[tuple[torch.Tensor, bool]]:
    """The matrices of a fused layer, and whether each is of queries or keys and cut into heads."""
    parts = matrix_views.split_blocks(p.shape, trait.blocks, transposed=trait.transposed)
    rows = [m for part in parts for m in _matrices(part, p, trait.transposed)]
    columns = p.shape[0] if trait.transposed else p.shape[1]
    return [(m.reshape(-1, columns).clone(), i < 2) for i, m in enumerate(rows)]


@pytest.mark.parametrize(
    "name", ["gpt2", "phi3", "modernbert", "gpt_neox", "falcon", "falcon_180b", "bigcode", "torch"]
)
def test_adam_mini_takes_queries_and_keys_of_fused_layers_by_head(name: str) -> None:
    """They move as in three layers, of which the third has one second moment per row."""
    torch.manual_seed(0)
    if name == "torch":
        model: nn.Module = nn.MultiheadAttention(16, 4)
    else:
        cls, config, _ = FUSED[name]
        model = cls(config)
    (label, trait), *_ = [(n, t) for n, t in roles(model).items() if t.role == "qkv"]
    p, fused = model.get_parameter(label), build_optimizer(model, "adam_mini", lr=0.01, weight_decay=0.1)
    alone = [(nn.Parameter(x), heads) for x, heads in by_head(p.detach(), trait, 4)]
    common: dict[str, Any] = {"lr": 0.01, "weight_decay": 0.1, "lr_convention": "adamw"}
    groups: list[dict[str, Any]] = [
        {"params": [x], "name": f"{i}", **({"block": "matrix", "blocks": len(x) // 4} if heads else {})}
        for i, (x, heads) in enumerate(alone)
    ]
    separate = CLASSES["adam_mini"](groups, **common)
    for t in range(1, 4):
        p.grad = gradient(p, "qkv", t)
        for (x, _), (g, _) in zip(alone, by_head(p.grad, trait, 4), strict=True):
            x.grad = g
        fused.step()
        separate.step()
        saved = fused.state_dict()
        fused.load_state_dict(saved)
    for (x, _), (actual, _) in zip(alone, by_head(p.detach(), trait, 4), strict=True):
        torch.testing.assert_close(actual, x.detach(), rtol=1e-5, atol=1e-6)
    count = sum(len(x) // (4 if heads else 1) for x, heads in alone)
    assert sum(s.numel() for k, s in fused.state[p].items() if k.startswith("exp_avg_sq")) == count


def second_moments(**settings: Any) -> dict[str, int]:
    """How many second moments Adam-mini keeps of the matrices of one layer."""
    cls, config, _ = MODELS["llama"]
    model = cls(config)
    optimizer = build_optimizer(model, "adam_mini", lr=0.01, **settings)
    layer = dict(model.model.layers[0].named_parameters())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return {name: optimizer.state[p]["exp_avg_sq"].numel() for name, p in layer.items() if p.ndim == 2}


def test_adam_mini_takes_queries_and_keys_by_head() -> None:
    rows = {f"self_attn.{x}_proj.weight": n for x, n in (("q", 16), ("k", 8), ("v", 8), ("o", 16))}
    rows |= {f"mlp.{x}_proj.weight": n for x, n in (("gate", 24), ("up", 24), ("down", 16))}
    heads = rows | {"self_attn.q_proj.weight": 4, "self_attn.k_proj.weight": 2}
    assert second_moments() == heads
    assert second_moments(block="row") == rows
    assert second_moments(block="matrix") == dict.fromkeys(rows, 1) | {k: heads[k] for k in list(heads)[:2]}
    assert second_moments(blocks="heads") == heads | {"self_attn.v_proj.weight": 2}
    assert second_moments(overrides=[("*.k_proj.*", None, {"blocks": "layers"})]) == heads | {
        "self_attn.k_proj.weight": 8
    }
    assert second_moments(overrides=[("*.k_proj.*", None, {"block": "row"})]) == heads | {"self_attn.k_proj.weight": 8}


@pytest.mark.parametrize("optim", ["lars", "adafactor", "came"])
def test_rules_that_reduce_take_heads_if_asked(optim: str) -> None:
    cls, config, _ = MODELS["llama"]
    torch.manual_seed(0)
    model = cls(config)
    p = model.get_parameter("model.layers.0.self_attn.q_proj.weight")
    alone = [nn.Parameter(x.detach().clone()) for x in p.split(4)]
    common: dict[str, Any] = {"lr": 0.01, "lr_convention": "adamw", "weight_decay": 0.0}
    together = build_optimizer(model, optim, blocks="heads", **common)
    separate = CLASSES[optim](alone, **common)
    for t in range(1, 4):
        p.grad = gradient(p, "q", t)
        for x, g in zip(alone, p.grad.split(4), strict=True):
            x.grad = g
        together.step()
        separate.step()
    torch.testing.assert_close(p.detach(), torch.cat([x.detach() for x in alone]), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="kfac works on whole layers.*blocks='heads'"):
        build_optimizer(model, "kfac", lr=0.01, blocks="heads")


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


def test_plan_of_large_models_takes_no_memory_and_little_time() -> None:
    start = time.perf_counter()
    with torch.device("meta"):
        small, model = hf.GPT2LMHeadModel(hf.GPT2Config()), hf.MixtralForCausalLM(hf.MixtralConfig())
    assert "124,439,808 trainable weights: muon 68.3%" in str(plan(small, "muon"))
    text = str(plan(model, "muon"))
    assert time.perf_counter() - start < 10
    assert "(32 times) | 8 x 28672 x 4096 | experts | muon |" in text
    assert "46,702,792,704 trainable weights: muon 99.4%" in text


def test_last_layer() -> None:
    owners = {r.role: r.rule for r in plan(built("llama"), "muon", last_layer="rule").rows}
    assert owners["head"] == "muon" and owners["embedding"] == "adamw"
    assert {r.role: r.rule for r in plan(built("llama"), "muon").rows}["head"] == "adamw"


def test_plan_names_overrides() -> None:
    rows = plan(built("llama"), "muon", overrides=[("*.q_proj.*", "adamw", {"lr_factor": 0.5})]).rows
    reasons = {r.name: r.reason for r in rows if r.rule == "adamw" and r.role == "hidden"}
    assert set(reasons) == {f"model.layers.{i}.self_attn.q_proj.weight" for i in range(2)}
    assert set(reasons.values()) == {"projection of LlamaAttention; override '*.q_proj.*'"}


WHISPER: dict[str, Any] = dict(
    d_model=16, vocab_size=60, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_source_positions=32
)
WHISPER |= {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 1), ("ffn_dim", 24))}
WHISPER |= {"encoder_attention_heads": 4, "decoder_attention_heads": 4}


def run_plan(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = (sys.executable, "-m", "lightning_optim", "plan", *words)
    return subprocess.run(command, capture_output=True, text=True, env=os.environ | environment, check=False)


def test_plan_command(tmp_path: Path) -> None:
    MODELS["llama"][1].save_pretrained(tmp_path)
    out = run_plan("--model", str(tmp_path), "--recipe", "soap-speedrun", "--max_precond_dim", "16").stdout
    assert (
        "| model.layers.*.mlp.down_proj.weight (2 times) | 16 x 24 | hidden | soap | 1 of 16 x 24 | exp_avg 1.5 KiB"
        in out
    )
    assert (
        "factor_left 1 KiB, basis_left 1 KiB" in out and "factor_right" not in out.split("down_proj")[1].split("|")[5]
    )
    assert "B per weight" in out
    wrong = run_plan("--model", str(tmp_path), "--optim", "soap", "--max_precond", "16")
    assert wrong.returncode == 2 and "soap has no setting 'max_precond'; did you mean 'max_precond_dim'" in wrong.stderr


def test_plan_command_takes_hub_ids(tmp_path: Path) -> None:
    """From the hub's cache, so that no network is needed; an architecture that is no causal language model."""
    commit = "0" * 40
    folder = tmp_path / "models--someone--tiny-vit"
    config = MODELS["vit"][1]
    config.architectures = ["ViTForImageClassification"]
    config.save_pretrained(folder / "snapshots" / commit)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(commit)
    run = run_plan("--model", "someone/tiny-vit", "--optim", "muon", HF_HUB_CACHE=str(tmp_path), HF_HUB_OFFLINE="1")
    assert "| classifier.weight | 2 x 16 | head | adamw |" in run.stdout, run.stderr


@pytest.mark.parametrize(
    ("config", "line"),
    [
        (MODELS["vit"][1], "| classifier.weight | 2 x 16 | head | adamw |"),
        (MODELS["t5"][1], "| shared.weight | 50 x 16 | embedding | adamw |"),
        (hf.WhisperConfig(**WHISPER), "measured on meta"),
    ],
    ids=["vision", "seq2seq", "speech"],
)
def test_plan_command_without_architectures(
    tmp_path: Path, config: Any, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    config.architectures = None
    config.save_pretrained(tmp_path)
    print_plan(arguments(model=str(tmp_path)))
    assert line in capsys.readouterr().out


def arguments(**changes: Any) -> Any:
    common = dict.fromkeys(("recipe", "rest", "last_layer", "adapter"))
    mesh = {"world_size": 1, "strategy": "fsdp2", "node_size": 8}
    return SimpleNamespace(**common | mesh | {"optim": "muon", "trust_remote_code": False, "settings": {}} | changes)


def test_plan_command_with_an_adapter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    MODELS["llama"][1].save_pretrained(tmp_path / "model")
    peft.LoraConfig(r=2, target_modules=["q_proj"]).save_pretrained(str(tmp_path / "adapter"))
    print_plan(arguments(model=str(tmp_path / "model"), adapter=str(tmp_path / "adapter")))
    out = capsys.readouterr().out
    assert "q_proj.lora_A.default.weight (2 times) | 2 x 16 | lora_a | muon | 1 of 2 x 16 |" in out
    assert "weights frozen: base_model" in out


REMOTE = """
import torch
from transformers import PretrainedConfig, PreTrainedModel
class TinyConfig(PretrainedConfig):
    model_type = "tiny_remote"
    vocab_size = 50
class TinyForCausalLM(PreTrainedModel):
    config_class = TinyConfig
    def __init__(self, config):
        super().__init__(config)
        self.table, self.out = torch.nn.Embedding(50, 8), torch.nn.Linear(8, 64)
        self.post_init()
    def forward(self, input_ids, **kwargs):
        return self.out(self.table(input_ids))
"""


def test_plan_command_runs_code_of_the_model_only_if_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "cache"))
    (tmp_path / "tiny.py").write_text(REMOTE)
    names = {"AutoConfig": "tiny.TinyConfig", "AutoModelForCausalLM": "tiny.TinyForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "tiny_remote", "auto_map": names}))
    with pytest.raises(ValueError, match="trust_remote_code"):
        print_plan(arguments(model=str(tmp_path)))
    print_plan(arguments(model=str(tmp_path), trust_remote_code=True))
    assert "| out.weight | 64 x 8 | head | adamw |" in capsys.readouterr().out


@pytest.mark.skipif(
    find_spec("bitsandbytes") is None, reason="bitsandbytes, which quantises on a CPU, is not installed"
)
@pytest.mark.filterwarnings("ignore")  # of bitsandbytes, and of peft about transformers
@pytest.mark.parametrize(("bits", "dora"), [(4, False), (4, True), (8, False)])  # DoRA over 8 bits fails on a CPU
def test_adapters_over_a_quantised_base(bits: int, dora: bool, tmp_path: Path) -> None:
    """QLoRA: nothing but the adapters is owned and moves."""
    cls, config, _ = MODELS["llama"]
    cls(config).save_pretrained(tmp_path)
    how = hf.BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    base = cls.from_pretrained(tmp_path, quantization_config=how, device_map="cpu", dtype=torch.float32)
    settings = peft.LoraConfig(r=2, target_modules="all-linear", use_dora=dora, modules_to_save=["lm_head"])
    model = peft.get_peft_model(peft.prepare_model_for_kbit_training(base), settings)
    kinds = {type(m).__name__ for m in model.modules()}
    assert ("Linear4bit" if bits == 4 else "Linear8bitLt") in kinds
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    actual = roles(model)
    assert set(actual) == trained
    for parameter, trait in actual.items():
        role = "lora_a" if "lora_A" in parameter else "lora_b" if "lora_B" in parameter else "head"
        assert trait.role == ("vector" if "magnitude" in parameter else role), parameter
    optimizer = build_optimizer(model, "muon", lr=1e-2, overrides=lora_plus(4))
    snapshot = {n: p.detach().clone() for n, p in model.named_parameters()}
    tokens = torch.arange(3, 19)[None]
    losses = []
    for _ in range(6):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    assert {n for n, p in model.named_parameters() if not torch.equal(p, snapshot[n])} == trained
    assert len(optimizer.state) == len(trained)
