"""L-BFGS: quasi-Newton steps for all parameters as one vector, with a line search; torch's own class does the work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from types import SimpleNamespace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn import Parameter

from lightning_optim.core.rule import GlobalStepRule, Objective, StateSpec, zeros
from lightning_optim.ops.secant import names, stored_pairs

NUMBERS = ("count", "n_iter", "func_evals", "t", "H_diag", "prev_loss")


@dataclass(frozen=True)
class LBFGS(GlobalStepRule):
    """L-BFGS: several quasi-Newton steps on the loss of one batch, all parameters as one vector.

    x <- x - t H g, up to `max_iter` times per step, with the two-loop recursion's inverse Hessian H of the last
    `history_size` pairs and t = lr, or from the strong Wolfe conditions, tried from lr.

    This is `torch.optim.LBFGS`, arguments included, on one vector of all parameters; its lists of pairs rest in state
    of a fixed size. A step computes the loss up to `max_eval` times (1.25 `max_iter`, if not given): by a curvature
    estimator, so that trainers may accumulate, scale losses and use DDP, or by the closure of a loop of one's own. lr
    is a factor of the step, 1 for Newton's, not a learning rate. Batches should be large, or pairs remember noise.

    Differs: by default 10 pairs, not 100, and weight decay, which is part of the loss.
    """

    lr: float = 1.0
    max_iter: int = 20
    """Most quasi-Newton steps on one batch."""
    max_eval: int | None = None
    """Most evaluations of the loss; None for 1.25 max_iter."""
    tolerance_grad: float = 1e-7
    """Largest gradient entry at which it stops."""
    tolerance_change: float = 1e-9
    """Change of loss or weights below which it stops."""
    history_size: int = 10
    """Pairs of steps and gradient changes that are kept."""
    line_search_fn: Literal["strong_wolfe"] | None = None
    """Line search; None takes the step lr."""
    weight_decay: float = 0.0

    name: ClassVar = "lbfgs"
    source: ClassVar = "Nocedal 1980, Math. Comp. 35; as in torch.optim.LBFGS"
    family: ClassVar = "curvature"
    tracks_weights: ClassVar = True  # the next pair is of the last gradient and t d, from one step to the next

    def declare_state(self, m: int, n: int, *, vector: bool = False) -> Mapping[str, StateSpec]:  # noqa: D102
        # the pairs, oldest first, the last direction and gradient, and numbers
        vectors = ("d", "prev_flat_grad", *names(self.history_size))
        numbers = {"numbers": zeros(f"1{len(NUMBERS)}", torch.float64)}
        return {**dict.fromkeys(vectors, zeros("mn", exact=True)), **numbers}

    def validate(self) -> None:
        """Check the hyperparameters.

        Raises:
            ValueError: no iteration, or no history.
        """
        super().validate()
        if min(self.max_iter, self.history_size) < 1:
            raise ValueError(
                f"lbfgs: max_iter and history_size must be >= 1, got {self.max_iter} and {self.history_size}"
            )

    def direction(self, at: Objective, s: SimpleNamespace) -> Tensor:  # noqa: D102
        x = Parameter(at.x.clone())
        inner = torch.optim.LBFGS(
            [x], **{f.name: getattr(self, f.name) for f in fields(self) if f.name != "weight_decay"}
        )
        inner.state[x].update(self._opened(s))

        def closure() -> float:
            value, x.grad = at.at(x.detach())
            return value

        inner.step(closure)  # pyright: ignore[reportArgumentType]
        self._keep(s, inner.state[x])
        return (at.x - x.detach()) / self.lr

    def _opened(self, s: SimpleNamespace) -> dict[str, Any]:
        """The state of torch's class; nothing before the first step."""
        numbers = dict(zip(NUMBERS, s.numbers.tolist(), strict=True))
        count, n_iter, evals = (int(numbers.pop(k)) for k in NUMBERS[:3])
        if not n_iter:
            return {}
        steps, changes = (some[:count] for some in stored_pairs(s, self.history_size))
        return numbers | {
            "n_iter": n_iter,
            "func_evals": evals,
            "d": s.d,
            "prev_flat_grad": s.prev_flat_grad,
            "old_stps": steps,
            "old_dirs": changes,
            "ro": [1.0 / y.dot(x) for x, y in zip(steps, changes, strict=True)],
        }

    def _keep(self, s: SimpleNamespace, state: Mapping[str, Any]) -> None:
        if "d" not in state:  # the gradient was small enough at once
            return
        steps, changes = state["old_stps"], state["old_dirs"]
        slots = names(self.history_size)
        vars(s).update(zip(slots, steps, strict=False))
        vars(s).update(zip(slots[self.history_size :], changes, strict=False))
        s.d, s.prev_flat_grad = state["d"], state["prev_flat_grad"]
        numbers = [len(steps), *(float(state[k]) for k in NUMBERS[1:])]
        s.numbers = torch.tensor(numbers, dtype=torch.float64, device=s.numbers.device)
