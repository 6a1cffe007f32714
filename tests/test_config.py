"""A config is checked when it is made, holds plain values, and loads under every name its class has had."""

from __future__ import annotations

import io
import sys
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from lightning_optim.config import EARLIER_NAMES, OptimizerConfig
from lightning_optim.core.step.averaging_methods import EMANesterov, MuLoCo, TailEMA
from lightning_optim.schedule import ScheduleConfig

OBJECTS: dict[type, Any] = {
    OptimizerConfig: OptimizerConfig("muon", lr=0.02, rest="adamw", settings={"momentum": 0.9}),
    ScheduleConfig: ScheduleConfig("power", cooldown=0.5),
    EMANesterov: EMANesterov(step_size=0.6),
    TailEMA: TailEMA(start=2),
    MuLoCo: MuLoCo(),
}
EARLIER: list[tuple[type, str]] = [
    (OptimizerConfig, "lightning.OptimizerConfig"),
    (OptimizerConfig, "factory.OptimizerConfig"),
    (OptimizerConfig, "build.factory.OptimizerConfig"),
    (ScheduleConfig, "schedule.Curve"),
    (EMANesterov, "core.averages.EMANesterov"),
    (TailEMA, "core.averages.TailEMA"),
    (MuLoCo, "core.averages.MuLoCo"),
]
"""Written out: a name that the package forgets is a checkpoint that no longer loads."""


def pickled(value: Any, path: str, monkeypatch: pytest.MonkeyPatch) -> bytes:
    """A checkpoint with the class of the value under another name, as it was written then."""
    module, _, name = f"lightning_optim.{path}".rpartition(".")
    cls = type(value)
    with monkeypatch.context() as patch:
        there = sys.modules.get(module) or ModuleType(module)
        patch.setitem(sys.modules, module, there)
        patch.setattr(there, name, cls, raising=False)
        now, file = (cls.__module__, cls.__qualname__), io.BytesIO()
        try:
            cls.__module__, cls.__qualname__ = module, name
            torch.save({"kept": value}, file)
        finally:
            cls.__module__, cls.__qualname__ = now
    return file.getvalue()


@pytest.mark.parametrize(("cls", "path"), EARLIER, ids=[path for _, path in EARLIER])
def test_checkpoints_load_by_the_name_under_which_they_were_written(
    cls: type, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert {(c, name) for c, names in EARLIER_NAMES.items() for name in names} == {*EARLIER}
    data = pickled(OBJECTS[cls], path, monkeypatch)
    module, name = f"lightning_optim.{path}".rsplit(".", 1)
    assert module.encode() in data and name.encode() in data
    assert cls.__module__ != module or cls.__qualname__ != name
    found = torch.load(io.BytesIO(data), weights_only=True)["kept"]
    assert type(found) is cls and found == OBJECTS[cls]


def test_settings_of_the_schedule_that_were_fields_of_their_own_are_moved() -> None:
    config = object.__new__(OptimizerConfig)
    fields = vars(OptimizerConfig("muon", schedule="power"))
    config.__setstate__(fields | {"cooldown": 0.5, "warmup_steps": None, "horizon": None})
    assert config == OptimizerConfig("muon", schedule={"schedule": "power", "cooldown": 0.5})
    config.__setstate__(fields | {"cooldown": None})
    assert config == OptimizerConfig("muon", schedule="power")


def test_names_are_checked_before_there_is_a_model() -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"name": "muonn"}, "unknown optimizer 'muonn'; did you mean 'muon'"),
        ({"name": "muon", "rest": "adamv"}, "unknown optimizer 'adamv'; did you mean .*'adamw'"),
        ({"name": "muon", "recipe": "no such recipe"}, "no such recipe"),
        ({"name": "muon", "preset": "no such preset"}, "no such preset"),
        ({"name": "muon", "schedule": "cosin"}, "unknown schedule 'cosin'; did you mean 'cosine'"),
        (
            {"name": "muon", "schedule": {"warmup": 3}},
            "a schedule has no setting 'warmup'; did you mean 'warmup_steps'",
        ),
    ]
    for settings, message in cases:
        with pytest.raises(ValueError, match=message):
            OptimizerConfig(**settings)


def test_numbers_of_numpy_become_plain_and_configs_share_no_dictionaries() -> None:
    given = {"betas": (np.float32(0.5), 0.95)}
    lr: Any = np.float64(0.1)
    config = OptimizerConfig("muon", lr=lr, rest_settings=given, overrides=[("head", None, {"lr": lr})])
    assert type(config.lr) is float and type(config.rest_settings["betas"][0]) is float
    override: Any = config.overrides[0]
    assert type(override[2]["lr"]) is float and type(given["betas"][0]) is np.float32
    config.settings["momentum"] = 0.9
    assert OptimizerConfig("muon").settings == {}
    file = io.BytesIO()
    torch.save(config, file)
    file.seek(0)
    assert torch.load(file, weights_only=True) == config
