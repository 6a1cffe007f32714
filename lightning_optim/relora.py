"""ReLoRA: adapters that are merged into the weights every so often, so that the sum of all merges has a high rank.

Lialin et al. 2023, arXiv:2307.05695, Alg. 1. `lightning_optim.callbacks.ReLoRA` and `hf_integration.ReLoRA` do
this inside trainers; here is what they share, for any `torch.optim.Optimizer` and a model with PEFT's LoRA layers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn

from lightning_optim.core.parallel.sharding import local
from lightning_optim.core.rule import check_value
from lightning_optim.ops.noise import uniform
from lightning_optim.ops.rounding import hash_key


class Adapter(NamedTuple):
    """One LoRA adapter of one layer."""

    name: str
    """Of the base layer's weight in the model."""
    layer: Any
    adapter: str
    weight: nn.Parameter
    """Of the base layer."""
    params: list[nn.Parameter]
    """A, B and, if there is one, B's bias."""


class ReLoRA:
    """Merges LoRA adapters into their weights after every `every` steps of an optimizer.

    W <- W + s B A;  B <- 0;  A <- uniform in +-1 / sqrt(fan in)
    state of A and B: all but a share of 1 - `prune` of the elements becomes zero
    lr of the i-th step after a merge: i / `warmup_steps` of what the schedule says, up to 1

    The elements that stay are those whose first momentum is largest, or random ones; they are the same for both
    moments. State of another shape than the parameter's (SOAP's, Adafactor's) cannot be kept in part and is dropped.
    Draws depend on the seed and the number of merges only, so a resumed run is the same run if the merged weights come
    with it: they are in no adapter checkpoint, see `weights`. The publication trains all weights first, for a fifth of
    the steps or so; adapters from the start are worse.

    What is trained in the end is the model, not its last adapter: save `model.merge_and_unload()`.

    Differs: the publication prunes both moments by their own magnitudes, which leaves momentum where the second moment
    is zero.

    Args:
        model: with PEFT's LoRA layers; their active adapters are merged.
        optimizer: of the adapters; its `step` is hooked.
        every: steps between merges.
        prune: share of the state that becomes zero.
        by: `"magnitude"` or `"random"`.
        warmup_steps: after each merge.
        seed: of A and of random pruning.
        steps: that were already taken, in a resumed run.

    Raises:
        ValueError: a value out of range, or a model with no adapter that can be merged.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        every: int,
        prune: float = 0.99,
        by: Literal["magnitude", "random"] = "magnitude",
        warmup_steps: int = 50,
        seed: int = 0,
        steps: int = 0,
    ) -> None:
        check_settings(every=every, prune=prune, by=by, warmup_steps=warmup_steps, seed=seed)
        self.every, self.prune, self.by, self.warmup_steps, self.seed = every, prune, by, warmup_steps, seed
        self.steps = steps
        self.adapters = list(find(model))
        if not self.adapters:
            raise ValueError("ReLoRA: the model has no LoRA adapter; wrap it by peft.get_peft_model first")
        self.optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if getattr(self.optimizer, "averages", None) is not None:
            raise ValueError("ReLoRA: averages cannot follow adapters that start again; leave out averaging")
        self._scheduled: list[Any] | None = None
        hooks = self.optimizer.register_step_pre_hook, self.optimizer.register_step_post_hook
        self._handles = [hooks[0](self._before), hooks[1](self._after)]

    @property
    def factor(self) -> float:
        """What the learning rates of the step to come are multiplied by.

        Returns:
            1 before the first merge and `warmup_steps` after each.
        """
        done = self.steps % self.every
        return min(1.0, (done + 1) / self.warmup_steps) if self.steps >= self.every and self.warmup_steps else 1.0

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights that merges change, which a checkpoint of the adapters lacks.

        Returns:
            Name in the model to the weight (and bias, if adapters have one); shared memory.
        """
        out = {a.name: a.weight.data for a in self.adapters}
        biases = {a.name.removesuffix("weight") + "bias": a.layer for a in self.adapters if len(a.params) > 2}
        return out | {name: layer.get_base_layer().bias.data for name, layer in biases.items()}

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take the merged weights of a run that is resumed.

        Args:
            weights: as `weights` gave them.

        Raises:
            ValueError: weights of another model.
        """
        current = self.weights
        if current.keys() != weights.keys():
            raise ValueError(
                f"ReLoRA: merged weights of another model: {sorted(current.keys() ^ weights.keys())[:3]} ..."
            )
        for name, weight in current.items():
            weight.copy_(weights[name])

    def remove(self) -> None:
        """Leave the optimizer alone from now on."""
        for handle in self._handles:
            handle.remove()

    def _before(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        groups = optimizer.param_groups
        self._scheduled = None
        if (factor := self.factor) < 1:
            self._scheduled = [group["lr"] for group in groups]
            for group in groups:
                group["lr"] = group["lr"] * factor

    def _after(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group, lr in zip(optimizer.param_groups, self._scheduled or (), strict=False):
            group["lr"] = lr  # schedulers continue from it
        self._scheduled = None
        self.steps += 1
        if self.steps % self.every == 0:
            self.merge()

    @torch.no_grad()
    def merge(self) -> None:
        """Merge all adapters now, start them again and prune their state."""
        count = self.steps // self.every
        for index, a in enumerate(self.adapters):
            a.layer.merge(adapter_names=[a.adapter])
            a.layer.merged_adapters.remove(a.adapter)  # it is no longer there to be taken out again
            first, *others = a.params
            drawn = uniform(first.shape, hash_key(self.seed, count, index, 0), device=first.device)
            first.copy_(drawn.mul_(2).sub_(1).mul_((first.numel() // first.shape[0]) ** -0.5))
            for p in others:
                p.zero_()
            for k, p in enumerate(a.params):
                self._prune(p, hash_key(self.seed, count, index, k + 1))

    def _prune(self, p: nn.Parameter, key: int) -> None:
        state = self.optimizer.state.get(p)
        if not state:
            return
        alike = [x for k, x in state.items() if k != "step" and isinstance(x, Tensor)]
        if self.prune == 1 or any(x.shape != p.shape or not x.is_floating_point() for x in alike):
            del self.optimizer.state[p]
            return
        keep = round(p.numel() * (1 - self.prune))
        size = alike[0].abs() if self.by == "magnitude" and alike else uniform(p.shape, key, device=p.device)
        mask = torch.zeros(p.numel(), dtype=torch.bool, device=p.device)
        mask[size.flatten().topk(keep).indices] = True
        for x in alike:
            x.mul_(mask.view(p.shape))


def check_settings(*, every: int, prune: float, by: str, warmup_steps: int, seed: int) -> None:
    """Check the arguments of `ReLoRA` before there is a model.

    Args:
        every: see `ReLoRA`, as are the others.
        prune: see there.
        by: see there.
        warmup_steps: see there.
        seed: see there.

    Raises:
        ValueError: a value out of range.
    """
    for name, value, hint in (("every", every, int), ("warmup_steps", warmup_steps, int), ("prune", prune, float)):
        check_value(f"ReLoRA: {name}", value, hint)
    check_value("ReLoRA: by", by, Literal["magnitude", "random"])
    check_value("ReLoRA: seed", seed, int, signed=True)
    if every < 1 or prune > 1:
        raise ValueError(f"ReLoRA: needs every >= 1 and prune in [0, 1], got {every} and {prune}")


def find(model: nn.Module) -> Iterator[Adapter]:
    """The active LoRA adapters of a model.

    Args:
        model: with PEFT's LoRA layers.

    Yields:
        One per layer and adapter.

    Raises:
        ValueError: an adapter that cannot be merged and started again; the message names the layer.
    """
    for name, layer in cast("Iterator[tuple[str, Any]]", model.named_modules()):
        if not hasattr(layer, "lora_A") or not hasattr(layer, "merged_adapters"):
            continue
        for adapter in layer.active_adapters:
            if reason := _obstacle(layer, adapter):
                raise ValueError(f"ReLoRA: {name}: {reason}")
            if adapter in layer.lora_A:
                a, b, weight = layer.lora_A[adapter].weight, layer.lora_B[adapter], layer.get_base_layer().weight
                params = [a, b.weight, *([b.bias] if b.bias is not None else [])]
                if any(local(p) is not p for p in (weight, *params)):
                    raise ValueError(f"ReLoRA: {name}: sharded layers are not supported; use DDP")
                yield Adapter(f"{name}.base_layer.weight", layer, adapter, weight, params)


def _obstacle(layer: Any, adapter: str) -> str:
    """Why an adapter cannot be merged, or an empty string."""
    if adapter in layer.lora_embedding_A:
        return "adapters of embeddings are not supported"
    if adapter in getattr(layer, "lora_variant", {}):
        return f"{type(layer.lora_variant[adapter]).__name__} is not plain LoRA"
    if not layer.get_base_layer().weight.is_floating_point():
        return "a quantized weight would round the merge away"
    return "it is merged already; call unmerge_adapter()" if layer.merged_adapters else ""
