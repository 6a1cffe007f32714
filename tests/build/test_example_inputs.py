"""Inputs of models that describe their own."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import transformers as hf
from torch import nn
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel

from lightning_optim.build.example_inputs import as_inputs, inputs_of
from lightning_optim.build.measurement import measure


def test_inputs_of_the_user() -> None:
    x = torch.ones(1)
    assert as_inputs(x) == ((x,), {}) and as_inputs((x, x)) == ((x, x), {}) and as_inputs({"x": x}) == ((), {"x": x})


def test_inputs_by_configuration() -> None:
    with torch.device("meta"):
        config = hf.ViTConfig(num_hidden_layers=1, image_size=(32, 48), num_channels=1)
        image = inputs_of(hf.ViTForImageClassification(config))
        text = inputs_of(hf.BertModel(hf.BertConfig(num_hidden_layers=1, vocab_size=6)))
    assert image[0].kwargs["pixel_values"].shape == (1, 1, 32, 48)
    assert text[0].kwargs["input_ids"].max() < 6 and text[0].kwargs["input_ids"].shape == (1, 8)


def test_all_inputs_follow_the_main_one() -> None:
    """What a model of two towers needs; and patches of an image."""
    small = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
    vision = small | {"image_size": 32, "patch_size": 16}
    with torch.device("meta"):
        config = hf.CLIPConfig(text_config=small | {"vocab_size": 50}, vision_config=vision)
        model = hf.CLIPModel(config)
        tower = Qwen2VisionTransformerPretrainedModel(Qwen2VLVisionConfig(depth=1, embed_dim=16, num_heads=4))
    assert [set(x.kwargs) for x in inputs_of(model)] == [{"input_ids"}, {"input_ids", "pixel_values"}]
    assert measure(model).notes[0].startswith("CLIPModel: measured on meta")
    assert measure(tower).notes[0].startswith("Qwen2VisionTransformerPretrainedModel: measured on meta")


def test_inputs_of_lightning_and_timm() -> None:
    model = nn.Linear(2, 2)
    assert not inputs_of(model)
    model.__dict__["example_input_array"] = torch.ones(1, 2)
    assert inputs_of(model)[0].args[0].shape == (1, 2)
    timm = nn.Conv2d(3, 4, 2)
    timm.__dict__.update(pretrained_cfg={"input_size": (3, 8, 8)}, reset_classifier=print)
    assert inputs_of(timm)[0].args[0].shape == (1, 3, 8, 8)
    timm.__dict__["patch_embed"] = SimpleNamespace(img_size=(16, 16))
    assert inputs_of(timm)[0].args[0].shape == (1, 3, 16, 16)
