"""What the papers claim, beside what was measured here: claims as data, each with the function that looks it up.

Zhang et al. 2024, arXiv:2406.16793; Jordan et al. 2024, kellerjordan.github.io/posts/muon; Liu et al. 2025,
arXiv:2502.16982; Gong et al. 2025, arXiv:2502.07752.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightning_optim.bench.space import Setup
from lightning_optim.bench.statistics import mean_with_error
from lightning_optim.bench.studies import BASELINE, Study, Variant

Measure = Callable[[Sequence[Study], Sequence[Variant]], str | None]
"""What was measured, in words; None if nothing was."""


@dataclass(frozen=True)
class Claim:
    """One claim."""

    source: str
    text: str
    published: str
    measure: Measure
    differences: str
    """Every difference in setting."""


def _pretraining(studies: Sequence[Study], *names: str) -> Study | None:
    """The largest pretraining of the same model and tokens in which all of these are tuned."""
    pretrainings = [
        s for s in studies if (s.setup.regime, s.setup.track) == ("pretrain", "model") and set(names) <= {*s.tuned}
    ]
    return max(pretrainings, key=lambda s: (_parameters(s), s.setup.tokens), default=None)


def _parameters(study: Study) -> int:
    return max((line["model"]["parameters"] for line in study.lines if "model" in line), default=0)


def _state_share(studies: Sequence[Study], variants: Sequence[Variant]) -> str | None:
    del variants
    study = _pretraining(studies, "adam_mini", BASELINE)
    if study is None:
        return None
    ours, theirs = (next(iter(study.runs(n).values()))["memory"]["state"] for n in ("adam_mini", BASELINE))
    return f"{ours / theirs:.1%} of AdamW's state, in bytes that lie in memory"


def _relative_throughput(name: str) -> Measure:
    def measure(studies: Sequence[Study], variants: Sequence[Variant]) -> str | None:
        del variants
        study = _pretraining(studies, name, BASELINE)
        ours, theirs = (study.throughput(n) if study else None for n in (name, BASELINE))
        if study is None or ours is None or theirs is None:
            return None
        effective, base = study.effective_throughput(name), theirs.mean
        told = f"tokens per second {ours.mean / base:.2f} of AdamW's"
        if effective is None:
            return told
        return told + (f", effective throughput {effective / base:.2f}" if effective else ", its last loss not reached")

    return measure


def _loss_at_same_lr(studies: Sequence[Study], variants: Sequence[Variant]) -> str | None:
    del variants
    study = _pretraining(studies, "adam_mini", BASELINE)
    tuned = study.best(BASELINE) if study else None
    same = study.at_lr("adam_mini", tuned["config"]["lr"]) if study and tuned else None
    if tuned is None or same is None or same["status"] != "ok":
        return None
    return f"{same['final']['loss']:.3f} at AdamW's tuned learning rate, AdamW {tuned['final']['loss']:.3f}; one seed"


def muon_overhead(width: int, batch_tokens: int, iterations: int = 5) -> float:
    """The published bound of Muon's additional work: T m / B of a training step's.

    Args:
        width: m.
        batch_tokens: B.
        iterations: T.

    Returns:
        A share.
    """
    return iterations * width / batch_tokens


def _overhead(studies: Sequence[Study], variants: Sequence[Variant]) -> str | None:
    del variants
    study = _pretraining(studies, "muon", BASELINE)
    if study is None:
        return None
    line = next(iter(study.runs("muon").values()))
    clock = study.clock
    spent = [line["time"][f"optimizer_{clock}"] for line in study.runs("muon").values()]
    rest = [line["time"][clock] - line["time"][f"optimizer_{clock}"] for line in study.runs("muon").values()]
    bound = muon_overhead(line["model"].get("hidden_size", 0), line["setup"]["batch_tokens"])
    return f"the bound is {bound:.1%} here; {sum(spent) / sum(rest):.1%} of the time of forward and backward passes"


def _speed_up(name: str) -> Measure:
    def measure(studies: Sequence[Study], variants: Sequence[Variant]) -> str | None:
        del variants
        study = _pretraining(studies, name, BASELINE)
        if study is None:
            return None
        entries = study.to_target(name, "tokens")
        reached = [1 / x for x in entries if x]
        if len(reached) < len(entries):
            return f"AdamW's last loss is not reached on {len(entries) - len(reached)} of {len(entries)} seeds"
        return f"{mean_with_error(reached)} times fewer tokens to AdamW's last loss, over {len(reached)} seed(s)"

    return measure


def _losses(*names: str) -> Measure:
    def measure(studies: Sequence[Study], variants: Sequence[Variant]) -> str | None:
        del variants
        study = _pretraining(studies, *names)
        if study is None:
            return None
        return ", ".join(
            f"{n} {math.exp(study.loss(n).mean):.2f}" for n in sorted(names, key=lambda n: study.loss(n).mean)
        )

    return measure


def _ablation(name: str, *optimizers: str) -> Measure:
    def measure(studies: Sequence[Study], variants: Sequence[Variant]) -> str | None:
        del studies
        entries: dict[tuple[Setup, str], list[Variant]] = {}
        for v in variants:
            if v.ablation == name and v.optimizer in optimizers and v.loss:
                entries.setdefault((v.setup, v.optimizer), []).append(v)
        told = [
            f"{optimizer}: " + ", ".join(f"{v.label} {math.exp(v.loss.mean):.2f}" for v in forms if v.loss)
            for (_, optimizer), forms in entries.items()
        ]
        return "; ".join(told) or None

    return measure


GONG = "Gong et al. 2025"
SCALE = "a model of below a million weights and 10^5 to 10^6 tokens instead of 60M to 1.3B and 1.3B to 13.1B; a CPU"
TEXT = "Python sources and 1024 byte-level BPE tokens instead of C4 and 32k; float32 instead of bfloat16"
LAST = "a tied embedding, trained by AdamW, instead of a last layer of its own"
NORMALIZED = (
    "the directions of Alice, RACS, Fira and Apollo-svd normalized "
    '(`lr_convention="adamw"`), so without their own step size'
)

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "Zhang et al. 2024, Table 1",
        "Adam-mini keeps half of AdamW's state",
        "50 % less, GPT-2 1.5B to Llama 2 13B",
        _state_share,
        "a model of below a million weights; bytes measured, not calculated; step counts and scales are counted",
    ),
    Claim(
        "Zhang et al. 2024, Table 2",
        "Adam-mini has a higher throughput",
        "+49.6 %, Llama 2 7B on two A800, at four times the batch per GPU",
        _relative_throughput("adam_mini"),
        "the same batch for both, on a CPU, where memory limits nothing; ours beside torch's fused AdamW",
    ),
    Claim(
        "Zhang et al. 2024, Fig. 11",
        "Adam-mini does as well with AdamW's hyperparameters",
        "lower last loss than AdamW's at every size from 39M to 1B",
        _loss_at_same_lr,
        f"{SCALE}; not Chinchilla-optimal",
    ),
    Claim(
        "Jordan et al. 2024",
        "Muon's additional work is at most T m / B of a step's",
        "0.7 % for NanoGPT (m 768, B 524288), 0.5 % for Llama 405B",
        _overhead,
        "time instead of FLOPs, bfloat16 iterations beside float32 passes; B is 1024 tokens, so the share is large",
    ),
    Claim(
        "Liu et al. 2025, Fig. 1",
        "Muon needs about half of AdamW's FLOPs for the same loss",
        "52 % at compute-optimal lengths",
        _speed_up("muon"),
        f"tokens at one schedule length, where the learning rate is still high at the crossing; {SCALE}",
    ),
    Claim(
        f"{GONG}, Table 2",
        "Alice is faster than Adam in steps",
        "2.22, 2.00, 2.45 and 2.82 times at 60M, 130M, 350M and 1.3B",
        _speed_up("alice"),
        f"{SCALE}; {TEXT}; AdamW with decay 0.1 instead of Adam; {LAST}; {NORMALIZED}; the rate tuned",
    ),
    Claim(
        f"{GONG}, Table 2",
        "RACS is faster than Adam in steps",
        "effective throughput 1.66, 1.50, 2.08 and 2.42 of Adam's, throughput 1.00 at 60M, 0.89 above",
        _relative_throughput("racs"),
        f"{SCALE}; {TEXT}; {NORMALIZED}; processor time on one thread",
    ),
    Claim(
        f"{GONG}, Table 2",
        "Alice costs little time",
        "throughput 0.95, 0.87, 0.93 and 0.85 of Adam's; effective throughput 2.07, 1.72, 2.27 and 2.30",
        _relative_throughput("alice"),
        f"{SCALE}; {TEXT}; processor time on one thread; 30 refreshes in a run instead of 50 to 500",
    ),
    Claim(
        f"{GONG}, Table 2",
        "perplexities: Alice < Alice-0 < RACS < Apollo-svd < Apollo-mini, Fira < Adam < GaLore",
        "at 130M with the last layer by Adam: 21.79, 22.43, 22.67, 22.84, 23.84, 22.73, 25.03, 25.36",
        _losses("alice", "alice0", "racs", "apollo_svd", "apollo_mini", "fira", "adam", "galore"),
        f"{SCALE}; {TEXT}; {LAST}; {NORMALIZED}; every learning rate tuned",
    ),
    Claim(
        f"{GONG}, Table 2",
        "GaLore and Fira lose without Adam on the last layer, Alice hardly does",
        "130M: GaLore 25.36 to 27.18, Fira 22.73 to 25.21, Alice 21.79 to 21.95",
        _ablation("last_layer", "galore", "fira", "alice"),
        f"{SCALE}; {TEXT}; {NORMALIZED}; learning rates of the model with a tied embedding",
    ),
    Claim(
        f"{GONG}, Table 5",
        "tracking helps with switching only, compensation most",
        "130M: none 26.96, tracking 27.35, and switching 25.11, and compensation 21.95",
        _ablation("statistic", "alice"),
        f"{SCALE}; {TEXT}; {LAST}; the learning rate of full Alice, the direction normalized in all four",
    ),
)
