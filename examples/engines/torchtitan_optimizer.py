"""torchtitan's trainer with an optimizer of this package, on its debug model.

    cd TORCHTITAN
    torchrun --nproc_per_node 2 LIGHTNING_OPTIM/examples/engines/torchtitan_optimizer.py

With 1 process the losses are the same: a step has the same four rows. `OptimizersContainer` below is all that a
configuration of your own needs: it gives `build_optimizer` each part of the model, whose names tell roles. Seen with
torchtitan b5bcd76 (August 2026) and torch 2.13. torchtitan is written for GPUs; where there is none this script gives
it the processor, with FSDP2 over gloo, and an attention that the processor has.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from lightning_optim import build_optimizer


class Processor(SimpleNamespace):
    """What torchtitan asks of `torch.cuda`, for the CPU."""

    def __getattr__(self, name: str) -> Any:
        """A function that does nothing, where `torch.cpu` has none."""
        return getattr(torch.cpu, name, lambda *args, **kwargs: None)


def use_processor() -> None:
    """Let torchtitan run on the CPU; before it is imported."""
    memory = SimpleNamespace(total_memory=2**34)
    module = Processor(
        get_device_name=lambda device=None: "CPU",
        get_device_properties=lambda device=None: memory,
        memory_stats=lambda device=None: {},
        current_device=lambda: 0,
    )
    torch._utils._get_available_device_type = lambda: "cpu"
    torch._utils._get_device_module = lambda device: module


if not torch.cuda.is_available():
    use_processor()
if not hasattr(torch.distributed, "set_timeout"):  # torch 2.13; torchtitan follows torch's nightly builds
    torch.distributed.set_timeout = lambda *args, **kwargs: None

import torchtitan.components.optimizer as titan  # noqa: E402
from torchtitan.components.data.loader import BaseDataLoader  # noqa: E402
from torchtitan.models.common.attention import FlexAttention, ScaledDotProductAttention  # noqa: E402
from torchtitan.models.llama3.config_registry import llama3_debugmodel  # noqa: E402
from torchtitan.tools.logging import init_logger  # noqa: E402

CONTEXT = 128


class OptimizersContainer(titan.OptimizersContainer):
    """One of our optimizers for each part of the model."""

    @dataclass(kw_only=True, slots=True)
    class Config(titan.OptimizersContainer.Config):
        """The arguments of `build_optimizer`."""

        name: str = "muon"
        settings: dict[str, Any] = field(default_factory=dict)

    def __init__(self, config: Config, *, model_parts: list[torch.nn.Module]) -> None:
        self.model_parts = model_parts
        self.optimizers = [build_optimizer(part, config.name, **config.settings) for part in model_parts]
        self._post_init([p for optimizer in self.optimizers for g in optimizer.param_groups for p in g["params"]])

    def state_dict(self) -> dict[str, Any]:
        """By names, whole matrices sharded by rows: a checkpoint for any number of ranks."""
        options, out = StateDictOptions(flatten_optimizer_state_dict=True), {}
        for part, optimizer in zip(self.model_parts, self.optimizers, strict=True):
            out |= get_optimizer_state_dict(part, optimizer, options=options)
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Every part takes its own."""
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        for part, optimizer in zip(self.model_parts, self.optimizers, strict=True):
            set_optimizer_state_dict(part, optimizer, state_dict, options=options)


@torch.no_grad()
def start(model: torch.nn.Module) -> None:
    """Give matrices the same start on any number of ranks, which the CPU's generator does not."""
    torch.manual_seed(0)
    for p in model.parameters():
        if p.ndim > 1:
            whole = torch.randn(p.shape) * 0.02
            p.copy_(distribute_tensor(whole, p.device_mesh, p.placements) if isinstance(p, DTensor) else whole)


class Rows(BaseDataLoader):
    """This file's bytes; the rows of a step are the same on any number of ranks."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """Nothing to choose."""

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, **kwargs: Any) -> None:
        self.text = torch.tensor(list(Path(__file__).read_bytes()))
        self.ranks, self.next = dp_world_size, dp_rank

    def __iter__(self) -> Iterator[Any]:
        """Rows without end."""
        while True:
            start = self.next * CONTEXT % (len(self.text) - CONTEXT - 1)
            self.next += self.ranks
            row = self.text[start : start + CONTEXT + 1]
            yield {"input": row[:-1], "positions": torch.arange(CONTEXT)}, row[1:]

    def state_dict(self) -> dict[str, Any]:
        """The row that is next on this rank."""
        return {"next": self.next}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on there."""
        self.next = state_dict["next"]


def main() -> None:
    """Train the debug model for a few steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--optim", default="muon")
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--folder", default="outputs", help="of what torchtitan writes")
    args = parser.parse_args()
    init_logger()
    config = llama3_debugmodel()
    config.optimizer = OptimizersContainer.Config(name=args.optim, settings={"lr": 1e-3})
    config.dataloader, config.dump_folder = Rows.Config(), args.folder
    training = config.training
    training.steps, training.max_context_length, training.mixed_precision_param = args.steps, CONTEXT, "float32"
    training.num_tokens_per_microbatch_per_dp_rank, training.num_tokens_per_train_step = CONTEXT, 4 * CONTEXT
    config.validator.enable = False
    if not torch.cuda.is_available():
        training.disable_cuda_graphs, config.parallelism.spmd_backend = True, "partial_dtensor"
        for _, _, layer, key in config.model_spec.model.traverse(FlexAttention.Config):
            setattr(layer, key, ScaledDotProductAttention.Config())
    trainer = config.build()
    start(trainer.model_parts[0])
    for module in trainer.model_parts[0].modules() if not torch.cuda.is_available() else ():
        if isinstance(module, FSDPModule):
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other that torchtitan asks for
    trainer.train()
    trainer.close()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
