"""Heads, routers and fused layers of models that nobody prepared, against what the models say themselves.

The truth shares no code with the product: `get_output_embeddings` of Transformers, `get_classifier` of timm, and for
fused attention of Transformers the reading `reshape(..., 3, heads, ...)` in the source of its class.
"""

from __future__ import annotations

import inspect
import json
import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from lightning_optim.build import measurement
from lightning_optim.build.role_report import report

accelerate = pytest.importorskip("accelerate")
PART, PARTS = (int(x) for x in os.environ.get("SWEEP_PART", "0/1").split("/"))
"""`SWEEP_PART=3/12` takes every twelfth class, from the third on."""
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]


def built(make: Any) -> nn.Module | None:
    """A model without weights, None where its library cannot make it by default."""
    try:
        with accelerate.init_empty_weights(include_buffers=False):
            return make()
    except Exception:
        return None


def classes() -> list[Any]:
    kinds = (getattr(hf, name, None) for name in sorted(dir(hf)))
    models = [k for k in kinds if inspect.isclass(k) and issubclass(k, hf.PreTrainedModel)]
    return [k for k in models if k.config_class is not None and not k.__name__.endswith("PreTrainedModel")][PART::PARTS]


def truths(model: Any) -> Iterator[tuple[str, str, Any]]:
    """(kind, parameter, what it is) that a model of Transformers says itself."""
    names = {id(p): name for name, p in model.named_parameters()}
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    output = model.get_output_embeddings()
    weight = getattr(output, "weight", None)
    if isinstance(weight, torch.Tensor) and id(weight) in names:
        yield "head", names[id(weight)], "embedding" if id(weight) in tables else "head"
    for path, module in model.named_modules():
        if isinstance(getattr(module, "qkv", None), nn.Linear) and "ttention" in type(module).__name__:
            source = inspect.getsource(type(module))
            if re.search(r"(reshape|view)\([^)]*?\b3,\s*self\.(num_heads|num_attention_heads|groups)", source):
                yield "cut", f"{path}.qkv.weight", 3


def record(counts: Counter[str], wrong: list[str], line: str, outcome: str) -> None:
    counts[outcome] += 1
    if outcome.endswith("wrong"):
        wrong.append(line)


def test_transformers(tmp_path: Path) -> None:
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for cls in classes():
        model = built(lambda cls=cls: cls(cls.config_class()))
        if model is None:
            counts["not built"] += 1
            continue
        traits = report(model)
        counts["measured" if any("measured on meta" in x for x in traits.notes) else "by structure"] += 1
        for kind, name, truth in truths(model):
            trait = traits.roles[name]
            found: Any = trait.role if kind == "head" else trait.blocks
            outcome = "right" if found == truth else "unknown" if found is None else "wrong"
            record(counts, wrong, f"{cls.__name__}.{name}: {found}, not {truth}", f"{kind} {outcome}")
        measurement._KNOWN.clear()
    (tmp_path / "sweep.json").write_text(json.dumps({"counts": counts, "wrong": wrong}))
    print(dict(counts), *wrong, sep="\n")
    heads = counts["head right"] + counts["head unknown"] + counts["head wrong"]
    assert counts["head wrong"] <= 0.002 * heads and not counts["cut wrong"], wrong


def test_timm() -> None:
    timm = pytest.importorskip("timm")
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for name in timm.list_models()[PART::PARTS]:
        model: Any = built(lambda name=name: timm.create_model(name))
        if model is None:
            counts["not built"] += 1
            continue
        traits = report(model).roles
        names = {id(p): k for k, p in model.named_parameters()}
        given = model.get_classifier()
        outputs = [m for x in (given if isinstance(given, tuple) else (given,)) for m in x.modules()]
        # a classifier of several layers ends with its last one
        last = [m for m in outputs if isinstance(getattr(m, "weight", None), nn.Parameter) and m.weight.ndim > 1][-1:]
        for module in last if not isinstance(given, tuple) else []:
            role = traits[names[id(module.weight)]].role
            record(counts, wrong, f"{name}: {role}", f"head {'right' if role == 'head' else 'wrong'}")
        measurement._KNOWN.clear()
    print(dict(counts), *wrong, sep="\n")
    assert counts["head wrong"] <= 0.002 * counts["head right"], wrong


DIFFUSION: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "dit": (
        "DiTTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "in_channels": 4, "num_layers": 2, "sample_size": 8},
        {
            "hidden_states": torch.zeros(1, 4, 8, 8),
            "timestep": torch.zeros(1, dtype=torch.long),
            "class_labels": torch.zeros(1, dtype=torch.long),
        },
    ),
    "pixart": (
        "PixArtTransformer2DModel",
        {"num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 2, "sample_size": 8, "caption_channels": 16}
        | {"cross_attention_dim": 16, "use_additional_conditions": False},
        {
            "hidden_states": torch.zeros(1, 4, 8, 8),
            "encoder_hidden_states": torch.zeros(1, 4, 16),
            "timestep": torch.zeros(1, dtype=torch.long),
        },
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {"sample_size": 8, "in_channels": 4, "num_layers": 2, "attention_head_dim": 8, "num_attention_heads": 2}
        | {"joint_attention_dim": 16, "caption_projection_dim": 16, "pooled_projection_dim": 16, "out_channels": 4},
        {
            "hidden_states": torch.zeros(1, 4, 8, 8),
            "encoder_hidden_states": torch.zeros(1, 4, 16),
            "pooled_projections": torch.zeros(1, 16),
            "timestep": torch.zeros(1, dtype=torch.long),
        },
    ),
}


@pytest.mark.parametrize("name", DIFFUSION)
def test_diffusers(name: str) -> None:
    """The output layer is the last projection, `proj_out` (DiT: `proj_out_2`); all other linear layers are hidden."""
    diffusers = pytest.importorskip("diffusers")
    kind, config, inputs = DIFFUSION[name]
    model = getattr(diffusers, kind)(**config)
    traits = report(model, inputs)
    assert "measured" in traits.notes[0], traits.notes
    heads = {n for n, t in traits.roles.items() if t.role == "head"}
    assert heads == {"proj_out_2.weight" if name == "dit" else "proj_out.weight"}
    assert not [n for n, t in traits.roles.items() if t.role == "router"]
