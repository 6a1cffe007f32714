"""Time of one optimizer step, ours beside other packages', in one run: ratios, never bare times.

    python examples/benchmark/step_time.py --shapes llama60m gpt2 --jsonl step_time.jsonl
    python examples/benchmark/step_time.py --optim soap shampoo --shapes llama60m-layer --jsonl step_time.jsonl --again
    python examples/benchmark/step_time.py --jsonl step_time.jsonl --tables [--readme README.md]

Contenders share parameters and gradients and take turns, step by step; gradients are copied again before every step,
so that caches are cold for all. Every row is written to the JSONL file as soon as it is measured and is not measured
again in the next run, unless `--again` asks for it; `--tables` prints what the file holds. The clock is the main
thread's CPU time, which other processes do not lengthen (but for what they do to caches and memory); with more than one
thread it is wall time.

The floor is what the machine allows in the same run: the bytes of the fewest passes over memory that the algorithm
needs, at the rate of torch's fused AdamW (28 bytes per parameter), or, where it is longer, the time of its matrix
products at the measured rate. Temporaries are the most memory that torch has allocated at once within a step beyond
what was there before. Peers are those of `peers.py` that are installed.

`-layer` is the hidden matrices of one layer, `-hidden` those of all: the cost of matrix rules is linear in layers.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from peers import LR, known, peers  # pyright: ignore[reportImplicitRelativeImport]
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import RuleOptimizer
from lightning_optim.catalog import state_bytes
from lightning_optim.core.rule import REGISTRY, Rule
from lightning_optim.docs import between
from lightning_optim.ops.kernels.products import product

Shapes = list[tuple[int, ...]]
INTERVAL = 10
POLICIES = (f"fixed:{INTERVAL}", f"staggered:{INTERVAL}")

COMPILED = ("adafactor", "adam_mini", "came", "lamb", "lars", "lion", "racs", "signum", "sophia_g")
NARROW = ("int8", "int8_grid", "fp8")
VARIANTS: dict[str, dict[str, Any]] = {
    **{f"adamw-{kind}": {"state_storage": kind} for kind in NARROW},
    "racs-1": {"iterations": 1},
    "soap-bf16": {"rotation_dtype": "bfloat16"},
    "soap_muon-bf16": {"rotation_dtype": "bfloat16"},
    "shampoo-paper": {"accumulate": "sum", "betas": (0.0, 0.0), "graft": "none", "max_dim": None},
    **{f"{name}-compiled": {"compile": True} for name in COMPILED},
    **{f"adamw-{kind}-compiled": {"state_storage": kind, "compile": True} for kind in NARROW},
}
"""Settings that are measured beside a rule's defaults, as `rule-variant`."""


def gpt2(layers: int = 12, width: int = 768, vocabulary: int = 50257, context: int = 1024) -> tuple[Shapes, Shapes]:
    """GPT-2 small.

    Returns:
        Shapes of the hidden matrices and of the rest.
    """
    block = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    biases = [(3 * width,), (width,), (4 * width,), (width,), *[(width,)] * 4]
    return block * layers, [(vocabulary, width), (context, width), *biases * layers, (width,), (width,)]


def llama60m(layers: int = 8, width: int = 512, mlp: int = 1376, vocabulary: int = 32000) -> tuple[Shapes, Shapes]:
    """LLaMA 60M, untied.

    Returns:
        Shapes of the hidden matrices and of the rest.
    """
    block = [*[(width, width)] * 4, (mlp, width), (mlp, width), (width, mlp)]
    return block * layers, [*[(vocabulary, width)] * 2, *[(width,)] * (2 * layers + 1)]


SETS: dict[str, Callable[[], tuple[Shapes, Shapes]]] = {
    "llama60m": llama60m,
    "gpt2": gpt2,
    "llama60m-hidden": lambda: (llama60m()[0], []),
    "gpt2-hidden": lambda: (gpt2()[0], []),
    "llama60m-layer": lambda: (llama60m(layers=1)[0], []),
    "gpt2-layer": lambda: (gpt2(layers=1)[0], []),
}
LAYERS = {"llama60m-layer": 8, "gpt2-layer": 12}
"""A step over all hidden matrices takes so many times as long."""

# -- floors -----------------------------------------------------------------------------------------------------------

PASSES = {"lamb": 40, "lars": 28, "adafactor": 24, "adafactor_hf": 24, "came": 32, "racs": 40}
"""Bytes per parameter of rules that pass over a matrix more than once; `12 + 2 x state` for those that do not.

lamb: moments and both norms, then the step (24 + 16). lars: norms, then the step (8 + 20). adafactor: means, norm of
the step, step, norm of the weight (4 + 4 + 12 + 4). came: means, norm, momentum and residuals, step (4 + 4 + 12 + 12).
racs: columns, five times rows and next columns in one pass, norm, step (4 + 5 x 4 + 4 + 12); pytorch_optimizer's takes
means, not a power iteration.
"""


class Term(NamedTuple):
    """Matrix products of a step for an s x l matrix, s <= l, of rank r."""

    dtype: torch.dtype
    operations: Callable[[float, float, float], float]
    """Operations from s, l and r; products that give symmetric matrices count half, Newton-Schulz's in full."""
    formula: str


def newton_schulz(steps: int) -> Term:
    """Plain quintic iterations."""
    counted = f"{steps} (4 s²l + 2 s³)"
    return Term(torch.bfloat16, lambda s, n, _: steps * (4 * s * s * n + 2 * s**3), counted)


def both_sides(k: int) -> Term:
    """`k` products of the matrix with half a square of each side."""
    return Term(torch.float32, lambda s, n, _: k * s * n * (s + n), f"{k} sl (s + l)")


def low_rank(k: int) -> Term:
    """`k` halves of a product with a basis of rank r."""
    return Term(torch.float32, lambda s, n, r: k * s * n * r, f"{k} slr")


PRODUCTS: dict[str, tuple[Term, ...]] = {
    "muon": (newton_schulz(5),),
    "normuon": (newton_schulz(5),),
    "muon_sq": (newton_schulz(12),),
    "muown": (newton_schulz(12),),
    "soap_muon": (both_sides(5), newton_schulz(12)),
    "swan": (Term(torch.float32, lambda s, n, _: 3 * s * s * n + 45 * s**3, "3 s²l + 45 s³"),),
    "soap": (both_sides(5),),
    "kl_soap": (both_sides(7),),
    "sink_soap": (both_sides(5),),
    "moso": (Term(torch.float32, lambda s, n, _: 5 * s * s * n, "5 s²l"),),
    "kfac": (both_sides(4),),
    "shampoo": (both_sides(3),),
    "eigen_adam": (Term(torch.float32, lambda s, n, _: 7 * s * s * n, "7 s²l"),),
    "psgd_kron": (both_sides(4),),
    "galore": (low_rank(4),),
    "galore_adafactor": (low_rank(4),),
    "fira": (low_rank(4),),
    "fira_plus": (low_rank(4),),
    "apollo": (low_rank(2),),
    "apollo_svd": (low_rank(2),),
    "flora": (low_rank(4),),
    "alice": (Term(torch.float32, lambda s, n, r: 4 * s * n * r + n * r * r, "4 slr + lr²"),),
    "alice0": (low_rank(4),),
    "dion": (Term(torch.float32, lambda s, n, r: 8 * s * n * r + 4 * n * r * r, "8 slr + 4 lr²"),),
    "cosmos": (newton_schulz(5), low_rank(10)),
    "adapprox": (Term(torch.float32, lambda s, n, r: 2 * s * n * r + 12 * s * n * (r + 5), "2 slr + 12 sl (r + 5)"),),
}
"""Products of an ordinary step."""


class Rates(NamedTuple):
    """What the machine does, measured."""

    bfloat16: float
    """Operations per second of a matrix product."""
    float32: float


def matmul_rate(dtype: torch.dtype, size: int = 1024) -> float:
    """Measured matrix product.

    Returns:
        Floating-point operations per second.
    """
    a, clock = torch.randn(size, size).to(dtype), clock_of(torch.get_num_threads())
    times = []
    for _ in range(7):
        start = clock()
        _ = product(a, a)
        times.append(clock() - start)
    return 2 * size**3 / min(times)


def floor(name: str, rule: Rule, matrices: Shapes, rest: Shapes, fused: float, rates: Rates) -> tuple[float, str]:
    """The time below which a step cannot be.

    Args:
        name: of the optimizer.
        rule: with its settings.
        matrices: shapes the rule works on.
        rest: shapes AdamW works on.
        fused: seconds per byte of torch's fused AdamW.
        rates: of matrix products.

    Returns:
        (seconds, what was counted).
    """
    moved = PASSES.get(rule.name, 12 + 2 * state_bytes(type(rule)))
    if rule.name in PRODUCTS:
        shape = matrices[0]
        shaped = rule.state_specs(*shape)
        moved = 12 + 2 * sum(4 * math.prod(x.shape(*shape)) for x in shaped.values()) / math.prod(shape)
    moved = 16 if VARIANTS.get(name, {}).get("state_storage") in NARROW else moved
    seconds, record = fused * moved * sum(map(math.prod, matrices)), f"{moved:.0f} B"
    if rule.name in PRODUCTS:
        rank, products, parts = getattr(rule, "rank", 0), 0.0, []
        for dtype, operations, formula in PRODUCTS[rule.name]:
            done = sum(operations(min(s), max(s), min(rank, *s)) for s in matrices)
            products += done / (rates.bfloat16 if dtype == torch.bfloat16 else rates.float32)
            parts.append(f"{done / 1e9:.3g} GFLOP: {formula}, {str(dtype).removeprefix('torch.')}")
        if products > seconds:
            seconds, record = products, " + ".join(parts)
    return seconds + fused * 28 * sum(map(math.prod, rest)), record + (" + AdamW of the rest" if rest else "")


# -- contenders -------------------------------------------------------------------------------------------------------


def split(rule: Rule, hidden: list[Parameter], rest: list[Parameter]) -> tuple[list[Parameter], ...]:
    """Which parameters a rule gets, and which AdamW.

    Returns:
        (the rule's, AdamW's).
    """
    if not (rule.elementwise or rule.reduces):
        return hidden, rest
    taken = [p for p in [*hidden, *rest] if rule.vectors or p.ndim > 1]
    return taken, [p for p in rest if not rule.vectors and p.ndim < 2]


def ours(name: str, matrices: list[Parameter], rest: list[Parameter], **settings: Any) -> RuleOptimizer:
    """Our optimizer, with AdamW for what the rule does not take.

    Returns:
        The optimizer.
    """
    case = {"rule": name.partition("-")[0], "lr": LR, **VARIANTS.get(name, {}), **settings}
    groups = [{"params": matrices, **case}, {"params": rest, "rule": "adamw", "lr": LR}]
    return RuleOptimizer([group for group in groups if group["params"]])


def show(optimizer: RuleOptimizer, rule: Rule, matrices: Sequence[Parameter], grads: Sequence[Tensor]) -> None:
    """Hand over one measurement of random numbers, if the rule observes any; `curvature.py` times the measurement."""
    if rule.curvature_input == "factors":
        square = [(torch.randn(2 * n, n) / n**0.5 for n in reversed(p.shape)) for p in matrices]
        pairs = [[x.mT @ x for x in sides] for sides in square]
        optimizer.update_curvature({
            p: SimpleNamespace(inputs=a, outputs=b) for p, (a, b) in zip(matrices, pairs, strict=True)
        })
    elif rule.curvature_input:
        shown = zip(matrices, grads, strict=False)
        optimizer.update_curvature({p: SimpleNamespace(value=g, count=1) for p, g in shown})


def clock_of(threads: int) -> Callable[[], float]:
    """What measures: CPU time of this thread where it is the only one."""
    return time.thread_time if threads == 1 else time.perf_counter


def take_turns(
    contenders: dict[str, Sequence[torch.optim.Optimizer]],
    params: list[Parameter],
    grads: list[Tensor],
    steps: int,
    clock: Callable[[], float],
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Time contenders step by step.

    Args:
        contenders: optimizers that make one step together, by name; they take turns in this order.
        params: shared by all.
        grads: copied into the parameters' gradients before every step.
        steps: of each.
        clock: gives seconds.

    Returns:
        (seconds of every step of each contender, the error of each peer that cannot take these parameters).
    """
    taken: dict[str, list[float]] = {name: [] for name in contenders}
    failed: dict[str, str] = {}
    for _ in range(steps):
        for name in list(taken):
            for p, g in zip(params, grads, strict=True):
                if p.grad is None:  # some peers take it away
                    p.grad = g.clone()
                else:
                    p.grad.copy_(g)
            start = clock()
            try:
                for optimizer in contenders[name]:
                    optimizer.step()
            except Exception as error:
                if name.startswith("ours"):
                    raise
                failed[name] = f"{type(error).__name__}: {error}"
                del taken[name]
                continue
            taken[name].append(clock() - start)
    return taken, failed


def temporary_bytes(optimizer: torch.optim.Optimizer) -> int:
    """The most memory a step allocates at once.

    Returns:
        Bytes.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        optimizer.step()
    inner = profile.profiler
    assert inner is not None and inner.kineto_results is not None
    actual: list[Any] = [e for e in inner.kineto_results.events() if e.name() == "[memory]"]
    events = sorted((e.start_ns(), e.nbytes()) for e in actual)
    level = highest = 0
    for _, change in events:
        level += change
        highest = max(highest, level)
    return highest


def measure(name: str, shapes: str, threads: int, rounds: int, *, alone: bool = False) -> dict[str, Any]:
    """One row: an optimizer beside torch's fused AdamW and its peers.

    Args:
        name: `rule` or `rule-variant`.
        shapes: of `SETS`.
        threads: of torch.
        rounds: timed steps of each contender, after two untimed ones; two intervals where state is refreshed.
        alone: leave the peers out.

    Returns:
        What `--jsonl` keeps.
    """
    torch.manual_seed(0)
    hidden, others = ([Parameter(0.02 * torch.randn(s)) for s in part] for part in SETS[shapes]())
    params = [*hidden, *others]
    grads = [1e-3 * torch.randn_like(p) for p in params]
    plain = REGISTRY[name.partition("-")[0]]()
    matrices, rest = split(plain, hidden, others)
    policies = POLICIES if plain.preconditioners else ("",)
    made = {p: ours(name, matrices, rest, **({"refresh": p} if p else {})) for p in policies}
    for optimizer in made.values():
        show(optimizer, plain, matrices, grads)
    contenders: dict[str, Sequence[torch.optim.Optimizer]] = {f"ours {p}".strip(): [x] for p, x in made.items()}
    contenders["fused AdamW"] = [torch.optim.AdamW(params, lr=LR, fused=True)]
    actual = {} if alone else peers(name)
    for package, build in actual.items():
        contenders[package] = build(matrices, rest, INTERVAL)
    steps = 1 + 2 * INTERVAL if plain.preconditioners else 2 + rounds
    taken, failed = take_turns(contenders, params, grads, steps, clock_of(threads))
    optimizer = made[policies[0]]
    count, mine = sum(p.numel() for p in params), sum(p.numel() for p in matrices)
    snapshot = sum(t.nbytes for p in matrices for t in optimizer.state[p].values())
    rates = Rates(matmul_rate(torch.bfloat16), matmul_rate(torch.float32))
    fused = statistics.median(taken["fused AdamW"][2:])
    this, left = ([tuple(p.shape) for p in part] for part in (matrices, rest))
    seconds, record = floor(name, plain, this, left, fused / (28 * count), rates)
    return {
        "optim": name,
        "shapes": shapes,
        "threads": threads,
        "torch": torch.__version__,
        "parameters": count,
        "floor": seconds,
        "counted": record,
        "state": snapshot / mine,
        "temporary": temporary_bytes(optimizer),
        "rates": rates._asdict(),
        "missing": [] if alone else [package for package in known(name) if package not in actual],
        "failed": failed,
        "seconds": taken,
    }


# -- tables -----------------------------------------------------------------------------------------------------------


def ordinary(name: str, row: dict[str, Any]) -> float:
    """A contender's step that refreshes nothing: the median."""
    return statistics.median(row["seconds"][name][2:])


def amortised(name: str, row: dict[str, Any]) -> float:
    """A contender's mean step over whole intervals, the first step apart."""
    return statistics.fmean(row["seconds"][name][1:])


def fastest(row: dict[str, Any], seconds: Callable[[str, dict[str, Any]], float]) -> str | None:
    """The peer with the fastest step, if there is one."""
    others = [k for k in row["seconds"] if k != "fused AdamW" and not k.startswith("ours")]
    return min(others, key=lambda k: seconds(k, row), default=None)


def absent(row: dict[str, Any]) -> str:
    """Why no peer is in a row."""
    failed = [f"{package} fails" for package in row["failed"]]
    return ", ".join([*failed, *(["peer not installed"] if row["missing"] else [])]) or "-"


def step_cells(row: dict[str, Any]) -> list[str]:
    """A row of the table of ordinary steps.

    Returns:
        Its cells.
    """
    mine = next(k for k in row["seconds"] if k.startswith("ours"))
    step, fused, peer = ordinary(mine, row), ordinary("fused AdamW", row), fastest(row, ordinary)
    beside = [absent(row), "-", "-"]
    if peer:
        theirs = ordinary(peer, row)
        beside = [peer, f"{theirs / fused:.2f}", f"**{theirs / step:.2f}**"]
    temporary = f"{row['temporary'] / 2**20:.1f}"
    floors = [f"{step / row['floor']:.2f}", row["counted"]]
    return [row["optim"], f"{step / fused:.2f}", *floors, f"{row['state']:.2f}", temporary, *beside]


STEP_HEAD = (
    "optimizer | / fused AdamW | / floor | floor per parameter | state B per parameter | temporary MiB | fastest peer "
    "| peer / fused AdamW | peer / ours"
).split(" | ")


def refresh_cells(row: dict[str, Any]) -> list[str]:
    """A row of the table of steps with refreshes.

    Returns:
        Its cells.
    """
    fused, peer = ordinary("fused AdamW", row), fastest(row, amortised)
    cells = [row["optim"]]
    for policy in POLICIES:
        mean, worst = amortised(f"ours {policy}", row), max(row["seconds"][f"ours {policy}"][1:])
        cells += [f"{mean / fused:.1f}", f"{worst / fused:.1f}", f"{worst / mean:.2f}"]
    if peer is None:
        return [*cells, absent(row), "-", "-"]
    theirs = amortised(peer, row)
    return [*cells, peer, f"{theirs / fused:.1f}", f"**{theirs / amortised(f'ours {POLICIES[0]}', row):.2f}**"]


REFRESH_HEAD = ["optimizer"]
for _policy in POLICIES:
    REFRESH_HEAD += [f"`{_policy}` mean", "worst", "worst / mean"]
REFRESH_HEAD += ["fastest peer", "peer's mean", "peer / ours"]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table.

    Returns:
        Its lines.
    """
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def tables(rows: Sequence[dict[str, Any]]) -> str:
    """Every row of a file, one or two tables per set of shapes.

    Returns:
        Markdown.
    """
    out = []
    for shapes in SETS:
        some = sorted((r for r in rows if r["shapes"] == shapes), key=lambda r: r["optim"])
        if not some:
            continue
        first = some[0]
        scale = f"; all layers take {LAYERS[shapes]} times as long" if shapes in LAYERS else ""
        rates = {k: statistics.median(r["rates"][k] for r in some) / 1e9 for k in first["rates"]}
        measured = ", ".join(f"{k} products {x:.0f} GFLOP/s" for k, x in rates.items())
        out.append(
            f"### {shapes}: {first['parameters'] / 1e6:.1f}M parameters{scale}\n\n{first['threads']} thread(s), "
            f"torch {first['torch']}, {measured}.\n\n" + markdown(STEP_HEAD, map(step_cells, some))
        )
        if costly := [r for r in some if f"ours {POLICIES[0]}" in r["seconds"]]:
            out.append(
                "With refreshes, in steps of fused AdamW:\n\n" + markdown(REFRESH_HEAD, map(refresh_cells, costly))
            )
    return "\n\n".join(out)


def read(path: Path | None) -> dict[tuple[str, str], dict[str, Any]]:
    """What a JSONL file holds; of rows measured twice, the later.

    Returns:
        Rows by (shapes, optimizer).
    """
    lines = path.read_text().splitlines() if path is not None and path.exists() else []
    return {(row["shapes"], row["optim"]): row for row in map(json.loads, lines)}


MARKS = "<!-- step_time: generated -->", "<!-- /step_time -->"


def main() -> None:
    """Parse the command line, measure and print."""
    names = [*sorted(REGISTRY), *VARIANTS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", nargs="+", default=names, choices=names, metavar="NAME", help="default: all")
    parser.add_argument("--shapes", nargs="+", default=["llama60m"], choices=list(SETS), help="default: llama60m")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each contender")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--jsonl", type=Path, help="append rows to this file, and leave out those that it has")
    parser.add_argument("--again", action="store_true", help="measure rows that the file has, too")
    parser.add_argument("--alone", action="store_true", help="without peers")
    parser.add_argument("--tables", action="store_true", help="measure nothing, print the file")
    parser.add_argument("--readme", type=Path, help="with --tables: write them between this file's marks")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # the peers'
    torch.set_num_threads(args.threads)
    rows = read(args.jsonl)
    if args.tables:
        text = tables(list(rows.values()))
        if args.readme is None:
            print(text)
        else:
            args.readme.write_text(between(args.readme.read_text(), *MARKS, f"\n{text}\n"))
        return
    for shapes in args.shapes:
        for name in args.optim:
            if (shapes, name) in rows and not args.again:
                continue
            row = rows[shapes, name] = measure(name, shapes, args.threads, args.rounds, alone=args.alone)
            if args.jsonl is not None:
                with args.jsonl.open("a") as file:
                    file.write(json.dumps(row) + "\n")
            print(shapes, " | ".join(step_cells(row)), flush=True)
            if REGISTRY[name.partition("-")[0]].preconditioners:
                print("   with refreshes: ", " | ".join(refresh_cells(row)), flush=True)
    print("\n" + tables([row for (shapes, name), row in rows.items() if shapes in args.shapes and name in args.optim]))


if __name__ == "__main__":
    main()
