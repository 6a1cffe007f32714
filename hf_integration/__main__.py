"""`python -m hf_integration SCRIPT ...`: run a script that knows nothing of lightning_optim after `register()`."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

from hf_integration import register


def main() -> None:
    """Run the script under its own name and arguments."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit("usage: python -m hf_integration SCRIPT --optim NAME [--optim_args NAME=VALUE,...] ...")
    register()
    del sys.argv[0]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as `python SCRIPT` would
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
