"""Packages that are installed on Colab; badge and first cell of the notebooks."""

import os
import shutil
import subprocess
import sys
import types
from pathlib import Path

import nbformat
import pytest

from mu.notebooks import book, colab
from mu.notebooks.colab import missing

WANTED = [
    "torch>=2.13,<2.14",
    "diffusers>=0.42,<0.43",
    "peft>=0.21,<0.22",
    "snakemake>=9",
    "numpy>=2.4,<3",
    "tqdm>=4.70,<5",
]
EMPTY = {}
PINNED_ARE_OLDER = {
    "torch": "2.9.0+cu126",
    "numpy": "2.0.2",
    "diffusers": "0.42.1",
    "peft": "0.21.0",
    "tqdm": "4.70.0",
}
SOME_ARE_TOO_OLD = {
    "torch": "2.15.0",
    "numpy": "2.5",
    "diffusers": "0.35.2",
    "peft": "0.30.0",
    "tqdm": "4.67.1",
}
EVERYTHING = [
    "diffusers<0.43,>=0.42",
    "numpy<3,>=2.4",
    "peft<0.22,>=0.21",
    "torch<2.14,>=2.13",
    "tqdm<5,>=4.70",
]
ADDRESS = "https://github.com/somebody/mu"


@pytest.mark.parametrize(
    "image, expected",
    [
        (EMPTY, EVERYTHING),
        (PINNED_ARE_OLDER, []),
        (SOME_ARE_TOO_OLD, ["diffusers<0.43,>=0.42", "tqdm<5,>=4.70"]),
    ],
)
def test_only_missing_or_too_old_packages_are_installed(image, expected):
    assert sorted(missing(WANTED, image.get)) == expected


def test_torch_keeps_its_version(monkeypatch, tmp_path):
    calls = []

    def run(command, check):
        calls.append(command)
        constraints = Path(command[command.index("--constraint") + 1]).read_text()
        assert "torch==2.9.0+cu126" in constraints
        assert "numpy==2.0.2" in constraints
        assert "diffusers" not in constraints
        assert check

    monkeypatch.setattr(colab, "_installed", {"torch": "2.9.0+cu126", "numpy": "2.0.2"}.get)
    monkeypatch.setattr(colab.missing, "__defaults__", (colab._installed,))
    monkeypatch.chdir(tmp_path)
    colab.prepare(run=run)
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "install"]
    assert any(c.startswith("diffusers") for c in command)
    assert not any(c.startswith(("torch", "numpy", "jupyterlab", "snakemake")) for c in command)


def test_installed_packages_are_not_installed_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    colab.prepare(run=lambda *_, **__: pytest.fail("pip was called, though nothing is missing"))


def test_runs_can_be_kept_on_the_drive(monkeypatch, tmp_path):
    mounted = []
    drive = types.SimpleNamespace(mount=mounted.append)
    monkeypatch.setitem(sys.modules, "google.colab.drive", drive)
    monkeypatch.setattr(colab, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # the second call changes nothing
        colab.prepare(drive=True)
        runs = (tmp_path / "repository" / "runs").resolve()
        assert runs == tmp_path / "drive" / "MyDrive" / "mu-runs"
    assert mounted == [str(tmp_path / "drive")] * 2


def first_code_cell(file):
    cells = nbformat.read(file, 4).cells
    return next(cell for cell in cells if cell.cell_type == "code").source


def test_the_first_cell_does_nothing_elsewhere():
    source = first_code_cell(colab.ROOT / "notebooks" / "00_start_here.ipynb")
    command = [sys.executable, "-c", source + "\nassert 'mu' not in sys.modules"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def notebooks(tmp_path):
    """Copies of two notebooks."""
    for name in ("00_start_here", "20_unlearn"):
        shutil.copy(colab.ROOT / "notebooks" / f"{name}.ipynb", tmp_path)
    return sorted(tmp_path.glob("*.ipynb"))


def test_the_generated_parts_of_the_notebooks_are_current():
    at = colab.address()
    assert not book.stale(colab.ROOT / "notebooks", at), "run python -m mu.notebooks.book"
    for file in sorted((colab.ROOT / "notebooks").glob("*.ipynb")):
        head = nbformat.read(file, 4).cells[0].source
        assert first_code_cell(file) == colab.bootstrap(at)
        assert ("open in Colab" in head) == bool(at)
        assert colab.badge(file, at) in head
        assert "[contents](00_start_here.ipynb#Contents)" in head


def test_a_fork_is_one_parameter(monkeypatch, tmp_path):
    """It goes to pyproject.toml, from which badges and first cells are made."""
    project = tmp_path / "pyproject.toml"
    shutil.copy(colab.ROOT / "pyproject.toml", project)
    before = project.read_text()
    monkeypatch.setattr(colab, "ROOT", tmp_path)
    for fork in (ADDRESS, "https://github.com/you/mu-fork/"):
        colab.set_address(fork)
        assert colab.address() == fork.removesuffix("/")
    with pytest.raises(ValueError, match="Colab opens https://github.com/OWNER/NAME only"):
        colab.set_address("https://example.org/you/mu")
    assert colab.address() == "https://github.com/you/mu-fork"
    colab.set_address("")
    assert project.read_text() == before


def test_an_address_adds_badges_and_a_clone(notebooks):
    folder = notebooks[0].parent
    book.write(folder, ADDRESS)
    head, code = nbformat.read(notebooks[1], 4).cells[:2]
    lines = head.source.splitlines()
    assert lines[0].endswith("?")
    place = "github/somebody/mu/blob/main/notebooks/20_unlearn.ipynb"
    assert f"https://colab.research.google.com/{place}" in lines[3]
    previous = "[← 00_start_here](00_start_here.ipynb)"
    assert lines[4] == f"{previous} · [contents](00_start_here.ipynb#Contents)"
    assert "**Goes in:**" in head.source
    assert colab.CLONE.format(address=ADDRESS, name="mu") in code.source

    contents = nbformat.read(notebooks[0], 4).cells[-2].source.splitlines()[2:]
    titles = [nbformat.read(f, 4).cells[0].source.splitlines()[0][2:] for f in notebooks]
    expected = zip(notebooks, titles, strict=True)
    assert contents == [f"- [{f.stem}]({f.name}): {title}" for f, title in expected]


def test_writing_without_an_address_removes_badges_and_clone(notebooks):
    folder = notebooks[0].parent
    book.write(folder, "")  # the folder has other neighbours than the repository
    before = [f.read_text() for f in notebooks]
    book.write(folder, ADDRESS)
    written = [f.read_text() for f in notebooks]
    book.write(folder, ADDRESS)
    assert [f.read_text() for f in notebooks] == written, "the second call changes nothing"
    assert not book.stale(folder, ADDRESS)
    assert book.stale(folder, "") == notebooks
    book.write(folder, "")
    assert [f.read_text() for f in notebooks] == before


def test_minutes_are_the_median_over_executed_copies(notebooks, tmp_path):
    """A notebook without executed copies keeps its minutes."""
    executed = tmp_path / "executed"
    executed.mkdir()
    for name, notebook, seconds in (
        ("20_a", "20_unlearn", 60),
        ("20_b", "20_unlearn", 150),
        ("20_c", "20_unlearn", 240),
        ("20_d.unfinished", "20_unlearn", 9000),
        ("21_a", "21_meta_unlearn", 30),
        ("x", "20_unlearn", None),
    ):
        measured = {"input_path": f"notebooks/{notebook}.ipynb", "duration": seconds}
        copy = nbformat.v4.new_notebook(metadata={"papermill": measured})
        nbformat.write(copy, executed / f"{name}.ipynb")
    minutes = book.read_minutes([executed])
    assert minutes == {"20_unlearn": 2.5, "21_meta_unlearn": 0.5}
    assert book.read_minutes([tmp_path / "none"]) == {}
    before = nbformat.read(notebooks[0], 4)
    book.write_minutes(tmp_path, minutes)
    assert nbformat.read(notebooks[1], 4).metadata["mu"]["minutes"] == 2.5
    assert nbformat.read(notebooks[0], 4) == before
    assert "| no | 2.5 | " in book.overview(tmp_path)


def test_the_first_cell_clones_once_and_prepares(tmp_path, monkeypatch):
    source = colab.bootstrap(ADDRESS).replace("/content/", f"{tmp_path}/")
    calls, cwd = [], os.getcwd()

    def run(command, **_):
        calls.append(command)
        (tmp_path / "mu").mkdir()

    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(colab, "prepare", lambda drive: calls.append(os.getcwd()))
    try:
        for _ in range(2):
            exec(source, {})
            os.chdir(cwd)
    finally:
        os.chdir(cwd)
    assert sys.path[0] == f"{tmp_path}/mu"
    clone = ["git", "clone", "-q", "--depth", "1", ADDRESS, f"{tmp_path}/mu"]
    assert calls == [clone, f"{tmp_path}/mu", f"{tmp_path}/mu"]


@pytest.mark.parametrize(
    "found",
    [
        "http://github.com/a/b",
        "https://gitlab.com/a/b",
        "https://github.com/a",
        "https://github.com/a/b; rm -r /",
        'https://github.com/a/b"',
    ],
)
def test_another_address_is_refused(found, tmp_path, monkeypatch):
    (tmp_path / "pyproject.toml").write_text(f"[project]\nurls = {{Repository = '{found}'}}\n")
    monkeypatch.setattr(colab, "ROOT", tmp_path)
    with pytest.raises(ValueError, match="OWNER/NAME"):
        colab.address()
