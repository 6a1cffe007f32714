"""What is measured of the blocks of every partition is what a dense Hessian says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_optim import build_optimizer
from lightning_optim.build.partition import VIEWS_BY_KIND, PartitionKind
from lightning_optim.diagnostics import hessian
from lightning_optim.diagnostics.hessian import Hessian
from lightning_optim.diagnostics.probes.context import TrainingContext
from lightning_optim.diagnostics.probes.curvature import HessianBlocks
from lightning_optim.diagnostics.undisturbed import frozen
from tests.build.test_partition import MODELS, divided

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing")
IDS = torch.tensor([[1, 5, 2, 9, 7], [3, 3, 0, 10, 4]])


def loss_of(model: Any) -> Callable[[], Tensor]:
    return lambda: model(input_ids=IDS, labels=IDS).loss


def dense(full: Hessian) -> Tensor:
    """Every entry, one product per weight."""
    sizes, columns = [p.numel() for p in full.params], []
    for i, p in enumerate(full.params):
        for unit in torch.eye(p.numel(), dtype=p.dtype):
            columns.append(torch.cat([x.reshape(-1) for x in full.product([unit.view_as(p)], [i])]))
    assert len(columns) == sum(sizes)
    return torch.stack(columns)


class Case:
    """A model, its Hessian, and the places of its weights among all."""

    def __init__(self, name: str) -> None:
        torch.manual_seed(0)
        self.model: nn.Module = MODELS[name]().eval()
        for p in self.model.parameters():
            p.data.add_(torch.randn_like(p) * 0.2)  # LoRA's B is zero at first
        self.params = {k: p for k, p in self.model.named_parameters() if p.requires_grad}
        with frozen(self.model):
            self.hessian = Hessian(loss_of(self.model), list(self.params.values()))
            self.dense = dense(self.hessian)
        places = torch.arange(sum(p.numel() for p in self.params.values())).split([
            p.numel() for p in self.params.values()
        ])
        self.places = {k: x.view(p.shape) for (k, p), x in zip(self.params.items(), places, strict=True)}

    def blocks(self, kind: PartitionKind, every: int = 1) -> list[tuple[hessian.ViewBlock, Tensor]]:
        """Some blocks, with their dense ones."""
        index = {name: i for i, name in enumerate(self.params)}
        out = []
        for block in divided(self.model, kind)[1][::every]:
            cut = hessian.ViewBlock(tuple(index[x.param] for x in block.views), tuple(x.view for x in block.views))
            at = torch.cat([x.view(self.places[x.param]).reshape(-1) for x in block.views])
            out.append((cut, self.dense[at][:, at]))
        return out


@pytest.fixture(
    scope="module", params=["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in MODELS if name != "gpt2")]
)
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("kind", VIEWS_BY_KIND)
def test_products_and_estimates_are_those_of_the_dense_blocks(case: Case, kind: PartitionKind) -> None:
    """Products to rounding; traces and norms within three standard errors of 200 probes, on some blocks."""
    count = len(divided(case.model, kind)[1])
    chosen = case.blocks(kind, max(1, count // 3))
    random = torch.Generator().manual_seed(0)
    off = 0
    for cut, exact in chosen:
        vector = torch.randn(len(exact), generator=random)
        torch.testing.assert_close(case.hessian.flat(cut)(vector), exact @ vector, rtol=1e-3, atol=1e-5)
        probes = [case.hessian.signs(cut, random) for _ in range(200)]
        traces, columns, diagonal = hessian.block_probes(case.hessian, [cut], [probes])
        for samples, expected in ((traces[0], exact.trace()), (columns[0][:, 0], exact.square().sum())):
            error = float(samples.std()) / 200**0.5
            off += abs(float(samples.mean() - expected)) > 3 * error + 1e-6 * float(exact.abs().sum())
        assert torch.count_nonzero(torch.cat([x.reshape(-1) for x in diagonal])) <= len(exact)
    assert off <= 1, "three standard errors are exceeded in 0.3 % of the cases"


def test_the_callback_measures_heads_and_says_how_much_lies_within_them() -> None:
    case = Case("llama")
    model: Any = case.model
    optimizer = build_optimizer(model, "adamw", lr=1e-3)
    probe = HessianBlocks(
        every=1, max_overhead=1e9, exact=(), partition="head", match=("*[qk]_proj*",), probes=20, steps=32
    )
    probe.start(TrainingContext(model, optimizer, lambda batch: loss_of(model)()))
    probe.begin_batch()
    probe.record_batch({"input_ids": IDS})
    loss_of(model)().backward()
    probe.after_forward()
    probe.after_backward()
    probe.before_optimizer_step()
    exact = Case("llama").blocks("head")[:6]
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # the measurement is of the weights after the step
    optimizer.step()
    report = probe.end_batch()
    probe.stop()
    assert report is not None and len(report.arrays["blocks"]) == 6
    for i, (_, block) in enumerate(exact):
        values = torch.linalg.eigvalsh(block.double())
        assert float(report.arrays["lambda_max"][i]) == pytest.approx(float(values[-1]), rel=1e-3, abs=1e-5)
        assert float(report.arrays["lambda_min"][i]) == pytest.approx(float(values[0]), rel=1e-3, abs=1e-5)
        off = abs(float(report.arrays["trace"][i] - block.trace()))
        assert off <= 4 * float(report.arrays["trace_error"][i]) + 1e-6
    assert {"hessian/trace_by_block", "hessian/lambda_max_by_block", "hessian/coupling"} <= set(report.images)
    assert "| head | weights | trace | standard error |" in report.texts["hessian/traces"]
    assert not [tag for tag in report.scalars if tag.startswith("hessian/trace/")]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"partition": "row"}, "unknown partition 'row'; take one of role, layer"),
        ({"max_blocks": 0}, "max_blocks must be"),
    ],
)
def test_what_cannot_be_is_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HessianBlocks(**settings)
