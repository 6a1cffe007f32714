"""A fragment has the shape of a whole tensor and computes on its run only what is done element by element."""

from __future__ import annotations

import pytest
import torch

from lightning_optim.core.parallel.flat_sharding import FlatSharding
from lightning_optim.core.parallel.fragment import Fragment
from tests.helpers.fake_mesh import fake_mesh


def test_a_fragment_is_a_view_of_a_flat_tensor() -> None:
    with fake_mesh(1, 3) as mesh:
        flat = torch.arange(10.0, requires_grad=True)
        p = Fragment((4, 3), flat, 2, FlatSharding([(0, 5), (5, 9), (9, 12)], mesh.get_group()))
        assert p.shape == (4, 3) and p.numel() == 12 and (p.start, p.stop) == (5, 9)
        assert p.part.tolist() == [2, 3, 4, 5] and p.part.data_ptr() == flat[2:].data_ptr()
        flat.grad = torch.arange(10.0) * 10
        assert p.grad is None, "its flat tensor is in no group"
        p.requires_grad_(True)
        assert p.grad is not None and p.grad.tolist() == [20, 30, 40, 50]


def test_functions_by_element_give_fragments_and_others_are_refused() -> None:
    with fake_mesh(1, 2) as mesh:
        p = Fragment((3, 2), torch.arange(4.0), 1, FlatSharding([(0, 3), (3, 6)], mesh.get_group()))
        zeros = torch.zeros_like(p)
        assert isinstance(zeros, Fragment) and zeros.shape == (3, 2) and zeros.part.tolist() == [0, 0, 0]
        copy = p.detach().to(torch.bfloat16, copy=True)
        assert isinstance(copy, Fragment) and copy.dtype == copy.part.dtype == torch.bfloat16
        assert copy.part.tolist() == [1, 2, 3] and repr(copy) == "Fragment((3, 2), elements 3 to 6)"
        for function in (torch.sum, torch.linalg.norm, lambda x: x + 1, lambda x: x.view(-1)):
            with pytest.raises(NotImplementedError, match="on a fragment, of which other ranks have the rest"):
                function(p)
