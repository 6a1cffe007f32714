"""Recorded cases of the rules with a low-rank projection."""

from __future__ import annotations

import types
from collections.abc import Callable, Sequence
from typing import Any

import torch

from lightning_optim import RuleOptimizer
from lightning_optim.core.step.records import GroupStep
from lightning_optim.rules.projected import Subspace
from tests.contract.golden.common import Case, Params, split


class Recorded(RuleOptimizer):
    """Takes projections from a recording where it would compute them; one group per projected parameter."""

    def __init__(self, groups: list[dict[str, Any]], case: Case) -> None:
        super().__init__(groups)
        self.inject: dict[str, torch.Tensor] = case.get("inject") or {}

    def take_step(self, groups: Sequence[GroupStep], clip: Any, oracle: Any = None) -> bool:
        return super().take_step([self._recorded(group) for group in groups], clip, oracle)

    def _recorded(self, group: GroupStep) -> GroupStep:
        name, kind = group.group["name"], type(group.rule)

        def refresh_preconditioner(rule: Subspace, g: torch.Tensor, s: Any, t: int) -> None:
            bases = {slot: self.inject.get(f"{key}_{t}/{name}") for slot, key in _sides(rule, g).items()}
            if any(x is None for x in bases.values()):
                kind.refresh_preconditioner(rule, g, s, t)
            for slot, x in bases.items():
                if x is not None:
                    setattr(s, slot, (x.mT if "right" in slot else x).to(g)[None])

        if not isinstance(group.rule, Subspace):
            return group
        methods = {"refresh_preconditioner": refresh_preconditioner}
        recorded: Any = types.new_class("Recorded", (kind,), {"abstract": True}, lambda body: body.update(methods))
        return group._replace(rule=recorded(**vars(group.rule)))


def _sides(rule: Subspace, g: torch.Tensor) -> dict[str, str]:
    """Our slots and the recording's keys of a matrix's projection."""
    sides = rule.projected_sides(*g.shape[-2:])
    both = {"left": "proj_A", "right": "proj_B"}
    return {f"projection_{x}": "proj" if len(sides) == 1 else both[x] for x in sides}


def _projected(rule: str, defaults: dict[str, Any], names: dict[str, str]):
    """A reference class with a projector: matrices with a recorded projection, the others in plain Adam steps."""

    def build(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
        h = {**defaults, **h}
        h["refresh"] = f"fixed:{h.pop('update_proj_gap')}"
        h = {names.get(k, k): v for k, v in h.items()}
        taken = {k.split("/", 1)[1] for k in case.get("inject") or () if k.startswith("proj_")}
        taken = taken or {n for n, _ in split(params)[0]}
        groups = [{"params": [(n, params[n])], "rule": rule, "name": n, **h} for n in params]
        return Recorded([g if g["name"] in taken else {**g, "rank": 0} for g in groups], case)

    return build


PROJECTOR = {"lr": 1e-3, "rank": 128, "update_proj_gap": 200}
LIMITED = {**PROJECTOR, "limiter_restarts": False}
_galore = _projected("galore", PROJECTOR, {"proj_type": "side"})
_fira = _projected("fira", {**LIMITED, "alpha": 1.0, "residual_uses_alpha": True}, {"proj_type": "side"})


def _galore_adafactor(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    rate = {"decay_rate": h.pop("decay_rate")} if "decay_rate" in h else {}
    lr = {} if h.get("lr") is not None else {"lr": 1e-2}  # relative steps
    defaults = {**PROJECTOR, "scale": 1.0, "scale_parameter": True, "relative_step": True}
    return _projected("galore_adafactor", defaults, {"proj_type": "side"})(params, {**h, **rate, **lr}, case)


def _apollo(params: Params, h: dict[str, Any], case: Case) -> RuleOptimizer:
    h.pop("proj_type", None)  # the standard one
    h["projection"] = h.pop("proj", "random")
    limit = {"limit": None} if h.pop("disable_nl", False) else {}
    return _projected("apollo", LIMITED, {})(params, {**h, **limit}, case)


FAMILIES: dict[str, Callable[[Params, dict[str, Any], Case], RuleOptimizer]] = {
    "APOLLO": _apollo,
    "Fira": _fira,
    "GaLore": _galore,
    "GaLore-Adafactor": _galore_adafactor,
}
