"""What one watched forward pass tells of the weights of a model, and why there is none where it cannot be made."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import product
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from lightning_optim.build.dataflow import WeightFacts, watch
from lightning_optim.build.example_inputs import Inputs, as_inputs, inputs_of
from lightning_optim.build.module_twin import Twin, unwrapped

REAL_LIMIT = 2**22
"""Models of up to so many weights are run with their values where the meta device does not do."""


@dataclass
class Measurement:
    """Facts of a model's weights, and what was run for them."""

    facts: dict[int, WeightFacts] = field(default_factory=dict)
    """By the id of the parameter."""
    notes: list[str] = field(default_factory=list)
    """One line for each module that was run, or could not be."""


_KNOWN: WeakKeyDictionary[nn.Module, tuple[object, dict[str, WeightFacts], str]] = WeakKeyDictionary()
"""What was measured of a module, by parameter names, as long as these and their shapes stay what they are."""


def measure(model: nn.Module, example_inputs: object = None) -> Measurement:
    """Watch a model run once, without its weights.

    With the user's inputs the whole model is run. Otherwise every module within it that describes its own inputs is run
    on its own, the outermost first, and inner ones as far as those outside did not use their weights.

    Args:
        model: any module; nothing of it changes, and its hooks are not called.
        example_inputs: of its forward pass, see `example_inputs.as_inputs`.

    Returns:
        Facts, empty where no inputs are known or nothing runs; a note says why.
    """
    out = Measurement()
    if example_inputs is not None:
        _run(unwrapped(model), [as_inputs(example_inputs)], out, keep=False)
        return out
    for module, inputs in _modules_with_inputs(unwrapped(model), out):
        _run(module, inputs, out)
    return out


def _modules_with_inputs(module: nn.Module, so_far: Measurement) -> Iterator[tuple[nn.Module, Sequence[Inputs]]]:
    """Modules that describe their inputs, outermost first, and those within them whose weights were not used."""
    facts = [so_far.facts.get(id(p)) for p in module.parameters()]
    inputs = [] if any(f is not None and f.kinds for f in facts) else inputs_of(module)
    if inputs:
        yield module, inputs
    for child in module.children():
        yield from _modules_with_inputs(unwrapped(child), so_far)


def _run(module: nn.Module, inputs: Sequence[Inputs], out: Measurement, *, keep: bool = True) -> None:
    """Add what a module's forward pass tells."""
    params = dict(module.named_parameters())
    key = type(module), tuple((name, tuple(p.shape)) for name, p in params.items())
    known = _KNOWN.get(module) if keep else None
    if known is None or known[0] != key:
        known = key, *_watched(module, inputs)
        _KNOWN[module] = known
    for name, facts in known[1].items():
        if name in params:
            out.facts[id(params[name])] = facts
    out.notes.append(known[2])


def _watched(module: nn.Module, inputs: Sequence[Inputs]) -> tuple[dict[str, WeightFacts], str]:
    """Facts by parameter name, and a note."""
    name = type(module).__name__
    start, reason = time.perf_counter(), ""
    size = sum(p.numel() for p in module.parameters())
    has_values = size <= REAL_LIMIT and all(p.device.type == "cpu" for p in module.parameters())
    for with_values, case in product((False, True) if has_values else (False,), inputs):
        try:
            facts = _facts(module, case, with_values=with_values)
        except Exception as error:  # the model's own code, in a setting that it does not expect
            reason = (
                reason or f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120] if str(error) else ''}"
            )
            continue
        how = "with its values" if with_values else "on meta"
        return facts, f"{name}: measured {how} in {time.perf_counter() - start:.1f} s"
    return {}, f"{name}: not measured ({reason}); roles by structure"


def _facts(module: nn.Module, inputs: Inputs, *, with_values: bool) -> dict[str, WeightFacts]:
    twin = Twin(module, _with_values) if with_values else Twin(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the model has to say of these inputs does not matter
        facts = watch(twin.module, *inputs)
    names = {id(p): name for name, p in module.named_parameters()}
    originals = {i: names.get(id(p)) for i, p in twin.originals.items()}
    return {name: f for i, f in facts.items() if (name := originals.get(i)) is not None}


def _with_values(p: Tensor) -> Tensor:
    """A tensor with the values of a parameter, which is not written: the pass takes no step."""
    return nn.Parameter(p.detach().clone(), requires_grad=p.is_floating_point())
