"""Bad input gets one clear error that names the parameter or setting; nothing is half-applied."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import Parameter

from lightning_optim import SGD, Adafactor, Adam, AdamW, Executor, Lion, Muon, build_optimizer
from tests.rules import gradient


def matrix() -> Parameter:
    return Parameter(torch.randn(4, 3))


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 11))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: build_optimizer(model(), "muonn", lr=1e-3), r"unknown optimizer 'muonn'.*'muon'"),
        (lambda: build_optimizer(model(), "muon", lr=1e-3, rest="adam_w"), r"unknown optimizer 'adam_w'.*'adamw'"),
        (lambda: build_optimizer(model(), "muon", lr=1e-3, momentun=0.9), r"no setting 'momentun'.*'momentum'"),
        (lambda: build_optimizer(model(), "muon", lr=1e-3, lr_convention="adam"), "unknown lr_convention 'adam'"),
        (lambda: build_optimizer(model(), "muon", lr=1e-3, overrides=[("*.gate", "adamw")]), r"'\*.gate' matches no"),
        (
            lambda: build_optimizer(model(), "muon", lr=1e-3, overrides=[("vector", "muon")]),
            r"1\.bias: muon needs a mat",
        ),
        (
            lambda: build_optimizer(model(), "muon", lr=1e-3, overrides=[("*", "lion"), ("head", None)]),
            "'head' matches no",
        ),
        (lambda: build_optimizer(nn.Identity(), "muon", lr=1e-3), "Identity has no trainable parameter"),
        (lambda: Muon([]), "empty parameter list"),
        (lambda: Muon([Parameter(torch.randn(3))]), r"parameter 0 .*muon needs a matrix, got shape \(3,\)"),
        (lambda: Muon([("layer.bias", Parameter(torch.randn(3)))]), r"layer\.bias: muon needs a matrix"),
        (lambda: Muon([matrix()], blocks=3), "4 rows do not divide into 3 blocks"),
        (lambda: Muon([matrix()], blocks=0), "blocks must be a positive integer"),
        (lambda: Muon([matrix()], lr=-1.0), "lr must be a number >= 0, got -1.0"),
        (lambda: Muon([matrix()], momentum=math.nan), "momentum must be a number >= 0, got nan"),
        (lambda: Muon([matrix()], momentum=1.0), "momentum must be below 1"),
        (lambda: Muon([matrix()], lr=torch.tensor(math.nan)), "lr must be a number >= 0, got nan"),
        (lambda: Muon([matrix()], scale="orignal"), "unknown scale 'orignal'.*'original'"),  # pyright: ignore
        (lambda: Muon([matrix()], ns_dtype="int8"), "ns_dtype must be one of"),  # pyright: ignore
        (lambda: AdamW([matrix()], betas=(0.9, 1.0)), r"betas must lie in \[0, 1\)"),
        (lambda: AdamW([matrix()], weight_decay=-0.1), "weight_decay must be a number >= 0"),
        (lambda: AdamW([matrix()], lr="0.1"), "lr must be a number, got '0.1'"),  # pyright: ignore
        (lambda: AdamW([matrix()], eps_mode="hf"), "eps_mode"),  # pyright: ignore
        (lambda: SGD([matrix()], nesterov=True), "nesterov needs momentum"),
        (lambda: Lion([matrix()], on_nonfinite="rise"), "unknown on_nonfinite 'rise'.*'raise'"),
        (lambda: Lion([matrix()], param_rounding="up"), "unknown param_rounding 'up'"),
        (lambda: AdamW([Parameter(torch.randn(3, dtype=torch.complex64))]), "complex parameters are not supported"),
        (lambda: AdamW([Parameter(torch.eye(3).to_sparse())]), "sparse parameters are not supported"),
        (lambda: Executor([{"params": [matrix()]}]), "names no rule"),
        (lambda: Executor([{"params": [matrix()], "rule": "adamv"}]), r"unknown optimizer 'adamv'.*'adamw'"),
    ],
)
def test_one_clear_error(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_a_parameter_is_owned_once() -> None:
    p, q = matrix(), matrix()
    with pytest.raises(ValueError, match="b: already owned by group 'adamw'"):
        Executor([{"params": [("a", p)], "rule": "adamw"}, {"params": [("b", p)], "rule": "muon"}])
    with pytest.raises(ValueError, match="already owned by group"):
        Muon([p, q, p])


def test_group_names_are_unique() -> None:
    groups = [{"params": [matrix()], "rule": "adamw", "name": "x"}, {"params": [matrix()], "rule": "muon", "name": "x"}]
    with pytest.raises(ValueError, match="two param groups are named 'x'"):
        Executor(groups)


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    optimizer = Muon([matrix()])
    before = copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match="muon needs a matrix"):
        optimizer.add_param_group({"params": [matrix(), Parameter(torch.randn(3))]})
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0].keys() == before[0].keys()
    assert torch.equal(optimizer.param_groups[0]["params"][0], before[0]["params"][0])


def test_sparse_gradient_is_refused_before_anything_is_written() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = AdamW(embedding.parameters(), on_nonfinite="raise")
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.clone()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        optimizer.step()
    assert torch.equal(before, embedding.weight) and not optimizer.state


@pytest.mark.parametrize("cls", [Muon, Adafactor])
def test_flat_parameters_of_fsdp1_and_zero_are_refused(cls: Any) -> None:
    flat = Parameter(torch.randn(12))
    flat._fsdp_flattened = True  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="FSDP1 and ZeRO hide in flat parameters; use FSDP2"):
        cls([("layer.weight", flat)])
    emptied = Parameter(torch.empty(0))
    emptied.ds_id = 7  # pyright: ignore[reportAttributeAccessIssue]  (as DeepSpeed ZeRO-3 marks its parameters)
    with pytest.raises(ValueError, match="layer.weight: .*use FSDP2"):
        cls([("layer.weight", emptied)])
    AdamW([flat])


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch announces FSDP1's end
@pytest.mark.filterwarnings("ignore:FSDP.*")
def test_real_fsdp1_is_refused(pool: Any) -> None:
    for message in pool.run("tests.test_errors:fsdp1", 2):
        assert "use FSDP2" in message


def fsdp1(rank: int, world: int) -> str:
    """Wrap a model in FSDP1 and ask for Muon."""
    wrapped = FullyShardedDataParallel(nn.Linear(6, 5, bias=False), device_id=torch.device("cpu"))
    try:
        Muon(wrapped.parameters())
    except ValueError as error:
        return str(error)
    return "no error"


def test_loading_another_optimizers_checkpoint_is_refused() -> None:
    p = matrix()
    muon, lion = Muon([p]), Lion([p])
    p.grad = gradient(p, "p", 1)
    lion.step()
    with pytest.raises(ValueError, match="group 'muon' runs 'muon', the checkpoint's 'lion'"):
        muon.load_state_dict(lion.state_dict())
    assert muon.param_groups[0]["rule"] == "muon" and not muon.state
    other = Lion([Parameter(torch.randn(5, 3))])
    with pytest.raises(ValueError, match=r"'exp_avg' has shape \(4, 3\), expected \(5, 3\)"):
        other.load_state_dict(lion.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        Lion([matrix(), matrix()]).load_state_dict(lion.state_dict())


@pytest.mark.parametrize(
    ("old_class", "new_class", "settings"),
    [
        (torch.optim.AdamW, AdamW, {"lr": 0.01, "betas": (0.8, 0.9), "fused": True}),
        (torch.optim.Adam, Adam, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
        (torch.optim.SGD, SGD, {"lr": 0.01, "momentum": 0.9, "fused": True}),
        (torch.optim.Muon, Muon, {"lr": 0.01, "weight_decay": 0.1}),
    ],
)
def test_checkpoints_of_torch_load(old_class: Any, new_class: Any, settings: dict[str, Any]) -> None:
    """Same slots, same names: training goes on where torch's stopped, bitwise where the kernel is torch's."""
    ours, theirs = Parameter(torch.arange(12.0).view(4, 3)), Parameter(torch.arange(12.0).view(4, 3))
    old = old_class([theirs], **settings)
    for t in range(1, 4):
        theirs.grad = gradient(theirs, "p", t)
        old.step()
    new = new_class([ours], lr=5.0)
    with torch.no_grad():
        ours.copy_(theirs)
    new.load_state_dict(old.state_dict())
    assert all(new.param_groups[0][k] == v for k, v in settings.items())
    for t in range(4, 7):
        for p, optimizer in ((ours, new), (theirs, old)):
            p.grad = gradient(p, "p", t)
            optimizer.step()
    if new_class is Muon:  # torch multiplies its shape scale into lr, we into the direction
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(ours, theirs)
