"""Declared dependencies, the Makefile and CI agree."""

import os
import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
REQUIRED = [*PROJECT["dependencies"], *EXTRAS["dev"], *EXTRAS["recipe"], *EXTRAS["gpu"]]
MEASURES = [*EXTRAS["measures"], *EXTRAS["nudenet"]]
MAKEFILE = (ROOT / "Makefile").read_text()


def operators(requirement):
    return {s.operator for s in requirement.specifier}


def test_environment_and_pyproject_name_the_same_ranges():
    *conda, pip = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
    assert sorted(pip["pip"]) == sorted([*REQUIRED, "-e ."])
    assert conda == ["python" + PROJECT["requires-python"], "pip"]


@pytest.mark.parametrize("line", REQUIRED)
def test_ranges_are_closed_and_contain_the_installed_version(line):
    requirement = Requirement(line)
    assert operators(requirement) == {">=", "<"}
    if requirement.name not in ("resvg-py",):  # an extra
        assert requirement.specifier.contains(version(requirement.name)), version(requirement.name)


def test_the_tested_versions_are_in_their_ranges():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = [Requirement(line) for line in lines if not line.startswith("#")]
    versions = {canonicalize_name(pin.name): str(pin.specifier)[2:] for pin in pinned}
    for requirement in map(Requirement, REQUIRED):
        assert requirement.specifier.contains(versions[canonicalize_name(requirement.name)])
    first = MAKEFILE.index("-c constraints.txt torch\n")
    assert first < MAKEFILE.index('-c constraints.txt -e ".[dev,recipe,gpu,nudenet]"')


def test_optional_packages_are_declared():
    """Calls of `extra` name declared packages; the Makefile's pins are in their ranges."""
    requirements = [Requirement(line) for line in MEASURES]
    assert all(operators(requirement) == {">=", "<"} for requirement in requirements)
    ranges = {requirement.name: requirement.specifier for requirement in requirements}
    sources = "\n".join(file.read_text() for file in (ROOT / "mu").rglob("*.py"))
    assert set(re.findall(r'extra\("\w+", "([\w-]+)"', sources)) == set(ranges)
    line = re.search(r"--target .venv/measures (.*)", MAKEFILE)[1]
    pins = dict(pin.split("==") for pin in line.split())
    assert pins.pop("torchvision") == "0.28.0"
    assert pins
    assert all(ranges[name].contains(pin) for name, pin in pins.items())
    assert ranges["nudenet"].contains(version("nudenet"))


def test_ci_runs_lint_and_tests():
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    lines = script.read_text().splitlines()
    assert "set -e" in lines
    assert lines.index("make lint") < lines.index("make test")


def test_make_help_lists_every_target():
    targets = re.search(r"^\.PHONY: (.*)", MAKEFILE, re.MULTILINE)[1].split()
    assert set(re.findall(r"^([a-z-]+):.* ## ", MAKEFILE, re.MULTILINE)) == set(targets)
