"""A pretend accelerator for machines without one: tensors on the device `card`, whose numbers lie on the CPU.

As on a real one, an operation between the card and the CPU raises, but for numbers (0-d tensors), copies and indices.
`waits` has a line for every time the host has to wait for the card: a number that is read, or a copy either way.
Registering the device changes a whole process, so that tests run `python -m tests.helpers.card` in one of their own.
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

from lightning_optim import RuleOptimizer
from lightning_optim.core.rule import REGISTRY

_setup_privateuseone_for_python_backend("card")
DEVICE = torch.device("card", 0)
aten: Any = torch.ops.aten
ANSWERS = {aten._local_scalar_dense.default, aten.equal.default, aten.is_nonzero.default}
"""Operations that give the host a number."""
SIZED = {aten.nonzero.default, aten.masked_select.default, aten._unique2.default}
"""Operations whose result is as large as the numbers say."""
COPIES = {aten.copy_.default, aten._to_copy.default}

waits: list[str] = []
"""Where in the package the host waited."""


class OnCard(Tensor):
    """A tensor on the card."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> OnCard:
        """Put a tensor of the CPU on the card, without a copy."""
        sizes: Any = (held.shape, held.stride(), held.storage_offset())
        out = Tensor._make_wrapper_subclass(cls, *sizes, dtype=held.dtype, device=DEVICE)
        out.held = held
        return out

    def data_ptr(self) -> int:
        """The address of what is held."""
        return self.held.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        """The storage of what is held."""
        return self.held.untyped_storage()

    def tolist(self) -> Any:
        """The numbers, which the host waits for."""
        return self.cpu().tolist()

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        """A copy of a leaf."""
        out: Tensor = OnCard(self.held.clone())
        out = Parameter(out, self.requires_grad) if isinstance(self, Parameter) else out
        memo[id(self)] = out
        return out

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What is pickled: what is held."""
        return OnCard, (self.held,)

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        """What is held."""
        return f"OnCard({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation that has such tensors."""
        return _run(func, args, kwargs or {})


torch.serialization.add_safe_globals([OnCard])


class Card(TorchDispatchMode):
    """Makes tensors on the card where `device="card"` asks for them, too."""

    def __enter__(self) -> Card:
        """Begin."""
        self._lifts = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor() then makes a copy that is seen here
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """End."""
        torch._C._set_only_lift_cpu_tensors(self._lifts)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation."""
        kwargs = kwargs or {}
        if any(isinstance(x, OnCard) for x in tree_leaves((args, kwargs))) or _is_card(kwargs.get("device")):
            return _run(func, args, kwargs)
        return func(*args, **kwargs)


def _is_card(x: Any) -> bool:
    return isinstance(x, torch.device) and x.type == "card"


def _run(func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
    here = [x for x in tensors if isinstance(x, OnCard)]
    wanted = kwargs.get("device")
    stays = _is_card(wanted) or (bool(here) and wanted is None)
    crosses = func in COPIES and (len(here) != len(tensors) or not stays)
    if crosses or (here and func in ANSWERS | SIZED):
        frames = [frame for frame in traceback.extract_stack() if "lightning_optim" in frame.filename]
        waits.append(f"{frames[-1].filename}:{frames[-1].lineno}" if frames else "elsewhere")
    elif here and "index" not in func.__name__:
        if others := [x for x in tensors if not isinstance(x, OnCard) and x.ndim]:
            raise RuntimeError(f"tensors on two devices: {func} of {tuple(others[0].shape)} on {others[0].device}")

    def opened(x: Any) -> Any:
        return x.held if isinstance(x, OnCard) else torch.device("cpu") if _is_card(x) else x

    def closed(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        known = [y for y in here if y.held is x]  # written in place
        return known[0] if known else OnCard(x) if stays else x

    out = func(*tree_map(opened, args), **tree_map(opened, kwargs))
    if any((x.shape, x.stride()) != (x.held.shape, x.held.stride()) for x in here):
        raise NotImplementedError(f"{func} changes sizes in place")
    return out if func in ANSWERS else tree_map(closed, out)


def steps(name: str, dtype: torch.dtype, count: int = 4, **settings: Any) -> Mapping[str, Any]:
    """Take steps of a rule on the card.

    Args:
        name: of the rule.
        dtype: of the parameters.
        count: of steps.
        settings: of the rule.

    Returns:
        `waits` of every step, and the devices of its state, but for the number of the step.
    """
    rule, draw = REGISTRY[name], torch.Generator().manual_seed(0)
    large = (3000, 40) if rule.elementwise or rule.reduces else (40, 30)
    shapes = [(12, 8), (12, 8), (8, 20), large, *([(7,)] if rule.vectors else [])]
    params = [Parameter(torch.randn(s, generator=draw).to(DEVICE, dtype)) for s in shapes]
    policy = {"refresh": "fixed:3"} if rule.preconditioners else {}
    optimizer = RuleOptimizer(params, {"rule": name, "lr": 1e-3, **policy, **settings})
    found = []
    for _ in range(count):
        for p in params:
            p.grad = torch.randn(p.shape, generator=draw).to(DEVICE, dtype)
        waits.clear()
        optimizer.step()
        found.append(list(waits))
    state = [t for p in params for key, t in optimizer.state[p].items() if key != "step"]
    return {"waits": found, "devices": sorted({str(t.device) for t in state})}


def main() -> None:
    """Print, as JSON, what every rule does in float32 and bfloat16, and looking for non-finite gradients."""
    torch.set_num_threads(1)
    out: dict[str, Any] = {}
    forms = {"float32": {}, "bfloat16": {}, "checked": {"on_nonfinite": "raise"}}
    for name in sorted(name for name, rule in REGISTRY.items() if not rule.curvature_input):
        for form, given in forms.items():
            dtype = torch.bfloat16 if form == "bfloat16" else torch.float32
            try:
                with Card():
                    out[f"{name} {form}"] = steps(name, dtype, **{"on_nonfinite": "off", **given})
            except Exception as error:
                out[f"{name} {form}"] = {"error": f"{type(error).__name__}: {error}"}
    json.dump(out, sys.stdout)


if __name__ == "__main__":
    main()
