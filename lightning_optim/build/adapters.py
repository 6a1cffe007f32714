"""What PEFT's layers keep for each adapter."""

from __future__ import annotations

from torch import Tensor, nn

from lightning_optim.build.param_role import Found, ParamRole, Role
from lightning_optim.core.matrix_views import Blocks

ADAPTERS: dict[str, Role] = {
    "lora_A": "lora_a",
    "lora_B": "lora_b",
    "lora_embedding_A": "lora_embedding",
    "lora_embedding_B": "lora_embedding",
    "hada_w1_b": "lora_a",
    "hada_w1_a": "lora_b",
    "hada_w2_b": "lora_a",
    "hada_w2_a": "lora_b",
    "lokr_w1": "hidden",
    "lokr_w1_b": "lora_a",
    "lokr_w1_a": "lora_b",
    "lokr_w2": "hidden",
    "lokr_w2_b": "lora_a",
    "lokr_w2_a": "lora_b",
    **{f"{kind}_A": "lora_a" for kind in ("delora", "hira")},
    **{f"{kind}_B": "lora_b" for kind in ("delora", "hira")},
    "trainable_tokens_delta": "embedding",
}
"""Roles of what PEFT's layers keep for each adapter: of LoRA and AdaLoRA, LoHa, LoKr, DeLoRA, HiRA and trained tokens.

Products of two are `lora_b` times `lora_a`; of LoKr's two factors each may also be one matrix.
"""


def adapters_of(model: nn.Module) -> Found:
    """Factors of adapters; of LoRA over stacked experts, one matrix for each expert."""
    for layer in model.modules():
        if not hasattr(layer, "adapter_layer_names"):
            continue
        kind, experts = type(layer).__name__, _experts(layer)
        tucker = [name for key in ("hada_t1", "lokr_t2") for name in getattr(layer, key, ())]  # stored otherwise
        for key, role in ADAPTERS.items():
            adapters = getattr(layer, key, None)
            for adapter, value in adapters.items() if isinstance(adapters, (nn.ModuleDict, nn.ParameterDict)) else ():
                p = value.weight if isinstance(value, nn.Linear) else value
                if isinstance(p, Tensor) and p.ndim == 2 and adapter not in tucker:
                    yield p, ParamRole(role, f"adapter of {kind}", blocks=experts.get(role))
        for module in getattr(layer, "lora_magnitude_vector", nn.ModuleDict()).values():
            for p in module.parameters():
                yield p, ParamRole("vector", f"magnitudes of {kind}")


def _experts(layer: nn.Module) -> dict[str, Blocks]:
    """How PEFT's LoRA over `E` stacked experts keeps one pair of factors for each of them.

    The rows of A are those of expert 0, of expert 1, ...; of B, the columns of the experts take turns
    (`peft.tuners.lora.layer.ParamWrapper.get_delta_weight`, version 0.21).

    Returns:
        The option `blocks` by role.
    """
    count = getattr(layer, "num_experts", 1)
    if not isinstance(count, int) or count < 2 or not hasattr(layer, "parameter_name"):
        return {}
    return {"lora_a": count, "lora_b": (-1,) * count}
