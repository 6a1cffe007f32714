"""The model of a setup: a preset, or what a function of yours returns."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from lightning_optim.bench.space import Setup, Size
from lightning_optim.core.rule import nearest
from lightning_optim.data.presets import PRESETS, Preset, build_model


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
