"""What is installed on Colab, and what never is; the badge and the first cell."""

import os
import shutil
import subprocess
import sys
import types

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


@pytest.mark.parametrize(
    "image, expected",
    [
        (
            {},
            [
                "diffusers<0.43,>=0.42",
                "numpy<3,>=2.4",
                "peft<0.22,>=0.21",
                "torch<2.14,>=2.13",
                "tqdm<5,>=4.70",
            ],
        ),
        (
            {
                "torch": "2.9.0+cu126",
                "numpy": "2.0.2",
                "diffusers": "0.42.1",
                "peft": "0.21.0",
                "tqdm": "4.70.0",
            },
            [],
        ),  # torch and its friends stay, though older
        (
            {
                "torch": "2.15.0",
                "numpy": "2.5",
                "diffusers": "0.35.2",
                "peft": "0.30.0",
                "tqdm": "4.67.1",
            },
            ["diffusers<0.43,>=0.42", "tqdm<5,>=4.70"],
        ),  # too old ones go, newer ones stay
    ],
)
def test_only_what_is_missing_or_too_old(image, expected):
    assert sorted(missing(WANTED, image.get)) == expected


def test_torch_is_held_where_it_is(monkeypatch, tmp_path):
    calls = []

    def run(command, check):
        calls.append(command)
        constraints = open(command[command.index("--constraint") + 1]).read()
        assert (
            "torch==2.9.0+cu126" in constraints
            and "numpy==2.0.2" in constraints
            and "diffusers" not in constraints
            and check
        )

    monkeypatch.setattr(colab, "_installed", {"torch": "2.9.0+cu126", "numpy": "2.0.2"}.get)
    monkeypatch.setattr(colab.missing, "__defaults__", (colab._installed,))
    monkeypatch.chdir(tmp_path)
    colab.prepare(run=run)
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "install"] and any(
        c.startswith("diffusers") for c in command
    )
    assert not any(c.startswith(("torch", "numpy", "jupyterlab", "snakemake")) for c in command)


def test_what_is_there_is_not_installed_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    colab.prepare(run=lambda *_, **__: pytest.fail("pip was called, though nothing is missing"))


def test_runs_may_lie_on_the_drive(monkeypatch, tmp_path):
    mounted = []
    monkeypatch.setitem(
        sys.modules, "google.colab.drive", types.SimpleNamespace(mount=mounted.append)
    )
    monkeypatch.setattr(colab, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # a second time changes nothing
        colab.prepare(drive=True)
        assert (
            tmp_path / "repository" / "runs"
        ).resolve() == tmp_path / "drive" / "MyDrive" / "mu-runs"
    assert mounted == [str(tmp_path / "drive")] * 2


def test_the_cell_does_nothing_elsewhere():
    source = next(
        c
        for c in __import__("nbformat")
        .read(colab.ROOT / "notebooks" / "00_start_here.ipynb", 4)
        .cells
        if c.cell_type == "code"
    ).source
    done = subprocess.run(
        [sys.executable, "-c", source + "\nassert 'mu' not in sys.modules"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def notebooks(tmp_path):
    for name in ("00_start_here", "20_unlearn"):
        shutil.copy(colab.ROOT / "notebooks" / f"{name}.ipynb", tmp_path)
    return sorted(tmp_path.glob("*.ipynb"))


def test_what_is_generated_in_the_notebooks_is_there():
    at = colab.address()
    assert not book.stale(colab.ROOT / "notebooks", at), "run python -m mu.notebooks.book"
    for file in sorted((colab.ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(file, 4).cells
        assert next(c for c in cells if c.cell_type == "code").source == colab.bootstrap(at)
        assert (
            ("open in Colab" in cells[0].source) == bool(at)
            and colab.badge(file, at) in cells[0].source
            and "[contents](00_start_here.ipynb#Contents)" in cells[0].source
        )


def test_an_address_gives_badges_and_a_clone_and_its_absence_takes_them_away(notebooks):
    folder, at = notebooks[0].parent, "https://github.com/somebody/mu"
    book.write(folder, "")  # the neighbours are others than in the repository
    before = [f.read_text() for f in notebooks]
    for _ in range(2):  # the second time changes nothing
        book.write(folder, at)
        written = [f.read_text() for f in notebooks]
    read = nbformat.read(notebooks[1], 4)
    lines = read.cells[0].source.splitlines()
    assert (
        "https://colab.research.google.com/github/somebody/mu/blob/main/notebooks/20_unlearn.ipynb"
        in lines[3]
        and lines[4]
        == "[← 00_start_here](00_start_here.ipynb) · [contents](00_start_here.ipynb#Contents)"
    )
    assert (
        lines[0].endswith("?")
        and colab.CLONE.format(address=at, name="mu") in read.cells[1].source
        and "**Goes in:**" in read.cells[0].source
    )
    assert nbformat.read(notebooks[0], 4).cells[-2].source.splitlines()[2:] == [
        f"- [{f.stem}]({f.name}): {nbformat.read(f, 4).cells[0].source.splitlines()[0][2:]}"
        for f in notebooks
    ]
    book.write(folder, at)
    assert (
        [f.read_text() for f in notebooks] == written
        and not book.stale(folder, at)
        and book.stale(folder, "") == notebooks
    )
    book.write(folder, "")
    assert [f.read_text() for f in notebooks] == before


def test_minutes_are_those_of_the_executed_notebooks(notebooks, tmp_path):
    """The median over the copies of one notebook, whatever the steps of the experiment are called; a notebook that nobody ran keeps what it says."""
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
        read = nbformat.v4.new_notebook(
            metadata={
                "papermill": {"input_path": f"notebooks/{notebook}.ipynb", "duration": seconds}
            }
        )
        nbformat.write(read, executed / f"{name}.ipynb")
    minutes = book.timed([executed])
    assert (
        minutes == {"20_unlearn": 2.5, "21_meta_unlearn": 0.5}
        and book.timed([tmp_path / "none"]) == {}
    )
    before = nbformat.read(notebooks[0], 4)
    book.write_minutes(tmp_path, minutes)
    assert (
        nbformat.read(notebooks[1], 4).metadata["mu"]["minutes"] == 2.5
        and nbformat.read(notebooks[0], 4) == before
    )
    assert "| no | 2.5 | " in book.overview(tmp_path)


def test_the_cell_clones_once_and_prepares(tmp_path, monkeypatch):
    source = colab.bootstrap("https://github.com/somebody/mu").replace("/content/", f"{tmp_path}/")
    calls, cwd = [], os.getcwd()
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(
        subprocess, "run", lambda command, **_: (calls.append(command), (tmp_path / "mu").mkdir())
    )
    monkeypatch.setattr(colab, "prepare", lambda drive: calls.append(os.getcwd()))
    try:
        for _ in range(2):
            exec(source, {})
            os.chdir(cwd)
    finally:
        os.chdir(cwd)
    assert sys.path[0] == f"{tmp_path}/mu"
    assert calls == [
        ["git", "clone", "-q", "--depth", "1", "https://github.com/somebody/mu", f"{tmp_path}/mu"],
        f"{tmp_path}/mu",
        f"{tmp_path}/mu",
    ]


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
