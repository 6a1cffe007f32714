"""Our classes in the place of torch's, by the inputs of torch's own tests."""

import warnings
from collections.abc import Iterator
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import lightning_optim
from lightning_optim import AdamW, Muon
from lightning_optim.core.rule import REGISTRY
from lightning_optim.core.torch_arguments import GENERIC, torch_arguments
from lightning_optim.optimizers import CLASSES

pytest.importorskip("expecttest", reason="torch.testing._internal imports it; the extra `test` installs it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_optimizers import OptimizerErrorEnum, optim_db

CASES: list[Any] = [x for x in optim_db if hasattr(lightning_optim, cast("Any", x.optim_cls).__name__)]
TORCH_DEFAULTS: dict[str, dict[str, Any]] = {"Muon": {"lr": 1e-3, "weight_decay": 0.1}}
"""Where our defaults are those of the publication and torch's are not."""


def inputs() -> Iterator[Any]:
    for info in CASES:
        name = info.optim_cls.__name__
        if name != "LBFGS":  # ours is the stochastic form
            for case in info.optim_inputs_func(device="cpu"):
                yield pytest.param(name, case.kwargs, id=f"{name}-{case.desc}")


def layers(bias: bool) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 4, bias=bias), nn.Linear(4, 3, bias=bias))


@pytest.mark.parametrize(("name", "settings"), list(inputs()))
def test_steps_are_torch_s(name: str, settings: dict[str, Any]):
    ours, theirs = (layers(bias=name != "Muon") for _ in range(2))
    if settings.get("maximize"):
        with pytest.raises(ValueError, match="maximize=True is not supported; call backward on the negative"):
            getattr(lightning_optim, name)(ours.parameters(), **settings)
        return
    settings = TORCH_DEFAULTS.get(name, {}) | settings
    optimizers = [
        getattr(package, name)(model.parameters(), **settings)
        for package, model in ((lightning_optim, ours), (torch.optim, theirs))
    ]
    x = torch.randn(16, 6)
    for _ in range(4):
        for model, optimizer in zip((ours, theirs), optimizers, strict=True):
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


ACCEPTED = ("all optimizer param groups should be with/without names.", "only support 2D parameters")
"""Errors of torch's that are none here: names are given to the nameless, and convolutions are matrices."""


@pytest.mark.parametrize("info", CASES, ids=lambda x: x.optim_cls.__name__)
def test_what_torch_refuses_is_refused(info: Any):
    cls = getattr(lightning_optim, info.optim_cls.__name__)
    for case in info.optim_error_inputs_func(device="cpu", dtype=torch.float32):
        given = case.optimizer_error_input
        if case.error_on != OptimizerErrorEnum.CONSTRUCTION_ERROR or given.desc in ACCEPTED:
            continue
        params = [nn.Parameter(torch.ones(2, 2))] if given.params is None else given.params
        if case.error_type is UserWarning:
            with pytest.warns(UserWarning, match=case.error_regex):
                cls(params, **given.kwargs)
        elif not given.kwargs.get("foreach"):  # what torch's foreach implementations cannot do is no concern of ours
            with pytest.raises((ValueError, TypeError)):
                cls(params, **given.kwargs)


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_generic_arguments_are_honored_or_refused(name: str):
    rule, cls = REGISTRY[name], cast("Any", CLASSES[name])
    assert torch_arguments(rule).items() >= GENERIC.items()
    p = nn.Parameter(torch.ones(4, 4))
    group = cls([p], fused=True, foreach=False, maximize=False).param_groups[0]
    assert not group.keys() & GENERIC.keys()
    for key in ("maximize", "capturable", "differentiable"):
        with pytest.raises(ValueError, match=f"{name}: {key}=True is not supported"):
            cls([p], **{key: True})
        with pytest.raises(ValueError, match=f"{name}: {key}=True is not supported"):
            cls([{"params": [p], key: True}])


def test_adjust_lr_fn_is_the_scale():
    p = nn.Parameter(torch.ones(4, 4))
    assert Muon([p], adjust_lr_fn="match_rms_adamw").param_groups[0]["scale"] == "match_rms_adamw"
    assert Muon([{"params": p, "adjust_lr_fn": "original"}]).param_groups[0]["scale"] == "original"
    with pytest.raises(ValueError, match="scale: unknown value 'arbitrary'"):
        Muon([p], adjust_lr_fn="arbitrary")


def test_a_parameter_given_twice_is_stepped_once():
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    with pytest.warns(UserWarning, match="a parameter group with duplicate parameters; each is stepped once"):
        optimizer = AdamW([p, q, p], lr=0.1)
    assert [id(x) for x in optimizer.param_groups[0]["params"]] == [id(p), id(q)]
    with pytest.warns(UserWarning, match="duplicate"):
        named = AdamW([("a", p), ("b", q), ("c", q)], lr=0.1)
    assert named.param_groups[0]["param_names"] == ["a", "b"]
    p.grad = torch.ones_like(p)
    optimizer.step()
    torch.testing.assert_close(p.detach(), torch.full((2, 2), 1 - 0.1 * (1 + 0.01)), atol=1e-4, rtol=0)


@pytest.mark.parametrize("lr", [torch.tensor([1e-3, 1e-3]), torch.empty(0)])
def test_a_learning_rate_of_several_elements_is_refused(lr: Tensor):
    with pytest.raises(ValueError, match="adamw: lr must be a number or a tensor of one element, got shape"):
        AdamW([nn.Parameter(torch.ones(2))], lr=cast("Any", lr))
