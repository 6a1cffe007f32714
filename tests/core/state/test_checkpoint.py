"""Checkpoints that an earlier version wrote resume as if that version had continued."""

import copy
from typing import Any

import pytest
import torch
from torch.nn import Parameter

from lightning_optim import AdamW
from tests.core.state.checkpoints.write import HERE, SAVED, SETTINGS, TAKEN, gradients, model, optimizer, weights


@pytest.mark.parametrize("name", SETTINGS)
def test_resumes_bitwise(name: str) -> None:
    file = torch.load(HERE / f"{name}.pt", weights_only=True)
    net = model()
    net.load_state_dict(file["start"])
    opt = optimizer(net, name)
    for _ in gradients(net, range(SAVED)):
        opt.step()
    # kernels round differently on other processors: there the whole trajectory differs by rounding
    same_machine = all(torch.equal(x, file["saved"][key]) for key, x in weights(net).items())

    net = model()
    net.load_state_dict(file["saved"])
    opt = optimizer(net, name)
    opt.load_state_dict(file["optimizer"])
    for _ in gradients(net, range(SAVED, TAKEN)):
        opt.step()
    for key, x in weights(net).items():
        atol = 0 if same_machine else 2e-3
        torch.testing.assert_close(x, file["taken"][key], rtol=0, atol=atol, msg=f"{name}: {key}")
        assert not torch.equal(x, file["saved"][key])


@pytest.mark.parametrize("storage", ["int8", "fp8"])
def test_a_scalar_in_8_bits_resumes(storage: Any) -> None:
    def trained(steps: range, optimizer: AdamW) -> None:
        p = optimizer.param_groups[0]["params"][0]
        for t in steps:
            p.grad = torch.tensor(0.1 * t)
            optimizer.step()

    p, q = Parameter(torch.tensor(1.5)), Parameter(torch.tensor(1.5))
    first, second = (AdamW([x], state_storage=storage, storage_min=1, storage_block=16) for x in (p, q))
    trained(range(1, 3), first)
    saved, weight = copy.deepcopy(first.state_dict()), p.detach().clone()
    assert first.state[p]["exp_avg"].dtype.itemsize == 1
    trained(range(3, 6), first)
    second.load_state_dict(saved)
    q.data.copy_(weight)
    trained(range(3, 6), second)
    assert torch.equal(p, q)


def test_torchs_checkpoints_of_any_count_load_and_ours_load_into_torchs() -> None:
    p, q = Parameter(torch.ones(3)), Parameter(torch.ones(3))
    ours, theirs = AdamW([p]), torch.optim.AdamW([q])
    p.grad = q.grad = torch.ones(3)
    theirs.step()
    theirs.state[q]["step"].fill_(2.0**24)
    ours.load_state_dict(theirs.state_dict())
    ours.step()
    assert ours.state[p]["step"] == 2**24 + 1
    theirs.load_state_dict(ours.state_dict() | {"param_groups": theirs.state_dict()["param_groups"]})
    theirs.step()
    assert theirs.state[q]["step"] == 2**24 + 2
