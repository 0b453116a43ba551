"""Run notebooks on Colab: install what its image lacks; badge and first code cell of a notebook.

`mu.notebooks.book` writes badges and first cells into the notebooks.
"""

import importlib
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from packaging.requirements import Requirement
from packaging.version import Version

from mu import ROOT

DRIVE = Path("/content/drive")
# Colab has its own notebook and kernel, and runs one notebook at a time.
UNUSED = ("jupyterlab", "ipykernel", "snakemake")
# Built for the image's driver and for each other: never replaced.
PINNED = ("torch", "torchvision", "torchaudio", "numpy")


def _installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _is_missing(requirement, found):
    """Return whether version `found` (None: not installed) is too old for a requirement."""
    if found is None:
        return True
    if requirement.name in PINNED:
        return False
    bounds = [Version(s.version) for s in requirement.specifier if s.operator == ">="]
    return bool(bounds) and Version(found) < max(bounds)


def missing(requirements, installed=_installed):
    """Return the requirements that are not installed or too old.

    Newer versions are accepted. So are older ones of packages that the image pins (`PINNED`).
    installed: name → version or None.
    """
    parsed = [Requirement(line) for line in requirements]
    used = [requirement for requirement in parsed if requirement.name not in UNUSED]
    return [str(r) for r in used if _is_missing(r, installed(r.name))]


def _project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def _install(wanted, run):
    """Install packages; pip may not change the pinned ones."""
    pins = {name: _installed(name) for name in PINNED}
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.writelines(f"{name}=={found}\n" for name, found in pins.items() if found)
        constraints.flush()
        options = ["-q", "--constraint", constraints.name]
        run([sys.executable, "-m", "pip", "install", *options, *wanted], check=True)


def prepare(drive=False, run=subprocess.run):
    """Install missing packages and change to the repository; torch and numpy keep their versions.

    drive: link runs/ to a folder on Google Drive.
    Raises subprocess.CalledProcessError if pip fails.
    """
    if wanted := missing(_project()["dependencies"]):
        _install(wanted, run)
    if drive:
        importlib.import_module("google.colab.drive").mount(str(DRIVE))  # exists on Colab only
        runs = DRIVE / "MyDrive" / "mu-runs"
        runs.mkdir(parents=True, exist_ok=True)
        if not (ROOT / "runs").exists():
            os.symlink(runs, ROOT / "runs")
    os.chdir(ROOT)


CELL = """import sys

if "google.colab" in sys.modules:  # elsewhere this cell does nothing
{clone}{hint}    from mu.notebooks.colab import prepare

    prepare(drive=False)  # True: keep runs/ on Google Drive, across disconnects"""
HINT = "    # no module mu? clone the repository, `%cd` into it, and run this cell again\n"
CLONE = """    import os, subprocess

    folder, address = "/content/{name}", "{address}"
    if not os.path.isdir(folder):
        subprocess.run(["git", "clone", "-q", "--depth", "1", address, folder], check=True)
    os.chdir(folder)
    sys.path.insert(0, os.getcwd())
"""


def checked(address):
    """Return an address without its last slash. Raises ValueError if Colab cannot open it."""
    address = address.removesuffix("/")
    if address and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", address):
        raise ValueError(
            f"Repository = {address!r}: Colab opens https://github.com/OWNER/NAME only, "
            "correct it in pyproject.toml"
        )
    return address


def address():
    """Return the repository's address on GitHub, or "" if pyproject.toml has none.

    Reads `Repository` of `[project.urls]`. Raises as `checked` does.
    """
    return checked(_project().get("urls", {}).get("Repository", ""))


def set_address(address):
    """Write the address of a repository, such as a fork, to pyproject.toml; "" removes it.

    Raises as `checked` does.
    """
    file = ROOT / "pyproject.toml"
    text = re.sub(r'\[project\.urls\]\nRepository = "[^"]*"\n\n', "", file.read_text())
    urls = f'[project.urls]\nRepository = "{checked(address)}"\n\n' if address else ""
    file.write_text(
        text.replace("[tool.setuptools.packages.find]", f"{urls}[tool.setuptools.packages.find]")
    )


def badge(notebook, at):
    """Return Markdown of the badge that opens a notebook in Colab.

    at: address of the repository; "" returns "".
    """
    if not at:
        return ""
    path = f"{at.removeprefix('https://github.com/')}/blob/main/notebooks/{Path(notebook).name}"
    image = "https://colab.research.google.com/assets/colab-badge.svg"
    return f"[![open in Colab]({image})](https://colab.research.google.com/github/{path})"


def bootstrap(at):
    """Return the first code cell of every notebook, which prepares Colab.

    at: address of the repository, from which the cell clones it; "" for none.
    """
    clone = CLONE.format(address=at, name=at.rsplit("/", 1)[1]) if at else ""
    return CELL.format(clone=clone, hint="" if at else HINT)
