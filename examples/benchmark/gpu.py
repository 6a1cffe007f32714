"""What only an accelerator can answer: its ceilings, and how near to them the optimizers come. Ratios, in one run.

    python examples/benchmark/gpu.py --jsonl gpu.jsonl
    python examples/benchmark/gpu.py --parts newton_schulz steps --jsonl gpu.jsonl
    python examples/benchmark/gpu.py --device cpu --small        # only shows that it runs
    pytest --device cuda tests/contract/test_golden.py tests/contract/test_contract.py tests/diagnostics
    python examples/benchmark/gpu.py --table2 runs/table2 --minutes 10

The last one trains the preset 60m with the optimizers of Table 2 of Gong et al. 2025 (arXiv:2502.07752) and others, by
`lightning_optim.bench`, and continues where it stopped.

A step is timed twice. "alone": from an idle device to an idle device, launches and Python included. "queued": by
events, behind work that keeps the device busy while the host launches; that is what a step costs after a backward pass,
unless the host is slower than the device. Medians; contenders of a table share parameters and gradients and take turns.

No figures of this script are in the repository yet: it has run on a CPU only.
"""

from __future__ import annotations

import argparse
import inspect
import json
import math
import statistics
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peers import peers  # pyright: ignore[reportImplicitRelativeImport]
from step_time import INTERVAL, PASSES, PRODUCTS, markdown, show  # pyright: ignore[reportImplicitRelativeImport]
from torch import Tensor
from torch.nn import Parameter

from lightning_optim import RuleOptimizer, build_optimizer
from lightning_optim.bench.__main__ import main as bench_command
from lightning_optim.catalog import state_bytes
from lightning_optim.core.rule import REGISTRY
from lightning_optim.data.presets import PRESETS, build_model
from lightning_optim.diagnostics.memory import predicted_state
from lightning_optim.ops import orthogonal

LR = 1e-6
Row = dict[str, Any]
TABLE2 = ("adamw", "muon", "soap", "racs", "alice", "galore", "fira", "apollo", "adam_mini", "lion")
MATRICES = ("muon", "normuon", "soap", "kl_soap", "psgd_kron", "alice", "racs", "galore", "fira", "apollo", "dion")
ALONE = [name for name, rule in REGISTRY.items() if not rule.curvature_input]
"""Rules that take gradients and nothing else."""
BATCHES = {"Alice and RACS": 512 * 256, "Muon": 2**19}
"""Tokens per step in the papers: Gong et al. 2025, Sec. 6; Jordan et al. 2024 (NanoGPT)."""
BUSY = 50_000_000
"""Cycles of the device, some 30 ms, in which the host gets ahead."""


@dataclass(frozen=True)
class Bench:
    """Where and how large."""

    device: str
    small: bool
    rounds: int

    @property
    def matrices(self) -> list[tuple[int, int]]:
        """Shapes of hidden matrices."""
        return [(128, 128)] * 2 if self.small else [(4096, 4096)] * 16

    @property
    def preset(self) -> str:
        """Whose step is compared with the optimizers'."""
        return "tiny" if self.small else "350m"

    def sync(self) -> None:
        """Wait for the device."""
        if self.device != "cpu":
            torch.cuda.synchronize()

    def time(self, call: Callable[[], Any]) -> tuple[float, float]:
        """Time one call.

        Returns:
            (alone, queued) in seconds; both are the first on a CPU.
        """
        self.sync()
        start = time.perf_counter()
        call()
        self.sync()
        alone = time.perf_counter() - start
        if self.device == "cpu":
            return alone, alone
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda._sleep(BUSY)
        begin.record()
        call()
        end.record()
        self.sync()
        return alone, begin.elapsed_time(end) / 1e3

    def turns(self, calls: dict[str, Callable[[], Any]]) -> dict[str, tuple[float, float]]:
        """Time calls in turns, after two untimed rounds.

        Returns:
            Medians of `time` by name.
        """
        for _ in range(2):
            for call in calls.values():
                call()
        taken = {name: [] for name in calls}
        for _ in range(self.rounds):
            for name, call in calls.items():
                taken[name].append(self.time(call))
        return {k: (statistics.median(a for a, _ in v), statistics.median(q for _, q in v)) for k, v in taken.items()}

    def parameters(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype = torch.float32) -> list[Parameter]:
        """Random parameters with gradients."""
        out = [Parameter(0.02 * torch.randn(s, device=self.device, dtype=dtype)) for s in shapes]
        for p in out:
            p.grad = 1e-3 * torch.randn_like(p)
        return out

    def copied(self) -> float:
        """Bytes per second, read and written, of a copy that no cache holds."""
        x = torch.randn(2**20 if self.small else 2**29, device=self.device)
        y = torch.empty_like(x)
        return 2 * x.nbytes / self.turns({"copy": lambda: y.copy_(x)})["copy"][1]

    def multiplied(self, size: int, dtype: torch.dtype = torch.bfloat16) -> float:
        """Operations per second of the product of two square matrices of random numbers."""
        a, b = (torch.randn(size, size, device=self.device).to(dtype) for _ in range(2))
        return 2 * size**3 / self.turns({"product": lambda: a @ b})["product"][1]


def ceilings(bench: Bench) -> Iterator[Row]:
    """What the device does at best."""
    yield {"what": "copy, GB/s", "rate": bench.copied() / 1e9}
    for size in (256,) if bench.small else (2048, 4096, 8192):
        for dtype in (torch.bfloat16, torch.float32):
            name = str(dtype).removeprefix("torch.")
            yield {"what": f"{name} product of {size} x {size}, TFLOP/s", "rate": bench.multiplied(size, dtype) / 1e12}
    x = torch.zeros((), device=bench.device)
    yield {"what": "launch, microseconds", "rate": 1e6 * bench.turns({"one": lambda: x.add_(1)})["one"][0]}


def elementwise(bench: Bench) -> Iterator[Row]:
    """Rules whose cost is memory: bytes of the fewest passes over time, as a share of a copy's rate."""
    copied = bench.copied()
    params = bench.parameters(bench.matrices)
    count = sum(p.numel() for p in params)
    grads = [p.grad for p in params if p.grad is not None]
    names = [n for n, rule in REGISTRY.items() if (rule.elementwise or rule.reduces) and n != "mlbfgs"]
    fused = torch.optim.AdamW(params, lr=LR, fused=True)

    def beside(name: str, step: Callable[[], Any], moved: float) -> Row:
        taken = bench.turns({"fused": fused.step, name: step})
        alone, queued = taken[name]
        shares = {"queued / fused": queued / taken["fused"][1], "share of copy": moved / queued / copied}
        return {"optimizer": name, **shares, "alone / queued": alone / queued}

    yield beside("torch fused AdamW", fused.step, 28 * count)
    yield beside("torch foreach AdamW", torch.optim.AdamW(params, lr=LR, foreach=True).step, 28 * count)
    for name in names:
        moved = PASSES.get(name, 12 + 2 * state_bytes(REGISTRY[name]))
        for form in ({}, {"compile": True}):
            try:
                ours = RuleOptimizer(params, {"rule": name, "lr": LR, "on_nonfinite": "off", **form})
            except ValueError as error:  # it has no graph, and says why
                yield {"optimizer": f"{name}, compiled", "refused": str(error)}
                continue
            show(ours, REGISTRY[name](), params, grads)
            yield beside(f"{name}, compiled" if form else name, ours.step, moved * count)
            del ours


def newton_schulz(bench: Bench) -> Iterator[Row]:
    """Five iterations on a stack: ours, the same as a graph of the device, and with symmetric products in Triton.

    Operations are counted in full, 5 (4 s^2 l + 2 s^3), whatever is left out. Errors are to float64.
    """
    shapes = [(2, 96, 160)] if bench.small else [(16, 4096, 4096), (16, 1024, 4096), (64, 1024, 1024), (256, 512, 512)]
    rate = bench.multiplied(256 if bench.small else 4096)
    dtype = torch.float32 if bench.device == "cpu" else torch.bfloat16  # Triton's interpreter has no bfloat16 products
    for b, s, long in shapes:
        x = torch.randn(b, s, long, device=bench.device).to(dtype)
        x /= x.norm(dim=(-2, -1), keepdim=True)
        exact = orthogonal.orthogonalize(x[:1].double(), dtype=torch.float64)
        calls: dict[str, Callable[[], Tensor]] = {"ours": lambda x=x: orthogonal.orthogonalize(x, dtype=dtype)}
        if bench.device != "cpu":
            calls["ours, replayed"] = replayed(calls["ours"])
        try:
            import symmetric  # pyright: ignore[reportImplicitRelativeImport]
        except ImportError as error:
            yield {"stack": f"{b} x {s} x {long}", "form": "symmetric", "refused": str(error)}
        else:
            for t in symmetric.TILES[: 1 if bench.small else None]:
                calls[f"symmetric, tiles {t}"] = lambda x=x, t=t: symmetric.iterate(x, 5, orthogonal.QUINTIC, t)
        plain = calls["ours"]()
        for form, (alone, queued) in bench.turns(calls).items():
            actual = calls[form]()
            operations = b * PRODUCTS["muon"][0].operations(s, long, 0)
            yield {
                "stack": f"{b} x {s} x {long}",
                "form": form,
                "share of products": operations / queued / rate,
                "alone / queued": alone / queued,
                "error": float((actual[:1].double() - exact).norm() / exact.norm()),
                "equals ours": torch.equal(actual, plain),
            }


def replayed(call: Callable[[], Tensor]) -> Callable[[], Tensor]:
    """A call as a graph of the device.

    Returns:
        Replays it; the result is the same tensor every time.
    """
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):
        call()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()

    def run() -> Tensor:
        graph.replay()
        return out

    return run


def matrices(bench: Bench) -> Iterator[Row]:
    """Rules for whole matrices: an ordinary step beside torch's fused AdamW, Muon and installed packages."""
    params = bench.parameters(bench.matrices[:4])
    rate = bench.multiplied(bench.matrices[0][0])
    fused = torch.optim.AdamW(params, lr=LR, fused=True)
    for name in MATRICES:
        made = RuleOptimizer(params, {"rule": name, "lr": LR, "on_nonfinite": "off"})
        calls: dict[str, Callable[[], Any]] = {"fused AdamW": fused.step, "ours": made.step}
        if name == "muon":
            calls["torch"] = torch.optim.Muon(params, lr=LR).step
        for package, build in peers(name).items():
            built = build(params, [], INTERVAL)
            calls[package] = lambda built=built: [optimizer.step() for optimizer in built]
        taken = bench.turns(calls)
        base = taken.pop("fused AdamW")[1]
        for who, (alone, queued) in taken.items():
            row: Row = {"optimizer": name, "by": who, "queued / fused": queued / base, "alone / queued": alone / queued}
            if name in ("muon", "normuon"):
                done = sum(PRODUCTS[name][0].operations(min(p.shape), max(p.shape), 0) for p in params)
                row["share of products"] = done / queued / rate
            yield row
        del made, calls


def steps(bench: Bench) -> Iterator[Row]:
    """An optimizer's share of a training step, refreshes included, scaled from a small batch to the papers' ones.

    Time of forward and backward passes grows with tokens, an optimizer's does not. Throughput is AdamW's training step
    over the optimizer's.
    """
    preset = PRESETS[bench.preset]
    torch.manual_seed(0)
    model: Any = build_model(preset.vocabulary, preset)
    model.to(bench.device)
    ids = torch.randint(preset.vocabulary, (2 if bench.small else 64, preset.context), device=bench.device)

    def passes() -> None:
        model.zero_grad()
        with torch.autocast(bench.device, torch.bfloat16):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()

    token = bench.turns({"passes": passes})["passes"][1] / ids.numel()
    spent: dict[str, float] = {}
    for name in TABLE2:
        policy: dict[str, Any] = {"refresh": f"staggered:{INTERVAL}"} if REGISTRY[name].preconditioners else {}
        optimizer = build_optimizer(model, name, lr=LR, on_nonfinite="off", **policy)
        for _ in range(2):
            optimizer.step()
        spent[name] = statistics.fmean(bench.time(optimizer.step)[1] for _ in range(2 * INTERVAL))
        del optimizer
    for name, mine in spent.items():
        row: Row = {"optimizer": name, "step / AdamW's": mine / spent["adamw"]}
        for paper, tokens in BATCHES.items():
            row[f"share at {tokens} tokens ({paper})"] = mine / (mine + token * tokens)
            row[f"throughput at {tokens}"] = (spent["adamw"] + token * tokens) / (mine + token * tokens)
        if name == "muon":
            row["T m / B (Jordan et al. 2024)"] = 5 * preset.width / BATCHES["Muon"]
        yield row


def waits(bench: Bench) -> Iterator[Row]:
    """How often the host waits for the device in an ordinary step; should be never with `on_nonfinite="off"`."""
    if bench.device == "cpu":
        return
    for name in ALONE:
        params = bench.parameters([(256, 512)] * 4)
        for check in ("off", "raise"):
            optimizer = RuleOptimizer(params, {"rule": name, "lr": LR, "on_nonfinite": check})
            for _ in range(3):
                optimizer.step()
            torch.cuda.set_sync_debug_mode("warn")
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                optimizer.step()
            torch.cuda.set_sync_debug_mode("default")
            yield {"optimizer": name, "on_nonfinite": check, "waits": len(caught)}


def memory(bench: Bench) -> Iterator[Row]:
    """Predicted state beside what the allocator has more after the first step, and the most a step takes besides."""
    if bench.device == "cpu":
        return
    for name in ALONE:
        params = bench.parameters([(1024, 2048)] * 8)
        optimizer = RuleOptimizer(params, {"rule": name, "lr": LR})
        bench.sync()
        before = torch.cuda.memory_allocated()
        optimizer.step()
        snapshot = torch.cuda.memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        optimizer.step()
        predicted = predicted_state(optimizer) or 0
        temporary = torch.cuda.max_memory_allocated() - before - snapshot
        yield {
            "optimizer": name,
            "kept / predicted": snapshot / predicted if predicted else math.nan,
            "temporary MiB": temporary / 2**20,
        }


PARTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    f.__name__: f for f in (ceilings, newton_schulz, matrices, elementwise, steps, waits, memory)
}


def train(out: Path, device: str, minutes: float, *, small: bool) -> None:
    """Tune and compare optimizers on the preset 60m; what differs from the paper's setting is in the report."""
    size = ["--model", "tiny", "--tokens", "8192"] if small else ["--model", "60m", "--batch", "512"]
    budget = [] if small else ["--tokens", str(10**8), "--precision", "autocast"]
    shared = ["--device", device, "--rest_lr", "0.002", "--trials", "2", "--minutes", str(minutes), "--out", str(out)]
    bench_command(["run", *size, *budget, *shared, "--optim", *TABLE2])
    bench_command(["report", "--out", str(out)])


def table(rows: Sequence[Row]) -> str:
    """Rows of one part, whatever columns they have.

    Returns:
        Markdown.
    """
    head = list(dict.fromkeys(key for row in rows for key in row))
    cells = [[f"{x:.3g}" if isinstance(x := row.get(key, "-"), float) else str(x) for key in head] for row in rows]
    return markdown(head, cells)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line, measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--small", action="store_true", help="sizes at which nothing is learned but that it runs")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--jsonl", type=Path, help="append every row to this file")
    parser.add_argument("--table2", type=Path, metavar="DIR", help="train instead, and write trials and report there")
    parser.add_argument("--minutes", type=float, default=10, help="of --table2")
    args = parser.parse_args(argv)
    if args.table2 is not None:
        train(args.table2, args.device, args.minutes, small=args.small)
        return
    bench = Bench(args.device, args.small, args.rounds)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")  # the peers'
    name = torch.cuda.get_device_name() if args.device != "cpu" else "a CPU"
    print(f"{name}, torch {torch.__version__}")
    for part in args.parts:
        rows = []
        for row in PARTS[part](bench):
            rows.append(row)
            if args.jsonl is not None:
                with args.jsonl.open("a") as file:
                    file.write(json.dumps({"part": part, "device": name, "torch": torch.__version__, **row}) + "\n")
        if not rows:
            continue
        print(f"\n## {part}\n\n{inspect.getdoc(PARTS[part])}\n\n{table(rows)}", flush=True)


if __name__ == "__main__":
    main()
