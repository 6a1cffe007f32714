"""What one forward pass tells of weights, on modules of which it is known."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_optim.build.dataflow import WeightFacts, blocks_of_letters, final_outputs, watch
from lightning_optim.build.module_twin import Twin

D = 8


class Layers(nn.Module):
    """Embedding, fused attention, gated layer, router with experts, head, each from plain parameters."""

    table: Tensor
    qkv: Tensor
    back: Tensor
    turned: Tensor
    down: Tensor
    route: Tensor
    experts: Tensor
    shift: Tensor

    def __init__(self, heads: int = 1) -> None:
        super().__init__()
        sizes = {
            "table": (20, D),
            "qkv": (3 * D, D),
            "back": (D, D),
            "turned": (D, 2 * D),
            "down": (D, D),
            "route": (4, D),
            "experts": (4, D, D),
            "shift": (6, D),
        }
        for name, shape in sizes.items():
            self.register_parameter(name, nn.Parameter(torch.randn(shape)))
        self.heads = nn.ModuleList(nn.Linear(D, 5) for _ in range(heads))

    def forward(self, ids: Tensor) -> list[Tensor]:
        x = F.embedding(ids, self.table) + self.shift
        q, k, v = F.linear(x, self.qkv).chunk(3, -1)
        x = x + F.linear((q @ k.mT).softmax(-1) @ v, self.back)
        gate, up = (x @ self.turned).chunk(2, -1)
        x = x + F.linear(F.silu(gate) * up, self.down)
        chosen = F.linear(x, self.route).topk(1, -1).indices
        x = x + torch.einsum("btd,btde->bte", x, self.experts[chosen[..., 0]])
        return [head(x) for head in self.heads] or [x]


def facts_of(model: nn.Module, *args: Tensor, values: bool = False) -> dict[str, WeightFacts]:
    twin = Twin(model, (lambda p: nn.Parameter(p.detach().clone())) if values else None)
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(twin.originals[i])]: f for i, f in watch(twin.module, args, {}).items()}


@pytest.mark.parametrize("values", [False, True])
def test_facts_of_plain_parameters(values: bool) -> None:
    facts = facts_of(Layers(), torch.arange(6)[None], values=values)
    assert {n for n, f in facts.items() if f.is_head} == {"heads.0.weight"}
    assert {n for n, f in facts.items() if f.is_router} == {"route"}
    assert {n for n, f in facts.items() if f.attends} == {"qkv"} and facts["qkv"].cut() == 3
    assert facts["qkv"].head_size == D
    assert {n for n, f in facts.items() if f.gates} == {"turned"} and facts["turned"].cut() == 2
    assert facts["turned"].transposed == {True} and facts["qkv"].transposed == {False}
    assert facts["table"].kinds == {"embedding"} and not facts["shift"].kinds
    assert facts["experts"].products == {(D, D)} and facts["experts"].is_indexed


def test_several_heads_and_none() -> None:
    ids = torch.arange(6)[None]
    assert {n for n, f in facts_of(Layers(3), ids).items() if f.is_head} == {f"heads.{i}.weight" for i in range(3)}
    assert not any(f.is_head for f in facts_of(Layers(0), ids).values())  # the ends of a residual stream


def test_the_addend_of_a_product_is_the_weight_still() -> None:
    class Adapted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.a, self.b = nn.Linear(D, D), nn.Parameter(torch.ones(2, D)), nn.Parameter(torch.ones(D, 2))
            self.weight = nn.Parameter(torch.ones(D, D))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(self.first(x), torch.addmm(self.weight, self.b, self.a))

    facts = facts_of(Adapted(), torch.ones(3, D))
    assert facts["weight"].is_head and facts["weight"].kinds == {"matmul"}
    assert facts["a"].kinds == facts["b"].kinds == {"product"}


@pytest.mark.parametrize(
    ("letters", "blocks"),
    [("aabbcc", 3), ("aaaabbcc", (4, 2, 2)), ("abab", (1, 1)), ("aabcaabc", (2, 1, 1)), ("aabab", None), ("ab", 2)],
)
def test_rows_as_blocks(letters: str, blocks: object) -> None:
    assert blocks_of_letters(letters) == blocks


def test_what_a_model_is_trained_for() -> None:
    x = torch.ones(1)
    assert list(final_outputs({"loss": x, "logits": x + 1})) == [x]
    names = ("last_hidden_state", "hidden_states", "attentions", "logits")
    assert len(list(final_outputs({k: torch.ones(1) for k in names}))) == 2
    assert list(final_outputs([{"text": {"pooler_output": x + 1, "logits": x}}])) == [x]
    assert not list(final_outputs([torch.ones(1, dtype=torch.long), None]))
