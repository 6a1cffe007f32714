"""The base class of every optimizer: a `torch.optim.Optimizer` whose param groups each name the rule that steps them.

`state[p]` is the only store of state, `param_groups` the only store of settings. `RuleOptimizer.step` names the phases
of a step; the modules of `lightning_optim.core.step` do them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_optim.core.momentum_alias import ParamGroup, publish_momentum
from lightning_optim.core.options import expand_options
from lightning_optim.core.parallel import engines, replicas
from lightning_optim.core.param_groups import complete_group, rule_of
from lightning_optim.core.rule import lookup
from lightning_optim.core.stateful_optimizer import StatefulOptimizer
from lightning_optim.core.step import (
    compiled,
    constraints,
    curvature_input,
    elementwise,
    exchanged,
    joint_preconditioning,
    line_search,
    preflight,
    stacked,
)
from lightning_optim.core.step.apply import Transaction
from lightning_optim.core.step.averaging_methods import COUNTERS
from lightning_optim.core.step.backward_fusion import FusedBackward, validate_fusion
from lightning_optim.core.step.records import GroupStep, Refresh, number_steps
from lightning_optim.core.step.refresh_scheduler import RefreshScheduler
from lightning_optim.ops.lapack import failures

Clip = Callable[[Sequence[GroupStep]], None]
ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class RuleOptimizer(StatefulOptimizer):
    """Steps any mix of rules, one per param group.

    Every group is a dictionary with `params`, `rule` (a registered name) and, where they differ from the defaults, the
    rule's hyperparameters, a unique `name` and the options of `lightning_optim.core.options.Options`.

    `defaults` name a momentum as torch's optimizers do, so that `OneCycleLR`, `CyclicLR` and Lightning's monitor work:
    each group answers to `momentum` and to `betas`, whichever its rule has. `total_steps`, if set, is the length of the
    run, which the trainers' integrations know; `curve` is the schedule that `build_optimizer` was given.

    The setting `refresh` of a rule with preconditioners says when they are recomputed (`lightning_optim.refresh`);
    `on_refresh`, if set, is called with a `Refresh` for each. `process_group`, if set, is that of replicas that must
    agree on measured times.

    Args:
        params: parameters, named parameters or groups.
        defaults: settings of groups that do not give them; `rule` among them for a single-rule optimizer.
        max_temp_bytes: bound for stacks of small matrices and their temporaries.

    Raises:
        ValueError: an unknown rule or option, a value out of range, or a parameter the rule cannot take; the message
            names it and nothing is changed.
    """

    divide: Callable[[dict[str, Any]], Sequence[dict[str, Any]]] | None
    """Gives a group that is added without a rule as groups with rules; set by `build_optimizer`."""
    has_curvature: bool
    """True once a curvature estimator is attached. Rules that need curvature refuse to step without one."""
    estimator: curvature_input.Estimator | None
    """The curvature estimator that is attached; a step has it measure what is due."""
    loss_oracle: line_search.LossOracle | None
    """The loss of the coming step's batches; set by a curvature estimator, used once."""
    bias_of: WeakTensorKeyDictionary
    """The bias of a layer by its weight; set by a curvature estimator."""
    _step_supports_amp_scaling: bool
    """Of GradScaler; set while the backward pass is fused."""

    def __init__(
        self, params: ParamsT, defaults: Mapping[str, Any] | None = None, *, max_temp_bytes: int = 2**25
    ) -> None:
        self._start(max_temp_bytes)
        super().__init__(cast("Any", params), expand_options(defaults or {}))
        for key in ("lr", "weight_decay"):
            self.defaults.setdefault(key, self.param_groups[0][key])
        self._is_built = True
        publish_momentum(self.defaults, self.param_groups)
        engines.validate_engine(lookup(group["rule"]) for group in self.param_groups)

    def _start(self, max_temp_bytes: int = 2**25) -> None:
        super()._start(max_temp_bytes)
        self.divide = None  # not on the class, where Lightning's wrapper of an optimizer would find it
        self._is_compared = False
        self._refreshes = RefreshScheduler()
        self.on_refresh: Callable[[Refresh], None] | None = None
        self.process_group: Any = None
        self.fused: FusedBackward | None = None
        self.has_curvature, self.estimator, self.loss_oracle = False, None, None
        self.bias_of = WeakTensorKeyDictionary()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, completed by its rule's defaults and checked.

        If `build_optimizer` made this optimizer, a group that names no rule is divided: every parameter gets the rule
        and settings it would have had from the start. What the group gives takes precedence; its lr is that of the main
        rule, and those of the others keep their ratio to it.

        Args:
            param_group: see the class.

        Raises:
            ValueError: see the class; no group is added then.
        """
        if self.divide is not None and "rule" not in param_group:
            parts = self.divide(param_group)
            for part in parts:
                complete_group(part, self.defaults, self.param_groups)
            for part in parts:
                self.add_param_group(part)
            return
        group = ParamGroup(complete_group(param_group, self.defaults, self.param_groups))
        foreign = self.defaults.keys() - group.keys()
        if self.fused is not None:
            validate_fusion(rule_of(group), group, ())
        if self.averages is not None:
            self.averages.join(group)
            group |= {k: self.param_groups[0][k] for k in COUNTERS}
        if group["compile"]:
            params = [x[1] if isinstance(x, tuple) else x for x in group["params"]]
            compiled.validate_compile(rule_of(group), group, params)
        super().add_param_group(group)
        for first in self.param_groups[: len(self.param_groups) - 1]:
            first.setdefault("name", first["name"])
        self.known_params.remember(group)
        for key in foreign:
            del group[key]
        if self._is_built:
            publish_momentum(self.defaults, self.param_groups)
        if self.fused is not None:
            self.fused.watch()

    # -- step ---------------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step.

        Args:
            closure: computes the loss and the gradients; called once, first. Rules that search along a line call it
                again, unless a curvature estimator gives them the loss.

        Returns:
            What the closure returned.

        Raises:
            FloatingPointError: a gradient is not finite and its group asks to raise; nothing was written.
            RuntimeError: a sparse gradient, a parameter whose shape is no longer that of its state or gradient, or
                ranks that disagree on which parameters have a gradient or, at the first step, on the groups; nothing
                was written. Or a failure in mid-step, whose message names the parameters that were not updated.
        """
        if closure is not None or self.estimator is not None:
            closure = curvature_input.estimate_first(lambda: self.estimator, closure)
        failures.depth += 1
        try:
            with nullcontext() if self.flat_groups is None else self.flat_groups.shown(self):
                if self.averages is None:
                    return self._step(closure)[0]
                self.validate_shapes(self.group_steps(frozen=True))
                self.averages.begin(self, closure=closure is not None)
                taken = False
                try:
                    loss, taken = self._step(closure)
                finally:
                    self.averages.end(self, taken=taken, closure=closure is not None)
                return loss
        finally:
            failures.depth -= 1
            if failures.named or failures.unnamed:
                failures.warn()

    def _step(self, closure: Callable[[], Any] | None) -> tuple[Any, bool]:
        """Take one step; what the closure returned, and whether anything was written."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        oracle, self.loss_oracle = self.loss_oracle, None
        groups = self._plans.collect(self.param_groups, self.state)
        if not all(group.is_complete for group in groups):
            self.validate_shapes(groups)
            self.validate_params(groups)
        if not self._is_compared:
            preflight.compare_groups(self._guard, groups, self.process_group)
            self._is_compared = True
            self.flat_groups = self.flat_groups or self.known_params.release()
        if not self.state and preflight.only_allocates(groups, self.replicas or self.compressing):
            self.allocate_state(groups)
            return loss, False
        if self.averages is not None:
            self.averages.check_total(self)
        if self.fused is not None:
            self.fused.finish(groups)
            return loss, True
        searching = [group.rule.name for group in groups if group.rule.curvature_input == "loss"]
        if searching and oracle is None and closure is not None:
            oracle = line_search.ClosureOracle(closure, loss, searching[0])
        return loss, self.take_step(groups, preflight.clip_gradients, oracle)

    def take_step(self, groups: Sequence[GroupStep], clip: Clip, oracle: line_search.LossOracle | None = None) -> bool:
        """The phases of a step, for the parameters that have a gradient.

        Args:
            groups: of this step.
            clip: finds the factors of clipped gradients.
            oracle: gives the loss at other weights, to rules that search along a line.

        Returns:
            False if the step was skipped, since a gradient is not finite.
        """
        if any(group.rule.preconditioners for group in groups):
            self._refreshes.callback = self.on_refresh
            self._refreshes.begin_step(self._all_steps() if self.flat_groups else groups, self.process_group)
        sharers = self.replicas or self.compressing
        if any(group.rule.curvature_input for group in groups):
            curvature_input.require_curvature(groups, self.has_curvature, has_oracle=oracle is not None)
        if not preflight.gradients_usable(groups, sharers, compressing=self.compressing is not None):
            return False
        if self.compressing is not None:
            self.compressing.average_(preflight.unreduced_gradients(groups))
        clip(groups)
        self._gathered, self._is_averaged = {}, False
        if not all(group.is_complete for group in groups):
            self.allocate_state(groups)
        if any(group.plan.has_constraint for group in groups):
            constraints.check_first(groups)
        transaction, exchanges, limit = Transaction(groups), (), self.max_temp_bytes
        if oracle is not None:
            line_search.search(groups, oracle)  # the last that may refuse the step
        groups = [group.only([s for s in group.params if s.grad is not None or s.plan.team]) for group in groups]
        number_steps(counted := [s for group in groups for s in group.params if s.grad is not None])
        if any(group.rule.needs_all_gradients for group in groups):
            joint_preconditioning.precondition_jointly(groups, self.bias_of, self._refreshes, transaction)
        if any(s.plan.team is not None for group in groups for s in group.params):
            exchanges = exchanged.begin_exchanges(groups, self._owners, self._refreshes, limit, transaction)
        for group in groups:
            steps = [s for s in group.params if s.plan.team is None]
            if group.rule.elementwise:
                elementwise.step_elementwise(group, steps, limit, transaction)
            elif group.rule.reduces:
                stacked.step_reducing(group, steps, limit, transaction)
            else:
                stacked.step_whole(group, steps, self._refreshes, limit, transaction)
        if exchanges:
            exchanged.finish_exchanges(exchanges, transaction)
        transaction.finish(counted)
        return True

    # -- curvature and parallel modes --------------------------------------------------------------------------

    def pending_curvature(self) -> dict[str, list[Tensor]]:
        """What is to be estimated before the next step.

        Returns:
            Trainable parameters by what their rules need; empty in most steps.
        """
        groups = self.group_steps()
        self.validate_params(groups)
        return curvature_input.pending(groups)

    @torch.no_grad()
    def update_curvature(self, estimates: Mapping[Tensor, curvature_input.Estimate]) -> dict[str, float]:
        """Hand over what was estimated of parameters, as `lightning_optim.curvature` does for models.

        Nothing is used while a gradient is not finite: the step is going to be refused, here or by a GradScaler.

        Args:
            estimates: by parameter, with the fields of `Rule.update_curvature`.

        Returns:
            Metrics of the rules, averaged over all elements of the parameters: `win_rate` of Sophia.

        Raises:
            ValueError: a parameter whose rule needs no curvature.
            RuntimeError: a parameter whose shape is no longer that of its state or gradient; nothing was written.
        """
        self.has_curvature = True
        groups = self.group_steps()
        self.validate_shapes(groups)
        measured = curvature_input.measured(groups, estimates)
        if preflight.any_unusable(groups, self.replicas or self.compressing):
            return {}
        self.allocate_state(measured)
        return curvature_input.update_curvature(measured, estimates)

    def fuse_backward(self) -> FusedBackward:
        """From now on, step every parameter within the backward pass and free its gradient at once.

        Returns:
            `optimizer.fused`, which does so.
        """
        self.fused = self.fused or FusedBackward(self)
        return self.fused

    def shard_work(self, group: Any = None) -> None:
        """From now on, shard optimizer work and state of whole-matrix rules over DDP ranks, as ZeRO-1 does.

        One rank of the group steps each matrix and keeps its state; the directions go to all others. Gradients must be
        equal on all ranks. To be called on all of them, as `consolidate` before one saves alone.

        Args:
            group: of the replicas, those of a node to keep communication there; of all ranks, if not given.

        Raises:
            ValueError: there is state already, or the backward pass is fused.
        """
        if self.state or self.fused is not None:
            raise ValueError(
                "shard_work comes before the first step and before a checkpoint is loaded, without fused_backward"
            )
        team = replicas.replicas_of(group)
        if team is not None:
            self.replicas, self.process_group, self._plans.replicas = team, team.group, team

    def compress(self, module: Any) -> None:
        """From now on, reduce the gradients of a DistributedDataParallel module here, where a rule can send less.

        `dion` sends its low-rank factors, `signum` and `signsgd` vote on signs, one byte per element; the gradients of
        other rules are averaged in the step. To be called on all ranks before the first backward pass. `consolidate`
        averages what replicas keep of their own gradients; it has to precede `state_dict` on every rank.

        Args:
            module: of the parameters.

        Raises:
            ValueError: a module of another kind, more than 127 ranks, `shard_work`, a fused backward pass, or a group
                of such a rule with `clip_norm`, for which no rank has the gradient, or with narrow state.
        """
        if self.replicas is not None or self.fused is not None:
            raise ValueError("compress does not work with shard_work or fused_backward")
        for group in self.param_groups:
            rule = lookup(group["rule"])
            wrong = group["clip_norm"] is not None or group["state_storage"] not in ("fp32", "host")
            if (wrong or group.get("momentum_kernel")) and (rule.compresses or rule.votes):
                raise ValueError(
                    f"group {group['name']!r}: compress needs clip_norm=None, momentum_kernel=None and "
                    "state_storage='fp32'"
                )
        self.compressing = self._plans.compressing = replicas.leave_gradients(module)
        self.process_group = self.compressing.group
