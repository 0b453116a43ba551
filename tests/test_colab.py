"""What is installed on Colab, and what never is."""

import subprocess
import sys
import types

import pytest

from mu import colab
from mu.colab import missing

WANTED = ["torch>=2.13,<2.14", "diffusers>=0.42,<0.43", "peft>=0.21,<0.22", "snakemake>=9", "numpy>=2.4,<3", "tqdm>=4.70,<5"]


@pytest.mark.parametrize("image, expected", [
    ({}, ["diffusers<0.43,>=0.42", "numpy<3,>=2.4", "peft<0.22,>=0.21", "torch<2.14,>=2.13", "tqdm<5,>=4.70"]),
    ({"torch": "2.9.0+cu126", "numpy": "2.0.2", "diffusers": "0.42.1", "peft": "0.21.0", "tqdm": "4.70.0"}, []),  # torch and its friends stay, though older
    ({"torch": "2.15.0", "numpy": "2.5", "diffusers": "0.35.2", "peft": "0.30.0", "tqdm": "4.67.1"}, ["diffusers<0.43,>=0.42", "tqdm<5,>=4.70"]),  # too old ones go, newer ones stay
])
def test_only_what_is_missing_or_too_old(image, expected):
    assert sorted(missing(WANTED, image.get)) == expected


def test_torch_is_held_where_it_is(monkeypatch, tmp_path):
    calls = []

    def run(command, check):
        calls.append(command)
        constraints = open(command[command.index("--constraint") + 1]).read()
        assert "torch==2.9.0+cu126" in constraints and "numpy==2.0.2" in constraints and "diffusers" not in constraints and check

    monkeypatch.setattr(colab, "_installed", {"torch": "2.9.0+cu126", "numpy": "2.0.2"}.get)
    monkeypatch.setattr(colab.missing, "__defaults__", (colab._installed,))
    monkeypatch.chdir(tmp_path)
    colab.prepare(run=run)
    (command,) = calls
    assert command[:4] == [sys.executable, "-m", "pip", "install"] and any(c.startswith("diffusers") for c in command)
    assert not any(c.startswith(("torch", "numpy", "jupyterlab", "snakemake")) for c in command)


def test_what_is_there_is_not_installed_again(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    colab.prepare(run=lambda *_, **__: pytest.fail("pip was called, though nothing is missing"))


def test_runs_may_lie_on_the_drive(monkeypatch, tmp_path):
    mounted = []
    monkeypatch.setitem(sys.modules, "google.colab.drive", types.SimpleNamespace(mount=mounted.append))
    monkeypatch.setattr(colab, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(colab, "DRIVE", tmp_path / "drive")
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "pyproject.toml").write_text("[project]\ndependencies = []\n")
    monkeypatch.chdir(tmp_path)
    for _ in range(2):  # a second time changes nothing
        colab.prepare(drive=True)
        assert (tmp_path / "repository" / "runs").resolve() == tmp_path / "drive" / "MyDrive" / "mu-runs"
    assert mounted == [str(tmp_path / "drive")] * 2


def test_the_cell_does_nothing_elsewhere():
    source = next(c for c in __import__("nbformat").read(colab.ROOT / "notebooks" / "00_start_here.ipynb", 4).cells if c.cell_type == "code").source
    done = subprocess.run([sys.executable, "-c", source + "\nassert 'mu' not in sys.modules"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
