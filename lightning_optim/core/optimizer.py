"""The one step loop: a `torch.optim.Optimizer` whose param groups each name the rule that owns them.

The executor finds the parameters that have a gradient, hands them to the rule in the form its capability asks for
(a torch kernel, flat blocks, stacks, whole matrices brought to an owner) and applies the directions. `state[p]` is the
only store of state, `param_groups` the only store of settings; nothing about parameters is cached between steps.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, NoReturn, Self, cast

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy
from torch.utils.weak import WeakTensorKeyDictionary

from lightning_optim.core import matrix_views
from lightning_optim.core.momentum_alias import MOMENTUM_NAMES, ParamGroup, momentum_field, momentum_names
from lightning_optim.core.parallel import (
    collectives,
    engines,
    exchange,
    guard,
    ownership,
    replicas,
    sharding,
    stack_sharding,
)
from lightning_optim.core.parallel.flat_parameters import REMEDY, check_flat, is_flat
from lightning_optim.core.param_groups import (
    complete_group,
    parts_of,
    plain,
    reading_of,
    rule_of,
    settings_of,
    validate_loaded,
    validate_param,
)
from lightning_optim.core.rule import Rule, lookup
from lightning_optim.core.state import allocate, formats, quantized_view, resharding
from lightning_optim.core.state.formats import COMPENSATION, RADIUS, StateFormat, scale_key
from lightning_optim.core.step import (
    averaging_methods,
    backward_fusion,
    compiled,
    constraints,
    curvature_input,
    joint_preconditioning,
    line_search,
    weight_averaging,
)
from lightning_optim.core.step.refresh_scheduler import Refreshes
from lightning_optim.core.step.work import (
    Job,
    Refresh,
    Work,
    apply,
    check_scales,
    count,
    first_index,
    forms_of,
    needs_param,
    portions,
    stack_key,
    state_beside,
    takes_kernel,
    takes_kernels,
    update_elementwise,
    update_stack,
    work_of,
)
from lightning_optim.ops.lapack import failures

ParamsT = Iterable[Tensor] | Iterable[dict[str, Any]] | Iterable[tuple[str, Tensor]]


class RuleOptimizer(torch.optim.Optimizer):
    """Runs any mix of rules, one per param group.

    Every group is a dictionary with `params`, `rule` (a registered name) and, where they differ from the defaults,
    the rule's hyperparameters, a unique `name` and the options:

    * `lr_convention`: `"native"` is the published scale; `"adamw"` scales the direction to AdamW's RMS (0.2 per unit
      lr), so that AdamW's learning rate stays valid.
    * `on_nonfinite`: before the first write of a step, `"raise"` FloatingPointError, `"skip"` the step, or `"off"`.
      Default: off for elementwise rules, as in torch; raise for the others, of which one NaN destroys a whole matrix.
      For these a gradient counts as not finite, too, if its squares overflow, unless the group has `clip_norm`.
    * `param_rounding`: how bfloat16 weights are rounded: `"stochastic"`, `"nearest"`, or `"kahan"`, to nearest with
      what was lost kept in one more narrow tensor (float16 weights: to nearest unless `"kahan"`).
    * `state_storage`: how state rests between steps; arithmetic is float32 always. `"fp32"`; `"bf16"`, rounded
      stochastically; `"int8"`, codes of the dynamic map with one scale per `storage_block` (256) elements;
      `"int8_grid"`, the same codes, rounded faster and coarser, as bitsandbytes does on a CPU; `"fp8"`, e4m3 with
      such scales; `"host"`, pinned memory of the host for parameters on CUDA. Tensors with fewer than
      `storage_min` (4096) elements, square factors, bases and row or column statistics stay float32 (all but the
      small ones go to the host). Settings come back with a checkpoint; another storage, set later, converts.
    * `transposed`: matrices are stored inputs x outputs (Transformers' Conv1D); rules see outputs as rows.
    * `constraint`: `"hyperball"` keeps the norm of every matrix and makes lr the angle of a step, for any rule; with
      `lr_convention="adamw"` the step is as long as AdamW's. Needs weights that are not zero.
    * `uw_floor`: the least norm of the step per unit lr, as a share of the norm of the weights, by `uw_floor_by`
      `"matrix"` or `"row"`; 0 for none.
    * `radial_damping`: share that is left of what moves the weights of a matrix outwards; 1 for all.
    * `pin`: after the step, set the norm of every matrix to what the radial part of the step alone makes of it.
    * `cautious_decay`: decay, at this rate, of only the weights that the step moves towards zero; True for the rate
      `weight_decay`, which then decays nothing else. By `cautious_when` `"before"` the step (and of weights it does not
      move), or `"after_pin"`. `lightning_optim.core.step.constraints` has the formulas of these six, in their order.
    * `blocks`: how the rows of every matrix are cut into matrices: a number of equal blocks (heads, a fused QKV), or
      the rows of one block after the other, repeated until the rows are used up: `(8, 4, 4)` for 8 rows of queries, 4
      of keys and 4 of values, `(1, 1)` for alternate rows.
    * `clip_norm`: scale the gradients of the group by `clip_norm / norm` if their common norm, over the whole mesh, is
      larger. Unlike a trainer's clipping it does not let one group's norm shrink another's, and leaves `p.grad` alone.
    * `comm_dtype`: how gradients travel to the rank that works on a matrix, and directions back: `"exact"`, in their
      own dtypes, or `"bf16"`.
    * `compile`: step large parameters of elementwise and reducing rules by compiled graphs (`core.compiled`): fewest
      passes over memory, one graph per rule, whatever the step, the learning rate and the sizes; results differ by
      rounding. Made when the group is added, which takes seconds and, on a CPU, a C++ compiler. Rules with a fused
      kernel of torch's keep it for state that rests as values. A checkpoint does not change it.
    * `seed`: of the stochastic rounding of weights and state and of random projections.

    `defaults` name a momentum as torch's optimizers do, so `OneCycleLR`, `CyclicLR` and Lightning's monitor work: each
    group answers to `momentum` and to `betas`, whichever its rule has (`groups.ParamGroup`).

    `wrap` adds look-ahead, averages and an outer optimizer; `train()` and `eval()` then change between the weights to
    train and those to evaluate. `total_steps`, if set, is the length of the run, which the doors of the trainers know;
    `curve` is the schedule that `build_optimizer` was given (`lightning_optim.schedule.ScheduleConfig`).

    Where a rule has costly state, its setting `refresh` says when that is computed anew (`lightning_optim.refresh`);
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

    def __init__(
        self, params: ParamsT, defaults: Mapping[str, Any] | None = None, *, max_temp_bytes: int = 2**25
    ) -> None:
        self._start(max_temp_bytes)
        super().__init__(cast("Any", params), dict(defaults or {}))
        for key in ("lr", "weight_decay"):
            self.defaults.setdefault(key, self.param_groups[0][key])
        self._complete = True
        self._offer_momentum()
        engines.validate_engine(lookup(group["rule"]) for group in self.param_groups)

    divide: Callable[[dict[str, Any]], Sequence[dict[str, Any]]] | None
    """Gives a group that is added without a rule as groups with rules; set by `build_optimizer`."""

    has_curvature: bool
    """Whether somebody measures what rules with `curvature_input` need; they refuse to step otherwise."""

    loss_oracle: line_search.LossOracle | None
    """The loss of the coming step's batches, for rules that search; told by the curvature feed, dropped by the step."""

    bias_of: WeakTensorKeyDictionary
    """The bias of a layer by its weight, for rules with `joint`; told by the curvature feed."""

    _step_supports_amp_scaling: bool
    """Of GradScaler; set while the backward pass is fused."""

    def _start(self, max_temp_bytes: int = 2**25) -> None:
        self.max_temp_bytes = max_temp_bytes
        self._complete = False
        self.divide = None  # not on the class, where Lightning's wrapper of an optimizer would find it
        self._given: dict[str, list[tuple[int, torch.Size | None]]] = {}
        self._owners: dict[Tensor, int] = {}  # no weak references: `Module.to` could not swap a DTensor that has one
        self._loads: dict[Any, list[float]] = {}
        self._meeting = guard.CollectiveGuard()
        self._compared = False
        self._gathered: dict[Tensor, dict[str, Tensor]] = {}
        self._refreshes = Refreshes()
        self.on_refresh: Callable[[Refresh], None] | None = None
        self.process_group: Any = None
        self.replicas: replicas.Replicas | None = None
        self.compressing: replicas.Replicas | None = None
        self._averaged = False
        self.fused: backward_fusion.FusedBackward | None = None
        self.averages: weight_averaging.Averages | None = None
        self.curve: Any = None
        self._total_steps: int | Callable[[], int | None] | None = None
        self.has_curvature = False
        self.loss_oracle = None
        self.bias_of: WeakTensorKeyDictionary = WeakTensorKeyDictionary()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied optimizer."""
        if not hasattr(self, "_meeting"):
            self._start()
            self._complete = True
        super().__setstate__(state)
        self.param_groups[:] = map(ParamGroup, self.param_groups)
        if not self._given:
            for group in self.param_groups:
                self._remember(group)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied."""
        kept = {key: getattr(self, key) for key in ("max_temp_bytes", "averages", "curve")}
        return super().__getstate__() | kept | {"_total_steps": self.total_steps}

    @property
    def total_steps(self) -> int | None:
        """The length of the run, None where it is not known; may be set to what is to be called for it."""
        return self._total_steps() if callable(self._total_steps) else self._total_steps

    @total_steps.setter
    def total_steps(self, steps: int | Callable[[], int | None] | None) -> None:
        self._total_steps = steps

    # -- groups ---------------------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, completed by its rule's defaults and checked.

        If `build_optimizer` made this optimizer, a group that names no rule is divided: every parameter gets the rule
        and settings it would have had from the start. What the group gives goes before; its lr is that of the main
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
            backward_fusion.validate_fusion(rule_of(group), group, ())
        if self.averages is not None:
            self.averages.join(group)
            group |= {k: self.param_groups[0][k] for k in averaging_methods.COUNTERS}
        if group["compile"]:
            compiled.validate_compile(
                rule_of(group), group, [x[1] if isinstance(x, tuple) else x for x in group["params"]]
            )
        super().add_param_group(group)
        self._remember(group)
        for key in foreign:
            del group[key]
        if self._complete:
            self._offer_momentum()
        if self.fused is not None:
            self.fused.watch()

    def _offer_momentum(self) -> None:
        """Keep in `defaults` the names under which torch's schedules and Lightning's monitor look for a momentum."""
        rule = self.defaults.get("rule", self.param_groups[0]["rule"])
        own = settings_of(lookup(rule))
        for key in (momentum_field(lookup(rule)), momentum_names(self.param_groups)):
            if key in MOMENTUM_NAMES:
                self.defaults.setdefault(key, own[key] if key in own else self.param_groups[0][key])

    def _remember(self, group: Mapping[str, Any]) -> None:
        """Note which parameters a group was given, to recognize what an engine puts in their place."""
        self._given[group["name"]] = [(id(p), None if is_lazy(p) else p.shape) for p in group["params"]]

    def flat_tensors(self, group: Mapping[str, Any]) -> list[Tensor]:
        """The flat tensors that an engine (DeepSpeed ZeRO) has put in the place of a group's parameters.

        A parameter may be replaced by a copy, or by a shard of the same shape (FSDP2); then the result is empty.

        Args:
            group: of `param_groups`.

        Returns:
            One-dimensional tensors that the group was not given, where it was given other shapes or more parameters.
        """
        given, params = self._given.get(group["name"], []), group["params"]
        known, out = {number for number, _ in given}, []
        for i, p in enumerate(params) if given else ():
            if id(p) in known or p.ndim != 1:
                continue
            shape = given[i][1] if i < len(given) else None
            # a vector of the user's own may replace another; DeepSpeed's flat tensors are no Parameters
            vector = shape is None or shape == p.shape or (len(shape) == 1 and isinstance(p, torch.nn.Parameter))
            if len(params) < len(given) or not vector:
                out.append(p)
        return out

    def _check_params(self, jobs: Sequence[Job]) -> None:
        """Check that rules can take the parameters that have no state yet: as they are now, not when they were added.

        A parameter may have been frozen or without a shape then, or an engine may have replaced it.

        Raises:
            ValueError: they cannot.
        """
        for rule, group, works in jobs:
            new = [w for w in works if not w.state]
            if new:
                self._check_replaced(rule, group)
            for w in new:
                validate_param(rule, w.name, w.param, group)

    def _check_replaced(self, rule: Rule, group: Mapping[str, Any]) -> None:
        """Refuse flat tensors that a rule, or the group's settings, cannot step in the place of parameters."""
        for p in self.flat_tensors(group):
            names = ", ".join([*group.get("param_names", ("parameters",))[:3], "..."])
            where = f"group {group['name']!r} ({names}), which DeepSpeed (or a like engine) has made a flat tensor"
            check_flat(rule, where, p, group)
            if self.averages is not None:
                raise ValueError(f"{where}: the averages of `wrap` would not reach the model; {REMEDY}")

    # -- step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Take one step.

        Args:
            closure: computes the loss and the gradients; called once, first. Rules that search call it again, unless a
                curvature feed gives them the loss.

        Returns:
            What the closure returned.

        Raises:
            FloatingPointError: a gradient is not finite and its group asks to raise; nothing was written.
            RuntimeError: a sparse gradient, a parameter whose shape is no longer that of its state or gradient, or
                ranks that disagree on which parameters have a gradient or, at the first step, on the groups; nothing
                was written.
        """
        with failures.collected():
            return self._whole_step(closure)

    def _whole_step(self, closure: Callable[[], Any] | None) -> Any:
        """Take one step, and what averages do before and after it; what the closure returned."""
        if self.averages is None:
            return self._step(closure)[0]
        self._check_shapes(self._jobs(frozen=True), gradients=False)
        self.averages.begin(self, closure=closure is not None)
        taken = False
        try:
            loss, taken = self._step(closure)
        finally:
            self.averages.end(self, taken=taken, closure=closure is not None)
        return loss

    def _step(self, closure: Callable[[], Any] | None) -> tuple[Any, bool]:
        """Take one step; what the closure returned, and whether anything was written."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        look, self.loss_oracle = self.loss_oracle, None
        jobs = list(self._jobs())
        self._check_shapes(jobs)
        self._check_params(jobs)
        if not self._compared:
            self._compare(jobs)
        self._refreshes.spread(jobs, self.process_group)
        if not self.state and self._only_materialises(jobs):
            self._materialise(jobs)
            return loss, False
        if self.averages is not None:
            self.averages.check_total(self)
        if self.fused is not None:
            self.fused.finish(jobs)
            return loss, True
        asked = [job.rule.name for job in jobs if job.rule.curvature_input == "loss"]
        if look is None and closure is not None and asked:
            look = line_search.ClosureOracle(closure, loss, asked[0])
        return loss, self._take(jobs, self._clip, look)

    def wrap(self, *members: averaging_methods.AveragingMethod) -> Self:
        """Do more with the weights around every step (`lightning_optim.core.step.weight_averaging`).

        Args:
            members: `EMANesterov`, `TailEMA` or `MuLoCo`, each at most once.

        Returns:
            The optimizer.

        Raises:
            ValueError: wrapped already, two that do not go together, or weights that are too narrow.
        """
        if self.averages is not None:
            raise ValueError("wrap: give everything in one call")
        self.averages = weight_averaging.Averages(self, members)
        return self

    def eval(self) -> None:
        """Put the weights to evaluate or to save in the place of those to train; nothing where they are the same."""
        if self.averages is not None:
            self._check_shapes(self._jobs(frozen=True), gradients=False)
            with torch.inference_mode(False), torch.no_grad():
                self.averages.eval(self)

    def is_sharded(self) -> bool:
        """Whether a rank holds parts of parameters only: checkpoints of that kind are to be made after `train()`.

        Returns:
            True under FSDP2 and tensor parallelism.
        """
        return any(sharding.sharding_of(p) is not None for group in self.param_groups for p in group["params"])

    def train(self) -> None:
        """Put the weights to train back, bit for bit."""
        if self.averages is not None:
            self._check_shapes(self._jobs(frozen=True), gradients=False)
            with torch.inference_mode(False), torch.no_grad():
                self.averages.train(self)

    def pending_curvature(self) -> dict[str, list[Tensor]]:
        """What is to be measured before the next step.

        Returns:
            Trainable parameters by what their rules observe; empty in most steps.
        """
        jobs = list(self._jobs())
        self._check_params(jobs)
        return curvature_input.due(jobs)

    @torch.no_grad()
    def update_curvature(self, seen: Mapping[Tensor, curvature_input.Estimate]) -> dict[str, float]:
        """Hand over what was measured of parameters; `lightning_optim.curvature` does so for models.

        Nothing is taken in while a gradient cannot be used: the step is going to be refused, here or by a GradScaler.

        Args:
            seen: by parameter, fields as in `Rule.observe`.

        Returns:
            What the rules have to say of it, averaged over all elements of the parameters: `win_rate` of Sophia.

        Raises:
            ValueError: a parameter whose rule observes nothing.
            RuntimeError: a parameter whose shape is no longer that of its state or gradient; nothing was written.
        """
        self.has_curvature = True
        every = list(self._jobs())
        self._check_shapes(every)
        jobs = curvature_input.chosen(every, seen)
        works = [w for job in every for w in job.works]
        squared = {
            id(w) for rule, group, ws in every if group["on_nonfinite"] != "off" for w in ws if _squares(rule, group)
        }
        given = [w for w in works if (g := w.param.grad) is not None and g.layout == torch.strided]
        if self._agree_max([float(_unusable([(w, id(w) in squared) for w in given]))], works)[0]:
            return {}
        self._materialise(jobs)
        return curvature_input.update_curvature(jobs, seen)

    def fuse_backward(self) -> backward_fusion.FusedBackward:
        """From now on, step every parameter within the backward pass and free its gradient at once.

        Returns:
            What does so, see there; `optimizer.fused`, too.

        Raises:
            ValueError: a rule or setting for which that cannot be.
        """
        self.fused = self.fused or backward_fusion.FusedBackward(self)
        return self.fused

    def shard_work(self, group: Any = None) -> None:
        """From now on, share out the matrices of whole-matrix rules over replicas (DDP), to be called on all of them.

        Each matrix is worked on, and its state kept, by one rank of the group; the directions go to all others. Ranks
        of a group must have equal gradients; a group within a node keeps the traffic there. Before one rank saves
        alone, `consolidate` is to be called on all.

        Args:
            group: process group of the replicas; of all ranks, if not given.

        Raises:
            ValueError: there is state already, or the work is to be done within the backward pass.
        """
        if self.state or self.fused is not None:
            raise ValueError(
                "shard_work comes before the first step and before a checkpoint is loaded, without fused_backward"
            )
        team = replicas.replicas_of(group)
        if team is not None:
            self.replicas, self.process_group = team, team.group

    def compress(self, module: Any) -> None:
        """From now on, reduce the gradients of a DistributedDataParallel module here, where a rule can send less.

        `dion` sends its low-rank factors, `signum` and `signsgd` vote on signs, one byte per element; the gradients of
        other rules are averaged in the step. To be called on all ranks before the first backward pass. What replicas
        then keep of their own gradients is averaged by `consolidate`, which has to precede `state_dict` on every rank,
        also where all of them call it.

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
        self.compressing = replicas.leave_gradients(module)
        self.process_group = self.compressing.group

    def _take(
        self, jobs: Sequence[Job], clip: Callable[[Sequence[Job]], None], look: line_search.LossOracle | None = None
    ) -> bool:
        """Step the parameters that have a gradient; whether the step was taken."""
        curvature_input.require_curvature(jobs, fed=self.has_curvature, look=look is not None)
        if not self._gradients_usable(jobs):
            return False
        if self.compressing is not None:
            reduced = [w for job in jobs for w in job.works if w.has_gradient and w.replicas is None]
            self.compressing.average_([w.gradient() for w in reduced])
        clip(jobs)
        self._gathered, self._averaged = {}, False
        self._materialise(jobs)
        present = [(job.group, [w for w in job.works if w.has_gradient]) for job in jobs]
        for group, works in present:
            constraints.check_first(group, works)
        if look is not None:
            line_search.search(jobs, look)  # the last that may refuse the step
        count([w for _, works in present for w in works])
        trips = [trip for job in jobs for trip in self._trips(job)]
        for trip in trips:
            next(trip)
        joint_preconditioning.precondition_jointly(jobs, self.bias_of, self._decide)
        for job in jobs:
            self._run(job)
        for trip in (*trips, *trips):
            next(trip, None)
        return True

    def _decide(self, job: Job, works: Sequence[Work]) -> None:
        self._refreshes.decide(job, works, lambda w: w.gradient(), self.on_refresh)

    def _jobs(self, *, frozen: bool = False) -> Iterator[Job]:
        """Rule, settings and trainable (or also frozen) parameters of every group, read afresh."""
        index = 0
        for group in self.param_groups:
            rule = rule_of(group)
            names, works = group.get("param_names", []), []
            own = self.compressing if rule.compresses or rule.votes else None
            blocks, turned = reading_of(rule, group)
            for i, p in enumerate(group["params"]):
                if not is_lazy(p) and (frozen or _is_trained(p)) and p.numel():
                    name = f"{group['name']}: {names[i] if i < len(names) else f'parameter {i}'}"
                    try:
                        parts = matrix_views.split_blocks(p.shape, blocks, conv=not rule.last_two, transposed=turned)
                    except ValueError as error:
                        raise ValueError(f"{name}: {error}") from None
                    team = self._team(rule, p, parts, turned, name)
                    works.append(Work(p, name, index, parts, self.state.get(p, {}), turned, team, own))
                index += 1
            yield Job(rule, group, works)

    def _team(
        self, rule: Rule, p: Tensor, parts: Sequence[matrix_views.MatrixBlock], turned: bool, name: str
    ) -> exchange.Team | None:
        """Ranks of which one works on a parameter; None where each works on what it has."""
        if rule.elementwise or rule.needs_all_gradients:
            return None
        cut = sharding.sharding_of(p, name)
        if cut is None:
            return None if rule.reduces else self.replicas
        return None if rule.reduces and stack_sharding.sums_on_shards(p, parts, turned) else cut

    def _run(self, job: Job) -> None:
        """Step what does not travel."""
        present = [w for w in job.works if w.has_gradient and w.team is None]
        if job.rule.elementwise:
            for w in self._without_kernel(job, present):
                update_elementwise(job, w)
        elif job.rule.reduces:
            self._reduces(job, present)
        else:
            if not job.rule.needs_all_gradients:
                self._decide(job, present)
            self._whole(job, present)

    def _trips(self, job: Job) -> Iterator[Iterator[None]]:
        """The journeys of the matrices that travel: one for each team and dtype."""
        travelling = [(w, w.team) for w in job.works if w.team is not None]
        for run in matrix_views.bucket(travelling, lambda x: (x[1].ranks, x[0].param.dtype)):
            if any(w.has_gradient for w, _ in run):  # on every rank, or on none
                yield self._travel(job, [w for w, _ in run], [team for _, team in run])

    def _without_kernel(self, job: Job, works: list[Work]) -> list[Work]:
        """Step what a torch kernel of the rule can take; return the rest."""
        if type(job.rule).kernel is Rule.kernel or not takes_kernels(job.group):
            return works
        slots = list(job.rule.state_specs(1, 1))
        rest: list[Work] = []
        runs = matrix_views.bucket(works, lambda w: (w.t, w.param.dtype, w.param.device))
        for run in (portion for same in runs for portion in portions(same, self.max_temp_bytes)):
            ready: list[Work] = []
            columns: list[list[Tensor]] = [[] for _ in range(2 + len(slots))]
            device = sharding.local(run[0].param).device
            for w in run:
                row = [sharding.local(w.param), w.gradient(), *[sharding.local(w.state[k]) for k in slots]]
                direct = all([form.direct(device) for form in w.forms.values()])
                if direct and takes_kernel(job, w) and matrix_views.same_strides(row):
                    ready.append(w)
                    for column, t in zip(columns, row, strict=True):
                        column.append(t)
                else:
                    rest.append(w)
            p, g, *state = columns
            if ready and job.rule.kernel(p, g, dict(zip(slots, state, strict=True)), ready[0].t) is None:
                rest += ready
        return rest

    def _reduces(self, job: Job, works: list[Work]) -> None:
        frames = {id(w): stack_sharding.StackSharding(w.param, w.dims, w.name, w.transposed) for w in works}
        for run in matrix_views.bucket(works, lambda w: (stack_key(w), frames[id(w)].cut)):
            frame = frames[id(run[0])]
            elements = sharding.local(run[0].param).numel() if frame.stackable else matrix_views.STACK_LIMIT + 1
            for chunk in matrix_views.stacks(run, elements, self.max_temp_bytes):
                update_stack(job, chunk, [sharding.local(w.param) for w in chunk], [w.gradient() for w in chunk], frame)

    def _whole(self, job: Job, works: list[Work]) -> None:
        for run in matrix_views.bucket(works, stack_key):
            for chunk in matrix_views.stacks(run, run[0].param.numel(), self.max_temp_bytes, state_beside(run[0])):
                update_stack(job, chunk, [sharding.local(w.param) for w in chunk], [w.gradient() for w in chunk])

    def _travel(self, job: Job, works: list[Work], teams: list[exchange.Team]) -> Iterator[None]:
        """Bring matrices to their owners and the directions back; yields while they are on their way.

        Splits are static: a parameter without a gradient travels as zeros, and its direction is not applied.
        """
        wire = torch.bfloat16 if job.group["comm_dtype"] == "bf16" else None
        trip = exchange.make_exchange(teams, [w.param.shape for w in works], [self._owners[w.param] for w in works])
        arriving = trip.to_owners([w.gradient() for w in works], wire)
        beside = trip.to_owners([sharding.local(w.param) for w in works]) if needs_param(job.rule) else None
        yield
        gradients = arriving()
        params = gradients if beside is None else beside()
        directions = {i: torch.zeros_like(g, dtype=formats.compute_dtype_of(g.dtype)) for i, g in gradients.items()}
        at = {id(works[i]): i for i in trip.mine}

        def keep(w: Work, d: Tensor) -> None:
            directions[at[id(w)]] = d

        mine = [works[i] for i in trip.mine if works[i].has_gradient]
        self._refreshes.decide(job, mine, lambda w: gradients[at[id(w)]], self.on_refresh)
        for run in matrix_views.bucket(mine, stack_key):
            for chunk in matrix_views.stacks(run, run[0].param.numel(), self.max_temp_bytes, state_beside(run[0])):
                here = [at[id(w)] for w in chunk]
                update_stack(job, chunk, [params[i] for i in here], [gradients[i] for i in here], sink=keep)
        like = sharding.local(works[0].param).new_empty((), dtype=formats.compute_dtype_of(works[0].param.dtype))
        returning = trip.from_owners(directions, like, wire)
        yield
        for w, d in zip(works, returning(), strict=True):
            if w.has_gradient and not job.rule.skips_update(w.t):
                apply(job, w, d.view_as(sharding.local(w.param)))

    # -- what precedes the first write ----------------------------------------------------------------------------

    def _check_shapes(self, jobs: Iterable[Job], *, gradients: bool = True) -> None:
        """Check that every parameter still has the shape of its state and, if asked, of its gradient.

        On ranks that keep no values of a parameter, empty slots have the shape of what the owner keeps, so that all
        ranks come to the same answer.

        Raises:
            RuntimeError: a parameter was resized in place; the message names it, both shapes and what to do.
        """
        for rule, group, works in jobs:
            known: dict[tuple[Any, ...], dict[str, StateFormat]] = {}
            for w in works:
                p, g = w.param, w.param.grad
                if gradients and g is not None and g.shape != p.shape and g.shape != sharding.local(p).shape:
                    raise RuntimeError(
                        f"{w.name} has shape {tuple(p.shape)}, its gradient {tuple(g.shape)}: it was resized after the "
                        "backward pass; nothing was updated. Call zero_grad() and take the gradient again"
                    )
                if not w.state:
                    continue
                kind = p.shape, p.dtype
                if kind not in known:
                    known[kind] = forms_of(Job(rule, group, []), w)
                w.forms = forms = known[kind]
                missing = ""
                for key, form in forms.items():
                    held = w.state.get(key)
                    if held is None:
                        missing = key
                    elif held.shape != form.shape and held.shape != (0, *form.shape):
                        _refuse_resized(w, key, held.shape, form.shape)
                    elif form.is_quantized and held.dtype == form.dtype:
                        check_scales(rule, w, key)
                if missing or len(w.state) > len(forms) + 1:  # more than slots and "step"
                    self._check_beside(w, missing)

    def _check_beside(self, w: Work, missing: str) -> None:
        """Check what is kept for a parameter beside the slots that its rule declares for the present shape."""
        for key in self._foreign(w) if missing and w.state.get("step") else ():
            _refuse_resized(w, key, w.state[key].shape, w.forms[missing].shape, missing)
        for key in (COMPENSATION, averaging_methods.TRAINED, *(() if self.averages is None else self.averages.keys)):
            held = w.state.get(key)
            if held is not None and held.shape != w.param.shape:
                _refuse_resized(w, key, held.shape, w.param.shape)
        radius, count = w.state.get(RADIUS), sum(part.dims[0] for part in w.parts)
        if radius is not None and radius.numel() != count:
            _refuse_resized(w, RADIUS, radius.shape, (count,))

    def _foreign(self, w: Work) -> list[str]:
        """Slots of a parameter that its rule would not declare for the present shape."""
        known = {"step", COMPENSATION, RADIUS, averaging_methods.TRAINED, *w.forms, *map(scale_key, w.forms)}
        known.update(() if self.averages is None else self.averages.keys)
        return [key for key, held in w.state.items() if key not in known and isinstance(held, Tensor)]

    def _only_materialises(self, jobs: Sequence[Job]) -> bool:
        """Whether this is DCP's dummy step: every lr 0, every parameter with a gradient, every gradient 0."""
        if any(float(job.group["lr"]) != 0.0 for job in jobs):
            return False
        works = [w for job in jobs for w in job.works]
        complete = bool(works) and all(w.has_gradient for w in works)
        moving = not complete or _largest([w.gradient() for w in works]) != 0.0
        return not self._agree_max([float(moving)], works)[0]

    def _gradients_usable(self, jobs: Sequence[Job]) -> bool:
        """Check all gradients before anything is written; one synchronisation if any group asks for it."""
        asked: dict[str, list[tuple[Work, bool]]] = {"raise": [], "skip": []}
        talking: list[Work] = []
        for rule, group, works in jobs:
            squared = _squares(rule, group)
            for w in works:
                if w.param.grad is not None:
                    if w.param.grad.layout != torch.strided:
                        raise RuntimeError(f"{w.name}: sparse gradients are not supported; use sparse=False")
                    if group["on_nonfinite"] != "off":
                        asked[group["on_nonfinite"]].append((w, squared))
            free = rule.elementwise and group["on_nonfinite"] == "off" and not constraints.shapes_step(group)
            if not free or self.compressing is not None:
                talking += works
        if not talking:
            return True
        bad = [float(_unusable(some)) for some in asked.values()]
        bits = float(guard.fingerprint(w.has_gradient for w in talking))
        fail, skip, high, low = self._agree_max([*bad, bits, -bits], talking)
        if high != -low:
            raise RuntimeError("ranks disagree on which parameters have a gradient; nothing was updated")
        if fail:
            where = [w.name for w, squared in asked["raise"] if _unusable([(w, squared)]) == fail]
            names = ", ".join(where[:5]) or "on another rank"
            if fail == TOO_LARGE:
                raise FloatingPointError(
                    f"gradient too large: {names}. It is finite, but its squares overflow (a norm above 1.8e19 in "
                    "float32), which would ruin the state; nothing was updated. Clip gradients (clip_norm, or the "
                    'trainer\'s clipping), or leave such steps out with on_nonfinite="skip"'
                )
            raise FloatingPointError(
                f'gradient not finite: {names}; nothing was updated. on_nonfinite="skip" leaves such steps out'
            )
        return not skip

    def _agree_max(self, values: Sequence[float], works: Sequence[Work]) -> list[float]:
        replicas = self.replicas or self.compressing
        group = None if replicas is None else replicas.group
        return collectives.all_reduce_max(values, [w.param for w in works], group)

    def _compare(self, jobs: Sequence[Job]) -> None:
        """Check that all ranks that train together have the same groups."""
        ranks = set(collectives.ranks_of(w.param for job in jobs for w in job.works))
        ranks.update(() if self.process_group is None else replicas.Replicas(self.process_group).ranks)
        if len(ranks) > 1:
            lines: list[str] = []
            for _, group, works in jobs:
                lines.append(repr({k: v for k, v in group.items() if k not in ("params", "param_names")}))
                lines += [f"{w.name} {tuple(w.param.shape)}" for w in works]
            self._meeting.compare(sorted(ranks), lines)
        self._compared = True

    def _clip(self, jobs: Sequence[Job]) -> None:
        """Find the factor of every group that clips, by torch's formula; one synchronisation if any does."""
        asked = [job for job in jobs if job.group["clip_norm"] is not None]
        sets = [[(w.param, w.gradient() if w.has_gradient else None) for w in job.works] for job in asked]
        for job, norm in zip(asked, collectives.total_norms(sets), strict=True):
            scale = job.group["clip_norm"] / (norm + 1e-6)
            for w in job.works:
                w.scale = 1.0 if scale >= 1 else scale

    # -- state ----------------------------------------------------------------------------------------------------

    def _materialise(self, jobs: Sequence[Job]) -> None:
        """Allocate the state of every trainable parameter that has none: complete, in its final shape."""
        self._check_params(jobs)
        self._assign_owners(jobs)
        for rule, group, works in jobs:
            known: dict[tuple[Any, ...], tuple[dict[str, StateFormat], bool, bool]] = {}
            for w in works:
                p = w.param
                kind = p.shape, p.dtype
                if kind not in known:
                    narrow = formats.compensated(p.dtype, group), formats.keeps_radius(p.dtype, group)
                    known[kind] = dict(w.forms) or forms_of(Job(rule, group, []), w), *narrow
                w.forms, compensated, has_radius = known[kind]
                if not w.state:
                    w.state = self.state.setdefault(w.param, {})
                if "step" not in w.state:
                    w.state["step"] = torch.zeros((), device="cpu", dtype=torch.float32)
                for key, form in w.forms.items():
                    held = w.state.get(key)
                    if held is None or held.dtype != form.dtype:
                        self._allocate(rule, form, w, key)
                if compensated and COMPENSATION not in w.state:
                    w.state[COMPENSATION] = torch.zeros_like(p, requires_grad=False)
                if has_radius and RADIUS not in w.state:
                    count = sum(part.dims[0] for part in w.parts)
                    w.state[RADIUS] = torch.zeros(count, device=sharding.local(w.param).device)
                if self.averages is not None:
                    self.averages.materialise(w.param, w.state)

    def _allocate(self, rule: Rule, form: StateFormat, w: Work, key: str) -> None:
        """Give a slot its start value, or what it held in another form.

        It is empty on a rank that does not own the matrix, so that all ranks have all keys.

        Raises:
            ValueError: a mesh on which the group's storage does not work.
        """
        device = sharding.local(w.param).device
        cut = sharding.sharding_of(w.param, w.name) if form.is_quantized or not rule.elementwise else None
        if isinstance(cut, sharding.Sharding) and form.kind == "host" and not form.direct(device):
            raise ValueError(f"{w.name}: state_storage='host' needs whole parameters; FSDP2 has its CPUOffloadPolicy")
        if w.team is not None:
            here = self._owners[w.param] == w.team.rank
            like = torch.empty(w.param.shape if here else 0, dtype=w.param.dtype, device=device)
            if here:
                made = allocate.allocate(form, like, form.shape)
            else:  # the shape tells of which whole slot, see `_check_shapes`
                made = like.new_empty((0, *form.shape), dtype=form.dtype)
        elif rule.reduces:
            made = stack_sharding.StackSharding(w.param, w.dims, w.name, w.transposed).allocate(form)
        elif cut is None and not form.is_quantized:
            made = allocate.allocate(form, w.param, form.shape)
        else:
            part = sharding.local(w.param)
            shape = part.shape if rule.elementwise else form.shape
            made = allocate.allocate(form, part, shape)
            made = sharding.wrapped_like(made, w.param) if rule.elementwise else made
        held, scale = w.state.get(key), w.state.get(scale_key(key))
        start = first_index(rule, form, w)
        fresh = allocate.allocate_scale(form, sharding.local(made), start) if form.is_quantized else None
        if held is not None:
            quantized_view.convert(form, sharding.local(held), scale, sharding.local(made), fresh, start)
        w.state[key] = made
        if fresh is not None:
            w.state[scale_key(key)] = fresh
        else:
            w.state.pop(scale_key(key), None)

    def _assign_owners(self, jobs: Sequence[Job]) -> None:
        """Give every travelling matrix that has none an owner; work is balanced over all of them together."""
        fresh = [(w, w.team) for job in jobs for w in job.works if w.team is not None and w.param not in self._owners]
        if fresh:
            known = {id(p) for group in self.param_groups for p in group["params"]}
            self._owners = {p: owner for p, owner in self._owners.items() if id(p) in known}
        for run in matrix_views.bucket(fresh, lambda x: x[1].ranks):
            loads = self._loads.setdefault(run[0][1].ranks, [0.0] * run[0][1].size)
            for (w, _), owner in zip(
                run, ownership.assign_owners([work_of(w.parts) for w, _ in run], loads), strict=True
            ):
                self._owners[w.param] = owner

    def _entries(self, jobs: Sequence[Job], keep: Callable[[Tensor, str], bool]) -> list[resharding.Entry]:
        """Every slot of every parameter whose matrices travel, and the tables of scales of the quantised ones."""
        out = []
        for job, w in ((x, w) for x in jobs for w in x.works):
            if w.team is not None and w.param in self._owners:
                team = w.team.by_rows if isinstance(w.team, sharding.Sharding) else w.team
                owner = self._owners[w.param]
                for key, form in forms_of(job, w).items():
                    scaled = form.is_quantized and keep(w.param, scale_key(key))
                    dtype = form.dtype if scaled or not form.is_quantized else form.wide
                    if keep(w.param, key):
                        out.append(resharding.Entry(w.param, key, form.shape, dtype, team, owner))
                    if scaled:
                        table = scale_key(key), resharding.table_shape(form), torch.float32
                        out.append(resharding.Entry(w.param, *table, team, owner))
        return out

    def _content(self) -> str:
        return repr([(g["name"], [tuple(p.shape) for p in g["params"]]) for g in self.param_groups])

    def state_dict(self) -> dict[str, Any]:
        """State and settings; whole matrices of sharded parameters come as row-sharded DTensors (a collective call).

        Where replicas share the work, it is one too, unless `consolidate` was called before.

        Returns:
            As torch's: plain values and tensors only, loadable with `weights_only=True`.

        Raises:
            RuntimeError: in a collective call, when some rank does not make it; a parameter whose shape is no longer
                that of its state.
        """
        known = {id(p) for group in self.param_groups for p in group["params"]}
        for p in [p for p in self.state if isinstance(p, Tensor) and id(p) not in known]:
            del self.state[p]
        trained = self.state
        self.state = self._saved() if trained else trained
        try:
            out = super().state_dict()
        finally:
            self.state = trained
        out["param_groups"] = [plain(group) for group in out["param_groups"]]
        return out

    def consolidate(self) -> None:
        """Collect the state that replicas share out (`shard_work`), for calls of `state_dict` until the next step.

        What each has of its own gradients (`compress`) is averaged, here too, so that going on and resuming are the
        same. A collective call, to be made on every rank before one of them saves; without either it does nothing.

        Raises:
            RuntimeError: some rank does not make this call.
        """
        if self.compressing is not None:
            works = [(w, job.rule.compresses) for job in self._jobs(frozen=True) for w in job.works]
            self.compressing.average_([w.state[k] for w, slots in works for k in slots if k in w.state])
            self._averaged = True
        if self.replicas is None or not self.state:
            return
        self._gathered, saved = {}, self._saved()
        for job in self._jobs(frozen=True):
            for w in job.works:
                if isinstance(w.team, replicas.Replicas) and w.param in saved:
                    here, forms = self._owners.get(w.param) == w.team.rank, forms_of(job, w)
                    keys = {*forms, *map(scale_key, forms)}
                    sent = {k: v for k, v in saved[w.param].items() if k in keys}
                    self._gathered[w.param] = {k: v if here else v.cpu() for k, v in sent.items()}

    def _saved(self) -> defaultdict[Tensor, dict[str, Tensor]]:
        """State as it rests in a checkpoint."""
        if self.compressing is not None and not self._averaged:
            raise RuntimeError(
                "replicas have momenta of their own: call consolidate() on all ranks before state_dict()"
            )
        trained, jobs = self.state, list(self._jobs(frozen=True))
        whole = [Job(r, g, [w for w in ws if not is_flat(w.param)]) for r, g, ws in jobs]  # others change their shapes
        self._check_shapes(whole, gradients=False)
        self._materialise([Job(r, g, [w for w in ws if _is_trained(w.param)]) for r, g, ws in jobs])
        entries = [e for e in self._entries(jobs, lambda p, key: p in trained) if e.param not in self._gathered]
        out = defaultdict(dict, {p: dict(slots) for p, slots in trained.items()})
        for p, key, table in self._tables(jobs):
            out[p][key] = table
        self._attend(entries, "state_dict()", self._content())
        for e, value in resharding.scatter(entries, lambda e: out[e.param][e.key]):
            out[e.param][e.key] = value
        for p, slots in self._gathered.items():
            out[p] |= slots
        return out

    def _attend(self, entries: Sequence[resharding.Entry], what: str, content: str) -> None:
        """Wait for all ranks between which state is going to travel."""
        for ranks in dict.fromkeys(e.team.ranks for e in entries):
            self._meeting.wait_for(ranks, what, content)

    def _tables(self, jobs: Sequence[Job]) -> list[tuple[Tensor, str, Tensor]]:
        """The scales of quantised slots as they rest in a checkpoint, for state that is here."""
        out = []
        for job in jobs:
            for w in job.works:
                state = self.state[w.param] if w.param in self.state else {}
                for key, form in forms_of(job, w).items() if state else ():
                    if form.is_quantized:
                        codes, start = sharding.local(state[key]), first_index(job.rule, form, w)
                        table = resharding.table_of(form, state[scale_key(key)], codes.shape[0], start)
                        whole = resharding.table_shape(form)
                        cut = sharding.sharding_of(w.param, w.name) if w.team is None else None
                        out.append((w.param, scale_key(key), table if cut is None else cut.shard(whole, table)))
        return out

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state and settings; every tensor keeps its own dtype and is copied. A collective call on a mesh.

        Settings missing from the checkpoint keep their present values, so torch's checkpoints of the same rule load.

        Args:
            state_dict: from `state_dict`, of this or another number of ranks.

        Raises:
            ValueError: the groups, rules or shapes do not fit; nothing is changed then.
        """
        loaded: dict[int, dict[str, Any]] = {}
        ids: list[int] = []

        def take(_: torch.optim.Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
            ids.extend(chain.from_iterable(group["params"] for group in saved["param_groups"]))
            loaded.update({i: _present(slots) for i, slots in saved["state"].items()})
            for job in self._jobs(frozen=True):
                self._check_replaced(job.rule, job.group)
            groups = self._completed(saved["param_groups"])
            if self.averages is not None:
                self.averages.check_loaded(groups, loaded.values())
            self._check_fits(loaded, ids, groups)
            return {**saved, "state": {}, "param_groups": groups}

        def give(_: torch.optim.Optimizer) -> None:
            self._install(loaded, ids)

        given = [self._given.get(group["name"], []) for group in self.param_groups]
        handles = [self.register_load_state_dict_pre_hook(take)]
        handles.append(self.register_load_state_dict_post_hook(give, prepend=True))
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        self._given |= {group["name"]: known for group, known in zip(self.param_groups, given, strict=True)}

    def _completed(self, saved: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Saved groups with what they lack taken from the present ones."""
        groups = []
        for own, group in zip(self.param_groups, saved, strict=False):
            if group.get("rule", own["rule"]) != own["rule"]:
                raise ValueError(
                    f"group {own['name']!r} runs {own['rule']!r}, the checkpoint's {group['rule']!r}: "
                    "build the optimizer as it was when the checkpoint was saved"
                )
            if self.averages is None and group.get("average_step"):
                raise ValueError("the checkpoint's optimizer was wrapped (EMANesterov, ...): wrap this one alike")
            known = group if "rule" in group else lookup(own["rule"]).translate(dict(group))
            known = {k: v for k, v in known.items() if k in own or k not in MOMENTUM_NAMES}
            groups.append({**{k: v for k, v in own.items() if k != "params"}, **known, "compile": own["compile"]})
            validate_loaded(groups[-1])
        return [*groups, *saved[len(groups) :]]

    def _check_fits(
        self, loaded: Mapping[int, Mapping[str, Any]], ids: Sequence[int], groups: Sequence[dict[str, Any]]
    ) -> None:
        """Check that every loaded state is that of its parameter under the loaded settings."""
        params = [p for group in self.param_groups for p in group["params"]]
        if len(ids) != len(params) or len(groups) != len(self.param_groups):
            return  # torch names the group that differs
        where = {id(p): loaded.get(i, {}) for i, p in zip(ids, params, strict=True)}
        for (_, _, works), group in zip(self._jobs(frozen=True), groups, strict=True):
            rule = rule_of(group)
            for w in works:
                w.parts, w.transposed = parts_of(rule, group, w.param.shape)
                found = where[id(w.param)]
                for key, shape in _expected(forms_of(Job(rule, group, []), w), found) if found else ():
                    value = found.get(key)
                    if value is None and float(found.get("step", 1)) > 0:
                        raise ValueError(f"{w.name}: the checkpoint has no {key!r}; was it another optimizer's?")
                    if value is not None and (not isinstance(value, Tensor) or tuple(value.shape) != shape):
                        got = tuple(value.shape) if isinstance(value, Tensor) else type(value).__name__
                        raise ValueError(f"{w.name}: the checkpoint's {key!r} has shape {got}, expected {shape}")
                for key in (COMPENSATION, *self._of_averages(found)):
                    if key in found and found[key].shape != w.param.shape:
                        got, shape = tuple(found[key].shape), tuple(w.param.shape)
                        raise ValueError(f"{w.name}: the checkpoint's {key!r} has shape {got}, expected {shape}")

    def _install(self, loaded: Mapping[int, Mapping[str, Any]], ids: Sequence[int]) -> None:
        """Copy loaded state into place, in the declared dtypes; matrices that travel go to their owners."""
        self._gathered, self._averaged = {}, False
        params = [p for group in self.param_groups for p in group["params"]]
        found = {id(p): loaded[i] for i, p in zip(ids, params, strict=True) if i in loaded}
        jobs = [Job(r, g, [w for w in ws if id(w.param) in found]) for r, g, ws in self._jobs(frozen=True)]
        self._assign_owners(jobs)
        for job in jobs:
            for w in job.works:
                state, w.forms = self.state[w.param], forms_of(job, w)
                for key, form in w.forms.items():  # the parameter may have been resized since
                    if key in state and state[key].shape not in (form.shape, (0, *form.shape)):
                        del state[key]
                of_forms = {*w.forms, *map(scale_key, w.forms), "step", COMPENSATION, RADIUS}
                of_forms |= set(self._of_averages(found[id(w.param)]))
                state.update({k: _copied(v) for k, v in found[id(w.param)].items() if k not in of_forms})
                # torch's SGD and Muon count no steps: it was not the first
                state["step"] = torch.tensor(float(found[id(w.param)].get("step", 1.0)), device="cpu")
                self._place(job.rule, w, found[id(w.param)])
        entries = self._entries(jobs, lambda p, key: key in found[id(p)])
        described = [(e.key, e.shape, str(e.dtype), e.owner) for e in entries]
        cut = [e for e in entries if not isinstance(e.team, replicas.Replicas)]  # replicas load alone
        self._attend(cut, "load_state_dict()", f"{self._content()} {described}")
        for e, whole in resharding.collect(entries, lambda e: found[id(e.param)][e.key]):
            self.state[e.param][e.key] = whole
        for job in jobs:
            for w in job.works:
                self._settle(job.rule, w)

    def _of_averages(self, slots: Iterable[str]) -> list[str]:
        keys = [] if self.averages is None else [*self.averages.keys, averaging_methods.TRAINED]
        return [key for key in keys if key in slots]

    def _place(self, rule: Rule, w: Work, found: Mapping[str, Any]) -> None:
        """Copy loaded slots to where they rest, scales still as tables; not those that travel to their owner."""
        state, device = self.state[w.param], sharding.local(w.param).device
        if COMPENSATION in found:
            placed = sharding.place_like(found[COMPENSATION], w.param)
            state[COMPENSATION] = placed.detach().to(device, w.param.dtype, copy=True)
        for key in self._of_averages(found):
            state[key] = sharding.place_like(found[key], w.param).detach().to(device, copy=True)
        if RADIUS in found:
            state[RADIUS] = found[RADIUS].detach().to(device, torch.float32, copy=True)
        if w.team is None:
            frame = stack_sharding.StackSharding(w.param, w.dims, w.name, w.transposed) if rule.reduces else None
            for key, form in w.forms.items():
                table = found.get(scale_key(key)) if form.is_quantized else None
                if key in found:
                    if rule.elementwise:
                        placed = sharding.place_like(found[key], w.param)
                    else:
                        placed = frame.place(form.slot, found[key]) if frame else sharding.place(found[key], None)
                    dtype = form.dtype if table is not None or not form.is_quantized else form.wide
                    state[key] = placed.detach().to(device, dtype, copy=True)
                if table is not None:
                    cut = sharding.sharding_of(w.param, w.name)
                    state[scale_key(key)] = sharding.local(sharding.place(table, cut)).to(device, torch.float32)

    def _settle(self, rule: Rule, w: Work) -> None:
        """Make scales of loaded tables, and move what rests on the host."""
        state = self.state[w.param]
        for key, form in w.forms.items():
            if form.is_quantized and scale_key(key) in state:
                codes = sharding.local(state[key])
                table, start = state[scale_key(key)], first_index(rule, form, w)
                state[scale_key(key)] = resharding.scales_of(form, table, codes, start)
            elif key in state and form.kind == "host" and not form.direct(sharding.local(w.param).device):
                state[key] = allocate.rested(form, state[key])


def _expected(forms: Mapping[str, StateFormat], found: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Key and shape of everything a checkpoint must hold; a quantised slot may be there in its values."""
    for key, form in forms.items():
        yield key, form.shape
        if form.is_quantized and not (isinstance(x := found.get(key), Tensor) and x.is_floating_point()):
            yield scale_key(key), resharding.table_shape(form)


def _refuse_resized(w: Work, key: str, held: Sequence[int], expected: Sequence[int], wanted: str = "") -> NoReturn:
    """Refuse a parameter whose state is that of another shape.

    Raises:
        RuntimeError: always.
    """
    whole = tuple(held)[1:] if len(held) and held[0] == 0 else tuple(held)
    said = f"{wanted!r} {tuple(expected)}" if wanted else tuple(expected)
    raise RuntimeError(
        f"{w.name} has shape {tuple(w.param.shape)}, and its state is that of another shape: {key!r} has {whole}, "
        f"expected {said}; nothing was updated. The parameter was resized in place, as "
        "resize_token_embeddings does, or a setting that shapes the state (rank, blocks) was changed. Resize before "
        "the first step, build a new optimizer afterwards, or start this parameter's state again by "
        "optimizer.state.pop(parameter), on every rank"
    )


def _copied(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _is_trained(p: Tensor) -> bool:
    """Whether a tensor takes part: it requires a gradient, or is no Parameter (a copy, say) and was given one."""
    return p.requires_grad or (p.grad is not None and not isinstance(p, torch.nn.Parameter))


def _present(slots: Any) -> Any:
    """Saved slots of a parameter without those that torch saves as None."""
    return {k: v for k, v in slots.items() if v is not None} if isinstance(slots, Mapping) else slots


TOO_LARGE, NOT_FINITE = 1, 2
"""What is wrong with a gradient; the worse is the larger."""


def _squares(rule: Rule, group: Mapping[str, Any]) -> bool:
    """Whether a rule adds up squares of a gradient, as large as it comes: if they overflow, its state is lost."""
    return not rule.elementwise and group["clip_norm"] is None


def _unusable(given: Sequence[tuple[Work, bool]]) -> int:
    """Whether some gradient cannot be used; one synchronisation per device, if all can.

    Args:
        given: parameters with a gradient, and whether its squares have to be finite, too.

    Returns:
        0, `TOO_LARGE` or `NOT_FINITE`.
    """
    # a sum takes 0.7 of the time of the largest element, and is not finite where an element is not; a norm takes as
    # long as a sum out of memory, and overflows where the squares do. Those of float16 cannot
    sums: dict[torch.device, list[Tensor]] = {}
    norms: dict[tuple[torch.device, torch.dtype, int], list[Tensor]] = {}
    for w, squared in given:
        g = w.gradient()
        if squared and g.dtype != torch.float16:
            norms.setdefault((g.device, g.dtype, sharding.num_shards(w.param)), []).append(torch.linalg.vector_norm(g))
        else:
            sums.setdefault(g.device, []).append(g.sum().double())
    checks: dict[torch.device, list[Tensor]] = {}
    for device, found in sums.items():
        checks.setdefault(device, []).append(torch.stack(found).isfinite().all())
    for (device, dtype, ranks), found in norms.items():
        # parts on other ranks may be as large
        most = (torch.finfo(formats.compute_dtype_of(dtype)).max / ranks) ** 0.5
        checks.setdefault(device, []).append((torch.stack(found) < most).all())
    if all(torch.stack(found).all() for found in checks.values()):
        return 0
    if not math.isfinite(_largest([w.gradient() for w, _ in given])):
        return NOT_FINITE
    for (_, dtype, ranks), found in norms.items():
        most = (torch.finfo(formats.compute_dtype_of(dtype)).max / ranks) ** 0.5
        if not (torch.stack(found) < most).all():
            return TOO_LARGE
    return 0


def _largest(tensors: Sequence[Tensor]) -> float:
    """The largest absolute value, NaN if there is one; one synchronisation per device."""
    by_device: dict[torch.device, list[Tensor]] = {}
    for t in tensors:
        if t.numel():  # aminmax is 20 times faster than an infinity norm
            by_device.setdefault(t.device, []).append(torch.stack(t.aminmax()).abs().double())
    found = [torch.cat(ends).max().item() for ends in by_device.values()]
    return math.nan if any(math.isnan(x) for x in found) else max(found, default=0.0)
