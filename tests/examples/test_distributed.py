"""The examples on two processes give the losses of one, and a run killed on two continues where there is one."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from hf_integration import last_checkpoint
from tests.hf_integration.test_trainer import ENVIRONMENT, make_model
from tests.test_lightning import ROOT, scalars

pytestmark = pytest.mark.dist
TIMEOUT = 480
"""Seconds for one command, which took 30 where others used the cores: only one that hangs meets it."""
LAST_BITS = 2e-4
"""Two ranks average gradients in another order; over the few steps here losses drift by 2e-5 (measured)."""


def run(command: Sequence[str], until: Callable[[], object] | None = None) -> str:
    """Run a command to its end, or kill all its processes as soon as something is there."""
    process = subprocess.Popen(
        command, env=ENVIRONMENT, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )
    if until is None:
        record, _ = process.communicate(timeout=TIMEOUT)
        assert process.returncode == 0, record[-4000:]
        return record
    deadline = time.monotonic() + TIMEOUT
    while not until():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()[0][-4000:]
        time.sleep(0.002)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL, "it was faster than its killer: give it more steps"
    return ""


def close(actual: Mapping[int, float], expected: Mapping[int, float], steps: Sequence[int]) -> None:
    """The same losses, but for the last bits, at some steps."""
    assert {k: actual[k] for k in steps} == pytest.approx({k: expected[k] for k in steps}, rel=LAST_BITS)


def pretrain(output: Path, *flags: str) -> list[str]:
    """The command of the first example, on a file of the standard library."""
    settings = {"optim": "muon", "max_steps": 24, "warmup_steps": 4, "batch_size": 8, "val_every": 24, "log_every": 1}
    settings |= {"checkpoint_every": 8, "diagnostics": "off", "output_dir": output}
    data = str(Path(sysconfig.get_path("stdlib"), "argparse.py"))
    command = [sys.executable, str(ROOT / "examples" / "pretrain_lightning.py"), "--data", data, *flags]
    return [*command, *(x for key, value in settings.items() for x in (f"--{key}", str(value)))]


def saved(output: Path) -> bool:
    """Whether a checkpoint of the first example is complete: killed earlier, a run has nothing to go on from."""
    import pretrain_lightning as example  # examples/ is on pytest's path

    return example.newest(output / "version_0" / "checkpoints") is not None


def losses_of(output: Path) -> dict[int, float]:
    """By step; a resumed run has some twice, here the later ones count."""
    actual = scalars(output)
    return {step: values[-1] for (tag, step), values in actual.items() if tag == "train_loss"}


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[int, float]:
    """The losses of one process."""
    output = tmp_path_factory.mktemp("alone")
    run(pretrain(output))
    return losses_of(output)


@pytest.mark.slow  # a run of it that is killed and resumed in one process is in tests/test_lightning.py
@pytest.mark.parametrize("flags", [("ddp",), ("ddp", "--shard_work"), ("fsdp2",)], ids=" ".join)
def test_pretraining_killed_on_two_processes_goes_on_in_one(
    tmp_path: Path, alone: dict[int, float], flags: tuple[str, ...]
) -> None:
    two = ("--devices", "2", "--strategy", *flags)
    run(pretrain(tmp_path, *two), until=lambda: saved(tmp_path))
    before = losses_of(tmp_path)
    close(before, alone, range(8))
    checkpoints = tmp_path / "version_0" / "checkpoints"
    shutil.copy(next(checkpoints.glob("step=*.ckpt")), checkpoints / "step=1.ckpt")  # was about to be removed
    (checkpoints / "step=99.ckpt").write_bytes(b"cut off")
    record = run(pretrain(tmp_path, "--resume"))
    assert "step=8.ckpt" in record or "step=16.ckpt" in record  # Lightning says what it restores
    close(losses_of(tmp_path), alone, range(24))
    assert sorted(path.name for path in checkpoints.iterdir()) == ["step=16.ckpt", "step=24.ckpt"]


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_pretraining_killed_in_one_process_goes_on_in_two(
    tmp_path: Path, alone: dict[int, float], strategy: str
) -> None:
    run(pretrain(tmp_path), until=lambda: saved(tmp_path))
    record = run(pretrain(tmp_path, "--resume", "--devices", "2", "--strategy", strategy))
    assert "step=8.ckpt" in record or "step=16.ckpt" in record
    close(losses_of(tmp_path), alone, range(24))


def history(folder: Path) -> dict[int, float]:
    actual = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return {entry["step"]: entry["loss"] for entry in actual if "loss" in entry}


@pytest.mark.slow  # the Trainer on two processes, killed and resumed, is in tests/hf_integration/test_trainer.py
def test_fine_tuning_under_torchrun_and_accelerate(tmp_path: Path) -> None:
    text = Path(dataclasses.__file__)
    make_model(tmp_path / "model", text)
    config = tmp_path / "model" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"attention_dropout": 0.0}))  # drawn on each rank
    script = str(ROOT / "examples" / "finetune_hf.py")
    flags = ["--model", str(tmp_path / "model"), "--data", str(text), "--optim", "muon", "--learning_rate", "1e-3"]
    flags += ["--max_steps", "16", "--logging_steps", "1", "--save_steps", "4", "--use_cpu", "--diagnostics", "off"]
    flags += ["--resume_from_checkpoint", "true", "--logging_first_step", "--seed", "1"]

    def command(output: str, ranks: int, *launcher: str) -> list[str]:
        rows = ["--per_device_train_batch_size", str(8 // ranks), "--output_dir", str(tmp_path / output)]
        return [*(launcher or (sys.executable,)), script, *flags, *rows]

    torchrun = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    accelerate = (sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2")
    run(command("alone", 1))
    run(command("torchrun", 2, *torchrun), until=lambda: last_checkpoint(tmp_path / "torchrun"))
    run(command("torchrun", 1))
    shared = [*command("accelerate", 2, *accelerate, "--main_process_port", "0"), "--optim_args", "shard_work=True"]
    run(shared)
    expected = history(tmp_path / "alone")
    assert list(expected) == list(range(1, 17))
    for actual in ("torchrun", "accelerate"):
        close(history(tmp_path / actual), expected, range(1, 17))
