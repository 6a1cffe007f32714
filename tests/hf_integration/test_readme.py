"""The guide to Transformers: its code runs, and so does every right-hand side of its migration table."""

import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import HfArgumentParser
from transformers.training_args import OptimizerNames

from hf_integration import OptimizerFactory, TrainingArguments
from hf_integration.startup.optimizer_names import MEMBER_PREFIX
from lightning_optim import RuleOptimizer
from tests.helpers import guides
from tests.hf_integration.test_entry_points import STOCK_SCRIPT, others_use_old_names
from tests.hf_integration.test_trainer import ENVIRONMENT, llama, make_model, one_thread, stopped_adamw  # noqa: F401

GUIDE = guides.read("hf_integration/README.md")
CODE = [block.text for block in guides.blocks("hf_integration/README.md", "python")]
TABLE = GUIDE[GUIDE.index("<!-- migration -->") : GUIDE.index("<!-- /migration -->")]
FLAGS = re.findall(r"^\|.*?\| `(--optim [^`]*)` \|", TABLE, flags=re.MULTILINE)


@others_use_old_names
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator:UserWarning")
def test_the_code_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("trl", reason="trl is not installed")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    make_model(Path("runs/pretrain/model"), Path(re.__file__))
    built: list[RuleOptimizer] = []
    build = OptimizerFactory.__call__
    monkeypatch.setattr(OptimizerFactory, "__call__", lambda *a, **k: built.append(build(*a, **k)) or built[-1])
    namespace: dict[str, Any] = {}
    for code in CODE:
        exec(code, namespace)
    assert len(built) == 4  # by argument, attach, SFT, DPO
    assert all(state["step"] == 4 for optimizer in built for state in optimizer.state.values())
    assert all(optimizer.param_groups[0]["rule"] == "muon" for optimizer in built)


@pytest.mark.slow  # processes that a command starts are in test_entry_points.py
def test_a_script_that_knows_nothing_of_us(tmp_path: Path):
    """`python -m hf_integration SCRIPT`, from a checkpoint of AdamW."""
    command = next(line for line in GUIDE.splitlines() if line.startswith("python -m hf_integration"))
    (tmp_path / "SCRIPT.py").write_text(
        re.sub(r"^    ", "", STOCK_SCRIPT, flags=re.MULTILINE) + '\n\nif __name__ == "__main__":\n    import sys\n\n'
        "    main(*sys.argv[1:])\n"
    )
    stopped_adamw(tmp_path / "out", llama())
    more = "--output_dir out --resume_from_checkpoint out/checkpoint-4 --max_steps 8 --warmup_steps 2 --save_steps 4 "
    more += "--per_device_train_batch_size 2 --report_to none --use_cpu --disable_tqdm true"
    argv = [sys.executable, *command.split()[1:], *more.split()]
    done = subprocess.run(argv, cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    saved = torch.load(tmp_path / "out" / "checkpoint-8" / "optimizer.pt", weights_only=True)
    groups = {g["name"]: {float(saved["state"][i]["step"]) for i in g["params"]} for g in saved["param_groups"]}
    assert groups == {"muon/hidden": {4.0}, "adamw/embedding": {8.0}, "adamw/vector": {8.0}}
    assert [g["initial_lr"] for g in saved["param_groups"]] == [5e-5, 1e-4, 1e-4]
    bare = subprocess.run(argv[:3], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=120)
    assert bare.returncode == 1 and bare.stderr.startswith("usage: python -m hf_integration SCRIPT")


@pytest.mark.parametrize("flags", FLAGS)
@others_use_old_names
def test_every_flag_of_the_migration_table_builds(tmp_path: Path, flags: str):
    parser = HfArgumentParser(cast("Any", TrainingArguments))
    argv = [*shlex.split(flags), "--output_dir", str(tmp_path), "--learning_rate", "2e-4", "--use_cpu"]
    actual = parser.parse_args_into_dataclasses(argv, look_for_args_file=False)[0].optimizer_cls_and_kwargs()
    assert actual is not None
    model: Any = llama(tied=False)
    if "lora" in flags:
        model = get_peft_model(model, LoraConfig(target_modules="all-linear"))
    optimizer = actual[0]()(model, **actual[1])
    rates = {lr for lr in map(float, re.findall(r"'lr': ([\d.e-]+)", flags))}
    assert {g["lr"] for g in optimizer.param_groups} == rates | {2e-4}


def test_the_table_has_a_row_for_every_name_of_transformers():
    rows = [line for line in TABLE.splitlines() if line.startswith("| ")][1:]
    kept = [row for row in rows if "| the same flag |" in row]
    assert len(rows) == len(FLAGS) + len(kept)
    left = {name for row in rows for name in re.findall(r"[\w]+", row.split("|")[1])}
    assert {name.value for name in OptimizerNames if not name.name.startswith(MEMBER_PREFIX)} <= left
