"""Kernels against the plain torch operations they stand for."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from lightning_optim.ops.kernels import products
from lightning_optim.ops.kernels.graphs import compiled
from lightning_optim.ops.kernels.products import product

onednn = pytest.mark.skipif(not products.available(), reason="torch's own product is the faster one on this processor")
SIZES = [(256, 200, 192), (130, 512, 140), (192, 1376, 64), (512, 64, 512), (100, 700, 300)]


@onednn
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
def test_product_is_a_float32_product(sizes: tuple[int, int, int], turned: tuple[bool, bool]) -> None:
    m, k, n = sizes
    a = torch.randn(k, m).mT if turned[0] else torch.randn(m, k)
    b = torch.randn(n, k).mT if turned[1] else torch.randn(k, n)
    exact = a.double() @ b.double()
    # a sum of k products in float32 is off by at most k eps / 2 |a| |b|, by sqrt(k) as much on average
    bound = k**0.5 * torch.finfo(torch.float32).eps * (a.norm() * b.norm() / (m * n * k) ** 0.5 * (m * n) ** 0.5)
    assert (product(a, b) - exact).norm() <= bound
    assert product(a, b).is_contiguous()


@onednn
def test_product_is_not_the_same_kernel() -> None:
    """Else the test above compares torch with itself."""
    a, b = torch.randn(512, 512), torch.randn(512, 512)
    assert not torch.equal(product(a, b), a @ b)


@pytest.mark.parametrize("small", [True, False])
def test_a_stack_is_its_matrices_one_by_one(small: bool) -> None:
    n = 16 if small else 160
    a, b = torch.randn(2, 3, n, n), torch.randn(2, 3, n, n)
    together = product(a, b)
    assert together.shape == (2, 3, n, n)
    for i, j in [(0, 0), (1, 2)]:
        if small:
            torch.testing.assert_close(together[i, j], product(a[i, j], b[i, j]))
        else:
            assert torch.equal(together[i, j], product(a[i, j], b[i, j])) or not products.available()
    one = product(a, b[0, 0])
    torch.testing.assert_close(one, a @ b[0, 0], rtol=1e-4, atol=1e-4)


def test_operands_that_change_in_place_are_read_anew() -> None:
    a, b = torch.randn(200, 200), torch.randn(200, 200)
    first = product(a, b)
    b.mul_(2)
    torch.testing.assert_close(product(a, b), 2 * first, rtol=1e-4, atol=1e-4)


@onednn
@pytest.mark.parametrize("cut", [lambda x: x[:, :200], lambda x: x.mT[:200], lambda x: x[:, ::2]])
def test_views_with_gaps_are_multiplied_as_fast_as_others(cut: Any) -> None:
    """oneDNN would go through them number by number, 1000 times slower, and round otherwise."""
    a = cut(torch.randn(400, 400))
    assert torch.equal(product(a, a.mT), product(a.contiguous(), a.mT.contiguous()))


def test_gradients_pass() -> None:
    a, b = torch.randn(200, 200, requires_grad=True), torch.randn(200, 200)
    product(a, b).sum().backward()
    torch.testing.assert_close(a.grad, b.sum(1).expand(200, 200), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_torch_s(dtype: torch.dtype) -> None:
    a, b = torch.randn(200, 200).to(dtype), torch.randn(200, 200).to(dtype)
    assert torch.equal(product(a, b), a @ b)


def test_a_graph_does_what_its_function_does_whatever_the_sizes_and_numbers() -> None:
    def step(p: torch.Tensor, g: torch.Tensor, v: torch.Tensor, t: torch.Tensor, size: torch.Tensor) -> None:
        v.lerp_((g * g).sum(-1, keepdim=True), 0.1)
        p.sub_(g / (v / (1 - 0.9**t)).sqrt() * size)

    def tensors(*sizes: int) -> list[torch.Tensor]:
        return [torch.randn(1, *sizes), torch.randn(1, *sizes), torch.rand(1, sizes[0], 1)]

    graph = compiled(step, tensors(67, 45), 2)
    for sizes, numbers in (((67, 45), (1.0, 0.1)), ((20, 300), (7.0, 0.01)), ((9, 9), (7.0, 0.5))):
        actual = tensors(*sizes)
        expected = [x.clone() for x in actual]
        graph(actual, numbers)
        step(*expected, *(torch.tensor(x, dtype=torch.float64) for x in numbers))
        torch.testing.assert_close(actual, expected)


def test_a_function_that_branches_on_what_is_open_has_no_graph() -> None:
    def by_size(x: torch.Tensor) -> None:
        x.mul_(2 if x.shape[0] > 50 else 3)

    def by_number(x: torch.Tensor, t: torch.Tensor) -> None:
        x.mul_(2 if t > 1 else 3)

    with pytest.raises(RuntimeError, match="branches on sizes"):
        compiled(by_size, [torch.randn(67)], 0)
    with pytest.raises(Exception, match="data-dependent"):
        compiled(by_number, [torch.randn(67)], 1)
