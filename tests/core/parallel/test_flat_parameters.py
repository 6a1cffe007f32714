"""Flat tensors by which an engine replaces parameters are told from the parameters, and refused where shapes matter."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import Parameter

from lightning_optim import AdamW, Muon, RuleOptimizer
from lightning_optim.core.parallel.flat_parameters import KnownParameters, check_flat, check_unflattened, is_flat
from lightning_optim.core.param_groups import rule_of
from lightning_optim.core.rule import REGISTRY


def group(*params: Tensor, **settings: Any) -> dict[str, Any]:
    """A complete group of AdamW."""
    return AdamW(list(params), **settings).param_groups[0]


def test_one_flat_tensor_in_the_place_of_several_parameters_is_recognized() -> None:
    known, ps = KnownParameters(), [Parameter(torch.ones(3, 2)), Parameter(torch.ones(4))]
    assert not known
    given = group(*ps)
    known.remember(given)
    assert known and known.flat_tensors(given) == []
    flat = torch.ones(10)
    given["params"] = [flat]
    (found,) = known.flat_tensors(given)
    assert found is flat
    with pytest.raises(ValueError, match="the averages of `with_averaging` would not reach the model"):
        known.validate(rule_of(given), given, averaging=True)
    known.validate(rule_of(given), given, averaging=False)


def test_fewer_tensors_than_vectors_are_flat_whatever_their_class() -> None:
    known, given = KnownParameters(), group(Parameter(torch.ones(4)), Parameter(torch.ones(4)))
    known.remember(given)
    given["params"] = [Parameter(torch.ones(8))]
    assert known.flat_tensors(given) == given["params"]


def test_copies_shards_and_new_vectors_are_not_flat_tensors() -> None:
    known, ps = KnownParameters(), [Parameter(torch.ones(3, 2)), Parameter(torch.ones(4))]
    given = group(*ps)
    known.remember(given)
    replaced: list[list[Tensor]] = [
        [p.detach().clone() for p in ps],
        [ps[0], Parameter(torch.ones(9))],
        [ps[1], ps[0]],
    ]
    for params in replaced:
        given["params"] = params
        assert known.flat_tensors(given) == []
    given["params"] = [ps[0], torch.ones(9)]
    assert len(known.flat_tensors(given)) == 1, "no Parameter, and of another length"
    known.rename(["adamw"], [{**given, "name": "other"}])
    assert len(known.flat_tensors({**given, "name": "other"})) == 1 and not known.flat_tensors({**given, "name": "x"})


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"clip_norm": 1.0}, r"clip_norm=1.0 needs whole parameters.*give clip_norm=None"),
    ({"on_nonfinite": "skip"}, r"on_nonfinite='skip' needs .*give on_nonfinite='off'"),
    ({"pin": True}, r"pin=True needs .*give pin=False"),
    ({"state_storage": "int8"}, r"state_storage='int8' needs .*give state_storage='fp32'"),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_options_that_depend_on_shapes_are_refused_with_their_remedy(settings: dict[str, Any], message: str) -> None:
    given = group(Parameter(torch.ones(4)), **settings)
    with pytest.raises(ValueError, match=f"^flat: {message}"):
        check_flat(rule_of(given), "flat", torch.ones(4), given)


def test_rounding_of_flat_bfloat16_weights_must_not_depend_on_the_position() -> None:
    flat = torch.ones(4, dtype=torch.bfloat16)
    given = group(Parameter(flat.clone()))
    with pytest.raises(ValueError, match="give param_rounding='nearest' or 'kahan'"):
        check_flat(rule_of(given), "flat", flat, given)
    for settings in ({"param_rounding": "kahan"}, {"param_rounding": "nearest", "state_storage": "host"}):
        given = group(Parameter(flat.clone()), **settings)
        check_flat(rule_of(given), "flat", flat, given)
    optimizer: RuleOptimizer = Muon([Parameter(torch.ones(2, 2))])
    whole = optimizer.param_groups[0]
    with pytest.raises(ValueError, match="^flat: muon needs whole matrices, which FSDP1 hides"):
        check_flat(rule_of(whole), "flat", flat, whole)


def test_a_model_whose_parameters_are_flattened_has_no_roles() -> None:
    layer = nn.Linear(3, 2)
    assert not is_flat(layer.weight)
    check_unflattened(REGISTRY["adamw"], layer.named_parameters())
    layer.weight._fsdp_flattened = True  # pyright: ignore[reportAttributeAccessIssue]
    assert is_flat(layer.weight)
    with pytest.raises(ValueError, match="^weight: FSDP1 has flattened it, so roles"):
        check_unflattened(REGISTRY["adamw"], layer.named_parameters())
    with pytest.raises(ValueError, match="^weight: muon needs whole matrices"):
        check_unflattened(REGISTRY["muon"], layer.named_parameters())
    layer.weight.requires_grad_(False)
    check_unflattened(REGISTRY["muon"], layer.named_parameters())
