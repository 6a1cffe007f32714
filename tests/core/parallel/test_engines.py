"""DeepSpeed and FSDP1: what they do to parameters and optimizers runs as in one process, or is refused by name."""

from __future__ import annotations

import copy
import functools
import importlib.util
import pickle
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lightning_optim
from lightning_optim import RuleOptimizer, build_optimizer, lookup
from lightning_optim.core.parallel import engines
from lightning_optim.core.rule import REGISTRY
from tests.helpers.pool import opened
from tests.helpers.zero_jobs import Run, config_of, net, start_deepspeed

needs_deepspeed = pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed")


# -- an engine that replaces parameters, without an engine ------------------------------------------------------------


def flatten(optimizer: RuleOptimizer) -> None:
    """What DeepSpeed ZeRO-1 and 2 do on one process, gradients included."""
    for group in optimizer.param_groups:
        flat = torch.cat([p.detach().reshape(-1) for p in group["params"]])
        flat = torch.cat([flat, flat.new_zeros(len(flat) % 2)]).requires_grad_()
        flat.grad = torch.ones_like(flat)
        group["params"] = [flat]


ELEMENTWISE = sorted(n for n, r in REGISTRY.items() if r.elementwise and not r.curvature_input)


@pytest.mark.parametrize("name", sorted(REGISTRY))
@pytest.mark.parametrize("way", [lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_flat_tensors_are_stepped_by_elementwise_rules_only(name: str, way: Callable[[Any], Any]) -> None:
    optimizer = build_optimizer(net(), name, lr=0.01)
    optimizer.divide = None  # a local function, which does not pickle
    optimizer = way(optimizer)
    flatten(optimizer)
    before = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    if name in ELEMENTWISE:
        optimizer.step()
        assert all(len(s) for s in optimizer.state.values()) and len(optimizer.state) == len(before)
        return
    for call in (optimizer.step, optimizer.pending_curvature):
        with pytest.raises(ValueError, match=rf"group '{name}/.*' \(0.weight, .*(hide|flat parameters).*use FSDP2"):
            call()
    after = [p for group in optimizer.param_groups for p in group["params"]]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)) and not optimizer.state


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"clip_norm": 1.0}, "clip_norm=1.0 needs whole parameters"),
        ({"on_nonfinite": "skip"}, "on_nonfinite='skip' needs whole parameters.*give on_nonfinite='off'"),
        ({"state_storage": "int8"}, "state_storage='int8' needs whole parameters"),
        ({"constraint": "hyperball"}, "constraint='hyperball' needs whole parameters"),
        ({"averaging": {"tail_ema": {}}}, "the averages of `with_averaging` would not reach the model"),
        ({"state_storage": "host"}, None),
    ],
)
def test_options_that_flat_tensors_cannot_have_are_refused(settings: dict[str, Any], match: str | None) -> None:
    optimizer = build_optimizer(net(), "adamw", lr=0.01, **settings)
    flatten(optimizer)
    if match is None:
        optimizer.step()
        return
    with pytest.raises(ValueError, match=match):
        optimizer.step()
    assert not optimizer.state


def test_flat_tensors_in_bfloat16_are_not_rounded_stochastically() -> None:
    """Every rank would draw the same bits."""
    for rounding in ("stochastic", "nearest", "kahan"):
        optimizer = build_optimizer(net().bfloat16(), "adamw", lr=0.01, param_rounding=rounding)
        flatten(optimizer)
        if rounding == "stochastic":
            with pytest.raises(ValueError, match="param_rounding='stochastic' needs whole .*'nearest' or 'kahan'"):
                optimizer.step()
        else:
            optimizer.step()


def test_a_checkpoint_is_not_loaded_into_flat_tensors() -> None:
    model = net()
    optimizer, other = build_optimizer(model, "adafactor", lr=0.01), build_optimizer(model, "adafactor", lr=0.01)
    flatten(optimizer)
    with pytest.raises(ValueError, match="made a flat tensor: adafactor needs whole matrices"):
        optimizer.load_state_dict(other.state_dict())
    other.load_state_dict(other.state_dict())
    flatten(other)
    with pytest.raises(ValueError, match="made a flat tensor: adafactor needs whole matrices"):
        other.step()


def test_one_vector_cut_into_shards_is_flat() -> None:
    optimizer = lightning_optim.Adafactor([("bias", nn.Parameter(torch.ones(8)))])
    optimizer.param_groups[0]["params"] = [torch.ones(4, requires_grad=True)]
    assert len(optimizer.known_params.flat_tensors(optimizer.param_groups[0])) == 1


def test_parameters_that_the_user_replaces_are_not_flat() -> None:
    """Copies, a layer of another width, some of the parameters, one more: with the shapes of parameters."""
    model = nn.Linear(6, 5)
    optimizer = lightning_optim.Adafactor(model.parameters())
    group = optimizer.param_groups[0]
    wider = nn.Linear(6, 7)
    for params in (
        [p.detach().clone().requires_grad_() for p in model.parameters()],  # as DeepSpeed without ZeRO
        list(wider.parameters()),
        [model.bias],
        [*model.parameters(), nn.Parameter(torch.ones(3))],
    ):
        group["params"] = params
        for p in params:
            p.grad = torch.ones_like(p)
        assert not optimizer.known_params.flat_tensors(group)
        optimizer.step()


# -- what a configuration says ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "name", "match"),
    [
        ({}, "muon", None),
        ({"zero_optimization": {"stage": 0}}, "muon", None),
        ({"zero_optimization": {"stage": 1}}, "muon", None),
        ({"zero_optimization": {"stage": 3}}, "sophia_h", "sophia_h cannot be measured.*stage is 3; use FSDP2"),
        ({"zero_optimization": {"stage": 2, "round_robin_gradients": True}}, "lion", None),
        (
            {"zero_optimization": {"stage": 2, "round_robin_gradients": True}},
            "soap",
            "round_robin_gradients.*soap; leave",
        ),
        ({"zero_optimization": {"stage": 2}}, "lion", None),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "none"}}}, "lion", None),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
            "lion",
            "puts DeepSpeedCPUAdam in the place of 'lion'; add \"zero_force_ds_cpu_optimizer\": false, which keeps it",
        ),
        (
            {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
            "muon",
            "device='nvme' .* moves state that 'muon' works on; give 'cpu'",
        ),
        (
            {
                "zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu", "ratio": 0.3}},
                "zero_force_ds_cpu_optimizer": False,
            },
            "lion",
            "ratio=0.3 .* an AdamW of its own step a share of the weights in the place of 'lion'",
        ),
        (
            {
                "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
                "zero_force_ds_cpu_optimizer": False,
            },
            "lion",
            None,
        ),
        ({"optimizer": {"type": "AdamW"}}, "lion", "'optimizer' of its own, which would replace 'lion'"),
    ],
)
def test_configurations_of_deepspeed(config: dict[str, Any], name: str, match: str | None) -> None:
    if match is None:
        engines.check_deepspeed(config, [lookup(name)])
        return
    with pytest.raises(ValueError, match=match):
        engines.check_deepspeed(config, [lookup(name)])


# -- DeepSpeed itself -------------------------------------------------------------------------------------------------


def refused(rank: int, world: int) -> dict[str, str]:
    """What is said under ZeRO to what cannot be, and whether weights had moved."""
    deepspeed = start_deepspeed(rank, world)
    out: dict[str, str] = {}
    round_robin = {"round_robin_gradients": True}
    averaging = {"averaging": {"tail_ema": {}}}
    cases: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
        "curvature": ("sophia_g", 2, {}, {}),
        "round robin": ("adafactor", 1, {}, round_robin),  # two matrices would stay where they are
        "skip": ("soap", 3, {"on_nonfinite": "skip"}, {}),
        "8 bits": ("lion", 2, {"state_storage": "int8"}, {}),
        "sub-groups": ("muon", 3, {"clip_norm": 1.0}, {"sub_group_size": 20}),
        "averaging": ("muon", 2, averaging, {}),
    }
    for label, (name, stage, settings, zero) in cases.items():
        model = net()
        build = functools.partial(build_optimizer, name=name, lr=0.01, **settings)
        run = Run(deepspeed, config_of(stage, zero=zero), build)
        with pytest.raises(ValueError) as error:
            run.step(0, rank, world)
        unmoved = all(torch.equal(a, b) for a, b in zip(run.weights(), model.parameters(), strict=True))
        out[label] = f"{error.value} {unmoved}"
    run = Run(deepspeed, config_of(2, zero=round_robin), lambda m: build_optimizer(m, "lion", lr=0.01))
    run.step(0, rank, world)  # works element by element

    def used(model: nn.Module) -> RuleOptimizer:
        optimizer = build_optimizer(model, "muon", lr=0.01)
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        return optimizer

    with pytest.raises(ValueError) as error:
        Run(deepspeed, config_of(1), used).step(0, rank, world)
    out["used before"] = str(error.value)
    return out


@needs_deepspeed
@pytest.mark.dist
def test_what_cannot_be_under_zero_is_refused_on_every_rank() -> None:
    with opened() as pool:  # DeepSpeed stays in its processes, whatever runs there next
        ranks = pool.run("tests.core.parallel.test_engines:refused", 2)
    for out in ranks:
        assert re.search("group 'sophia_g/hidden'.*flat.*use FSDP2.*True", out["curvature"])
        assert re.search("asks for round_robin_gradients, .* leave it out", out["round robin"])
        assert re.search("'soap/hidden': on_nonfinite='skip' .* give on_nonfinite='raise' or 'off' True", out["skip"])
        assert re.search(
            "'lion/hidden': state_storage='int8' .* give state_storage='bf16' or 'fp32' True", out["8 bits"]
        )
        assert re.search("'muon/hidden': clip_norm=1.0 .* give DeepSpeed's gradient_clipping", out["sub-groups"])
        assert re.search("the averages of `with_averaging` would not reach the model", out["averaging"])
        assert "a flat tensor: muon needs whole matrices" in out["used before"]


def trainer(rank: int, world: int, folder: str) -> dict[str, Any]:
    """What the stock Trainer says to our optimizers by every way in, with several configurations of DeepSpeed."""
    start_deepspeed(rank, world)
    import transformers
    from accelerate import Accelerator, DeepSpeedPlugin, FullyShardedDataParallelPlugin
    from accelerate.state import AcceleratorState, DistributedType

    import hf_integration

    hf_integration.register()
    rows = torch.randint(0, 32, (8, 12), generator=torch.Generator().manual_seed(0))
    data: Any = [{"input_ids": row, "labels": row} for row in rows]
    shape: dict[str, Any] = dict(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    shape |= dict(num_attention_heads=2, num_key_value_heads=2, max_position_embeddings=16)

    def made(way: str, name: str, config: dict[str, Any], **settings: Any) -> Any:
        torch.manual_seed(0)
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**shape))
        kind = hf_integration.TrainingArguments if way == "arguments" else transformers.TrainingArguments
        optim: dict[str, Any] = {"optim": name} if way in ("arguments", "flag") else {}
        args = kind(
            output_dir=folder,
            deepspeed=config or None,
            max_steps=2,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            logging_steps=1,
            report_to=[],
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=not config,
            **optim,
        )
        case: dict[str, Any] = {}
        if way == "arguments":
            case = {"optimizer_cls_and_kwargs": args.optimizer_cls_and_kwargs()}  # pyright: ignore
        if way == "factory":
            case = {"optimizer_cls_and_kwargs": (hf_integration.OptimizerFactory, {"name": name, "lr": 1e-2})}
        if way == "instance":
            case = {"optimizers": (hf_integration.create_optimizer(model, name, lr=1e-2), None)}
        if way == "callback":
            case = {"callbacks": [hf_integration.HybridOptimizer(name)]}
        out = transformers.Trainer(model, args, train_dataset=data, **case)
        return hf_integration.attach(out, name, **settings) if way == "attach" else out

    def tried(*args: Any, **settings: Any) -> Any:
        try:
            out = made(*args, **settings)
            out.train()
        except ValueError as error:
            return str(error)
        return [entry["loss"] for entry in out.state.log_history if "loss" in entry]

    auto = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto"}
    auto |= {"gradient_clipping": "auto"}
    zero: Any = auto | {"zero_optimization": {"stage": 2}}
    offload: Any = auto | {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    ours: Any = auto | {
        "zero_optimization": {"stage": 1},
        "optimizer": {"type": "Adam", "params": {"lr": "auto", "torch_adam": True}},
    }
    Accelerator(deepspeed_plugin=DeepSpeedPlugin(zero_stage=2, offload_optimizer_device="cpu"))
    model, out = nn.Linear(4, 4), {}
    for label, build in {
        "class": lightning_optim.Lion,
        "build": lambda _: build_optimizer(model, "lion", lr=1e-3),
    }.items():
        with pytest.raises(ValueError) as actual:
            build(model.parameters())
        out[f"offload accelerate {label}"] = str(actual.value)
    AcceleratorState._reset_state(reset_partial_state=True)
    out |= {f"offload {way}": tried(way, "lion", offload) for way in ("flag", "arguments", "factory", "instance")}
    out |= {f"own {way}": tried(way, "lion", ours) for way in ("flag", "attach", "instance", "callback")}
    curve = {"schedule": "linear", "warmup_steps": 2}  # which a callback of ours follows
    snapshot = offload | {"zero_force_ds_cpu_optimizer": False}
    out["losses"] = [tried("attach", "adamw", config, schedule=curve) for config in (snapshot, {})]
    out["matrices"] = [
        tried("flag", "muon", config) for config in (zero, auto | {"zero_optimization": {"stage": 3}}, {})
    ]
    AcceleratorState._reset_state(reset_partial_state=True)
    state = Accelerator(cpu=True).state
    state.distributed_type = DistributedType.FSDP  # as Accelerator does with a card, which FSDP1 needs
    state.fsdp_plugin = FullyShardedDataParallelPlugin(fsdp_version=1)
    build_optimizer(model, "adamw", lr=1e-3)
    assert state.distributed_type == DistributedType.FSDP
    with pytest.raises(ValueError) as actual:
        build_optimizer(model, "muon", lr=1e-3)
    out["fsdp1"] = str(actual.value)
    state.fsdp_plugin.fsdp_version = 2
    build_optimizer(model, "muon", lr=1e-3)
    AcceleratorState._reset_state(reset_partial_state=True)
    args = [transformers.TrainingArguments(output_dir=folder, deepspeed=x, use_cpu=x is None) for x in (zero, None)]
    build_optimizer(model, "muon", lr=1e-3)  # the last arguments count, also while the others are alive
    assert all(args)
    return out


@needs_deepspeed
@pytest.mark.dist
def test_the_trainer_refuses_what_deepspeed_would_change_and_trains_the_rest(tmp_path: Any) -> None:
    with opened() as pool:
        (out,) = pool.run("tests.core.parallel.test_engines:trainer", 1, folder=str(tmp_path))
    (with_zero, plain), fsdp1, matrices = out.pop("losses"), out.pop("fsdp1"), out.pop("matrices")
    record = {
        "offload": "DeepSpeedCPUAdam in the place of 'lion'; add \"zero_force_ds_cpu_optimizer\": false",
        "own": "'optimizer' of its own, which would replace 'lion'",
    }
    assert not {label: text for label, text in out.items() if record[label.split()[0]] not in text}
    assert with_zero == pytest.approx(plain, abs=1e-3) and len(plain) == 2
    assert matrices[0] == matrices[1] == matrices[2] and len(matrices[2]) == 2
    assert "accelerate's fsdp_version is 1; use FSDP2" in fsdp1
