"""Models that the benchmark and the examples train: LLaMA in several sizes."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_optim.bench.space import Setup, Size
from lightning_optim.bench.tokens import EOS, PAD
from lightning_optim.core.rule import nearest


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


def shape(setup: Setup) -> Preset:
    """The preset of a setup.

    Args:
        setup: whose model is a preset, or a factory with a vocabulary and a context.

    Returns:
        The preset, with what the setup changes; of a factory only vocabulary and context are true.

    Raises:
        ValueError: an unknown preset.
    """
    if ":" in setup.model:
        return Preset(setup.vocabulary or 1024, setup.context or 64, 0, 0, 0, 0)
    if setup.model not in PRESETS:
        raise ValueError(f"unknown model {setup.model!r}; {nearest(setup.model, list(PRESETS))}, or module:function")
    preset = PRESETS[setup.model]
    return replace(
        preset,
        vocabulary=setup.vocabulary or preset.vocabulary,
        context=setup.context or preset.context,
        tied=preset.tied and not setup.untied,
    )


def size_of(setup: Setup) -> Size:
    """Width of the model and steps of a run that is as long as its tokens say.

    Args:
        setup: names the model.

    Returns:
        A preset's width, or the most frequent shorter side of a factory's matrices; at least one step.
    """
    preset = shape(setup)
    steps = max(1, setup.tokens // (setup.batch * preset.context))
    if preset.width:
        return preset.width, steps
    with torch.device("meta"):
        sides = Counter(min(p.shape) for p in make(setup).parameters() if p.ndim == 2)
    return sides.most_common(1)[0][0], steps


def make(setup: Setup, vocabulary: int | None = None, width: int = 0) -> nn.Module:
    """A new model.

    Args:
        setup: names it.
        vocabulary: token ids, if fewer than the preset's.
        width: instead of the preset's; MLP and heads in proportion.

    Returns:
        A module that takes `input_ids` and `labels` and returns an object with a `loss`.

    Raises:
        ValueError: a factory that cannot be found, or a width that it cannot take.
    """
    preset = shape(setup)
    count = vocabulary or preset.vocabulary
    if ":" in setup.model:
        if width:
            raise ValueError(f"{setup.model}: only presets can be made wider for track='memory'")
        module, _, name = setup.model.partition(":")
        try:
            factory: Callable[[int, int], nn.Module] = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError) as e:
            raise ValueError(f"--model {setup.model}: {e}") from e
        return factory(count, preset.context)
    if width:
        preset = replace(preset, width=width, inner=round(preset.inner * width / preset.width / 16) * 16)
    return build_model(count, preset)
