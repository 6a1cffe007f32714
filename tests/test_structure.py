"""The structure of the source: imports go one way, functions stay short, and a step is a short walk."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_optim import optimizers

ROOT = Path(__file__).parent.parent
CORE = ROOT / "lightning_optim" / "core"


def modules() -> dict[str, Path]:
    """Every module of the packages by its name."""
    paths = [p for top in ("lightning_optim", "hf_integration", "callbacks") for p in (ROOT / top).rglob("*.py")]
    return {".".join(p.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): p for p in paths}


def imports(path: Path, reference_names: dict[str, Path]) -> set[str]:
    """The modules that a file imports, at any depth of its code and for types alone as well."""
    out: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            out |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            inner = [f"{node.module}.{a.name}" for a in node.names]
            out |= {name if name in reference_names else str(node.module) for name in inner}
    return {name for name in out if name in reference_names}


def test_no_import_circle() -> None:
    reference_names = modules()
    graph = {name: imports(path, reference_names) - {name} for name, path in reference_names.items()}
    assert len(graph) > 150
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the circle


def test_no_symbolic_links() -> None:
    tops = ("lightning_optim", "hf_integration", "callbacks", "examples", "tests")
    assert not [p for top in tops for p in (ROOT / top).rglob("*") if p.is_symlink()]


def functions(path: Path) -> Iterator[tuple[ast.FunctionDef, int]]:
    """Every function of a file with the number of its lines, its docstring left out."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            doc = node.body[0] if ast.get_docstring(node) is not None else None
            documented = (doc.end_lineno or 0) - doc.lineno + 1 if doc is not None else 0
            yield node, (node.end_lineno or 0) - node.lineno + 1 - documented


@pytest.mark.parametrize("path", sorted(CORE.rglob("*.py")), ids=lambda p: str(p.relative_to(CORE)))
def test_files_classes_and_functions_of_the_core_are_short(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ClassDef):
            assert sum(isinstance(x, ast.FunctionDef) for x in node.body) <= 25, node.name
    for node, lines in functions(path):
        assert lines <= 60, node.name


def test_functions_that_build_an_optimizer_are_short() -> None:
    for path in sorted((ROOT / "lightning_optim" / "build").glob("*.py")):
        for node, lines in functions(path):
            assert lines <= 60, f"{path.name}: {node.name}"


@pytest.mark.parametrize(
    ("name", "calls", "files", "moves"), [("adamw", 35, 7, 36), ("muon", 80, 10, 36), ("soap", 130, 11, 60)]
)
def test_a_steady_step_is_a_short_walk(name: str, calls: int, files: int, moves: int) -> None:
    sys.path.insert(0, str(ROOT / "examples" / "benchmark"))
    try:
        from step_calls import steady_step  # pyright: ignore
    finally:
        sys.path.pop(0)
    torch.manual_seed(0)
    walk = steady_step(optimizers.CLASSES[name], "lightning_optim/")
    assert walk.calls <= calls and len(walk.files) <= files and walk.moves <= moves, walk


@pytest.mark.parametrize("room", ["core", "build", "curvature"])
def test_the_test_of_a_module_is_found_by_its_path(room: str) -> None:
    package = ROOT / "lightning_optim"
    modules = [p.relative_to(package) for p in (package / room).rglob("*.py") if p.name != "__init__.py"]
    assert len(modules) > 3
    assert not [p for p in modules if not (ROOT / "tests" / p.with_name(f"test_{p.name}")).exists()]
