"""What is compared: a setup that all optimizers share, trials in it, the search space, the ablations.

A trial is known by a hash of its configuration. Fields at their defaults are left out of it, so that a field added
later leaves the keys of old trials as they are.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from lightning_optim.catalog import follows_adamw
from lightning_optim.core.rule import Rule, hyperparameters, lookup, nearest
from lightning_optim.refresh import parse

Regime = Literal["pretrain", "continue", "full", "lora", "dpo"]
Track = Literal["model", "memory", "seconds"]
Precision = Literal["float32", "bfloat16", "autocast"]

REGIMES: dict[Regime, str] = {
    "pretrain": "pretraining",
    "continue": "continued pretraining",
    "full": "full fine-tuning",
    "lora": "LoRA fine-tuning",
    "dpo": "preference tuning (DPO)",
}
TRACKS: dict[Track, str] = {
    "model": "the same model and tokens",
    "memory": "the same memory, the widest model that fits",
    "seconds": "the same model and time",
}
FIRST = ("adamw", "muon", "soap")
"""Optimizers whose trials come first; AdamW's tuned learning rate is the center of the others' grids."""
UNCORRECTED = ("came",)
"""Rules that follow AdamW's learning rate but for their start: CAME's first directions are 50 times as long."""
Size = tuple[int, int]
"""Width of a model and steps of a run, to which ranks and intervals are fitted."""
Point = tuple[float, Any]
"""Of a search space: factor of the learning rate, and a value of the other dimension, if there is one."""
WIDTH_PER_RANK, REFRESHES, OFTEN = 4, 30, 10
"""Fitted settings: a rank is at most a quarter of the model's width; an interval of more than 10 steps is shortened to
a thirtieth of the run."""
INNER = {"cg_iter": 5, "max_iter": 5}
"""Most iterations within a step of a rule that searches; a step costs as many gradients, or three times as many."""


@dataclass(frozen=True)
class Setup:
    """What all optimizers of a comparison share."""

    regime: Regime = "pretrain"
    model: str = "tiny"
    """A preset, or `module:function`, called with the number of token ids and the context."""
    untied: bool = False
    """Whether a preset gets an output layer of its own."""
    data: tuple[str, ...] = ()
    """Text files, `hub:NAME[:SPLIT[:COLUMN]]` of the `datasets` library, .jsonl for fine-tuning; none for the
    sources of Python's standard library."""
    vocabulary: int = 0
    """Token ids; 0 for the preset's, 1024 for a model that is none."""
    context: int = 0
    """Tokens per row; 0 for the preset's, 64 for a model that is none."""
    tokens: int = 262_144
    """Trained on; the last step is left out if it would be cut."""
    batch: int = 16
    """Rows per optimizer step."""
    microbatch: int = 0
    """Rows per backward pass; 0 for all."""
    warmup: float = 0.1
    """Share of the run in which the learning rate rises linearly; it falls as a cosine after that."""
    min_lr: float = 0.1
    """Share of the learning rate that is left at the end."""
    weight_decay: float = 0.1
    rest_lr: float = 0.0
    """Learning rate of embeddings and gains, in AdamW's scale, whatever trains the matrices; 0 for the trial's."""
    clip: float = 1.0
    precision: Precision = "float32"
    """Of the weights; `autocast` computes in bfloat16 with float32 weights."""
    device: str = "cpu"
    threads: int = 1
    start: str = ""
    """The optimizer whose best pretraining is gone on from, unless the regime is pretraining."""
    lora_rank: int = 8
    track: Track = "model"
    budget: float = 0.0
    """Bytes of weights, gradients and state, or seconds, on the tracks of that name."""
    evaluations: int = 8
    val_tokens: int = 16_384


@dataclass(frozen=True)
class Trial:
    """One training run."""

    setup: Setup
    optimizer: str
    lr: float
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Hyperparameters and arguments of `build_optimizer`."""
    seed: int = 0

    @property
    def config(self) -> dict[str, Any]:
        """Everything the run depends on, as JSON has it."""
        flat = {**dataclasses.asdict(self.setup), "optimizer": self.optimizer, "lr": self.lr, "seed": self.seed}
        return json.loads(json.dumps({**flat, "settings": dict(self.settings)}))

    @property
    def key(self) -> str:
        """Hash of the configuration."""
        default = json.loads(json.dumps(dataclasses.asdict(Setup())))
        config = {k: v for k, v in self.config.items() if k not in default or v != default[k]}
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]


def read_trial(config: Mapping[str, Any]) -> Trial:
    """A trial from its configuration.

    Args:
        config: of `Trial.config`.

    Returns:
        The trial.
    """
    names = {f.name for f in dataclasses.fields(Setup)}
    shared: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if k in names}
    return Trial(Setup(**shared), config["optimizer"], config["lr"], config["settings"], config["seed"])


def decay(rule: type[Rule], weight_decay: float) -> float:
    """Weight decay of a rule in a setup.

    Args:
        rule: class.
        weight_decay: of the setup.

    Returns:
        The setup's, or 0 where the same number would mean another decay: in L2 form, or at another scale of the
        learning rate.
    """
    return weight_decay if follows_adamw(rule) and rule.decay != "coupled" else 0.0


def roles_apart(rule: type[Rule], rest_lr: float) -> dict[str, Any]:
    """What gives embeddings and gains a learning rate of their own.

    Args:
        rule: class.
        rest_lr: of the setup.

    Returns:
        Arguments of `build_optimizer`. AdamW trains them where it does so anyway, and where the rule's direction has no
        scale in which the rate would mean the same, or not from the start; nothing if the rate is 0.
    """
    if not rest_lr:
        return {}
    by = None if follows_adamw(rule) and rule.name not in UNCORRECTED else "adamw"
    return {"rest_lr": rest_lr, "overrides": [(role, by, {"lr": rest_lr}) for role in ("embedding", "vector")]}


def fitted(rule: type[Rule], size: Size) -> dict[str, Any]:
    """Hyperparameters whose defaults suppose a wider model or a longer run than this one.

    The published rank 128 is a quarter of the narrowest model it was published for, and a run there has 50 refreshes.
    Rules that search take a hundred times AdamW's time per step with their defaults.

    Args:
        rule: class.
        size: of the model and the run.

    Returns:
        A rank of at most a quarter of the width, Alice's `leading` in proportion, an interval of refreshes of at most a
        thirtieth of the run, or ten steps, and five iterations within a step; nothing for rules without.
    """
    (width, steps), defaults, out = size, hyperparameters(rule), {}
    rank = defaults.get("rank", 1)
    if rank > (fit := max(1, width // WIDTH_PER_RANK)):
        out["rank"] = fit
        if "leading" in defaults:
            out["leading"] = max(1, defaults["leading"] * fit // rank)
    if "refresh" in defaults:
        policy, limit = parse(defaults["refresh"]), max(OFTEN, steps // REFRESHES)
        if getattr(policy, "interval", 0) > limit:
            name = defaults["refresh"].split(":")[0]
            out["refresh"] = f"{name}:{limit}"
    if rule.curvature_input == "loss":
        out |= {k: limit for k, limit in INNER.items() if defaults.get(k, 0) > limit}
    return out


def propose(rule: type[Rule], losses: Mapping[Point, float]) -> Point | None:
    """The point of a rule's search space to try next: downhill, and never content with an end of what was tried.

    The first three learning rates at the first value of the other dimension; then the neighbors of the best point on
    the grid of learning rates; then the other values at its learning rate; then what is nearest to it.

    Args:
        rule: class, with its `search`.
        losses: what was tried; infinite for a run that diverged.

    Returns:
        A point, or None when all are tried.
    """
    grid, values = sorted(rule.search["lr"]), next((v for k, v in rule.search.items() if k != "lr"), (None,))
    for factor in rule.search["lr"][:3]:
        if (factor, values[0]) not in losses:
            return factor, values[0]
    best = min(losses, key=lambda point: (losses[point], point[0]))  # the lowest where all diverged
    place = grid.index(best[0])

    def distance(point: Point) -> tuple[float, float]:
        """One step along the grid comes before another value, that before two steps."""
        return abs(grid.index(point[0]) - place) + 1.5 * (point[1] != best[1]), -point[0]

    untried = [point for point in itertools.product(grid, values) if point not in losses]
    return min(untried, key=distance, default=None)


def trial_at(setup: Setup, name: str, point: Point, *, center: float, size: Size, seed: int = 0) -> Trial:
    """The trial at a point of a search space.

    Args:
        setup: shared by all.
        name: of the optimizer.
        point: of its space.
        center: AdamW's tuned learning rate; for AdamW itself, the one to begin with.
        size: of the model and the run.
        seed: of data and initial weights.

    Returns:
        The trial; the first point has the learning rate `center`, if the rule takes AdamW's.
    """
    rule = lookup(name)
    base = center if follows_adamw(rule) else hyperparameters(rule)["lr"]
    key = next((k for k in rule.search if k != "lr"), "")
    settings = {key: point[1]} if key and point[1] != hyperparameters(rule)[key] else {}
    return Trial(setup, name, float(f"{base * point[0]:.6g}"), fitted(rule, size) | settings, seed)


def order(names: Sequence[str]) -> list[str]:
    """Optimizers in the order of their trials.

    Args:
        names: any.

    Returns:
        `FIRST`, then the others by name.

    Raises:
        ValueError: an unknown name.
    """
    for name in names:
        lookup(name)
    return [n for n in FIRST if n in names] + sorted(set(names) - set(FIRST))


@dataclass(frozen=True)
class Ablation:
    """One component of some optimizers, in several forms."""

    title: str
    variants: Mapping[str, Mapping[str, Mapping[str, Any]]]
    """Optimizer to label to settings."""
    untied: bool = False
    """Needs an output layer of its own."""


def _each(names: Sequence[str], key: str, values: Sequence[Any]) -> dict[str, dict[str, dict[str, Any]]]:
    return {name: {str(value): {key: value} for value in values} for name in names}


def ablations(width: int) -> dict[str, Ablation]:
    """What `bench ablate` knows.

    Args:
        width: of the model.

    Returns:
        Name to variants.
    """
    ranks = [max(1, width // k) for k in (16, 8, 4, 2, 1)]
    intervals = [f"staggered:{k}" for k in (1, 5, 10, 50)]
    matrices = {
        "all": {},
        "attention": {"overrides": [["*mlp*", "adamw"]]},
        "mlp": {"overrides": [["*self_attn*", "adamw"]]},
        "all but v and o": {"overrides": [["*v_proj*", "adamw"], ["*o_proj*", "adamw"]]},
    }
    alice = {
        "no tracking, switch, compensation": {"betas": [0.9, 0.9, 0.0], "switch": False, "compensation": "none"},
        "tracking": {"switch": False, "compensation": "none"},
        "tracking and switch": {"compensation": "none"},
        "tracking, switch, compensation": {},
    }
    return {
        "rank": Ablation("rank", _each(("galore", "alice", "apollo", "dion"), "rank", ranks)),
        "refresh": Ablation("interval of refreshes", _each(("soap", "galore", "shampoo"), "refresh", intervals)),
        "storage": Ablation(
            "bits of the state", _each(("adamw", "muon", "soap"), "state_storage", ("fp32", "bf16", "int8", "fp8"))
        ),
        "iterations": Ablation(
            "iterations", _each(("muon",), "ns_steps", (1, 2, 3, 5, 8)) | _each(("racs",), "iterations", (1, 2, 5))
        ),
        "rotation": Ablation(
            "products with the basis", _each(("soap", "soap_muon"), "rotation_dtype", ("float32", "bfloat16"))
        ),
        "statistic": Ablation(
            "statistic",
            _each(("adam_mini",), "statistic", ("mean", "max", "min", "l1"))
            | _each(("racs",), "ema", (True, False))
            | _each(("shampoo",), "accumulate", ("average", "sum"))
            | {"alice": alice},
        ),
        "roles": Ablation("matrices that get the matrix rule", {name: matrices for name in ("muon", "soap")}),
        "last_layer": Ablation(
            "last layer by AdamW (rest) or by the rule",
            _each(("galore", "fira", "alice", "muon", "soap"), "last_layer", ("rest", "rule")),
            untied=True,
        ),
    }


def ablation_trials(
    setup: Setup, name: str, *, lr: Mapping[str, float], size: Size, seed: int = 0
) -> list[tuple[str, str, Trial]]:
    """The trials of one ablation.

    Args:
        setup: shared by all.
        name: of the ablation.
        lr: learning rate of every optimizer in it.
        size: of the model and the run.
        seed: of data and initial weights.

    Returns:
        (optimizer, label, trial) each.

    Raises:
        ValueError: an unknown ablation.
    """
    table = ablations(size[0])
    if name not in table:
        raise ValueError(f"unknown ablation {name!r}; {nearest(name, list(table))}")
    ablation = table[name]
    setup = dataclasses.replace(setup, untied=setup.untied or ablation.untied)
    out = []
    for optimizer, variants in ablation.variants.items():
        shared = fitted(lookup(optimizer), size)
        for label, variant in variants.items():
            settings = {**shared, **variant}
            if "leading" in settings and "rank" in variant:  # Alice's, in proportion
                settings["leading"] = max(1, variant["rank"] * shared["leading"] // shared["rank"])
            out.append((optimizer, label, Trial(setup, optimizer, lr[optimizer], settings, seed)))
    return out
