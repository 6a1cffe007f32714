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
        ValueError: the engine would do what a rule cannot work with, or replace the optimizer.
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
        ValueError: DeepSpeed would replace the optimizer by another one, or do what a rule cannot work with.
    """
    rules = list(rules)
    name, zero = rules[0].name, config.get("zero_optimization") or {}
    if "optimizer" in config:
        raise ValueError(
            f"DeepSpeed's configuration has an 'optimizer' of its own, which would replace {name!r} silently; "
            "remove that entry"
        )
    stage, offload = zero.get("stage", 0), zero.get("offload_optimizer") or {}
    measured = next((rule.name for rule in rules if rule.curvature_input), "")
    if measured and stage:
        raise ValueError(
            f"{measured} cannot be measured in the flat parameters of ZeRO: DeepSpeed's ZeRO stage is {stage}; {REMEDY}"
        )
    device = offload.get("device", "none")
    if device == "nvme":
        raise ValueError(
            f"offload_optimizer.device='nvme' in DeepSpeed's configuration moves state that {name!r} works on; "
            "give 'cpu' or leave it out"
        )
    if device not in ("none", "auto", None) and config.get("zero_force_ds_cpu_optimizer", True):
        raise ValueError(
            f"offload_optimizer.device={device!r} in DeepSpeed's configuration puts DeepSpeedCPUAdam in the place of "
            f'{name!r}; add "zero_force_ds_cpu_optimizer": false, which keeps it; {name} then steps on the host'
        )
    if device == "cpu" and offload.get("ratio", 1.0) != 1.0:
        raise ValueError(
            f"offload_optimizer.ratio={offload['ratio']!r} in DeepSpeed's configuration lets an AdamW of its own step "
            f"a share of the weights in the place of {name!r}; leave it out"
        )
    matrix_rule = _matrix_rule(rules)
    if matrix_rule and zero.get("round_robin_gradients") and stage in (1, 2):
        raise ValueError(
            "round_robin_gradients in DeepSpeed's configuration, under which DeepSpeed says wrongly where parameters "
            f"are, does not work with {matrix_rule}; leave it out"
        )


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
