"""The numbers of parameters in the optimizer states of a checkpoint."""

from __future__ import annotations

from typing import Any

from lightning import Callback, LightningModule, Trainer


class ModuleOrder(Callback):
    """Numbers the parameters in saved optimizer states in the module's order. `configure_optimizers` adds it.

    Lightning's `ModelParallelStrategy` reads the numbers, in a checkpoint of one process or of DDP, as positions in
    `module.parameters()`, while torch counts through the param groups, of which a hybrid optimizer has several. Other
    readers of a checkpoint use the order of the groups, which does not change.
    """

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Replace the numbers by positions in the module.

        Args:
            trainer: the trainer.
            pl_module: its module.
            checkpoint: with the state of the optimizers.
        """
        places = {id(p): i for i, p in enumerate(pl_module.parameters())}
        for k, optimizer in enumerate(trainer.optimizers):
            saved = checkpoint["optimizer_states"][k]
            order = [places.get(id(p)) for group in optimizer.param_groups for p in group["params"]]
            numbers = [i for group in saved.get("param_groups", ()) for i in group["params"]]
            if None in order or len(order) != len(numbers) or any(isinstance(i, str) for i in numbers):
                continue  # parameters of another module, or a rank that does not save, where FSDP2 has names
            place = dict(zip(numbers, order, strict=True))
            checkpoint["optimizer_states"][k] = saved | {
                "state": {place.get(i, i): slots for i, slots in saved["state"].items()},
                "param_groups": [g | {"params": [place[i] for i in g["params"]]} for g in saved["param_groups"]],
            }
