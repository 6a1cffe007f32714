"""Preference tuning of a trial, by TRL's `DPOTrainer` with our optimizer and schedule."""

from __future__ import annotations

import copy
import math
import tempfile
from typing import Any

from torch import nn
from transformers import PrinterCallback

from lightning_optim.bench.models import size_of
from lightning_optim.bench.result import TrialResult
from lightning_optim.bench.space import Trial
from lightning_optim.bench.tasks import Task
from lightning_optim.bench.training import scheduler_of
from lightning_optim.core.optimizer import RuleOptimizer


def train_dpo(
    trial: Trial,
    model: nn.Module,
    optimizer: RuleOptimizer,
    task: Task,
    result: TrialResult,
) -> None:
    """Train on preferences; the score is the share of held-out pairs in which the chosen one is preferred.

    Args:
        trial: what to result.
        model: trained; the reference is a copy of it.
        optimizer: of the model.
        task: with preferences.
        result: filled with losses and times.

    Raises:
        ValueError: TRL is not installed.
    """
    try:
        from datasets import Dataset
        from trl.trainer.dpo_config import DPOConfig
        from trl.trainer.dpo_trainer import DPOTrainer
    except ImportError as e:
        raise ValueError(f"--regime dpo needs TRL (pip install trl): {e}") from e

    setup, steps = trial.setup, size_of(trial.setup)[1]
    optimizer.register_step_pre_hook(result.stepping.start)
    optimizer.register_step_post_hook(result.stepping.stop)
    scheduler = scheduler_of(optimizer, setup, lambda step: (step + 1) / steps)
    train, held_out = (Dataset.from_list(part) for part in task.preferences)
    with tempfile.TemporaryDirectory() as folder:
        arguments = DPOConfig(
            folder,
            max_steps=steps,
            per_device_train_batch_size=setup.microbatch or setup.batch,
            gradient_accumulation_steps=max(1, setup.batch // (setup.microbatch or setup.batch)),
            per_device_eval_batch_size=32,
            max_length=task.facts["context"],
            max_grad_norm=setup.clip,
            bf16=setup.precision == "autocast",
            gradient_checkpointing=False,
            seed=trial.seed,
            data_seed=trial.seed,
            use_cpu=setup.device == "cpu",
            dataloader_pin_memory=setup.device != "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = DPOTrainer(
            model,  # pyright: ignore[reportArgumentType]
            ref_model=copy.deepcopy(model),  # pyright: ignore[reportArgumentType]
            args=arguments,
            train_dataset=train,
            eval_dataset=held_out.select(range(min(len(held_out), 128))),
            processing_class=task.tokenizer,
            optimizers=(optimizer, scheduler),
        )
        trainer.remove_callback(PrinterCallback)

        def evaluate() -> None:
            optimizer.eval()
            metrics: dict[str, Any] = trainer.evaluate()
            optimizer.train()
            if not math.isfinite(metrics["eval_loss"]):
                return result.diverged(f"evaluation loss not finite after {result.steps} steps")
            result.add_point(loss=metrics["eval_loss"], score=metrics["eval_rewards/accuracies"])
            return None

        evaluate()
        try:
            with result.training.running():
                trainer.train()
        except FloatingPointError as e:
            return result.diverged(str(e).split(";")[0])
        result.steps = trainer.state.global_step
        result.tokens = result.steps * setup.batch * task.facts["context"]
        evaluate()
    return None
