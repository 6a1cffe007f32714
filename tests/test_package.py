"""The package as a user gets it: imports, generated files, the wheel, the cost of a new rule."""

from __future__ import annotations

import ast
import inspect
import os
import shutil
import subprocess
import sys
import tomllib
import typing
from pathlib import Path

import lightning_optim
from lightning_optim import catalog, optimizers
from lightning_optim.core.rule import REGISTRY, hyperparameters

ROOT = Path(__file__).parent.parent


def run(*args: str, cwd: Path = ROOT, **environment: str) -> str:
    """Run a program; its output, and a failure with it."""
    env = {**os.environ, **environment}
    done = subprocess.run(
        args, cwd=cwd, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def imported(path: Path) -> set[str]:
    """Absolute names a file imports, at any depth of its code."""
    actual: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            actual |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import in {path}"
            actual |= {f"{node.module}.{a.name}" for a in node.names} | {str(node.module)}
    return actual


ALLOWED = {
    "ops": {"ops"},
    "settings": set(),
    "refresh": {"ops", "settings"},
    "relora": {"core", "ops"},
    "rules": {"core.rule", "ops", "rules"},
    "core": {"core", "ops", "refresh"},
    "diagnostics": {"build", "core", "diagnostics", "ops", "refresh"},
    "schedule": {"core"},
    "build": {"build", "core", "optimizers", "schedule"},
    "catalog": {"core"},
    "optimizers": {"catalog", "core", "rules", "optimizers"},
    "docs": {"catalog", "core", "optimizers"},
    "curvature": {"build", "core", "curvature", "diagnostics", "ops"},
    "callbacks": {"build", "callbacks", "core", "curvature", "diagnostics", "relora", "schedule"},
    "config": {"build", "callbacks.configure", "core", "schedule"},
    "lightning": {"callbacks", "config", "schedule"},
    "data": {"data"},
    "bench": {
        *("bench", "build", "catalog", "core", "curvature", "data"),
        *("diagnostics", "docs", "optimizers", "refresh", "schedule"),
    },
    "terminal": set(),
    "show": {"build", "catalog", "core", "optimizers", "terminal"},
    "__main__": {"bench.__main__", "build", "catalog", "core", "settings", "show", "terminal"},
}


def test_imports_go_one_way() -> None:
    package = ROOT / "lightning_optim"
    for path in package.rglob("*.py"):
        home = path.relative_to(package).parts[0].removesuffix(".py")
        if home == "__init__":
            continue
        for name in imported(path):
            if name.startswith("lightning_optim."):
                inner = name.removeprefix("lightning_optim.")
                assert any(inner == a or inner.startswith(f"{a}.") for a in ALLOWED[home]), f"{path.name}: {name}"
            if home in ("ops", "rules"):
                assert not name.startswith("torch.distributed"), f"{path.name} imports {name}"
                assert "optimizer" not in name and "parallel" not in name, f"{path.name} imports {name}"
            if home not in ("callbacks", "bench", "data", "__main__"):
                assert name.split(".")[0] not in ("lightning", "transformers", "peft"), f"{path.name} imports {name}"
            assert home in ("bench", "__main__") or not name.startswith("lightning_optim.bench"), f"{path.name}: {name}"
    leaves = [p for d in ("hf_integration", "callbacks", "examples") for p in (ROOT / d).rglob("*.py")]
    for path in [*package.rglob("*.py"), *leaves]:
        assert not any(n.split(".")[0] in ("examples", "callbacks") for n in imported(path)), path
    for path in (p for p in package.rglob("*.py") if "callbacks" not in p.parts):
        assert not any(n.split(".")[0] == "hf_integration" for n in imported(path)), path


def test_only_the_parallel_code_asks_about_dtensors() -> None:
    for path in (ROOT / "lightning_optim").rglob("*.py"):
        if path.parent.name != "parallel":
            assert "DTensor" not in {n.id for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Name)}, (
                path
            )


def test_importing_the_package_needs_torch_only() -> None:
    code = (
        "import sys; import torch; before = set(sys.modules); import lightning_optim;"
        "bad = {'lightning', 'pytorch_lightning', 'transformers', 'peft', 'accelerate', 'torchmetrics', 'tensorboard'};"
        "print(sorted(bad & (set(sys.modules) - before)))"
    )
    assert run(sys.executable, "-c", code).strip() == "[]"


def test_every_public_name_exists_and_is_documented() -> None:
    for name in lightning_optim.__all__:
        assert inspect.getdoc(getattr(lightning_optim, name)), name
    for rule in REGISTRY.values():
        assert rule.source and catalog.summary(rule)


def test_optimizer_classes_have_real_signatures() -> None:
    for name, cls in optimizers.CLASSES.items():
        parameters = inspect.signature(cls).parameters
        assert list(inspect.signature(cls.__init__).parameters)[1:] == list(parameters)
        hints = typing.get_type_hints(REGISTRY[name])
        for key in ("lr", "weight_decay"):
            assert parameters[key].annotation is float and hints[key] is float
        assert cls.__module__ == "lightning_optim.optimizers" and getattr(optimizers, cls.__name__) is cls


def test_stubs_carry_the_documentation() -> None:
    """An editor shows the docstring of the stub; `help` shows that of the class."""
    stub = (ROOT / "lightning_optim" / "optimizers.pyi").read_text()
    assert max(map(len, stub.splitlines())) <= 120
    stubs = {node.name: ast.get_docstring(node) for node in ast.parse(stub).body if isinstance(node, ast.ClassDef)}
    assert set(stubs) == {cls.__name__ for cls in optimizers.CLASSES.values()}
    for name, cls in optimizers.CLASSES.items():
        text, rule = stubs[cls.__name__], REGISTRY[name]
        assert text is not None and "Source: " in text, name
        assert text.startswith(str(inspect.getdoc(rule))), name
        assert text.split() == str(inspect.getdoc(cls)).split(), name
        assert all(f"{key}=" in text for key in hyperparameters(rule)), name


def test_tables_and_stubs_are_up_to_date() -> None:
    run(sys.executable, "-m", "lightning_optim.docs", "--check")


def test_list_command() -> None:
    out = run(sys.executable, "-m", "lightning_optim", "list")
    assert [line.split()[0] for line in out.splitlines()] == sorted(REGISTRY)
    (muon,) = (line.split(maxsplit=5) for line in out.splitlines() if line.startswith("muon "))
    assert muon[1:5] == ["orthogonalized", "matrices", "4.00", "B/weight"]


def copied(folder: Path) -> Path:
    """The source tree, without what git ignores."""
    target = folder / "copy"
    target.mkdir()
    for name in ("lightning_optim", "hf_integration", "callbacks", "tests", "examples"):
        skip = shutil.ignore_patterns("__pycache__", "cases", "runs")
        shutil.copytree(ROOT / name, target / name, symlinks=True, ignore=skip)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, target / name)
    return target


TOY = '''"""Toy: the sign of the gradient."""

from dataclasses import dataclass
from types import SimpleNamespace
from typing import ClassVar

from torch import Tensor

from lightning_optim.core.rule import Rule


@dataclass(frozen=True)
class Toy(Rule):
    """Toy: the sign of the gradient."""

    lr: float = 1e-3
    weight_decay: float = 0.0

    name: ClassVar = "toy"
    source: ClassVar = "this test"
    elementwise: ClassVar = True

    def rms(self, m: int, n: int) -> float:
        return 1.0

    def update(self, g: Tensor, s: SimpleNamespace, p: Tensor | None, t: int) -> Tensor:
        return g.sign()
'''
REFERENCE = """SETTINGS = [{"weight_decay": 0.1}]


def step(p, g, state, t, h):
    return (1 - h["lr"] * h["weight_decay"]) * p - h["lr"] * g.sign()
"""


def test_a_new_rule_is_one_file_and_one_reference(tmp_path: Path) -> None:
    tree = copied(tmp_path)
    (tree / "lightning_optim" / "rules" / "toy.py").write_text(TOY)
    contract = (
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/contract/test_contract.py",
        "-k",
        "toy",
    )
    done = subprocess.run(contract, cwd=tree, text=True, capture_output=True, check=False)
    assert done.returncode == 1
    assert "rule 'toy' has no reference: write tests/contract/references/toy.py" in done.stdout
    (tree / "tests" / "contract" / "references" / "toy.py").write_text(REFERENCE)
    assert "passed" in run(*contract, cwd=tree)
    done = subprocess.run((sys.executable, "-m", "lightning_optim.docs", "--check"), cwd=tree, capture_output=True)
    assert done.returncode == 1
    run(sys.executable, "-m", "lightning_optim.docs", cwd=tree)
    assert "| `toy` |" in (tree / "lightning_optim" / "README.md").read_text()
    assert "class Toy(RuleOptimizer):" in (tree / "lightning_optim" / "optimizers.pyi").read_text()
    assert "toy" in run(sys.executable, "-m", "lightning_optim", "list", cwd=tree)
    code = "import torch, lightning_optim as l; print(type(l.build_optimizer(torch.nn.Linear(2, 2), 'toy', lr=1.0)))"
    assert "lightning_optim.optimizers.Toy" in run(sys.executable, "-c", code, cwd=tree)


TOY_PROBE = '''"""The mean of all weights."""

from lightning_optim.diagnostics.probes.base import Probe
from lightning_optim.diagnostics.probes.context import TrainingContext
from lightning_optim.diagnostics.report import Report


class Toy(Probe):
    """The mean of all weights, `toy/mean`.

    Args:
        every: steps between measurements.
        max_overhead: share of training time above which the interval doubles.
    """

    name = "toy"
    charts = {"mean of the weights": ["toy/mean"]}

    def __init__(self, every: int = 1, max_overhead: float = 1.0) -> None:
        super().__init__(every, max_overhead)

    def measure(self, context: TrainingContext) -> Report:
        weights = [p.mean().item() for p in context.model.parameters()]
        return Report(scalars={"toy/mean": sum(weights) / len(weights)})
'''
TOY_RUNS = """
from pathlib import Path
import hf_integration
from lightning_optim import callbacks
from tests.callbacks.test_probes import Module, fit, hf_folder, hf_run, llama, scalars

assert "ToyLogger" in callbacks.__all__ and "ToyLogger" in hf_integration.__all__
assert [type(c).__name__ for c in callbacks.diagnostics("cheap")][0] == "ToyLogger"
fit(Path("lightning"), Module("adamw"), callbacks.ToyLogger(), steps=3)
hf_run(Path("transformers"), llama(), hf_integration.ToyLogger(every=2), max_steps=4, optim="adamw")
for folder, count in ((Path("lightning"), 3), (hf_folder(Path("transformers")), 2)):
    print(len(scalars(folder)["toy/mean"]) == count and scalars(folder)["diagnostics/share/toy"][0] > 0)
"""


def test_a_new_probe_is_one_class_and_one_row(tmp_path: Path) -> None:
    """Two files are written, and trainers of both frameworks log what the probe measures."""
    tree = copied(tmp_path)
    probes = tree / "lightning_optim" / "diagnostics" / "probes"
    (probes / "toy.py").write_text(TOY_PROBE)
    rows, line = (probes / "registry.py").read_text(), "from lightning_optim.diagnostics.probes.toy import Toy\n"
    before = "REGISTRY: tuple[ProbeEntry, ...] = (\n"
    assert before in rows
    rows = rows.replace("\nPreset = ", f"{line}\nPreset = ").replace(
        before, f'{before}    ProbeEntry(Toy, "ToyLogger", preset="cheap", budget=1.0, every=1),\n'
    )
    (probes / "registry.py").write_text(rows)
    assert run(sys.executable, "-c", TOY_RUNS, cwd=tree, PYTHONPATH=str(tree)).split()[-2:] == ["True", "True"]
    stubs = (sys.executable, "-m", "lightning_optim.diagnostics.probes.stubs")
    assert subprocess.run((*stubs, "--check"), cwd=tree, env=os.environ | {"PYTHONPATH": str(tree)}).returncode == 1
    run(*stubs, cwd=tree, PYTHONPATH=str(tree))
    for stub in ("lightning_optim/callbacks/probes.pyi", "hf_integration/probes.pyi"):
        assert "class ToyLogger(Diagnostic):" in (tree / stub).read_text()


def test_the_version_has_one_place_and_building_needs_no_torch(tmp_path: Path) -> None:
    """The version is read from the source without importing it, as a build runs without torch."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert "version" not in project and project["dynamic"] == ["version"]
    (tmp_path / "torch.py").write_text("raise RuntimeError('torch was imported')\n")
    code = (
        "from setuptools.config.pyprojecttoml import apply_configuration; from setuptools import Distribution;"
        "print(apply_configuration(Distribution(), 'pyproject.toml').metadata.version)"
    )
    out = run(sys.executable, "-W", "ignore", "-c", code, PYTHONPATH=str(tmp_path))
    assert out.split()[-1] == lightning_optim.__version__


def test_the_wheel_beside_a_decoy(tmp_path: Path) -> None:
    """Built, installed without dependencies, and imported from a folder with a callbacks.py of its own."""
    tree = copied(tmp_path)
    pip = (sys.executable, "-m", "pip", "-q", "--disable-pip-version-check")
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", str(tmp_path / "dist"), str(tree))
    wheel = next((tmp_path / "dist").glob("*.whl"))
    site = tmp_path / "site"
    run(*pip, "install", "--no-deps", "--target", str(site), str(wheel))
    work = tmp_path / "work"
    work.mkdir()
    (work / "callbacks.py").write_text("raise RuntimeError('the decoy was imported')\n")
    code = (
        "import importlib, pkgutil, lightning_optim, hf_integration;"
        "packages = (lightning_optim, hf_integration);"
        "mods = [m.name for p in packages for m in pkgutil.walk_packages(p.__path__, p.__name__ + '.')];"
        "[importlib.import_module(m) for m in mods if not m.endswith('__main__')];"
        "print(lightning_optim.__file__, len(mods), 'lightning_optim.callbacks' in mods)"
    )
    path, count, callbacks = run(sys.executable, "-c", code, cwd=work, PYTHONPATH=str(site)).split()[-3:]
    assert Path(path).is_relative_to(site) and int(count) > 20 and callbacks == "True"
    assert (site / "lightning_optim" / "optimizers.pyi").exists()
    assert (site / "lightning_optim" / "callbacks" / "probes.pyi").exists()
    assert (site / "hf_integration" / "probes.pyi").exists()
    assert (site / "lightning_optim" / "py.typed").exists()
    assert not (site / "callbacks").exists() and not (site / "tests").exists()
    assert wheel.name.startswith(f"lightning_optim-{lightning_optim.__version__}-")
