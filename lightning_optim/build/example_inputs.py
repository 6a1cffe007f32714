"""Inputs with which a model can be run once: those of its user, or the smallest that its configuration describes."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

TOKENS = 8


class Inputs(NamedTuple):
    """Arguments of a forward pass."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


def as_inputs(example: Any) -> Inputs:
    """The user's inputs as arguments.

    Args:
        example: a mapping of keyword arguments, a tuple or list of positional ones, or one positional argument, as
            Lightning's `example_input_array`.

    Returns:
        The arguments.
    """
    if isinstance(example, Mapping) or (hasattr(example, "keys") and hasattr(example, "data")):
        return Inputs((), dict(example))
    return Inputs(tuple(example), {}) if isinstance(example, (tuple, list)) else Inputs((example,), {})


def inputs_of(module: nn.Module) -> list[Inputs]:
    """The smallest inputs of a module that describes its own.

    Args:
        module: a LightningModule with an `example_input_array`, a model of Transformers (whose `config` and
            `main_input_name` say what it takes), or one of timm (`pretrained_cfg["input_size"]`); no wrapper.

    Returns:
        Inputs to be tried one after the other; none for other modules.
    """
    example = getattr(module, "example_input_array", None)
    if example is not None and not callable(example):
        return [as_inputs(example)]
    if hasattr(type(module), "base_model_prefix") and hasattr(module, "config"):
        return [Inputs((), kwargs) for kwargs in _of_config(module)]
    size = getattr(module, "pretrained_cfg", None)
    size = size.get("input_size") if isinstance(size, Mapping) else None
    if size is not None and hasattr(module, "reset_classifier"):
        return [Inputs((torch.zeros(1, *_own_size(module, tuple(size))),), {})]
    return []


def _own_size(module: nn.Module, size: tuple[int, ...]) -> tuple[int, ...]:
    """The size of the images that a model of timm was built for, which need not be the pretrained one's."""
    built = getattr(getattr(module, "patch_embed", None), "img_size", None)
    return (size[0], *built) if isinstance(built, tuple) and len(built) == 2 else size


def _of_config(module: nn.Module) -> list[dict[str, Any]]:
    """Inputs of a model of Transformers: the main one with what it needs beside it, or all that it takes."""
    config: Any = module.config
    parameters = inspect.signature(type(module).forward).parameters
    if "grid_thw" in parameters:
        return [_patches(config, next(k for k in parameters if k != "self"))]
    main = getattr(module, "main_input_name", "input_ids")
    names = [main, *(k for k, x in parameters.items() if x.default is inspect.Parameter.empty)]
    if main in ("pixel_values", "input_features", "input_values"):
        names += ["input_ids"]
    if getattr(config, "is_encoder_decoder", False) or main in ("input_features", "input_values"):
        names += ["decoder_input_ids"]
    if "input_ids" not in parameters:
        names += ["pixel_values"]
    known = [k for k in parameters if k in MAKERS]
    needed = [k for k in known if k in names]
    with torch.device("cpu"):
        made = {k: MAKERS[k](config) for k in known}
        if "input_ids" in made and "bbox" in parameters:
            needed, made["bbox"] = [*needed, "bbox"], torch.zeros(1, TOKENS, 4, dtype=torch.long)
    cache = {"use_cache": False} if "use_cache" in parameters else {}
    out = [{k: made[k] for k in needed} | cache] if needed else []
    return out + ([made | cache] if len(made) > len(needed) else [])


def _patches(config: Any, name: str) -> dict[str, Any]:
    """A small image as the patches that vision towers of the Qwen-VL kind take, and its size in patches."""
    side = 2 * _first(config, "spatial_merge_size", default=1)
    channels = _first(config, "in_channels", "in_chans", "num_channels", default=3)
    width = channels * _first(config, "temporal_patch_size", default=1) * _first(config, "patch_size", default=14) ** 2
    with torch.device("cpu"):
        return {name: torch.zeros(side * side, width), "grid_thw": torch.tensor([[1, side, side]])}


def _first(config: Any, *names: str, default: Any = None) -> Any:
    """The first of some settings that a configuration or one of its parts has."""
    parts = ("vision_config", "audio_config", "text_config", "encoder", "backbone_config", "encoder_config")
    for part in (config, *(x for k in parts if (x := getattr(config, k, None)) is not None)):
        for name in names:
            if (value := getattr(part, name, None)) is not None:
                return value
    return default


def _ids(config: Any) -> Tensor:
    size = _first(config, "vocab_size", default=2)
    ids = torch.arange(3, 3 + TOKENS) % (size if isinstance(size, int) else min(size))
    end = _first(config, "eos_token_id")
    if isinstance(end, int):  # classifiers read the token where a text ends
        ids = torch.where(ids == end, 0, ids)
        ids[-1] = end
    return ids[None]


def _pixels(config: Any) -> Tensor:
    size = _first(config, "image_size", "img_size", default=224)
    if isinstance(size, Mapping):
        size = size["height"], size["width"]
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    channels, frames = (
        _first(config, "num_channels", "in_channels", "in_chans", default=3),
        _first(config, "num_frames"),
    )
    channels = channels if isinstance(channels, int) else 3
    return torch.zeros(1, *((frames,) if isinstance(frames, int) else ()), channels, height, width)


def _features(config: Any) -> Tensor:
    bins, length = _first(config, "num_mel_bins", default=80), _first(config, "max_source_positions", default=64)
    per_frame = _first(config, "feature_projection_input_dim", "input_feat_per_channel", "input_dim")
    if isinstance(per_frame, int):
        return torch.zeros(1, 64, per_frame)
    return torch.zeros(1, bins, 2 * length)


def _waveform(config: Any) -> Tensor:
    if (bins := _first(config, "num_mel_bins")) is not None and (length := _first(config, "max_length")) is not None:
        return torch.zeros(1, length, bins)
    return torch.zeros(1, 16000)


MAKERS: dict[str, Callable[[Any], Tensor]] = {
    "input_ids": _ids,
    "decoder_input_ids": _ids,
    "pixel_values": _pixels,
    "input_features": _features,
    "input_values": _waveform,
}
"""Inputs of models of Transformers by their names."""
