"""Output layers are found by how a model is put together; what lies within blocks, or only could be one, is not one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
import transformers as hf
from torch import nn
from torch.nn import Linear, ModuleDict, ModuleList, ReLU, Sequential

from lightning_optim import roles
from lightning_optim.build.roles import assign

WIDTH = 16
TINY: dict[str, Any] = {"hidden_size": WIDTH, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 4}
TEXT: dict[str, Any] = TINY | {"vocab_size": 50, "max_position_embeddings": 32, "bos_token_id": 1, "eos_token_id": 2}
VISION: dict[str, Any] = TINY | {"image_size": 32, "patch_size": 8}
STACK: dict[str, Any] = {"d_model": WIDTH, "nhead": 4, "dim_feedforward": 32, "batch_first": True}


class Parts(nn.Module):
    """A module made of others, registered in the order in which they are given."""

    def __init__(self, **parts: nn.Module) -> None:
        super().__init__()
        for name, part in parts.items():
            self.add_module(name, part)


class Block(Parts):
    """A block of a transformer."""

    def __init__(self) -> None:
        super().__init__(
            norm=nn.LayerNorm(WIDTH),
            attention=nn.MultiheadAttention(WIDTH, 4),
            norm2=nn.LayerNorm(WIDTH),
            mlp=Sequential(Linear(WIDTH, 64), nn.GELU(), Linear(64, WIDTH)),
        )


class Residual(Parts):
    """A block without a norm."""

    def __init__(self) -> None:
        super().__init__(up=Linear(WIDTH, 32), down=Linear(32, WIDTH))


class Mixture(Parts):
    """A block whose router is registered last."""

    def __init__(self) -> None:
        experts = ModuleList([Sequential(Linear(WIDTH, 32), ReLU(), Linear(32, WIDTH)) for _ in range(3)])
        super().__init__(experts=experts, gate=Linear(WIDTH, 3))


class Classifier(Parts):
    """A head of two layers."""

    def __init__(self, classes: int) -> None:
        super().__init__(dense=Linear(WIDTH, WIDTH), out=Linear(WIDTH, classes))


class Basic(Parts):
    """A block of a ResNet."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(conv=nn.Conv2d(inputs, outputs, 3), bn=nn.BatchNorm2d(outputs))


def resnet() -> nn.Module:
    stages = {"layer1": Sequential(Basic(8, 8), Basic(8, 8)), "layer2": Sequential(Basic(8, WIDTH))}
    return Parts(conv1=nn.Conv2d(3, 8, 7), **stages, fc=Linear(WIDTH, 10))


def vit(head: int, blocks: int = 2, kind: Any = Sequential) -> nn.Module:
    made = [Block() for _ in range(blocks)]
    parts = {"patch": nn.Conv2d(3, WIDTH, 4), "blocks": kind(*made) if kind is Sequential else kind(made)}
    return Parts(**parts, norm=nn.LayerNorm(WIDTH), **({"head": Linear(WIDTH, head)} if head else {}))


def gpt(*, head: int = 0, tied: bool = False) -> nn.Module:
    token = nn.Embedding(50, WIDTH)
    parts = ModuleDict({"token": token, "blocks": ModuleList([Block()]), "norm": nn.LayerNorm(WIDTH)})
    model = Parts(transformer=parts, **({"lm_head": Linear(WIDTH, head, bias=False)} if head else {}))
    if tied:
        model.get_submodule("lm_head").weight = token.weight
    return model


def bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**TEXT))


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(hf.LlamaConfig(**TEXT))


def unet() -> nn.Module:
    time = Sequential(Linear(WIDTH, 64), nn.SiLU(), Linear(64, 64))
    down, up = (ModuleList([Parts(conv=nn.Conv2d(n, 8, 3), time=Linear(64, 8))]) for n in (3, 8))
    return Parts(time=time, down=down, up=up, out=nn.Conv2d(8, 3, 1))


def dit() -> nn.Module:
    final = Parts(
        norm=nn.LayerNorm(WIDTH, elementwise_affine=False),
        linear=Linear(WIDTH, 12),
        modulation=Sequential(nn.SiLU(), Linear(WIDTH, 2 * WIDTH)),
    )
    time = Sequential(Linear(WIDTH, WIDTH), nn.SiLU(), Linear(WIDTH, WIDTH))
    return Parts(time=time, patch=nn.Conv2d(3, WIDTH, 2), blocks=ModuleList([Block(), Block()]), final=final)


def attention() -> nn.Module:
    model = Parts(query=Linear(WIDTH, WIDTH), key=Linear(WIDTH, 4), value=Linear(WIDTH, 4), out=Linear(WIDTH, WIDTH))
    model.__dict__["num_heads"] = 4
    return model


def tower(inputs: int, outputs: int) -> nn.Module:
    return Sequential(Linear(inputs, 64), ReLU(), Linear(64, outputs))


MODELS: dict[str, tuple[Callable[[], Any], set[str]]] = {
    "mlp": (lambda: Sequential(Linear(8, 64), nn.Tanh(), Linear(64, 10)), {"2"}),
    "mlp of squares": (lambda: Sequential(Linear(8, 8), nn.LayerNorm(8), Linear(8, 8)), {"2"}),
    "resnet": (resnet, {"fc"}),
    "vit": (lambda: vit(10), {"head"}),
    "vit, as many classes as its width": (lambda: vit(WIDTH, kind=ModuleList), {"head"}),
    "gpt": (lambda: gpt(head=50), {"lm_head"}),
    "gpt, head padded": (lambda: gpt(head=64), {"lm_head"}),
    "recurrent": (lambda: Parts(emb=nn.Embedding(50, 8), rnn=nn.LSTM(8, 32), fc=Linear(32, 5)), {"fc"}),
    "translation": (
        lambda: Parts(
            transformer=nn.Transformer(WIDTH, 4, 1, 1, 32, batch_first=True),
            generator=Linear(WIDTH, 60),
            source=nn.Embedding(50, WIDTH),
            target=nn.Embedding(60, WIDTH),
        ),
        {"generator"},
    ),
    "autoencoder": (lambda: Parts(encoder=tower(784, 20), decoder=tower(20, 784)), {"decoder.2"}),
    "variational": (
        lambda: Parts(
            fc1=Linear(784, 64), mean=Linear(64, 20), scale=Linear(64, 20), fc3=Linear(20, 64), fc4=Linear(64, 784)
        ),
        {"fc4"},
    ),
    "actor and critic": (
        lambda: Parts(trunk=tower(8, 64), policy=Linear(64, 4), value=Linear(64, 1)),
        {"policy", "value"},
    ),
    "two networks": (lambda: Parts(critic=tower(8, 1), actor=tower(8, 2)), {"critic.2", "actor.2"}),
    "two towers": (lambda: Parts(user=tower(100, 32), item=tower(50, 32)), {"user.2", "item.2"}),
    "tasks": (
        lambda: Parts(body=tower(10, 64), heads=ModuleDict({"a": Linear(64, 5), "b": Linear(64, 3)})),
        {"heads.a", "heads.b"},
    ),
    "tasks of two layers": (
        lambda: Parts(body=bert(), heads=ModuleList([Classifier(5), Classifier(3)])),
        {"heads.0.out", "heads.1.out"},
    ),
    "head registered before the backbone": (
        lambda: Parts(classifier=Linear(WIDTH, 5), backbone=bert()),
        {"classifier"},
    ),
    "head registered before its input": (lambda: Parts(head=Linear(64, 10), fc1=Linear(784, 64)), {"head"}),
    "everything registered backwards": (
        lambda: Parts(
            norm=nn.LayerNorm(WIDTH), head=Linear(WIDTH, 10), blocks=ModuleList([Block()]), patch=nn.Conv2d(3, WIDTH, 4)
        ),
        {"head"},
    ),
    "hidden layers registered last": (
        lambda: Parts(first=Linear(2, 64), out=Linear(64, 3), hidden=ModuleList([Linear(64, 64) for _ in range(3)])),
        {"out"},
    ),
    "detector": (
        lambda: Parts(
            backbone=resnet(),
            transformer=nn.Transformer(WIDTH, 4, 1, 1, 32, batch_first=True),
            classes=Linear(WIDTH, 92),
            boxes=Parts(layers=ModuleList([Linear(WIDTH, WIDTH), Linear(WIDTH, 4)])),
            queries=nn.Embedding(10, WIDTH),
        ),
        {"classes", "boxes.layers.1"},
    ),
    "layers in a list": (lambda: Parts(layers=ModuleList([Linear(10, 64), Linear(64, 2)])), {"layers.1"}),
    "backbone and classifier": (lambda: Parts(backbone=bert(), classifier=Linear(WIDTH, 5)), {"classifier"}),
    "backbone and projection": (lambda: Parts(backbone=bert(), projection=Linear(WIDTH, WIDTH)), {"projection"}),
    "inputs, backbone and output": (
        lambda: Parts(into=Linear(7, WIDTH), backbone=bert(), out=Linear(WIDTH, 1)),
        {"out"},
    ),
    "fusion": (lambda: Parts(a=bert(), b=resnet(), fuse=Linear(26, 64), out=Linear(64, 4)), {"out"}),
    "language model and value": (lambda: Parts(lm=llama(), value=Linear(WIDTH, 2)), {"lm.lm_head", "value"}),
    "language model and prefix": (lambda: Parts(lm=llama(), prefix=tower(24, 4 * WIDTH)), {"lm.lm_head"}),
    "mixture": (
        lambda: Parts(emb=nn.Embedding(50, WIDTH), blocks=ModuleList([Mixture(), Mixture()]), out=Linear(WIDTH, 50)),
        {"out"},
    ),
    "diffusion transformer": (dit, {"final.linear"}),
    "compiled": (lambda: torch.compile(resnet()), {"fc"}),
    # what has no output layer, or none that the structure tells
    "one layer": (lambda: Linear(8, 3), set()),
    "vit without head": (lambda: vit(0), set()),
    "vit of one block without head": (lambda: vit(0, blocks=1), set()),
    "vit without head, blocks in a list": (lambda: vit(0, kind=ModuleList), set()),
    "gpt without head": (gpt, set()),
    "gpt, tied": (lambda: gpt(head=50, tied=True), set()),
    "encoder": (lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(**STACK), 2), set()),
    "encoder layer": (lambda: nn.TransformerEncoderLayer(**STACK), set()),
    "block": (Block, set()),
    "blocks": (lambda: Sequential(Block(), Block()), set()),
    "blocks without norms": (lambda: Sequential(Residual(), Residual()), set()),
    "attention": (attention, set()),
    "mixture without head": (lambda: Parts(emb=nn.Embedding(50, WIDTH), blocks=ModuleList([Mixture()])), set()),
    "unet": (unet, set()),
    "bert": (bert, set()),
    "parameters in a list": (lambda: ModuleList([Linear(8, 8), Linear(8, 8)]), set()),
}


def heads(model: nn.Module) -> set[str]:
    """Names of the output layers."""
    actual = {name for name, trait in roles(model).items() if trait.role == "head"}
    return {name.removesuffix(".weight").removeprefix("_orig_mod.") for name in actual}


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method` is deprecated")  # torch.compile's own imports
@pytest.mark.parametrize("name", MODELS)
def test_output_layers(name: str) -> None:
    build, expected = MODELS[name]
    assert heads(build()) == expected


WHISPER: dict[str, Any] = {
    "d_model": WIDTH,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "vocab_size": 60,
    "pad_token_id": 0,
}
T5: dict[str, Any] = {"d_model": WIDTH, "d_ff": 24, "d_kv": 4, "num_layers": 1, "num_heads": 4, "vocab_size": 60}
TRANSFORMERS: dict[str, tuple[Any, Any, set[str]]] = {
    "CLIPForImageClassification": (hf.CLIPConfig, {"text_config": TEXT, "vision_config": VISION}, {"classifier"}),
    "SiglipForImageClassification": (hf.SiglipConfig, {"text_config": TEXT, "vision_config": VISION}, {"classifier"}),
    "WhisperForAudioClassification": (hf.WhisperConfig, WHISPER, {"classifier"}),
    "T5ForQuestionAnswering": (hf.T5Config, T5, {"qa_outputs"}),
    "BertForPreTraining": (hf.BertConfig, TEXT, {"cls.seq_relationship"}),
    "BertForSequenceClassification": (hf.BertConfig, TEXT, {"classifier"}),
    "ElectraForSequenceClassification": (hf.ElectraConfig, TEXT, {"classifier.out_proj"}),
    "DistilBertForSequenceClassification": (
        hf.DistilBertConfig,
        {"dim": WIDTH, "n_heads": 4, "n_layers": 1},
        {"classifier"},
    ),
    "GPT2DoubleHeadsModel": (
        hf.GPT2Config,
        {"n_embd": WIDTH, "n_layer": 1, "n_head": 4, "tie_word_embeddings": False, "num_labels": 3},
        {"lm_head", "multiple_choice_head.summary"},
    ),
    "DeiTForImageClassificationWithTeacher": (hf.DeiTConfig, VISION, {"cls_classifier", "distillation_classifier"}),
    "LlamaForSequenceClassification": (hf.LlamaConfig, TEXT, {"score"}),
    "BertModel": (hf.BertConfig, TEXT, set()),
    "WhisperModel": (hf.WhisperConfig, WHISPER, set()),
    "T5Model": (hf.T5Config, T5, set()),
    "CLIPVisionModel": (hf.CLIPVisionConfig, VISION, set()),
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_output_layers_of_transformers(name: str) -> None:
    config, settings, expected = TRANSFORMERS[name]
    with torch.device("meta"):
        model = getattr(hf, name)(config(**settings))
    assert heads(model) == expected
    assert heads(Parts(model=model)) == {f"model.{x}" for x in expected}  # in a LightningModule
    owners = {a.rule for a in assign(model, "muon", "adamw") if a.role == "head"}
    assert owners <= {"adamw"}


TIMM = (
    "resnet18",
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "convnext_tiny",
    "swin_tiny_patch4_window7_224",
)


@pytest.mark.parametrize("name", [*TIMM, "mixer_s16_224", "levit_128s", "crossvit_tiny_240", "mobilenetv3_small_100"])
@pytest.mark.parametrize("classes", [10, 0])
def test_output_layers_of_timm(name: str, classes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without asking `get_classifier`, as of models that are built so and do not have it (torchvision)."""
    timm = pytest.importorskip("timm", reason="timm's models are an optional check")
    with torch.device("meta"):
        model = timm.create_model(name, pretrained=False, num_classes=classes)
    record = model.get_classifier()
    layers = [m for part in (record if isinstance(record, tuple) else (record,)) for m in part.modules()]
    expected = {k for k, m in model.named_modules() if isinstance(m, Linear) and any(m is x for x in layers)}
    assert heads(model) == expected and bool(expected) == bool(classes)
    monkeypatch.setattr("lightning_optim.build.output_layers._has_classifier", lambda _: False)
    assert heads(model) == expected


@pytest.mark.parametrize("saved", [True, False])
def test_output_layers_beside_adapters(saved: bool) -> None:
    """A head that is trained whole stays one; adapters of a head are adapters."""
    model = Parts(backbone=bert(), classifier=Linear(WIDTH, 5))
    targets = ["query", *(() if saved else ("classifier",))]
    config = peft.LoraConfig(r=2, target_modules=targets, modules_to_save=["classifier"] if saved else None)
    actual = {name: trait.role for name, trait in roles(peft.get_peft_model(model, config)).items()}  # pyright: ignore
    outer = {role for name, role in actual.items() if "classifier" in name and "bias" not in name}
    assert outer == ({"head"} if saved else {"lora_a", "lora_b"})
    assert {role for name, role in actual.items() if "query" in name} == {"lora_a", "lora_b"}
