"""A floor rests only on the floors below it: imports go down."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import qat

FLOORS = [
    ("numerics",), ("kernels",), ("quantizers",), ("recipe",), ("targets",), ("modules", "tracing"), ("planning",),
    ("rewriter",), ("calibration",), ("compression",), ("deploy",), ("runtimes",), ("search",), ("training",),
    ("retrieval",), ("reporting",), ("pipeline",),
]
"""Lowest first. ``errors`` is the ground that all of them stand on."""
HEIGHT = {name: height for height, names in enumerate(FLOORS) for name in names}
INSIDE_NUMERICS = ["formats", "affine", "packing", "tensor"]
ROOT = Path(qat.__file__).parent


def imports(path: Path) -> set[str]:
    """Dotted names of the modules of this package that a file imports, at whatever depth."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative imports hide the floor"
            found |= {f"{node.module}.{a.name}" for a in node.names}
    return {name for name in found if name.split(".")[0] == "qat"}


FILES = sorted(p for p in ROOT.rglob("*.py") if p != ROOT / "__init__.py")


def floor(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_file_stands_on_a_floor() -> None:
    assert {floor(p) for p in FILES} - set(HEIGHT) == {"errors"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_go_down(path: Path) -> None:
    own = floor(path)
    for name in imports(path):
        parts = name.split(".")
        other = parts[1] if len(parts) > 1 else ""
        if other == "errors" or other == own:
            continue
        assert own != "errors", f"errors imports {name}"
        if other not in HEIGHT:                      # ``import qat`` or ``from qat import prepare``: the whole surface
            assert HEIGHT[own] >= HEIGHT["search"], f"{own} imports the whole package"
            continue
        assert HEIGHT[other] < HEIGHT[own], f"{own} imports {name}, which lies above it"


def test_numerics_rests_on_torch_alone_and_in_order() -> None:
    for path in (ROOT / "numerics").glob("*.py"):
        for name in imports(path):
            parts = name.split(".")
            if parts[1] == "numerics" and path.stem in INSIDE_NUMERICS:
                below = next(p for p in parts[2:] if p in INSIDE_NUMERICS)
                assert INSIDE_NUMERICS.index(below) < INSIDE_NUMERICS.index(path.stem), f"{path.stem} imports {below}"
        nodes = ast.walk(ast.parse(path.read_text()))
        roots = {a.name.split(".")[0] for n in nodes if isinstance(n, ast.Import) for a in n.names}
        assert roots <= {"torch", "math", "dataclasses"}
