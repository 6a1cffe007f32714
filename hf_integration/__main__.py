"""`python -m hf_integration SCRIPT_OR_COMMAND ...`: our names under `--optim` in what knows nothing of lightning_optim.

A script runs in this process after `register()`. A command (`accelerate launch`, `trl sft`) is started with an
environment in which every Python process of its registers, too.
"""

from __future__ import annotations

import os
import runpy
import shutil
import sys
from pathlib import Path

from hf_integration import register

USAGE = "usage: python -m hf_integration SCRIPT.py|COMMAND ... --optim NAME [--optim_args 'NAME=VALUE, ...'] ..."
STARTUP = Path(__file__).resolve().parent / "startup"


def main() -> None:
    """Run the script under its own name and arguments, or the command in place of this process."""
    if len(sys.argv) < 2 or sys.argv[1].startswith("-"):
        sys.exit(USAGE)
    del sys.argv[0]
    command = None if sys.argv[0].endswith(".py") else shutil.which(sys.argv[0])
    if command is None and Path(sys.argv[0]).is_file():
        register()
        sys.path[0] = str(Path(sys.argv[0]).resolve().parent)  # as `python SCRIPT` would
        runpy.run_path(sys.argv[0], run_name="__main__")
        return
    if command is None:
        sys.exit(f"{sys.argv[0]} is neither a file nor a command\n{USAGE}")
    paths = [str(STARTUP), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.execve(command, sys.argv, {**os.environ, "PYTHONPATH": os.pathsep.join(paths)})


if __name__ == "__main__":
    main()
