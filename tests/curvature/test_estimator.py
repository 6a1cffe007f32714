"""The curvature estimator: what it measures, that training is not affected, and that every entry point installs it."""

from __future__ import annotations

import copy
import csv
import functools
import math
from pathlib import Path
from typing import Any, cast

import lightning as L
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import Trainer, TrainerCallback

import hf_integration
from hf_integration.batches import Batches
from lightning_optim import RuleOptimizer, build_optimizer, curvature
from lightning_optim.callbacks import CurvatureCallback
from lightning_optim.curvature import CurvatureEstimator, Labels, categorical, first_rows
from lightning_optim.curvature import labels as label_module
from lightning_optim.diagnostics.hessian import signs
from lightning_optim.diagnostics.view import unwrap_optimizer
from lightning_optim.ops.rounding import hash_key
from tests import test_lightning
from tests.diagnostics.test_diagnostics import Detached, Once
from tests.helpers import rules
from tests.helpers.pool import Pool
from tests.hf_integration import test_trainer as test_hf
from tests.test_lightning import Net, Rows, assert_same, of_precision, trainer, weights
from tests.test_lightning import pytestmark as lightning_warnings

pytestmark = lightning_warnings
CLASSES = 5


@pytest.fixture(autouse=True)
def nothing_made_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """No numbers made of gradients here."""
    monkeypatch.setattr(rules, "feeding", False)


class Small(nn.Module):
    """Tokens to logits, with dropout."""

    def __init__(self, dropout: float = 0.0, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(CLASSES, 4, dtype=dtype)
        self.hidden = nn.Linear(4, 3, dtype=dtype)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(3, CLASSES, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.dropout(torch.tanh(self.hidden(self.embedding(x)))))

    def loss(self, batch: Tensor) -> Tensor:
        return F.cross_entropy(self(batch[:, :-1]).transpose(1, 2), batch[:, 1:])


def batches(count: int = 1, rows: int = 4) -> list[Tensor]:
    made = torch.Generator().manual_seed(1)
    return [torch.randint(CLASSES, (rows, 7), generator=made) for _ in range(count)]


def caught(optimizer: RuleOptimizer) -> list[dict[Tensor, Any]]:
    """What an estimator hands over, instead of handing it over."""
    seen: list[dict[Tensor, Any]] = []
    optimizer.update_curvature = lambda actual: seen.append(dict(actual)) or {}  # pyright: ignore
    return seen


def measured(model: Small, name: str, some: list[Tensor], **settings: Any) -> dict[Tensor, Any]:
    optimizer = build_optimizer(model, name, lr=1e-3)
    seen = caught(optimizer)
    estimator = CurvatureEstimator(model, optimizer, model.loss, share=1.0, **settings)
    for batch in some:
        estimator.record_batch(batch)
    estimator.estimate()
    return seen[0]


# -- estimates --------------------------------------------------------------------------------------------------------


def test_categorical_draws_from_the_softmax() -> None:
    logits = torch.tensor([0.0, 1.0, -torch.inf, 2.0])
    drawn = categorical(logits.expand(200, 100, 4), torch.Generator().manual_seed(0))
    assert drawn.shape == (200, 100)
    share = torch.bincount(drawn.flatten(), minlength=4) / drawn.numel()
    p = logits.softmax(-1)
    assert share[2] == 0
    assert ((share - p).abs() <= 4 * (p * (1 - p) / drawn.numel()).sqrt()).all()


def test_labels_that_do_not_count_stay_and_are_not_counted() -> None:
    logits, target = torch.zeros(2, 3, 50), torch.full((2, 3), 7)
    target[0, 1] = -100

    def spy(x: Tensor, y: Tensor) -> Tensor:
        loss = F.cross_entropy(x.transpose(1, 2), y)
        return loss

    with Labels(3) as labels:
        x = logits.requires_grad_()
        grad = torch.autograd.grad(spy(x, target), x)[0]
    seen = grad.argmin(-1)  # the gradient is negative at the label only
    assert labels.count == 5
    assert not grad[0, 1].any()
    assert (seen != 7).any() and (target[1] == 7).all()
    plain = spy(logits, target)
    with Labels() as labels:
        assert torch.equal(spy(logits, target), plain)
    assert labels.count == 5


@pytest.mark.parametrize("kind", ["cross_entropy", "nll_loss", "bce", "mse"])
def test_gauss_newton_is_the_diagonal_of_the_gauss_newton_matrix_on_average(kind: str) -> None:
    """Of a linear model, where the Gauss-Newton matrix is the Hessian."""
    made = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=made, dtype=torch.float64)
    w = torch.randn(3, 2, generator=made, dtype=torch.float64).requires_grad_()
    y = torch.randint(2, (6,), generator=made)

    def loss(w: Tensor) -> Tensor:
        out = x @ w
        if kind == "cross_entropy":
            return F.cross_entropy(out, y)
        if kind == "nll_loss":
            return F.nll_loss(out.log_softmax(-1), y)
        if kind == "bce":
            return F.binary_cross_entropy_with_logits(out, torch.ones_like(out))
        return F.mse_loss(out, torch.ones_like(out))

    hessian: Any = torch.autograd.functional.hessian(loss, w)
    exact = hessian.reshape(6, 6).diagonal().view(3, 2)
    draws = []
    for seed in range(1000):
        with Labels(seed) as labels:
            g = torch.autograd.grad(loss(w), w)[0]
        draws.append(labels.count * g.square())
    actual = torch.stack(draws)
    assert ((actual.mean(0) - exact).abs() <= 4.5 * actual.std(0) / 1000**0.5).all()


@pytest.mark.parametrize("method", ["exact", "difference"])
def test_hutchinson_is_the_product_with_random_signs(method: Any) -> None:
    model = Small()
    batch = batches()[0]
    actual = measured(model, "sophia_h", [batch], method=method)
    params = list(actual)
    name: dict[Tensor, str] = {p: n for n, p in model.named_parameters()}

    def loss(flat: Tensor) -> Tensor:
        parts = [x.view_as(p) for x, p in zip(flat.split([p.numel() for p in params]), params, strict=True)]
        by_name = {name[p]: x for p, x in zip(params, parts, strict=True)}
        logits: Any = torch.func.functional_call(model, by_name, (batch[:, :-1],))
        return F.cross_entropy(logits.transpose(1, 2), batch[:, 1:])

    hessian: Any = torch.autograd.functional.hessian(loss, torch.cat([p.detach().flatten() for p in params]))
    draw = torch.Generator().manual_seed(hash_key(0, 0, 0, 0))
    u = torch.cat([signs(p.detach(), draw).flatten() for p in params])
    got = torch.cat([actual[p].value.flatten() for p in params])
    torch.testing.assert_close(got, u * (hessian @ u), rtol=0, atol=1e-12 if method == "exact" else 1e-5)


@pytest.mark.parametrize("name", ["sophia_g", "sophia_h"])
def test_micro_batches_make_the_estimate_of_one_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """With labels that do not depend on the draw; micro-batches of unequal size weigh what they are."""
    monkeypatch.setattr(label_module, "categorical", lambda logits, generator: logits.argmin(-1))
    whole = batches(1, rows=6)[0]
    together = measured(Small(), name, [whole])
    apart = measured(Small(), name, [whole[:4], whole[4:]])
    for a, b in zip(together.values(), apart.values(), strict=True):
        assert a.count == b.count == 36
        torch.testing.assert_close(a.value, b.value, rtol=1e-12, atol=1e-14)


def test_a_share_of_the_rows() -> None:
    batch = {"input_ids": torch.zeros(5, 3), "mask": torch.zeros(5), "length": torch.zeros(7), "name": "x"}
    cut = first_rows(batch, 0.5)
    assert {k: len(v) for k, v in cut.items()} == {"input_ids": 3, "mask": 3, "length": 7, "name": 1}
    assert first_rows(batch, 1) is batch


# -- training is not affected -----------------------------------------------------------------------------------------


def unused(optimizer: RuleOptimizer) -> list[dict[str, list[Tensor]]]:
    """Have an estimator measure everything in every step, and use nothing of it."""
    params = [p for g in optimizer.param_groups for p in g["params"]]
    calls: list[dict[str, list[Tensor]]] = []
    optimizer.update_curvature = lambda seen: calls.append(seen) or {}  # pyright: ignore
    optimizer.pending_curvature = lambda: {"gauss_newton": params, "hutchinson": params}  # pyright: ignore
    return calls


@pytest.mark.parametrize("measure", [False, True])
def test_a_plain_loop_with_dropout(measure: bool) -> None:
    model = Small(dropout=0.3, dtype=torch.float32).train()
    norm = nn.BatchNorm1d(3)
    model.add_module("norm", norm)
    model.head.register_forward_pre_hook(lambda m, x: (norm(x[0].transpose(1, 2)).transpose(1, 2),))
    optimizer = build_optimizer(model, "adamw", lr=1e-2)
    calls = unused(optimizer)
    estimator = CurvatureEstimator(model, optimizer, model.loss)
    torch.manual_seed(3)
    for batch in batches(3):
        if measure:
            estimator.record_batch(batch)
        model.loss(batch).backward()
        grads = [p.grad for p in model.parameters()]
        estimator.estimate() if measure else None
        assert all(a is b for a, b in zip(grads, [p.grad for p in model.parameters()], strict=True))
        assert all(m.training for m in model.modules())
        optimizer.step()
        optimizer.zero_grad()
    assert len(calls) == 6 * measure
    state = {k: v.clone() for k, v in model.state_dict().items()} | {"rng": torch.get_rng_state()}
    if measure:
        for key, value in EXPECTED.items():
            assert torch.equal(value, state[key]), key
    else:
        EXPECTED.update(state)


EXPECTED: dict[str, Tensor] = {}


class Dropped(Net):
    """With dropout and a log."""

    def loss(self, batch: Tensor) -> Tensor:
        x = self.embedding(batch)
        logits = self.head(F.dropout(x, 0.2, self.training) + self.out(torch.tanh(self.hidden(x))))
        loss = F.cross_entropy(logits.flatten(0, 1), (batch.flatten() + 1) % test_lightning.VOCABULARY)
        if self.training:
            self.log("loss", loss)
        return loss


class Unused(CurvatureCallback):
    """Measures everything, and nothing of it is used."""

    calls: list[Any]

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        optimizer: Any = trainer.optimizers[0]
        self.calls = unused(optimizer)
        self._settings["share"] = 1.0
        needs_curvature = curvature.needs_curvature
        curvature.needs_curvature = lambda optimizer: True
        try:
            super().on_train_start(trainer, pl_module)
        finally:
            curvature.needs_curvature = needs_curvature


@pytest.mark.parametrize("precision", ["32-true", "16-mixed"])
def test_lightning_with_clipping_accumulation_and_scaler(tmp_path: Path, precision: str) -> None:
    settings: dict[str, Any] = {"gradient_clip_val": 0.05, "accumulate_grad_batches": 2, "max_steps": 3}
    out, callback = [], Unused()
    for callbacks in ([], [callback]):
        net = Dropped("adamw")
        run = trainer(tmp_path, callbacks=callbacks, **of_precision(precision), **settings)
        torch.manual_seed(1)
        run.fit(net, Rows(8))
        out.append(weights(net) | {"rng": torch.get_rng_state(), "loss": run.callback_metrics["loss"]})
    assert_same(*out)
    overflows = 1 if precision == "16-mixed" else 0  # at the first scale, which is then halved
    assert 6 - 2 * overflows <= len(callback.calls) <= 6


def test_transformers_with_clipping_and_accumulation(tmp_path: Path) -> None:
    out = []
    for measure in (False, True):
        model = test_hf.llama(dropout=0.2)
        callbacks = [hf_integration.CurvatureCallback(share=1.0)] if measure else []
        args = test_hf.arguments(
            tmp_path, optim="adamw", gradient_accumulation_steps=2, max_grad_norm=0.1, max_steps=3, bf16=True
        )
        run = test_hf.trainer_of(model, args, *callbacks)
        optimizer: Any = run.create_optimizer()
        calls = unused(optimizer)
        snapshot, curvature.needs_curvature = curvature.needs_curvature, lambda optimizer: True
        try:
            run.train()
        finally:
            curvature.needs_curvature = snapshot
        assert len(calls) == 6 * measure
        out.append(test_hf.weights(model) | {"loss": torch.tensor(test_hf.logged(run, "loss"))})
    test_hf.assert_same(*out)


# -- entry points ------------------------------------------------------------------------------------------------------


class Keep(L.Callback):
    """A checkpoint after three steps."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("name", ["sophia_g", "sophia_h"])
def test_lightning_installs_the_feed_and_resumes_bitwise(tmp_path: Path, name: str) -> None:
    settings = {"refresh": "fixed:2", "rho": 1.0}
    whole = Net(name, **settings)
    run = trainer(tmp_path, max_steps=6, callbacks=[Keep(tmp_path / "a.ckpt")])
    run.fit(whole, Rows(6))
    assert any(isinstance(c, CurvatureCallback) for c in run.callbacks)  # pyright: ignore[reportAttributeAccessIssue]
    optimizer: Any = whole.optimizers(use_pl_optimizer=False)
    assert all(s["hessian"].any() for p, s in optimizer.state.items() if p.ndim == 2)
    resumed = Net(name, **settings)
    trainer(tmp_path, max_steps=6).fit(resumed, Rows(6), ckpt_path=tmp_path / "a.ckpt", weights_only=True)
    assert_same(weights(whole), weights(resumed))


def test_the_loggers_get_the_win_rate(tmp_path: Path) -> None:
    from lightning.pytorch.loggers import CSVLogger

    logger = CSVLogger(tmp_path)
    trainer(tmp_path, max_steps=3, logger=logger, log_every_n_steps=1).fit(
        Net("sophia_g", refresh="fixed:2", rho=1.0), Rows(6)
    )
    with open(Path(logger.log_dir) / "metrics.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["curvature/win_rate"]]
    assert [int(row["step"]) for row in rows] == [0, 2]
    assert 0 < float(rows[-1]["curvature/win_rate"]) < 1 and float(rows[-1]["curvature/seconds"]) > 0


@pytest.mark.parametrize("name", ["sophia_g", "sophia_h"])
def test_transformers_attach_installs_the_feed_and_resumes_bitwise(tmp_path: Path, name: str) -> None:
    def make() -> tuple[nn.Module, Trainer]:
        model = test_hf.llama()
        args = test_hf.arguments(tmp_path, max_steps=6, save_strategy="steps", save_steps=3)
        run = Trainer(model, args, train_dataset=test_hf.Tokens())
        return model, hf_integration.attach(run, name, refresh="fixed:2", rho=1.0)

    whole, run = make()
    run.train()
    optimizer: Any = unwrap_optimizer(run.optimizer)
    assert all(s["hessian"].any() for s in optimizer.state.values())
    resumed, run = make()
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    test_hf.assert_same(test_hf.weights(whole), test_hf.weights(resumed))


class Ragged(torch.utils.data.Dataset[dict[str, Tensor]]):
    """Rows with different numbers of labels."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.randint(1, 8, (test_hf.CONTEXT,), generator=torch.Generator().manual_seed(index))
        labels = ids.clone()
        labels[: index % (test_hf.CONTEXT - 2)] = -100
        return {"input_ids": ids, "labels": labels}


class Popping(Trainer):
    """Takes the labels out, trains another loss than the model's, and keeps account."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.calls, self.lengths = 0, {"train": [0]}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        labels = inputs.pop("labels")
        out = model(**inputs)
        self.calls += 1
        self.lengths["train"].append(len(labels))
        loss = F.cross_entropy(out.logits.flatten(0, 1), torch.full_like(labels, 5).flatten())
        return (loss, out) if return_outputs else loss


def per_item(out: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
    """Needs the number of items, as functions for the Trainer may."""
    logits = out.logits[:, :-1].flatten(0, 1)
    return F.cross_entropy(logits, labels[:, 1:].flatten(), reduction="sum") / num_items_in_batch


class Compared(TrainerCallback):
    """Compares the gradient that an estimator measures with the one that the trainer took."""

    def __init__(self, factor: float) -> None:
        self.factor = factor
        self.losses: list[float] = []

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer: Any = unwrap_optimizer(kwargs["optimizer"])
        assert len(optimizer.loss_oracle.batches) == args.gradient_accumulation_steps
        params = [p for p in kwargs["model"].parameters() if p.grad is not None]
        loss, actual = optimizer.loss_oracle.gradient(params)
        self.losses.append(loss * self.factor)
        trained = torch.cat([p.grad.flatten() for p in params])
        measured = self.factor * torch.cat([x.flatten() for x in actual])
        assert (measured - trained).norm() < 1e-5 * trained.norm()


@pytest.mark.parametrize(
    ("kind", "flags", "more", "accumulate", "factor"),
    [
        (Trainer, {}, {}, 2, 1),
        (Trainer, {"label_smoothing_factor": 0.1}, {}, 2, 1),
        (Trainer, {}, {"compute_loss_func": per_item}, 2, 1),
        (Popping, {}, {}, 1, 1),
        (Popping, {}, {}, 2, 2),  # the Trainer adds up the micro-batches of a loss that takes no notice of items
        (Trainer, {"bf16": True}, {}, 1, 1),
    ],
)
def test_the_loss_is_the_trainers(
    tmp_path: Path, kind: Any, flags: dict[str, Any], more: dict[str, Any], accumulate: int, factor: int
) -> None:
    compared = Compared(factor)
    args = test_hf.arguments(
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=0.0,
        logging_strategy="steps",
        **flags,
    )
    run = hf_integration.attach(kind(test_hf.llama(), args, train_dataset=Ragged(), **more), "lbfgs", lr=1e-3)
    run.add_callback(compared)
    run.train()
    assert compared.losses == pytest.approx(test_hf.logged(run, "loss"), rel=2e-4)  # what is logged is rounded
    assert "compute_loss" not in vars(run)
    if kind is Popping:
        assert run.calls == 2 * accumulate and run.lengths == {"train": [0] + 2 * accumulate * [4]}


def test_passes_of_a_trainer_that_are_not_training_are_no_batches(tmp_path: Path) -> None:
    class Generates(Trainer):
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Tensor:
            with torch.no_grad():
                model(input_ids=inputs["input_ids"][:1])
                self.compute_loss(model, dict(inputs))
            return super().training_step(model, inputs, *args, **kwargs)

    args = test_hf.arguments(tmp_path, max_steps=1, gradient_accumulation_steps=2)
    run = hf_integration.attach(Generates(test_hf.llama(), args, train_dataset=Ragged()), "lbfgs")
    seen: list[int] = []

    class Count(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            seen.append(len(cast("Any", unwrap_optimizer(kwargs["optimizer"])).loss_oracle.batches))

    run.add_callback(Count())
    run.train()
    assert seen == [2]


def test_an_exception_leaves_the_trainer_its_own_method(tmp_path: Path) -> None:
    class Fails(Popping):
        def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            if self.calls == 1:
                raise ZeroDivisionError
            return super().compute_loss(model, inputs, *args, **kwargs)

    run = hf_integration.attach(Fails(test_hf.llama(), test_hf.arguments(tmp_path), train_dataset=Ragged()), "sophia_h")
    with pytest.raises(ZeroDivisionError):
        run.train()
    assert "compute_loss" not in vars(run)


def test_a_copy_of_a_watched_trainer_has_its_own_method() -> None:
    for ours in (False, True):
        run: Any = Popping.__new__(Popping)
        if ours:
            run.compute_loss = math.sqrt
        watching = Batches(run, nn.Linear(1, 1), lambda batch: None)
        watching.open()
        again = copy.deepcopy(run)
        assert again.compute_loss == math.sqrt if ours else again.compute_loss.__self__ is again
        watching.close()
        assert vars(run).get("compute_loss") is (math.sqrt if ours else None)


@pytest.mark.parametrize("name", ["lbfgs", "sophia_g"])
def test_transformers_refuses_another_loss_than_the_trainers(tmp_path: Path, name: str) -> None:
    model = test_hf.llama()
    before = test_hf.weights(model)
    estimator = hf_integration.CurvatureCallback(loss=lambda model, batch: model(**batch).loss)
    args = test_hf.arguments(tmp_path)
    run = hf_integration.attach(Popping(model, args, train_dataset=Ragged(), callbacks=[estimator]), name)
    with pytest.raises(ValueError, match=r"is not the loss that is trained: .*is \d.*trainer's is \d.*loss=\.\.\."):
        run.train()
    test_hf.assert_same(test_hf.weights(model), before)
    assert "compute_loss" not in vars(run) and not cast("Any", unwrap_optimizer(run.optimizer)).state
    same = hf_integration.CurvatureCallback(loss=lambda model, batch: Popping.compute_loss(run, model, dict(batch)))
    run = Popping(test_hf.llama(), args, train_dataset=Ragged(), callbacks=[same])
    hf_integration.attach(run, name).train()


@pytest.mark.parametrize(("manual", "accumulate"), [(False, 1), (False, 2), (True, 1)])
def test_lightning_refuses_another_loss_than_the_modules(tmp_path: Path, manual: bool, accumulate: int) -> None:
    class Drops(Dropped):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            loss = super().training_step(batch, batch_idx)
            if manual:
                optimizer: Any = self.optimizers()
                optimizer.zero_grad()
                self.manual_backward(loss)
                optimizer.step()
            return loss

    for factor in (1.0, 1.5):
        net = Drops("sophia_h")
        net.automatic_optimization = not manual
        before = weights(net)

        def loss(module: Any, batch: Any, factor: float = factor) -> Tensor:
            return factor * Dropped.training_step(module, batch, 0)

        ours = {} if manual else {"accumulate_grad_batches": accumulate}
        run = trainer(tmp_path, callbacks=[CurvatureCallback(loss=loss)], max_steps=2, **ours)
        if factor == 1:
            run.fit(net, Rows(4))
        else:
            with pytest.raises(ValueError, match=r"is not the loss that is trained: .*is \d.*trainer's is \d"):
                run.fit(net, Rows(4))
            assert_same(before, weights(net))


def test_without_a_feed_the_error_says_what_to_add(tmp_path: Path) -> None:
    model = Small()
    optimizer = build_optimizer(model, "sophia_g", lr=1e-3)
    model.loss(batches()[0]).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"sophia_g needs more than gradients.*CurvatureCallback\(\)"):
        optimizer.step()
    assert_same(before, weights(model))
    assert not optimizer.state
    run = test_hf.trainer_of(test_hf.llama(), test_hf.arguments(tmp_path, optim="sophia_g"))
    run.train()  # the factory brings the callback
    assert run.state.global_step == run.args.max_steps


# -- what stands in the way -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [Once, Detached])
def test_a_kernel_without_a_second_derivative(kernel: Any) -> None:
    model = Small()
    model.head.register_forward_pre_hook(lambda m, x: (kernel.apply(x[0]),))
    with pytest.raises(RuntimeError, match="method='difference'"):
        measured(model, "sophia_h", batches(), method="exact")
    actual = measured(model, "sophia_h", batches(), method="difference")
    assert all(x.value.isfinite().all() for x in actual.values())
    with pytest.warns(UserWarning, match="differences of gradients in place of second derivatives") as record:
        fallen = measured(model, "sophia_h", batches(2))
    assert len(record) == 1
    expected = measured(model, "sophia_h", batches(2), method="difference")
    assert all(torch.equal(a.value, b.value) for a, b in zip(fallen.values(), expected.values(), strict=True))
    assert measured(model, "sophia_g", batches())


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing(reentrant: bool) -> None:
    model = Small()
    inner = model.hidden.forward
    model.hidden.forward = lambda x: checkpoint(inner, x, use_reentrant=reentrant)  # pyright: ignore
    for name in ("sophia_g", "sophia_h"):
        if reentrant:
            with pytest.raises(RuntimeError, match="use_reentrant=False"):
                measured(model, name, batches())
        else:
            plain = measured(Small(), name, batches())
            for a, b in zip(measured(model, name, batches()).values(), plain.values(), strict=True):
                assert torch.equal(a.value, b.value)


def test_a_loss_without_labels() -> None:
    model = Small()
    optimizer = build_optimizer(model, "sophia_g", lr=1e-3)
    seen = caught(optimizer)
    estimator = CurvatureEstimator(model, optimizer, lambda batch: model(batch).square().mean(), share=1.0)
    estimator.record_batch(batches()[0])
    with pytest.warns(UserWarning, match="sophia_g: .*cross_entropy.*Hutchinson's estimate") as record:
        estimator.estimate()
    estimator.record_batch(batches()[0])
    estimator.estimate()  # says it once
    assert len(record) == 1 and len(seen) == 2
    other = build_optimizer(model, "sophia_h", lr=1e-3)
    expected = caught(other)
    estimator = CurvatureEstimator(model, other, lambda batch: model(batch).square().mean(), share=1.0)
    estimator.record_batch(batches()[0])
    estimator.estimate()
    for a, b, c in zip(seen[0].values(), seen[1].values(), expected[0].values(), strict=True):
        assert a.diagonal and torch.equal(a.value, c.value) and torch.equal(b.value, c.value)
    with pytest.raises(ValueError, match="share"):
        CurvatureEstimator(model, optimizer, model.loss, share=0.0)
    with pytest.raises(ValueError, match="method"):
        CurvatureCallback(method="finite")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="one measurement is for all"):
        build_optimizer(model, "sophia_g", lr=1e-3, refresh="lazy:10")


def test_a_loss_scale_that_is_too_large_leaves_the_state() -> None:
    model = Small()
    optimizer = build_optimizer(model, "sophia_g", lr=1e-3)
    estimator = CurvatureEstimator(model, optimizer, lambda batch: model.loss(batch), loss_scale=lambda: float("inf"))
    estimator.record_batch(batches()[0])
    assert set(estimator.estimate()) == {"curvature/seconds"}
    assert not optimizer.state


@pytest.mark.parametrize("name", ["sophia_g", "kfac"])
def test_a_step_that_is_refused_leaves_no_trace(name: str) -> None:
    out = []
    for tries in (0, 2):
        model = Small(dtype=torch.float32)
        optimizer = build_optimizer(model, name, lr=1e-2, on_nonfinite="skip")
        estimator = CurvatureEstimator(model, optimizer, model.loss)
        for refused in (*[True] * tries, False):
            estimator.record_batch(batches()[0])
            model.loss(batches()[0]).backward()
            if refused:
                assert model.hidden.weight.grad is not None
                model.hidden.weight.grad.fill_(float("nan"))
            estimator.estimate()
            optimizer.step()
            optimizer.zero_grad()
            assert bool(optimizer.state) is not refused
        slots = {f"{n}.{k}": x for n, p in model.named_parameters() for k, x in optimizer.state[p].items()}
        out.append(weights(model) | slots)
    assert_same(*out)


def test_zero_is_refused_by_name() -> None:
    model = Small()
    model.hidden.weight.ds_id = 1  # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(
        ValueError, match="hidden.weight: sophia_g cannot be measured in the flat parameters of FSDP1 and ZeRO"
    ):
        CurvatureEstimator(model, build_optimizer(model, "sophia_g", lr=1e-3), model.loss)


# -- several processes ------------------------------------------------------------------------------------------------


def argmin(logits: Tensor, generator: torch.Generator) -> Tensor:
    return logits.argmin(-1)


def train(rank: int, world: int, name: str, kind: str) -> dict[str, Tensor]:
    """Three steps on the rank's rows, labels not drawn but the least likely; the whole weights. "pairs" train apart."""
    rules.feeding = False
    label_module.categorical = argmin
    model, group, pair = Small(), None, 0
    if kind == "pairs":
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        pair, rank, world = rank // 2, rank % 2, 2
        group = groups[pair]
    if kind == "fsdp2":
        fully_shard(model, mesh=init_device_mesh("cpu", (world,)))
    ddp = functools.partial(nn.parallel.DistributedDataParallel, process_group=group)
    outer: Any = ddp(model) if kind in ("ddp", "pairs") else model
    optimizer = build_optimizer(model, name, lr=1e-2, refresh="fixed:2", rho=1.0)

    def loss(batch: Tensor, through: nn.Module = model) -> Tensor:
        return F.cross_entropy(through(batch[:, :-1]).transpose(1, 2), batch[:, 1:])

    try:
        estimator = CurvatureEstimator(model, optimizer, loss, share=1.0, rank=rank, group=group)
        for batch in batches(3, rows=4):
            mine = batch.roll(pair, 1).chunk(world)[rank]
            estimator.record_batch(mine)
            loss(mine, outer).backward()
            estimator.estimate()
            optimizer.step()
            optimizer.zero_grad()
    except ValueError as error:
        return {"error": torch.tensor(list(str(error).encode()))}
    finally:
        label_module.categorical = categorical
        rules.feeding = True
    full: Any = {k: p.full_tensor() if hasattr(p, "full_tensor") else p for k, p in model.named_parameters()}  # pyright: ignore
    return {k: p.detach().clone() for k, p in full.items()}


@pytest.mark.dist
@pytest.mark.parametrize(
    ("name", "kind"), [("sophia_g", "ddp"), ("sophia_h", "ddp"), ("sophia_g", "fsdp2"), ("sophia_h", "fsdp2")]
)
def test_two_processes_equal_one(pool: Pool, name: str, kind: str) -> None:
    actual = pool.run("tests.curvature.test_estimator:train", 2, name=name, kind=kind)
    if (name, kind) == ("sophia_h", "fsdp2"):
        assert "FSDP2 does not support" in bytes(actual[0]["error"].tolist()).decode()
        return
    alone = train(0, 1, name, "")
    start = {k: p.detach() for k, p in Small().named_parameters()}
    for one in actual:
        for key, p in alone.items():
            assert (one[key] - p).norm() <= 1e-10 * (p - start[key]).norm(), key


@pytest.mark.dist
@pytest.mark.parametrize("name", ["sophia_g", "sophia_h"])
def test_processes_that_train_apart_are_not_averaged(pool: Pool, name: str) -> None:
    alone = train(0, 1, name, "")
    start = {k: p.detach() for k, p in Small().named_parameters()}
    first, second, third, _ = pool.run("tests.curvature.test_estimator:train", 4, name=name, kind="pairs")
    for key, p in alone.items():
        assert (first[key] - p).norm() <= 1e-10 * (p - start[key]).norm(), key
        assert torch.equal(first[key], second[key])
    assert any(not torch.equal(first[key], third[key]) for key in alone)
