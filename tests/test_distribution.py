"""What `pip install jaxserve` brings: few packages, no torch, everything the code needs."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest

packaging = pytest.importorskip("packaging.requirements")
ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def requires(name: str) -> list[str]:
    try:
        return metadata.requires(name) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed here, so what it brings is not known")


def closure(requirements: Iterable[str]) -> set[str]:
    """Names of all distributions that the requirements lead to here, by what is installed."""
    found: set[tuple[str, str]] = set()

    def add(text: str, extra: str) -> None:
        requirement = packaging.Requirement(text)
        if requirement.marker and not requirement.marker.evaluate({"extra": extra}):
            return
        name = requirement.name.lower().replace("_", "-")
        for wanted in ("", *requirement.extras):
            if (name, wanted) not in found:
                found.add((name, wanted))
                for inner in requires(requirement.name):
                    add(inner, wanted)

    for text in requirements:
        add(text, "")
    return {name for name, _ in found}


def test_the_core_is_at_most_forty_packages_and_no_torch():
    names = closure(PROJECT["project"]["dependencies"]) | {"jaxserve"}
    assert "torch" not in names
    assert len(names) <= 40, sorted(names)


def test_every_package_of_the_repository_is_shipped():
    packages = {file.parent.name for file in ROOT.glob("*/__init__.py")}
    assert packages == set(PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"])
