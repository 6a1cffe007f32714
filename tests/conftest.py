"""Fixtures of the whole session."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from tests.helpers.pool import Pool, opened

torch.set_num_threads(1)  # pytest-xdist runs one process per core


def pytest_addoption(parser: pytest.Parser) -> None:
    """Where tensors are made: golden, contract and diagnostics tests run on `cuda`, the golden ones on `card`, too."""
    parser.addoption("--device", default="cpu")


def pytest_configure(config: pytest.Config) -> None:
    """Make tensors there."""
    if config.getoption("--device") == "card":
        from tests.helpers.card import Card

        Card().__enter__()
    if config.getoption("--device") != "cpu":
        torch.set_default_device(config.getoption("--device"))


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """One pool of gloo processes."""
    with opened() as made:
        yield made
