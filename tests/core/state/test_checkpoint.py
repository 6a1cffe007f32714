"""Checkpoints that an earlier version wrote resume as if that version had continued."""

import pytest
import torch

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
