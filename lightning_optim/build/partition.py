"""One partition of a model's weights into blocks, as views of its parameters, for whatever looks at blocks.

A block is a layer, a matrix, an attention head, a neuron, a token or an expert. Parameters are turned and cut as their
roles say, so that a neuron is an output whether a layer stores outputs x inputs or inputs x outputs, and a fused layer
of queries, keys and values is three matrices.
"""

from __future__ import annotations

import functools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

import numpy as np
from torch import Tensor

from lightning_optim.build.param_role import MATRIX_ROLES, ParamRole
from lightning_optim.core.matrix_views import Blocks, MatrixBlock, split_blocks, transpose_if

PartitionKind = Literal["layer", "matrix", "head", "neuron", "token", "expert"]
View = Callable[[Tensor], Tensor]


class ParamView(NamedTuple):
    """A part of a parameter."""

    param: str
    view: View
    """Gives the part of a tensor of the parameter's shape, as a view."""


class ModelBlock(NamedTuple):
    """Weights that form a block."""

    name: str
    views: tuple[ParamView, ...]


def partition(
    params: Mapping[str, Tensor], traits: Mapping[str, ParamRole], kind: PartitionKind, patterns: Sequence[str] = ("*",)
) -> list[ModelBlock]:
    """Divide parameters into blocks.

    * `layer`: all parameters below the same module of a numbered list, or of the same module outside of lists;
    * `matrix`: each matrix of a parameter of two or more dimensions as its role cuts it, the experts of a stack one by
      one;
    * `head`: the rows of an attention head in each matrix whose heads are known;
    * `neuron`: each row of outputs of a matrix, but for embeddings and output layers;
    * `token`: each row of embeddings and output layers;
    * `expert`: all matrices of an expert, in a stack or in a numbered list of experts.

    Args:
        params: the parameters by name.
        traits: what each is, from `roles`.
        kind: of the blocks.
        patterns: shell-style globs of names; parameters that match none are left out.

    Returns:
        The blocks in the order of the parameters. What is of another kind (a bias, for `neuron`) is in none of them.
    """
    found: dict[str, list[ParamView]] = defaultdict(list)
    for name, p in params.items():
        if name in traits and any(fnmatchcase(name, pattern) for pattern in patterns):
            for block, view in VIEWS_BY_KIND[kind](name, p, traits[name]):
                found[block].append(ParamView(name, view))
    return [ModelBlock(name, tuple(views)) for name, views in found.items()]


NamedViews = Iterator[tuple[str, View]]
"""Names of blocks, and what of a parameter belongs to each."""


def _layer(name: str, p: Tensor, trait: ParamRole) -> NamedViews:
    path = re.match(r"(.*?\.\d+)\.", name)
    yield path[1] if path else name.rpartition(".")[0] or name, _whole


def _matrices(name: str, p: Tensor, trait: ParamRole, cut: Blocks) -> NamedViews:
    parts = split_blocks(tuple(p.shape), cut, transposed=trait.transposed)
    every = [(part, i) for part in parts for i in range(part.dims[0])]
    for number, (part, i) in enumerate(every):
        label = name if len(every) == 1 else f"{name}[{number}]"
        yield label, functools.partial(_matrix, part=part, index=i, transposed=trait.transposed)


def _matrix_parts(name: str, p: Tensor, trait: ParamRole) -> NamedViews:
    if trait.role != "vector":
        yield from _matrices(name, p, trait, trait.blocks)


def _heads(name: str, p: Tensor, trait: ParamRole) -> NamedViews:
    if trait.heads and p.ndim == 2:
        yield from _matrices(name, p, trait, trait.heads)


def _rows(name: str, p: Tensor, trait: ParamRole) -> NamedViews:
    turned = transpose_if(p, trait.transposed)
    is_stack = p.ndim == 3
    lead = turned.shape[:2] if is_stack else turned.shape[:1]
    for i in range(math.prod(lead)):
        yield f"{name}[{i}]", functools.partial(_row, index=divmod(i, lead[-1]) if is_stack else (i,), trait=trait)


def _neurons(name: str, p: Tensor, trait: ParamRole) -> NamedViews:
    if p.ndim > 1 and trait.role in MATRIX_ROLES | {"conv", "other", "router"}:
        yield from _rows(name, p, trait)


def _tokens(name: str, p: Tensor, trait: ParamRole) -> NamedViews:
    if p.ndim > 1 and trait.role in ("embedding", "head"):
        yield from _rows(name, p, trait)


def _experts(name: str, p: Tensor, trait: ParamRole) -> NamedViews:
    if trait.role == "experts" and p.ndim == 3:
        layer = name.rpartition(".")[0]
        for i in range(len(p)):
            yield f"{layer}[{i}]", functools.partial(_first, index=i)
    elif path := re.match(r"(.*experts)\.(\d+)\.", name):
        yield f"{path[1]}[{path[2]}]", _whole


VIEWS_BY_KIND: dict[PartitionKind, Callable[[str, Tensor, ParamRole], NamedViews]] = {
    "layer": _layer,
    "matrix": _matrix_parts,
    "head": _heads,
    "neuron": _neurons,
    "token": _tokens,
    "expert": _experts,
}


def _whole(t: Tensor) -> Tensor:
    return t


def _first(t: Tensor, index: int) -> Tensor:
    return t[index]


def _row(t: Tensor, index: tuple[int, ...], trait: ParamRole) -> Tensor:
    return transpose_if(t, trait.transposed)[index]


def _matrix(t: Tensor, part: MatrixBlock, index: int, transposed: bool) -> Tensor:
    """One matrix of a part of a parameter, as a view."""
    view = part.view_of(t, transposed)
    if part.rows is None:  # equal blocks of the rows of a matrix, of a stack of them, or of a kernel
        above = 1 if view.ndim == 3 else 0
        view = view.unflatten(above, (part.dims[0] // math.prod(view.shape[:above]), -1))
    lead = next(k for k in range(1, view.ndim) if math.prod(view.shape[:k]) == part.dims[0])
    return view[np.unravel_index(index, view.shape[:lead])]
