"""Checks that the engine a trainer is configured for (DeepSpeed, FSDP1) can run the rules of an optimizer.

The configuration is read before the engine acts: DeepSpeed flattens the parameters of a finished optimizer, and with
offload accelerate builds another optimizer out of its groups. accelerate, Transformers and DeepSpeed are never imported
here: where they are not in use, there is nothing to refuse.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from typing import Any

from lightning_optim.core.parallel.flat_parameters import HIDDEN, REMEDY
from lightning_optim.core.rule import Rule


def validate_engine(rules: Iterable[type[Rule]]) -> None:
    """Check that the engine for which accelerate or Transformers is configured in this process can run rules.

    Args:
        rules: the rules of an optimizer, the main one first.

    Raises:
        ValueError: the engine would flatten matrices that a rule needs, or replace the optimizer.
    """
    rules = list(rules)
    config = _deepspeed_config()
    if config is not None:
        check_deepspeed(config, rules)
    matrix_rule = _matrix_rule(rules)
    if matrix_rule and _is_fsdp1():
        raise ValueError(f"{matrix_rule} needs whole matrices, {HIDDEN}: accelerate's fsdp_version is 1; {REMEDY}")


def check_deepspeed(config: Mapping[str, Any], rules: Iterable[type[Rule]]) -> None:
    """Check that DeepSpeed can run rules.

    Args:
        config: DeepSpeed's configuration as a dictionary.
        rules: the rules of an optimizer, the main one first.

    Raises:
        ValueError: DeepSpeed would replace the optimizer by another one, or flatten matrices that a rule needs.
    """
    rules = list(rules)
    name, matrix_rule = rules[0].name, _matrix_rule(rules)
    if "optimizer" in config:
        raise ValueError(
            f"DeepSpeed's configuration has an 'optimizer' of its own, which would replace {name!r} silently; "
            "remove that entry"
        )
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    device = (zero.get("offload_optimizer") or {}).get("device", "none")
    zero_error = (
        f"ZeRO-{stage} refuses {matrix_rule}, which needs whole matrices; {REMEDY}" if matrix_rule and stage else ""
    )
    if device not in ("none", "auto", None) and config.get("zero_force_ds_cpu_optimizer", True):
        consequence = f". Even so, {zero_error}" if zero_error else f"; {name} then steps on the host"
        raise ValueError(
            f"offload_optimizer.device={device!r} in DeepSpeed's configuration puts DeepSpeedCPUAdam in the place of "
            f'{name!r}; add "zero_force_ds_cpu_optimizer": false, which keeps it{consequence}'
        )
    if zero_error:
        raise ValueError(f"{matrix_rule} needs whole matrices, {HIDDEN}: DeepSpeed's ZeRO stage is {stage}; {REMEDY}")


def _matrix_rule(rules: Iterable[type[Rule]]) -> str:
    """The name of the first rule that cannot step a flat tensor; "" if there is none."""
    return next((rule.name for rule in rules if not rule.elementwise or rule.curvature_input), "")


def _deepspeed_config() -> Mapping[str, Any] | None:
    """DeepSpeed's configuration, if the last `Accelerator` or `TrainingArguments` that was created has one."""
    state = _state()
    if state.get("distributed_type") != "DEEPSPEED":
        return None
    plugins = state.get("deepspeed_plugins")
    if isinstance(plugins, Mapping):
        plugins = next((plugin for plugin in plugins.values() if plugin.selected), None)
    if plugins is not None:
        return plugins.deepspeed_config
    module = sys.modules.get("transformers.integrations.deepspeed")
    return None if module is None else module.deepspeed_config()


def _is_fsdp1() -> bool:
    state = _state()
    return state.get("distributed_type") == "FSDP" and getattr(state.get("fsdp_plugin"), "fsdp_version", 1) == 1


def _state() -> Mapping[str, Any]:
    """The state of accelerate in this process; calling `AcceleratorState()` would reset its `distributed_type`."""
    module = sys.modules.get("accelerate.state")
    return {} if module is None else module.AcceleratorState._shared_state or module.PartialState._shared_state
