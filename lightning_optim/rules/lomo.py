"""LOMO and AdaLOMO: rules for a backward pass that uses every gradient at once (`RuleOptimizer.fuse_backward`)."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor

from lightning_optim.core.rule import DirectionByRows, Rule
from lightning_optim.rules.adafactor import AdafactorHF


@dataclass(frozen=True)
class LOMO(Rule):
    """LOMO: SGD without any state, for fine-tuning in the memory of inference.

    g <- clamp(g / loss_scale, -clip_value, clip_value);  p <- (1 - lr weight_decay) p - lr g

    `loss_scale` is what the loss was multiplied by. The direction has no scale of its own, so `lr_convention="adamw"`
    does not apply: lr is SGD's. It saves the gradients too where the optimizer's backward pass is fused.

    Differs: the norm is clipped by `clip_norm`, per group, before `clip_value` and in units of the scaled loss; the
    code's order is the other one. There is no dynamic loss scale; bfloat16 needs none.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    clip_value: float | None = None
    """Largest absolute value of a gradient entry; None for no clipping."""
    loss_scale: float = 1.0
    """What the loss was multiplied by."""

    name: ClassVar = "lomo"
    source: ClassVar = "Lv et al. 2023, arXiv:2306.09782, Alg. 1"
    family: ClassVar = "memory-efficient"
    search: ClassVar = {"lr": (300.0, 1000.0, 100.0, 3000.0, 30.0, 10_000.0, 10.0)}
    elementwise: ClassVar = True

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: a loss scale or clipping value of 0, or what `Rule.validate` raises.
        """
        super().validate()
        if self.loss_scale == 0 or self.clip_value == 0:
            raise ValueError(
                f"lomo: loss_scale and clip_value must be positive, got {self.loss_scale}, {self.clip_value}"
            )

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:  # noqa: D102
        d = g if self.loss_scale == 1 else g / self.loss_scale
        return d if self.clip_value is None else d.clamp(-self.clip_value, self.clip_value)


@dataclass(frozen=True)
class AdaLOMO(Rule):
    """AdaLOMO: Adafactor without momentum, every matrix's step bounded on its own instead of by a norm of the model.

    b = t^decay_rate;  r <- (1 - b) r + b mean_cols(g^2 + eps1);  c <- (1 - b) c + b mean_rows(g^2 + eps1)
    u = g / sqrt(r c / mean(r));  u <- u / max(1, RMS(u) / clip_threshold);  a = lr max(eps2, RMS(p))
    p <- (1 - weight_decay a) p - a u

    The authors advise lr 5e-4 to 1e-3 and no clipping of the norm. Vectors keep a full second moment. The adamw
    learning-rate convention leaves the factor max(eps2, RMS(p)) out (`scale_parameter=False`), for then the direction
    has a fixed scale. It saves the gradients too where the optimizer's backward pass is fused.

    Differs: the code keeps its step and moments outside of checkpoints and multiplies the loss by 1024, which cancels
    but for eps. RMS is taken per matrix of the last two dimensions.
    """

    lr: float = 1e-3
    weight_decay: float = 0.0
    eps: tuple[float, float] = (1e-30, 1e-3)
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    scale_parameter: bool = True

    name: ClassVar = "adalomo"
    source: ClassVar = "Lv et al. 2023, arXiv:2310.10195, Alg. 1; bound as in the authors' code"
    family: ClassVar = "memory-efficient"
    state: ClassVar = AdafactorHF.state
    vector_state: ClassVar = AdafactorHF.vector_state
    reduces: ClassVar = True
    last_two: ClassVar = True
    reads_param: ClassVar = True
    decay: ClassVar = "own"
    adamw_settings: ClassVar = {"scale_parameter": False}
    signed: ClassVar = frozenset({"decay_rate"})

    def rms(self, m: int, n: int) -> float | None:  # noqa: D102
        return self._adafactor.rms(m, n)

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor | DirectionByRows:  # noqa: D102
        return self._adafactor.update(g, s, p, t)

    @property
    def _adafactor(self) -> AdafactorHF:
        return AdafactorHF(**vars(self), relative_step=False)
