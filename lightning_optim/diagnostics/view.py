"""The parameters of a training run: each with its name, role, group and rule, and its matrices gathered."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_optim.core import matrix_views
from lightning_optim.core.parallel import sharding
from lightning_optim.core.param_groups import blocks_of, rule_of
from lightning_optim.core.rule import Rule
from lightning_optim.diagnostics.report import before_exchange

MAX_ROLES = 10
NAMED_ROLES = ("embedding", "head", "router", "conv", "experts", "lora_a", "lora_b", "lora_embedding")
"""Roles of a group that are shown as they are; other matrices are called by the module that holds them."""
MOMENTA = ("exp_avg", "momentum_buffer", "momentum")


@dataclass(frozen=True)
class Entry:
    """One trained parameter."""

    name: str
    param: Tensor
    role: str
    group: dict[str, Any]
    rule: Rule | None
    parts: tuple[matrix_views.MatrixBlock, ...]
    transposed: bool

    @property
    def dims(self) -> matrix_views.StackShape:
        """The parameter as a stack of matrices; its first part, where they are not all equal."""
        return self.parts[0].dims

    @property
    def is_matrix(self) -> bool:
        """Whether it has two sides."""
        return self.param.ndim > 1 and min(self.dims[1:]) > 1

    def stacks(self, t: Tensor) -> list[Tensor]:
        """A tensor of the parameter's shape as matrices, outputs as rows.

        Args:
            t: whole.

        Returns:
            `[b, m, n]` of each part.
        """
        return [part.view_of(t, self.transposed).reshape(part.dims) for part in self.parts]


def whole(t: Tensor) -> Tensor:
    """A tensor gathered from its shards; collective where there are any.

    Returns:
        A plain tensor.
    """
    if is_sharded(t):
        before_exchange()
    return sharding.place(t.detach(), None)


def entries(model: nn.Module, optimizer: torch.optim.Optimizer) -> list[Entry]:
    """Every trained parameter of an optimizer, ours or not.

    Args:
        model: gives the names.
        optimizer: gives groups and rules.

    Returns:
        In the order of the groups.
    """
    names: dict[int, str] = {id(p): n for n, p in model.named_parameters()}
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, (nn.Embedding, nn.EmbeddingBag))}
    rows: list[tuple[str, Tensor, str, dict[str, Any]]] = []
    for k, group in enumerate(optimizer.param_groups):
        group_names = group.get("param_names", [])
        for i, p in enumerate(group["params"]):
            if p.requires_grad and p.numel():
                name = names.get(id(p)) or (group_names[i] if i < len(group_names) else f"group{k}.{i}")
                role = "vector" if p.ndim < 2 else "embedding" if id(p) in embeddings else str(group.get("role", ""))
                rows.append((name, p, role, group))
    labels = role_labels([(name, role) for name, _, role, _ in rows], [p.numel() for _, p, _, _ in rows])
    out = []
    for (name, p, _, group), label in zip(rows, labels, strict=True):
        rule = rule_of(group) if "rule" in group else None
        parts, is_transposed = (
            (matrix_views.split_blocks(p.shape), False) if rule is None else blocks_of(rule, group, p.shape)
        )
        out.append(Entry(name, p, label, group, rule, parts, is_transposed))
    return out


def role_labels(named: Sequence[tuple[str, str]], sizes: Sequence[int], limit: int = MAX_ROLES) -> list[str]:
    """Short labels, shared by the parameters with the same role in different layers.

    Args:
        named: (name, role of the partition) of every parameter.
        sizes: number of weights of each.
        limit: of different labels; the smallest roles beyond it are called "other".

    Returns:
        A label per parameter: "q_proj", "attn.c_proj", "embedding".
    """
    paths = [[part for part in name.split(".")[:-1] if not part.isdigit()] or [name] for name, _ in named]
    distinct = {tuple(path) for path, (_, role) in zip(paths, named, strict=True) if _open(role)}

    def label(path: list[str]) -> str:
        for length in range(1, len(path)):
            if sum(list(other[-length:]) == path[-length:] for other in distinct) == 1:
                return ".".join(path[-length:])
        return ".".join(path)

    out = [label(path) if _open(role) else role for path, (_, role) in zip(paths, named, strict=True)]
    total: Counter[str] = Counter()
    for text, size in zip(out, sizes, strict=True):
        total[text] += size
    largest = {text for text, _ in total.most_common(limit if len(total) <= limit else limit - 1)}
    return [text if text in largest else "other" for text in out]


def _open(role: str) -> bool:
    return role not in NAMED_ROLES and role != "vector"


def by_role(entries: Sequence[Entry]) -> dict[str, list[int]]:
    """Indices of the parameters of each role.

    Returns:
        Role to indices, in order of first appearance.
    """
    out: defaultdict[str, list[int]] = defaultdict(list)
    for i, entry in enumerate(entries):
        out[entry.role].append(i)
    return dict(out)


def is_sharded(p: Tensor) -> bool:
    """Whether a parameter is sharded over several ranks.

    Returns:
        True under FSDP2.
    """
    return sharding.sharding_of(p) is not None


def share_of(p: Tensor, ranks: int) -> float:
    """The weight of this rank's sum over a parameter in a sum over all ranks.

    Args:
        p: a parameter.
        ranks: how many there are.

    Returns:
        1 / ranks for a parameter that every rank has whole, 1 / replicas for a sharded one.
    """
    placement = sharding.sharding_of(p)
    return 1 / ranks if placement is None else placement.size / ranks


def reduce_local(entries: Sequence[Entry], part: Callable[[Entry], Tensor | None], ranks: int) -> Tensor:
    """Sums over the elements of every parameter, this rank's share of them.

    Args:
        entries: the parameters.
        part: gives a sum over this rank's elements, or None for a parameter that has none.
        ranks: how many there are.

    Returns:
        `[len(entries)]`, float64; to be added up over ranks.
    """
    device = sharding.local(entries[0].param).device
    zero = torch.zeros((), dtype=torch.float64, device=device)
    sums = [part(e) for e in entries]
    weights = torch.tensor([share_of(e.param, ranks) for e in entries], dtype=torch.float64)
    return torch.stack([zero if s is None else s.to(zero) for s in sums]) * weights.to(device)


def unwrap_optimizer(optimizer: Any) -> Optimizer:
    """The optimizer inside the wrappers of a framework: Accelerate's, DeepSpeed's or Lightning's.

    Args:
        optimizer: an optimizer, wrapped or not.

    Returns:
        The innermost one, torch's or ours.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer


def momentum_buffer(entry: Entry, state: dict[str, Any]) -> Tensor | None:
    """The first moment an optimizer keeps, by the usual names.

    Returns:
        A tensor of the parameter's shape (in a rotated basis for some rules), empty on ranks that do not hold it;
        None where there is none.
    """
    for key in MOMENTA:
        value = state.get(key)
        if isinstance(value, Tensor) and (value.shape == entry.param.shape or value.numel() == 0):
            return value
    return None


def bases_of(e: Entry, state: dict[str, Any]) -> list[tuple[str, Tensor]]:
    """Orthonormal bases an optimizer projects or rotates this parameter's gradient with.

    Returns:
        (side, columns `[b, m, r]` for "left" or `[b, n, r]` for "right"); none on ranks that do not hold them, and
        none of a parameter with matrices of several sizes.
    """
    if e.rule is None or len(e.parts) > 1:
        return []
    out, (b, m, n) = [], e.dims
    specs = e.rule.state_specs(m, n, vector=e.param.ndim < 2)
    for key in e.rule.preconditioners:
        value = state.get(key)
        if key not in specs or not isinstance(value, Tensor) or not value.numel():
            continue
        letters = specs[key].letters
        is_transposed = letters[0] == "r"
        side = {"m": "left", "n": "right"}.get(letters[1] if is_transposed else letters[0])
        q = whole(value)
        q = q.reshape(b, *q.shape[-2:])
        q = q.mT if is_transposed else q
        rows = {"left": m, "right": n}.get(side or "")  # K-FAC's have room for a bias
        if side is not None and q.shape[-1] <= q.shape[-2] == rows and _orthonormal(q):
            out.append((side, q))
    return out


def _orthonormal(q: Tensor) -> bool:
    """Whether the columns have length one and the first few are at right angles."""
    few = q[..., : min(4, q.shape[-1])]
    eye = torch.eye(few.shape[-1], dtype=q.dtype, device=q.device)
    return bool(((few.mT @ few - eye).abs() < 1e-2).all())
