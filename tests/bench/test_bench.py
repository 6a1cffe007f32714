"""The benchmark: its search, its record of trials, single trials, and the numbers of its report."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import signal
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

import pytest

from lightning_optim.bench import measured, page, report, statistics
from lightning_optim.bench.__main__ import main
from lightning_optim.bench.claims import CLAIMS
from lightning_optim.bench.ledger import Ledger
from lightning_optim.bench.models import make, size_of
from lightning_optim.bench.page import Table
from lightning_optim.bench.run import Queue, best, search
from lightning_optim.bench.space import (
    REGIMES,
    Point,
    Setup,
    Trial,
    ablation_trials,
    ablations,
    decay,
    fitted,
    propose,
    read_trial,
    trial_at,
)
from lightning_optim.bench.studies import studies
from lightning_optim.bench.tasks import functions, load
from lightning_optim.bench.training import schedule
from lightning_optim.bench.trial import Workspace, build, execute, needed_bytes
from lightning_optim.catalog import follows_adamw
from lightning_optim.core.param_groups import rule_of
from lightning_optim.core.rule import REGISTRY, hyperparameters, lookup
from lightning_optim.data.presets import PRESETS
from lightning_optim.refresh import parse
from tests.helpers.paths import ROOT

STDLIB = Path(sysconfig.get_path("stdlib"))
SMALL = {"data": (str(STDLIB / "argparse.py"),), "vocabulary": 300, "val_tokens": 512, "evaluations": 2}
TOY = Setup(model="micro", tokens=4 * 4 * 64, batch=4, **SMALL)  # four steps


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def workspace(folder: Path, cache: Path) -> Workspace:
    return Workspace(Ledger(folder / "trials.jsonl"), cache)


def command(folder: Path, cache: Path, *words: str, do: str = "run") -> list[str]:
    shared = ["--out", str(folder), "--cache", str(cache), "--model", "micro", "--stop_on_error"]
    small = ["--data", *SMALL["data"], "--vocabulary", "300", "--val_tokens", "512", "--evaluations", "2"]
    return [do, *shared, *small, "--batch", "4", *words]


# -- search -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(REGISTRY))
def test_every_search_space_can_be_searched(name: str) -> None:
    rule = REGISTRY[name]
    others = [key for key in rule.search if key != "lr"]
    assert len(rule.search["lr"]) == len(set(rule.search["lr"])) >= 5 and min(rule.search["lr"]) > 0
    assert len(others) <= 1 and set(others) <= set(hyperparameters(rule))
    losses: dict[Point, float] = {}
    seen = set()
    while (point := propose(rule, losses)) is not None:
        losses[point] = float(len(losses))
        trial = trial_at(Setup(), name, point, center=2e-3, size=(128, 256))
        seen.add(trial.key)
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in trial.config["settings"].items()}
        settings |= {"lr": trial.lr, "weight_decay": decay(rule, 0.1)}
        rule(**settings).validate()
    assert len(seen) == len(losses) == math.prod(map(len, rule.search.values())) >= 6


def searched(name: str, loss: Any, count: int) -> list[Point]:
    losses: dict[Point, float] = {}
    for _ in range(count):
        point = propose(lookup(name), losses)
        assert point is not None
        losses[point] = loss(point)
    return list(losses)


def test_search_goes_downhill_and_past_the_end_of_what_was_tried() -> None:
    low = searched("adamw", lambda p: abs(math.log2(p[0]) + 2) - 0.1 * (p[1] == (0.9, 0.95)), 6)
    assert [factor for factor, _ in low[:5]] == [1, 2, 0.5, 0.25, 0.125]
    assert low[5] == (0.25, (0.9, 0.95))
    high = searched("muon", lambda p: abs(math.log2(p[0]) - 3) - 0.1 * (p[1] == 0.9), 6)
    assert high == [(1, 0.95), (2, 0.95), (0.5, 0.95), (4, 0.95), (8, 0.95), (8, 0.9)]


def test_search_goes_down_where_everything_diverges() -> None:
    assert [factor for factor, _ in searched("galore", lambda p: math.inf, 5)] == [1, 2, 0.5, 0.25, 0.125]


def test_rank_interval_and_iterations_are_fitted_to_the_model() -> None:
    assert fitted(lookup("adamw"), (128, 256)) == {}
    assert fitted(lookup("soap"), (128, 256)) == {}  # its interval is ten
    assert fitted(lookup("galore"), (128, 256)) == {"rank": 32, "refresh": "staggered:10"}
    assert fitted(lookup("galore"), (128, 1500)) == {"rank": 32, "refresh": "staggered:50"}
    assert fitted(lookup("alice"), (128, 1500)) == {"rank": 32, "leading": 10, "refresh": "staggered:50"}
    assert fitted(lookup("galore"), (512, 10_000)) == {}
    assert parse(fitted(lookup("flora"), (512, 10_000))["refresh"]) == parse("staggered:333")
    assert fitted(lookup("hessian_free"), (128, 256)) == {"cg_iter": 5}
    assert fitted(lookup("lbfgs"), (128, 256)) == {"max_iter": 5}


def test_decay_is_shared_where_it_means_the_same() -> None:
    assert [decay(lookup(name), 0.1) for name in ("adamw", "muon", "galore")] == [0.1] * 3
    assert [decay(lookup(name), 0.1) for name in ("adam", "sgd", "lars")] == [0.0] * 3


def test_keys_know_the_configuration_and_no_more() -> None:
    one = Trial(Setup(tokens=1000), "muon", 1e-3, {"momentum": 0.9}, 1)
    assert read_trial(json.loads(json.dumps(one.config))).key == one.key
    assert Trial(Setup(tokens=1000), "muon", 1e-3, {"momentum": 0.9}, 1).key == one.key
    betas = Trial(Setup(), "adamw", 1e-3, {"betas": (0.9, 0.95)})
    assert read_trial(betas.config).key == betas.key
    others = [{"lr": 2e-3}, {"seed": 2}, {"optimizer": "lion"}, {"settings": {}}, {"setup": Setup(tokens=1001)}]
    assert len({one.key, *(dataclasses.replace(one, **other).key for other in others)}) == 6
    # these are in committed ledgers: a change of the hash, or of a default, would run everything again
    assert Trial(Setup(), "adamw", 2e-3).key == "8e68f1456a288a2d" and one.key == "ca67ef89b8e96f90"


def test_ablations_are_of_the_registry_and_settings_of_its_rules() -> None:
    for name, ablation in ablations(128).items():
        rates = dict.fromkeys(ablation.variants, 1e-3)
        trials = ablation_trials(Setup(), name, lr=rates, size=(128, 256))
        assert len({trial.key for *_, trial in trials}) == len(trials) >= 4
        for optimizer, _, trial in trials:
            assert optimizer in REGISTRY and trial.setup.untied == (name == "last_layer")
    assert {v["leading"] for v in _alice_ranks()} == {2, 5, 10, 20, 40}


def _alice_ranks() -> list[Any]:
    trials = ablation_trials(Setup(), "rank", lr=dict.fromkeys(REGISTRY, 1e-3), size=(128, 256))
    return [trial.settings for optimizer, _, trial in trials if optimizer == "alice"]


# -- the record -------------------------------------------------------------------------------------------------------


def test_ledger_passes_over_half_a_line(tmp_path: Path) -> None:
    path = tmp_path / "trials.jsonl"
    ledger = Ledger(path)
    ledger.append({"key": "a", "why": ["search"]})
    with path.open("a") as file:
        file.write('{"key": "b", "wh')  # a process was killed here
    again = Ledger(path)
    assert list(again.lines) == ["a"]
    again.append({"key": "c", "why": ["seeds"]})
    again.append({"key": "a", "why": ["ablation rank"]})
    ledger.reload()
    assert ledger.lines == Ledger(path).lines == again.lines
    assert ledger.lines["a"]["why"] == ["ablation rank", "search"] and list(ledger.lines) == ["a", "c"]


# -- trials -----------------------------------------------------------------------------------------------------------


def test_a_second_run_of_the_same_command_does_nothing(tmp_path: Path, cache: Path, capsys: Any) -> None:
    words = command(tmp_path, cache, "--tokens", "1024", "--trials", "2", "--optim", "adamw", "muon")
    main(words)
    first = (tmp_path / "trials.jsonl").read_bytes()
    assert "4 trials run; all are done" in capsys.readouterr().out
    main(words)
    assert "0 trials run; all are done" in capsys.readouterr().out
    assert (tmp_path / "trials.jsonl").read_bytes() == first
    main([*words, "--seeds", "0", "1"])
    assert "2 trials run; all are done" in capsys.readouterr().out

    lines = [json.loads(line) for line in (tmp_path / "trials.jsonl").read_text().splitlines()]
    assert [line["why"] for line in lines] == [["search"]] * 4 + [["seeds"]] * 2
    for line in lines:
        assert line["status"] == "ok" and line["steps"] == 4 and line["tokens"] == 1024
        assert [point["tokens"] for point in line["curve"]] == [0, 512, 1024] and line["final"] == line["curve"][-1]
        assert line["final"]["loss"] < line["curve"][0]["loss"] == pytest.approx(math.log(300), rel=0.05)
        assert line["memory"]["state"] == line["memory"]["state_predicted"] > 0
        # weights, gradients and state live together at the end of a step, beside what operations return
        content = sum(line["memory"][k] for k in ("parameters", "gradients", "state"))
        assert content < line["memory"]["peak"] < 20 * content
        assert 0.8 < line["memory"]["peak"] / line["memory"]["peak_predicted"] < 2
        time = line["time"]
        assert 0 < time["optimizer_seconds"] < time["seconds"] and 0 < time["cpu_seconds"]
        assert line["precision"]["weights"] == "float32" and line["versions"]["torch"]
        assert line["setup"]["batch_tokens"] == 256 and line["data"]["vocabulary"] == 300
    muon = next(line for line in lines if line["config"]["optimizer"] == "muon")
    assert {group["rule"] for group in muon["optimizer"]} == {"muon", "adamw"}
    assert muon["precision"]["orthogonalisation"] == "bfloat16"
    assert muon["precision"]["state"]["momentum_buffer"] == "float32"


def test_a_killed_run_loses_the_trial_in_progress_at_most(tmp_path: Path, cache: Path) -> None:
    words = command(tmp_path, cache, "--tokens", "16384", "--trials", "3", "--optim", "adamw")
    path = tmp_path / "trials.jsonl"
    process = subprocess.Popen([sys.executable, "-m", "lightning_optim", "bench", *words], cwd=ROOT)
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().endswith(b"\n")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    before = Ledger(path).lines
    assert before
    main(words)
    after = Ledger(path).lines
    assert len(after) == 3 and {key: after[key] for key in before} == before
    again = execute(read_trial(next(iter(before.values()))["config"]), workspace(tmp_path, cache))
    assert again["final"]["loss"] == next(iter(before.values()))["final"]["loss"]


def test_time_is_up_between_trials(tmp_path: Path, cache: Path, capsys: Any) -> None:
    main(command(tmp_path, cache, "--tokens", "1024", "--trials", "3", "--optim", "adamw", "--minutes", "0.0001"))
    out = capsys.readouterr().out
    assert "1 trials run, time is up" in out and len(Ledger(tmp_path / "trials.jsonl").lines) == 1


def test_divergence_is_a_result(tmp_path: Path, cache: Path) -> None:
    line = execute(Trial(dataclasses.replace(TOY, clip=0.0, warmup=0.0), "sgd", 1e6), workspace(tmp_path, cache))
    assert line["status"] == "diverged" and line["final"] is None and line["reason"]
    json.dumps(line, allow_nan=False)


def test_what_an_optimizer_raises_is_a_result(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("no\nmore")

    monkeypatch.setattr("lightning_optim.bench.trial.train", fails)
    queue = Queue(workspace(tmp_path, cache))
    with pytest.raises(ValueError, match="no trial of adamw ended well"):
        search(queue, TOY, ["adamw"], 2, 0, 1e-3)
    assert {(x["status"], x["reason"]) for x in queue.workspace.ledger} == {("failed", "RuntimeError: no")}
    with pytest.raises(RuntimeError, match="no"):
        search(Queue(workspace(tmp_path / "b", cache), keep_going=False), TOY, ["adamw"], 2, 0, 1e-3)


def test_others_search_around_adamws_best(tmp_path: Path, cache: Path) -> None:
    queue = Queue(workspace(tmp_path, cache))
    setup = dataclasses.replace(TOY, tokens=6 * 4 * 64)
    assert search(queue, setup, ["adamw", "lion", "sgd"], 3, 0, 1e-3)
    tuned = best(queue.workspace.ledger, setup, "adamw", 0)
    assert tuned is not None
    centre, rates = tuned["config"]["lr"], {}
    for line in queue.workspace.ledger:
        rates.setdefault(line["config"]["optimizer"], []).append(line["config"]["lr"])
    assert rates["adamw"] == [1e-3, 2e-3, 5e-4]
    assert rates["lion"] == [centre, 2 * centre, centre / 2]
    assert rates["sgd"] == [0.3, 0.1, 1.0]  # of its own default
    shards = [Queue(workspace(tmp_path, cache), shard=(k, 2)) for k in (0, 1)]
    names = ["adamw", "lion", "sgd", "signum"]
    assert not search(shards[1], setup, names, 3, 0, 1e-3) and shards[1].ran == 0  # sgd is done
    assert search(shards[0], setup, names, 3, 0, 1e-3) and shards[0].ran == 3


def test_microbatches_take_the_same_steps(tmp_path: Path, cache: Path) -> None:
    whole = execute(Trial(TOY, "adamw", 1e-3), workspace(tmp_path, cache))
    parts = execute(Trial(dataclasses.replace(TOY, microbatch=1), "adamw", 1e-3), workspace(tmp_path, cache))
    assert parts["final"]["loss"] == pytest.approx(whole["final"]["loss"], rel=1e-4)
    assert parts["setup"]["accumulation"] == 4 and parts["steps"] == whole["steps"]


@pytest.mark.parametrize(("precision", "weights", "master"), [
    ("bfloat16", "bfloat16", "none; stochastic rounding"),
    ("autocast", "float32", "the weights"),
])  # fmt: skip
def test_precision_table(tmp_path: Path, cache: Path, precision: Any, weights: str, master: str) -> None:
    line = execute(Trial(dataclasses.replace(TOY, precision=precision), "soap", 1e-3), workspace(tmp_path, cache))
    table = line["precision"]
    assert (table["weights"], table["master_weights"], table["computation"]) == (weights, master, "bfloat16")
    assert table["preconditioners"] == {"basis_left": "float32", "basis_right": "float32"}
    assert {v for k, v in table["state"].items() if k != "step"} == {"float32"}


@pytest.mark.parametrize(
    ("name", "microbatch"),
    [
        pytest.param(name, size, marks=() if (name, size) in (("sophia_g", 2), ("kfac", 0)) else pytest.mark.slow)
        for name in sorted(REGISTRY)
        if REGISTRY[name].curvature_input
        for size in (0, 2)
    ],
)
def test_rules_that_observe_curvature_are_fed(tmp_path: Path, cache: Path, name: str, microbatch: int) -> None:
    setup = dataclasses.replace(TOY, microbatch=microbatch)
    rule = lookup(name)
    rate = rule().lr if rule.curvature_input == "loss" else 1e-3  # a share of the step that the search has found
    line = execute(Trial(setup, name, rate, fitted(rule, size_of(setup))), workspace(tmp_path, cache))
    assert line["status"] == "ok" and line["steps"] == 4
    assert line["final"]["loss"] < line["curve"][0]["loss"]


def test_schedule() -> None:
    setup = Setup(warmup=0.1, min_lr=0.1)
    assert [schedule(setup, x) for x in (0.05, 0.1, 0.55, 1.0)] == pytest.approx([0.5, 1.0, 0.55, 0.1])


def test_a_trial_follows_a_schedule_of_its_settings(tmp_path: Path, cache: Path) -> None:
    """A constant one is the setup's without warm-up and fall, bit for bit; a preset brings one, and no other decay."""
    flat = dataclasses.replace(TOY, warmup=0.0, min_lr=1.0)
    space = workspace(tmp_path, cache)
    ours = execute(Trial(TOY, "muon", 1e-2, {"schedule": {"schedule": "constant"}}), space)
    assert [x["loss"] for x in ours["curve"]] == [x["loss"] for x in execute(Trial(flat, "muon", 1e-2), space)["curve"]]
    assert ours["setup"]["schedule"].startswith("the optimizer's own: ScheduleConfig(schedule='constant'")
    preset = Trial(TOY, "soap_muon", 0.0375, {"preset": "record46"})
    optimizer = build(make(TOY), preset)
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0} and optimizer.total_steps == 4
    assert execute(preset, space)["status"] == "ok"
    with pytest.raises(ValueError, match="--track seconds has no number of them"):
        build(make(TOY), dataclasses.replace(preset, setup=dataclasses.replace(TOY, track="seconds", budget=1.0)))


def test_a_trial_is_validated_with_the_averaged_weights(tmp_path: Path, cache: Path) -> None:
    """An average that stays where it begins: the loss is the first step's ever after."""
    setup = dataclasses.replace(TOY, evaluations=4)
    tail = {"start": 0, "tau": 1e30, "weight": 1.0}
    losses = {}
    for averaging in ({}, {"tail_ema": tail}):
        line = execute(Trial(setup, "muon", 1e-2, {"rest_lr": 0.0, "averaging": averaging}), workspace(tmp_path, cache))
        losses[bool(averaging)] = [x["loss"] for x in line["curve"][1:]]
    assert len(losses[True]) == 4 and set(losses[True]) == {losses[False][0]} and len(set(losses[False])) == 4


def test_an_optimizer_that_does_not_fit_is_a_result(tmp_path: Path, cache: Path) -> None:
    words = "--track memory --tokens 1024 --trials 1 --optim adamw soap signum".split()
    assert main(command(tmp_path, cache, *words))
    ledger = Ledger(tmp_path / "trials.jsonl")
    assert {x["config"]["optimizer"]: x["status"] for x in ledger} == {
        "adamw": "ok",
        "soap": "does not fit",
        "signum": "ok",
    }
    told = page.markdown(report.build(ledger))
    assert "Left out: soap (1 does not fit)." in told and "--budget" in told


def test_seconds_track_ends_with_its_budget(tmp_path: Path, cache: Path) -> None:
    setup = dataclasses.replace(TOY, track="seconds", budget=0.5)
    line = execute(Trial(setup, "adamw", 1e-3), workspace(tmp_path, cache))
    assert line["status"] == "ok" and line["steps"] > 1
    one = line["time"]["cpu_seconds"] / line["steps"]
    assert 0.5 <= line["time"]["cpu_seconds"] < 0.5 + 20 * one
    assert len(line["curve"]) == 3


def test_memory_track_takes_the_widest_model_that_fits(tmp_path: Path, cache: Path) -> None:
    adamw = needed_bytes(Trial(TOY, "adamw", 1e-3), 300)
    assert adamw == 16 * 119_872 + 8 * 20  # 4 bytes of weight, gradient and two moments each; a step count per tensor
    setup = dataclasses.replace(TOY, track="memory", budget=float(adamw))
    widths = {}
    for name in ("adamw", "lion", "lomo"):
        line = execute(Trial(setup, name, 1e-3), workspace(tmp_path, cache))
        widths[name] = line["model"]["hidden_size"]
        content = sum(line["memory"][k] for k in ("parameters", "gradients", "state"))
        assert content <= adamw < needed_bytes(Trial(TOY, name, 1e-3), 300, widths[name] + 4)
    assert widths["adamw"] == 64 < widths["lion"] < widths["lomo"]


def factory(vocabulary: int, context: int) -> Any:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    assert torch.get_default_dtype() == torch.float32
    return GPT2LMHeadModel(GPT2Config(vocab_size=vocabulary, n_positions=context, n_embd=32, n_layer=1, n_head=2))


def test_a_model_of_the_users(tmp_path: Path, cache: Path) -> None:
    setup = dataclasses.replace(TOY, model="tests.bench.test_bench:factory", context=32)
    assert size_of(setup)[0] == 32
    line = execute(Trial(setup, "galore", 1e-3, fitted(lookup("galore"), size_of(setup))), workspace(tmp_path, cache))
    assert line["status"] == "ok" and line["model"]["class"] == "GPT2LMHeadModel" and line["data"]["context"] == 32
    group = next(g for g in line["optimizer"] if g["rule"] == "galore")
    assert group["rank"] == 8


def test_hub_data(tmp_path: Path, cache: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    rows = [{"said": f"def f{i}(x):\n    return x + {i}\n" * 20} for i in range(40)]
    (folder / "data.jsonl").write_text("\n".join(map(json.dumps, rows)))
    setup = dataclasses.replace(TOY, data=(f"hub:{folder}:train:said",))
    task = load(setup, None, tmp_path)
    assert len(task.train) > len(task.held_out) > 0 and task.facts["dataset"] == list(setup.data)
    with pytest.raises(ValueError, match="no column 'text'; it has said"):
        load(dataclasses.replace(TOY, data=(f"hub:{folder}",)), None, tmp_path)


SOURCE = '''
def double(x):
    """Twice x.

    More about it.
    """
    y = 2 * x
    return y


class Box:
    def empty(self):
        """No body."""

    def put(self, x):
        """Put x in."""
        self.x = x
'''


def test_functions_become_prompts_and_completions() -> None:
    assert functions("def f(:") == []
    double, put = functions(SOURCE)
    assert double == {
        "prompt": 'def double(x):\n    """Twice x."""\n',
        "completion": "    y = 2 * x\n    return y",
    }
    assert put["prompt"] == 'def put(self, x):\n    """Put x in."""\n' and put["completion"] == "    self.x = x"


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing\\w*. is deprecated:FutureWarning")  # by peft and trl
@pytest.mark.parametrize("regime", ["continue", "full", "lora", "dpo"])
def test_regimes_go_on_from_a_pretraining(tmp_path: Path, cache: Path, regime: str, capsys: Any) -> None:
    start = command(tmp_path, cache, "--tokens", "4096", "--trials", "1", "--optim", "adamw")
    main(start)
    records = [json.dumps(record) for record in functions((STDLIB / "textwrap.py").read_text() * 2)]
    if regime == "dpo":
        pytest.importorskip("trl")
        actual = [json.loads(record) for record in records]
        records = [
            json.dumps({"prompt": x["prompt"], "chosen": x["completion"], "rejected": "    pass"}) for x in actual
        ]
    file = tmp_path / "data.jsonl"
    file.write_text("\n".join(records))
    data = str(STDLIB / "shlex.py") if regime == "continue" else str(file)
    words = command(tmp_path, cache, "--tokens", "1024", "--trials", "1", "--optim", "adamw", "muon")
    words[words.index("--data") + 1] = data
    main([*words, "--regime", regime, "--start", "adamw"])
    assert "2 trials run; all are done" in capsys.readouterr().out
    lines = list(Ledger(tmp_path / "trials.jsonl"))
    first, rest = lines[0], lines[1:]
    assert {line["config"]["start"] for line in rest} == {f"adamw@{first['key']}"}
    assert {line["status"] for line in rest} == {"ok"}
    assert rest[0]["curve"][0]["loss"] == rest[1]["curve"][0]["loss"]
    for line in rest:
        assert line["steps"] == 4 and 0 <= line["final"]["score"] <= 1
        assert (line["model"]["trained"] < line["model"]["parameters"]) == (regime == "lora")
        roles = {group["role"] for group in line["optimizer"]}
        assert ("lora_a" in roles) == (regime == "lora")
    if regime == "dpo":
        assert rest[0]["curve"][0]["loss"] == pytest.approx(math.log(2), abs=1e-4)  # the reference is the model itself
    if regime == "full":  # the pretraining was repeated for its weights, and nothing else is
        saved = cache / "models" / f"{first['key']}.pt"
        before = saved.stat().st_mtime_ns
        main([*words, "--regime", regime, "--start", "adamw", "--seeds", "0", "1"])
        assert saved.stat().st_mtime_ns == before
    (study,) = (s for s in studies(Ledger(tmp_path / "trials.jsonl")) if s.setup.regime == regime)
    rows = _table([study], report.finetuning)
    assert [row[0] for row in rows] == [REGIMES[study.setup.regime]] * 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--model", "huge"], "unknown model 'huge'"),
        (["--model", "tests.bench.test_bench:nothing"], "--model tests.bench.test_bench:nothing: .*no attribute"),
        (["--optim", "moun"], "unknown optimizer 'moun'; did you mean 'muon'"),
        (["--regime", "full"], "--regime full: --start is for every regime but pretrain"),
        (["--regime", "full", "--start", "muon"], "--start muon: no pretraining of 'micro' with it"),
        (["--start", "muon"], "--regime pretrain: --start"),
        (["--track", "seconds"], "--track seconds: give --budget"),
        (["--track", "memory", "--budget", "1000"], "--budget 1000 bytes are too few for 'micro'"),
        (["--shard", "2/2"], "--shard must be K/N"),
        (["--trials", "99", "--tokens", "1"], "--trials 99: the search space of adamw has 14 points"),
    ],
)
def test_bad_input_is_one_line(tmp_path: Path, cache: Path, capsys: Any, words: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(command(tmp_path, cache, "--tokens", "256", *words))
    assert re.search(message, capsys.readouterr().err)


def test_unknown_ablation(tmp_path: Path, cache: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(command(tmp_path, cache, "ranks", do="ablate"))
    assert "unknown ablation 'ranks'" in capsys.readouterr().err


def test_an_ablation_in_the_report(tmp_path: Path, cache: Path) -> None:
    main(command(tmp_path, cache, "iterations", "--tokens", "512", do="ablate"))
    rows = _table(Ledger(tmp_path / "trials.jsonl"), lambda ledger: report.ablated(report.variants(ledger)))
    assert [row[:3] for row in rows] == [
        *[["iterations", "muon", str(k)] for k in (1, 2, 3, 5, 8)],
        *[["iterations", "racs", str(k)] for k in (1, 2, 5)],
    ]
    assert all(isinstance(row[3], str) and float(row[3].split()[0]) > 0 for row in rows)


# -- the report -------------------------------------------------------------------------------------------------------


def line(
    optimizer: str,
    lr: float,
    losses: list[float],
    *,
    seed: int = 0,
    seconds: float = 10.0,
    why: str = "search",
    **more: Any,
) -> dict[str, Any]:
    """A line as a run writes it: a validation loss every 1000 tokens."""
    trial = Trial(
        more.pop("setup", Setup(tokens=1000 * (len(losses) - 1))), optimizer, lr, more.pop("settings", {}), seed
    )
    count = len(losses) - 1
    curve = [
        {"step": i, "tokens": 1000 * i, "seconds": 1.0, "cpu_seconds": seconds * i / count, "loss": loss}
        for i, loss in enumerate(losses)
    ]
    return {
        "key": trial.key,
        "config": trial.config,
        "why": [why],
        "status": "ok",
        "reason": "",
        "final": curve[-1],
        "curve": curve,
        "steps": count,
        "tokens": 1000 * count,
        "clipped_steps": 0,
        "time": {"seconds": 1.0, "cpu_seconds": seconds, "optimizer_seconds": 1.0, "optimizer_cpu_seconds": 1.0},
        "memory": {"parameters": 400, "gradients": 400, "state": 800, "state_predicted": 800, "peak": 2**20, **more},
        "model": {"name": "tiny", "parameters": 100, "hidden_size": 128},
        "data": {"digest": "d"},
        "setup": {"batch_tokens": 1000, "hardware": "machine", "threads": 1},
        "optimizer": [],
        "precision": {
            "weights": "float32",
            "computation": "float32",
            "gradients": "float32",
            "state": {},
            "master_weights": "the weights",
            "preconditioners": "none",
            "orthogonalisation": "none",
            "loss_scaling": "none",
            "clipping": "norm 1",
        },
        "versions": {"torch": "2"},
    }


LINES = [
    line("adamw", 1e-3, [6.0, 5.0, 4.0]),
    line("adamw", 2e-3, [6.0, 5.5, 5.0]),
    line("adamw", 1e-3, [6.0, 5.0, 4.2], seed=1, why="seeds"),
    line("adamw", 1e-3, [6.0, 5.0, 4.1], seed=2, why="seeds"),
    # 4.0 is half-way between 4.5 and 3.5: 1500 tokens of 2000, 15 of 20 seconds where AdamW takes 10
    line("muon", 1e-3, [6.0, 4.5, 3.5], seconds=20.0, state=400),
    line("muon", 2e-3, [6.0, 5.0, 4.5], seconds=20.0, state=400),
    line("muon", 1e-3, [6.0, 4.2, 3.6], seed=1, seconds=20.0, state=400, why="seeds"),
    line("muon", 1e-3, [6.0, 5.1, 3.1], seed=2, seconds=20.0, state=400, why="seeds"),
    line("lion", 1e-3, [6.0, 5.0, 4.6]),
    line("lion", 2e-3, [6.0, 5.0, 4.4]),
    line("lion", 2e-3, [6.0, 5.0, 4.4], seed=1, why="seeds"),
    line("lion", 2e-3, [6.0, 5.0, 4.3], seed=2, why="seeds"),
    line("soap", 1e-3, [6.0, 3.0, 1.0]),
]


@pytest.fixture
def ledger(tmp_path: Path) -> Ledger:
    (tmp_path / "trials.jsonl").write_text("".join(json.dumps(x) + "\n" for x in LINES))
    return Ledger(tmp_path / "trials.jsonl")


def _table(actual: Any, section: Any) -> list[list[Any]]:
    made = section(actual)
    return [list(row) for block in made if isinstance(block, Table) for row in block.rows]


def test_report_numbers_by_hand(ledger: Ledger) -> None:
    (study,) = studies(ledger)
    assert study.tuned == ["adamw", "muon", "lion"] and study.unfinished == ["soap (1 of 2 trials)"]
    # seed 0: 1500 of 2000 tokens; seed 1: 4.2 at 1000; seed 2: 4.1 half-way between 5.1 and 3.1
    assert study.to_target("muon", "tokens") == pytest.approx([0.75, 0.5, 0.75])
    assert study.to_target("muon", "cpu_seconds") == pytest.approx([1.5, 1.0, 1.5])
    assert study.to_target("lion", "tokens") == [None] * 3 and study.to_target("adamw", "tokens") == [1.0] * 3
    # 2000 tokens of AdamW over 15, 10 and 15 seconds
    assert study.effective_throughput("muon") == pytest.approx((2000 / 15 + 2000 / 10 + 2000 / 15) / 3)
    assert study.effective_throughput("lion") == 0.0
    losses, costs, sensitivity = (block for block in report.comparison(study) if isinstance(block, Table))
    told = {row[0]: row[1:] for row in losses.rows}
    assert told["muon"][0] == "3.400 ± 0.153 (3)"  # 3.5, 3.6, 3.1: deviation 0.26458 over the root of 3
    assert told["muon"][1] == "0.700 ± 0.153"  # 0.5, 0.6, 1.0
    assert told["muon"][5:] == ["0.667 ± 0.083", "1.333 ± 0.167"]
    assert told["lion"][5] == "not reached on 3 of 3 seeds"
    assert told["lion"][2] == "0.002 (edge of the grid)"
    assert {row[0]: row[1:3] for row in costs.rows}["muon"] == ["100", "156"]
    assert {row[0]: row[1:] for row in sensitivity.rows}["adamw"] == [4.0, None, None, "+1.000", None]
    text = page.markdown(report.comparison(study))
    # all three pairs are apart on seeds 0 and 1, and in the same order on seed 2
    assert "of 3 pairs more than two standard errors apart on the other seeds, 3 keep their order on seed 2" in text
    assert "Kendall's tau between their mean and seed 2: 1.00, 3 optimizers" in text
    assert "Pareto front of loss and seconds: adamw, muon" in text


def test_which_one_and_transfer(ledger: Ledger) -> None:
    actual = studies(ledger)
    (row,) = _table(actual, report.which)
    assert row[1] == "muon (3.400 ± 0.153)" and row[2] == "none"
    assert row[3] == "adamw (1.00 of AdamW's time)" and row[4] == "muon (50% of AdamW's state)"
    rows = _table(actual, report.transfer)
    assert [row[:2] for row in rows] == [["lion", 4.6], ["muon", 3.5]]
    assert rows[0][2:] == pytest.approx([4.4, 2.0, 0.2]) and rows[1][2:] == pytest.approx([3.5, 1.0, 0.0])


def test_over_sizes_a_power_law_goes_through_two_points(ledger: Ledger) -> None:
    other = Setup(model="micro", tokens=2000)
    for name, rate, loss in (("adamw", 2e-3, 8.0), ("muon", 1e-3, 7.0)):
        for lr, last in ((rate, loss), (rate * 4, 9.0)):
            small = line(name, lr, [9.5, 9.2, last], setup=other)
            small["model"] = {"name": "micro", "parameters": 25, "hidden_size": 64}
            ledger.append(small)
    rows = {row[0]: row[1:] for row in _table(studies(ledger), report.sizes)}
    mean = (4.0 + 4.2 + 4.1) / 3
    assert rows["adamw"][1] == f"{math.log(1e-3 / 2e-3) / math.log(4):+.2f}" == "-0.50"
    assert rows["adamw"][2] == f"{math.log(mean / 8.0) / math.log(4):+.3f}"
    assert rows["muon"][1] == "+0.00"


def test_what_was_not_measured_says_so(ledger: Ledger, tmp_path: Path) -> None:
    text = page.markdown(report.build(ledger))
    for title in ("Over model sizes", "With the same memory or time", "Fine-tuning", "Ablations"):
        assert f"## {title}\n\nnot measured" in text
    assert "models of 100 to 100 weights" in text and "at this scale" in text
    rows = list(report.claims([], []).rows)
    assert len(rows) == len(CLAIMS) and {row[3] for row in rows} == {"not measured"} and all(map(all, rows))
    measured = {row[1]: row[3] for row in report.claims(studies(ledger), []).rows}
    assert str(measured["Muon needs about half of AdamW's FLOPs for the same loss"]).startswith(
        "1.556 ± 0.222 times fewer"
    )
    empty = page.markdown(report.build(Ledger(tmp_path / "none.jsonl")))
    assert "weights and runs" not in empty and "not measured" in empty


def test_the_page_needs_nothing_else(ledger: Ledger, tmp_path: Path, capsys: Any) -> None:
    main(["report", "--out", str(tmp_path)])
    text = (tmp_path / "report.html").read_text()
    assert not re.search(r"<(link|script|img|iframe)|https?://|url\(|@import", text)
    assert text.count("<svg") >= 5 and text.count("<table>") == text.count("</table>") >= 6
    for name in ("adamw", "muon", "lion"):
        assert name in text
    assert "## Which one" in (tmp_path / "report.md").read_text()
    main(["transfer", "--out", str(tmp_path)])
    assert "| lion | 4.6 | 4.4 | 2 | 0.2 |" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="2"):
        main(["report", "--out", str(tmp_path / "nothing")])


def test_lines_of_another_data_set_are_apart(ledger: Ledger) -> None:
    other = line("adamw", 5e-4, [6.0, 5.0, 4.0])
    other["data"] = {"digest": "e"}
    ledger.append(other)
    assert [len(study.lines) for study in studies(ledger)] == [13, 1]


def test_statistics_by_hand() -> None:
    curve = [{"t": 0.0, "loss": 6.0}, {"t": 10.0, "loss": 5.0}, {"t": 20.0, "loss": 5.5}, {"t": 30.0, "loss": 4.5}]
    assert statistics.reaches(curve, 5.5, "t") == 5.0 and statistics.reaches(curve, 4.5, "t") == 30.0
    assert statistics.reaches(curve, 6.0, "t") == 0.0 and statistics.reaches(curve, 4.0, "t") is None
    assert statistics.tau({"a": 1, "b": 2, "c": 3, "d": 4}, {"a": 1, "b": 3, "c": 2, "d": 4}) == pytest.approx(4 / 6)
    assert math.isnan(statistics.tau({"a": 1}, {"a": 1}))
    assert statistics.front({"a": (1, 5), "b": (2, 5), "c": (3, 1), "d": (0.5, 6), "e": (3, 2)}) == ["d", "a", "c"]
    a, b = statistics.power_law([(1.0, 3.0), (10.0, 300.0), (100.0, 30_000.0)]) or (0, 0)
    assert (a, b) == pytest.approx((3.0, 2.0))
    assert statistics.power_law([(1.0, 3.0), (1.0, 4.0)]) is None
    one = statistics.mean_with_error([2.0])
    assert str(one) == "2.000" and math.isnan(one.error)
    seeds = {"a": {0: 1.0, 1: 1.1, 2: 3.0}, "b": {0: 2.0, 1: 2.2, 2: 2.5}, "c": {0: 1.0, 1: 1.2, 2: 9.0}}
    pairs, same = statistics.stable_pairs(seeds, held_out=2)
    assert pairs == [("a", "b"), ("c", "b")] and same == []


def test_axes_have_round_numbers() -> None:
    assert page.ticks(3.4, 4.3, log=False) == pytest.approx([3.4, 3.6, 3.8, 4.0, 4.2])
    assert page.ticks(4e-4, 5e-3, log=True) == pytest.approx([5e-4, 1e-3, 2e-3, 5e-3])


def test_the_smallest_preset_is_smaller() -> None:
    assert PRESETS["micro"].width < PRESETS["tiny"].width
    assert follows_adamw(lookup("muon")) and not follows_adamw(lookup("sgd"))


def test_the_rule_gets_what_a_trial_says(tmp_path: Path, cache: Path) -> None:
    from lightning_optim.bench.models import make

    settings = {"betas": [0.9, 0.95], "overrides": [["embedding", "lion"]]}
    optimizer = build(make(TOY, 300), Trial(TOY, "adamw", 1e-3, settings))
    rules = {g["role"]: rule_of(g) for g in optimizer.param_groups}
    assert rules["hidden"].betas == (0.9, 0.95) and rules["embedding"].name == "lion"  # pyright: ignore
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.1, 0.0}


@pytest.mark.parametrize("name", ["adamw", "muon", "lion", "adafactor", "sgd"])
def test_embeddings_and_gains_may_have_a_rate_of_their_own(name: str, tmp_path: Path, cache: Path) -> None:
    setup = dataclasses.replace(TOY, rest_lr=0.02)
    optimizer = build(make(TOY, 300), Trial(setup, name, 1e-3))
    rates = {g["role"]: (rule_of(g).name, g["lr"]) for g in optimizer.param_groups}
    assert rates["hidden"] == (name, 1e-3)
    for role in ("embedding", "vector"):
        trained_by = name if name in ("adamw", "lion", "adafactor") else "adamw"
        assert rates[role] == (trained_by, 0.02)
    theirs = {"overrides": [["embedding", "lion", {"lr": 1e-4}]]}
    optimizer = build(make(TOY, 300), Trial(setup, name, 1e-3, theirs))
    rates = {g["role"]: (rule_of(g).name, g["lr"]) for g in optimizer.param_groups}
    assert rates["embedding"] == ("lion", 1e-4), "a trial's own settings come first"


@pytest.mark.slow
def test_the_script_for_accelerators_runs_without_one(tmp_path: Path) -> None:
    words = [
        ROOT / "examples/benchmark/gpu.py",
        *"--device cpu --small --rounds 1".split(),
        "--jsonl",
        tmp_path / "rows",
    ]
    subprocess.run([sys.executable, *words], cwd=tmp_path, check=True, stdout=subprocess.DEVNULL)
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert {row["part"] for row in rows} == {"ceilings", "newton_schulz", "matrices", "elementwise", "steps"}
    assert all(row["rate"] > 0 for row in rows if row["part"] == "ceilings")
    shares = {row["optimizer"]: row["share of copy"] for row in rows if row["part"] == "elementwise" and len(row) > 5}
    assert {"torch fused AdamW", "lion", "lion, compiled", "sophia_g"} < shares.keys()
    assert all(math.isfinite(x) and x > 0 for x in shares.values())
    errors = [row["error"] for row in rows if row["part"] == "newton_schulz" and "error" in row]
    assert errors and max(errors) < 1e-4  # five float32 iterations
    steps = {row["optimizer"]: row for row in rows if row["part"] == "steps"}
    assert steps["muon"]["T m / B (Jordan et al. 2024)"] == 5 * PRESETS["tiny"].width / 2**19


def test_a_readme_without_marks_is_refused_before_anything_is_written(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "trials.jsonl").write_bytes((ROOT / "examples/benchmark/cpu/trials.jsonl").read_bytes())
    page = tmp_path / "README.md"
    for _ in range(2):  # there is none, and one without
        with pytest.raises(SystemExit):
            main(["report", "--out", str(tmp_path), "--readme", str(page)])
        assert f"between lines {report.MARKS[0]} and {report.MARKS[1]}" in capsys.readouterr().err
        assert not (tmp_path / "report.md").exists()
        page.write_text("no marks")


def test_what_the_repository_says_comes_from_its_trials() -> None:
    folder = ROOT / "examples/benchmark/cpu"
    ledger, readme = Ledger(folder / "trials.jsonl"), (ROOT / "lightning_optim/bench/README.md").read_text()
    told = f"{report.MARKS[0]}\n\n{report.summary(ledger)}\n\n{report.MARKS[1]}"
    command = f"bench report --out {folder.relative_to(ROOT)} --readme lightning_optim/bench/README.md"
    again = f"run `python -m lightning_optim {command}`"
    assert told in readme, again
    assert page.markdown(report.build(ledger)) == (folder / "report.md").read_text(), again
    again = "run `python -m lightning_optim.bench.measured`"
    assert json.loads((ROOT / "lightning_optim/measured.json").read_text()) == measured.collect(), again
