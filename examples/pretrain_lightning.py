"""Pretrain a small LLaMA with Lightning, on real text, with any optimizer of this package.

    python examples/pretrain_lightning.py --optim muon
    python examples/pretrain_lightning.py --optim muon --devices 2 --strategy fsdp2
    tensorboard --logdir runs/pretrain

The text is the standard library's sources, or `--data FILE ...`, with a byte-level BPE tokenizer trained on it. The
k-th batch depends on the seed and k alone and a checkpoint holds the position, so that a killed run that is started
again with `--resume` and its other flags repeats the uninterrupted run bit for bit. With `--devices N` each takes its
share of the same batches; such a run may be resumed on another number of devices and with the other strategy. Model and
tokenizer are exported to `OUTPUT_DIR/model` for Transformers' `AutoModelForCausalLM` and `AutoTokenizer`.
"""

from __future__ import annotations

import argparse
import logging
import time
import warnings
import zipfile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import LearningRateMonitor, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from tokens import Batches
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from lightning_optim import configure_optimizers
from lightning_optim.callbacks import RoleTable, diagnostics
from lightning_optim.data.presets import PRESETS, build_model
from lightning_optim.data.text import texts, unigram_entropy
from lightning_optim.data.tokenizer import encode, shuffled, train_tokenizer
from lightning_optim.lightning import SCHEDULES
from lightning_optim.optimizers import CLASSES
from lightning_optim.settings import parse_settings

VALIDATION_TOKENS = 2**15


class Pretraining(L.LightningModule):
    """Next-token prediction. What concerns the optimizer is one call."""

    def __init__(self, model: LlamaForCausalLM, settings: argparse.Namespace):
        super().__init__()
        self.model, self.settings, self.sharded = model, settings, False
        self.save_hyperparameters(vars(settings))

    def configure_model(self) -> None:
        """Shard the model, if the strategy is FSDP2: the layers one by one, then what is left."""
        if self.device_mesh is not None and not self.sharded:
            for part in (*self.model.model.layers, self.model):
                fully_shard(part, mesh=self.device_mesh["data_parallel"])
            self.sharded = True

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:  # noqa: D102
        return self.model(input_ids=batch, labels=batch).loss

    def validation_step(self, batch: Tensor, batch_idx: int) -> None:  # noqa: D102
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("val_loss", loss, prog_bar=True, batch_size=len(batch), sync_dist=True)

    def configure_optimizers(self) -> Any:  # noqa: D102
        s = self.settings
        return configure_optimizers(
            self,
            s.optim,
            lr=s.learning_rate,
            weight_decay=s.weight_decay,
            schedule={
                "schedule": s.schedule,
                "warmup_steps": s.warmup_steps,
                "momentum_warmup_steps": s.momentum_warmup_steps,
                "total_steps": s.max_steps,
            },
            shard_work=s.shard_work,
            **parse_settings(s.optim_args),
        )


class Progress(L.Callback):
    """Training loss and tokens per second. Logged here, not by `self.log`, to be on disk before the checkpoint is."""

    def __init__(self, log_every: int):
        self.log_every = log_every
        self.tokens, self.seconds, self.loss = 0, 0.0, 0.0

    def on_train_batch_start(  # noqa: D102
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Tensor, batch_idx: int
    ) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(  # noqa: D102
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Tensor, batch_idx: int
    ) -> None:
        loss = trainer.strategy.reduce(outputs["loss"].detach(), reduce_op="mean")
        self.loss += float(loss)  # Lightning has divided it by the number of accumulated batches
        self.tokens += batch.numel() * trainer.world_size
        self.seconds += time.perf_counter() - self.started
        if (batch_idx + 1) % trainer.accumulate_grad_batches == 0:
            values = {"train_loss": self.loss, "tokens_per_second": self.tokens / self.seconds}
            pl_module.log_dict(values, prog_bar=True, logger=False)
            if trainer.logger and trainer.global_step % self.log_every == 0:
                trainer.logger.log_metrics(values, step=trainer.global_step - 1)
            self.loss = 0.0

    def on_save_checkpoint(  # noqa: D102
        self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if isinstance(trainer.logger, TensorBoardLogger):
            trainer.logger.experiment.flush()


class StepCheckpoint(ModelCheckpoint):
    """A checkpoint every few optimizer steps: between steps only, and after a step's validation.

    Lightning's own saves before the validation, which a resumed run then leaves out, and once after a resume between
    accumulated batches, whose gradients are lost. The newest two are kept, in case the last is cut off by a crash.
    """

    def __init__(self, directory: Path, every: int, val_every: int):
        super().__init__(
            directory,
            "{step}",
            monitor="step",
            mode="max",
            save_top_k=2,
            every_n_train_steps=every,
            save_on_train_epoch_end=True,  # otherwise the last step's waits for a validation that may not come
            enable_version_counter=False,
        )
        self.val_every = val_every

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: D102
        super().on_train_start(trainer, pl_module)
        self._remove_older(trainer)

    def on_train_batch_end(  # noqa: D102
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        stepped = (batch_idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % self.val_every:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._remove_older(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:  # noqa: D102
        super().on_train_batch_end(trainer, pl_module, None, None, 0)
        self._remove_older(trainer)

    def _remove_older(self, trainer: L.Trainer) -> None:
        """Remove what a killed run left, cut off or about to be replaced, and what it was resumed from.

        Lightning keeps the checkpoint that a run was resumed from for ever.
        """
        directory = Path(str(self.dirpath))
        known = {*map(Path, self.best_k_models), newest(directory)}
        for path in directory.glob("step=*.ckpt") if trainer.is_global_zero else ():
            if path not in known:
                path.unlink()


def newest(directory: Path) -> Path | None:
    """The last checkpoint that was written to its end, where a zip file has its table of contents."""
    actual = sorted(directory.glob("step=*.ckpt"), key=lambda path: int(path.stem.split("=")[1]))
    return next((path for path in reversed(actual) if zipfile.is_zipfile(path)), None)


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny", help="size of the model, the tokenizer included")
    add("--data", nargs="+", default=[], metavar="FILE", help="text files; default: the standard library's sources")
    add("--optim", choices=CLASSES, default="adamw", metavar="NAME", help="python -m lightning_optim list")
    add("--optim_args", default="", help='its settings: "rank=32, refresh=fixed:10"')
    add("--learning_rate", type=float, default=3e-3, help="AdamW's, whatever the optimizer (default %(default)s)")
    add("--weight_decay", type=float, default=0.1, help="default %(default)s")
    add("--schedule", choices=SCHEDULES, default="cosine", help="after the warm-up")
    add("--warmup_steps", type=int, default=60, help="default %(default)s")
    add("--momentum_warmup_steps", type=int, default=0, help="from 0.85 to the optimizer's own (default %(default)s)")
    add("--max_steps", type=int, default=600, help="optimizer steps (default %(default)s)")
    add("--batch_size", type=int, default=16, help="rows per batch (default %(default)s)")
    add("--accumulate", type=int, default=1, help="batches per optimizer step")
    add("--precision", default="32-true", help="Lightning's: 32-true, bf16-mixed, 16-mixed, bf16-true")
    add("--devices", type=int, default=1, help="over which every batch is spread (default %(default)s)")
    add("--strategy", choices=("ddp", "fsdp2"), default="ddp", help="of several devices (default %(default)s)")
    add("--nodes", type=int, default=1, help="machines with so many devices each (default %(default)s)")
    add("--shard_work", action="store_true", help="with ddp, every matrix is worked on by one device")
    add("--threads", type=int, default=1, help="of the CPU; another number may change the last bits")
    add("--seed", type=int, default=0)
    add("--output_dir", default="runs/pretrain", help="default %(default)s")
    add("--val_every", type=int, default=200, help="steps between validations (default %(default)s)")
    add("--checkpoint_every", type=int, default=100, help="steps between checkpoints (default %(default)s)")
    add("--log_every", type=int, default=10, help="steps between logged losses (default %(default)s)")
    add(
        "--diagnostics", choices=("off", "cheap", "matrix", "curvature"), default="cheap", help="what TensorBoard shows"
    )
    add("--resume", action="store_true", help="go on from the last run's last checkpoint, if there is one")
    args = parser.parse_args()
    if args.batch_size % (args.devices * args.nodes):
        parser.error(f"--batch_size {args.batch_size} is not a multiple of {args.devices * args.nodes} devices")
    return args


def strategy(args: argparse.Namespace) -> Any:
    """Lightning's strategy; checkpoints are one file, which any strategy loads."""
    ranks = args.devices * args.nodes
    if args.strategy == "fsdp2" and ranks > 1:
        return ModelParallelStrategy(ranks, 1, save_distributed_checkpoint=False)
    return "ddp" if ranks > 1 else "auto"


def export(module: Pretraining, folder: Path) -> None:
    """Save the whole model for Transformers."""
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = get_model_state_dict(module.model, options=options)
    if module.trainer.is_global_zero:
        module.model.save_pretrained(folder, state_dict=whole)


def main() -> None:
    """Train, export and say how it went."""
    args = arguments()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)  # devices and advertisements
    warnings.filterwarnings("ignore", ".*LeafSpec.* is deprecated")  # Lightning's use of torch
    disable_progress_bar()  # of saving; training keeps its own
    torch.set_num_threads(args.threads)
    output, preset = Path(args.output_dir), PRESETS[args.preset]
    runs = sorted(int(path.name.removeprefix("version_")) for path in output.glob("version_*"))
    version = runs[-1] if args.resume and runs else None
    logger = TensorBoardLogger(output, name="", version=version, default_hp_metric=False)
    checkpoints = Path(logger.log_dir, "checkpoints")
    last = newest(checkpoints)

    corpus, held_out = texts(args.data)
    if last:
        rank_zero_only(print)(f"resumes from {last}")
        tokenizer = PreTrainedTokenizerFast.from_pretrained(output / "model")
    else:
        tokenizer = train_tokenizer(corpus, preset.vocabulary)
        rank_zero_only(tokenizer.save_pretrained)(output / "model")
    rows, val_rows = (encode(tokenizer, part, preset.context) for part in (corpus, held_out))
    val_rows = val_rows[:: max(1, val_rows.numel() // VALIDATION_TOKENS)]
    val_rows = val_rows[len(val_rows) % (args.devices * args.nodes) :]  # equal shares of every batch
    order = shuffled(len(rows), args.max_steps * args.accumulate * args.batch_size, args.seed)
    train = Batches(rows, order, args.batch_size)
    validation = Batches(val_rows, torch.arange(len(val_rows)), args.batch_size)

    L.seed_everything(args.seed, verbose=False)
    module = Pretraining(build_model(len(tokenizer), preset), args)
    progress = Progress(args.log_every)
    trainer = L.Trainer(
        devices=args.devices,
        num_nodes=args.nodes,
        strategy=strategy(args),
        max_steps=args.max_steps,
        accumulate_grad_batches=args.accumulate,
        gradient_clip_val=1.0,
        precision=args.precision,
        val_check_interval=args.val_every * args.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=args.log_every,
        logger=logger,
        enable_model_summary=False,
        callbacks=[
            progress,
            LearningRateMonitor(),
            *([*diagnostics(args.diagnostics, args.max_steps), RoleTable()] if args.diagnostics != "off" else ()),
            StepCheckpoint(checkpoints, args.checkpoint_every, args.val_every),
            TQDMProgressBar(refresh_rate=args.log_every),
        ],
    )
    trainer.fit(module, train, validation, ckpt_path=last)
    loss = trainer.validate(module, validation, verbose=False)[0]["val_loss"]
    export(module, output / "model")
    if not trainer.is_global_zero:
        return

    size = sum(p.numel() for p in module.parameters())
    entropy = unigram_entropy(val_rows, len(tokenizer))
    print(f"unigram entropy of the validation text: {entropy:.4f} nat")
    print(f"validation loss: {loss:.4f} nat, {entropy - loss:.4f} below")
    if progress.seconds:
        print(f"tokens per second: {progress.tokens / progress.seconds:.0f}")
    print(f"processor time: {time.process_time():.1f} s")
    print(f"TensorBoard: tensorboard --logdir {output}")
    print(f"model and tokenizer, {size:,} weights: {output / 'model'}")
    print(f"next: python examples/finetune_hf.py --model {output / 'model'} --optim muon --learning_rate 1.28e-2")


if __name__ == "__main__":
    main()
