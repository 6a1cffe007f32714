"""Fixtures of the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.pool import Pool, opened

torch.set_num_threads(1)  # pytest-xdist runs one process per core


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """One pool of gloo processes."""
    with opened() as made:
        yield made
