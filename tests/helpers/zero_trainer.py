"""The stock Transformers Trainer on several processes, with DDP and under DeepSpeed ZeRO, on the CPU.

python -m torch.distributed.run --standalone --nproc_per_node 2 -m tests.helpers.zero_trainer FOLDER '{"optim": "muon"}'

With `"killed": STAGE` every rank is ended by SIGKILL in a step after the checkpoint; called again, the run continues.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from torch.utils.data import Dataset
from transformers import Trainer, TrainerCallback

from hf_integration import TrainingArguments, last_checkpoint
from tests.helpers import zero_jobs
from tests.helpers.trainers import VOCABULARY, language_model
from tests.helpers.zero_jobs import config_of, start_deepspeed

STEPS, SAVE_AT = 6, 3
LOSS = 1e-6
MUON = {"optim": "muon", "optim_args": "ns_dtype=float32"}
"""In bfloat16 the last bit of a factor of clipping becomes one of bfloat16."""


class Rows(Dataset[dict[str, Tensor]]):
    """Random rows, and which of them were asked for."""

    def __init__(self) -> None:
        self.rows = torch.randint(3, VOCABULARY, (64, 12), generator=torch.Generator().manual_seed(0))
        self.seen: list[int] = []

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        self.seen.append(index)
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


class Death(TrainerCallback):
    """Ends this process in a step after the checkpoint, unless it was ended before."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == SAVE_AT + 1 and not self.note.exists():
            dist.barrier()
            self.note.touch()
            dist.barrier()
            os.kill(os.getpid(), signal.SIGKILL)


def train(
    folder: Path, stage: int | None, *, lora: bool = False, killed: bool = False, resume: bool = False, **settings: Any
) -> dict[str, Any]:
    """Train, with DDP where no stage is given: the losses by step, the rows that this rank saw, and the weights."""
    AcceleratorState._reset_state(reset_partial_state=True)
    engine: dict[str, Any] = {"use_cpu": True, "ddp_backend": "gloo"}
    if stage is not None:
        config = config_of(stage, train_micro_batch_size_per_gpu="auto", gradient_clipping="auto")
        engine = {"deepspeed": config, "accelerator_config": {"use_configured_state": True}}
        os.environ["ACCELERATE_USE_DEEPSPEED"] = "true"  # as `accelerate launch` sets it
        PartialState(backend="gloo")  # the Trainer names none, and accelerate then takes the ranks for one process each
        del os.environ["ACCELERATE_USE_DEEPSPEED"]
    flags: dict[str, Any] = dict(
        output_dir=str(folder), learning_rate=1e-2, weight_decay=0.1, max_steps=STEPS, logging_steps=1,
        per_device_train_batch_size=2, save_strategy="steps", save_steps=SAVE_AT, max_grad_norm=0.5, bf16=False,
        report_to="none", disable_tqdm=True, dataloader_pin_memory=False,
    )  # fmt: skip
    args = TrainingArguments(**(flags | engine | settings))
    model: Any = language_model()
    if lora:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(1)
        model = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    data = Rows()
    trainer = Trainer(
        model,
        args,
        train_dataset=data,
        callbacks=[Death(folder / "killed")] if killed else [],
        optimizer_cls_and_kwargs=args.optimizer_cls_and_kwargs(),
    )
    trainer.train(last_checkpoint(folder, before=STEPS) if resume else None)
    wrapped = type(trainer.model_wrapped).__name__
    assert wrapped == ("DistributedDataParallel" if stage is None else "DeepSpeedEngine"), wrapped
    losses = {entry["step"]: entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    out = {"losses": losses, "seen": data.seen, "weights": _weights(model, stage)}
    del trainer, model
    gc.collect()  # of the engine, before the next one
    return out


def _weights(model: Any, stage: int | None) -> list[Tensor]:
    params = [p for p in model.parameters() if p.requires_grad]
    if stage is None:
        return [p.detach().clone() for p in params]
    from deepspeed.utils import safe_get_full_fp32_param

    full: Any = safe_get_full_fp32_param
    return [full(p).clone() for p in params]


def compare(rank: int, world: int, folder: str, case: dict[str, Any], *, stages: tuple[int, ...] = (2, 3)) -> Any:
    """DDP's losses, and for each stage what a whole run and one continued from its checkpoint gave."""
    start_deepspeed(rank, world)
    out = {"ddp": train(Path(folder, "ddp"), None, **case)}
    for stage in stages:
        path = Path(folder, str(stage))
        out[f"{stage}"] = train(path, stage, **case)
        out[f"{stage} resumed"] = train(path, stage, **case, resume=True)
    return out


def same(some: list[Tensor], others: list[Tensor]) -> bool:
    return all(a.equal(b) for a, b in zip(some, others, strict=True))


def check(ranks: list[dict[str, Any]], tolerances: dict[int, float]) -> None:
    """DDP's losses, on ranks that see other rows, and the same bits after a resume."""
    whole = ranks[0]["ddp"]
    assert list(whole["losses"]) == list(range(1, STEPS + 1)) and len(set(whole["losses"].values())) == STEPS
    for run in ["ddp", *map(str, tolerances)]:
        seen = [rank[run]["seen"] for rank in ranks]
        assert not set(seen[0]) & set(seen[1]) and seen[0] == ranks[0]["ddp"]["seen"]
    for stage, tolerance in tolerances.items():
        for rank in ranks:
            run, resumed = rank[f"{stage}"], rank[f"{stage} resumed"]
            assert run["losses"] == pytest.approx(whole["losses"], rel=0, abs=tolerance)
            assert resumed["losses"] == run["losses"] and same(resumed["weights"], run["weights"])


def beside_one_process(rank: int, world: int, folder: str, cases: Sequence[dict[str, Any]]) -> Any:
    """Rules beside one process, and in the same processes a Trainer."""
    return zero_jobs.compare(rank, world, cases, folder), compare(rank, world, f"{folder}/trainer", MUON, stages=(3,))


def main() -> None:
    """Run by torchrun; after a kill a second time."""
    torch.set_num_threads(1)
    folder, case = sys.argv[1], json.loads(sys.argv[2])
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    stage = int(case.pop("killed", 0))
    if stage:
        start_deepspeed(rank, world)
        out = {"killed": train(Path(folder, f"killed-{stage}"), stage, **case, killed=True, resume=True)}
    else:
        out = compare(rank, world, folder, case)
    torch.save(out, Path(folder, f"killed-{stage}-{rank}.pt" if stage else f"whole-{rank}.pt"))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
