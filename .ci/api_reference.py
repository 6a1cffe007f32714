"""Build the API reference from the docstrings, without a warning: `python .ci/api_reference.py [FOLDER]`.

Needs `pip install -e '.[docs]'`. It fails on a warning of pdoc's, and on a public name without a place in the pages.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pdoc

import lightning_optim
from lightning_optim.callbacks.configure import configure_optimizers

MODULES = (
    "lightning_optim",
    "lightning_optim.callbacks",
    "lightning_optim.config",
    "lightning_optim.curvature",
    "lightning_optim.core.options",
    "lightning_optim.core.rule",
    "lightning_optim.core.step.weight_averaging",
    "lightning_optim.build.recipes",
    "lightning_optim.lightning",
    "lightning_optim.ops.moments",
    "lightning_optim.ops.orthogonal",
    "lightning_optim.refresh",
    "lightning_optim.schedule",
    "hf_integration",
)
"""What users import; the engine below is in ARCHITECTURE.md."""


def main(folder: Path) -> None:
    """Write the pages.

    Args:
        folder: where they go.

    Raises:
        SystemExit: a public name is not in the pages.
    """
    vars(lightning_optim)["configure_optimizers"] = configure_optimizers  # imported lazily, which pdoc cannot see
    warnings.filterwarnings("error", category=UserWarning)
    pdoc.render.configure(docformat="google", footer_text=f"lightning-optim {lightning_optim.__version__}")
    pdoc.pdoc(*MODULES, output_directory=folder)
    for module in MODULES:
        page = (folder / f"{module.replace('.', '/')}.html").read_text(encoding="utf-8")
        names = getattr(sys.modules[module], "__all__", ())
        if missing := [name for name in names if f'id="{name}"' not in page]:
            raise SystemExit(f"{module}: not in its page: {', '.join(missing)}")
    print(f"{len(MODULES)} modules in {folder}")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "build/api"))
