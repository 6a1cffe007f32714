"""What `RuleOptimizer` does for every rule: block views, stacks, rounding, groups of several rules."""

from __future__ import annotations

import copy
import io
from collections.abc import Iterator
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, ClassVar, cast

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_optim import Adafactor, AdamW, Lion, Muon, Rule, RuleOptimizer, eye, zeros
from lightning_optim.core import matrix_views
from lightning_optim.core.rule import REGISTRY
from lightning_optim.core.step import stacks
from lightning_optim.ops.orthogonal import orthogonalize
from lightning_optim.ops.rounding import hash_key, random_bits, stochastic_round
from tests.helpers.rules import gradient


@pytest.fixture
def registry() -> Iterator[dict[str, type[Rule]]]:
    """The registry, restored afterwards."""
    before = dict(REGISTRY)
    yield REGISTRY
    REGISTRY.clear()
    REGISTRY.update(before)


def block_mean(registry: Any) -> type[Rule]:
    """A toy rule with one second moment per matrix it is handed, and a square factor."""

    @dataclass(frozen=True)
    class BlockMean(Rule):
        lr: float = 0.1
        weight_decay: float = 0.0

        name: ClassVar = "block_mean"
        source: ClassVar = "none"
        state: ClassVar = {"second": zeros("11"), "factor": eye("mm"), "seen": zeros("m1")}

        def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:
            assert g.ndim == 3 and s.factor.shape[-1] == g.shape[-2]
            s.second.lerp_(g.square().mean((-2, -1), keepdim=True), 0.5)
            s.factor = s.factor + g @ g.mT
            s.seen += g.abs().amax(-1, keepdim=True)
            return (s.factor @ g) / s.second.sqrt()

    assert registry["block_mean"] is BlockMean
    return BlockMean


@pytest.mark.parametrize("count", [1, 2])
def test_blocks_are_matrices_of_their_own(registry: Any, count: int) -> None:
    """A fused matrix cut into blocks moves as separate parameters do, bitwise, for stacks and for views."""
    block_mean(registry)
    fused = [Parameter(torch.randn(12, 5, generator=torch.Generator().manual_seed(i))) for i in range(count)]
    heads = [[Parameter(x.clone()) for x in p.detach().split(4)] for p in fused]
    a = RuleOptimizer([{"params": fused, "rule": "block_mean", "blocks": 3}])
    b = RuleOptimizer([{"params": [x for p in heads for x in p], "rule": "block_mean"}])
    for t in range(1, 5):
        for i, p in enumerate(fused):
            p.grad = gradient(p, str(i), t)
            for x, g in zip(heads[i], p.grad.split(4), strict=True):
                x.grad = g.clone()
        a.step()
        b.step()
    for p, parts in zip(fused, heads, strict=True):
        assert torch.equal(p, torch.cat([x.detach() for x in parts]))
        assert tuple(a.state[p]["factor"].shape) == (3, 4, 4)
        assert torch.equal(a.state[p]["factor"][1], b.state[parts[1]]["factor"])
    resumed = RuleOptimizer([{"params": fused, "rule": "block_mean", "blocks": 3}])
    resumed.load_state_dict(a.state_dict())
    assert all(torch.equal(x, resumed.state[fused[0]][k]) for k, x in a.state[fused[0]].items())


def test_three_dimensions_are_a_stack(registry: Any) -> None:
    block_mean(registry)
    experts = Parameter(torch.randn(3, 4, 5))
    single = [Parameter(x.clone()) for x in experts.detach()]
    a = RuleOptimizer([{"params": [experts], "rule": "block_mean"}])
    b = RuleOptimizer([{"params": single, "rule": "block_mean"}])
    for t in range(1, 4):
        experts.grad = gradient(experts, "e", t)
        for x, g in zip(single, experts.grad, strict=True):
            x.grad = g.clone()
        a.step()
        b.step()
    assert torch.equal(experts, torch.stack([x.detach() for x in single]))


def test_matrix_dims() -> None:
    assert matrix_views.stack_shape(()) == (1, 1, 1)
    assert matrix_views.stack_shape((7,)) == (1, 1, 7)
    assert matrix_views.stack_shape((6, 4), blocks=3) == (3, 2, 4)
    assert matrix_views.stack_shape((5, 6, 4), blocks=2) == (10, 3, 4)
    assert matrix_views.stack_shape((8, 3, 2, 2)) == (1, 8, 12)
    assert matrix_views.stack_shape((8, 3, 2, 2), conv=False) == (24, 2, 2)


def test_stacks_respect_their_bounds() -> None:
    assert [len(c) for c in stacks.stacks(range(10), 1000, 16 * 3000)] == [3, 3, 3, 1]
    assert [len(c) for c in stacks.stacks(range(3), matrix_views.STACK_LIMIT + 1, 2**40)] == [1, 1, 1]
    assert [len(c) for c in stacks.stacks(range(3), 1000, 1)] == [1, 1, 1]
    assert [len(c) for c in stacks.stacks(range(5), 1000, 16 * 6000, [500, 1500])] == [2, 2, 1]
    assert [len(c) for c in stacks.stacks(range(2), 1000, 2**40, [matrix_views.STACK_LIMIT])] == [1, 1]


class Largest(TorchDispatchMode):
    """The largest memory of a tensor that some operations made."""

    nbytes = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **kwargs or {})
        for t in tree_leaves(out):
            if isinstance(t, Tensor):
                self.nbytes = max(self.nbytes, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("name", ["soap", "shampoo", "eigen_adam", "psgd_kron", "galore"])
def test_square_state_of_thin_matrices_respects_the_bound(name: str) -> None:
    """Adapters, 4 x 128: their factors are 32 times as large as they are."""
    ps = [Parameter(torch.randn(4, 128)) for _ in range(24)]
    settings = {"rank": 4} if name == "galore" else {}
    optimizer = RuleOptimizer([{"params": ps, "rule": name, "refresh": "fixed:2", **settings}], max_temp_bytes=2**20)
    largest = Largest()
    for _ in range(3):
        for p in ps:
            p.grad = torch.randn_like(p)
        with largest:
            optimizer.step()
    assert largest.nbytes <= 2**20


def test_a_stack_that_was_only_read_is_not_copied_back() -> None:
    ps = [Parameter(torch.randn(4, 6)) for _ in range(3)]
    optimizer = RuleOptimizer([{"params": ps, "rule": "soap", "refresh": "fixed:3"}])
    written: list[dict[str, bool]] = []
    for _ in range(4):
        before = {k: t._version for k, t in optimizer.state[ps[0]].items()}
        for p in ps:
            p.grad = torch.randn_like(p)
        optimizer.step()
        written.append({k: t._version != before.get(k) for k, t in optimizer.state[ps[0]].items()})
    for key in ("factor_left", "factor_right", "exp_avg", "exp_avg_sq"):
        assert all(step[key] for step in written[1:]), key
    for key in ("basis_left", "basis_right"):
        assert [step[key] for step in written] == [True, False, False, True], key


@pytest.mark.parametrize("shape", [(), (5,), (2**17 + 3,), (700, 300), (1, 2**18)])
def test_blocks_cover_every_element_once(shape: tuple[int, ...]) -> None:
    x, y = torch.zeros(shape), torch.zeros(shape)
    for (a, b), _ in matrix_views.cache_blocks([x, y]):
        assert a.numel() <= max(matrix_views.BLOCK, matrix_views.SMALL)
        a += 1
        b += 2
    assert (x == 1).all() and (y == 2).all()


def test_steps_are_counted_whatever_the_default_device() -> None:
    p = Parameter(torch.zeros(4, 4))
    optimizer = AdamW([p], lr=0.1)
    for _ in range(3):
        p.grad = torch.ones(4, 4)
        with torch.device("meta"):
            optimizer.step()
    assert optimizer.state[p]["step"] == 3


def test_several_rules_in_one_optimizer_and_settings_of_each() -> None:
    matrix, vector = Parameter(torch.randn(4, 3)), Parameter(torch.randn(3))
    optimizer = RuleOptimizer([{"params": [matrix], "rule": "muon"}, {"params": [vector], "rule": "adamw", "lr": 1e-4}])
    assert [g["name"] for g in optimizer.param_groups] == ["muon", "adamw"]
    assert "betas" not in optimizer.param_groups[0] and "momentum" not in optimizer.param_groups[1]
    assert optimizer.defaults["lr"] == 0.02
    for p in (matrix, vector):
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert set(optimizer.state[matrix]) == {"step", "momentum_buffer"}
    assert set(optimizer.state[vector]) == {"step", "exp_avg", "exp_avg_sq"}


def test_large_matrices_are_worked_on_without_copies_of_state() -> None:
    """A matrix above the stack limit is a view: the slot the rule mutates is the stored tensor."""
    p = Parameter(torch.randn(600, 500))
    optimizer = Muon([p])
    p.grad = gradient(p, "p", 1)
    optimizer.step()
    stored = optimizer.state[p]["momentum_buffer"]
    address = stored.data_ptr()
    before = stored.clone()
    optimizer.step()
    assert optimizer.state[p]["momentum_buffer"].data_ptr() == address
    assert not torch.equal(stored, before)


def test_stochastic_rounding_is_unbiased_and_keeps_what_is_exact() -> None:
    index = torch.arange(2**18, dtype=torch.int32)
    x = torch.full((2**18,), 1.0 + 2**-10)  # an eighth of the way from 1 to the next bfloat16, 1 + 2^-7
    rounded = stochastic_round(x, index, hash_key(0, 1, 2)).float()
    up = (rounded > 1).float().mean().item()
    assert set(rounded.unique().tolist()) == {1.0, 1.0 + 2**-7}
    assert abs(up - 0.125) < 5 * (0.125 * 0.875 / 2**18) ** 0.5
    special = torch.tensor([0.0, -0.0, 1.0, -3.5, torch.inf, -torch.inf, torch.nan])
    out = stochastic_round(special, index[:7], 5)
    assert torch.equal(out[:6], special[:6].bfloat16()) and out[6].isnan()
    assert not torch.equal(stochastic_round(x, index, 1), stochastic_round(x, index, 2))
    assert torch.equal(stochastic_round(x, index, 1)[5:9], stochastic_round(x[5:9], index[5:9], 1))


def test_random_bits_are_balanced() -> None:
    for key in (hash_key(0, 0, 0), hash_key(0, 1, 0), hash_key(1, 0, 0)):
        bits = random_bits(torch.arange(2**16, dtype=torch.int32), key)
        share = torch.stack([((bits >> k) & 1).float().mean() for k in range(32)])
        assert (share - 0.5).abs().max() < 0.012  # six standard deviations of 2^16 coin flips
        assert bits.unique().numel() > 0.99 * 2**16
    assert len({hash_key(s, t, i) for s in range(4) for t in range(32) for i in range(32)}) == 4096


@pytest.mark.parametrize("shape", [(3, 8, 20), (20, 8), (2, 16, 16)])
def test_orthogonalize_against_svd(shape: tuple[int, ...]) -> None:
    """Singular vectors stay, singular values land in the published band; bfloat16 deviates by a few per cent."""
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    snapshot = x.clone()
    y = orthogonalize(x, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    inner = u.mT @ y @ vh.mT
    values = inner.diagonal(dim1=-2, dim2=-1)
    assert (inner - torch.diag_embed(values)).abs().max() < 1e-10
    assert 0.68 < values.min() and values.max() < 1.14
    assert torch.equal(x, snapshot)
    rough = orthogonalize(x.float()).double()
    assert (rough - y).norm() / y.norm() < 0.1
    assert torch.equal(orthogonalize(torch.zeros(shape)), torch.zeros(shape))
    transposed = orthogonalize(x.mT, dtype=torch.float64)
    torch.testing.assert_close(transposed, y.mT, rtol=1e-10, atol=1e-12)


def test_known_iterates() -> None:
    """diag(3, 4), normalised to (0.6, 0.8), lands on (0.7229, 1.1192) after five published iterations."""
    y = orthogonalize(torch.diag(torch.tensor([3.0, 4.0], dtype=torch.float64)), dtype=torch.float64)
    torch.testing.assert_close(y.diagonal(), torch.tensor([0.7229, 1.1192], dtype=torch.float64), rtol=0, atol=5e-5)


def test_muon_is_equivariant_under_rotations() -> None:
    """Muon(A G B) = A Muon(G) B for orthogonal A, B: rotate weights and gradients, and the run rotates with them."""
    made = torch.Generator().manual_seed(4)
    a, b = (torch.linalg.qr(torch.randn(k, k, dtype=torch.float64, generator=made)).Q for k in (6, 9))
    start = torch.randn(6, 9, dtype=torch.float64, generator=made)
    plain, rotated = Parameter(start.clone()), Parameter(a @ start @ b)
    first, second = (Muon([p], ns_dtype="float64", weight_decay=0.1) for p in (plain, rotated))
    for t in range(1, 6):
        plain.grad = gradient(plain, "p", t)
        rotated.grad = a @ plain.grad @ b
        first.step()
        second.step()
    torch.testing.assert_close(rotated.detach(), a @ plain.detach() @ b, rtol=1e-10, atol=1e-10)


@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")  # torch 2.11, of every profile
def test_adamw_is_one_fused_kernel_and_nothing_else_of_parameter_size() -> None:
    p = Parameter(torch.randn(2000, 300))
    q = Parameter(torch.randn(50))
    optimizer = RuleOptimizer([{"params": [p, q], "rule": "adamw"}])
    for x in (p, q):
        x.grad = torch.randn_like(x)
    optimizer.step()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True) as profile:
        optimizer.step()
    ours = [e for e in profile.events() or [] if e.name.startswith("aten::")]
    assert [e.name for e in ours].count("aten::_fused_adamw_") == 1
    large = [e.name for e in ours if any(s and len(s) == 2 for s in e.input_shapes) and e.name != "aten::_fused_adamw_"]
    assert large == []


def slots_of_each_other(registry: Any, *, elementwise: bool) -> None:
    """A toy rule that assigns one slot to another."""

    @dataclass(frozen=True)
    class Previous(Rule):
        lr: float = 0.1
        weight_decay: float = 0.0

        name: ClassVar = "previous"
        source: ClassVar = "none"
        state: ClassVar = {"now": zeros("mn"), "before": zeros("mn")}

        def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:
            s.before = s.now
            s.now = s.now + g
            return s.now - s.before

    Previous.elementwise = elementwise
    assert registry["previous"] is Previous


@pytest.mark.parametrize("elementwise", [False, True])
@pytest.mark.parametrize("shapes", [[(4, 3)], [(4, 3)] * 2, [(700, 500)]])
def test_slots_may_be_assigned_to_each_other(registry: Any, shapes: list[Any], elementwise: bool) -> None:
    slots_of_each_other(registry, elementwise=elementwise)
    ps = [Parameter(torch.zeros(s)) for s in shapes]
    optimizer = RuleOptimizer([{"params": ps, "rule": "previous"}])
    for _ in range(2):
        for p in ps:
            p.grad = torch.ones_like(p)
        optimizer.step()
    for p in ps:
        assert (optimizer.state[p]["now"] == 2).all() and (optimizer.state[p]["before"] == 1).all()


def test_the_rank_letter(registry: Any) -> None:
    @dataclass(frozen=True)
    class Ranked(Rule):
        lr: float = 0.1
        weight_decay: float = 0.0
        rank: int = 3

        name: ClassVar = "ranked"
        source: ClassVar = "none"
        state: ClassVar = {"low": zeros("rn"), "basis": eye("rr")}

        def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:
            assert s.low.shape[-2:] == s.basis.shape[-2:-1] + g.shape[-1:]
            return g

    ps = [Parameter(torch.randn(4, 5)), Parameter(torch.randn(2, 5))]
    optimizer = RuleOptimizer([{"params": ps, "rule": "ranked"}])
    for p in ps:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert [tuple(optimizer.state[p]["low"].shape) for p in ps] == [(3, 5), (2, 5)]
    assert [tuple(optimizer.state[p]["basis"].shape) for p in ps] == [(3, 3), (2, 2)]


def test_elementwise_rules_have_elementwise_state(registry: Any) -> None:
    with pytest.raises(TypeError, match="all its state must be 'mn'"):

        class Wrong(Rule):
            name: ClassVar = "wrong"
            source: ClassVar = "none"
            elementwise: ClassVar = True
            state: ClassVar = {"row": zeros("m1")}


REMEDY = (
    r"give the rule `name` and `source` as class constants; "
    r"a base of several rules is `class \w+\(\w+, abstract=True\)`"
)


def test_a_rule_without_name_is_refused(registry: Any) -> None:
    before = dict(registry)
    with pytest.raises(TypeError, match=rf"^Nameless has no `name` of its own: {REMEDY}$"):

        class Nameless(Rule):
            source: ClassVar = "none"

    with pytest.raises(TypeError, match=rf"^Bare has no `name` of its own and no `source`: {REMEDY}$"):

        class Bare(Rule):
            pass

    assert registry == before


def test_a_rule_without_source_is_refused(registry: Any) -> None:
    with pytest.raises(TypeError, match=rf"^Unsourced has no `source`: {REMEDY}$"):

        class Unsourced(Rule):
            name: ClassVar = "unsourced"

    assert "unsourced" not in registry


def test_a_variant_needs_a_name_of_its_own(registry: Any) -> None:
    """It would take the place of the rule it is derived from, or of none."""
    adamw = registry["adamw"]
    with pytest.raises(TypeError, match=rf"^Variant has no `name` of its own: {REMEDY}$"):

        class Variant(adamw):
            pass

    assert registry["adamw"] is adamw

    class Named(adamw):  # the source is that of AdamW
        name: ClassVar = "named"

    assert registry["named"] is Named and Named.source == adamw.source


def test_an_abstract_base_is_no_optimizer(registry: Any) -> None:
    before = dict(registry)

    class Base(Rule, abstract=True):
        elementwise: ClassVar = True

    assert registry == before

    class Concrete(Base):
        name: ClassVar = "concrete"
        source: ClassVar = "none"

    assert registry["concrete"] is Concrete


def test_muon_does_not_depend_on_who_shares_the_stack() -> None:
    """bfloat16 products of one matrix can round differently in a batch; ours are never batched on a CPU."""
    start = [torch.randn(8, 64, generator=torch.Generator().manual_seed(i)) for i in range(17)]
    results = []
    for size in (1, 2**25):
        ps = [Parameter(x.clone()) for x in start]
        optimizer = Muon(ps, max_temp_bytes=size)
        for t in range(1, 6):
            for i, p in enumerate(ps):
                p.grad = gradient(p, str(i), t)
            optimizer.step()
        results.append(ps)
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_plain_tensors_with_a_gradient_move_and_frozen_parameters_do_not() -> None:
    """A float32 copy of the weights, say; torch moves it too."""
    copy_of_weights, frozen = torch.zeros(3), Parameter(torch.zeros(3), requires_grad=False)
    optimizer = RuleOptimizer([{"params": [copy_of_weights, frozen], "rule": "sgd", "lr": 1.0}])
    copy_of_weights.grad, frozen.grad = torch.ones(3), torch.ones(3)
    optimizer.step()
    assert torch.equal(copy_of_weights, -torch.ones(3)) and torch.equal(frozen, torch.zeros(3))


def test_a_group_may_join_with_or_without_names() -> None:
    a, b, c = (Parameter(torch.zeros(2)) for _ in range(3))
    named = RuleOptimizer([{"params": [("a", a)], "rule": "sgd"}])
    named.add_param_group({"params": [b], "rule": "sgd"})
    assert named.param_groups[1]["param_names"] == ["sgd_1.0"]
    unnamed = RuleOptimizer([{"params": [a], "rule": "sgd"}])
    unnamed.add_param_group({"params": [("b", b)], "rule": "sgd"})
    named.param_groups[0]["params"].append(c)
    for p in (a, b, c):
        p.grad = torch.ones(2)
    named.step()
    assert (c != 0).all() and len(named.state) == 3


def test_frozen_parameters_are_not_checked_until_they_train() -> None:
    codes = Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    bias = Parameter(torch.zeros(3), requires_grad=False)
    AdamW([Parameter(torch.zeros(3)), codes])
    matrix = Parameter(torch.randn(3, 3))
    optimizer = Muon([("w", matrix), ("bias", bias)])
    matrix.grad = torch.ones(3, 3)
    optimizer.step()
    bias.requires_grad_(True)
    before = matrix.clone()
    bias.grad = torch.ones(3)
    with pytest.raises(ValueError, match="bias: muon needs a matrix"):
        optimizer.step()
    assert torch.equal(matrix, before) and optimizer.state[matrix]["step"] == 1
    AdamW(torch.nn.LazyLinear(3).parameters())


def test_the_step_count_is_float64_whatever_the_default_dtype() -> None:
    p = Parameter(torch.zeros(2, dtype=torch.float32))
    torch.set_default_dtype(torch.bfloat16)
    try:
        optimizer = RuleOptimizer([{"params": [p], "rule": "adamw"}])
        for _ in range(300):
            p.grad = torch.ones(2, dtype=torch.float32)
            optimizer.step()
    finally:
        torch.set_default_dtype(torch.float32)
    assert optimizer.state[p]["step"].dtype == torch.float64 and int(optimizer.state[p]["step"]) == 300


def test_what_the_user_says_stays() -> None:
    p = Parameter(torch.randn(3, 3))
    assert Adafactor([p], lr_convention="adamw", scale_parameter=True).param_groups[0]["scale_parameter"] is True
    assert Adafactor([p], lr_convention="adamw").param_groups[0]["scale_parameter"] is False
    assert Lion([p], max_temp_bytes=123).__getstate__()["max_temp_bytes"] == 123
    assert copy.deepcopy(Lion([p], max_temp_bytes=123)).max_temp_bytes == 123


def test_finite_values_of_any_size_are_finite() -> None:
    p = Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = RuleOptimizer([{"params": [p], "rule": "lion", "on_nonfinite": "raise"}])
    p.grad = torch.full((2,), 1e300, dtype=torch.float64)
    optimizer.step()
    assert (p != 0).all()


def test_settings_changed_to_nonsense_mid_run_are_refused() -> None:
    p = Parameter(torch.zeros(2, 2))
    p.grad = torch.ones(2, 2)
    for key, value, match in [
        ("lr_convention", "Adamw", "lr_convention: unknown value 'Adamw'"),
        ("rule", "adamw", "has no betas"),
        ("on_nonfinite", "no", "on_nonfinite: unknown value 'no'"),
    ]:
        optimizer = RuleOptimizer([{"params": [p], "rule": "muon"}])
        optimizer.param_groups[0][key] = value
        with pytest.raises(ValueError, match=match):
            optimizer.step()
        assert not optimizer.state


def test_numbers_of_numpy_do_not_end_in_a_checkpoint() -> None:
    """They do not load with `weights_only=True`."""
    p = Parameter(torch.zeros(4))
    settings: Any = {"lr": np.float64(1e-2), "betas": (np.float64(0.8), np.float32(0.5)), "seed": np.int64(3)}
    optimizer = AdamW([p], **settings)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: cast("float", np.float64(0.5)))
    p.grad = torch.ones(4)
    optimizer.step()
    schedule.step()
    torch.save(optimizer.state_dict(), file := io.BytesIO())
    file.seek(0)
    (group,) = torch.load(file, weights_only=True)["param_groups"]
    assert (group["lr"], group["betas"], group["seed"], type(group["seed"])) == (5e-3, (0.8, 0.5), 3, int)


def test_options_that_belong_together_may_be_one_mapping() -> None:
    one = AdamW(
        [Parameter(torch.ones(8, 8))],
        constraint={"name": "hyperball", "uw_floor": 0.1, "uw_floor_by": "row"},
        state_storage={"format": "int8", "block": 64, "min": 16},
    )
    flat = AdamW(
        [Parameter(torch.ones(8, 8))],
        constraint="hyperball",
        uw_floor=0.1,
        uw_floor_by="row",
        state_storage="int8",
        storage_block=64,
        storage_min=16,
    )
    assert one.state_dict()["param_groups"] == flat.state_dict()["param_groups"] and one.defaults == flat.defaults
    one.add_param_group({"params": [Parameter(torch.ones(4))], "cautious_decay": {"rate": 0.1, "when": "after_pin"}})
    assert one.param_groups[1]["cautious_decay"] == 0.1 and one.param_groups[1]["cautious_when"] == "after_pin"
    for wrong, words in [
        ({"constraint": {"nme": "hyperball"}}, "constraint has no setting 'nme'; did you mean 'name'"),
        ({"constraint": {"uw_floor": 1.0}, "uw_floor": 2.0}, "uw_floor is given twice"),
    ]:
        with pytest.raises(ValueError, match=words):
            AdamW([Parameter(torch.ones(8, 8))], **wrong)
