"""The entry points of `hf_integration` beside its `TrainingArguments`: the stock Trainer and TRL's, tiny models."""

import json
import os
import shutil
import subprocess
import sys
import textwrap
from contextlib import nullcontext
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from transformers import (
    PreTrainedTokenizerFast,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    Trainer,
    TrainerCallback,
)
from transformers.trainer_utils import HPSearchBackend
from transformers.training_args import OptimizerNames

from hf_integration import (
    GradientNoiseScale,
    HessianBlocks,
    HybridOptimizer,
    OptimizerFactory,
    RoleTable,
    attach,
    create_optimizer,
    register,
)
from lightning_optim import RuleOptimizer, build_optimizer
from lightning_optim.diagnostics.view import unwrap_optimizer
from tests.helpers.paths import ROOT
from tests.hf_integration.test_trainer import (
    ENVIRONMENT,
    Tokens,
    arguments,
    assert_same,
    groups_of,
    llama,
    logged,
    make_model,
    model_of,
    one_thread,  # noqa: F401
    stopped_adamw,
    trainer_of,
    weights,
)

FLAGS: dict[str, Any] = {
    "learning_rate": 1e-2,
    "weight_decay": 0.1,
    "max_steps": 4,
    "per_device_train_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "use_cpu": True,
    "disable_tqdm": True,
    "dataloader_pin_memory": False,
}


others_use_old_names = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing\\w*. is deprecated:FutureWarning")


def stock(folder: Path, **settings: Any) -> transformers.TrainingArguments:
    return transformers.TrainingArguments(output_dir=str(folder), **(FLAGS | settings))


def plain_trainer(folder: Path, **settings: Any) -> Trainer:
    return Trainer(llama(), stock(folder, **settings), train_dataset=Tokens())


def run(folder: Path, script: str) -> str:
    """Run a script in a process of its own, whose enum of optimizer names nobody has extended."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(script)],
        cwd=folder,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# -- register ---------------------------------------------------------------------------------------------------------

STOCK_SCRIPT = """
    import transformers

    from tests.hf_integration.test_trainer import Tokens, llama


    def main(*argv):
        parser = transformers.HfArgumentParser(transformers.TrainingArguments)
        (args,) = parser.parse_args_into_dataclasses(list(argv), look_for_args_file=False)
        trainer = transformers.Trainer(llama(), args, train_dataset=Tokens())
        trainer.train(args.resume_from_checkpoint)
        return trainer
"""
"""Knows nothing of lightning_optim but the test's model."""


def test_a_stock_script_takes_our_names(tmp_path: Path):
    (tmp_path / "script.py").write_text(textwrap.dedent(STOCK_SCRIPT))
    out = run(
        tmp_path,
        """
        import copy
        import json
        import sys

        sys.path.insert(0, ".")
        from script import main
        from transformers import TrainingArguments
        from transformers.training_args import OptimizerNames

        import hf_integration
        from lightning_optim.core.rule import REGISTRY

        theirs = {name: member.value for name, member in OptimizerNames.__members__.items()}
        try:
            TrainingArguments(optim="muon")
            raise SystemExit("the import has registered")
        except ValueError:
            pass

        added = hf_integration.register()
        every = [*sorted(REGISTRY), *(f"lightning_optim.{name}" for name in sorted(REGISTRY))]
        assert added == [name for name in every if name not in theirs.values()], added
        assert {"muon", "lion", "adam"} <= set(added)
        assert hf_integration.register() == []
        members = OptimizerNames.__members__
        assert {name: members[name].value for name in theirs} == theirs  # LION is lion_32bit, as before
        assert [m.value for m in OptimizerNames][-len(added):] == added
        assert len(set(members)) == len(theirs) + len(added)
        muon = OptimizerNames("muon")
        assert isinstance(muon, OptimizerNames) and muon == "muon" and muon.value == "muon"
        assert OptimizerNames[muon.name] is muon and getattr(OptimizerNames, muon.name) is muon
        assert copy.deepcopy(muon) == muon

        flags = "--optim muon --optim_args momentum=0.9,rest_lr=1e-4,nesterov=false,ns_coefficients=(3,-4.3,2) "
        flags += "--learning_rate 1e-2 --weight_decay 0.1 --adam_beta2 0.95 --per_device_train_batch_size 2 "
        flags += "--max_steps 4 --save_steps 2 --report_to none --use_cpu --disable_tqdm true "
        flags += "--dataloader_pin_memory false --output_dir "
        trainer = main(*(flags + "whole").split())
        resumed = main(*(flags + "resumed --resume_from_checkpoint whole/checkpoint-2").split())
        for a, b in zip(trainer.model.parameters(), resumed.model.parameters(), strict=True):
            assert a.equal(b)
        assert json.loads(trainer.args.to_json_string())["optim"] == trainer.args.to_dict()["optim"] == "muon"

        ours = hf_integration.TrainingArguments(
            optim="muon", rest_optim="lion", output_dir="ours", use_cpu=True, optim_args="momentum=0.8"
        )
        from tests.hf_integration.test_trainer import llama
        from transformers import Trainer

        groups = Trainer(llama(), ours).create_optimizer().param_groups  # a forgotten factory still counts
        print([(g["name"], g.get("momentum")) for g in groups])

        for optim_args, wrong in {
            "momentun=0.9": "muon has no setting 'momentun'; did you mean 'momentum'",
            "momentum=high": "muon: momentum must be a number, got 'high'",
            "momentum=-1": "muon: momentum must be a finite number >= 0, got -1",
            "ns_steps=2.5": "muon: ns_steps must be an integer, got 2.5",
            "nesterov=1": "muon: nesterov must be True or False, got 1",
            "scale=spectrl": "muon: scale: unknown value 'spectrl'; did you mean 'spectral'",
            "rest=adanw": "unknown optimizer 'adanw'; did you mean 'adamw'",
            "rest_lr=-1e-4": "muon: rest_lr must be a finite number >= 0, got -0.0001",
            "lr=1e-3": "optim_args: lr is set by --learning_rate",
            "momentum=0.9,momentum=0.5": "optim_args gives momentum twice",
            "momentum=0.9)(nesterov=False": "optim_args: ')' closes nothing",
        }.items():
            try:
                main(*(flags + "wrong --optim_args " + optim_args).split())
                raise SystemExit(f"{optim_args} was taken")
            except ValueError as error:
                assert wrong in str(error), error
        """,
    )
    assert out.splitlines()[-1] == "[('muon/hidden', 0.8), ('lion/embedding', None), ('lion/vector', None)]"

    settings = {"momentum": 0.9, "nesterov": False, "ns_coefficients": (3, -4.3, 2), "rest_lr": 1e-4}
    optimizer = {"name": "muon", "lr": 1e-2, "weight_decay": 0.1, "rest_settings": {"betas": (0.9, 0.95)}, **settings}
    case: Any = (OptimizerFactory, optimizer)
    by_argument = Trainer(llama(), stock(tmp_path), train_dataset=Tokens(), optimizer_cls_and_kwargs=case)
    by_argument.train()
    saved = load_file(tmp_path / "whole" / "checkpoint-4" / "model.safetensors")
    assert_same({k: v for k, v in weights(model_of(by_argument)).items() if k in saved}, saved)

    out = run(  # a machine without our package
        tmp_path,
        """
        import sys

        import torch
        from transformers import AutoModelForCausalLM, Trainer

        args = torch.load("whole/checkpoint-2/training_args.bin", weights_only=False)
        model = AutoModelForCausalLM.from_pretrained("whole/checkpoint-2")
        state = torch.load("whole/checkpoint-2/optimizer.pt", weights_only=True)
        assert type(args.optim) is str and args.optim == args.to_dict()["optim"] == "muon"
        assert args.learning_rate == 1e-2 and state["param_groups"][0]["momentum"] == 0.9
        args.optim_args = None  # Transformers' own form knows no tuples
        try:
            Trainer(model, args).create_optimizer()
            raise SystemExit("trained with something else")
        except ValueError as error:
            print(error)
        assert not {"hf_integration", "lightning_optim"} & set(sys.modules)
        """,
    )
    assert "unsupported optimizer: muon" in out


@pytest.mark.parametrize("change", ["moved", "another enum", "other arguments"])
def test_another_release_of_transformers_is_refused_untouched(monkeypatch: pytest.MonkeyPatch, change: str):
    names = list(OptimizerNames)
    if change == "moved":
        monkeypatch.delattr(Trainer, "get_optimizer_cls_and_kwargs")
    elif change == "another enum":
        monkeypatch.delattr(OptimizerNames, "_value2member_map_")
    else:
        monkeypatch.setattr(Trainer, "get_optimizer_cls_and_kwargs", staticmethod(lambda context: context))
    refused = r"cannot extend --optim of Transformers \d.*optimizer_cls_and_kwargs=\(hf_integration.OptimizerFactory"
    with pytest.raises(RuntimeError, match=refused):
        register()
    monkeypatch.undo()
    assert list(OptimizerNames) == names


def test_target_modules_and_rates_by_name_are_followed(tmp_path: Path):
    args = stock(tmp_path, optim_target_modules=["q_proj"])
    trainer = attach(plain_trainer(tmp_path), "galore", rank=4)
    trainer.args = args
    trainer.create_optimizer()
    owned = {
        g["rule"]: set(g["param_names"]) for g in cast("Any", trainer.optimizer).param_groups if g["role"] == "hidden"
    }
    assert len(owned["galore"]) == 2 and all("q_proj" in name for name in owned["galore"])
    assert any("mlp" in name for name in owned["adamw"])

    args.optim_target_modules, vars(args)["learning_rate_mapping"] = "all-linear", {r"\.0\..*q_proj": 0.5}
    trainer = attach(plain_trainer(tmp_path), "muon", overrides=[("*.layers.1.*", "lion", {})])
    trainer.args = args
    trainer.create_optimizer()
    groups = cast("Any", trainer.optimizer).param_groups
    assert [name for g in groups if g["lr"] == 0.5 for name in g["param_names"]] == [
        "model.layers.0.self_attn.q_proj.weight"
    ]
    assert all("layers.1" in name for g in groups if g["rule"] == "lion" for name in g["param_names"])

    for name, value in {"optim_target_modules": ["nothing"], "learning_rate_mapping": {"nothing": 1.0}}.items():
        trainer = attach(plain_trainer(tmp_path), "muon")
        trainer.args = stock(tmp_path)
        vars(trainer.args)[name] = value
        with pytest.raises(ValueError, match=f"{name}.*nothing"):
            trainer.create_optimizer()


def test_a_finished_optimizer_is_measured_for(tmp_path: Path):
    losses = []
    for attached in (True, False):
        model = llama()
        given: Any = {} if attached else {"optimizers": (create_optimizer(model, "sophia_h", lr=0.1), None)}
        trainer = Trainer(model, stock(tmp_path, max_steps=3), train_dataset=Tokens(), **given)
        (attach(trainer, "sophia_h", lr=0.1, weight_decay=0.0) if attached else trainer).train()
        losses.append([row["loss"] for row in trainer.state.log_history if "loss" in row])
    assert losses[0] == losses[1]


def test_a_command_s_processes_take_our_names(tmp_path: Path):
    script = tmp_path / "stock.py"
    script.write_text(
        """
import sys
import torch
from transformers import HfArgumentParser, LlamaConfig, LlamaForCausalLM, TrainingArguments

(args,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses()
from transformers import Trainer  # after the parser, as TRL's commands do

size = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(LlamaConfig(vocab_size=64, **size))
trainer = Trainer(model, args, train_dataset=[{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4)
trainer.train()
print("kept", sys.modules["sitecustomize"].__name__, sys.modules["kept"].__name__)
print([(g["name"], g["refresh"], g["betas"]) for g in trainer.optimizer.param_groups if g["rule"] == "soap"])
"""
    )
    (tmp_path / "sitecustomize.py").write_text("import kept")  # somebody's own
    (tmp_path / "kept.py").write_text("")
    flags = ["--optim", "soap", "--optim_args", "refresh=any(staggered:5, off_diagonal:0.3), betas=(0.8, 0.9)"]
    flags += ["--max_steps", "1", "--use_cpu", "--report_to", "none", "--save_strategy", "no", "--output_dir", "out"]
    command = ["-m", "hf_integration", "torchrun", "--standalone", "--nproc-per-node", "1", str(script), *flags]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(tmp_path)]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[('soap/hidden', 'any(staggered:5, off_diagonal:0.3)', (0.8, 0.9))" in done.stdout
    assert "kept sitecustomize kept" in done.stdout


# -- attach -----------------------------------------------------------------------------------------------------------


def test_attach_is_the_argument(tmp_path: Path):
    attached = plain_trainer(tmp_path)
    assert attach(attached, "muon", rest_lr=1e-3, momentum=0.9) is attached
    attached.train()
    args = arguments(
        tmp_path, weight_decay=0.1, rest_learning_rate=1e-3, optim_args="momentum=0.9", max_steps=4, report_to="none"
    )
    by_argument = trainer_of(llama(), args)
    by_argument.train()
    assert_same(weights(model_of(attached)), weights(model_of(by_argument)))
    assert [(g["name"], g["initial_lr"], g["weight_decay"]) for g in groups_of(attached).values()] == [
        ("muon/hidden", 1e-2, 0.1),
        ("adamw/embedding", 1e-3, 0.1),
        ("adamw/vector", 1e-3, 0.0),
    ]


def test_what_attach_is_given_wins_over_the_arguments(tmp_path: Path):
    trainer = attach(
        plain_trainer(tmp_path, adam_beta1=0.8, adam_beta2=0.9),
        "adamw",
        lr=3e-4,
        weight_decay=0.0,
        betas=(0.9, 0.95),
    )
    trainer.create_optimizer()
    seen = {(g["lr"], g["weight_decay"], g["betas"], g["eps"]) for g in groups_of(trainer).values()}
    assert seen == {(3e-4, 0.0, (0.9, 0.95), 1e-8)}
    trainer = attach(plain_trainer(tmp_path, adam_beta1=0.8), "muon", rest_settings={"eps": 1e-6})
    trainer.create_optimizer()
    assert (groups_of(trainer)["adamw/vector"]["betas"], groups_of(trainer)["adamw/vector"]["eps"]) == (
        (0.8, 0.999),
        1e-6,
    )
    trainer = attach(plain_trainer(tmp_path), "muon", rest="lion", overrides=[("*.mlp.*", "sgd", {"lr": 0.5})])
    trainer.create_optimizer()
    assert groups_of(trainer)["lion/vector"]["betas"] == (0.9, 0.99)
    assert "sgd" in {g["rule"] for g in groups_of(trainer).values()}


def test_a_trainer_without_the_argument(tmp_path: Path):
    args = Seq2SeqTrainingArguments(output_dir=str(tmp_path), **FLAGS)
    trainer = Seq2SeqTrainer(llama(), args, train_dataset=Tokens())
    before = weights(model_of(trainer))
    attach(trainer, "muon").train()
    assert isinstance(trainer, Seq2SeqTrainer) and list(groups_of(trainer))[0] == "muon/hidden"
    assert all(not torch.equal(p, before[name]) for name, p in model_of(trainer).named_parameters())


def test_attach_goes_on_from_the_trainers_adamw(tmp_path: Path):
    stopped_adamw(tmp_path, llama())
    shutil.rmtree(tmp_path / "checkpoint-8")
    trainer = attach(plain_trainer(tmp_path, max_steps=8, warmup_steps=2), "muon", rest_lr=1e-3)
    trainer.train(resume_from_checkpoint=True)
    assert logged(trainer, "learning_rate")[4:] == pytest.approx([1e-2 * (8 - t) / 6 for t in range(4, 8)])
    state = cast("RuleOptimizer", trainer.optimizer).state
    for name, group in groups_of(trainer).items():
        assert {float(state[p]["step"]) for p in group["params"]} == {4.0 if name == "muon/hidden" else 8.0}


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("muonn", {}, "unknown optimizer 'muonn'; did you mean 'muon'"),
        ("muon", {"momentun": 0.9}, "muon has no setting 'momentun'; did you mean 'momentum'"),
        ("muon", {"momentum": "0.9"}, "muon: momentum must be a number, got '0.9'"),
        ("muon", {"rest_learning_rate": 1e-4}, "muon has no setting 'rest_learning_rate'"),
        ("muon", {"rest": "adanw"}, "unknown optimizer 'adanw'; did you mean 'adamw'"),
        ("muon", {"lr": -1.0}, "muon: lr must be a finite number >= 0"),
    ],
)
def test_attach_refuses_at_once(tmp_path: Path, name: str, settings: dict[str, Any], message: str):
    trainer = plain_trainer(tmp_path)
    with pytest.raises(ValueError, match=message):
        attach(trainer, name, **settings)
    assert trainer.optimizer_cls_and_kwargs is None


def test_attach_comes_before_any_other_optimizer(tmp_path: Path):
    refused = pytest.raises(ValueError, match=r"attach\(trainer, 'lion'\): the trainer already has an optimizer or has")
    trainer = attach(plain_trainer(tmp_path), "muon")
    with refused:
        attach(trainer, "lion")
    trained = plain_trainer(tmp_path, max_steps=1)
    trained.train()
    with refused:
        attach(trained, "lion")
    trained.optimizer = None
    with refused:
        attach(trained, "lion")
    model = llama()
    pair = (create_optimizer(model, "muon", lr=1e-2), None)
    with refused:
        attach(Trainer(model, stock(tmp_path), optimizers=pair), "lion")


def test_a_cycle_moves_the_momentum_of_every_group(tmp_path: Path):
    class Watch(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            groups = kwargs["optimizer"].param_groups
            seen.append([(g["lr"], g["momentum"] if g["rule"] == "muon" else g["betas"][0]) for g in groups])

    def schedule(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
        return torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=5)

    seen: list[Any] = []
    model = llama()
    made = create_optimizer(model, "muon", lr=1e-2)
    pair: Any = (made, schedule(made))
    Trainer(model, stock(tmp_path), train_dataset=Tokens(), optimizers=pair, callbacks=[Watch()]).train()
    p = nn.Parameter(torch.zeros(1))
    p.grad = torch.zeros(1)
    theirs = torch.optim.AdamW([p])
    expected = schedule(theirs)
    for groups in seen:
        assert groups == [(theirs.param_groups[0]["lr"], theirs.param_groups[0]["betas"][0])] * 3
        theirs.step()
        expected.step()
    assert len(seen) == 4


# -- flags that change before the optimizer is built -------------------------------------------------------------------


class First(TrainerCallback):
    """Keeps the groups of the first step of every run."""

    def __init__(self) -> None:
        self.seen: list[dict[str, dict[str, Any]]] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.seen.append({g["name"]: dict(g) for g in kwargs["optimizer"].param_groups})


SPACES: list[dict[str, Any]] = [
    {"learning_rate": 1e-4, "weight_decay": 0.0, "adam_beta2": 0.95, "adam_epsilon": 1e-7},
    {"learning_rate": 5e-2, "weight_decay": 0.3, "adam_beta2": 0.9, "adam_epsilon": 1e-6},
]


@pytest.mark.parametrize("entry", ["attach", "HybridOptimizer", "OptimizerFactory", "TrainingArguments"])
def test_every_trial_of_a_search_trains_with_its_own_flags(tmp_path: Path, entry: str):
    first = First()
    case: dict[str, Any] = {"callbacks": [first], "train_dataset": Tokens(), "model_init": lambda: llama()}
    settings: dict[str, Any] = {"max_steps": 1, "lr_scheduler_type": "constant"}
    args: Any = stock(tmp_path, **settings)
    if entry == "HybridOptimizer":
        case["callbacks"].append(HybridOptimizer("muon"))
    if entry == "OptimizerFactory":
        case["optimizer_cls_and_kwargs"] = (OptimizerFactory, {"name": "muon", "args": args})
    if entry == "TrainingArguments":
        args = arguments(tmp_path, report_to="none", **settings)
        case["optimizer_cls_and_kwargs"] = args.optimizer_cls_and_kwargs()
    trainer = Trainer(args=args, **case)
    if entry == "attach":
        attach(trainer, "muon")
    trainer.hp_search_backend = HPSearchBackend.WANDB
    for flags in SPACES:
        trainer._hp_search_setup(dict(flags))  # of hyperparameter_search; the rest of it needs a backend
        trainer.train()
    for groups, flags in zip(first.seen, SPACES, strict=True):
        hidden, rest = groups["muon/hidden"], groups["adamw/embedding"]
        assert {g["lr"] for g in groups.values()} == {flags["learning_rate"]}
        assert (hidden["weight_decay"], rest["weight_decay"]) == (flags["weight_decay"],) * 2
        assert (rest["betas"], rest["eps"]) == ((0.9, flags["adam_beta2"]), flags["adam_epsilon"])


def test_adam_s_flags_hold_for_rules_with_adam_s_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    flags = {"adam_beta2": 0.95, "adam_epsilon": 1e-7}
    seen = {}
    for name in ("adam_mini", "galore", "soap"):
        trainer = attach(plain_trainer(tmp_path, **flags), name)
        trainer.create_optimizer()
        seen[name] = {g["rule"]: (g["betas"], g["eps"]) for g in groups_of(trainer).values()}
    followed = ((0.9, 0.95), 1e-7)
    assert seen["adam_mini"] == {"adam_mini": followed}
    assert seen["galore"] == {"galore": ((0.9, 0.95), 1e-6), "adamw": followed}
    assert seen["soap"] == {"soap": ((0.95, 0.95), 1e-7), "adamw": followed}
    assert [record.getMessage() for record in caplog.records if "--adam" in record.getMessage()] == [
        "--adam_epsilon 1e-07 holds for adamw; galore keeps its own eps=1e-06: optim_args or arguments set it",
        "--adam_beta2 0.95 holds for adamw; soap keeps its own betas=(0.95, 0.95): optim_args or arguments set it",
    ]


def test_adam_s_flags_hold_for_the_rule_of_an_override(tmp_path: Path):
    overrides: list[Any] = [("*.mlp.up_proj.*", "adam_mini", {}), ("*.mlp.*", "adam_mini", {"betas": (0.7, 0.8)})]
    trainer = attach(plain_trainer(tmp_path, adam_beta2=0.95), "muon", rest="lion", overrides=overrides)
    trainer.create_optimizer()
    seen = {(g["rule"], g["betas"]) for g in groups_of(trainer).values() if "betas" in g}
    assert seen == {("adam_mini", (0.9, 0.95)), ("adam_mini", (0.7, 0.8)), ("lion", (0.9, 0.99))}


@pytest.mark.parametrize("source", [{"recipe": "muon"}, {"preset": "record46"}])
def test_adam_s_flags_are_refused_beside_published_settings(tmp_path: Path, source: dict[str, Any]):
    with pytest.raises(ValueError, match=rf"--adam_beta2 0.95 is not used beside a {next(iter(source))}"):
        attach(plain_trainer(tmp_path, adam_beta2=0.95), "muon", **source)


def test_groups_of_sentence_transformers_may_hold_only_weights_of_the_model():
    model = llama()
    groups = [{"params": list(model.parameters())}]
    optimizer = OptimizerFactory()(model, name="adamw", lr=1e-3, optimizer_dict=groups)
    assert sum(len(g["params"]) for g in optimizer.param_groups) == len(groups[0]["params"])
    groups.append({"params": [torch.nn.Parameter(torch.zeros(2))]})
    with pytest.raises(ValueError, match="the loss has weights of its own"):
        OptimizerFactory()(model, name="adamw", lr=1e-3, optimizer_dict=groups)


def test_flags_count_until_the_optimizer_is_built(tmp_path: Path):
    args = arguments(tmp_path, optim_args="momentum=0.9")
    trainer = trainer_of(llama(), args)
    args.optim, args.optim_args, args.rest_learning_rate, args.lr_convention = "soap", "rank=None", 1e-3, "native"
    args.optim_args, args.rest_optim, args.adam_beta1 = "betas=(0.8, 0.9)", "lion", 0.7
    with pytest.raises(ValueError, match=r"--adam_beta1 0.7 is for rules with Adam's betas, .*only soap, lion"):
        trainer.create_optimizer()
    args.adam_beta1 = 0.9
    trainer.create_optimizer()
    groups = groups_of(trainer)
    assert (groups["soap/hidden"]["betas"], groups["soap/hidden"]["lr_convention"]) == ((0.8, 0.9), "native")
    assert {g["lr"] for name, g in groups.items() if name.startswith("lion/")} == {1e-3}

    args = arguments(tmp_path)
    factory, kwargs = cast("Any", args.optimizer_cls_and_kwargs())
    args.learning_rate = 2e-3
    assert (kwargs["name"], kwargs["lr"]) == ("muon", 2e-3)
    made = factory()(llama(), **kwargs | {"overrides": [("embedding", "sgd", {"lr": 0.5})]})
    assert {g["lr"] for g in made.param_groups if g["rule"] == "sgd"} == {0.5}

    trainer = attach(plain_trainer(tmp_path), "muon", momentum=0.8)
    trainer.args = stock(tmp_path, learning_rate=3e-3, weight_decay=0.2)
    trainer.create_optimizer()
    hidden = groups_of(trainer)["muon/hidden"]
    assert (hidden["lr"], hidden["weight_decay"], hidden["momentum"]) == (3e-3, 0.2, 0.8)


def test_flags_that_cannot_be_are_refused_when_the_optimizer_is_built(tmp_path: Path):
    args = arguments(tmp_path)
    trainer = trainer_of(llama(), args)
    args.optim = "adamw_torch"
    with pytest.raises(ValueError, match="optim was changed to 'adamw_torch', which is not an optimizer of lightning_"):
        trainer.train()
    trainer = attach(plain_trainer(tmp_path, max_grad_norm=0.0), "lomo", fused_backward=True)
    trainer.args.gradient_accumulation_steps = 2
    with pytest.raises(ValueError, match="raise the batch size"):
        trainer.create_optimizer()
    with pytest.raises(ValueError, match="OptimizerFactory needs the name of an optimizer"):
        OptimizerFactory()(llama(), lr=1e-3)


# -- HybridOptimizer and RoleTable ------------------------------------------------------------------------------------


class Change(TrainerCallback):
    """Freezes a matrix, thaws another, adds a parameter: one at a time; keeps the table as it was after every step."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.seen = folder, []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.optimizer = kwargs["optimizer"]

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        model = kwargs["model"]
        self.seen.append((self.folder / "roles.md").read_text())
        if state.global_step == 2:
            model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
        if state.global_step == 3:
            frozen = model.model.layers[0].mlp.down_proj.weight
            self.optimizer.add_param_group({"params": [frozen.requires_grad_()], "lr": 1e-3})
            schedule = kwargs["lr_scheduler"]  # torch's knows no groups but those it has seen
            schedule.base_lrs.append(1e-3)
            schedule.lr_lambdas.append(schedule.lr_lambdas[0])
        if state.global_step == 4:
            model.model.register_parameter("late", nn.Parameter(torch.zeros(3)))


@pytest.mark.parametrize("entry", ["callback", "attach"])
def test_the_table_of_roles_is_kept_true(tmp_path: Path, entry: str):
    model, change = llama(), Change(tmp_path)
    model.get_submodule("model.layers.0.mlp.down_proj").requires_grad_(False)
    ours = HybridOptimizer("muon", momentum=0.9) if entry == "callback" else RoleTable()
    args = stock(tmp_path, max_steps=6, report_to="tensorboard", save_strategy="steps", save_steps=6)
    trainer = Trainer(model, args, train_dataset=Tokens(), callbacks=[change, ours])
    if entry == "attach":
        attach(trainer, "muon", momentum=0.9)
    trainer.train()
    assert groups_of(trainer)["muon/hidden"]["momentum"] == 0.9 and (tmp_path / "checkpoint-6").is_dir()
    first, _, frozen, thawed, late, _ = change.seen
    assert change.seen[1] == first and change.seen[5] == late
    up, down = (f"model.layers.*.mlp.{side}_proj.weight" for side in ("up", "down"))
    assert first.startswith("LlamaForCausalLM at step 0") and f"| {up} (2 times) | 64 x 32 | hidden | muon |" in first
    assert "2,048 weights frozen: model.layers.0.mlp.down_proj.weight" in first
    assert f"| {up} | " not in frozen and "| model.layers.0.mlp.up_proj.weight | 64 x 32 | hidden | muon |" in frozen
    assert "4,096 weights frozen" in frozen and "at step 2" in frozen
    assert f"| {down} (2 times) | 32 x 64 | hidden | muon |" in thawed and "2,048 weights frozen" in thawed
    assert "3 weights trainable, but in no group: model.late" in late
    (log,) = {path.parent for path in tmp_path.rglob("events.out.tfevents*")}
    events = EventAccumulator(str(log), size_guidance={"tensors": 0}).Reload()
    pages = {e.step: e.tensor_proto.string_val[0].decode() for e in events.Tensors("roles/text_summary")}
    assert pages == {0: first, 2: frozen, 3: thawed, 4: late}


def test_hybrid_optimizer_is_attach(tmp_path: Path):
    case = {"rest_lr": 1e-3, "momentum": 0.9}
    ours = HybridOptimizer("muon", **case)
    by_callback = Trainer(llama(), stock(tmp_path), train_dataset=Tokens(), callbacks=[ours])
    by_callback.train()
    attached = attach(plain_trainer(tmp_path), "muon", **case)
    attached.train()
    assert_same(weights(model_of(by_callback)), weights(model_of(attached)))
    assert (tmp_path / "roles.md").read_text().startswith("LlamaForCausalLM at step 0")


def test_hybrid_optimizer_refuses(tmp_path: Path):
    with pytest.raises(ValueError, match="did you mean 'muon'"):
        HybridOptimizer("muno")
    trainer = plain_trainer(tmp_path)
    trainer.add_callback(HybridOptimizer("muon"))
    with pytest.raises(ValueError, match=r"came after the trainer was made.*attach\(trainer, 'muon'\)"):
        trainer.train()
    pair: Any = (OptimizerFactory, {"name": "lion", "lr": 1e-4})
    with pytest.raises(ValueError, match="already has an optimizer"):
        Trainer(llama(), stock(tmp_path), optimizer_cls_and_kwargs=pair, callbacks=[HybridOptimizer("muon")])


def test_the_table_says_nothing_of_other_optimizers(tmp_path: Path):
    Trainer(llama(), stock(tmp_path, max_steps=1), train_dataset=Tokens(), callbacks=[RoleTable()]).train()
    assert not (tmp_path / "roles.md").exists()


# -- create_optimizer -------------------------------------------------------------------------------------------------


def test_create_optimizer_is_build_optimizer(tmp_path: Path):
    model = llama()
    made = create_optimizer(model, "muon", lr=1e-2, weight_decay=0.1, rest_lr=1e-3)
    expected = build_optimizer(model, "muon", lr=1e-2, weight_decay=0.1, rest_lr=1e-3)
    assert type(made) is type(expected) and isinstance(made, RuleOptimizer)
    assert made.state_dict() == expected.state_dict()

    trainer = Trainer(model, stock(tmp_path), train_dataset=Tokens(), optimizers=(made, None))
    trainer.train()
    attached = attach(plain_trainer(tmp_path), "muon", rest_lr=1e-3)
    attached.train()
    assert_same(weights(model_of(trainer)), weights(model_of(attached)))


@others_use_old_names
def test_create_optimizer_takes_adapters_only(tmp_path: Path):
    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))  # pyright: ignore[reportArgumentType]
    before = weights(model)
    optimizer = create_optimizer(model, "muon", lr=1e-2)
    trainer = Trainer(model, stock(tmp_path), train_dataset=Tokens(), optimizers=(optimizer, None))
    trainer.train()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if "lora_" in name}


# -- TRL --------------------------------------------------------------------------------------------------------------


def trl_model(folder: Path) -> tuple[nn.Module, PreTrainedTokenizerFast]:
    torch.set_num_threads(1)
    make_model(folder / "model", Path(json.__file__))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder / "model")
    tokenizer.pad_token = tokenizer.eos_token
    return transformers.AutoModelForCausalLM.from_pretrained(folder / "model"), tokenizer


@others_use_old_names
def test_trl_sft_by_argument(tmp_path: Path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    model, tokenizer = trl_model(tmp_path)
    trainer = trl.SFTTrainer(
        model,
        trl.SFTConfig(output_dir=str(tmp_path), max_length=16, bf16=False, **FLAGS),
        train_dataset=datasets.Dataset.from_list([{"text": "def load(text): return decode(text)"}] * 8),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=(OptimizerFactory, {"name": "muon", "lr": 1e-2}),
    )
    trainer.train()
    losses = logged(trainer, "loss")
    assert list(groups_of(trainer))[0] == "muon/hidden" and losses[-1] < losses[0] - 0.1


@others_use_old_names
def test_trl_dpo_by_attach(tmp_path: Path):
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    model, tokenizer = trl_model(tmp_path)
    row = {"prompt": "def load", "chosen": "(text): return", "rejected": "; while 1"}
    trainer = trl.DPOTrainer(
        model,
        args=trl.DPOConfig(output_dir=str(tmp_path), max_length=16, bf16=False, **FLAGS),
        train_dataset=datasets.Dataset.from_list([row] * 8),
        processing_class=tokenizer,
    )
    attach(trainer, "muon", rest_lr=1e-3).train()
    losses = logged(trainer, "loss")
    assert list(groups_of(trainer))[0] == "muon/hidden" and losses[-1] < losses[0] - 0.01


def trl_trainer(kind: str, folder: Path, **more: Any) -> Trainer:
    trl = pytest.importorskip("trl", reason="trl is not installed")
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    model, tokenizer = trl_model(folder)
    rows: dict[str, list[dict[str, str]]] = {
        "SFT": [{"text": "def load(text): return decode(text)"}, {"text": "import json"}] * 8,
        "DPO": [{"prompt": "def load", "chosen": "(text): return", "rejected": "; while 1"}] * 16,
        "GRPO": [{"prompt": "def load"}, {"prompt": "import"}] * 8,
    }
    flags = FLAGS | {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-3, "bf16": False}
    flags |= {"GRPO": {"num_generations": 2, "max_completion_length": 4, "gradient_accumulation_steps": 2}}.get(
        kind, {}
    )
    config = getattr(trl, f"{kind}Config")(output_dir=str(folder), **flags)
    if kind == "GRPO":
        more["reward_funcs"] = lambda completions, **_: [float(len(set(text))) for text in completions]
    data = datasets.Dataset.from_list(rows[kind])
    return getattr(trl, f"{kind}Trainer")(model, args=config, train_dataset=data, processing_class=tokenizer, **more)


@others_use_old_names
@pytest.mark.filterwarnings("ignore:the gradient noise scale needs")
@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_what_is_measured_under_trl(tmp_path: Path, kind: str):
    """Fused heads have no second derivative and no labels to draw; logs are as without measurements."""
    few: dict[str, Any] = {"every": 1, "max_overhead": 1e6, "probes": 2, "steps": 2, "coupling_probes": 1, "exact": ()}
    runs = []
    for watched in (False, True):
        transformers.set_seed(0)
        noise = GradientNoiseScale(every=1, max_overhead=1e6)
        ours = [HessianBlocks(**few), noise] if watched else []
        trainer = trl_trainer(kind, tmp_path / str(watched), callbacks=ours)
        attach(trainer, "muon")
        with pytest.warns(UserWarning, match="HessianBlocks takes differences") if watched else nullcontext():
            trainer.train()
        times = ("time", "runtime", "per_second", "flos")
        logs = [{k: v for k, v in x.items() if not any(t in k for t in times)} for x in trainer.state.log_history]
        runs.append((weights(model_of(trainer)), logs))
        if watched:
            assert ours[0].probe.measured == 2 and not ours[0].probe.stopped  # pyright: ignore
            assert noise.probe._examples[0] == {"SFT": 4, "DPO": 8, "GRPO": 8}[kind]  # pyright: ignore
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    for name in ("sophia_g", "sophia_h"):
        trainer = attach(trl_trainer(kind, tmp_path / name), name)
        with pytest.warns(UserWarning, match="differences of gradients in place of second|no labels can") as record:
            trainer.train()
        texts = [str(w.message) for w in record]
        assert sum("no labels can be drawn" in text for text in texts) == (name == "sophia_g")
        assert sum("differences of gradients in place" in text for text in texts) == 1
        state = cast("RuleOptimizer", unwrap_optimizer(trainer.optimizer)).state.values()
        assert any(bool(s["hessian"].any()) for s in state if "hessian" in s)
