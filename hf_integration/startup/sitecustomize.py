"""Python imports this at its start in every process of `python -m hf_integration COMMAND`.

`register()` is called as soon as the process has imported the Trainer, so processes that never do pay nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType

TRAINER = "transformers.trainer"


class _RegisterAfterTrainer(MetaPathFinder):
    """Finds the Trainer's module as ever, and calls `register()` when it has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of the Trainer's module, None for every other.

        Returns:
            A spec whose loader registers, too.
        """
        if fullname != TRAINER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                from hf_integration import register

                register()

            spec.loader.exec_module = exec_module
        return spec


def _import_next() -> None:
    """Import the `sitecustomize` that this one hides, if there is one."""
    here = Path(__file__).resolve().parent
    others = [entry for entry in sys.path if Path(entry).resolve() != here]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _RegisterAfterTrainer())
_import_next()
