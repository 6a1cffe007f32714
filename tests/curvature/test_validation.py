"""What an estimator is given is checked before it measures: settings, the loss, and how parameters are stored."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.distributed.tensor import Replicate, Shard

from lightning_optim import AdamW, build_optimizer
from lightning_optim.curvature import check_settings, inputs_of, needs_curvature, searches
from lightning_optim.curvature.validation import check_params
from tests.helpers.fake_mesh import cut, fake_mesh


def test_optimizers_with_a_rule_that_measures_need_an_estimator() -> None:
    model = nn.Linear(3, 2)
    for name, expected in (("sophia_g", True), ("sophia_h", True), ("kfac", True), ("lbfgs", True), ("muon", False)):
        assert needs_curvature(build_optimizer(model, name, lr=0.1)) == expected
        assert searches(build_optimizer(model, name, lr=0.1)) == (name == "lbfgs")
    assert inputs_of(build_optimizer(model, "sophia_g", lr=0.1)) == {"gauss_newton"}
    assert not needs_curvature(torch.optim.SGD(model.parameters(), lr=0.1)) and not needs_curvature(None)


def test_settings_out_of_range_are_refused() -> None:
    for share in (None, 0.01, 1):
        check_settings(share, "auto")
    for share in (0.0, -0.5, 1.5, math.nan):
        with pytest.raises(ValueError, match=r"share must lie in \(0, 1\], got"):
            check_settings(share, "exact")
    with pytest.raises(ValueError, match="method must be 'auto', 'exact' or 'difference', got 'differences'"):
        check_settings(None, "differences")


def test_parameters_of_which_curvature_cannot_be_measured_are_named() -> None:
    model = nn.Linear(4, 4, bias=False)
    check_params(model, build_optimizer(model, "sophia_h", lr=0.1))
    with fake_mesh(0, 2) as mesh:
        model.weight = nn.Parameter(cut(torch.ones(4, 4), mesh, Shard(0)))
        with pytest.raises(ValueError, match="weight: sophia_h needs a double backward pass, which FSDP2 does not"):
            check_params(model, build_optimizer(model, "sophia_h", lr=0.1))
        with pytest.raises(ValueError, match="weight: sophia_g counts the labels of all ranks, .* tensor parallelism"):
            check_params(model, build_optimizer(model, "sophia_g", lr=0.1))
        check_params(model, AdamW(model.named_parameters()))
        model.weight = nn.Parameter(cut(torch.ones(4, 4), mesh, Replicate()))
        check_params(model, build_optimizer(model, "sophia_g", lr=0.1))


def test_flat_tensors_are_refused() -> None:
    model = nn.Linear(4, 4)
    for name, remedy in (("sophia_g", r"use DDP or FSDP2 \(fully_shard\)$"), ("sophia_h", "use DDP$")):
        optimizer = build_optimizer(model, name, lr=0.1)
        for group in optimizer.param_groups:
            flat = torch.cat([p.detach().reshape(-1) for p in group["params"]]).requires_grad_()
            group["params"] = [flat]
        with pytest.raises(ValueError, match=f"{name} cannot be measured in the flat parameters .*{remedy}"):
            check_params(model, optimizer)
