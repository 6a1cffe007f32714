"""LoRA over stacked experts: one pair of factors for each."""

from __future__ import annotations

import peft
import pytest
import torch
import transformers as hf

from lightning_optim import build_optimizer, roles

E, R = 4, 2


@pytest.mark.filterwarnings("ignore")  # peft's words on target_parameters
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_experts_do_not_mix(factor: str) -> None:
    """The step of one expert's adapter does not depend on another's gradient."""
    config = hf.MixtralConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=50,
        num_local_experts=E,
    )
    settings = peft.LoraConfig(r=R, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    model = peft.get_peft_model(hf.MixtralForCausalLM(config), settings)
    name, p = next((n, p) for n, p in model.named_parameters() if factor in n)
    trait = roles(model)[name]
    assert (trait.role, trait.blocks) == (("lora_a", E) if factor == "lora_A" else ("lora_b", (-1,) * E))

    def step(scale: float) -> torch.Tensor:
        gradient = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        of_expert = gradient[R : 2 * R] if factor == "lora_A" else gradient[:, 1::E]
        of_expert.mul_(scale)
        with torch.no_grad():
            p.zero_()
        p.grad = gradient
        build_optimizer(model, "muon", lr=1.0, ns_dtype="float32").step()
        return (p.detach()[:R] if factor == "lora_A" else p.detach()[:, 0::E]).clone()

    assert torch.equal(step(1.0), step(100.0)) and step(1.0).any()
