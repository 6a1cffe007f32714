"""Lists of diagnostic callbacks by how much of training time they may take."""

from __future__ import annotations

from lightning_optim.callbacks.diagnostic import Diagnostic
from lightning_optim.callbacks.probes import CALLBACKS
from lightning_optim.diagnostics.probes.registry import callbacks_of


def diagnostics(preset: str, steps: int | None = None, *, optimizer: int = 0) -> list[Diagnostic]:
    """The callbacks of a preset.

    `Trainer(callbacks=diagnostics("cheap"))` measures the sizes of gradients and updates, and memory (at most 1 % of
    training time). `"matrix"` adds ranks, subspaces and refreshes (3 %), `"curvature"` the Hessian and the noise scale
    (5 %). A callback that takes longer doubles its interval.

    Args:
        preset: `"cheap"`, `"matrix"` or `"curvature"`.
        steps: optimizer steps of the run; in a short one the rare measurements come more often.
        optimizer: index of the optimizer that is watched, where a module has several.

    Returns:
        New callbacks.

    Raises:
        ValueError: an unknown preset.
    """
    return callbacks_of(preset, CALLBACKS, steps, optimizer=optimizer)
