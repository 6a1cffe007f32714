"""Bad input gets one clear error that names the parameter or setting; nothing is half-applied."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.nn import Parameter

from lightning_optim import (
    CAME,
    LAMB,
    LARS,
    SGD,
    Adafactor,
    AdafactorHF,
    Adagrad,
    Adam,
    AdamMini,
    AdamW,
    Adapprox,
    AMSGrad,
    Lion,
    Muon,
    RMSprop,
    RuleOptimizer,
    Signum,
    build_optimizer,
)
from lightning_optim.core.rule import REGISTRY
from lightning_optim.ops.lapack import LinAlgError
from tests.helpers.rules import NAMES, SEARCHING, cases, give, gradient, make, params, refreshing


def matrix() -> Parameter:
    return Parameter(torch.randn(4, 3))


def model() -> nn.Module:
    return nn.Sequential(nn.Embedding(11, 4), nn.Linear(4, 6), nn.LayerNorm(6), nn.Linear(6, 11))


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: build_optimizer(model(), "muonn", lr=1e-3), r"unknown optimizer 'muonn'.*'muon'"),
        (lambda: build_optimizer(model(), "muon", lr=1e-3, rest="adam_w"), r"unknown optimizer 'adam_w'.*'adamw'"),
        (lambda: build_optimizer(model(), "muon", lr=1e-3, momentun=0.9), r"no setting 'momentun'.*'momentum'"),
        (
            lambda: build_optimizer(model(), "muon", lr=1e-3, lr_convention="adam"),
            "lr_convention: unknown value 'adam'.*'adamw'",
        ),
        (
            lambda: build_optimizer(model(), "muon", lr=1e-3, overrides=[("*.gate", "adamw")]),
            r"'\*.gate' applies to",
        ),
        (
            lambda: build_optimizer(model(), "muon", lr=1e-3, overrides=[("vector", "muon")]),
            r"1\.bias: muon needs a mat",
        ),
        (
            lambda: build_optimizer(model(), "muon", lr=1e-3, overrides=[("*", "lion"), ("head", None)]),
            "'head' applies to no",
        ),
        (lambda: build_optimizer(nn.Identity(), "muon", lr=1e-3), "Identity has no trainable parameter"),
        (lambda: Muon([]), "empty parameter list"),
        (lambda: Muon([Parameter(torch.randn(3))]), r"parameter 0 .*muon needs a matrix, got shape \(3,\)"),
        (lambda: Muon([("layer.bias", Parameter(torch.randn(3)))]), r"layer\.bias: muon needs a matrix"),
        (lambda: Muon([matrix()], blocks=3), "4 rows do not divide into 3 blocks"),
        (lambda: Muon([matrix()], blocks=0), "blocks must be a positive integer"),
        (lambda: Muon([matrix()], lr=-1.0), "lr must be a finite number >= 0, got -1.0"),
        (lambda: Muon([matrix()], momentum=math.nan), "momentum must be a finite number >= 0, got nan"),
        (lambda: Muon([matrix()], momentum=1.0), "momentum < 1"),
        (lambda: Muon([matrix()], lr=torch.tensor(math.nan)), "lr must be a finite number >= 0, got nan"),
        (lambda: Muon([matrix()], scale="orignal"), "scale: unknown value 'orignal'.*'original'"),  # pyright: ignore
        (lambda: Muon([matrix()], ns_dtype="int8"), "ns_dtype: unknown value 'int8'; known: bfloat16"),  # pyright: ignore
        (lambda: AdamW([matrix()], betas=(0.9, 1.0)), r"betas must lie in \[0, 1\)"),
        (lambda: AdamW([matrix()], weight_decay=-0.1), "weight_decay must be a finite number >= 0"),
        (lambda: AdamW([matrix()], lr="0.1"), "lr must be a number, got '0.1'"),  # pyright: ignore
        (lambda: AdamW([matrix()], eps_mode="hf"), "eps_mode: unknown value 'hf'"),  # pyright: ignore
        (lambda: AdamW([matrix()], betas=0.9), "betas must be 2 numbers, got 0.9"),  # pyright: ignore
        (lambda: AdamW([matrix()], betas=(0.9,)), r"betas must be 2 numbers, got \(0.9,\)"),  # pyright: ignore
        (lambda: AdamW([matrix()], eps=None), "eps must be a number, got None"),  # pyright: ignore
        (lambda: AdamW([matrix()], lr=math.inf), "lr must be a finite number"),
        (lambda: AdamW([matrix()], seed="x"), "seed must be an integer, got 'x'"),  # pyright: ignore
        (lambda: Muon([matrix()], ns_steps=2.5), "ns_steps must be an integer, got 2.5"),  # pyright: ignore
        (lambda: Muon([matrix()], ns_steps=0), "ns_steps >= 1"),
        (lambda: Muon([matrix()], nesterov=None), "nesterov must be True or False, got None"),  # pyright: ignore
        (lambda: Muon([matrix()], ns_coefficients=(1.0, 2.0)), "ns_coefficients must be 3 numbers"),  # pyright: ignore
        (lambda: Muon([matrix()], ns_coefficients="quintik"), "unknown ns_coefficients 'quintik'.*'quintic'"),
        (lambda: Muon([{"params": [matrix()], "learning_rate": 1.0}]), "no setting 'learning_rate'; did you mean 'lr'"),
        (lambda: Muon([{"params": [matrix()], "momentun": 0.5}]), "no setting 'momentun'; did you mean 'momentum'"),
        (lambda: build_optimizer(model(), "muon", lr=1.0, overrides=[("hidden", None, {"momentun": 0.5})]), "momentun"),
        (lambda: SGD([matrix()], nesterov=True), "nesterov needs momentum"),
        (lambda: RMSprop([matrix()], alpha=1.0), "needs alpha < 1 and momentum < 1, got 1.0, 0.0"),
        (lambda: RMSprop([matrix()], momentum=1.5), "needs alpha < 1 and momentum < 1, got 0.99, 1.5"),
        (lambda: Adagrad([matrix()], initial_accumulator_value=-1.0), "initial_accumulator_value must be a finite num"),
        (lambda: AMSGrad([matrix()], amsgrad=False), "amsgrad=False is adam"),
        (lambda: Signum([matrix()], momentum=1.0), "signum: momentum must be below 1"),
        (lambda: LARS([matrix()], momentum=0.0, nesterov=True), "above 0 with nesterov, got 0.0"),
        (lambda: LARS([matrix()], momentum=1.0), "lars: momentum must be below 1"),
        (lambda: LARS([matrix()], zero_gradient_rate="zero"), "zero_gradient_rate: unknown value 'zero'"),  # pyright: ignore
        (lambda: LAMB([matrix()], norm_bounds=(2.0, 1.0)), r"norm_bounds must be \(lower, upper\)"),
        (lambda: LAMB([matrix()], norm_bounds=1.0), "norm_bounds must be 2 numbers"),  # pyright: ignore
        (lambda: CAME([matrix()], betas=(0.9, 0.999, 1.0)), r"came: betas must lie in \[0, 1\)"),
        (lambda: Adapprox([matrix()], rank=0), "needs rank >= 1 and iterations >= 1, got 0, 5"),
        (lambda: AdamMini([matrix()], statistic="median"), "statistic: unknown value 'median'"),  # pyright: ignore
        (lambda: AdafactorHF([matrix()], beta1=1.0), "beta1 must be below 1"),
        (lambda: AdafactorHF([matrix()], relative_step=False, warmup_init=True), "needs relative_step=True"),
        (lambda: Lion([matrix()], on_nonfinite="rise"), "on_nonfinite: unknown value 'rise'.*'raise'"),  # pyright: ignore
        (lambda: Lion([matrix()], param_rounding="up"), "param_rounding: unknown value 'up'"),  # pyright: ignore
        (lambda: AdamW([Parameter(torch.randn(3, dtype=torch.complex64))]), "complex parameters are not supported"),
        (lambda: AdamW([Parameter(torch.eye(3).to_sparse())]), "sparse parameters are not supported"),
        (lambda: RuleOptimizer([{"params": [matrix()]}]), "names no rule"),
        (lambda: RuleOptimizer([{"params": [matrix()], "rule": "adamv"}]), r"unknown optimizer 'adamv'.*'adamw'"),
    ],
)
def test_one_clear_error(call: Any, match: str) -> None:
    with pytest.raises(ValueError, match=match):
        call()


def test_a_parameter_is_owned_once() -> None:
    p = matrix()
    with pytest.raises(ValueError, match="b: already owned by group 'adamw'"):
        RuleOptimizer([{"params": [("a", p)], "rule": "adamw"}, {"params": [("b", p)], "rule": "muon"}])


def test_group_names_are_unique() -> None:
    groups = [{"params": [matrix()], "rule": "adamw", "name": "x"}, {"params": [matrix()], "rule": "muon", "name": "x"}]
    with pytest.raises(ValueError, match="two param groups are named 'x'"):
        RuleOptimizer(groups)


def test_a_refused_group_leaves_the_optimizer_as_it_was() -> None:
    optimizer = Muon([matrix()])
    before = copy.deepcopy(optimizer.param_groups)
    with pytest.raises(ValueError, match="muon needs a matrix"):
        optimizer.add_param_group({"params": [matrix(), Parameter(torch.randn(3))]})
    assert len(optimizer.param_groups) == 1
    assert optimizer.param_groups[0].keys() == before[0].keys()
    assert torch.equal(optimizer.param_groups[0]["params"][0], before[0]["params"][0])


def test_sparse_gradient_is_refused_before_anything_is_written() -> None:
    embedding = nn.Embedding(5, 3, sparse=True)
    optimizer = AdamW(embedding.parameters(), on_nonfinite="raise")
    embedding(torch.tensor([1])).sum().backward()
    before = embedding.weight.clone()
    with pytest.raises(RuntimeError, match="sparse gradients are not supported"):
        optimizer.step()
    assert torch.equal(before, embedding.weight) and not optimizer.state


@pytest.mark.parametrize("cls", [Muon, Adafactor])
def test_flat_parameters_of_fsdp1_are_refused(cls: Any) -> None:
    flat = Parameter(torch.randn(12))
    flat._fsdp_flattened = True  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ValueError, match="FSDP1 hides in flat parameters; use FSDP2"):
        cls([("layer.weight", flat)])
    AdamW([flat])


@pytest.mark.dist
@pytest.mark.filterwarnings("ignore::FutureWarning")  # torch announces FSDP1's end
@pytest.mark.filterwarnings("ignore:FSDP.*")
def test_real_fsdp1_is_refused(pool: Any) -> None:
    for original in (False, True):
        for warned_record, weights, alone in pool.run("tests.core.test_param_groups:fsdp1", 2, original=original):
            assert warned_record.keys() == {"class", "muon", "adafactor", "sophia_g", "adamw", "clip_norm"}
            assert all("use FSDP2" in message for message in warned_record.values()), warned_record
            assert "so roles (vectors are not decayed, say) cannot be derived" in warned_record["adamw"]
            assert "clip_norm=1.0 needs whole parameters" in warned_record["clip_norm"]
            torch.testing.assert_close(weights, alone)


def fsdp1(rank: int, world: int, original: bool) -> tuple[dict[str, str], list[Tensor], list[Tensor]]:
    """Wrap a model in FSDP1, ask for optimizers, and take a step of an elementwise one, here and in one process."""

    def made() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 3))

    model, x = made(), torch.randn(4, 6, generator=torch.Generator().manual_seed(1))
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=original)
    ways: dict[str, Any] = {
        "class": lambda: Muon(wrapped.parameters()),
        **{
            name: partial(build_optimizer, wrapped, name, lr=0.1) for name in ("muon", "adafactor", "sophia_g", "adamw")
        },
        "clip_norm": lambda: AdamW(wrapped.parameters(), clip_norm=1.0),
    }
    warned_record = {}
    for label, build in ways.items():
        try:
            build()
        except ValueError as error:
            warned_record[label] = str(error)
    whole = made()
    for trained in (wrapped, whole):
        optimizer = AdamW(trained.parameters(), lr=0.1, weight_decay=0.1)
        trained(x).square().mean().backward()
        optimizer.step()
    with FullyShardedDataParallel.summon_full_params(wrapped):
        weights = [p.detach().clone() for p in wrapped.parameters()]
    expected = [p.detach() for p in whole.parameters()]
    return warned_record, [torch.cat([p.reshape(-1) for p in weights])], [torch.cat([p.reshape(-1) for p in expected])]


def test_loading_another_optimizers_checkpoint_is_refused() -> None:
    p = matrix()
    muon, lion = Muon([p]), Lion([p])
    p.grad = gradient(p, "p", 1)
    lion.step()
    with pytest.raises(ValueError, match="group 'muon' runs 'muon', the checkpoint's 'lion'"):
        muon.load_state_dict(lion.state_dict())
    assert muon.param_groups[0]["rule"] == "muon" and not muon.state
    other = Lion([Parameter(torch.randn(5, 3))])
    with pytest.raises(ValueError, match=r"'exp_avg' has shape \(4, 3\), expected \(5, 3\)"):
        other.load_state_dict(lion.state_dict())
    with pytest.raises(ValueError, match="doesn't match the size"):
        Lion([matrix(), matrix()]).load_state_dict(lion.state_dict())


@pytest.mark.parametrize(
    ("old_class", "new_class", "settings"),
    [
        (torch.optim.AdamW, AdamW, {"lr": 0.01, "betas": (0.8, 0.9), "fused": True}),
        (torch.optim.Adam, Adam, {"lr": 0.01, "weight_decay": 0.1, "fused": True}),
        (torch.optim.SGD, SGD, {"lr": 0.01, "momentum": 0.9, "fused": True}),
        (torch.optim.Adam, AMSGrad, {"lr": 0.01, "amsgrad": True, "fused": True}),
        (torch.optim.Adagrad, Adagrad, {"lr": 0.01, "lr_decay": 0.1, "initial_accumulator_value": 0.2, "fused": True}),
        (torch.optim.RMSprop, RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True, "weight_decay": 0.1}),
        (torch.optim.Muon, Muon, {"lr": 0.01, "weight_decay": 0.1}),
    ],
)
def test_checkpoints_of_torch_load(old_class: Any, new_class: Any, settings: dict[str, Any]) -> None:
    """Same slots, same names: training continues where torch's stopped, bitwise where the kernel is torch's."""
    ours, theirs = Parameter(torch.arange(12.0).view(4, 3)), Parameter(torch.arange(12.0).view(4, 3))
    old = old_class([theirs], **settings)
    for t in range(1, 4):
        theirs.grad = gradient(theirs, "p", t)
        old.step()
    new = new_class([ours], lr=5.0)
    with torch.no_grad():
        ours.copy_(theirs)
    new.load_state_dict(old.state_dict())
    assert all(new.param_groups[0][k] == v for k, v in settings.items())
    for t in range(4, 7):
        for p, optimizer in ((ours, new), (theirs, old)):
            p.grad = gradient(p, "p", t)
            optimizer.step()
    if new_class in (Muon, RMSprop):  # torch multiplies Muon's shape scale into lr, and divides by RMSprop's root last
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)
    else:
        assert torch.equal(ours, theirs)


def torch_checkpoint(cls: Any, **settings: Any) -> dict[str, Any]:
    """A checkpoint of one of torch's optimizers after one step."""
    p = Parameter(torch.randn(4, 3))
    optimizer = cls([p], **settings)
    p.grad = torch.ones(4, 3)
    optimizer.step()
    return optimizer.state_dict()


def test_settings_of_torch_are_translated() -> None:
    muon = Muon([matrix()])
    muon.load_state_dict(torch_checkpoint(torch.optim.Muon, adjust_lr_fn="match_rms_adamw"))
    assert muon.param_groups[0]["scale"] == "match_rms_adamw"
    adafactor = Adafactor([matrix()])
    adafactor.load_state_dict(torch_checkpoint(torch.optim.Adafactor, eps=(1e-5, 1e-2)))
    assert adafactor.param_groups[0]["eps1"] == 1e-5 and adafactor.param_groups[0]["eps2"] == 1e-2


@pytest.mark.parametrize(
    ("ours", "theirs", "settings", "match"),
    [
        (AdamW, torch.optim.AdamW, {"maximize": True}, "maximize=True, which adamw does not do"),
        (AdamW, torch.optim.Adam, {"weight_decay": 0.1}, "has the L2 form, which is adam's, not adamw's"),
        (AMSGrad, torch.optim.Adam, {}, "amsgrad=False is adam"),
        (Adam, torch.optim.AdamW, {"weight_decay": 0.1}, "has the decoupled form, which is adamw's, not adam's"),
        (AdamW, torch.optim.RMSprop, {}, "the checkpoint has no 'exp_avg'"),
        (Lion, torch.optim.SGD, {"momentum": 0.9}, "the checkpoint has no 'exp_avg'"),
    ],
)
def test_checkpoints_that_would_change_the_run_are_refused(ours: Any, theirs: Any, settings: Any, match: str) -> None:
    optimizer = ours([matrix()])
    before = copy.deepcopy(optimizer.param_groups[0])
    with pytest.raises(ValueError, match=match):
        optimizer.load_state_dict(torch_checkpoint(theirs, **settings))
    assert optimizer.param_groups[0].keys() == before.keys() and not optimizer.state


def test_bad_values_in_a_checkpoint_are_refused() -> None:
    optimizer = Lion([matrix()])
    saved = optimizer.state_dict()
    saved["param_groups"][0]["lr"] = math.nan
    with pytest.raises(ValueError, match="lr must be a finite number"):
        optimizer.load_state_dict(saved)


def test_a_slot_saved_as_none_is_absent() -> None:
    """torch's SGD without momentum saves its buffer so."""
    saved = torch_checkpoint(torch.optim.SGD)
    saved["state"] = {0: {"momentum_buffer": None}}
    p = matrix()
    optimizer = SGD([p])
    optimizer.load_state_dict(saved)
    p.grad = torch.ones(4, 3)
    optimizer.step()
    assert set(optimizer.state[p]) == {"step"}


DECOMPOSITIONS = ("eigh", "eigvalsh", "qr", "svd", "svdvals", "cholesky", "inv", "solve", "solve_triangular", "lstsq")
"""Of `torch.linalg`; all that may fail for a matrix that is finite."""


@contextmanager
def failing(every: int) -> Iterator[list[str]]:
    """Let every so many-th decomposition fail, none for 0; gives the names of those that were asked for."""
    calls: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in DECOMPOSITIONS:
            real = getattr(torch.linalg, name)

            def fail(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
                calls.append(name)
                if every and len(calls) % every == 0:
                    raise LinAlgError(f"linalg.{name} does not converge")
                return real(*args, **kwargs)

            patch.setattr(torch.linalg, name, fail)
        yield calls


@pytest.mark.parametrize(("name", "settings"), [*cases(), *[(name, {}) for name in SEARCHING]])
def test_a_decomposition_that_fails_in_mid_step_leaves_the_step_whole(name: str, settings: dict[str, Any]) -> None:
    """All groups step, to finite weights, with one warning that names the parameters; a retry says nothing."""
    for every, at in [(1, 1), (1, 3), (2, 3)]:
        mine = {k: p for k, p in params(name).items() if p.ndim >= 2}
        beside = {"beside": Parameter(torch.ones(3))}
        optimizer = RuleOptimizer([
            {"params": [*beside.values()], "rule": "adamw", "lr": 0.1},
            {"params": [*mine.values()], "rule": name, **refreshing(name), **settings},
        ])
        used = False
        for t in range(1, 5):
            give(mine | beside, t)
            before = beside["beside"].detach().clone()
            with warnings.catch_warnings(record=True) as warned_record, failing(every if t == at else 0) as calls:
                warnings.simplefilter("always")
                optimizer.step()
            used = used or bool(calls)
            messages = [str(x.message) for x in warned_record]
            if t == at and calls and every == 1:
                assert len(messages) == 1 and warned_record[0].category is RuntimeWarning, messages
                assert name in SEARCHING or f"{name}: parameter " in messages[0], messages
            else:
                assert len(messages) <= (t == at and every > 1), messages
            assert not torch.equal(before, beside["beside"])
            for key, p in (mine | beside).items():
                assert optimizer.state[p]["step"] == t
                assert p.isfinite().all() and all(x.isfinite().all() for x in optimizer.state[p].values()), (key, t)
        assert not torch.equal(mine["wide"], params(name)["wide"])
        if not used:
            return  # it decomposes nothing


@pytest.mark.filterwarnings("error")
def test_a_warning_that_is_an_error_comes_after_the_step() -> None:
    p, beside = matrix(), Parameter(torch.ones(3))
    optimizer = RuleOptimizer([{"params": [p], "rule": "dion"}, {"params": [beside], "rule": "adamw"}])
    p.grad, beside.grad = torch.ones_like(p), torch.ones_like(beside)
    with pytest.raises(RuntimeWarning, match="dion: parameter 0"), failing(1):
        optimizer.step()
    assert not torch.equal(beside, torch.ones(3)) and optimizer.state[beside]["step"] == 1


def resize(p: Parameter, shape: tuple[int, ...]) -> None:
    """Give a parameter another shape in place, as Transformers' `resize_token_embeddings` does."""
    p.data = torch.randn(shape, generator=torch.Generator().manual_seed(9)).to(p.dtype)
    p.grad = None


def snapshot(optimizer: RuleOptimizer) -> list[Any]:
    """Copies of all weights and state."""
    owned = [p for group in optimizer.param_groups for p in group["params"]]
    return [(p.detach().clone(), {k: t.clone() for k, t in optimizer.state[p].items()}) for p in owned]


def unchanged(optimizer: RuleOptimizer, before: list[Any]) -> bool:
    """Whether all weights and state are what they were, bit for bit."""
    pairs = zip(snapshot(optimizer), before, strict=True)
    return all(
        torch.equal(p, q) and state.keys() == old.keys() and all(torch.equal(state[k], old[k]) for k in old)
        for (p, state), (q, old) in pairs
    )


@pytest.mark.parametrize("shape", [(9, 12), (3, 12), (12, 5), (60,)])
@pytest.mark.parametrize("name", [*NAMES, *SEARCHING])
def test_a_parameter_resized_under_its_state_is_refused(name: str, shape: tuple[int, ...]) -> None:
    rule, ps = REGISTRY[name], params(name)
    beside = Parameter(torch.ones(3))
    optimizer = RuleOptimizer([
        {"params": [beside], "rule": "adamw", "name": "beside"},
        {"params": [*ps.values()], "rule": name},
    ])
    for t in (1, 2):
        give(ps | {"beside": beside}, t)
        optimizer.step()
    resize(ps["wide"], shape)
    give(ps | {"beside": beside}, 3)
    before = snapshot(optimizer)
    turned = name in ("alice", "alice0") and shape == (12, 5)  # their state is that of the wide matrix either way
    if len(optimizer.state[ps["wide"]]) > 1 and (rule.vectors or len(shape) > 1) and not turned:
        warned_record = rf"{name}: parameter 0 has shape \({', '.join(map(str, shape))},?\).*has \(.*expected .*resized"
        with pytest.raises(RuntimeError, match=warned_record):
            optimizer.step()
        assert unchanged(optimizer, before)
        with pytest.raises(RuntimeError, match="resized in place"):
            optimizer.state_dict()
        optimizer.state.pop(ps["wide"])
    if rule.vectors or len(shape) > 1:
        give(ps | {"beside": beside}, 3)
        optimizer.step()
        assert all(p.isfinite().all() for p in ps.values()) and int(optimizer.state[beside]["step"]) == 3
        assert optimizer.state_dict()["state"]


@pytest.mark.parametrize(
    ("name", "dtype", "settings"),
    [
        ("adamw", torch.bfloat16, {"param_rounding": "kahan"}),
        ("sgd", torch.bfloat16, {"param_rounding": "kahan", "momentum": 0.0}),
        ("adamw", torch.float32, {"state_storage": "int8", "storage_min": 16, "storage_block": 16}),
        ("adamw", torch.float32, {"state_storage": "bf16", "storage_min": 16}),
        ("muon", torch.float32, {"state_storage": "fp8", "storage_min": 16, "storage_block": 16}),
        ("muon", torch.float32, {"state_storage": "host"}),
        ("muon", torch.bfloat16, {"constraint": "hyperball"}),
        ("soap", torch.float32, {"clip_norm": 1.0}),
        ("adamw", torch.float32, {"cautious_decay": 0.1}),
        ("lion", torch.float32, {"on_nonfinite": "skip"}),
    ],
)
def test_a_resized_parameter_is_refused_however_its_state_rests(
    name: str, dtype: torch.dtype, settings: dict[str, Any]
) -> None:
    ps = params(name, dtype)
    optimizer = RuleOptimizer([{"params": [*ps.values()], "rule": name, **settings}])
    for t in (1, 2):
        give(ps, t)
        optimizer.step()
    saved = copy.deepcopy(optimizer.state_dict())
    resize(ps["wide"], (9, 12))
    give(ps, 3)
    before = snapshot(optimizer)
    with pytest.raises(RuntimeError, match=r"parameter 0 has shape \(9, 12\)"):
        optimizer.step()
    with pytest.raises(ValueError, match=r"parameter 0: the checkpoint's .* has shape \(5, .*, expected \(9, "):
        optimizer.load_state_dict(saved)
    assert unchanged(optimizer, before)
    fresh = {k: Parameter(p.detach().clone()) for k, p in ps.items()}
    other = RuleOptimizer([{"params": [*fresh.values()], "rule": name, **settings}])
    give(fresh, 1)
    other.step()
    optimizer.load_state_dict(copy.deepcopy(other.state_dict()))
    for some, one in ((ps, optimizer), (fresh, other)):
        for p, q in zip(some.values(), fresh.values(), strict=True):
            p.data.copy_(q)
        for t in (3, 4):
            give(some, t)
            one.step()
        ps = ps if one is other else {k: Parameter(p.detach().clone()) for k, p in ps.items()}


def test_a_gradient_of_another_shape_than_its_parameter_is_refused() -> None:
    for name in ("adamw", "muon", "adafactor"):
        p, beside = matrix(), Parameter(torch.ones(3))
        optimizer = RuleOptimizer([{"params": [beside], "rule": "adamw"}, {"params": [p], "rule": name}])
        p.grad, beside.grad = torch.ones_like(p), torch.ones(3)
        p.data = torch.ones(3, 4)
        with pytest.raises(RuntimeError, match=r"parameter 0 has shape \(3, 4\), its gradient \(4, 3\).*zero_grad"):
            optimizer.step()
        assert not optimizer.state and torch.equal(beside, torch.ones(3))


def test_rows_that_no_longer_divide_into_blocks_are_named() -> None:
    p = Parameter(torch.ones(4, 3))
    optimizer = Muon([("layer.qkv", p)], blocks=2)
    p.grad = torch.ones_like(p)
    optimizer.step()
    resize(p, (5, 3))
    with pytest.raises(ValueError, match=r"layer.qkv: 5 rows do not divide into 2 blocks"):
        optimizer.step()


@pytest.mark.parametrize("name", [n for n in NAMES if not REGISTRY[n].elementwise])
def test_a_gradient_whose_squares_overflow_is_scaled_or_skipped(name: str) -> None:
    """It is finite, but the state would not be; one that is a little smaller is taken as it is, and ruins nothing."""
    for mode in ("raise", "skip"):
        ps, beside = params(name), {"beside": Parameter(torch.ones(3))}
        mine = {k: p for k, p in ps.items() if p.ndim >= 2}
        optimizer = RuleOptimizer([
            {"params": [*beside.values()], "rule": "adamw"},
            {"params": [*mine.values()], "rule": name, "on_nonfinite": mode, **refreshing(name)},
        ])
        for t in range(1, 7):
            give(mine | beside, t)
            grad = mine["tall"].grad
            assert grad is not None
            grad.mul_({2: 1e10, 3: 1e17, 5: 1e20}.get(t, 1.0))
            before = snapshot(optimizer)
            if t == 5 and mode == "raise":
                with pytest.warns(RuntimeWarning, match=r"parameter 1: the gradient was so large"):
                    optimizer.step()
            else:
                optimizer.step()
            assert unchanged(optimizer, before) == (t == 5 and mode == "skip")
            for p in (mine | beside).values():
                assert p.isfinite().all() and all(x.isfinite().all() for x in optimizer.state[p].values()), (t, mode)


def test_squares_of_clipped_and_of_elementwise_gradients_may_be_large() -> None:
    p, q = matrix(), matrix()
    optimizer = RuleOptimizer([
        {"params": [p], "rule": "muon", "clip_norm": 1.0},
        {"params": [q], "rule": "lion", "on_nonfinite": "raise"},
    ])
    p.grad, q.grad = torch.full_like(p, 1e18), torch.full_like(q, 1e20)
    optimizer.step()
    half = Parameter(torch.ones(4, 3, dtype=torch.float16))
    half.grad = torch.full_like(half, 6e4)
    Muon([half]).step()
    assert p.isfinite().all() and q.isfinite().all() and half.isfinite().all()
    assert optimizer.state[p]["step"] == 1


ZEROS = [
    ("apollo", {"scale": 0.0}),
    ("fira", {"alpha": 0.0}),
    ("cosmos", {"lr_ratio": 1e-300}),
    ("adalomo", {"clip_threshold": 0}),
]


@pytest.mark.parametrize(("name", "setting"), ZEROS)
def test_a_step_of_zero_cannot_be_scaled_to_adamws(name: str, setting: dict[str, float]) -> None:
    (key,) = setting
    with pytest.raises(ValueError, match=f"{name}: {key}=.* leaves no step that lr_convention='adamw' could scale"):
        RuleOptimizer([matrix()], {"rule": name, "lr_convention": "adamw", **setting})
    RuleOptimizer([matrix()], {"rule": name, "lr_convention": "native", **setting})


def test_a_kernel_that_is_no_tuple_is_refused() -> None:
    with pytest.raises(ValueError, match="momentum_kernel must be a tuple of numbers, got 0"):
        make("adamw", [matrix()], momentum_kernel=0)
