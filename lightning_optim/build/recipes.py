"""Published settings by name: `build_optimizer(model, "alice", recipe="alice-130m")`.

A recipe is looked up when it is used, so the table may name rules that a trimmed package lacks. Besides the table,
the name of any rule is a recipe: its defaults, which are those of the publication or its reference implementation, at
the published scale, with all preconditioners refreshed in the same step.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lightning_optim.core.rule import REGISTRY, hyperparameters, lookup, nearest

_log = logging.getLogger(__name__)

SIZES = ("60m", "130m", "350m", "1b")
"""Of the LLaMA models of Gong et al. 2025, Table 10; what that table calls 1.3B is `1b`."""

DEFAULTS: dict[str, Any] = {
    "weight_decay": 0.0,
    "rest": "adamw",
    "lr_convention": "adamw",
    "last_layer": "rest",
    "blocks": "layers",
    "overrides": (),
    "averaging": {},
    "schedule": {},
}
"""Arguments of `build_optimizer` that neither the user nor a recipe gives."""


@dataclass(frozen=True)
class Recipe:
    """Arguments of `build_optimizer`, as published."""

    rule: str
    settings: Mapping[str, Any]
    source: str
    pretraining: bool = False
    """A whole stack, schedule and averages included, that moves the weights by a fixed share of their norm."""


def _by_size(rule: str, table: str, *, last_layer: str, **columns: Any) -> dict[str, Recipe]:
    """One recipe per size of model; tuples hold a value for each."""
    source = f"Gong et al. 2025, arXiv:2502.07752, {table}; bfloat16, warm-up over 10 % of the steps, cosine to 10 %"
    shared = {"lr_convention": "native", "rest": "adam", "last_layer": last_layer}
    out = {}
    for i, size in enumerate(SIZES):
        values = {k: v[i] if isinstance(v, tuple) and len(v) == len(SIZES) else v for k, v in columns.items()}
        rest = {} if rule == "adam" else {"rest_lr": ADAM_LR[i]}
        out[f"{rule}-{size}"] = Recipe(rule, shared | rest | values, source)
    return out


ADAM_LR = (1e-3, 1e-3, 1e-3, 7e-4)
"""Table 8, by size. The paper does not say at which learning rate Adam trains what the method does not take; this."""

GALORE: dict[str, Any] = {
    "lr": (0.02, 0.02, 0.02, 0.01),
    "rank": (128, 256, 256, 512),
    "refresh": "fixed:200",
}
APOLLO: dict[str, Any] = {"lr": 0.01, "last_layer": "rest", "lr_convention": "native", "refresh": "fixed:200"}
ALICE: dict[str, Any] = {
    "lr": 0.02,
    "alpha": (0.3, 0.3, 0.3, 0.25),
    "alpha_c": (0.4, 0.4, 0.4, 0.2),
    "rank": (128, 256, 256, 512),
    "leading": (40, 40, 40, 160),
    "refresh": "fixed:200:200",
}
SPEEDRUN = "modded-nanogpt, records/track_1_short/2024-10-29_Optimizers: GPT-2 124M to loss 3.28 on FineWeb; no decay"

RECIPES: dict[str, Recipe] = {
    **_by_size("galore", "Table 7", last_layer="rule", scale=(0.3, 0.3, 0.3, 0.25), **GALORE),
    **_by_size("fira", "Table 7", last_layer="rule", alpha=(0.3, 0.3, 0.3, 0.25), **GALORE),
    **_by_size("adam", "Table 8", last_layer="rest", lr=ADAM_LR, betas=(0.9, 0.999)),
    **_by_size("racs", "Table 9", last_layer="rest", lr=0.02, beta=0.9, alpha=(0.05, 0.05, 0.05, 0.02)),
    **_by_size("alice", "Table 11", last_layer="rule", betas=(0.9, 0.9, 0.999), **ALICE),
    **_by_size("alice0", "Table 11, without tracking", last_layer="rule", betas=(0.9, 0.9, 0.0), **ALICE),
    **{
        f"apollo-{size}": Recipe("apollo", APOLLO | {"rank": rank}, "Zhu et al. 2024, arXiv:2412.05270, scripts")
        for size, rank in zip(SIZES, (128, 192, 256, 256), strict=True)
    },
    "apollo-mini": Recipe(
        "apollo",
        APOLLO | {"rank": 1, "scale": 128.0, "scale_type": "tensor"},
        "Zhu et al. 2024, arXiv:2412.05270, scripts: 350M and larger",
    ),
    "adamw-speedrun": Recipe("adamw", {"lr": 1.8e-3, "betas": (0.9, 0.95), "lr_convention": "native"}, SPEEDRUN),
    "muon-speedrun": Recipe(
        "muon",
        {
            "lr": 0.02,
            "momentum": 0.95,
            "lr_convention": "native",
            "rest_lr": 1.8e-3,
            "rest_settings": {"betas": (0.9, 0.95)},
        },
        SPEEDRUN,
    ),
    "soap-speedrun": Recipe(
        "soap",
        {
            "lr": 1.8e-3,
            "betas": (0.95, 0.95),
            "lr_convention": "native",
            "rest_lr": 1.8e-3,
            "rest_settings": {"betas": (0.9, 0.95)},
        },
        SPEEDRUN,
    ),
    "muon-moonlight": Recipe(
        "muon",
        {
            "lr": 1e-3,
            "momentum": 0.95,
            "scale": "match_rms_adamw",
            "weight_decay": 0.1,
            "lr_convention": "native",
            "rest_settings": {"betas": (0.9, 0.95), "eps_mode": "uncorrected"},
        },
        "Liu et al. 2025, arXiv:2502.16982, the authors' example",
    ),
    "lion-lm": Recipe(
        "lion",
        {"lr": 1e-4, "betas": (0.95, 0.98), "lr_convention": "native"},
        "Chen et al. 2023, arXiv:2302.06675, Sec. 4: betas for language models",
    ),
    "adafactor-t5": Recipe(
        "adafactor",
        {"lr": 1e-3, "lr_convention": "native"},
        "Raffel et al. 2020, arXiv:1910.10683, Sec. 3.1.3: fine-tuning at a constant learning rate",
    ),
}


TRACK3 = "modded-nanogpt, records/track_3_optimization: GPT-2 124M to loss 3.28 on FineWeb"
FINE_TUNING_LR = 1e-3
"""Learning rates up to here, a tenth of the lowest of a preset and less, are for weights that have been trained."""


def _adam(lr: float, betas: tuple[float, float], **more: Any) -> dict[str, Any]:
    return {"lr": lr, "betas": betas, "eps": 1e-10, "weight_decay": 0.0, **more}


NATIVE: dict[str, Any] = {"weight_decay": 0.0, "lr_convention": "native"}
CONVERGED: dict[str, Any] = {"ns_coefficients": (2.0, -1.5, 0.5), "ns_steps": 12}
"""Newton-Schulz of the track: an accurate polar factor."""

TUNED_REST: dict[str, Any] = {
    "rest_lr": 0.015,
    "rest_settings": {"betas": (0.8, 0.95), "eps": 1e-10, "cooldown": 0.4},
    "overrides": (("embedding", None, {"lr_per_rms": 0.7}), ("head", None, {"lr": 0.004})),
}
"""What the matrices do not take: of the tuned Muon (pull request 323), with the cooldown of 292."""

RECORD_REST: dict[str, Any] = {
    "rest_lr": 0.01,
    "rest_settings": {
        "betas": (0.8, 0.99),
        "eps": 1e-10,
        "cautious_decay": 0.0,
        "correct_bias": False,
        "cooldown": 1413 / 2900,
    },
    "overrides": (
        ("embedding", None, {"lr_per_rms": 0.3, "correct_bias": True}),
        ("head", None, {"lr": 1 / 320, "correct_bias": True}),
        ("output_bias", None, {"betas": (0.8, 0.9965)}),
        ("bias", None, {"betas": (0.8, 0.997)}),
    ),
}
RECORD: dict[str, Any] = {
    **NATIVE,
    **RECORD_REST,
    "lr": 0.0375,
    "momentum": 0.95,
    "beta2": 0.9,
    "refresh": "fixed:1",
    "uw_floor": 0.3825,
    "radial_damping": 0.5,
    "pin": True,
    "schedule": {
        "schedule": "power",
        "power": 1.2,
        "horizon": 2900 / 2690,
        "cooldown": 2386 / 2900,
        "momentum_warmup_steps": 300,
        "momentum_start": 0.85,
        "momentum_cooldown_steps": 200,
        "momentum_end": 0.85,
    },
    "averaging": {"ema_nesterov": {"step_size": 0.3, "beta": 0.99, "start": 300, "stop": 1740 / 2690}},
}
"""What entries 44 and 46 share. The benchmark's run has 2690 steps of the 2900 that its learning rate would take."""

PRESETS: dict[str, Recipe] = {
    "muon_h": Recipe(
        "muon",
        {
            **NATIVE,
            **TUNED_REST,
            **CONVERGED,
            "lr": 0.018,
            "momentum": 0.95,
            "constraint": "hyperball",
            "schedule": {"schedule": "power", "cooldown": 0.8},
        },
        f"{TRACK3}, MuonH (2026-04-30, arXiv:2606.16899), cooldowns of pull request 292",
        pretraining=True,
    ),
    "kl_soap_h": Recipe(
        "kl_soap",
        {
            **NATIVE,
            **TUNED_REST,
            "rest_settings": {**TUNED_REST["rest_settings"], "min_lr_ratio": 0.04},
            "lr": 0.018,
            "betas": (0.95, 0.9),
            "shampoo_beta": 0.9,
            "eps": 1e-8,
            "refresh": "fixed:1",
            "constraint": "hyperball",
            "schedule": {"schedule": "power", "power": 1.5, "min_lr_ratio": 0.017},
        },
        f"{TRACK3}, pull request 293 (entry 25); the rest as tuned for Muon",
        pretraining=True,
    ),
    "pr321": Recipe("soap_muon", RECORD, f"{TRACK3}, pull request 321 (entry 44)", pretraining=True),
    "record46": Recipe(
        "soap_muon",
        {
            **RECORD,
            "uw_floor_by": "row",
            "cautious_decay": 0.025,
            "cautious_when": "after_pin",
            "averaging": {**RECORD["averaging"], "tail_ema": {"start": 2400 / 2690, "tau": 150.0, "weight": 0.6}},
        },
        f"{TRACK3}, pull request 328 (entry 46, 2690 steps)",
        pretraining=True,
    ),
}
"""Stacks that won the NanoGPT optimization benchmark, or stood near its top: `build_optimizer(model, "soap_muon",
preset="record46")`. Of numbers of steps those that belong to the end of the run are shares of it. The embedding's rates
are per root mean square of its weights: the benchmark's is 1, in front of a norm, where Transformers' models start at
0.02 in front of none and diverge at the bare number. Left out, as not proven: the gate on the attention's output
projection, and starts other than the model's own; hyperball needs one without matrices of zeros."""


def find(name: str) -> Recipe:
    """Look a recipe up.

    Args:
        name: of a table, or of a rule, for its defaults at the published scale.

    Returns:
        The recipe.

    Raises:
        ValueError: there is no such recipe; the message gives the nearest ones.
    """
    tables = RECIPES | PRESETS
    if name in tables:
        return tables[name]
    if name not in REGISTRY:
        raise ValueError(f"unknown recipe {name!r}; {nearest(name, [*tables, *REGISTRY])}")
    rule = lookup(name)
    defaults = hyperparameters(rule)
    settings = {k: defaults[k] for k in ("lr", "weight_decay")}
    if "refresh" in defaults:
        settings["refresh"] = defaults["refresh"].replace("staggered:", "fixed:")
    return Recipe(name, settings | {"lr_convention": "native"}, rule.source)


def resolve_settings(
    name: str, recipe: str | None, arguments: Mapping[str, Any], *, adapters: bool = False
) -> dict[str, Any]:
    """All arguments of `build_optimizer`: what is given, else the recipe's, else the default.

    Of a preset for pretraining, only the rule's hyperparameters are taken where weights are fine-tuned; a warning says
    so.

    Args:
        name: of the main rule.
        recipe: name of a recipe or preset, or None.
        arguments: arguments; None counts as not given where `build_optimizer` has a default.
        adapters: whether some of the trainable parameters are adapters.

    Returns:
        Arguments by name.

    Raises:
        ValueError: an unknown recipe, one of another rule, or no learning rate.
    """
    published_recipe = find(recipe) if recipe is not None else Recipe(name, {}, "")
    if published_recipe.rule != lookup(name).name:
        raise ValueError(f"recipe {recipe!r} is of {published_recipe.rule!r}, not of {name!r}")
    if published_recipe.pretraining:
        published_recipe = _for_pretraining(str(recipe), published_recipe, arguments, adapters)
    optional = {*DEFAULTS, "lr", "rest_lr", "rest_settings"}
    present = {k: v for k, v in arguments.items() if v is not None or k not in optional}
    out: dict[str, Any] = {
        "lr": None,
        "rest_lr": None,
        "rest_settings": {},
        **DEFAULTS,
        **published_recipe.settings,
        **present,
    }
    same_rest = out["rest"] == published_recipe.settings.get("rest", DEFAULTS["rest"])
    published: Mapping[str, Any] = published_recipe.settings.get("rest_settings", {}) if same_rest else {}
    out["rest_settings"] = {**published, **(arguments.get("rest_settings") or {})}
    out["schedule"] = _merged(published_recipe.settings.get("schedule") or {}, arguments.get("schedule") or {})
    out["overrides"] = tuple(arguments.get("overrides") or ())
    out["more_overrides"] = tuple(published_recipe.settings.get("overrides") or ()) if same_rest else ()
    if out["lr"] is None:
        raise ValueError(f"{name}: give a learning rate (lr=...) or a recipe")
    return out


def _merged(published: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """A schedule's settings; of another kind than the published one, only those that are about the momentum stay."""
    other = settings.get("schedule", published.get("schedule")) != published.get("schedule")
    return {k: v for k, v in published.items() if not other or k.startswith("momentum_")} | dict(settings)


def _for_pretraining(name: str, preset: Recipe, arguments: Mapping[str, Any], adapters: bool) -> Recipe:
    """The preset, or what is left of it where it would wreck trained weights."""
    lr = arguments.get("lr")
    small = lr is not None and float(lr) <= FINE_TUNING_LR
    if not small and not adapters:
        return preset
    defaults = hyperparameters(lookup(preset.rule))
    settings = {k: v for k, v in preset.settings.items() if k in defaults and k not in ("lr", "weight_decay")}
    left = sorted(k for k in preset.settings if k not in settings and k not in ("lr", "weight_decay", "lr_convention"))
    why = f"lr={lr:g} is one for trained weights" if small and lr is not None else "there are adapters"
    _log.warning(
        "preset %r is for pretraining, %s: it moves weights by %.1f %% of their norm or so per step, embeddings by "
        "a learning rate of their own. Taken: %s, in AdamW's learning rate. Left out: %s. To have all of it train from "
        "random weights at its own lr, %g",
        name,
        why,
        100 * preset.settings["lr"] * preset.settings.get("uw_floor", 1.0),
        ", ".join(sorted(settings)) or "nothing",
        ", ".join(left),
        preset.settings["lr"],
    )
    return Recipe(preset.rule, settings, preset.source)
