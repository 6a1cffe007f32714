"""Python imports this at its start in every process of `python -m hf_integration COMMAND`.

Our names are added as soon as the process has imported Transformers' arguments, of which parsers are made, and
`register()` is called as soon as it has imported the Trainer. Processes that never do pay nothing.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


def _add_names(arguments: ModuleType) -> None:
    from optimizer_names import add_names  # beside this file; hf_integration imports the Trainer

    add_names(arguments.OptimizerNames)


def _register(trainer: ModuleType) -> None:
    from hf_integration import register

    register()


AFTER: dict[str, Callable[[ModuleType], None]] = {
    "transformers.training_args": _add_names,
    "transformers.trainer": _register,
}


class _Finder(MetaPathFinder):
    """Finds these modules as ever, and calls a function when one has been executed."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The spec of one of these modules, None for every other.

        Returns:
            A spec whose loader calls the function, too.
        """
        call = AFTER.pop(fullname, None)
        if call is None:
            return None
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                execute(module)
                call(module)

            spec.loader.exec_module = exec_module
        return spec


def _import_next() -> None:
    """Import the `sitecustomize` that this one hides, if there is one."""
    here = Path(__file__).resolve().parent
    others = [entry for entry in sys.path if Path(entry).resolve() != here]
    spec = PathFinder.find_spec("sitecustomize", others)
    if spec is not None and spec.loader is not None:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


sys.meta_path.insert(0, _Finder())
_import_next()
