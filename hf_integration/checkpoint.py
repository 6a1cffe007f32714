"""Which of a Trainer's checkpoints a run can continue from."""

from __future__ import annotations

import json
import re
from pathlib import Path


def last_checkpoint(folder: str | Path, *, before: int | None = None) -> str | None:
    """The newest complete checkpoint.

    The Trainer writes `trainer_state.json` last, so a directory where it is missing or cut short was left by a run that
    stopped while it was saving. Transformers' own `get_last_checkpoint` would take it.

    Args:
        folder: the Trainer's `output_dir`; need not exist.
        before: only of steps below this one. Give `max_steps` if there is one: from a checkpoint of the very last step
            the Trainer goes one step too far, unless an epoch ends there.

    Returns:
        Path of the checkpoint with the largest step, None if there is none.
    """
    found = {int(m[1]): path for path in Path(folder).glob("*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    steps = sorted((step for step in found if before is None or step < before), reverse=True)
    return next((str(found[step]) for step in steps if _complete(found[step])), None)


def _complete(checkpoint: Path) -> bool:
    try:
        return bool(json.loads((checkpoint / "trainer_state.json").read_bytes()))
    except (OSError, ValueError):
        return False
