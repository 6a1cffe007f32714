"""One naive float64 implementation per rule, written from the paper: no stacks, no blocks, no in-place tricks.

A module `NAME.py` has `step(p, g, state, t, h)`: one matrix or vector, its gradient, a dictionary that starts empty,
the step from 1 and the settings of the group; it returns the new parameter. `SETTINGS` lists the settings to test
beside the defaults. `STRICT` holds settings under which the rule computes in its parameters' precision,
`WITHOUT_DRAWS` ones under which it draws no random numbers. `FIRST_STEP` bounds the RMS of a first step per unit lr
under the adamw convention, where that is not about 0.2, and `TINY_LR` is a learning rate whose steps bfloat16 cannot
resolve, where 5e-4 is none. `DUE` holds settings under which what is rarely done is done in any run of three steps,
`BLIND` ones under which a direction depends on gradients alone.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_optim.ops.noise import normal
from lightning_optim.ops.rounding import hash_key


def noise(shape: Sequence[int], t: int, stream: int = 0) -> Tensor:
    """What a rule draws in the contract tests, where every matrix of a shape gets the same numbers."""
    return normal(shape, hash_key(t, stream), device=torch.get_default_device()).double()


def due(h: dict, t: int) -> bool:
    """Whether a rule with costly state refreshes it in step t, for `fixed` policies."""
    interval, *offset = map(int, h["refresh"].removeprefix("fixed:").split(":"))
    return t == 1 or (t - (offset[0] if offset else 1)) % interval == 0


def exact_root(x: Tensor, exponent: float) -> Tensor:
    """x^-exponent of a symmetric positive matrix."""
    values, vectors = torch.linalg.eigh(x)
    return vectors @ torch.diag(values**-exponent) @ vectors.T
