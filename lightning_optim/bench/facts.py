"""What the line of a trial says of its model, optimizer, memory, precision and machine.

It is what sections 11.8, 11.9 and 11.12 of the survey "Navigating LLM Valley" (arXiv:2605.09176) ask for.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lightning_optim.bench.models import shape
from lightning_optim.bench.space import Setup
from lightning_optim.core.optimizer import RuleOptimizer
from lightning_optim.core.param_groups import rule_of
from lightning_optim.diagnostics.memory import categories
from lightning_optim.schedule import ScheduleConfig


def heads(setup: Setup) -> int:
    """Attention heads.

    Args:
        setup: whose model is a preset.

    Returns:
        How many.
    """
    return shape(setup).heads


def dtype_name(dtype: torch.dtype) -> str:
    """A dtype's name.

    Args:
        dtype: any.

    Returns:
        Without `torch.`.
    """
    return str(dtype).removeprefix("torch.")


def model(module: nn.Module, config: Setup) -> dict[str, Any]:
    """Architecture and size.

    Args:
        module: that is trained.
        config: its setup.

    Returns:
        JSON.
    """
    params = list(module.parameters())
    inner = getattr(module, "config", None)
    keys = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    sizes = {key: getattr(inner, key) for key in keys if hasattr(inner, key)}
    return {
        "name": config.model,
        "class": type(module).__name__,
        "parameters": sum(p.numel() for p in params),
        "trained": sum(p.numel() for p in params if p.requires_grad),
        **sizes,
    }


def setup(config: Setup, context: int, curve: ScheduleConfig | None = None) -> dict[str, Any]:
    """Batch, schedule and machine.

    Args:
        config: the setup.
        context: tokens per row.
        curve: that the optimizer brings along.

    Returns:
        JSON.
    """
    rows = config.microbatch or config.batch
    return {
        "batch_tokens": config.batch * context,
        "microbatch_tokens": rows * context,
        "accumulation": -(-config.batch // rows),
        "schedule": f"linear over {config.warmup:g} of the run, then a cosine to {config.min_lr:g}"
        if curve is None
        else f"the optimizer's own: {curve}",
        "hardware": hardware(config.device),
        "threads": config.threads,
        "distributed": "one process",
        "activation_checkpointing": "none",
    }


def hardware(device: str) -> str:
    """What it runs on.

    Args:
        device: torch's name.

    Returns:
        The model of processor or accelerator.
    """
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else platform.processor()} ({torch.backends.cpu.get_cpu_capability()})"


def optimizer(optim: RuleOptimizer) -> list[dict[str, Any]]:
    """Groups with every hyperparameter; the learning rate is the one before the schedule.

    Args:
        optim: any of ours.

    Returns:
        One dictionary per group.
    """
    out = []
    for group in optim.param_groups:
        plain = {k: v for k, v in group.items() if k not in ("params", "param_names", "role_sources", "initial_lr")}
        settings = {k: v for k, v in plain.items() if v is None or isinstance(v, (bool, int, float, str, tuple, list))}
        settings["lr"] = group.get("initial_lr", group["lr"])
        out.append(settings | {"parameters": sum(p.numel() for p in group["params"])})
    return out


def memory(module: nn.Module, optim: RuleOptimizer, predicted: int | None, peak: Mapping[str, int]) -> dict[str, Any]:
    """Bytes by category.

    Args:
        module: after training.
        optim: after training.
        predicted: bytes of state that the plan gives.
        peak: what was measured over two steps.

    Returns:
        JSON; `state` is what lies in memory, with everything a rule keeps.
    """
    bytes_of = categories(module, optim)
    out = {k: bytes_of.get(k, 0) for k in ("parameters", "buffers", "gradients", "state")}
    return out | {"state_predicted": predicted, **peak}


def precision(module: nn.Module, optim: RuleOptimizer, config: Setup) -> dict[str, Any]:
    """The precision table.

    Args:
        module: after training.
        optim: after training.
        config: the setup.

    Returns:
        JSON, a dtype or a sentence each.
    """
    weights = sorted({dtype_name(p.dtype) for p in module.parameters()})
    state: dict[str, set[str]] = {}
    for slots in optim.state.values():
        for slot, value in slots.items() if isinstance(slots, Mapping) else ():
            if isinstance(value, Tensor):
                state.setdefault(slot, set()).add(dtype_name(value.dtype))
    rules = {rule_of(g).name: rule_of(g) for g in optim.param_groups}
    preconditioners = {slot for rule in rules.values() for slot in rule.preconditioners}
    iterations: set[str] = {r.ns_dtype for r in rules.values() if hasattr(r, "ns_dtype")}  # pyright: ignore
    rounding = {g["param_rounding"] for g in optim.param_groups}
    return {
        "weights": " and ".join(weights),
        "computation": "bfloat16" if config.precision == "autocast" else " and ".join(weights),
        "gradients": " and ".join(weights),
        "state": {slot: " and ".join(sorted(dtypes)) for slot, dtypes in sorted(state.items())},
        "master_weights": f"none; {', '.join(sorted(rounding))} rounding" if "bfloat16" in weights else "the weights",
        "preconditioners": {slot: " and ".join(sorted(state[slot])) for slot in sorted(preconditioners & set(state))}
        or "none",
        "orthogonalisation": " and ".join(sorted(iterations)) or "none",
        "eps": {name: getattr(rule, "eps", None) for name, rule in rules.items()},
        "loss_scaling": "none",
        "clipping": f"norm {config.clip:g}" if config.clip else "none",
    }


def versions(config: Setup) -> dict[str, str]:
    """Versions of what takes part.

    Args:
        config: the setup.

    Returns:
        Package to version.
    """
    names = ["torch", "transformers", "tokenizers", "lightning-optim"]
    names += {"lora": ["peft"], "dpo": ["trl"]}.get(config.regime, [])
    out = {"python": platform.python_version()}
    for name in names:
        try:
            out[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            out[name] = "not installed as a package"
    return out
