"""The report: from the ledger's lines to `report.md` and `report.html`. What was not measured is said not to be."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from typing import cast

from lightning_optim.bench.claims import CLAIMS
from lightning_optim.bench.ledger import Ledger, Line
from lightning_optim.bench.page import NOTHING, Block, Cell, Chart, Heading, Table, Text, markdown, page
from lightning_optim.bench.run import SEARCH
from lightning_optim.bench.space import REGIMES, TRACKS
from lightning_optim.bench.statistics import front, mean_with_error, power_law, stable_pairs, tau
from lightning_optim.bench.studies import BASELINE, Study, Variant, studies, tuned_besides, variants
from lightning_optim.catalog import follows_adamw
from lightning_optim.core.rule import REGISTRY
from lightning_optim.docs import between

MIB = 2**20
SHOWN = 10
"""Lines in a chart: AdamW's and the best."""
MARKS = "<!-- bench: generated -->", "<!-- /bench -->"
"""In a README, around the summary."""
NEIGHBOURS = (0.25, 0.5, 2.0, 4.0)
"""Multiples of the best learning rate at which sensitivity is shown."""


def build(ledger: Ledger) -> list[Block]:
    """The whole report.

    Args:
        ledger: all trials.

    Returns:
        Blocks in order.
    """
    all_studies, forms = studies(ledger), variants(ledger)
    compared = [s for s in all_studies if s.searched]
    pretrained = [s for s in compared if s.setup.regime == "pretrain" and s.setup.track == "model"]
    blocks: list[Block] = [Heading("Optimizers compared", 1), *limits(ledger, compared), *which(compared)]
    for study in pretrained:
        blocks += comparison(study)
    blocks += [Heading("Over model sizes"), *sizes(pretrained)]
    blocks += [Heading("With the same memory or time"), *resources(compared)]
    blocks += [Heading("Fine-tuning"), *finetuning(compared)]
    blocks += [Heading("Learning rate taken over from AdamW"), *transfer(pretrained)]
    blocks += [Heading("Ablations"), *ablated(forms)]
    blocks += [Heading("What papers claim, and what was measured here"), claims(all_studies, forms)]
    blocks += [Heading("Search spaces"), *spaces(compared), Heading("Precision"), *precision(compared)]
    return [*blocks, Heading("Runs that did not end well"), failures(ledger)]


def summary(ledger: Ledger) -> str:
    """What a README says of the report.

    Args:
        ledger: all trials.

    Returns:
        Markdown: the scale, and the table of what to take.
    """
    compared = [s for s in studies(ledger) if s.searched]
    lines = [line for line in ledger if "model" in line]
    names = {n for s in compared for n in s.tuned}
    introduction = f"{len(lines)} runs of {len(names)} optimizers, as many trials each: {_scale(lines)}, one corpus."
    return markdown([Text(introduction), *which(compared)[1:]]).strip()


def _scale(lines: Sequence[Line]) -> str:
    weights = sorted({line["model"]["parameters"] for line in lines})
    tokens = max((line["tokens"] for line in lines if line["status"] == "ok"), default=0)
    return f"models of {weights[0]:,} to {weights[-1]:,} weights and runs of at most {tokens:,} tokens"


def title(study: Study) -> str:
    """What a study is, in a line.

    Args:
        study: any.

    Returns:
        Regime, model, tokens and what else differs from the usual.
    """
    s = study.setup
    words = [REGIMES[s.regime].capitalize(), s.model + (" with an output layer of its own" if s.untied else "")]
    words += [f"pretrained with {s.start.partition('@')[0]}"] if s.start else []
    words += [f"{s.tokens:,} tokens"] if s.track != "seconds" else []
    words += [TRACKS[s.track]] if s.track != "model" else []
    words += [f"embeddings and gains at {s.rest_lr:g}"] if s.rest_lr else []
    return ", ".join([*words, *([s.precision] if s.precision != "float32" else [])])


def limits(ledger: Ledger, compared: Sequence[Study]) -> list[Block]:
    """How far the evidence goes.

    Args:
        ledger: all trials.
        compared: studies with a search.

    Returns:
        Blocks.
    """
    lines = [line for line in ledger if "model" in line]
    if not lines:
        return [Text(NOTHING)]
    machines = sorted({f"{line['setup']['hardware']}, {line['setup']['threads']} thread(s)" for line in lines})
    seconds = sum(line["time"]["cpu_seconds"] for line in lines)
    seeds = max((study.loss(n).count for study in compared for n in study.tuned), default=0)
    versions = sorted({f"{k} {v}" for line in lines for k, v in line["versions"].items()})
    sentences = [
        f"{len(lines)} runs, {seconds / 3600:.2f} processor hours of training on {'; '.join(machines)}.",
        f"Everything below holds at this scale: {_scale(lines)}, one corpus, one batch size, one schedule.",
        "Orders at this scale are not those of large models: there, noise, batch and length of training differ.",
        f"At most {seeds} seed(s) per number. The seed that a learning rate was chosen on is among them, which flatters"
        " every optimizer alike. An optimizer's trials differ in learning rate and at most one more hyperparameter;"
        " weight decay, warm-up, schedule, clipping and batch are shared and were not tuned, nor was the rate of"
        " embeddings and gains, where they have one of their own. Where one rate holds for a whole model AdamW ends"
        " higher than with a higher one for the embedding than for matrices, and an optimizer that leaves the embedding"
        " to AdamW at a high rate of its own has that for nothing.",
        "Crossings of a target are read off curves of one schedule length, where the learning rate is still high; runs"
        " of that length with their own schedule would cross earlier.",
        "On a CPU time is processor time of the process; it says what an implementation costs on this machine, not what"
        " an algorithm costs on an accelerator. Peak memory is measured over two steps: weights, gradients, state,"
        " activations and what operations return; what a fused kernel allocates inside itself is not seen. Predicted is"
        " the sum of weights, state, and the larger of gradients and what autograd keeps.",
    ]
    return [Text(" ".join(sentences)), Text("Versions: " + ", ".join(versions) + ".")]


def which(compared: Sequence[Study]) -> list[Block]:
    """One line per study: what to take.

    Args:
        compared: studies with a search.

    Returns:
        Blocks.
    """
    rows: list[list[Cell]] = []
    for study in compared:
        names = study.tuned
        if len(names) < 2:
            continue
        best = min(names, key=lambda n: study.loss(n).mean)
        ties = [n for n in names if n != best and _tied(study, best, n)]
        times = {n: t for n in names if (t := _mean(study.to_target(n, study.clock)))}  # none where AdamW only lost
        fastest = min(times, key=lambda n: times[n], default=None)
        no_worse = [n for n in names if study.loss(n).mean <= study.loss(BASELINE).mean]
        leanest = min(no_worse, key=lambda n: (_memory(study, n, "state"), study.loss(n).mean))
        rows.append([
            title(study),
            f"{best} ({study.loss(best)})",
            ", ".join(ties) or ("none" if study.loss(best).count > 1 else "unknown: one seed"),
            fastest and f"{fastest} ({times[fastest]:.2f} of AdamW's time)",
            f"{leanest} ({_memory(study, leanest, 'state') / _memory(study, BASELINE, 'state'):.0%} of AdamW's state)",
        ])
    head = [
        "regime",
        "lowest loss",
        "statistically tied",
        "time to AdamW's final loss",
        "least state, no worse than AdamW",
    ]
    text = "At this scale, and by the mean over the seeds there are. Statistically tied: within two standard errors."
    return [Heading("Which one"), Text(text), Table(head, rows)]


def comparison(study: Study) -> list[Block]:
    """Everything about one pretraining.

    Args:
        study: of one model and number of tokens.

    Returns:
        Blocks.
    """
    names = study.tuned
    blocks: list[Block] = [Heading(title(study))]
    if study.unfinished:
        blocks.append(Text("Left out: " + "; ".join(study.unfinished) + "."))
    if not names:
        return [*blocks, Text(NOTHING)]
    budget = len(study.searched[BASELINE])
    blocks += [
        Text(
            f"{budget} trials per optimizer, AdamW included; the one with the lowest validation loss was chosen and"
            " run on the other seeds. Mean ± standard error over seeds. Tokens and time are what is needed to AdamW's"
            " last loss on the same seed, AdamW's own need being 1."
        ),
        _losses(study, names),
        _costs(study, names),
    ]
    top = [BASELINE, *[n for n in names if n != BASELINE][: SHOWN - 1]]
    for axis, label, unit in (("tokens", "tokens", 1e3), (study.clock, "seconds of training", 1.0)):
        lines = {n: [(p[axis] / unit, p["loss"]) for p in _first(study, n)["curve"][1:]] for n in top}
        blocks.append(
            Chart(f"Validation loss, {title(study)}", f"thousand {label}" if unit > 1 else label, "loss", lines)
        )
    return [*blocks, *_sensitivity(study, names, top), *_fronts(study, names), *_order(study, names)]


def _losses(study: Study, names: Sequence[str]) -> Table:
    rows: list[list[Cell]] = []
    for name in names:
        tuned, search = _first(study, name), study.searched[name]
        besides = ", ".join(f"{k}={v}" for k, v in tuned_besides(tuned, search).items())
        ended = sum(line["status"] == "ok" for line in search)
        edge = " (edge of the grid)" if study.at_edge(name) else ""
        rows.append([
            name,
            f"{study.loss(name)} ({study.loss(name).count})",
            _apart(study, name),
            f"{tuned['config']['lr']:g}{edge}",
            besides,
            f"{ended} of {len(search)}",
            _ratio(study.to_target(name, "tokens")),
            _ratio(study.to_target(name, study.clock)),
        ])
    head = ["optimizer", "loss (seeds)", "below AdamW", "learning rate", "besides", "ended well", "tokens", "time"]
    return Table(head, rows)


def _costs(study: Study, names: Sequence[str]) -> Table:
    rows: list[list[Cell]] = []
    for name in names:
        line = _first(study, name)
        memory, weights = line["memory"], line["model"]["parameters"]
        speed, clock = study.throughput(name), study.clock
        effective = study.effective_throughput(name)
        rows.append([
            name,
            f"{speed.mean:.0f}" if speed else None,
            None if effective is None else f"{effective:.0f}" if effective else "not reached",
            f"{line['time'][f'optimizer_{clock}'] / line['time'][clock]:.1%}",
            None if memory["state_predicted"] is None else memory["state_predicted"] / weights,
            memory["state"] / weights,
            *(memory[key] / MIB if key in memory else None for key in ("peak_predicted", "peak")),
            f"{line['clipped_steps'] / max(1, line['steps']):.0%}",
        ])
    head = ["optimizer", "tokens/s", "effective tokens/s", "optimizer's share of time", "state B/weight, predicted"]
    return Table([*head, "measured", "peak MiB, predicted", "measured", "steps clipped"], rows)


def _sensitivity(study: Study, names: Sequence[str], top: Sequence[str]) -> list[Block]:
    """Loss by learning rate, all else alike: where most learning rates were tried."""
    rows: list[list[Cell]] = []
    lines: dict[str, list[tuple[float, float]]] = {}
    for name in names:
        search = study.searched[name]
        groups = [[x for x in search if x["config"]["settings"] == y["config"]["settings"]] for y in search]
        alike = max(groups, key=lambda group: (any(x["final"] for x in group), len(group)))
        lowest = min((x for x in alike if x["final"]), key=lambda x: x["final"]["loss"])
        rate, loss = lowest["config"]["lr"], lowest["final"]["loss"]
        cells: list[Cell] = [name, loss]
        for factor in NEIGHBOURS:
            at = next((x for x in alike if math.isclose(x["config"]["lr"], rate * factor, rel_tol=1e-3)), None)
            cells.append(None if at is None else f"+{at['final']['loss'] - loss:.3f}" if at["final"] else at["status"])
        rows.append(cells)
        if name in top:
            lines[name] = [(x["config"]["lr"], x["final"]["loss"]) for x in alike if x["final"]]
    chart = Chart(f"Sensitivity, {title(study)}", "learning rate", "loss", lines, log_x=True)
    head = ["optimizer", "best loss", *(f"at {factor:g} times the best learning rate" for factor in NEIGHBOURS)]
    return [Text("Sensitivity to the learning rate, on the seed of the search:"), Table(head, rows), chart]


def _fronts(study: Study, names: Sequence[str]) -> list[Block]:
    out: list[Block] = []
    kinds = {
        "peak MiB": lambda n: _memory(study, n, "peak") / MIB,
        "seconds": lambda n: _first(study, n)["time"][study.clock],
    }
    for axis, measure in kinds.items():
        points = {n: (measure(n), study.loss(n).mean) for n in names if not math.isnan(measure(n))}
        best = front(points)
        out.append(Text(f"Pareto front of loss and {axis}: {', '.join(best) or NOTHING}."))
        shown = [BASELINE, *(n for n in points if n != BASELINE and (n in best or n in names[:SHOWN]))]
        lines = {n: [points[n]] for n in shown if n in points}
        out.append(Chart(f"Loss and {axis}, {title(study)}", axis, "loss", lines, points=True))
    return out


def _order(study: Study, names: Sequence[str]) -> list[Block]:
    losses = {n: {seed: line["final"]["loss"] for seed, line in study.runs(n).items()} for n in names}
    seeds = sorted({seed for by_seed in losses.values() for seed in by_seed})
    if len(seeds) < 3:
        return [Text(f"Order on another seed: {NOTHING} (three seeds are needed, {len(seeds)} there).")]
    last = seeds[-1]
    pairs, same = stable_pairs(losses, last)
    both = {n: by_seed for n, by_seed in losses.items() if last in by_seed and len(by_seed) > 1}
    before = {
        n: mean_with_error([x for seed, x in by_seed.items() if seed != last]).mean for n, by_seed in both.items()
    }
    lost = [f"{a} and {b}" for a, b in pairs if (a, b) not in same]
    text = (
        f"Order on another seed: of {len(pairs)} pairs more than two standard errors apart on the other seeds,"
        f" {len(same)} keep their order on seed {last}. Kendall's tau between their mean and seed {last}:"
        f" {tau(before, {n: by_seed[last] for n, by_seed in both.items()}):.2f}, {len(both)} optimizers."
    )
    return [Text(text + (f" Not kept: {', '.join(lost)}." if lost else ""))]


def sizes(pretrained: Sequence[Study]) -> list[Block]:
    """Power laws over model sizes, for setups that differ in the model alone.

    Args:
        pretrained: pretrainings of a fixed model.

    Returns:
        Blocks.
    """
    rows: list[list[Cell]] = []
    for name in sorted({n for s in pretrained for n in s.tuned}):
        by_size: dict[int, Study] = {}
        for study in (s for s in pretrained if name in s.tuned and not s.setup.untied):
            by_size.setdefault(_first(study, name)["model"]["parameters"], study)
        if len(by_size) < 2:
            continue
        rates = [(n, _first(s, name)["config"]["lr"]) for n, s in by_size.items()]
        losses = [(n, s.loss(name).mean) for n, s in by_size.items()]
        rate, loss = power_law(rates), power_law(losses)
        optima = "; ".join(f"{n:,}: {lr:g}, {x:.3f}" for (n, lr), (_, x) in sorted(zip(rates, losses, strict=True)))
        rows.append([name, optima, rate and f"{rate[1]:+.2f}", loss and f"{loss[1]:+.3f}"])
    head = ["optimizer", "weights: learning rate, loss", "exponent of the learning rate", "exponent of the loss"]
    text = (
        "Least squares on logarithms of weights. With two sizes the line goes through both points, which it describes;"
    )
    return [Table(head, rows), *([Text(text + " it predicts nothing.")] if rows else [])]


def resources(compared: Sequence[Study]) -> list[Block]:
    """The tracks with a budget.

    Args:
        compared: studies with a search.

    Returns:
        Blocks.
    """
    rows: list[list[Cell]] = []
    for study in (s for s in compared if s.setup.track != "model"):
        s = study.setup
        budget = f"{s.budget / MIB:.2f} MiB" if s.track == "memory" else f"{s.budget:g} s"
        for name in study.tuned:
            line = _first(study, name)
            rows.append([
                title(study),
                budget,
                name,
                line["model"]["parameters"],
                line["tokens"],
                str(study.loss(name)),
            ])
    left = [one for s in compared if s.setup.track != "model" for one in s.unfinished]
    table = Table(["track", "budget", "optimizer", "weights", "tokens", "loss"], rows)
    return [table, *([Text(f"Left out: {'; '.join(left)}.")] if left else [])]


def finetuning(compared: Sequence[Study]) -> list[Block]:
    """Models that were pretrained with one optimizer and trained on with others.

    Args:
        compared: studies with a search.

    Returns:
        Blocks.
    """
    rows: list[list[Cell]] = []
    for study in (s for s in compared if s.setup.regime != "pretrain"):
        for name in study.tuned:
            tuned, score = _first(study, name), study.over_seeds(name, "score")
            before = tuned["curve"][0]
            rows.append([
                REGIMES[study.setup.regime],
                study.setup.start.partition("@")[0],
                name,
                f"{tuned['config']['lr']:g}",
                f"{before['loss']:.3f}",
                str(study.loss(name)),
                before.get("score"),
                str(score) if score else None,
            ])
    text = (
        "Score: share of held-out completion tokens that are predicted right (of all tokens for continued pretraining),"
        " or of pairs in which the chosen completion is preferred for DPO."
    )
    head = ["regime", "pretrained with", "optimizer", "learning rate", "loss before", "loss", "score before", "score"]
    return [*([Text(text)] if rows else []), Table(head, rows)]


def transfer(pretrained: Sequence[Study]) -> list[Block]:
    """Loss at AdamW's tuned learning rate against each optimizer's own best.

    Args:
        pretrained: pretrainings of a fixed model.

    Returns:
        Blocks.
    """
    blocks: list[Block] = []
    for study in pretrained:
        baseline = study.best(BASELINE)
        rows: list[list[Cell]] = []
        for name in study.tuned if baseline else []:
            if name == BASELINE or not follows_adamw(REGISTRY[name]) or baseline is None:
                continue
            rate, tuned = baseline["config"]["lr"], _first(study, name)
            same = study.at_lr(name, rate)
            ended = same["final"]["loss"] if same and same["final"] else None
            cells: list[Cell] = [name, same["status"] if same and ended is None else ended, tuned["final"]["loss"]]
            rows.append([
                *cells,
                tuned["config"]["lr"] / rate,
                None if ended is None else ended - tuned["final"]["loss"],
            ])
        rows.sort(key=lambda row: (isinstance(row[-1], float), row[-1] or 0.0), reverse=True)
        head = ["optimizer", "loss at AdamW's learning rate", "own best", "its learning rate / AdamW's", "lost"]
        rate_text = f", AdamW's learning rate {baseline['config']['lr']:g}" if baseline else ""
        blocks += [Text(f"{title(study)}{rate_text}; the seed of the search:"), Table(head, rows)]
    return blocks or [Text(NOTHING)]


def ablated(forms: Sequence[Variant]) -> list[Block]:
    """One table over all ablations.

    Args:
        forms: with their trials.

    Returns:
        Blocks.
    """
    rows: list[list[Cell]] = []
    for form in forms:
        ended = [line for line in form.lines if line["status"] == "ok"]
        clock = "cpu_seconds" if form.setup.device == "cpu" else "seconds"
        memory = [line["memory"]["state"] / line["model"]["parameters"] for line in ended]
        time = [line["time"][f"optimizer_{clock}"] / line["steps"] * 1e3 for line in ended]
        result = f"{form.loss} ({form.loss.count})" if form.loss else form.lines[0]["status"]
        cells: list[Cell] = [form.ablation, form.optimizer, form.label, result]
        rows.append([*cells, memory[0] if memory else None, mean_with_error(time).mean if time else None])
    head = ["ablation", "optimizer", "form", "loss (seeds)", "state B/weight", "optimizer ms per step"]
    text = (
        "Every form has the learning rate that was tuned for the optimizer's default, and might do better with another."
        " Under `roles` AdamW has the matrices that the rule does not get at the rule's rate, not at its own."
    )
    return [*([Text(text)] if rows else []), Table(head, rows)]


def claims(all_studies: Sequence[Study], forms: Sequence[Variant]) -> Table:
    """The papers' claims.

    Args:
        all_studies: all studies.
        forms: all ablations.

    Returns:
        A table; what was not measured says so.
    """
    rows: list[list[Cell]] = [
        [c.source, c.text, c.published, c.measure(all_studies, forms) or NOTHING, c.differences] for c in CLAIMS
    ]
    return Table(["source", "claim", "published", "measured here, at this scale", "differences in setting"], rows)


def spaces(compared: Sequence[Study]) -> list[Block]:
    """What was tried.

    Args:
        compared: studies with a search.

    Returns:
        Blocks.
    """
    rows: list[list[Cell]] = []
    names = sorted({n for s in compared for n in s.searched})
    for name in (n for n in names if n in REGISTRY):
        rule = REGISTRY[name]
        study = next(s for s in compared if name in s.searched)
        lines = study.searched[name]
        scale = "AdamW's" if follows_adamw(rule) else "its own default"
        others = {k: v for k, v in rule.search.items() if k != "lr"}
        besides = tuned_besides(lines[0], lines)
        shared = {k: v for k, v in lines[0]["config"]["settings"].items() if k not in besides}
        rows.append([
            name,
            f"{', '.join(f'{x:g}' for x in sorted(rule.search['lr']))} times {scale}",
            "; ".join(f"{k}: {', '.join(map(str, v))}" for k, v in others.items()) or "-",
            "; ".join(f"{k}={v}" for k, v in shared.items()) or "-",
            len(lines),
            ", ".join(sorted({f"{line['config']['lr']:g}" for line in lines}, key=float)),
        ])
    text = "Trials are taken from the space likeliest first, as many for every optimizer, chosen by validation loss."
    head = ["optimizer", "learning rates", "besides", "fitted to the model", "trials", "learning rates tried"]
    return [Text(text), Table(head, rows)]


def precision(compared: Sequence[Study]) -> list[Block]:
    """The precision of everything in the best trials.

    Args:
        compared: studies with a search.

    Returns:
        Blocks.
    """
    rows: dict[tuple[Cell, ...], list[str]] = {}
    for study in compared:
        for name in study.tuned:
            p = _first(study, name)["precision"]
            state = ", ".join(f"{k} {v}" for k, v in p["state"].items() if k != "step") or "none"
            basis = p["preconditioners"]
            basis_text = basis if isinstance(basis, str) else ", ".join(f"{k} {v}" for k, v in basis.items())
            key = (p["weights"], p["computation"], p["gradients"], state, p["master_weights"], basis_text)
            rows.setdefault((*key, p["orthogonalisation"], p["loss_scaling"], p["clipping"]), []).append(name)
    head = ["weights", "computation", "gradients", "state", "master weights", "preconditioners", "orthogonalisation"]
    body = [[", ".join(sorted(set(names))), *cells] for cells, names in rows.items()]
    return [Table(["optimizers", *head, "loss scaling", "clipping"], body)]


def failures(ledger: Ledger) -> Table:
    """Runs that diverged, ran out of memory or raised.

    Args:
        ledger: all trials.

    Returns:
        A table.
    """
    bad = [line for line in ledger if line.get("status", "ok") != "ok"]
    rows: list[list[Cell]] = [
        [c["optimizer"], f"{c['lr']:g}", c["seed"], ", ".join(line["why"]), f"{line['status']}: {line['reason']}"]
        for line in sorted(bad, key=lambda line: line["config"]["optimizer"])
        if (c := line["config"])
    ]
    if not rows and any(SEARCH in line["why"] for line in ledger):
        rows = [["none", None, None, None, None]]
    return Table(["optimizer", "learning rate", "seed", "run for", "how it ended"], rows)


def _first(study: Study, name: str) -> dict:
    return cast("dict", study.best(name))


def _memory(study: Study, name: str, what: str) -> float:
    return float(_first(study, name)["memory"].get(what, math.nan))


def _tied(study: Study, best: str, other: str) -> bool:
    """Whether paired differences to the best are within two standard errors of zero."""
    gaps = _gaps(study, best, other)
    return len(gaps) > 1 and abs(mean_with_error(gaps).mean) <= 2 * mean_with_error(gaps).error


def _gaps(study: Study, one: str, other: str) -> list[float]:
    a, b = study.runs(one), study.runs(other)
    return [b[seed]["final"]["loss"] - a[seed]["final"]["loss"] for seed in sorted(a.keys() & b.keys())]


def _apart(study: Study, name: str) -> str | None:
    gaps = [] if name == BASELINE else _gaps(study, name, BASELINE)
    return str(mean_with_error(gaps)) if gaps else None


def _mean(values: Sequence[float | None]) -> float | None:
    """Mean, or None where one is missing."""
    there = [x for x in values if x is not None]
    return mean_with_error(there).mean if there and len(there) == len(values) else None


def _ratio(values: Sequence[float | None]) -> str | None:
    there = [x for x in values if x is not None]
    if not values:
        return None
    if len(there) < len(values):
        return f"not reached on {len(values) - len(there)} of {len(values)} seeds"
    return str(mean_with_error(there))


def report_command(args: argparse.Namespace) -> bool:
    """Write `report.md` and `report.html` beside the ledger, and a summary between the marks of a README.

    Args:
        args: with `out` and `readme`.

    Returns:
        True.

    Raises:
        ValueError: no trials, or a README without the marks; nothing is written then.
    """
    ledger, readme = _ledger(args), ""
    if args.readme is not None:
        readme = args.readme.read_text(encoding="utf-8") if args.readme.is_file() else ""
        if not all(mark in readme for mark in MARKS):
            raise ValueError(
                f"--readme {args.readme}: the summary goes between lines {MARKS[0]} and {MARKS[1]}; add them"
            )
    blocks = build(ledger)
    for name, text in (("report.md", markdown(blocks)), ("report.html", page(blocks))):
        (args.out / name).write_text(text, encoding="utf-8")
        print(args.out / name)
    if args.readme is not None:
        args.readme.write_text(between(readme, *MARKS, f"\n{summary(ledger)}\n"), encoding="utf-8")
        print(args.readme)
    return True


def transfer_command(args: argparse.Namespace) -> bool:
    """Print the section on the learning-rate convention.

    Args:
        args: with `out`.

    Returns:
        True.
    """
    pretrained = [s for s in studies(_ledger(args)) if s.searched and s.setup.regime == "pretrain"]
    print(markdown(transfer([s for s in pretrained if s.setup.track == "model"])), end="")
    return True


def _ledger(args: argparse.Namespace) -> Ledger:
    ledger = Ledger(args.out / "trials.jsonl")
    if not ledger.lines:
        raise ValueError(f"{ledger.path} has no trials; `bench run --out {args.out}` makes them")
    return ledger
