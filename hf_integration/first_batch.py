"""Inputs for a model that describes none: what the trainer's collator makes of the first record of the training set."""

from __future__ import annotations

import inspect
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import Trainer

from lightning_optim.build.example_inputs import inputs_of
from lightning_optim.build.module_twin import unwrapped


def describes_inputs(model: nn.Module) -> bool:
    """Whether roles can be measured without a batch.

    Args:
        model: any module.

    Returns:
        True if a module within it says what its inputs are.
    """
    return any(inputs_of(module) for module in unwrapped(model).modules())


def first_batch(trainer: Trainer) -> dict[str, Any] | None:
    """The batch of the first record of the training set, as far as the model takes it.

    No random number of the run is drawn, and nothing of the data set is consumed.

    Args:
        trainer: any.

    Returns:
        Keyword arguments of the model; None for a data set without indices, or where the record or the collator fails.
    """
    records: Any = trainer.train_dataset
    if not hasattr(type(records), "__getitem__") or trainer.model is None:
        return None
    states = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            batch: Any = trainer.data_collator([records[0]])
    except Exception:  # the user's code, which need not take a single record
        return None
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
    if not isinstance(batch, Mapping):
        return None
    parameters = inspect.signature(trainer.model.forward).parameters
    takes_all = any(x.kind is inspect.Parameter.VAR_KEYWORD for x in parameters.values())
    return {k: v for k, v in batch.items() if takes_all or k in parameters}
