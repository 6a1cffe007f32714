"""Trials of a ledger, grouped into comparisons: the same setup and data, and only what was tuned alike."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_optim.bench.ledger import Ledger, Line
from lightning_optim.bench.run import SEARCH
from lightning_optim.bench.space import Setup, ablations, read_trial
from lightning_optim.bench.statistics import MeanWithError, mean_with_error, reaches

BASELINE = "adamw"


@dataclass(frozen=True)
class Study:
    """All trials of one setup."""

    setup: Setup
    lines: list[Line]

    @property
    def clock(self) -> str:
        """Which time is compared: processor seconds on a CPU, which a busy machine changes least."""
        return "cpu_seconds" if self.setup.device == "cpu" else "seconds"

    @cached_property
    def searched(self) -> dict[str, list[Line]]:
        """The search of every optimizer, by learning rate."""
        out: dict[str, list[Line]] = {}
        for line in self.lines:
            if SEARCH in line["why"]:
                out.setdefault(line["config"]["optimizer"], []).append(line)
        return {name: sorted(lines, key=lambda line: line["config"]["lr"]) for name, lines in sorted(out.items())}

    @cached_property
    def tuned(self) -> list[str]:
        """Optimizers with as many trials as AdamW, one of which ended well; AdamW first, then by loss."""
        trials = self.searched
        budget = len(trials.get(BASELINE, ()))
        names = [n for n, lines in trials.items() if len(lines) == budget and self.best(n)]
        return sorted(names, key=lambda n: (n != BASELINE, self.loss(n).mean))

    @property
    def unfinished(self) -> list[str]:
        """Optimizers left out of the comparison, and why."""
        lines_of = self.searched
        budget = len(lines_of.get(BASELINE, ()))
        short = [f"{n} ({len(lines)} of {budget} trials)" for n, lines in lines_of.items() if len(lines) != budget]
        failed = [f"{n} ({_ends(lines)})" for n, lines in lines_of.items() if len(lines) == budget and not self.best(n)]
        return short + failed

    def best(self, name: str) -> Line | None:
        """The trial of an optimizer's search with the lowest validation loss.

        Args:
            name: of the optimizer.

        Returns:
            Its line, or None.
        """
        lines = [line for line in self.searched.get(name, ()) if line["status"] == "ok"]
        return min(lines, key=lambda line: line["final"]["loss"], default=None)

    def runs(self, name: str) -> dict[int, Line]:
        """The best trial and its repetitions, those that ended well.

        Args:
            name: of the optimizer.

        Returns:
            Seed to line.
        """
        tuned = self.best(name)
        if tuned is None:
            return {}
        same = [line for line in self.lines if line["status"] == "ok" and _but_seed(line) == _but_seed(tuned)]
        return {line["config"]["seed"]: line for line in sorted(same, key=lambda line: line["config"]["seed"])}

    def over_seeds(self, name: str, what: str) -> MeanWithError | None:
        """A number of the last evaluation over seeds.

        Args:
            name: of the optimizer.
            what: `loss` or `score`.

        Returns:
            The mean with its standard error, or None where it was not measured.
        """
        values = [line["final"][what] for line in self.runs(name).values() if what in line["final"]]
        return mean_with_error(values) if values else None

    def loss(self, name: str) -> MeanWithError:
        """Validation loss over seeds.

        Args:
            name: of an optimizer that is `tuned`.

        Returns:
            The mean with its standard error; nan if nothing ended well.
        """
        return self.over_seeds(name, "loss") or MeanWithError(math.nan, math.nan, 0)

    def to_target(self, name: str, axis: str) -> list[float | None]:
        """What an optimizer needs to reach the last loss of tuned AdamW on the same seed, AdamW's own need being 1.

        Args:
            name: of the optimizer.
            axis: `tokens` or a time.

        Returns:
            One per seed that both have; None where it is not reached.
        """
        ours, baseline = self.runs(name), self.runs(BASELINE)
        out: list[float | None] = []
        for seed in sorted(ours.keys() & baseline.keys()):
            reference = baseline[seed]["final"]
            reached = reaches(ours[seed]["curve"], reference["loss"], axis)
            out.append(None if reached is None else reached / reference[axis])
        return out

    def throughput(self, name: str) -> MeanWithError | None:
        """Tokens per second.

        Args:
            name: of the optimizer.

        Returns:
            Over seeds.
        """
        values = [line["tokens"] / line["time"][self.clock] for line in self.runs(name).values()]
        return mean_with_error(values) if values else None

    def effective_throughput(self, name: str) -> float | None:
        """Tokens that AdamW needs over the time this optimizer needs to AdamW's last loss (Gong et al. 2025, F.5).

        Args:
            name: of the optimizer.

        Returns:
            Tokens per second, the mean over seeds; 0 counts for a seed on which it is never reached.
        """
        ours, baseline, out = self.runs(name), self.runs(BASELINE), []
        for seed in sorted(ours.keys() & baseline.keys()):
            reference = baseline[seed]["final"]
            time = reaches(ours[seed]["curve"], reference["loss"], self.clock)
            out.append(reference["tokens"] / time if time else 0.0)
        return sum(out) / len(out) if out else None

    def at_edge(self, name: str) -> bool:
        """Whether the best learning rate is the lowest or highest that was tried.

        Args:
            name: of the optimizer.

        Returns:
            True if a better one may lie outside.
        """
        rates = {line["config"]["lr"] for line in self.searched[name]}
        tuned = self.best(name)
        return tuned is not None and tuned["config"]["lr"] in (min(rates), max(rates))

    def at_lr(self, name: str, lr: float) -> Line | None:
        """The trial of a search at a learning rate, all else at its default.

        Args:
            name: of the optimizer.
            lr: to six digits.

        Returns:
            Its line, or None.
        """
        plain = [line for line in self.searched.get(name, ()) if not tuned_besides(line, self.searched[name])]
        return next((line for line in plain if math.isclose(line["config"]["lr"], lr, rel_tol=1e-4)), None)


def tuned_besides(line: Line, search: Iterable[Line]) -> dict[str, Any]:
    """Hyperparameters of a trial that not all trials of its search share.

    Args:
        line: a trial.
        search: all of them.

    Returns:
        Name to value.
    """
    every = [other["config"]["settings"] for other in search]
    return {k: v for k, v in line["config"]["settings"].items() if any(other.get(k) != v for other in every)}


def _ends(lines: Iterable[Line]) -> str:
    return ", ".join(f"{count} {status}" for status, count in sorted(Counter(x["status"] for x in lines).items()))


def _but_seed(line: Line) -> Mapping[str, Any]:
    return {k: v for k, v in line["config"].items() if k != "seed"}


def studies(ledger: Ledger) -> list[Study]:
    """Group the trials of a ledger.

    Args:
        ledger: all trials.

    Returns:
        One per setup, the most trials first; trials on other data (another Python's library) are apart.
    """
    groups: dict[tuple[Setup, str], list[Line]] = {}
    for line in ledger:
        if "config" in line:
            digest = line.get("data", {}).get("digest", "")
            groups.setdefault((read_trial(line["config"]).setup, digest), []).append(line)
    for (setup, digest), lines in list(groups.items()):  # failed trials do not know their data
        if not digest and (other := next((k for k in groups if k[0] == setup and k[1]), None)):
            groups[other] += lines
            del groups[setup, digest]
    return [Study(setup, lines) for (setup, _), lines in sorted(groups.items(), key=lambda kv: -len(kv[1]))]


@dataclass(frozen=True)
class Variant:
    """One form of one optimizer in an ablation."""

    ablation: str
    optimizer: str
    label: str
    setup: Setup
    lines: list[Line]

    @property
    def loss(self) -> MeanWithError | None:
        """Validation loss over seeds; None if nothing ended well."""
        losses = [line["final"]["loss"] for line in self.lines if line["status"] == "ok"]
        return mean_with_error(losses) if losses else None


def variants(ledger: Ledger) -> list[Variant]:
    """The ablations of a ledger.

    Args:
        ledger: all trials.

    Returns:
        In the order in which `bench ablate` lists them.
    """
    out: dict[tuple[str, str, str, Setup], list[Line]] = {}
    places: dict[tuple[str, str, str, Setup], tuple[int, ...]] = {}
    for line in ledger:
        for why in (w for w in line["why"] if w.startswith("ablation ") and "config" in line):
            trial, name = read_trial(line["config"]), why.removeprefix("ablation ")
            table = ablations(line.get("model", {}).get("hidden_size", 0) or 1)
            forms = table[name].variants[trial.optimizer]
            label = max(
                (
                    label
                    for label, variant in forms.items()
                    if all(trial.settings.get(k) == v for k, v in variant.items())
                ),
                key=lambda label: len(forms[label]),
                default="",
            )
            key = (name, trial.optimizer, label, trial.setup)
            out.setdefault(key, []).append(line)
            of = ((table, name), (table[name].variants, trial.optimizer), (forms, label))
            places[key] = tuple(list(names).index(one) if one in names else 0 for names, one in of)
    return [Variant(*key, out[key]) for key in sorted(out, key=lambda key: places[key])]
