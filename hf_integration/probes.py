"""One Transformers callback class per probe, made from `lightning_optim.diagnostics.probes.registry`.

`probes.pyi` spells the classes out for editors and type checkers; `python -m lightning_optim.diagnostics.probes.stubs`
writes it.
"""

from __future__ import annotations

from hf_integration.callbacks import Diagnostic
from lightning_optim.diagnostics.probes.registry import callback_classes

CALLBACKS: dict[str, type[Diagnostic]] = callback_classes(Diagnostic, __name__)
"""Callback class of each probe, by its name."""

globals().update(CALLBACKS)
__all__ = sorted(CALLBACKS)  # pyright: ignore[reportUnsupportedDunderAll]
