"""Run by torchrun: training that is killed in mid-step, then while it saves, and that continues from what is complete.

python -m torch.distributed.run --standalone --nproc_per_node 2 --max_restarts 4 -m tests.helpers.elastic FOLDER

Each death comes once, as a file says; an attempt that does not come to train (another process has taken the port that
torchrun chose) leaves no file behind, and costs one of the restarts that are left over.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

from tests.helpers import jobs
from tests.helpers.rules import make

STEPS, SAVE_EVERY = 8, 2


def newest(folder: Path) -> tuple[int, Path | None]:
    """The last checkpoint that is complete: torch writes `.metadata` last."""
    found = [(int(path.parent.name), path.parent) for path in folder.glob("*/.metadata")]
    return max(found, default=(0, None))


class Killed:
    """A function that is the last one called at its call with this number."""

    def __init__(self, function: Callable[..., Any], last: int, note: Path) -> None:
        self.function, self.left, self.note = function, last, note

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.left -= 1
        if self.left == 0 and not self.note.exists():
            self.note.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.function(*args, **kwargs)


def main() -> None:
    """Train from the last complete checkpoint to the end."""
    torch.set_num_threads(1)
    folder, attempt = Path(sys.argv[1]), int(os.environ["TORCHELASTIC_RESTART_COUNT"])
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    model = jobs.lay_out(jobs.Model("muon"), "fsdp2", world)
    optimizer = make("muon", model.parameters())
    done, path = newest(folder)
    cut_off = sorted(int(x.name) for x in folder.glob("[0-9]*") if x.is_dir() and not (x / ".metadata").exists())
    if path is not None:
        jobs.load_into(model, optimizer, str(path))
    (folder / f"attempt-{attempt}-{rank}.json").write_text(json.dumps({"from": done, "cut_off": cut_off}))
    dist.barrier()
    for t in range(done + 1, STEPS + 1):
        if (rank, t) == (1, 4):  # gradients go to their owners, directions do not come back
            dist.all_to_all_single = Killed(dist.all_to_all_single, 2, folder / "killed-in-step")
        jobs.take_steps(model, optimizer, range(t, t + 1))
        if t % SAVE_EVERY == 0:
            if (rank, t) == (0, 6):  # within the writing of the first file
                os.fsync = Killed(os.fsync, 1, folder / "killed-while-saving")
            state = {"model": model.state_dict(), "optim": get_optimizer_state_dict(model, optimizer)}
            state_dict_saver.save(state, checkpoint_id=str(folder / str(t)))
    whole = jobs.weights(model)
    if rank == 0:
        torch.save(whole, folder / "final.pt")


if __name__ == "__main__":
    main()
