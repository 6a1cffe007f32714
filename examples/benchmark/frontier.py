"""The frontier's rules, presets and pieces beside tuned AdamW: how many steps each needs to AdamW's last loss.

    python examples/benchmark/frontier.py --minutes 9          # the same command continues where the last one stopped
    python examples/benchmark/frontier.py --tables             # frontier.md from frontier.jsonl

As on the NanoGPT optimization benchmark, a number of steps is that of a run whose schedule ends there, not a point on
the curve of a longer one: every entry trains over several lengths, each with all of its schedule, and where the last
losses come down to AdamW's is read off between them. Every entry has as many trials of its learning rate, on the first
seed and at one length; the best rate runs on all seeds and lengths.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lightning_optim.bench.ledger import Ledger, Line
from lightning_optim.bench.page import Heading, Table, Text, markdown
from lightning_optim.bench.space import Setup, Trial
from lightning_optim.bench.statistics import mean_with_error
from lightning_optim.bench.trial import Workspace, execute

HERE = Path(__file__).parent
SETUP = Setup(evaluations=2)
STEPS = 256
"""Of AdamW's run: the benchmark's own."""
SEEDS = (0, 1, 2)
TUNED_AT, LADDER = 0.55, (0.25, 0.4, 0.55, 0.75, 1.0)
"""Shares of AdamW's steps: the length at which rates are tried, and those that the others are run at."""
TRIALS = 3
KEPT = ("key", "config", "status", "reason", "final", "steps", "time", "versions")
Settings = dict[str, Any]


@dataclass(frozen=True)
class Entry:
    """A row of the table."""

    label: str
    adds: str
    rule: str
    lr: float
    """The first rate that is tried."""
    settings: Callable[[int], Settings] = field(default=lambda steps: {})
    """Of a run of so many steps."""
    base: str = "adamw"
    """What it is compared with."""


RECORD_STEPS = 2690
"""Of the benchmark's run, to which its numbers of steps belong."""


def share(count: float, steps: int) -> int:
    """Steps of the benchmark's run as steps of one of another length."""
    return round(count * steps / RECORD_STEPS)


def ema_nesterov(steps: int) -> Settings:
    """The record's look-ahead, its memory in proportion."""
    beta = 1 - 0.01 * RECORD_STEPS / steps
    return {"step_size": 0.3, "beta": beta, "start": 300 / RECORD_STEPS, "stop": 1740 / RECORD_STEPS}


def tail_ema(steps: int) -> Settings:
    """The record's average, its memory in proportion."""
    return {"start": 2400 / RECORD_STEPS, "tau": 150 * steps / RECORD_STEPS, "weight": 0.6}


def bi_maxwell(steps: int) -> Settings:
    """Two momenta in the place of one from step 1000 of the benchmark's run on."""
    at = share(1000, steps)
    return {"momentum_kernel": ((0.85, 0.4385), (0.98, 0.5615)), "kernel_steps": (at, at)}


def moved_momentum(steps: int) -> Settings:
    """The record's warm-up and cooldown of the momentum, in proportion."""
    return {"momentum_warmup_steps": share(300, steps), "momentum_cooldown_steps": share(200, steps)}


def cosine(steps: int) -> Settings:
    """The setup's own schedule, as a schedule of `build_optimizer`."""
    return {"schedule": "cosine", "warmup_steps": round(SETUP.warmup * steps), "min_lr_ratio": SETUP.min_lr}


def power(steps: int) -> Settings:
    """The record's, behind the setup's warm-up."""
    return {
        "schedule": "power",
        "warmup_steps": round(SETUP.warmup * steps),
        "power": 1.2,
        "horizon": 2900 / RECORD_STEPS,
        "cooldown": 2386 / 2900,
    }


def always(**settings: Any) -> Callable[[int], Settings]:
    """Settings of runs of any length."""
    return lambda steps: settings


REST_LR = 0.02
"""AdamW's rate for the embedding and the gains, whatever trains the matrices. It matters more than the optimizer
of the matrices: AdamW's own last loss is 4.10 at 0.002, 3.65 at 0.008, 3.53 at 0.016 and 3.51 at 0.032."""
REST: Settings = {"rest_lr": REST_LR, "rest_settings": {"betas": (0.9, 0.95)}}
ROLES = [[role, None, {"lr": REST_LR}] for role in ("embedding", "vector")]
ADAMW = (
    Entry("adamw", "betas (0.9, 0.95)", "adamw", 2e-3, always(betas=(0.9, 0.95), overrides=ROLES)),
    Entry("adamw, longer memory", "betas (0.9, 0.999)", "adamw", 2e-3, always(overrides=ROLES)),
    Entry("adamw, one rate", "betas (0.9, 0.999), embedding and gains at the matrices' rate", "adamw", 2e-3),
)
"""The baseline is the best of these, so that it has three times an entry's trials."""

CHEAP: Settings = {"refresh": "staggered:10", "ns_steps": 5, "ns_coefficients": "quintic"}
RULES = tuple(
    Entry(name, adds, rule, lr, always(**REST | more), base)
    for name, adds, rule, lr, base, more in (
        ("muon", "momentum, orthogonalised (5 iterations)", "muon", 8e-3, "adamw", {}),
        ("soap", "Adam in SOAP's eigenbasis, new every 10 steps", "soap", 2e-3, "muon", {}),
        ("soap_muon", "that eigenbasis, then orthogonalised (5 iterations)", "soap_muon", 8e-3, "muon", CHEAP),
        ("muon_sq", "Adam's second moment, then orthogonalised", "muon_sq", 8e-3, "muon", {}),
        ("kl_soap", "SOAP with factors whitened by each other, every step", "kl_soap", 2e-3, "soap", {}),
        ("moso", "the momentum's eigenbasis on one side, every step", "moso", 2e-3, "soap", {}),
        ("muown", "Muon on directions of rows, Adam on their norms", "muown", 7e-3, "muon", {}),
        ("sink_soap", "Sinkhorn in the eigenbasis, every step", "sink_soap", 8e-3, "soap_muon", {}),
    )
)


def preset(name: str, rule: str, lr: float, adds: str) -> tuple[Entry, Entry]:
    """A preset as it is, and fitted to this run: numbers of steps in proportion, the embedding's rate that of all."""

    def fitted(steps: int) -> Settings:
        out: Settings = {"preset": name, "overrides": [["embedding", None, {"lr": REST_LR}]]}
        if rule == "soap_muon":
            out["schedule"] = moved_momentum(steps)
            out["averaging"] = {"ema_nesterov": ema_nesterov(steps)}
            out["averaging"] |= {"tail_ema": tail_ema(steps)} if name == "record46" else {}
        return out

    warned_record, base = (
        "its numbers of steps in proportion, the embedding's rate that of all others",
        rule.removeprefix("kl_"),
    )
    return (
        Entry(f"fitted {name}", warned_record, rule, lr, fitted, base),
        Entry(f"preset {name}", adds, rule, lr, always(preset=name), base),
    )


PRESETS = (
    *preset("record46", "soap_muon", 0.0375, "row floor, brake, pin, cautious decay, look-ahead, tail EMA"),
    *preset("pr321", "soap_muon", 0.0375, "floor, brake, pin, look-ahead"),
    *preset("muon_h", "muon", 0.018, "Muon on the hyperball"),
    *preset("kl_soap_h", "kl_soap", 0.018, "KL-SOAP on the hyperball"),
)


def piece(label: str, settings: Callable[[int], Settings], adds: str) -> Entry:
    """One setting more than `soap_muon` has."""
    return Entry(f"+ {label}", adds, "soap_muon", 8e-3, lambda steps: REST | CHEAP | settings(steps), "soap_muon")


PIECES = (
    piece("refresh at every step", always(refresh="fixed:1"), "for every 10"),
    piece("converged iterations", always(ns_steps=12, ns_coefficients="converged"), "12 for 5"),
    piece("momentum kernel", bi_maxwell, "bi-Maxwell from 37 % of the run on"),
    piece(
        "EMA-Nesterov", lambda steps: {"averaging": {"ema_nesterov": ema_nesterov(steps)}}, "its memory in proportion"
    ),
    piece("tail EMA", lambda steps: {"averaging": {"tail_ema": tail_ema(steps)}}, "its memory in proportion"),
    piece("power cooldown", lambda steps: {"schedule": power(steps)}, "of 1.2, for the cosine"),
    piece("hyperball", always(constraint="hyperball", weight_decay=0.0), "for the decay"),
    piece("row floor", always(uw_floor=0.3825, uw_floor_by="row"), "0.3825"),
    piece("brake and pin", always(radial_damping=0.5, pin=True), "half of what moves outwards"),
    piece("cautious decay", always(cautious_decay=True, cautious_when="after_pin"), "of the same rate"),
    piece("moved momentum", lambda steps: {"schedule": cosine(steps) | moved_momentum(steps)}, "0.85 to 0.95 and back"),
    piece("momentum 0.9", always(momentum=0.9), "for 0.95"),
    piece(
        "the record's roles",
        always(
            rest_lr=0.01,
            rest_settings={"betas": (0.8, 0.99), "eps": 1e-10, "correct_bias": False},
            overrides=[["embedding", None, {"lr_per_rms": 0.3, "correct_bias": True}]],
        ),
        "rates and betas of embedding and gains",
    ),
    piece("shorter side only", always(sides="short"), "half of the bases"),
    piece("contra", always(contra=0.4), "0.4"),
    piece("aurora", always(aurora=2), "2"),
    piece("variance of lines", always(lines="longer"), "NorMuon's, of rows or columns"),
)
ENTRIES = (*ADAMW, *RULES, *PRESETS, *PIECES)
FIRST = (
    *("muon", "soap_muon", "fitted record46", "soap", "+ momentum kernel", "preset record46", "preset muon_h"),
    *("preset kl_soap_h", "preset pr321", "+ EMA-Nesterov", "+ tail EMA", "+ hyperball", "+ refresh at every step"),
    *("+ power cooldown", "+ brake and pin", "+ cautious decay", "+ momentum 0.9", "muon_sq", "kl_soap"),
)
"""What is run before the rest; the first three over all lengths at once, since they show how much a length is worth."""


def trial(entry: Entry, lr: float, at: float, seed: int) -> Trial:
    """A run of an entry over a share of AdamW's steps."""
    steps = round(at * STEPS)
    setup = replace(SETUP, tokens=SETUP.tokens // STEPS * steps)
    return Trial(setup, entry.rule, float(f"{lr:.6g}"), entry.settings(steps), seed)


def next_rate(losses: Mapping[float, float], first: float) -> float:
    """What to try next: the first, twice that, and then downhill, four times or half of it."""
    if first not in losses:
        return first
    if 2 * first not in losses:
        return 2 * first
    return 4 * first if losses[2 * first] < losses[first] else first / 2


def best_of(losses: Mapping[float, float]) -> float:
    """The rate with the lowest loss."""
    return min(losses, key=lambda x: losses[x])


class Frontier:
    """Runs what is missing, and reads the record.

    Args:
        record: of one line per run.
        cache: of tokenizers and tokens.
        minutes: after which no run is begun.
    """

    def __init__(self, record: Path, cache: Path, minutes: float = 0.0) -> None:
        self.ledger = Ledger(record)
        self.workspace = Workspace(self.ledger, cache)
        self.end = time.monotonic() + 60 * minutes

    def line(self, wanted: Trial, label: str) -> Line | None:
        """A run, from the record or now; None where it is in neither and the time is up."""
        self.ledger.reload()
        if not self.ledger.done(wanted, label):
            if time.monotonic() > self.end:
                return None
            actual = execute(wanted, self.workspace)
            self.ledger.append({key: actual[key] for key in KEPT} | {"why": [label]})
        return self.ledger.lines[wanted.key]

    def loss(self, entry: Entry, lr: float, at: float, seed: int) -> float | None:
        """Its last loss; infinite where it diverged."""
        names = wanted if (wanted := trial(entry, lr, at, seed)) in self.ledger else None
        line = self.line(wanted, entry.label)
        if line is None:
            return None
        loss = line["final"]["loss"] if line["final"] else math.inf
        if names is None:
            print(f"{entry.label:32} lr {lr:<9.3g} steps {line['steps']:<4} seed {seed}: {loss:.4f}", flush=True)
        return loss

    def rates(self, entry: Entry, at: float) -> dict[float, float] | None:
        """All rates that were tried, with their losses; None where the time is up."""
        losses: dict[float, float] = {}
        while len(losses) < TRIALS:
            rate = next_rate(losses, entry.lr)
            loss = self.loss(entry, rate, at, SEEDS[0])
            if loss is None:
                return None
            losses[rate] = loss
        return losses

    def target(self) -> tuple[Entry, float, list[float]] | None:
        """The best AdamW, its rate, and its last loss on every seed."""
        actual = []
        for entry in ADAMW:
            if (losses := self.rates(entry, 1.0)) is None:
                return None
            rate = best_of(losses)
            actual.append((losses[rate], entry, rate))
        _, entry, rate = min(actual, key=lambda x: x[0])
        over = [self.loss(entry, rate, 1.0, seed) for seed in SEEDS]
        return None if None in over else (entry, rate, [x for x in over if x is not None])

    def lengths(self, entry: Entry, rate: float, target: list[float]) -> dict[float, list[float]] | None:
        """Last losses on all seeds, by length: as many lengths as it takes to come down to AdamW's on each."""
        out: dict[float, list[float]] = {}
        place = LADDER.index(TUNED_AT)
        while 0 <= place < len(LADDER) and LADDER[place] not in out:
            losses = [self.loss(entry, rate, LADDER[place], seed) for seed in SEEDS]
            if None in losses:
                return None
            out[LADDER[place]] = [x for x in losses if x is not None]
            above = any(x > y for x, y in zip(out[max(out)], target, strict=True))
            below = any(x <= y for x, y in zip(out[min(out)], target, strict=True))
            place = LADDER.index(max(out)) + 1 if above else LADDER.index(min(out)) - 1 if below else -1
        return out

    def run(self, shard: tuple[int, int] = (0, 1)) -> bool:
        """Run everything, in order: all entries at one length first, then at the others.

        Args:
            shard: (k, n): every n-th entry from the k-th on.

        Returns:
            False if the time was up.
        """
        if (actual := self.target()) is None:
            return False
        (k, n), places = shard, {label: i for i, label in enumerate(FIRST)}
        order = sorted(ENTRIES[len(ADAMW) :], key=lambda entry: places.get(entry.label, len(FIRST)))
        for again in (False, True):
            for entry in order[k::n]:
                losses = self.rates(entry, TUNED_AT)
                best = best_of(losses) if losses else 0.0
                over = [self.loss(entry, best, TUNED_AT, seed) for seed in SEEDS] if losses else [None]
                whole = again or entry.label in FIRST[:3]
                if None in over or (whole and self.lengths(entry, best, actual[2]) is None):
                    return False
        return True


@dataclass(frozen=True)
class Row:
    """What was found for an entry."""

    entry: Entry
    rates: dict[float, float]
    """Those that were tried, with their losses on the first seed."""
    lengths: dict[float, list[float]]
    """Last losses over seeds, by length as a share of AdamW's steps."""

    @property
    def rate(self) -> float:
        """The best one."""
        return best_of(self.rates)

    @property
    def at_edge(self) -> bool:
        """Whether a better one may lie outside."""
        return self.rate in (min(self.rates), max(self.rates))

    def steps_to(self, target: list[float], like: Row) -> tuple[list[float], bool]:
        """Length at which the last loss of each seed comes down to a target, straight between logarithms of lengths.

        Args:
            target: by seed.
            like: whose curve is taken, moved to this one's loss, where this one has one length only.

        Returns:
            By seed; and whether they were read off the entry's own runs, none of them beyond the longest.
        """
        if len(self.lengths) == 1 and like is not self:
            pairs = zip(target, self.lengths[TUNED_AT], like.lengths[TUNED_AT], strict=True)
            return like.steps_to([y - (mine - its) for y, mine, its in pairs], like)[0], False
        names, out = sorted(self.lengths), []
        for i, y in enumerate(target):
            below = [k for k, at in enumerate(names) if self.lengths[at][i] <= y]
            k = max(1, below[0] if below else len(names) - 1)
            short, long = names[k - 1], names[k]
            a, b = self.lengths[short][i], self.lengths[long][i]
            out.append(short * (long / short) ** ((a - y) / (a - b)))
        return out, all(names[0] <= x <= names[-1] for x in out)


def take_rows(record: Frontier) -> tuple[list[float], list[Row]]:
    """AdamW's last losses, and all entries that ran on all seeds, AdamW first."""
    actual = record.target()
    if actual is None:
        return [], []
    baseline, _, target = actual
    rows = [Row(baseline, record.rates(baseline, 1.0) or {}, {1.0: target})]
    for entry in ENTRIES[len(ADAMW) :]:
        rates = record.rates(entry, TUNED_AT)
        if not rates:
            continue
        best = best_of(rates)
        over = {at: [record.loss(entry, best, at, seed) for seed in SEEDS] for at in LADDER}
        lengths = {at: [x for x in losses if x is not None] for at, losses in over.items() if None not in losses}
        if lengths:
            rows.append(Row(entry, rates, lengths))
    return target, rows


def verdict(gaps: list[float]) -> str:
    """Whether steps were saved: on every seed, and by more than two standard errors."""
    gap = mean_with_error(gaps)
    clear = abs(gap.mean) > 2 * gap.error and (max(gaps) < 0 or min(gaps) > 0)
    return f"{('yes' if gap.mean < 0 else 'no') if clear else 'within noise'}, {gap.mean:+.3f} ± {gap.error:.3f}"


def page_of(record: Frontier) -> str:
    """The page."""
    target, rows = take_rows(record)
    if not rows:
        return "not measured\n"
    by_label = {row.entry.label: row for row in rows[1:]}
    like = by_label.get("soap_muon")
    if like is None or len(like.lengths) < 2:
        return "not measured: soap_muon over lengths\n"
    actual = {label: row.steps_to(target, like) for label, row in by_label.items()}
    actual["adamw"] = [1.0] * len(SEEDS), True
    cells = []
    for row in rows[1:]:
        ratios, inside = actual[row.entry.label]
        base = actual.get(row.entry.base)
        saved = verdict([a - b for a, b in zip(ratios, base[0], strict=True)]) if base else "-"
        cells.append([
            row.entry.label,
            row.entry.adds,
            f"{row.rate:.3g}" + " (edge)" * row.at_edge,
            str(mean_with_error(row.lengths[TUNED_AT])),
            f"{mean_with_error(ratios)}{'' if inside else ' *'}",
            f"{saved} ({row.entry.base})",
        ])
    lines = [line for line in record.ledger if "time" in line]
    hours = sum(line["time"]["cpu_seconds"] for line in lines) / 3600
    tried = {entry: record.rates(entry, 1.0) or {} for entry in ADAMW}
    left = [entry.label for entry in ENTRIES[len(ADAMW) :] if entry.label not in actual]
    head = ["entry", "what it is or adds", "lr", f"loss after {round(TUNED_AT * STEPS)} steps"]
    return markdown([
        Heading("Steps to AdamW's loss: rules, presets and pieces of the frontier", 1),
        Text(
            f"Model `{SETUP.model}`, batches of 1024 tokens, AdamW's run {STEPS} steps, seeds"
            f" {', '.join(map(str, SEEDS))}; {len(lines)} runs, {hours:.2f} processor hours. Written by"
            " `frontier.py --tables` from `frontier.jsonl`, which has every run."
        ),
        Text(
            f"AdamW's last loss, the target: {mean_with_error(target)}. "
            "Its trials (rate and last loss on the first seed): "
            + "; ".join(
                f"{entry.label} ({entry.adds}): {', '.join(f'{x:.3g} {y:.3f}' for x, y in sorted(losses.items()))}"
                for entry, losses in tried.items()
            )
            + "."
        ),
        Table([*head, "steps to the target / AdamW's", "fewer steps than (what it is compared with)"], cells),
        Text(
            f"*: run at {round(TUNED_AT * STEPS)} steps only, or not down to the target in AdamW's {STEPS}: read off"
            " `soap_muon`'s curve, moved to the entry's losses. (edge): the best of the three rates is the highest or"
            " lowest of them, so another may be better."
        ),
        *([Text(f"Not measured yet: {', '.join(left)}.")] if left else []),
    ])


def main() -> None:
    """Run what is missing, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=40.0)
    parser.add_argument("--record", type=Path, default=HERE / "frontier.jsonl")
    parser.add_argument("--cache", type=Path, default=Path("runs/bench/cache"))
    parser.add_argument("--shard", default="0/1", metavar="K/N", help="every N-th entry, for N processes at once")
    parser.add_argument("--tables", action="store_true", help="write frontier.md beside the record, and run nothing")
    args = parser.parse_args()
    record = Frontier(args.record, args.cache, 0.0 if args.tables else args.minutes)
    if args.tables:
        args.record.with_suffix(".md").write_text(page_of(record), encoding="utf-8")
    else:
        k, n = map(int, args.shard.split("/"))
        print("all runs are done" if record.run((k, n)) else "time is up; the same command continues")


if __name__ == "__main__":
    main()
