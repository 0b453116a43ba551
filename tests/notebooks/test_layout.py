"""Import order of `mu`: a file imports only from its own group and from earlier groups."""

import ast
import re
import sys
import tomllib
from graphlib import TopologicalSorter
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from setuptools import find_packages

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "mu").rglob("*.py"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
BASE = ["ranges", "devices", "files", "params", "images", "extras", "guards", "hub", "parallel"]
MODELS = ["supported", "models", "trainable", "frozen", "sampling", "losses"]
TRAINING = ["optimizers", "pool", "lowrank", "state", "meta", "attackers", "draws", "controls"]
TRAINING += ["targets", "objective", "train", "validation", "phases"]
METHOD_SIDE = ["concepts", "methods", "publish"]
EVALUATION_SIDE = ["runs", "attacks", "measures", "reports", "notebooks"]
ORDER = [*BASE, *MODELS, *TRAINING, *METHOD_SIDE, *EVALUATION_SIDE]


def imported(file):
    """Return the modules that a file imports, also inside functions."""
    modules = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file} has a relative import"
            modules.add(node.module)
            if node.module.split(".")[0] == "mu":
                modules |= {f"{node.module}.{alias.name}" for alias in node.names}
    return modules


def module(file):
    """Return the dotted name of a file of `mu`."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module(file): file for file in FILES}
NAMED = [name for name in MODULES if name != "mu"]
IMPORTS = {name: imported(file) & MODULES.keys() - {"mu"} for name, file in MODULES.items()}


def group(name):
    return name.split(".")[1]


def test_every_file_has_a_group():
    assert {group(name) for name in NAMED} == set(ORDER)


@pytest.mark.parametrize("name", NAMED)
def test_a_file_imports_only_from_earlier_groups(name):
    own = ORDER.index(group(name))
    later = [other for other in IMPORTS[name] if ORDER.index(group(other)) > own]
    assert not later
    if group(name) in METHOD_SIDE:  # these train nothing
        assert not [other for other in IMPORTS[name] if group(other) in TRAINING]


def test_the_root_imports_nothing():
    assert not IMPORTS["mu"]


def test_imports_have_no_cycle():
    packages = {name for name, file in MODULES.items() if file.name == "__init__.py"}
    files = {name: IMPORTS[name] - packages for name in MODULES}
    assert set(TopologicalSorter(files).static_order()) == set(MODULES)


def test_every_folder_is_an_installed_package():
    folders = {".".join(file.parent.relative_to(ROOT).parts) for file in FILES}
    include = PROJECT["tool"]["setuptools"]["packages"]["find"]["include"]
    assert set(find_packages(str(ROOT), include=include)) == folders


def normalized(name):
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize("name", MODULES)
def test_a_file_imports_only_declared_packages(name):
    """No file imports `data`, the recipe of the pocket models, either."""
    lines = [*PROJECT["project"]["dependencies"]]
    lines += PROJECT["project"]["optional-dependencies"]["gpu"]
    declared = {normalized(Requirement(line).name) for line in lines}
    distributions = packages_distributions()
    top = {other.split(".")[0] for other in imported(MODULES[name])}
    for package in top - set(sys.stdlib_module_names) - {"mu"}:
        found = {normalized(other) for other in distributions.get(package, [])}
        assert found & declared, f"pyproject.toml does not declare {package}"
