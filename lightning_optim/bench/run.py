"""The queue of trials: what is missing is run, in a fixed order, until the time is up.

A killed run loses the trial in progress; the same command resumes with it.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
import time
import typing
from collections.abc import Iterable, Sequence
from pathlib import Path

from lightning_optim.bench.ledger import Ledger, Line
from lightning_optim.bench.models import size_of
from lightning_optim.bench.space import (
    REGIMES,
    TRACKS,
    Setup,
    Trial,
    ablation_trials,
    ablations,
    order,
    propose,
    read_trial,
    trial_at,
)
from lightning_optim.bench.trial import DoesNotFit, Workspace, execute, needed_bytes
from lightning_optim.catalog import follows_adamw
from lightning_optim.core.rule import REGISTRY, lookup

LR = {"pretrain": 2e-3, "continue": 1e-3, "full": 1e-3, "lora": 3e-3, "dpo": 2e-4}
"""The center of AdamW's own grid."""
SEARCH, SEEDS = "search", "seeds"


class TimeIsUp(Exception):
    """The minutes are over, or would be before the next trial ends."""


@dataclasses.dataclass
class Queue:
    """Runs trials that the ledger does not have.

    Args:
        workspace: the ledger, and caches.
        minutes: after which no trial is begun.
        shard: (k, n): of trials that do not depend on each other, every n-th from the k-th on.
        keep_going: whether an optimizer that raises is noted as failed instead of ending the run.
    """

    workspace: Workspace
    minutes: float = math.inf
    shard: tuple[int, int] = (0, 1)
    keep_going: bool = True
    started: float = dataclasses.field(default_factory=time.monotonic)
    longest: float = 0.0
    ran: int = 0

    def run(self, wanted: Iterable[Trial], why: str, *, share: bool = True) -> bool:
        """Run what is missing.

        Args:
            wanted: trials, in order.
            why: `search`, `seeds` or an ablation.
            share: whether other processes do their shard of them; otherwise every process does all.

        Returns:
            Whether all of them are done, by whomever.

        Raises:
            TimeIsUp: the minutes are over.
        """
        ledger, complete = self.workspace.ledger, True
        for i, trial in enumerate(wanted):
            ledger.reload()
            if ledger.done(trial, why):
                continue
            if share and i % self.shard[1] != self.shard[0]:
                complete = False
                continue
            begun = time.monotonic()
            if (begun - self.started + self.longest) / 60 > self.minutes:
                raise TimeIsUp
            line = self._attempt(trial)
            took = time.monotonic() - begun
            self.longest, self.ran = max(self.longest, took), self.ran + 1
            ledger.append(line | {"why": [why]})
            final = f"loss {line['final']['loss']:.4f}" if line.get("final") else f"{line['status']}: {line['reason']}"
            print(f"{trial.optimizer:16} lr {trial.lr:<9g} seed {trial.seed} {why}: {final} ({took:.0f} s)", flush=True)
        return complete

    def _attempt(self, trial: Trial) -> Line:
        try:
            return execute(trial, self.workspace)
        except DoesNotFit as error:
            if trial.optimizer == "adamw":  # the budget is nonsense
                raise
            status, reason = "does not fit", str(error)
        except (RuntimeError, ArithmeticError, NotImplementedError) as error:
            if not self.keep_going:
                raise
            status, reason = "failed", f"{type(error).__name__}: {error}".splitlines()[0][:300]
        return {"key": trial.key, "config": trial.config, "status": status, "reason": reason, "final": None}


def same_setup(line: Line, setup: Setup) -> bool:
    """Whether a trial is of a setup.

    Args:
        line: of the ledger.
        setup: to compare with.

    Returns:
        True if everything but optimizer, settings and seed agrees.
    """
    return "config" in line and read_trial(line["config"]).setup == setup


def searched(ledger: Ledger, setup: Setup, name: str, seed: int) -> list[Line]:
    """The trials of an optimizer's search.

    Args:
        ledger: all trials.
        setup: of the search.
        name: of the optimizer.
        seed: of the search.

    Returns:
        Their lines.
    """
    mine = [line for line in ledger if SEARCH in line["why"] and same_setup(line, setup)]
    return [x for x in mine if (x["config"]["optimizer"], x["config"]["seed"]) == (name, seed)]


def best(ledger: Ledger, setup: Setup, name: str, seed: int) -> Line | None:
    """The trial of an optimizer's search with the lowest validation loss.

    Args:
        ledger: all trials.
        setup: of the search.
        name: of the optimizer.
        seed: of the search.

    Returns:
        Its line, or None if none ended well.
    """
    lines = [line for line in searched(ledger, setup, name, seed) if line["status"] == "ok"]
    return min(lines, key=lambda line: line["final"]["loss"], default=None)


def search(queue: Queue, setup: Setup, names: Sequence[str], count: int, seed: int, lr: float) -> bool:
    """Tune every optimizer, AdamW first, with as many trials each.

    Args:
        queue: runs them.
        setup: shared by all.
        names: of the optimizers.
        count: trials of each.
        seed: of data and initial weights.
        lr: center of AdamW's own grid.

    Returns:
        Whether all trials are done, by whichever process.

    Raises:
        ValueError: AdamW has no trial that ended well.
    """
    tune(queue, setup, "adamw", count, lr, seed)
    tuned = best(queue.workspace.ledger, setup, "adamw", seed)
    if tuned is None:
        raise ValueError(f"no trial of adamw ended well around --lr {lr:g}; try a lower one")
    others = [name for name in order(names) if name != "adamw"]
    for name in others[queue.shard[0] :: queue.shard[1]]:
        tune(queue, setup, name, count, tuned["config"]["lr"], seed)
    queue.workspace.ledger.reload()
    return all(len(searched(queue.workspace.ledger, setup, name, seed)) >= count for name in others)


def tune(queue: Queue, setup: Setup, name: str, count: int, center: float, seed: int) -> None:
    """Search for one optimizer: what is tried next depends on what was found.

    Args:
        queue: runs the trials.
        setup: shared by all.
        name: of the optimizer.
        count: of trials.
        center: learning rate to begin with.
        seed: of data and initial weights.

    Raises:
        ValueError: the search space is too small.
    """
    rule, losses = lookup(name), {}
    while len(losses) < count:
        point = propose(rule, losses)
        if point is None:
            raise ValueError(f"--trials {count}: the search space of {name} has {len(losses)} points")
        trial = trial_at(setup, name, point, center=center, size=size_of(setup), seed=seed)
        queue.run([trial], SEARCH, share=False)
        final = queue.workspace.ledger.lines[trial.key].get("final")
        losses[point] = final["loss"] if final else math.inf


def reseed(queue: Queue, setup: Setup, names: Sequence[str], seeds: Sequence[int], finalists: int) -> bool:
    """Run the best trial of every optimizer, or of the best optimizers, on other seeds.

    Args:
        queue: runs them.
        setup: of the search.
        names: of the optimizers.
        seeds: the first is the search's.
        finalists: how many, besides AdamW.

    Returns:
        Whether all trials are done.
    """
    ledger = queue.workspace.ledger
    best_lines = {name: line for name in order(names) if (line := best(ledger, setup, name, seeds[0]))}
    leading = sorted(best_lines, key=lambda name: best_lines[name]["final"]["loss"])[:finalists]
    finalists_and_baseline = [name for name in best_lines if name in leading or name == "adamw"]
    wanted = (
        dataclasses.replace(read_trial(best_lines[name]["config"]), seed=seed)
        for seed in seeds[1:]
        for name in finalists_and_baseline
    )
    return queue.run(wanted, SEEDS)


def ablate(queue: Queue, setup: Setup, names: Sequence[str], seeds: Sequence[int], lr: float) -> bool:
    """Run ablations at the optimizers' tuned learning rates, where there are some, else at AdamW's or `lr`.

    Args:
        queue: runs them.
        setup: of the search whose learning rates are taken.
        names: of the ablations.
        seeds: the first is the search's.
        lr: where nothing was searched.

    Returns:
        Whether all trials are done.

    Raises:
        ValueError: an unknown ablation.
    """
    ledger, complete, size = queue.workspace.ledger, True, size_of(setup)
    for name in names:
        if name not in (table := ablations(size[0])):
            raise ValueError(f"unknown ablation {name!r}; known: {', '.join(table)}")
        rates = {}
        for optimizer in table[name].variants:
            tuned = best(ledger, setup, optimizer, seeds[0])
            tuned = tuned or (best(ledger, setup, "adamw", seeds[0]) if follows_adamw(lookup(optimizer)) else None)
            rates[optimizer] = tuned["config"]["lr"] if tuned else lr
        for seed in seeds:
            wanted = (t for *_, t in ablation_trials(setup, name, lr=rates, size=size, seed=seed))
            complete &= queue.run(wanted, f"ablation {name}")
    return complete


def resolved(setup: Setup, ledger: Ledger, start: str, seed: int) -> Setup:
    """A setup with the pretraining it starts from, and its budget, filled in.

    Args:
        setup: with neither.
        ledger: all trials.
        start: optimizer of the pretraining; empty for none.
        seed: of its search.

    Returns:
        The setup.

    Raises:
        ValueError: there is no such pretraining, or one is needed or not.
    """
    if (setup.regime == "pretrain") == bool(start):
        raise ValueError(
            f"--regime {setup.regime}: --start is for every regime but pretrain, which starts from nothing"
        )
    if start:
        candidates = [
            line
            for line in ledger
            if line["status"] == "ok"
            and SEARCH in line["why"]
            and (c := line["config"])["regime"] == "pretrain"
            and (c["optimizer"], c["seed"], c["model"], c["track"]) == (start, seed, setup.model, "model")
        ]
        if not candidates:
            raise ValueError(
                f"--start {start}: no pretraining of {setup.model!r} with it in {ledger.path}; run it first"
            )
        # the longest run, then the best of its trials
        line = min(candidates, key=lambda line: (-line["config"]["tokens"], line["final"]["loss"]))
        first = read_trial(line["config"]).setup
        shared = {"untied": first.untied, "vocabulary": first.vocabulary, "context": first.context}
        setup = dataclasses.replace(setup, start=f"{start}@{line['key']}", **shared)
    if setup.track == "memory" and not setup.budget:
        from lightning_optim.bench.models import shape

        bytes_ = needed_bytes(Trial(setup, "adamw", 1e-3), shape(setup).vocabulary)
        setup = dataclasses.replace(setup, budget=float(bytes_))
    if setup.track == "seconds" and not setup.budget:
        same = dataclasses.replace(setup, track="model")
        line = best(ledger, same, "adamw", seed)
        if line is None:
            raise ValueError("--track seconds: give --budget, or run adamw on --track model first, whose time is taken")
        seconds = line["time"]["cpu_seconds" if setup.device == "cpu" else "seconds"]
        setup = dataclasses.replace(setup, budget=float(f"{seconds:.2g}"))
    return setup


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments that `run`, `ablate`, `transfer` and `report` share.

    Args:
        parser: of one of them.
    """
    parser.add_argument("--out", type=Path, default=Path("runs/bench"), help="of trials.jsonl and the report")


def add_setup(parser: argparse.ArgumentParser) -> None:
    """Arguments of `run` and `ablate`: every field of `Setup`, and what is searched.

    Args:
        parser: of one of them.
    """
    add = parser.add_argument
    add("--optim", nargs="+", default=sorted(REGISTRY), metavar="NAME", help="default: all of the registry")
    add("--trials", type=int, default=6, help="per optimizer, AdamW included (default %(default)s)")
    add("--seeds", type=int, nargs="+", default=[0], help="the first is searched with, the best trials run on all")
    add("--finalists", type=int, default=len(REGISTRY), help="how many optimizers run on the other seeds")
    add("--lr", type=float, help="center of AdamW's grid; its best is the center of the others'")
    add("--minutes", type=float, default=math.inf, help="begin no trial that would probably end later")
    add("--shard", default="0/1", metavar="K/N", help="do every N-th trial from the K-th on, for N processes at once")
    add("--cache", type=Path, default=Path("runs/bench/cache"), help="tokenizers, tokens and pretrained models")
    add("--stop_on_error", action="store_true", help="do not note an optimizer that raises as failed")
    hints = typing.get_type_hints(Setup)
    choices = {"regime": list(REGIMES), "track": list(TRACKS), "precision": ["float32", "bfloat16", "autocast"]}
    for field in dataclasses.fields(Setup):
        if field.name == "data":
            add("--data", nargs="+", default=[], metavar="FILE", help="text, .jsonl or hub:NAME[:SPLIT[:COLUMN]]")
        elif hints[field.name] is bool:
            add(f"--{field.name}", action="store_true")
        else:
            kind = type(field.default)
            add(f"--{field.name}", type=kind, default=field.default, choices=choices.get(field.name))


def setup_of(args: argparse.Namespace, ledger: Ledger) -> Setup:
    """The setup that a command line describes.

    Args:
        args: of `add_setup`.
        ledger: all trials.

    Returns:
        With start and budget resolved.
    """
    settings = {f.name: getattr(args, f.name) for f in dataclasses.fields(Setup)}
    settings |= {"data": tuple(args.data), "start": ""}
    return resolved(Setup(**settings), ledger, args.start, args.seeds[0])


def queue_of(args: argparse.Namespace) -> Queue:
    """The queue that a command line describes.

    Args:
        args: of `add_setup`.

    Returns:
        A queue over the ledger in `--out`.

    Raises:
        ValueError: a shard that is none.
    """
    try:
        k, n = map(int, args.shard.split("/"))
    except ValueError:
        k, n = 0, 0
    if not 0 <= k < n:
        raise ValueError(f"--shard must be K/N with 0 <= K < N, got {args.shard!r}")
    workspace = Workspace(Ledger(args.out / "trials.jsonl"), args.cache)
    return Queue(workspace, args.minutes, (k, n), keep_going=not args.stop_on_error)


def run_command(args: argparse.Namespace) -> bool:
    """Search, then run the best on the other seeds.

    Args:
        args: of `add_setup`.

    Returns:
        False if the time was up.
    """
    queue = queue_of(args)
    setup = setup_of(args, queue.workspace.ledger)
    lr = args.lr or LR[setup.regime]

    def work() -> bool:
        complete = search(queue, setup, args.optim, args.trials, args.seeds[0], lr)
        return complete and reseed(queue, setup, args.optim, args.seeds, args.finalists)

    return _until_time_is_up(queue, work)


def ablate_command(args: argparse.Namespace) -> bool:
    """Run ablations.

    Args:
        args: of `add_setup`, with the `names` of ablations.

    Returns:
        False if the time was up.
    """
    queue = queue_of(args)
    setup = setup_of(args, queue.workspace.ledger)
    names = args.names or list(ablations(size_of(setup)[0]))
    return _until_time_is_up(queue, lambda: ablate(queue, setup, names, args.seeds, args.lr or LR[setup.regime]))


def _until_time_is_up(queue: Queue, work: typing.Callable[[], bool]) -> bool:
    try:
        complete = work()
        print(f"{queue.ran} trials run; {'all are done' if complete else 'other processes do the rest'}")
    except TimeIsUp:
        print(f"{queue.ran} trials run, time is up; the same command resumes")
        return False
    return True
