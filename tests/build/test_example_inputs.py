"""Inputs of models that describe their own."""

from __future__ import annotations

from types import SimpleNamespace

import torch
import transformers as hf
from torch import nn

from lightning_optim.build.example_inputs import as_inputs, inputs_of


def test_inputs_of_the_user() -> None:
    x = torch.ones(1)
    assert as_inputs(x) == ((x,), {}) and as_inputs((x, x)) == ((x, x), {}) and as_inputs({"x": x}) == ((), {"x": x})


def test_inputs_by_configuration() -> None:
    with torch.device("meta"):
        config = hf.ViTConfig(num_hidden_layers=1, image_size=(32, 48), num_channels=1)
        image = inputs_of(hf.ViTForImageClassification(config))
        text = inputs_of(hf.BertModel(hf.BertConfig(num_hidden_layers=1, vocab_size=6)))
    assert image is not None and image.kwargs["pixel_values"].shape == (1, 1, 32, 48)
    assert text is not None and text.kwargs["input_ids"].max() < 6 and text.kwargs["input_ids"].shape == (1, 8)


def test_inputs_of_lightning_and_timm() -> None:
    model = nn.Linear(2, 2)
    assert inputs_of(model) is None
    model.__dict__["example_input_array"] = torch.ones(1, 2)
    assert (inputs := inputs_of(model)) is not None and inputs.args[0].shape == (1, 2)
    timm = nn.Conv2d(3, 4, 2)
    timm.__dict__.update(pretrained_cfg={"input_size": (3, 8, 8)}, reset_classifier=print)
    assert (inputs := inputs_of(timm)) is not None and inputs.args[0].shape == (1, 3, 8, 8)
    timm.__dict__["patch_embed"] = SimpleNamespace(img_size=(16, 16))
    assert (inputs := inputs_of(timm)) is not None and inputs.args[0].shape == (1, 3, 16, 16)
