"""The numbers of parameters in the optimizer states of a checkpoint."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer


class ModuleOrder(Callback):
    """Numbers parameters in the optimizers' state as the module does; `configure_optimizers` gives it to the trainer.

    Lightning's `ModelParallelStrategy` takes these numbers, in a checkpoint of one process or of DDP, for places in
    `module.parameters()`, while torch counts through the groups, of which a hybrid has several. Whoever else reads a
    checkpoint goes by the order of the groups, which stays.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Put the places in the module for the numbers.

        Args:
            trainer: the trainer.
            pl_module: its module.
            checkpoint: with the state of the optimizers.
        """
        places = {id(p): i for i, p in enumerate(pl_module.parameters())}
        for k, optimizer in enumerate(trainer.optimizers):
            saved = checkpoint["optimizer_states"][k]
            own = [places.get(id(p)) for group in optimizer.param_groups for p in group["params"]]
            numbers = [i for group in saved.get("param_groups", ()) for i in group["params"]]
            if None in own or len(own) != len(numbers) or any(isinstance(i, str) for i in numbers):
                continue  # not the module's own, or on a rank that does not save, where FSDP2 has names
            place = dict(zip(numbers, own, strict=True))
            checkpoint["optimizer_states"][k] = saved | {
                "state": {place.get(i, i): slots for i, slots in saved["state"].items()},
                "param_groups": [g | {"params": [place[i] for i in g["params"]]} for g in saved["param_groups"]],
            }
