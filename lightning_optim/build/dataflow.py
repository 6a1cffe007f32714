"""Facts about weights, read from one forward pass that is watched operator by operator.

Every tensor carries two sets of weights: those whose products it is made of with no other weight in between (`near`),
and all it depends on (`far`). From these follow which layers are outputs and routers, how a weight is contracted, how
many matrices it holds, and the parts in which its outputs are read. Values do not matter: on the meta device a pass
takes neither weights nor memory nor arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from lightning_optim.build import meta_answers
from lightning_optim.core.matrix_views import Blocks

MATMUL = frozenset((
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "mv",
    "addmv",
    "addbmm",
    "_grouped_mm",
    "_scaled_mm",
    "linear",
    "_addmm_activation",
))
ADDENDS = frozenset(("addmm", "baddbmm", "addmv", "addbmm", "_addmm_activation"))
"""Products whose first argument is added to them."""
OTHER = {
    "convolution": "conv",
    "_convolution": "conv",
    "convolution_overrideable": "conv",
    "embedding": "embedding",
    "_embedding_bag": "embedding",
    "_embedding_bag_forward_only": "embedding",
    "lstm": "rnn",
    "gru": "rnn",
    "rnn_tanh": "rnn",
    "rnn_relu": "rnn",
    "mkldnn_rnn_layer": "rnn",
    "_thnn_fused_lstm_cell": "rnn",
    "_thnn_fused_gru_cell": "rnn",
}
CHOICES = frozenset(("topk", "argmax", "sort", "max", "argsort", "kthvalue"))
SELECTIONS = frozenset(("index", "index_select", "gather", "slice", "cat", "stack", "where", "_to_copy", "clone"))
VIEWS = frozenset(("detach", "_unsafe_view", "reshape", "split_with_sizes", "unsafe_split", "_reshape_alias"))


@dataclass
class WeightFacts:
    """What a forward pass did with one parameter of two or more dimensions."""

    shape: tuple[int, ...]
    kinds: set[str] = field(default_factory=set)
    """`matmul`, `conv`, `embedding`, `rnn`; empty if the pass did not use it in a product."""
    transposed: set[bool] = field(default_factory=set)
    """Whether the side that was contracted is the last but one, rather than the last."""
    products: set[tuple[int, int]] = field(default_factory=set)
    """(outputs, inputs) of one product."""
    is_indexed: bool = False
    """Some of its rows or elements are selected by others."""
    is_batched: bool = False
    """A product takes several of its matrices at once."""
    before: int = 0
    """The weights it depends on, as bits."""
    is_head: bool = False
    """Its outputs reach those of the model through no other weight, and no such weight is before or after it."""
    is_router: bool = False
    """From its outputs alone something is chosen, along them."""
    attends: bool = False
    """Queries and keys both come from it alone."""
    gates: bool = False
    """Parts of its outputs are multiplied with each other."""
    head_size: int | None = None
    """Width of the queries in the first product with the keys: of one attention head."""
    parts: set[tuple[int, tuple[tuple[int, int], ...], int]] = field(default_factory=set)
    """(first row, (stride, size) of the others, rows) of what reads its outputs."""

    def cut(self) -> Blocks:
        """The parts in which its outputs are read.

        Returns:
            As the option `blocks`; None if they are read whole, or in no regular way.
        """
        rows_of: set[frozenset[int]] = set()
        total = 0
        for offset, dims, n in self.parts:
            rows = [offset]
            for stride, size in dims:
                rows = [r + stride * i for i in range(size) for r in rows]
            rows_of.add(frozenset(rows))
            total = n
        largest = [rows for rows in rows_of if not any(rows < other for other in rows_of)]
        counted = sum(map(len, largest))
        if not 2 <= len(largest) <= 3 or counted != total or len(frozenset().union(*largest)) != counted:
            return None
        letter_of = {r: "abc"[i] for i, rows in enumerate(sorted(largest, key=min)) for r in rows}
        return blocks_of_letters("".join(letter_of[r] for r in sorted(letter_of)))


def blocks_of_letters(letters: str) -> Blocks:
    """Rows by one letter each, as the option `blocks`.

    Args:
        letters: `aaaabbcc` is (4, 2, 2), `aabbcc` 3, and `aabcaabc`, which repeats, (2, 1, 1).

    Returns:
        None if nothing repeats.
    """
    runs = [(letter, len(list(rows))) for letter, rows in groupby(letters)]
    period = len(set(letters))
    if len(runs) % period or any(runs[i] != runs[i % period] for i in range(len(runs))):
        return None
    sizes = tuple(n for _, n in runs[:period])
    return period if len(runs) == period and len(set(sizes)) == 1 else sizes


def watch(module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[int, WeightFacts]:
    """Run a module once and say what it did with its weights.

    Args:
        module: with parameters on the meta device, or with values; its tensors are not written where it is a `Twin`.
        args: positional arguments of the forward pass.
        kwargs: the others.

    Returns:
        Facts by the id of the parameter, for those of two or more dimensions with more than one side above one.

    Raises:
        Exception: whatever the forward pass raises.
    """
    flow = Dataflow(module)
    with torch.enable_grad(), torch.random.fork_rng(devices=[]), flow:
        outputs = module(*args, **kwargs)
    flow.find_heads(outputs)
    return {id(p): facts for p, facts in zip(flow.params, flow.weights, strict=True)}


class Dataflow(TorchDispatchMode):
    """Labels the storage of every tensor with the weights it comes from, as bits.

    Args:
        module: whose parameters are the weights.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.params: list[Tensor] = []
        self.weights: list[WeightFacts] = []
        self._weight_in: dict[int, tuple[int, tuple[int, ...], tuple[int, ...]]] = {}
        """By storage: index of the weight that it holds, shape and strides."""
        self._labels: dict[int, tuple[int, int]] = {}
        """By storage: `near` and `far`."""
        self._products: dict[int, tuple[int, int]] = {}
        """By storage: the weight whose outputs, all of them, it holds, and how many these are."""
        self._alive: list[Any] = []  # a storage that is freed could be another tensor's
        self._experts = {p.shape[0] for p in module.parameters() if not is_lazy(p) and p.ndim == 3}
        for p in module.parameters():
            self._add(p)

    def _add(self, p: Tensor) -> None:
        if not is_lazy(p) and p.ndim > 1 and sum(s > 1 for s in p.shape) > 1:
            self._weight_in.setdefault(_storage(p), (len(self.weights), tuple(p.shape), p.stride()))
            self.params.append(p)
            self.weights.append(WeightFacts(tuple(p.shape)))

    # -- every operator -------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator, and label what it gives."""
        kwargs, name = kwargs or {}, func.overloadpacket.__name__
        tensors = _tensors((args, kwargs))
        if name != "copy_" and len({t.is_meta for t in tensors}) > 1:  # values last until they meet a weight
            self._alive += tensors
            args, kwargs = tree_map(self._to_meta, (args, kwargs))
            tensors = _tensors((args, kwargs))
        out = meta_answers.answer(name, args, kwargs) if any(t.is_meta for t in tensors) else None
        out = func(*args, **kwargs) if out is None else out
        outs = _tensors(out)
        self._alive += outs
        holders = [t for t in tensors if _storage(t) in self._weight_in]
        data = [t for t in tensors if _storage(t) not in self._weight_in]
        near, far = self._union(data)
        product = None
        if holders and (name in MATMUL or name in OTHER):
            bits = self._record_product(name, args, holders, outs, near | far)
            product = bits.bit_length() - 1 if bits and bits & (bits - 1) == 0 else None
            near, far = bits, near | far | bits
        elif holders and (not data or name in SELECTIONS):
            if name in ("index", "index_select", "gather"):
                self.weights[self._weight_in[_storage(holders[0])][0]].is_indexed = True
            self._inherit(holders[0], outs)
            return out
        elif near and not holders:
            self._note_use(name, args, data, near)
        self._note_parts(func, name, data, outs, product)
        written = [args[0]] if name.endswith("_") and args and isinstance(args[0], Tensor) else []
        for t in outs + written:
            key = _storage(t)
            if key not in self._weight_in:
                a, b = self._labels.get(key, (0, 0))
                self._labels[key] = (a | near, b | far)
        return out

    def _union(self, tensors: Iterable[Tensor]) -> tuple[int, int]:
        near = far = 0
        for t in tensors:
            a, b = self._labels.get(_storage(t), (0, 0))
            near, far = near | a, far | b
        return near, far

    def _near(self, t: Any) -> int:
        return self._labels.get(_storage(t), (0, 0))[0] if isinstance(t, Tensor) else 0

    def _inherit(self, holder: Tensor, outs: Sequence[Tensor]) -> None:
        """A copy, a cast or some rows of a weight still are the weight."""
        index = self._weight_in[_storage(holder)][0]
        for t in outs:
            self._weight_in.setdefault(_storage(t), (index, tuple(t.shape), t.stride()))

    def _to_meta(self, t: Any) -> Any:
        if not isinstance(t, Tensor) or t.is_meta:
            return t
        out = t.to("meta")
        self._labels[_storage(out)] = self._labels.get(_storage(t), (0, 0))
        self._alive.append(out)
        return out

    # -- products with weights ------------------------------------------------------------------------------------

    def _record_product(
        self, name: str, args: Sequence[Any], holders: Sequence[Tensor], outs: Sequence[Tensor], before: int
    ) -> int:
        """Facts of the weights in a product; their bits."""
        bits = 0
        added = args[0] if name in ADDENDS else None  # of W + BA: the sum is still W
        if added is not None and any(t is added for t in holders) and outs:
            self._inherit(added, outs[:1])
        operands = [t for t in holders if t is not added]
        factors = [t for t in args if isinstance(t, Tensor) and t is not added]
        for t in operands:
            index, shape, stride = self._weight_in[_storage(t)]
            facts = self.weights[index]
            bits |= 1 << index
            facts.before |= before
            if name in OTHER:
                facts.kinds.add(OTHER[name])
                continue
            facts.kinds.add("matmul" if len(operands) == 1 else "product")
            if t.ndim > 1:
                inner, outer = (-1, -2) if factors and factors[0] is t else (-2, -1)
                dims = [d for d in range(len(shape)) if stride[d] == t.stride(inner) and shape[d] >= t.size(inner)]
                if dims and t.size(inner) > 1 and len(operands) == 1:
                    facts.transposed.add(dims[-1] != len(shape) - 1)
                facts.products.add((t.size(outer), t.size(inner)))
                facts.is_batched |= t.ndim > 2
        return bits

    # -- what is done with their outputs --------------------------------------------------------------------------

    def _note_use(self, name: str, args: Sequence[Any], data: Sequence[Tensor], near: int) -> None:
        """Routers, and fused layers whose parts meet again: queries and keys, gates and what they gate."""
        single = near & (near - 1) == 0
        facts = self.weights[near.bit_length() - 1]
        if name in CHOICES and single:
            places = args[1 if name != "topk" else 2 :]
            dim = next((x for x in places if isinstance(x, int) and not isinstance(x, bool)), -1)
            x = data[0]
            outputs = {rows for rows, _ in facts.products} | self._experts
            chosen = x.is_floating_point() and x.ndim > 0 and x.shape[dim] in outputs
            facts.is_router |= "matmul" in facts.kinds and chosen
        elif name in ("bmm", "baddbmm") or "attention" in name:
            queries, keys = args[1:3] if name == "baddbmm" else args[:2]
            first, second = self._near(queries), self._near(keys)
            if first and first == second and first & (first - 1) == 0:
                facts = self.weights[first.bit_length() - 1]
                facts.attends = True
                facts.head_size = facts.head_size or queries.shape[-1]
        elif name in ("mul", "mul_") and single and len(data) == 2:
            first, second = (self._near(x) for x in args[:2])
            facts.gates |= bool(first) and first == second and data[0].shape == data[1].shape
        elif name == "glu" and single:
            facts.gates = True
            n, dim = data[0].shape[-1], args[1] if len(args) > 1 else -1
            if dim in (-1, data[0].ndim - 1) and n % 2 == 0:
                facts.parts |= {(0, ((1, n // 2),), n), (n // 2, ((1, n // 2),), n)}

    def _note_parts(
        self, func: Any, name: str, data: Sequence[Tensor], outs: Sequence[Tensor], product: int | None
    ) -> None:
        """The views of a weight's outputs of which anything but another view is made."""
        if product is not None and name in MATMUL:
            self._products.setdefault(_storage(outs[0]), (product, outs[0].shape[-1]))
            return
        if func.is_view or name in VIEWS or name == "glu":
            return
        for t in data:
            index, n = self._products.get(_storage(t), (None, 0))
            if index is None or not t.numel():
                continue
            if t.numel() == t.untyped_storage().nbytes() // t.element_size():
                same = [o for o in outs if o.numel() == t.numel() and t.is_contiguous() and o.is_contiguous()]
                same = [o for o in same if _storage(o) not in self._weight_in]
                for o in same:  # a bias, a clamp, a cast: still the outputs
                    self._products.setdefault(_storage(o), (index, n))
                if not same:
                    self.weights[index].parts.add((0, ((1, n),), n))
                continue
            dims = sorted((st, sz) for sz, st in zip(t.shape, t.stride(), strict=True) if 0 < st < n and sz > 1)
            self.weights[index].parts.add((int(t.storage_offset()) % n, tuple(dims), n))

    # -- the model's outputs --------------------------------------------------------------------------------------

    def find_heads(self, outputs: Any) -> None:
        """Mark the weights that give the model's outputs.

        Args:
            outputs: of the forward pass.
        """
        for t in final_outputs(outputs):
            near = self._near(t)
            members = [i for i in range(len(self.weights)) if near >> i & 1]
            for i in members:
                w = self.weights[i]
                alone = not any(j != i and (w.before >> j & 1 or self.weights[j].before >> i & 1) for j in members)
                after_another = w.before & ~(1 << i) != 0
                w.is_head |= alone and after_another and "embedding" not in w.kinds and _is_linear(w)


INSIDE = (
    "hidden",
    "attentions",
    "past_key",
    "router",
    "encoder_last",
    "pooler",
    "embeds",
    "mems",
    "_state",
    "cross_att",
    "cache",
)
"""Parts of the names that models of Transformers give to outputs that are not trained for themselves."""


def final_outputs(outputs: Any) -> Iterator[Tensor]:
    """What a model is trained for: its loss, or those outputs that are not states from inside.

    Args:
        outputs: of a forward pass; of a mapping, keys tell.

    Yields:
        Floating-point tensors.
    """
    if hasattr(outputs, "keys"):
        loss = outputs.get("loss") if hasattr(outputs, "get") else None
        keys = [k for k in outputs.keys() if k == "last_hidden_state" or not any(x in k for x in INSIDE)]
        outputs = [loss] if isinstance(loss, Tensor) else [outputs[k] for k in keys]
    if isinstance(outputs, (list, tuple)):
        for x in outputs:
            yield from final_outputs(x)
    else:
        yield from (t for t in _tensors(outputs) if t.is_floating_point())


def _is_linear(facts: WeightFacts) -> bool:
    """Whether a weight is a linear layer's: a matrix, or a convolution of single points."""
    return "matmul" in facts.kinds or ("conv" in facts.kinds and all(s == 1 for s in facts.shape[2:]))


def _storage(t: Tensor) -> int:
    return t.untyped_storage()._cdata


def _tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]
