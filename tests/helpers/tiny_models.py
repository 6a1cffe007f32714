"""Tiny models of many families of Transformers, out of one table of settings."""

from __future__ import annotations

from typing import Any

import torch
import transformers as hf
from torch import nn

from lightning_optim.build.dataflow import final_outputs
from lightning_optim.build.example_inputs import inputs_of

SETTINGS: dict[str, Any] = {
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size", "word_embed_proj_dim"), 16),
    **dict.fromkeys(("embed_dim", "emb_dim", "rotary_dim_base"), 16),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "d_ff", "hidden_dim", "encoder_ffn_dim", "decoder_ffn_dim"), 32),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "num_heads", "encoder_attention_heads"), 4),
    "decoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "d_kv": 4,
    "vocab_size": 64,
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx"), 64),
    **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1},
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "moe_k"), 2),
    **{"moe_intermediate_size": 8, "shared_expert_intermediate_size": 8, "n_group": 1, "topk_group": 1},
    **{"first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4},
    **{"v_head_dim": 4, "rotary_dim": 4, "attention_window": 8, "image_size": 32, "patch_size": 8},
    **{"use_mamba_kernels": False, "mamba_expand": 2, "state_size": 4, "time_step_rank": 2, "n_groups": 1},
}
SPECIAL: dict[str, dict[str, Any]] = {
    "GPTNeo": {"attention_types": [[["global"], 2]], "num_layers": 2},
    "Swin": {"depths": [1, 1], "num_heads": [2, 4], "embed_dim": 8, "window_size": 2, "patch_size": 4},
    "ConvNext": {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2},
    "Segformer": {},
    "ResNet": {"depths": [1, 1], "hidden_sizes": [8, 16], "embedding_size": 8},
    "Mpt": {"n_heads": 4},
    "MobileBert": {"intra_bottleneck_size": 8, "true_hidden_size": 16},
    "Mamba2": {"head_dim": 8, "num_heads": 4},
}


def tiny(name: str) -> nn.Module:
    """A small model of a class with random weights, in float32, without dropout."""
    cls = getattr(hf, name)
    default = cls.config_class()
    known = {*vars(default), *default.attribute_map}
    prefix = next((x for x in SPECIAL if name.startswith(f"{x}For")), "")
    settings = {k: v for k, v in SETTINGS.items() if k in known and k not in default.attribute_map}
    config = cls.config_class(**settings | SPECIAL.get(prefix, {}))
    torch.manual_seed(0)
    return cls(config).float().eval()


def loss_of(model: Any) -> torch.Tensor:
    """A loss that every output takes part in, on the smallest inputs."""
    outputs = model(**inputs_of(model)[0].kwargs)
    return torch.stack([(t.float() - 1).square().mean() for t in final_outputs(outputs)]).sum()


FAMILIES = """
Llama Mistral Qwen2 Qwen3 Gemma Gemma2 Phi Phi3 StableLm Olmo Olmo2 Cohere Granite Starcoder2 Glm Persimmon
Mixtral Qwen2Moe Qwen3Moe Olmoe GptOss Phimoe Helium Nemotron SmolLM3 Arcee SeedOss Bert Roberta Electra
Albert DistilBert DebertaV2 Ernie RoFormer MegatronBert ConvBert MPNet GPT2 GPTNeo GPTNeoX GPTJ CodeGen Bloom
OPT Falcon Mpt BioGpt T5 Bart MBart Pegasus Marian Blenderbot ViT DeiT Beit Swin ConvNext ResNet Dinov2 Mamba
Mamba2 GPTBigCode ModernBert XGLM Rwkv
""".split()
TASKS = (
    "ForCausalLM LMHeadModel ForSequenceClassification ForTokenClassification ForConditionalGeneration "
    "ForImageClassification"
).split()


def names() -> list[str]:
    """Up to two classes of each family, of those that the installed Transformers has."""
    classes = [[f + task for task in TASKS if hasattr(hf, f + task)][:2] for f in FAMILIES]
    return [name for group in classes for name in group]
