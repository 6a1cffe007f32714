"""K-FAC: natural gradient with Kronecker factors of a layer's inputs and output gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import ClassVar, Literal

import torch
from torch import Tensor

from lightning_optim.core.rule import CurvatureInput, Rule, StateSpec, eye, zeros
from lightning_optim.ops.kronecker import damped_inverse, divided, factored_damping, mean_eigenvalue
from lightning_optim.ops.lapack import Fallback, eigh


@dataclass(frozen=True)
class KFAC(Rule):
    """K-FAC: the gradient of a layer, divided by Kronecker factors of its inputs and output gradients.

    A <- b A + (1 - b) mean(a a^T);  G <- b G + (1 - b) mean(q q^T);  D = (G + damping I)^-1 g (A + damping I)^-1
    nu = min(1, sqrt(kl_clip / |sum lr^2 D * g|)) over all layers;  buf <- momentum buf + nu D;  d = buf

    a are a layer's inputs, with a one if its bias is trained by this rule, too (g is then [dW | db]), q the gradients
    of the mean loss by its outputs. `mode="eigen"`, the default, divides by `d_G d_A^T + damping` in the eigenbases
    instead of inverting both. `pi=True` damps A by sqrt(damping) pi and G by sqrt(damping) / pi, pi^2 the ratio of
    their mean eigenvalues. `sequence="expand"` takes every position of a sequence (or a convolution) for a
    row of its own, `"reduce"` sums over positions first (Eschenhagen et al. 2023, arXiv:2311.00636).

    `factors` says at which steps A and G are measured, `refresh` when they are decomposed; 10 and 100 are usual for
    language models. For weights of `nn.Linear`, `nn.Conv2d` and Transformers' Conv1D; embeddings, the head and vectors
    stay with `rest`. Needs a curvature estimator; under DDP, not FSDP2. The direction has no fixed scale: lr is K-FAC's
    own.

    Differs from kfac-pytorch: over accumulated batches and ranks the factors are those of one large batch; a
    convolution's positions are rows, not divided by their number. Its clipping and momentum (SGD's) are the same.
    """

    lr: float = 0.1
    momentum: float = 0.9
    beta: float = 0.95
    """Decay rate of the Kronecker factors."""
    damping: float = 1e-3
    """Added to the eigenvalues of the factors."""
    kl_clip: float | None = 1e-3
    weight_decay: float = 0.0
    mode: Literal["eigen", "inverse"] = "eigen"
    """Whether to divide in the eigenbases or by damped inverses."""
    pi: bool = False
    """Whether damping is divided between the two factors by their mean eigenvalues."""
    sequence: Literal["expand", "reduce"] = "expand"
    """Whether positions of a sequence are rows of their own or summed first."""
    factors: str = "fixed:10"
    """Policy that says at which steps the factors are measured."""
    refresh: str = "fixed:100"

    name: ClassVar = "kfac"
    source: ClassVar = "Martens & Grosse 2015, arXiv:1503.05671; as in kfac-pytorch 0.4.2 (Pauloski et al. 2020)"
    family: ClassVar = "curvature"
    vector_state: ClassVar = {"momentum_buffer": zeros("mn")}
    preconditioners: ClassVar = ("input_basis", "output_basis")
    curvature_input: ClassVar[CurvatureInput | None] = "factors"
    curvature_schedule: ClassVar = "factors"
    needs_all_gradients: ClassVar = True
    search: ClassVar = {"lr": (1.0, 0.3, 3.0, 0.1, 0.03), "damping": (1e-3, 1e-2)}

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        # momentum, factors, and their eigenbases and values, or inverses; on the input side with room for a bias
        if vector:
            return {"momentum_buffer": zeros("mn")}
        inner = replace(eye("nn"), size=(n + 1, n + 1))
        specs = {"input_factor": inner, "output_factor": eye("mm"), "input_basis": inner, "output_basis": eye("mm")}
        if self.mode == "eigen":
            specs |= {"input_values": replace(zeros("1n"), size=(1, n + 1)), "output_values": zeros("1m")}
        return {"momentum_buffer": zeros("mn"), **specs}

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: no damping, or an average of nothing but the past.
        """
        super().validate()
        if not self.damping > 0 or self.kl_clip == 0:
            raise ValueError(f"kfac: damping and kl_clip must be positive, got {self.damping} and {self.kl_clip}")
        if not self.beta < 1:
            raise ValueError(f"kfac: beta must lie in [0, 1), got {self.beta}")

    def update_curvature(self, estimate: SimpleNamespace, s: SimpleNamespace) -> Mapping[str, Tensor]:  # noqa: D102
        for x, new in ((s.input_factor, estimate.inputs), (s.output_factor, estimate.outputs)):
            n, k = x.shape[-1], new.shape[-1]  # there may be room for a bias
            if estimate.t == 1:
                x.copy_(torch.eye(n, dtype=x.dtype, device=x.device).expand_as(x))
            x.view(-1, n, n)[:, :k, :k].lerp_(new.to(x.dtype), 1 - self.beta)
        return {}

    def precondition_jointly(self, params: Sequence[SimpleNamespace]) -> None:  # noqa: D102
        layers = [x for x in params if not x.s.vector]
        total: Tensor | float = 0.0
        for x in layers:
            g = x.g
            if x.has_bias:  # without a gradient, too: the basis is of both
                g = torch.cat([g, g.new_zeros(*g.shape[:-1], 1) if x.bias is None else x.bias.g.mT], -1)
            x.s.refresh(g)
            x.d = x.rule._divided(g, x.s)
            total = total + x.lr**2 * (x.d * g).sum(dtype=torch.float64)
        size = abs(float(total))
        nu = 1.0 if self.kl_clip is None or size == 0 else min(1.0, (self.kl_clip / size) ** 0.5)
        for x in layers:
            n = x.g.shape[-1]
            if x.bias is not None:
                x.bias.g = nu * x.d[..., n:].mT
            x.g = x.d[..., :n].mul_(nu)

    def refresh_preconditioner(self, g: Tensor, s: SimpleNamespace, t: int) -> None:  # noqa: D102
        k = g.shape[-1]
        a, b = s.input_factor[..., :k, :k], s.output_factor
        if self.mode == "eigen":
            what = "eigenvectors of a factor could not be computed; the last good ones are kept"
            previous = s.input_values[..., 0, :k], s.input_basis[..., :k, :k]
            values, basis = eigh(a, Fallback(lambda: previous, what))
            other = s.output_values[..., 0, :], s.output_basis
            s.output_values, s.output_basis = eigh(b, Fallback(lambda: other, what))
            s.output_values = s.output_values.clamp_(min=0).unsqueeze(-2)
            s.input_values[..., :k], s.input_basis[..., :k, :k] = values.clamp_(min=0).unsqueeze(-2), basis
        else:
            db, da = self._dampings(mean_eigenvalue(b), mean_eigenvalue(a))
            s.input_basis[..., :k, :k] = damped_inverse(a, da, s.input_basis[..., :k, :k])
            s.output_basis = damped_inverse(b, db, s.output_basis)

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        return s.momentum_buffer.mul_(self.momentum).add_(g)

    def _divided(self, g: Tensor, s: SimpleNamespace) -> Tensor:
        k = g.shape[-1]
        left, right = s.output_basis, s.input_basis[..., :k, :k]
        if self.mode == "inverse":
            return left @ g @ right
        a, b = s.input_values[..., :k], s.output_values.mT
        if not self.pi:
            return divided(g, left, right, b * a + self.damping)
        db, da = self._dampings(b.mean(-2, keepdim=True), a.mean(-1, keepdim=True))
        return divided(g, left, right, (b + db) * (a + da))

    def _dampings(self, b: Tensor, a: Tensor) -> tuple[Tensor | float, Tensor | float]:
        return factored_damping(b, a, self.damping) if self.pi else (self.damping, self.damping)
