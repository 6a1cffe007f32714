"""The record of a benchmark: a file of JSON lines, one per trial, that several processes may append to."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_optim.bench.space import Trial

Line = dict[str, Any]


class Ledger:
    """Trials that are done, by key.

    A line is a finished trial, or `{"key", "why"}` for one that was done before for another reason. What a killed
    process left half written at the end of the file is passed over.
    """

    def __init__(self, path: Path) -> None:
        """Read what is there.

        Args:
            path: of the file.
        """
        self.path = path
        self.lines: dict[str, Line] = {}
        self._read = 0
        self.reload()

    def __iter__(self) -> Iterator[Line]:
        return iter(self.lines.values())

    def __contains__(self, trial: Trial) -> bool:
        return trial.key in self.lines

    def reload(self) -> None:
        """Read what other processes have appended since."""
        if not self.path.exists():
            return
        with self.path.open("rb") as file:
            file.seek(self._read)
            for raw in file:
                if not raw.endswith(b"\n"):
                    break  # still being written, or cut off
                self._read += len(raw)
                try:
                    line = json.loads(raw)
                except ValueError:
                    continue  # cut off, and later completed by the newline that the next line begins with
                earlier = self.lines.get(line["key"])
                if earlier is not None:
                    line["why"] = sorted({*earlier["why"], *line["why"]})
                self.lines[line["key"]] = (earlier or {}) | line

    def append(self, line: Line) -> None:
        """Write one line, and see to it that it is on disk.

        Args:
            line: with its `key` and `why`.
        """
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(line, separators=(",", ":"), allow_nan=False) + "\n"
        with self.path.open("ab+") as file:
            if file.tell() and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n":
                text = "\n" + text
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        self.reload()

    def done(self, trial: Trial, why: str) -> bool:
        """Whether a trial is done; if for another reason, this one is noted.

        Args:
            trial: to look for.
            why: `search`, `seeds` or the name of an ablation.

        Returns:
            True if it is in the file.
        """
        line = self.lines.get(trial.key)
        if line is None:
            return False
        if why not in line["why"]:
            self.append({"key": trial.key, "why": [why]})
        return True
