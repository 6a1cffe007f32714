"""What was measured of every rule and preset, for `python -m lightning_optim show`: from the records of the repository.

    python -m lightning_optim.bench.measured [--check]

writes `lightning_optim/measured.json`, name to sentences, each with its scale.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

from lightning_optim.bench.ledger import Ledger
from lightning_optim.bench.report import title
from lightning_optim.bench.studies import BASELINE, Study, studies
from lightning_optim.core.rule import REGISTRY

PACKAGE = Path(__file__).parent.parent
RECORDS = PACKAGE.parent / "examples" / "benchmark"

Sentences = dict[str, list[str]]


def tuned(study: Study) -> Sentences:
    """Every optimizer of a study at the best of as many trials as AdamW's.

    Returns:
        Name to one sentence.
    """
    target, clock = study.loss(BASELINE).mean, "processor time" if study.clock == "cpu_seconds" else "time"
    out: Sentences = {}
    for name in study.tuned:
        loss, line = study.loss(name), study.best(name)
        assert line is not None
        seeds = "one seed" if loss.count == 1 else f"{loss.count} seeds"
        text = f"{title(study)}: loss {loss} at lr {line['config']['lr']:g}, {seeds}"
        if name != BASELINE:
            text += f"; AdamW {target:.3f}"
            reached = [study.to_target(name, axis) for axis in ("tokens", study.clock)]
            if all(x for ratios in reached for x in ratios):
                tokens, time = (sum(x or 0.0 for x in ratios) / len(ratios) for ratios in reached)
                text += f", whose loss it has after {tokens:.2f} of the tokens and {time:.2f} of the {clock}"
        out[name] = [f"{text}."]
    return out


def at_adamw_rate(lines: list[str]) -> Sentences:
    """Every optimizer at AdamW's learning rate, of `tiny.jsonl`.

    Returns:
        Name to one sentence.
    """
    best: dict[str, tuple[str, float, float]] = {}
    for line in map(json.loads, lines):
        row = line["optim_args"], line["val_loss"]["600"], line["learning_rate"]
        others = best.get(line["optim"])
        better = others is None or (row[1] < others[1] if line["optim"] == BASELINE else len(row[0]) < len(others[0]))
        if better:
            best[line["optim"]] = row
    target = best[BASELINE][1]
    return {
        name: [
            f"Pretraining, tiny, 600 steps at AdamW's lr {lr:g}{settings and f' ({settings})'}: loss {loss:.3f}, "
            f"one seed{f'; AdamW {target:.3f}' if name != BASELINE else ''}."
        ]
        for name, (settings, loss, lr) in best.items()
    }


def table_rows(text: str) -> list[list[str]]:
    """The rows of the first table of a Markdown text.

    Returns:
        Cells, without heading and rule.
    """
    table = re.search(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    lines = table.group().splitlines()[2:] if table else []
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]


def step_times(page: str) -> Sentences:
    """Time of a step beside torch's fused AdamW, on the first set of parameters of the page that has the optimizer.

    Returns:
        Name to one sentence.
    """
    out: Sentences = {}
    for section in page.split("\n### ")[1:]:
        name = section.partition(":")[0]
        machine = re.search(r"\d+ thread\(s\)", section)
        for cells in table_rows(section) if machine else ():
            if cells[0] in REGISTRY and cells[0] not in out:
                text = f"A step without refreshes takes {cells[1]} of the time of torch's fused AdamW"
                out[cells[0]] = [f"{text} ({name}, CPU, {machine.group() if machine else ''})."]
    return out


def presets(page: str) -> Sentences:
    """Steps that presets take to AdamW's loss, of `frontier.md`.

    Returns:
        Name to one sentence.
    """
    return {
        cells[0].removeprefix("preset "): [
            f"Pretraining, tiny: needs {cells[4].rstrip('* ')} of the steps of a tuned AdamW run of 256 (three seeds)."
        ]
        for cells in table_rows(page)
        if cells[0].startswith("preset ")
    }


def collect(records: Path = RECORDS) -> Sentences:
    """All sentences.

    Args:
        records: the folder of the repository's benchmarks.

    Returns:
        Name of a rule or preset to its sentences.
    """
    compared = [s for s in studies(Ledger(records / "cpu" / "trials.jsonl")) if s.searched]
    parts = [
        *(tuned(study) for study in compared),
        at_adamw_rate((records / "tiny.jsonl").read_text().splitlines()),
        step_times((records / "README.md").read_text()),
        presets((records / "frontier.md").read_text()),
    ]
    out: Sentences = {}
    for part in parts:
        for name, sentences in part.items():
            out.setdefault(name, []).extend(sentences)
    return dict(sorted(out.items()))


def main() -> None:
    """Rewrite `measured.json`, or with `--check` only say whether it is up to date.

    Raises:
        SystemExit: it is out of date.
    """
    parser = argparse.ArgumentParser(prog="python -m lightning_optim.bench.measured", description=main.__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, fail if it is out of date")
    text = json.dumps(collect(), indent=1, ensure_ascii=False) + "\n"
    target = PACKAGE / "measured.json"
    if parser.parse_args().check:
        if not target.exists() or target.read_text(encoding="utf-8") != text:
            raise SystemExit("measured.json is out of date; run python -m lightning_optim.bench.measured")
        return
    target.write_text(text, encoding="utf-8")
    print(f"wrote {target.name}")


if __name__ == "__main__":
    main()
