"""Labels of torch's losses: how many a loss was given, and labels sampled from the model in their place."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from lightning_optim.diagnostics.hessian import graph_nodes
from lightning_optim.ops.rounding import hash_key

CHUNK_ELEMENTS = 2**22
"""Probabilities that `categorical` materializes at a time."""
LOSSES_WITH_LABELS = "cross_entropy, nll_loss, binary_cross_entropy_with_logits and mse_loss"


class Labels(TorchFunctionMode):
    """Counts the labels that losses within the block are given, and samples labels from the predictions.

    For a mean of squared differences the predictions are those of a normal distribution of variance one half, whose
    negative log-likelihood the square is.

    Args:
        seed: random seed of the samples. Without a seed the labels stay as they are.
    """

    def __init__(self, seed: int | None = None) -> None:
        super().__init__()
        self.seed, self.autocast = seed, False
        self.dtypes: set[torch.dtype] = set()
        """The dtypes of autocast, where it was on."""
        self._is_used: list[bool] | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the losses so far."""
        self.inputs: list[Tensor] = []
        """The predictions that the losses were given."""
        self._counts: list[int] = []
        self._losses: list[Any] = []

    @property
    def count(self) -> int:
        """The number of labels."""
        return sum(self._counts)

    def keep_used(self, loss: Tensor) -> None:
        """Forget the losses that another loss is not made of, such as a model's own, where a trainer takes its logits.

        Args:
            loss: the loss that the block has computed. If it has no graph, the losses of the previous call are kept.
        """
        if loss.grad_fn is not None:
            nodes = set(graph_nodes([loss]))
            self._is_used = [getattr(x, "grad_fn", None) in nodes for x in self._losses]
        is_used = self._is_used or []
        if len(is_used) == len(self._losses):
            self.inputs = [x for x, used in zip(self.inputs, is_used, strict=True) if used]
            self._counts = [n for n, used in zip(self._counts, is_used, strict=True) if used]
        self._losses = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count and replace the labels of a loss. Every other function is called unchanged.

        Args:
            func: the torch function.
            types: unused.
            args: positional arguments of the function.
            kwargs: keyword arguments of the function.

        Returns:
            What the function returns.
        """
        kwargs = kwargs or {}
        if func not in (F.cross_entropy, F.nll_loss, F.binary_cross_entropy_with_logits, F.mse_loss):
            return func(*args, **kwargs)
        call = inspect.signature(func).bind(*args, **kwargs)
        call.apply_defaults()
        x = call.arguments["input"]
        self.inputs.append(x)
        if torch.is_autocast_enabled(x.device.type):
            self.autocast = True
            self.dtypes.add(torch.get_autocast_dtype(x.device.type))
        if func in (F.cross_entropy, F.nll_loss):
            self._replace_classes(call.arguments)
        else:
            self._replace_values(call.arguments, is_normal=func is F.mse_loss)
        if self.seed is not None and "label_smoothing" in call.arguments:
            call.arguments["label_smoothing"] = 0.0
        out = func(*call.args, **call.kwargs)
        self._losses.append(out)
        return out

    def _replace_classes(self, arguments: dict[str, Any]) -> None:
        """Count the labels of a classification loss, and sample classes in place of those that count."""
        x, y = arguments["input"].detach(), arguments["target"]
        by_index = not y.is_floating_point()
        class_dim = 0 if x.ndim == 1 else 1
        counts = y != arguments["ignore_index"] if by_index else torch.ones(y.movedim(class_dim, -1).shape[:-1])
        self._counts.append(int(counts.sum()))
        if self.seed is not None:
            samples = categorical(x.movedim(class_dim, -1), self._generator(x))
            arguments["target"] = torch.where(counts, samples, y) if by_index else samples

    def _replace_values(self, arguments: dict[str, Any], *, is_normal: bool) -> None:
        """Count the labels of an elementwise loss, and sample values in their place."""
        x = arguments["input"].detach()
        self._counts.append(arguments["target"].numel())
        if self.seed is None:
            return
        generator = self._generator(x)
        if is_normal:
            dtype = torch.promote_types(x.dtype, torch.float32)
            noise = torch.randn(x.shape, generator=generator, device=x.device, dtype=dtype)
            arguments["target"] = x + (0.5**0.5 * noise).to(x.dtype)
        else:
            arguments["target"] = torch.bernoulli(x.sigmoid(), generator=generator)

    def _generator(self, like: Tensor) -> torch.Generator:
        """Random numbers that differ between the losses of the block."""
        assert self.seed is not None
        return torch.Generator(like.device).manual_seed(hash_key(self.seed, self.count))


def categorical(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Sample from softmax(logits), by the inverse of the distribution function.

    Args:
        logits: `[..., classes]`.
        generator: the source of random numbers, on their device.

    Returns:
        Class indices, int64, `[...]`.
    """
    flat = logits.reshape(-1, logits.shape[-1])
    out = []
    for rows in flat.split(max(1, CHUNK_ELEMENTS // flat.shape[-1])):
        cumulative = rows.to(torch.promote_types(rows.dtype, torch.float32)).softmax(-1).cumsum_(-1)
        u = torch.rand(len(rows), 1, generator=generator, device=rows.device, dtype=cumulative.dtype)
        u = u * cumulative[:, -1:]
        out.append(torch.searchsorted(cumulative, u, right=True).clamp_(max=flat.shape[-1] - 1))
    indices = torch.cat(out) if out else flat.new_empty(0, dtype=torch.int64)
    return indices.view(logits.shape[:-1])
