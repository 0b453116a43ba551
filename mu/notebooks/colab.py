"""Colab: what its image lacks, a folder that outlives a disconnect, and the badge and first cell of every notebook (`mu.notebooks.book` writes them)."""

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

from mu import ROOT

DRIVE = Path("/content/drive")
NOT_HERE = (
    "jupyterlab",
    "ipykernel",
    "snakemake",
)  # Colab has a notebook and a kernel of its own, and runs one notebook at a time
KEPT = (
    "torch",
    "torchvision",
    "torchaudio",
    "numpy",
)  # built for the image's driver and for each other: never replaced


def _installed(name):
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def missing(requirements, installed=_installed):
    """Those of `requirements` that are not there or too old. What is newer than asked for stays, and so does what is built for the machine's driver (`KEPT`)."""

    def lacking(requirement):
        there = installed(requirement.name)
        least = max(
            (s.version for s in requirement.specifier if s.operator == ">="),
            key=lambda v: [int(n) for n in v.split(".")],
            default="0",
        )
        return there is None or (
            requirement.name not in KEPT
            and there not in requirement.specifier
            and not Requirement(f"x>={least}").specifier.contains(there, prereleases=True)
        )

    return [str(r) for r in map(Requirement, requirements) if r.name not in NOT_HERE and lacking(r)]


def prepare(drive=False, run=subprocess.run):
    """Install what is missing, torch and its friends held where they are; with `drive`, make runs/ a folder of Google Drive.

    Raises subprocess.CalledProcessError when pip fails, with its words above."""
    wanted = missing(
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    )
    if wanted:
        with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
            constraints.write(
                "".join(f"{name}=={_installed(name)}\n" for name in KEPT if _installed(name))
            )
            constraints.flush()
            run(
                [
                    sys.executable,
                    "-m",
                    "pip",
                    "install",
                    "-q",
                    "--constraint",
                    constraints.name,
                    *wanted,
                ],
                check=True,
            )
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

    if not os.path.isdir("/content/{name}"):
        subprocess.run(["git", "clone", "-q", "--depth", "1", "{address}", "/content/{name}"], check=True)
    os.chdir("/content/{name}")
    sys.path.insert(0, os.getcwd())
"""


def address():
    """Where the repository is on GitHub: `Repository` in pyproject.toml's `[project.urls]`, the one place that says so; "" where it says nothing.

    Raises ValueError for an address that Colab cannot open a notebook from."""
    found = (
        tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
        .get("urls", {})
        .get("Repository", "")
        .removesuffix("/")
    )
    if found and not re.fullmatch(r"https://github\.com/[\w.-]+/[\w.-]+", found):
        raise ValueError(
            f"Colab opens notebooks of https://github.com/OWNER/NAME, not of {found!r}: mend Repository in pyproject.toml"
        )
    return found


def badge(notebook, at):
    """Markdown of the badge that opens a notebook of the repository `at` in Colab; "" without an address."""
    place = at.removeprefix("https://github.com/")
    return at and (
        "[![open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{place}/blob/main/notebooks/{Path(notebook).name})"
    )


def bootstrap(at):
    """The first code cell of every notebook: on Colab it clones the repository, where its address is known, and prepares the machine."""
    clone = CLONE.format(address=at, name=at.rsplit("/", 1)[1]) if at else ""
    return CELL.format(
        clone=clone,
        hint="" if at else HINT,
    )
