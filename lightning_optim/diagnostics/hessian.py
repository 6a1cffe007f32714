"""Products with the Hessian of a loss, and measures of its blocks.

The loss is a function of no arguments over parameters that require gradients; it must be the same function at every
call (one batch, no dropout). Products never touch `.grad`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.graph import Node

Loss = Callable[[], Tensor]


@dataclass(frozen=True)
class ViewBlock:
    """A block that has parts of some parameters."""

    params: tuple[int, ...]
    """Indices of these."""
    views: tuple[Callable[[Tensor], Tensor], ...]
    """What of a tensor of each one's shape belongs to the block, as a view."""


Block = Sequence[int] | ViewBlock
"""Indices of the parameters that form a block, or parts of them."""


def indices(block: Block) -> Sequence[int]:
    """The parameters of a block.

    Returns:
        Their indices.
    """
    return block.params if isinstance(block, ViewBlock) else block


def views_in(block: Block, tensors: Sequence[Tensor]) -> list[Tensor]:
    """What of some tensors belongs to a block.

    Args:
        block: the block.
        tensors: one per parameter of the block, of its shape.

    Returns:
        Views.
    """
    if not isinstance(block, ViewBlock):
        return list(tensors)
    return [view(t) for view, t in zip(block.views, tensors, strict=True)]


Method = Literal["exact", "difference"]

DIFFERENTIATED_TWICE = (
    "not implemented", "differentiate twice", "double backward", "once_differentiable", "functions with out="
)  # fmt: skip
"""What the error of a kernel without a second derivative may say."""
ENDS = ("torch::autograd::NotImplemented", "torch::autograd::Error")
"""Where the graph of a gradient ends at such a kernel."""
TOLERANCE = 0.1
"""Relative difference above which second derivatives are not believed; differences are off by 1e-3."""


class NoSecondDerivativeError(RuntimeError):
    """A kernel of the model has a gradient, but no derivative of that."""

    def __init__(self) -> None:
        super().__init__(
            "a kernel of the model has no second derivative (flash attention, say); compute the loss inside "
            "diagnostics.undisturbed.frozen(model), or use method='difference'"
        )


def differences_may_help(error: Exception) -> bool:
    """Whether an error of second derivatives may be absent with differences of gradients.

    Kernels say in many ways that they have no second derivative, so the only proof is to try.

    Args:
        error: of an exact product, or of what precedes it.

    Returns:
        False for errors that have another cause: no memory, and reentrant activation checkpointing.
    """
    other = isinstance(error, torch.OutOfMemoryError) or "use_reentrant" in str(error)
    return isinstance(error, RuntimeError | NotImplementedError) and not other


@contextmanager
def _refused() -> Iterator[None]:
    """Say what the errors of such kernels mean."""
    try:
        yield
    except (RuntimeError, NotImplementedError) as error:
        if not any(words in str(error) for words in DIFFERENTIATED_TWICE):
            raise
        raise NoSecondDerivativeError from error


class Hessian:
    """Products with the Hessian of a loss.

    `"exact"` differentiates twice; the graph of the gradient is kept and reused for all products. A kernel that
    cannot be differentiated twice is refused, where torch may leave its terms out without a word; one that keeps it
    to itself, as its backward pass detaches, shows by how far products are `apart` from differences. `"difference"` is
    (g(x + e v) - g(x - e v)) / 2e with e = `step` |x| / |v|: no second derivative is asked of any kernel, no graph is
    kept; 1e-4 relative error in float32. Parameters come back bitwise.

    Args:
        loss: computes the loss.
        params: the parameters, all floating-point.
        method: how.
        step: of the difference, relative; 1e-3 if not given, and more where weights are too narrow for that.
        reduce: averages gradients and products over data-parallel ranks, in place.

    Raises:
        NoSecondDerivativeError: a kernel without a second derivative, with the exact method.
        RuntimeError: a loss that does not require gradients.
    """

    def __init__(
        self,
        loss: Loss,
        params: Sequence[Tensor],
        method: Method = "exact",
        *,
        step: float | None = None,
        reduce: Callable[[list[Tensor]], None] | None = None,
    ) -> None:
        self.loss, self.params, self.method, self.reduce = loss, list(params), method, reduce
        self.step = step_of(params) if step is None else step
        self.products = 0
        value = loss()
        self.value = value.detach()
        self._graph: list[Tensor] = []
        if method == "exact":
            with _refused():
                self._graph = self._gradient(value, create_graph=True)
            if any(_ends(node) for node in graph_nodes([value, *self._graph])):
                raise NoSecondDerivativeError
            self.gradient = [g.detach() for g in self._graph]
        else:
            self.gradient = self._gradient(value)
        if reduce is not None:
            self.average_over(reduce)

    def average_over(self, reduce: Callable[[list[Tensor]], None]) -> None:
        """From now on, have gradients and products averaged.

        Args:
            reduce: averages over data-parallel ranks, in place.
        """
        self.reduce = reduce
        self.gradient = [g.clone() for g in self.gradient]
        reduce(self.gradient)

    def _gradient(self, value: Tensor, *, create_graph: bool = False) -> list[Tensor]:
        grads = torch.autograd.grad(value, self.params, create_graph=create_graph, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(self.params, grads, strict=True)]

    def product(self, v: Sequence[Tensor], at: Sequence[int], want: Sequence[int] | None = None) -> list[Tensor]:
        """H v.

        Args:
            v: one tensor per index of `at`, shaped like the parameter; the vector is zero elsewhere.
            at: parameters the vector lives on.
            want: parameters whose rows of the product are wanted; all if not given.

        Returns:
            One tensor per index of `want`.

        Raises:
            NoSecondDerivativeError: a kernel without a second derivative that only now says so.
        """
        want = range(len(self.params)) if want is None else want
        self.products += 1
        out = self._exact(v, at, want) if self.method == "exact" else self._difference(v, at, want)
        if self.reduce is not None:
            out = [x.clone() for x in out]
            self.reduce(out)
        return out

    def _exact(self, v: Sequence[Tensor], at: Sequence[int], want: Sequence[int]) -> list[Tensor]:
        pairs = [(self._graph[i], x) for i, x in zip(at, v, strict=True) if self._graph[i].requires_grad]
        inputs = [self.params[i] for i in want]
        if not pairs:
            return [torch.zeros_like(p) for p in inputs]
        outputs, vectors = zip(*pairs, strict=True)
        with _refused():
            rows = torch.autograd.grad(outputs, inputs, vectors, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(p) if h is None else h.detach() for p, h in zip(inputs, rows, strict=True)]

    def _difference(self, v: Sequence[Tensor], at: Sequence[int], want: Sequence[int]) -> list[Tensor]:
        sides = _both_sides(
            [self.params[i] for i in at], v, self.step, self.params, lambda: self._gradient(self.loss())
        )
        if sides is None:
            return [torch.zeros_like(self.params[i]) for i in want]
        plus, minus, e = sides
        return [(plus[i] - minus[i]) / (2 * e) for i in want]

    # -- flat vectors over a block --------------------------------------------------------------------------------

    def flat(self, block: Block) -> Callable[[Tensor], Tensor]:
        """The diagonal block of H as an operator on flat vectors.

        Returns:
            A function from `[d]` to `[d]`.
        """
        at = indices(block)
        sizes = [x.numel() for x in self.weights(block)]

        def matvec(v: Tensor) -> Tensor:
            vectors = [torch.zeros_like(self.params[i]) for i in at]
            for part, x in zip(views_in(block, vectors), v.split(sizes), strict=True):
                part.copy_(x.view(part.shape))
            return torch.cat([h.reshape(-1) for h in views_in(block, self.product(vectors, at, at))])

        return matvec

    def weights(self, block: Block) -> list[Tensor]:
        """The weights of a block.

        Returns:
            Views of its parameters.
        """
        return views_in(block, [self.params[i] for i in indices(block)])

    def size(self, block: Block) -> int:
        """Number of weights of a block.

        Returns:
            d.
        """
        return sum(x.numel() for x in self.weights(block))

    def random(self, block: Block, generator: torch.Generator) -> Tensor:
        """A flat vector of random signs over a block.

        Args:
            block: the block.
            generator: on the parameters' device.

        Returns:
            `[d]`.
        """
        return torch.cat([signs(x, generator).reshape(-1) for x in self.weights(block)])

    def signs(self, block: Block, generator: torch.Generator) -> list[Tensor]:
        """Random signs over a block.

        Args:
            block: the block.
            generator: on the parameters' device.

        Returns:
            One tensor per parameter of the block, of its shape, zero outside the block.
        """
        vectors = [torch.zeros_like(self.params[i]) for i in indices(block)]
        for part in views_in(block, vectors):
            part.copy_(signs(part, generator))
        return vectors


def graph_nodes(tensors: Sequence[Tensor]) -> Iterator[Node]:
    """Every node of some tensors' graphs once.

    Args:
        tensors: roots of the graphs.

    Yields:
        Nodes.
    """
    todo = [t.grad_fn for t in tensors if t.grad_fn is not None]
    visited = set(todo)
    while todo:
        node = todo.pop()
        yield node
        more = {x for x, _ in node.next_functions if x is not None} - visited
        visited |= more
        todo += more


def _ends(node: Node) -> bool:
    """Whether derivatives end here; a `once_differentiable` kernel at the loss leaves no trace behind it."""
    backward = getattr(getattr(node, "_forward_cls", None), "backward", None)
    code = getattr(backward, "__code__", None)
    return node.name() in ENDS or getattr(code, "co_qualname", "") == "once_differentiable.<locals>.wrapper"


def apart(exact: Sequence[Tensor], near: Sequence[Tensor]) -> float:
    """How far products with the Hessian are from the same products by differences of gradients.

    Args:
        exact: exact products.
        near: by differences.

    Returns:
        |exact - near| / |near|; above `TOLERANCE`, a kernel leaves its second derivative out.
    """
    off = sum(float((a - b).double().square().sum()) for a, b in zip(exact, near, strict=True))
    size = sum(float(x.double().square().sum()) for x in near)
    return math.sqrt(off / size) if size else math.inf if off else 0.0


class GaussNewton:
    """Products with the Gauss-Newton matrix J^T L J of a loss of predictions z(x), J = dz/dx, L = d^2 loss / dz^2.

    It is the Hessian without the curvature of z, and positive semi-definite where the loss is convex in z. `"exact"`
    gets J v from the derivative of J^T w by w, and keeps the graph for all products: parameters must stay as they are.
    `"difference"` is (z(x + e v) - z(x - e v)) / 2e with e = `step` |x| / |v|, for kernels without a second derivative.

    Args:
        passes: computes the loss and the predictions it is made of.
        params: the parameters, all floating-point.
        method: how.
        step: of the difference, relative; 1e-3 if not given, and more where weights are too narrow for that.

    Raises:
        NoSecondDerivativeError: a kernel without a second derivative, with the exact method.
    """

    def __init__(
        self,
        passes: Callable[[], tuple[Tensor, Sequence[Tensor]]],
        params: Sequence[Tensor],
        method: Method = "exact",
        *,
        step: float | None = None,
    ) -> None:
        self.passes, self.params, self.method = passes, list(params), method
        self.step = step_of(params) if step is None else step
        if method == "exact":
            with _refused():
                self._open()
                self._w = [torch.zeros_like(z, requires_grad=True) for z in self._z]
                self._back = self._pulled(self._w, create_graph=True)
            if any(_ends(node) for node in graph_nodes([*self._z, *(g for g in self._back if g is not None)])):
                raise NoSecondDerivativeError

    def product(self, v: Sequence[Tensor]) -> list[Tensor]:
        """J^T L J v.

        Args:
            v: one tensor per parameter.

        Returns:
            Likewise.
        """
        moved = self.pushed(v)
        if self.method == "difference":
            self._open()
        slopes = [(g, x) for g, x in zip(self._slopes, moved, strict=True) if g.requires_grad]
        grads = self._pulled(_vector_product(slopes, self._z), retain_graph=True)
        return [torch.zeros_like(p) if g is None else g.detach() for p, g in zip(self.params, grads, strict=True)]

    def pushed(self, v: Sequence[Tensor]) -> list[Tensor]:
        """J v; parameters come back bitwise.

        Args:
            v: one tensor per parameter.

        Returns:
            One tensor per prediction that depends on the parameters.
        """
        if self.method == "exact":
            pairs = [(g, x) for g, x in zip(self._back, v, strict=True) if g is not None and g.requires_grad]
            with _refused():
                return _vector_product(pairs, self._w)
        with torch.no_grad():
            sides = _both_sides(self.params, v, self.step, self.params, lambda: self.passes()[1])
        if sides is None:
            return [torch.zeros_like(z) for z in self.passes()[1]]
        plus, minus, e = sides
        return [(a - b) / (2 * e) for a, b in zip(plus, minus, strict=True)]

    def _open(self) -> None:
        value, predictions = self.passes()
        self._z = [z for z in predictions if z.requires_grad]
        self._slopes = torch.autograd.grad(value, self._z, create_graph=True) if self._z else ()

    def _pulled(self, u: Sequence[Tensor], **how: bool) -> Sequence[Tensor | None]:
        if not self._z:
            return [None for _ in self.params]
        return torch.autograd.grad(self._z, self.params, u, allow_unused=True, **how)


def _vector_product(pairs: Sequence[tuple[Tensor, Tensor]], at: Sequence[Tensor]) -> list[Tensor]:
    """The sum over outputs of (d output / d at)^T v; zeros where nothing depends on it."""
    if not pairs:
        return [torch.zeros_like(x) for x in at]
    outputs, vectors = zip(*pairs, strict=True)
    grads = torch.autograd.grad(outputs, at, vectors, retain_graph=True, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(at, grads, strict=True)]


def _both_sides(
    moved: Sequence[Tensor], v: Sequence[Tensor], step: float, params: Sequence[Tensor], measure: Callable[[], Any]
) -> tuple[Any, Any, float] | None:
    """What is measured at x + e v and x - e v, and e = step |x| / |v|; None for v = 0. Parameters come back bitwise."""
    size = math.sqrt(sum(float(p.detach().double().square().sum()) for p in params))
    length = math.sqrt(sum(float(x.double().square().sum()) for x in v))
    if length == 0:
        return None
    e = step * size / length
    saved = [p.detach().clone() for p in moved]
    sides: list[Any] = []
    try:
        for sign in (1, -1):
            with torch.no_grad():
                for p, x, start in zip(moved, v, saved, strict=True):
                    p.copy_(start + sign * e * x)
            sides.append(measure())
    finally:
        with torch.no_grad():
            for p, start in zip(moved, saved, strict=True):
                p.copy_(start)
    return sides[0], sides[1], e


def step_of(params: Sequence[Tensor]) -> float:
    """The relative step of a difference that weights of their precision can take.

    Args:
        params: the parameters.

    Returns:
        1e-3, or sixteen units in the last place of the narrowest weights.
    """
    return max(1e-3, *(16 * torch.finfo(p.dtype).eps for p in params), 0.0)


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Random signs (Rademacher numbers).

    Args:
        like: gives shape, dtype and device.
        generator: on its device.

    Returns:
        A tensor of +1 and -1.
    """
    bits = torch.randint(2, like.shape, generator=generator, device=like.device, dtype=torch.int8)
    return bits.to(like.dtype).mul_(2).sub_(1)


def block_probes(
    hessian: Hessian, blocks: Sequence[Block], probes: Sequence[Sequence[Sequence[Tensor]]]
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Estimates of every block from probes that live within it, one product each.

    For independent signs z over block b: E z^T H_bb z = tr H_bb, E |H_cb z|^2 = |H_cb|_F^2, E z * H_bb z = diag H_bb.
    The variance of the trace is 2 (|H_bb|_F^2 - sum h_ii^2) per probe. A probe over all parameters would add the
    coupling, sum_{c != b} |H_bc|_F^2, which for a small block beside a large one is many times its trace.

    Args:
        hessian: over all parameters.
        blocks: a partition of the parameters, or some of them.
        probes: for every block, sign vectors over its parameters, zero outside the block.

    Returns:
        (for every block `[probes]`, z^T H z; for every block `[probes, blocks]`, |H_cb z|^2; the mean of z * H z per
        parameter, zero outside the blocks).
    """
    every = list(dict.fromkeys(i for block in blocks for i in indices(block)))
    traces, columns = [], []
    diagonal = [torch.zeros_like(p) for p in hessian.params]
    for block, vectors in zip(blocks, probes, strict=True):
        traces_of_block, squares = [], []
        for z in vectors:
            at = indices(block)
            hz = dict(zip(every, hessian.product(z, at, every), strict=True))
            products = [x * hz[i] for i, x in zip(at, z, strict=True)]
            for i, x in zip(at, products, strict=True):
                diagonal[i] += x / len(vectors)
            traces_of_block.append(torch.stack([x.sum(dtype=torch.float64) for x in products]).sum())
            of_blocks = (views_in(row, [hz[i] for i in indices(row)]) for row in blocks)
            rows = [[x.square().sum(dtype=torch.float64) for x in row] for row in of_blocks]
            squares.append(torch.stack([torch.stack(row).sum() for row in rows]))
        traces.append(torch.stack(traces_of_block).cpu())
        columns.append(torch.stack(squares).cpu())
    return traces, columns, diagonal


def hutchinson(
    hessian: Hessian, blocks: Sequence[Block], probes: Sequence[Sequence[Tensor]]
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Trace of every block, |H|_F^2 and the diagonal, by `block_probes`: one product per probe and block.

    Args:
        hessian: over all parameters.
        blocks: a partition of the parameters, or some of them.
        probes: sign vectors, one tensor per parameter each; a block takes its part of each.

    Returns:
        (traces `[probes, blocks]`, estimates of |H|_F^2 over the blocks `[probes]`, the mean of z * H z per parameter).
    """
    parts = [[[z[i] for i in indices(block)] for z in probes] for block in blocks]
    traces, columns, diagonal = block_probes(hessian, blocks, parts)
    return torch.stack(traces, 1), torch.stack([x.sum(1) for x in columns], 1).sum(1), diagonal


def coupling_squares(hessian: Hessian, blocks: Sequence[Block], probes: Sequence[Sequence[Sequence[Tensor]]]) -> Tensor:
    """|H_ij|_F^2 of every pair of blocks: a probe that lives in block j gives column j of the table.

    Args:
        hessian: over all parameters.
        blocks: a partition of the parameters.
        probes: for every block, sign vectors over its parameters.

    Returns:
        `[blocks, blocks]`, symmetric, float64.
    """
    return coupling_table(block_probes(hessian, blocks, probes)[1])


def coupling_table(columns: Sequence[Tensor]) -> Tensor:
    """|H_ij|_F^2 of every pair of blocks from the result of `block_probes`.

    Args:
        columns: for every block j `[probes, blocks]`, |H_ij z|^2.

    Returns:
        `[blocks, blocks]`, symmetric, float64.
    """
    table = torch.stack([column.mean(0) for column in columns], 1)
    return (table + table.T) / 2


def coupling(squares: Tensor) -> Tensor:
    """C_ij = |H_ij|_F / sqrt(|H_ii|_F |H_jj|_F); one on the diagonal, not bounded by one elsewhere.

    Args:
        squares: |H_ij|_F^2, `[blocks, blocks]`.

    Returns:
        `[blocks, blocks]`.
    """
    norms = squares.diagonal().sqrt()
    return squares.sqrt() / (norms[:, None] * norms[None, :]).sqrt()


def block_diagonal_share(squares: Tensor) -> float:
    """The share of |H|_F^2 that lies in the diagonal blocks.

    Returns:
        In [0, 1].
    """
    return float(squares.diagonal().sum() / squares.sum())


def exact_block(
    hessian: Hessian, index: int, rows: slice | None = None, columns: slice = slice(None), *, chunk: int = 32
) -> Tensor:
    """The entries of a diagonal block, by one product per column: of a parameter, or of some of its rows.

    Args:
        hessian: exact or by differences.
        index: of the parameter.
        rows: of the parameter (a head, a neuron, a token); all if not given.
        columns: of these rows.
        chunk: columns per batched product.

    Returns:
        `[d, d]`, symmetrised.
    """
    p = hessian.params[index]
    ids = torch.arange(p.numel(), device=p.device).view(p.shape)
    ids = ids if rows is None else ids[rows]
    ids = (ids.flatten(1)[:, columns] if ids.ndim > 1 else ids).reshape(-1)
    rows_of_block = []
    for part in ids.split(chunk):
        v = torch.zeros(len(part), p.numel(), dtype=p.dtype, device=p.device)
        v[torch.arange(len(part), device=p.device), part] = 1.0
        rows_of_block.append(_batched(hessian, index, v.view(len(part), *p.shape)).flatten(1)[:, ids])
    block = torch.cat(rows_of_block)
    return (block + block.T) / 2


def _batched(hessian: Hessian, index: int, v: Tensor) -> Tensor:
    if hessian.method == "difference" or hessian.reduce is not None:
        return torch.stack([hessian.product([x], [index], [index])[0] for x in v])
    g, p = hessian._graph[index], hessian.params[index]
    if not g.requires_grad:
        return torch.zeros_like(v)
    with _refused():
        rows = torch.autograd.grad(g, p, v, retain_graph=True, allow_unused=True, is_grads_batched=True)[0]
    hessian.products += len(v)
    return torch.zeros_like(v) if rows is None else rows


def diagonal_dominance(block: Tensor) -> Tensor:
    """Diagonal dominance tau = sum_i |h_ii| / sum_ij |h_ij| (Zhang et al. 2024, arXiv:2406.16793).

    Args:
        block: `[..., d, d]`.

    Returns:
        `[...]`, in [1/d, 1] for positive semi-definite blocks.
    """
    return block.diagonal(dim1=-2, dim2=-1).abs().sum(-1) / block.abs().sum((-2, -1))


def condition_number(block: Tensor) -> Tensor:
    """The ratio max |lambda| / min |lambda| of a symmetric block.

    Returns:
        `[...]`.
    """
    values = torch.linalg.eigvalsh(block).abs()
    return values.amax(-1) / values.amin(-1)


def conditioning_ratio(block: Tensor, second_moment: Tensor) -> Tensor:
    """What Adam's scaling does to the condition number: r = kappa(D H) / kappa(H) with D = diag(1 / sqrt(v)).

    The eigenvalues of D H are those of D^1/2 H D^1/2 (arXiv:2406.16793, eq. of r).

    Args:
        block: H, `[d, d]`, symmetric.
        second_moment: v, `[d]`, positive.

    Returns:
        A scalar; below one, Adam's scaling helps.
    """
    root = second_moment.pow(-0.25)
    return condition_number(root[:, None] * block * root[None, :]) / condition_number(block)


def preconditioned(matvec: Callable[[Tensor], Tensor], root: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """P^-1/2 H P^-1/2 as an operator on flat vectors.

    Args:
        matvec: H.
        root: applies P^-1/2, symmetric.

    Returns:
        The operator.
    """
    return lambda v: root(matvec(root(v)))


def stability_threshold(lr: float, beta1: float) -> float:
    """The sharpness at which full-batch preconditioned descent with averaged momentum turns unstable.

    (2 + 2 b1) / ((1 - b1) lr), Cohen et al. 2022, arXiv:2207.14484; 2 / lr without momentum.

    Returns:
        The largest stable eigenvalue of P^-1 H.
    """
    return (2 + 2 * beta1) / ((1 - beta1) * lr)


def directional(hessian: Hessian, direction: Sequence[Tensor]) -> tuple[float, float]:
    """Curvature along a direction, by one product.

    Args:
        hessian: over all parameters.
        direction: u, one tensor per parameter.

    Returns:
        (u^T H u / u^T u, g^T u).
    """
    hu: Any = hessian.product(direction, range(len(hessian.params)))
    inner = [
        torch.stack([
            (u * h).sum(dtype=torch.float64),
            u.square().sum(dtype=torch.float64),
            (u * g).sum(dtype=torch.float64),
        ])
        for u, h, g in zip(direction, hu, hessian.gradient, strict=True)
    ]
    curved, square, slope = torch.stack(inner).sum(0).tolist()
    return curved / square if square else math.nan, slope
