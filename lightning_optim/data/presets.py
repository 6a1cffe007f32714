"""Model presets that the benchmark and the examples train: LLaMA in several sizes."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import LlamaConfig, LlamaForCausalLM

from lightning_optim.data.tokenizer import EOS, PAD


@dataclass(frozen=True)
class Preset:
    """The shape of a model."""

    vocabulary: int
    context: int
    width: int
    inner: int
    """Width of the MLP."""
    layers: int
    heads: int
    tied: bool = False
    """Whether the output layer is the embedding."""


PRESETS = {
    "micro": Preset(1024, 64, 64, 176, 2, 2, tied=True),
    "tiny": Preset(1024, 64, 128, 352, 2, 4, tied=True),
    "small": Preset(4096, 256, 384, 1056, 6, 6, tied=True),
    # The shapes of Zhao et al. 2024, arXiv:2403.03507 (GaLore). From 60m on they are Table 10 of Gong et al. 2025,
    # arXiv:2502.07752 (RACS, Alice), whose last row is wrong: the memory it reports is that of this 1b.
    "9m": Preset(32_000, 256, 128, 352, 4, 4),
    "60m": Preset(32_000, 256, 512, 1376, 8, 8),
    "130m": Preset(32_000, 256, 768, 2048, 12, 12),
    "350m": Preset(32_000, 256, 1024, 2736, 24, 16),
    "1b": Preset(32_000, 256, 2048, 5461, 24, 32),
}


def build_model(vocabulary: int, preset: Preset) -> LlamaForCausalLM:
    """A new model of this shape."""
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=preset.width,
        intermediate_size=preset.inner,
        num_hidden_layers=preset.layers,
        num_attention_heads=preset.heads,
        max_position_embeddings=preset.context,
        tie_word_embeddings=preset.tied,
        use_cache=False,
        bos_token_id=None,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    return LlamaForCausalLM(config)
