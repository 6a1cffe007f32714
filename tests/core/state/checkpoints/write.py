"""Three checkpoints as commit 49df9c2 wrote them, and how: later versions must resume them bitwise.

    python -m tests.core.state.checkpoints.write

Each file holds the weights at the start, weights and `state_dict()` after `SAVED` steps, and the weights after `TAKEN`.
Run it only to add a checkpoint of the present version; the files that are here are not to be written again.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim import build_optimizer

HERE = Path(__file__).parent
SAVED, TAKEN = 5, 9
SETTINGS: dict[str, dict[str, Any]] = {
    "muon": {"optim": "muon", "lr": 0.02, "weight_decay": 0.1},
    "soap": {"optim": "soap", "lr": 0.003, "weight_decay": 0.1},
    "int8": {"optim": "adamw", "lr": 0.001, "weight_decay": 0.1, "state_storage": "int8"},
}
"""Arguments of `build_optimizer`, by the name of the file."""


class Model(nn.Module):
    """An embedding, two hidden layers and an output layer: every role that has a rule of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(160, 32)
        self.up = nn.Linear(32, 144)
        self.down = nn.Linear(144, 32)
        self.norm = nn.LayerNorm(32)
        self.head = nn.Linear(32, 160, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of tokens."""
        x = self.embedding(tokens)
        return self.head(self.norm(x + self.down(torch.relu(self.up(x)))))


def model() -> Model:
    """The model at its start."""
    torch.manual_seed(0)
    return Model()


def gradients(model: nn.Module, steps: range) -> Iterator[None]:
    """Give every parameter the gradient of each step, which depends on nothing but the step."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=generator) * 0.1
        yield


def optimizer(model: nn.Module, name: str) -> Any:
    """The optimizer of a file."""
    settings = dict(SETTINGS[name])
    return build_optimizer(model, settings.pop("optim"), **settings)


def weights(model: nn.Module) -> dict[str, Tensor]:
    """A copy of the weights."""
    return {k: v.clone() for k, v in model.state_dict().items()}


def main() -> None:
    """Write the files that are not there."""
    for name in SETTINGS:
        path = HERE / f"{name}.pt"
        if path.exists():
            continue
        net = model()
        opt = optimizer(net, name)
        out: dict[str, Any] = {"start": weights(net)}
        for step, _ in enumerate(gradients(net, range(TAKEN)), 1):
            opt.step()
            if step == SAVED:
                out |= {"saved": weights(net), "optimizer": copy.deepcopy(opt.state_dict())}
        torch.save(out | {"taken": weights(net)}, path)
        print(path, path.stat().st_size)


if __name__ == "__main__":
    main()
