"""Step time and traffic of whole-matrix rules under FSDP2 on two gloo processes, beside one process.

    python examples/benchmark/two_ranks.py

The parameters are the matrices of a small LLaMA. Every process has one thread, so that two have twice the arithmetic of
one, and each pays for its half of the gradients and directions that travel. Bytes are counted at the call and compared
with the price that `plan` gives.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from lightning_optim import build_optimizer
from lightning_optim.build.mesh_estimate import estimate_mesh


class Matrices(nn.Module):
    """What a layer of a LLaMA has, some times."""

    def __init__(self, width: int, inner: int, layers: int):
        super().__init__()
        torch.manual_seed(0)
        shapes = [(width, width)] * 4 + [(inner, width)] * 2 + [(width, inner)]
        self.layers = nn.ModuleList(nn.Linear(n, m, bias=False) for _ in range(layers) for m, n in shapes)


def steps(rank: int, world: int, store: str, args: argparse.Namespace, results: Any) -> None:
    """Take steps with given gradients; puts median seconds, bytes sent and their price into `results`."""
    torch.set_num_threads(1)
    if world > 1:
        dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    for name in args.optim:
        model = Matrices(args.width, args.inner, args.layers)
        price = estimate_mesh(build_optimizer(model, name, lr=1e-3), "fsdp2", 2).sent[rank]
        if world > 1:
            for layer in model.layers:
                fully_shard(layer, mesh=init_device_mesh("cpu", (world,)))
        optimizer = build_optimizer(model, name, lr=1e-3)
        sent: list[int] = []
        exchange = dist.all_to_all_single

        def counting(output: Tensor, settings: Tensor, into: Any, out: list[int], **kwargs: Any) -> Any:
            sent.append((settings.numel() - out[rank]) * settings.itemsize)  # noqa: B023
            return exchange(output, settings, into, out, **kwargs)  # noqa: B023

        dist.all_to_all_single = counting
        seconds = []
        for _ in range(args.rounds):
            for p in model.parameters():
                p.grad = torch.randn_like(p)
            sent.clear()
            if world > 1:
                dist.barrier()
            started = time.perf_counter()
            optimizer.step()
            seconds.append(time.perf_counter() - started)
        dist.all_to_all_single = exchange
        results[name, world, rank] = statistics.median(seconds[2:]), sum(sent), price
    if world > 1:
        dist.destroy_process_group()


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", nargs="+", default=["muon", "soap"])
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=12)
    args = parser.parse_args()
    context = torch.multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder, context.Manager() as manager:
        results = manager.dict()
        for world in (1, 2):
            ranks = [
                context.Process(target=steps, args=(r, world, f"{folder}/store", args, results)) for r in range(world)
            ]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
        print("| optimizer | one process, ms | FSDP2 on two, ms | ratio | bytes sent, most | price | |")
        print("|---|---|---|---|---|---|---|")
        for name in args.optim:
            one = results[name, 1, 0][0]
            two = max(results[name, 2, r][0] for r in range(2))
            sent, price = zip(*(results[name, 2, r][1:] for r in range(2)), strict=True)
            record = "equal" if sent == price else "different"
            row = f"{1e3 * one:.0f} | {1e3 * two:.0f} | {two / one:.2f} | {max(sent):,} | {max(price):,} | {record} |"
            print(f"| {name} | {row}")


if __name__ == "__main__":
    main()
