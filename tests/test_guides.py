"""The README and the guides: sizes, links, tables, code blocks and commands.

The blocks for Transformers and for Lightning run in `tests/hf_integration/test_readme.py` and
`tests/callbacks/test_configure.py`, the others here. Commands are parsed in the default run, and run behind `-m slow`.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_optim import RuleOptimizer, catalog
from lightning_optim.__main__ import main as command_line
from lightning_optim.bench.__main__ import main as bench
from lightning_optim.core.rule import lookup
from tests.helpers import guides
from tests.helpers.paths import ROOT
from tests.test_lightning import pytestmark as lightning_warnings

pytestmark = lightning_warnings

PAGES = (*guides.GUIDES, "CONTRIBUTING.md", "examples/benchmark/README.md", "examples/diagnostics/README.md")
ON_CPU = [] if torch.accelerator.is_available() else ["--use_cpu"]
"""Transformers asks for it where `--bf16` is given."""
PLACES = {"DIR_OR_HUB_ID": "model", "SCRIPT.py": "script.py", "runs/pretrain/model": "model"}
"""What commands leave open, or an earlier command makes, and what the tests put there."""


class Net(nn.Module):
    """`model` of the guides: `model(batch)` is the loss."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.mlp = nn.Embedding(64, 16), nn.ModuleDict({"gate": nn.Linear(16, 16)})
        self.head = nn.Linear(16, 64)

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return nn.functional.cross_entropy(self.head(self.mlp["gate"](self.embedding(batch)).tanh()), batch)


def test_the_readme_is_short() -> None:
    text = guides.read("README.md")
    assert len(text.splitlines()) <= 200 and len(text.encode()) <= 12 * 1024


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", path.read_text(encoding="utf-8")):
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), link
        if anchor:
            assert anchor in guides.anchors(file), link


def test_the_twelve_of_the_readme_are_as_the_registry_says() -> None:
    rows = re.findall(r"^\| ([\w-]+) \| `(\w+)` \| ([\d.]+) \|", guides.read("README.md"), flags=re.MULTILINE)
    assert len(rows) == 12 and {family for family, _, _ in rows} == set(catalog.FAMILIES)
    for family, name, size in rows:
        assert (lookup(name).family, f"{catalog.state_bytes(lookup(name)):.2f}") == (family, size), name


def test_the_code_of_the_package_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After Lightning's section, which has a test of its own."""
    monkeypatch.chdir(tmp_path)
    found = [b for b in guides.blocks("lightning_optim/README.md", "python") if b.section != "Lightning"]
    assert {b.section for b in found} == {
        "Plain PyTorch",
        "Curvature-based optimizers",
        "Pretraining: presets, constraints, averages",
    }
    data = [torch.randint(64, (32,)) for _ in range(3)]
    for block in found:
        space: dict[str, Any] = {"model": Net(), "data": data, **imported()}
        exec(block.text, space)
        optimizer = space.get("optimizer")
        if optimizer is not None:
            assert isinstance(optimizer, RuleOptimizer)
            assert all(state["step"] == len(data) for state in optimizer.state.values() if state)


def imported() -> dict[str, Any]:
    """What the first block of a section imports for the next ones."""
    from lightning_optim import build_optimizer

    return {"build_optimizer": build_optimizer}


def test_the_loop_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other two starts in code are those of the guides."""
    monkeypatch.chdir(tmp_path)
    attach, lightning, loop = guides.blocks("README.md", "python")
    space: dict[str, Any] = {}
    exec(loop.text, space)
    assert {float(state["step"]) for state in space["optimizer"].state.values()} == {20.0}
    assert torch.load("optimizer.pt", weights_only=True)["param_groups"]
    assert lightning.text == guides.blocks("lightning_optim/README.md", "python", "Lightning")[0].text
    text = "".join(block.text for block in guides.blocks("hf_integration/README.md", "python", "The Trainer in code"))
    lines = [line for line in attach.text.splitlines() if line and "import" not in line and "attach" not in line]
    assert len(lines) == 5 and all(line in text for line in lines)


def test_the_code_of_the_diagnostics_guide_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import TrainingArguments

    from tests.hf_integration.test_trainer import Tokens, llama

    monkeypatch.chdir(tmp_path)
    for block in guides.blocks("callbacks/README.md", "python"):
        args = TrainingArguments("runs", use_cpu=True, report_to="none")
        space: dict[str, Any] = {"model": llama(), "args": args, "data": Tokens()}
        exec(block.text, space)
        trainer = space["trainer"]
        names = {type(c).__name__ for c in getattr(trainer, "callback_handler", trainer).callbacks}
        assert {"GradientRank", "PreconditionerRefresh", "RoleTable"} <= names


# -- commands ---------------------------------------------------------------------------------------------------------


def words(command: str) -> list[str]:
    """A command's words, with what it leaves open filled in."""
    for place, name in PLACES.items():
        command = command.replace(place, name)
    return shlex.split(command)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with what the commands name: a model, chats, a script."""
    from tests.hf_integration.test_entry_points import STOCK_SCRIPT
    from tests.hf_integration.test_trainer import make_model

    make_model(tmp_path / "model", Path(re.__file__))
    record = '{"prompt": "def add(a, b):", "completion": "\\n    return a + b"}\n'
    (tmp_path / "chats.jsonl").write_text(record * 64)
    script = re.sub(r"^    ", "", STOCK_SCRIPT, flags=re.MULTILINE)
    (tmp_path / "script.py").write_text(
        script + '\n\nif __name__ == "__main__":\n    import sys\n\n    main(*sys.argv[1:])\n'
    )
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_is_known(place: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Our own commands run, or their flags are read, in this process; what else there is has a reason."""
    import finetune_hf
    import pretrain_lightning

    seen: set[str] = set()
    for guide, command in guides.commands():
        argv = words(command)
        while argv[0] in ("accelerate", "torchrun") and not guides.reason_not_to_run(command):
            argv = ["python", *argv[next(i for i, word in enumerate(argv) if word.endswith(".py")) :]]
        what = " ".join(argv[:3])
        monkeypatch.setattr(sys, "argv", argv[1:])
        if what.startswith("python examples/finetune_hf.py"):
            finetune_hf.parse([*argv[2:], *ON_CPU])
        elif what.startswith("python examples/pretrain_lightning.py"):
            pretrain_lightning.arguments()
        elif what == "python -m lightning_optim" and argv[3:4] == ["bench"]:
            with pytest.raises(SystemExit, match="0"):
                bench([argv[4], "--help"])
        elif what == "python -m lightning_optim":
            monkeypatch.setattr(sys, "argv", argv[2:])
            command_line()
        else:
            known = guides.reason_not_to_run(command) or what in ("python -m hf_integration", "python cli.py fit")
            assert known, f"{guide}: no test knows {command}"
        seen.add(what)
    assert {"python -m lightning_optim", "python -m hf_integration", "tensorboard --logdir runs"} <= seen
    assert "muon, orthogonalized" in capsys.readouterr().out


SHORT = {
    "examples/finetune_hf.py": "--max_steps 2 --block_size 16 --per_device_train_batch_size 2 --report_to none",
    "examples/pretrain_lightning.py": "--preset tiny --max_steps 2 --warmup_steps 1 --val_every 2",
    "script.py": "--output_dir out --max_steps 2 --report_to none --use_cpu",
    "bench": "--tokens 4096 --trials 1 --seeds 0 --minutes 1",
}
"""Flags that make the commands short."""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("guide", "command"),
    [c for c in guides.commands() if not guides.reason_not_to_run(c[1]) and not c[1].startswith("python cli.py")],
)
def test_commands_run(place: Path, guide: str, command: str) -> None:
    argv = words(command)
    if "finetune_hf.py" in command and "--model" not in command:
        argv += ["--model", "model"]
    argv += ON_CPU if "finetune_hf.py" in command else []
    for name, flags in SHORT.items():
        if name in argv and "report" not in argv:
            argv += shlex.split(flags)
    programs = {"torchrun": "torch.distributed.run", "accelerate": "accelerate.commands.accelerate_cli"}
    program = ["-m", programs[argv[0]]] if argv[0] in programs else []
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *program, *argv[1:]], cwd=place, env=environment, capture_output=True, text=True, check=False
    )
    if argv[3:5] == ["bench", "report"]:
        assert "has no trials" in done.stderr  # it says which command makes them
    else:
        assert done.returncode == 0, done.stdout + done.stderr
