"""The state of an optimizer's parameters under their plans: allocation, checks, and checkpoints."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor

from lightning_optim.core.momentum_alias import ParamGroup
from lightning_optim.core.parallel import sharding
from lightning_optim.core.parallel.flat_parameters import KnownParameters, is_flat
from lightning_optim.core.parallel.guard import CollectiveGuard
from lightning_optim.core.parallel.ownership import Owners
from lightning_optim.core.parallel.replicas import Replicas
from lightning_optim.core.parallel.zero import FlatGroups
from lightning_optim.core.param_groups import plain, validate_param
from lightning_optim.core.state import allocate, checkpoint, checks, rank_checkpoint
from lightning_optim.core.state.formats import TRAINED
from lightning_optim.core.state.matching import match_by_name, validate_matrices
from lightning_optim.core.step.averaging_methods import AveragingMethod
from lightning_optim.core.step.records import GroupStep, PlanCache, is_trained
from lightning_optim.core.step.weight_averaging import Averages


class StatefulOptimizer(torch.optim.Optimizer):
    """Base of `RuleOptimizer`: groups with their plans, state that is complete or refused, and checkpoints.

    `state[p]` is the only store of state, `param_groups` the only store of settings.
    """

    def _start(self, max_temp_bytes: int = 2**25) -> None:
        """Set what is neither state nor a setting to its start value."""
        self.max_temp_bytes = max_temp_bytes
        self._is_built = False
        self.known_params = KnownParameters()
        self.flat_groups: FlatGroups | None = FlatGroups()
        self._plans = PlanCache()
        self._owners = Owners()
        self._guard = CollectiveGuard()
        self._gathered: checkpoint.State = {}
        self._is_averaged = False
        self.replicas: Replicas | None = None
        """Replicas that share the work on whole matrices."""
        self.compressing: Replicas | None = None
        """Replicas that reduce less than the gradients of some rules."""
        self.averages: Averages | None = None
        self.curve: Any = None
        self.example_inputs: Any = None
        """Of the model, with which its roles were measured."""
        self._total_steps: int | Callable[[], int | None] | None = None

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore a pickled or copied optimizer."""
        if not hasattr(self, "_plans"):
            self._start()
            self._is_built = True
        super().__setstate__(state)
        self.param_groups[:] = map(ParamGroup, self.param_groups)
        if not self.known_params:
            for group in self.param_groups:
                self.known_params.remember(group)

    def __getstate__(self) -> dict[str, Any]:
        """What is pickled or copied."""
        attributes = {key: getattr(self, key) for key in ("max_temp_bytes", "averages", "curve")}
        return super().__getstate__() | attributes | {"_total_steps": self.total_steps}

    @property
    def total_steps(self) -> int | None:
        """The length of the run, None where it is not known; may be set to a function that gives it."""
        return self._total_steps() if callable(self._total_steps) else self._total_steps

    @total_steps.setter
    def total_steps(self, steps: int | Callable[[], int | None] | None) -> None:
        self._total_steps = steps

    def group_steps(self, *, frozen: bool = False) -> list[GroupStep]:
        """Every group with its rule and its trainable parameters, as they are now.

        Args:
            frozen: take parameters that are not trained as well, and no gradients.

        Returns:
            One entry per group.
        """
        return self._plans.collect(self.param_groups, self.state, frozen=frozen)

    def _parameters_shown(self) -> AbstractContextManager[None]:
        """Put parameters into the groups where an engine has put flat tensors, until the end of the context."""
        return nullcontext() if self.flat_groups is None else self.flat_groups.shown(self)

    def _all_steps(self) -> Sequence[GroupStep]:
        """The parameters in all flat tensors of an engine, which steps one at a time."""
        return [g.only([s for s in g.params if s.plan.is_sharded]) for g in self.group_steps(frozen=True)]

    def validate_shapes(self, groups: Sequence[GroupStep]) -> None:
        """Check that every parameter still has the shape of its state.

        Args:
            groups: of this step.

        Raises:
            RuntimeError: a parameter was resized in place; the message names it, both shapes and what to do.
        """
        checks.validate_shapes(groups, () if self.averages is None else self.averages.keys)

    def validate_params(self, groups: Sequence[GroupStep]) -> None:
        """Check that rules can take the parameters without state as they are now, not as they were when added.

        A parameter may have been frozen or without a shape then, or an engine may have replaced it.

        Args:
            groups: of this step.

        Raises:
            ValueError: they cannot.
        """
        for group in groups:
            new = [s for s in group.params if not s.state]
            if new:
                self.known_params.validate(group.rule, group.group, averaging=self.averages is not None)
            for s in new:
                validate_param(group.rule, s.plan.name, s.plan.param, group.group)

    def allocate_state(self, groups: Sequence[GroupStep]) -> None:
        """Allocate what parameters lack of their state; all of it, or nothing.

        Args:
            groups: of this step.
        """
        self.validate_params(groups)
        allocate.assign_owners(groups, self._owners, chain.from_iterable(g["params"] for g in self.param_groups))
        also = None if self.averages is None else self.averages.allocate
        new = [s for group in groups for s in group.params if s.plan.stored is None]
        before = [(s, dict(s.state), s.plan.param in self.state) for s in new]
        try:
            allocate.allocate_state(groups, self._owners, lambda p: self.state.setdefault(p, {}), also)
        except Exception:  # out of memory, say
            for s, tensors, was_there in before:
                s.plan.stored = None
                if was_there:
                    s.state.clear()
                    s.state.update(tensors)
                else:
                    self.state.pop(s.plan.param, None)
            raise

    def with_averaging(self, *members: AveragingMethod) -> Self:
        """Average or shift the weights around every step (`lightning_optim.core.step.averaging_methods`).

        Args:
            members: `EMANesterov`, `TailEMA` or `MuLoCo`, each at most once.

        Returns:
            The optimizer.

        Raises:
            ValueError: called before, two that do not go together, or weights that are too narrow.
        """
        if self.averages is not None:
            raise ValueError("with_averaging: give everything in one call")
        self.averages = Averages(self, members)
        self._plans.clear()
        return self

    def eval(self) -> None:
        """Put the averaged weights in the place of the training weights; nothing where they are the same."""
        if self.averages is not None:
            self.validate_shapes(self.group_steps(frozen=True))
            with torch.inference_mode(False), torch.no_grad():
                self.averages.eval(self)

    def train(self) -> None:
        """Put the training weights back, bit for bit."""
        if self.averages is not None:
            self.validate_shapes(self.group_steps(frozen=True))
            with torch.inference_mode(False), torch.no_grad():
                self.averages.train(self)

    def is_sharded(self) -> bool:
        """Whether a rank holds parts of parameters only: checkpoints of that kind are to be made after `train()`.

        Returns:
            True under FSDP2 and tensor parallelism.
        """
        return any(sharding.sharding_of(p) is not None for group in self.param_groups for p in group["params"])

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """State and settings; whole matrices of sharded parameters come as row-sharded DTensors (a collective call).

        Where replicas share the work, it is one too, unless `consolidate` was called before.

        Returns:
            As torch's: plain values and tensors only, loadable with `weights_only=True`.

        Raises:
            RuntimeError: in a collective call, when some rank does not make it; a parameter whose shape is no longer
                that of its state.
        """
        with self._parameters_shown():
            live = {id(p) for group in self.param_groups for p in group["params"]}
            for p in [p for p in self.state if isinstance(p, Tensor) and id(p) not in live]:
                del self.state[p]
            state = self.state
            self.state = self._state_to_save() if state else state
            try:
                out = super().state_dict()
            finally:
                self.state = state
        out |= {"flat_groups": self.flat_groups.layout()} if self.flat_groups else {}
        out["param_groups"] = [plain(group) for group in out["param_groups"]]
        return out

    def consolidate(self) -> None:
        """Collect state that is sharded over replicas (`shard_work`), for calls of `state_dict` until the next step.

        What each has of its own gradients (`compress`) is averaged, here too, so that continuing and resuming are the
        same. A collective call, to be made on every rank before one of them saves; without either it does nothing.

        Raises:
            RuntimeError: some rank does not make this call.
        """
        groups = self.group_steps(frozen=True)
        if self.compressing is not None:
            steps = [(s, group.rule.compresses) for group in groups for s in group.params]
            self.compressing.average_([s.state[k] for s, keys in steps for k in keys if k in s.state])
            self._is_averaged = True
        if self.replicas is not None and self.state:
            self._gathered = {}
            self._gathered = checkpoint.gather_owned(groups, self._state_to_save(), self._owners)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load state and settings; every tensor keeps its own dtype and is copied. A collective call on a mesh.

        Settings missing from the checkpoint keep their present values, so torch's checkpoints of the same rule load.
        Where parameters have names, they are matched by them; a warning says what the checkpoint has not.

        Args:
            state_dict: from `state_dict`, of this or another number of ranks.

        Raises:
            ValueError: the groups, rules or shapes do not fit; nothing is changed then.
        """
        with self._parameters_shown():
            self._load(state_dict)

    def _load(self, state_dict: dict[str, Any]) -> None:
        """Load into parameters as they are now."""
        # Lightning's finetuning callbacks have put plain groups here
        self.param_groups[:] = [g if isinstance(g, ParamGroup) else ParamGroup(g) for g in self.param_groups]
        loaded_of: dict[int, Mapping[str, Any]] = {}
        names = [group["name"] for group in self.param_groups]
        params = [p for group in self.param_groups for p in group["params"]]
        averages = [] if self.averages is None else [*self.averages.keys, TRAINED]

        def take(_: torch.optim.Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
            validate_matrices(self.param_groups, saved["param_groups"])
            saved = match_by_name(self.param_groups, saved)
            ids = list(chain.from_iterable(group["params"] for group in saved["param_groups"]))
            loaded = checkpoint.without_empty(saved["state"])
            present = self.group_steps(frozen=True)
            for group in present:
                self.known_params.validate(group.rule, group.group, averaging=self.averages is not None)
            groups = checkpoint.complete_saved_groups(
                self.param_groups, saved["param_groups"], averaging=self.averages is not None
            )
            if self.averages is not None:
                self.averages.check_loaded(groups, loaded.values())
            loaded_of.update({id(p): loaded[i] for i, p in zip(ids, params, strict=False) if i in loaded})
            if saved.get("flat_groups") is not None:
                (self.flat_groups or FlatGroups()).check_layout(saved["flat_groups"])
            rank_checkpoint.restore_runs(present, loaded_of)
            elsewhere = rank_checkpoint.keep_owners(present, loaded_of, self._owners)
            if len(ids) == len(params) and len(groups) == len(present):  # torch names the group that differs
                checkpoint.validate_state(present, groups, loaded_of, averages, elsewhere)
            return {**saved, "state": {}, "param_groups": groups}

        def install(_: torch.optim.Optimizer) -> None:
            self._gathered, self._is_averaged = {}, False
            self._plans.clear()
            groups = [
                g.only([s for s in g.params if id(s.plan.param) in loaded_of]) for g in self.group_steps(frozen=True)
            ]
            allocate.assign_owners(groups, self._owners, params)
            checkpoint.install_state(
                groups, loaded_of, self.state, self._owners, self._guard, self._content(), averages
            )

        handles = [self.register_load_state_dict_pre_hook(take)]
        handles.append(self.register_load_state_dict_post_hook(install, prepend=True))
        try:
            super().load_state_dict(state_dict)
        finally:
            for handle in handles:
                handle.remove()
        self.known_params.rename(names, self.param_groups)

    def _content(self) -> str:
        """Describes this optimizer, equally on every rank."""
        return repr([(g["name"], [tuple(p.shape) for p in g["params"]]) for g in self.param_groups])

    def _state_to_save(self) -> Any:
        """State in the form of a checkpoint, complete for all trainable parameters."""
        if self.compressing is not None and not self._is_averaged:
            raise RuntimeError(
                "replicas have momenta of their own: call consolidate() on all ranks before state_dict()"
            )
        groups = self.group_steps(frozen=True)
        # engines change the shapes of flat parameters
        self.validate_shapes([g.only([s for s in g.params if not is_flat(s.plan.param)]) for g in groups])
        self.allocate_state([g.only([s for s in g.params if is_trained(s.plan.param)]) for g in groups])
        return checkpoint.state_to_save(groups, self.state, self._owners, self._guard, self._content(), self._gathered)
