"""Other packages' optimizers beside ours: what `step_time.py` compares with, where they are installed.

    pip install pytorch_optimizer heavyball opt_einsum torchao bitsandbytes torch-optimi transformers
    pip install galore-torch apollo-torch adam-mini came-pytorch muon-optimizer

Settings are those of our rule where a package has them: momentum, rank, interval, exclusions. What a package cannot do
without is left in. Parameters that a method is not for go to torch's fused AdamW, or to the package's own AdamW where
it has one inside.
"""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import Parameter

LR = 1e-6

Optimizers = Sequence[torch.optim.Optimizer]
Build = Callable[[list[Parameter], list[Parameter], int], Optimizers]
"""Makes optimizers that take one step together, of (matrices the rule takes, other parameters, refresh interval)."""


def _package(name: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module = importlib.import_module(name)
    if name == "heavyball":
        module.utils.compile_mode = None  # as eager as the rest
    return module


def _plain(package: str, name: str, **settings: Any) -> Build:
    """One optimizer over all parameters."""
    return lambda a, b, _: [getattr(_package(package), name)([*a, *b], lr=LR, **settings)]


def _beside_adamw(package: str, name: str, interval: str = "", **settings: Any) -> Build:
    """One optimizer over the matrices, torch's fused AdamW over the rest."""

    def build(matrices: list[Parameter], rest: list[Parameter], every: int) -> Optimizers:
        case = {**settings, **({interval: every} if interval else {})}
        out = [getattr(_package(package), name)(matrices, lr=LR, **case)]
        return [*out, torch.optim.AdamW(rest, lr=LR, fused=True)] if rest else out

    return build


def _grouped(package: str, name: str, group: dict[str, Any], **settings: Any) -> Build:
    """One optimizer whose own AdamW has the rest; the matrices are a group with a rank."""

    def build(matrices: list[Parameter], rest: list[Parameter], every: int) -> Optimizers:
        groups = [{"params": matrices, "update_proj_gap": every, **group}, *([{"params": rest}] if rest else [])]
        return [getattr(_package(package), name)(groups, lr=LR, **settings)]

    return build


def _flagged(name: str) -> Build:
    """An optimizer of pytorch_optimizer that has an AdamW inside and is told by groups which matrices are its own."""

    def build(matrices: list[Parameter], rest: list[Parameter], _: int) -> Optimizers:
        ours = [getattr(_package("pytorch_optimizer"), name)([{"params": matrices, "use_muon": True}], lr=LR)]
        return [*ours, torch.optim.AdamW(rest, lr=LR, fused=True)] if rest else ours

    return build


def _adam_mini(matrices: list[Parameter], rest: list[Parameter], _: int) -> Optimizers:
    named = [(f"{'mlp' if p.ndim > 1 else 'norm'}.{i}", p) for i, p in enumerate([*matrices, *rest])]
    return [_package("adam_mini").Adam_mini(named, lr=LR, dim=512, n_heads=8, verbose=False)]


_GALORE = {"rank": 128, "scale": 0.25, "proj_type": "std", "projection_type": "std"}
_APOLLO = _GALORE | {"scale": 1.0, "proj": "random", "scale_type": "channel"}
_MINI = {**_APOLLO, "rank": 1, "scale": 128.0, "scale_type": "tensor"}
_FACTOR = {"scale_parameter": False, "relative_step": False}

PEERS: dict[str, dict[str, Build]] = {
    "adamw": {"torch fused": _plain("torch.optim", "AdamW", fused=True)},
    "adam": {"torch fused": _plain("torch.optim", "Adam", fused=True)},
    "amsgrad": {"torch fused": _plain("torch.optim", "Adam", fused=True, amsgrad=True)},
    "sgd": {"torch fused": _plain("torch.optim", "SGD", fused=True), "torch": _plain("torch.optim", "SGD")},
    "adagrad": {"torch fused": _plain("torch.optim", "Adagrad", fused=True)},
    "rmsprop": {
        "torch": _plain("torch.optim", "RMSprop"),
        "torch foreach": _plain("torch.optim", "RMSprop", foreach=True),
    },
    "lion": {"pytorch_optimizer": _plain("pytorch_optimizer", "Lion"), "optimi": _plain("optimi", "Lion")},
    "signsgd": {"pytorch_optimizer": _plain("pytorch_optimizer", "SignSGD", momentum=0.0)},
    "signum": {"pytorch_optimizer": _plain("pytorch_optimizer", "SignSGD", momentum=0.9)},
    "lars": {"pytorch_optimizer": _plain("pytorch_optimizer", "LARS", momentum=0.9)},
    "lamb": {"pytorch_optimizer": _plain("pytorch_optimizer", "Lamb", max_grad_norm=0.0, weight_decay=0.01)},
    "adafactor": {
        "torch": _plain("torch.optim", "Adafactor"),
        "transformers": _plain("transformers", "Adafactor", relative_step=False),
        "pytorch_optimizer": _plain("pytorch_optimizer", "AdaFactor", relative_step=False, betas=(None, 0.999)),
    },
    "adafactor_hf": {"transformers": _plain("transformers", "Adafactor", relative_step=False)},
    "came": {"came_pytorch": _plain("came_pytorch", "CAME"), "pytorch_optimizer": _plain("pytorch_optimizer", "CAME")},
    "adam_mini": {"adam_mini": _adam_mini},
    "adamw-int8": {
        "torchao": _plain("torchao.optim", "AdamW8bit"),
        "bitsandbytes": _plain("bitsandbytes.optim", "AdamW8bit"),
    },
    "adamw-int8_grid": {"bitsandbytes": _plain("bitsandbytes.optim", "AdamW8bit")},
    "adamw-fp8": {"torchao": _plain("torchao.optim", "AdamWFp8")},
    "galore": {
        "galore_torch": _grouped("galore_torch", "GaLoreAdamW", _GALORE, no_deprecation_warning=True),
        "pytorch_optimizer": _grouped("pytorch_optimizer", "GaLore", _GALORE),
    },
    "galore_adafactor": {"galore_torch": _grouped("galore_torch", "GaLoreAdafactor", _GALORE, **_FACTOR)},
    "apollo": {
        "apollo_torch": _grouped("apollo_torch", "APOLLOAdamW", _APOLLO),
        "pytorch_optimizer": _grouped("pytorch_optimizer", "APOLLO", _APOLLO, scale_type="channel"),
    },
    "apollo_mini": {"apollo_torch": _grouped("apollo_torch", "APOLLOAdamW", _MINI)},
    "apollo_svd": {"apollo_torch": _grouped("apollo_torch", "APOLLOAdamW", _APOLLO | {"proj": "svd"})},
    "fira": {"pytorch_optimizer": _grouped("pytorch_optimizer", "Fira", _GALORE)},
    "muon": {
        "torch": _beside_adamw("torch.optim", "Muon", weight_decay=0.0),
        "muon": _beside_adamw("muon", "SingleDeviceMuon"),
        "pytorch_optimizer": _flagged("Muon"),
    },
    "normuon": {"pytorch_optimizer": _flagged("NorMuon")},
    "racs": {},  # pytorch_optimizer's takes row and column means, no power iteration: as much work as one
    "racs-1": {"pytorch_optimizer": _beside_adamw("pytorch_optimizer", "RACS")},
    "alice": {"pytorch_optimizer": _beside_adamw("pytorch_optimizer", "Alice", "update_interval", rank=128)},
    "soap": {
        "pytorch_optimizer": _beside_adamw("pytorch_optimizer", "SOAP", "precondition_frequency"),
        "heavyball": _beside_adamw("heavyball", "SOAP", "precondition_frequency", max_precond_dim=10000),
    },
    "shampoo": {
        "pytorch_optimizer": _beside_adamw("pytorch_optimizer", "Shampoo", "preconditioning_compute_steps"),
        "pytorch_optimizer scalable": _beside_adamw(
            "pytorch_optimizer",
            "ScalableShampoo",
            "preconditioning_compute_steps",
            block_size=1024,
            start_preconditioning_step=1,
        ),
    },
    "psgd_kron": {
        "pytorch_optimizer": _beside_adamw("pytorch_optimizer", "Kron"),
        "heavyball": lambda matrices, rest, every: _beside_adamw(
            "heavyball", "PSGDKron", preconditioner_update_probability=1 / every, max_size_triangular=8192
        )(matrices, rest, every),
    },
}
"""By the name of our optimizer, every peer by its package. `muon-fp32` and the like are compared with `muon`'s."""


def peers(name: str) -> dict[str, Build]:
    """The peers of an optimizer or a variant of one that are installed.

    Args:
        name: of the optimizer, `rule` or `rule-variant`.

    Returns:
        Builders by package.
    """
    actual = {}
    for package, build in known(name).items():
        module = package.split()[0]
        try:
            _package({"torch": "torch.optim"}.get(module, module))
        except ImportError:
            continue
        actual[package] = build
    return actual


def known(name: str) -> dict[str, Build]:
    """The peers of an optimizer or a variant of one, installed or not.

    Returns:
        Builders by package.
    """
    return PEERS.get(name.removesuffix("-compiled"), PEERS.get(name.partition("-")[0], {}))
