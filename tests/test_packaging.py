"""pyproject.toml and constraints.txt agree, and what they promise is what is installed."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

import qat

ROOT = Path(qat.__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COVERED = ("dev", "images", "logging")
"""Extras whose versions constraints.txt holds."""


def constraints() -> dict[str, Version]:
    found = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line and not line.startswith("#"):
            assert re.fullmatch(r"[\w.-]+==[\w.]+", line), f"not an exact version: {line}"
            name, _, version = line.partition("==")
            assert canonicalize_name(name) not in found, f"twice: {name}"
            found[canonicalize_name(name)] = Version(version)
    return found


def listed() -> list[Requirement]:
    extras = PROJECT["optional-dependencies"]
    return [Requirement(text) for text in [*PROJECT["dependencies"], *(r for extra in COVERED for r in extras[extra])]]


def test_core_is_what_it_says() -> None:
    core = {Requirement(text).name for text in PROJECT["dependencies"]}
    data, training = {"datasets", "scikit-learn"}, {"torch", "lightning", "torchmetrics"}
    assert core == data | training | {"hydra-core", "safetensors", "rich"}
    assert all(Requirement(text).specifier for text in PROJECT["dependencies"])


def test_constraints_lie_inside_the_ranges() -> None:
    exact = constraints()
    for requirement in listed():
        version = exact[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version), f"{requirement} against {version}"


def test_constraints_name_all_that_gets_installed() -> None:
    """Follow the requirements of what is installed, from the project's own to the last."""
    exact, waiting, seen = constraints(), [(r, "") for r in listed()], set()
    while waiting:
        requirement, asked_by = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        assert name in exact, f"{name} (of {asked_by or 'pyproject.toml'}) has no line in constraints.txt"
        for text in metadata.requires(name) or ():
            inner = Requirement(text)
            environments = [{"extra": extra} for extra in requirement.extras or ("",)]
            if inner.marker is None or any(inner.marker.evaluate(e) for e in environments):
                waiting.append((inner, name))


def test_torch_has_no_local_version() -> None:
    """So that pip takes whichever build of this version is at hand."""
    assert constraints()["torch"].local is None


def test_version_and_license() -> None:
    assert metadata.version("qat") == PROJECT["version"]
    assert f"## [{PROJECT['version']}]" in (ROOT / "CHANGELOG.md").read_text()
    assert "Apache License" in (ROOT / "LICENSE").read_text()


def test_no_file_names_this_machine() -> None:
    """Documents and configuration hold no absolute path of whoever wrote them."""
    for pattern in ("*.md", "*.toml", "*.txt", "*.py", "conf/**/*.yaml", "notebooks/*.*", "Makefile", ".ci/run"):
        for path in ROOT.glob(pattern):
            assert not re.search(r"/(home|root|work|Users)/\w", path.read_text(encoding="utf-8")), path.name
