"""Experiments under Snakemake: the repository's Snakefile, with toy notebooks."""

import shutil
import sys
from pathlib import Path

import pytest
import yaml
from toys import PARAMETERS, ROOT, SNAKEMAKE, run, write_notebook

from mu.notebooks.forecast import forecast
from mu.notebooks.run import read_origin

SAVE = """import os, pathlib
os.makedirs('runs/toy', exist_ok=True)
pathlib.Path(f'runs/toy/{name}').write_text(os.environ['OMP_NUM_THREADS'])"""
ASSERT = "assert not fail, 'asked to fail'"


def write_experiment(folder, config, parameters=PARAMETERS, **notebooks):
    """Write an experiment and its notebooks (name → code cells); returns its Snakemake command."""
    shutil.copy(ROOT / "Snakefile", folder)
    for name, code in notebooks.items():
        file = folder / "notebooks" / f"{name}.ipynb"
        write_notebook(file, *code, parameters=parameters)
    shutil.copy(ROOT / "notebooks" / "run.py", folder / "notebooks")
    (folder / "experiment.yaml").write_text(yaml.safe_dump(config))
    return [*SNAKEMAKE, "--configfile", "experiment.yaml"]


def tree(folder):
    """Return file → time of its last change, without Snakemake's own files."""
    files = [f for f in folder.rglob("*") if f.is_file() and ".snakemake" not in f.parts]
    return {file: file.stat().st_mtime_ns for file in files}


class Toy:
    """An experiment of three steps in a folder."""

    def __init__(self, folder):
        self.folder = folder
        self.steps = {
            "10_a": {"parameters": {"name": "a"}, "leaves": ["runs/toy/a"], "threads": 2},
            "20_b": {"after": ["10_a"], "parameters": {"name": "b"}},
            "20_b-again": {
                "notebook": "20_b",
                "after": ["20_b"],
                "parameters": {"name": "c", "fail": True},
            },
        }
        notebooks = {"10_a": (ASSERT, SAVE), "20_b": (ASSERT, SAVE)}
        self.command = write_experiment(folder, {}, **notebooks)

    def run(self, *flags, **changes):
        """Run the steps with some of them changed; returns exit code and output."""
        config = {"runs": "runs/toy", "report": "reports/toy", "experiment": self.steps | changes}
        (self.folder / "experiment.yaml").write_text(yaml.safe_dump(config))
        return run(self.folder, [*self.command, *flags])

    def pages(self):
        """Return name of each finished notebook → time of its last change."""
        files = (self.folder / "reports/toy/notebooks").glob("*.html")
        return {file.stem: file.stat().st_mtime_ns for file in files}

    def read(self, name):
        return (self.folder / "runs/toy" / name).read_text()


def test_an_experiment_repeats_nothing_and_resumes(tmp_path):
    toy = Toy(tmp_path)
    code, output = toy.run(**{"20_b": {"after": ["10_a"], "parameters": {"lr": "1e-5"}}})
    assert code
    assert "lr must be float" in output
    assert not (tmp_path / "reports").exists(), "refused before anything runs"

    code, output = toy.run()
    assert code
    assert f"stopped in cell [3] `{ASSERT}`" in output
    assert "AssertionError: asked to fail" in output
    assert "stopped early: reports/toy/notebooks/20_b-again.unfinished.ipynb" in output
    first = toy.pages()
    assert set(first) == {"10_a", "20_b"}
    assert (toy.read("a"), toy.read("b")) == ("2", "1")

    earlier = tmp_path / "reports/toy/notebooks/10_a.ipynb"
    earlier.write_text(earlier.read_text().replace(read_origin(earlier)["mu"], "0123456789abcdef"))
    toy.steps["20_b-again"]["parameters"]["fail"] = False
    code, output = toy.run()
    assert code == 0
    note = "note: made by an earlier mu: 10_a. To repeat everything, delete runs/toy"
    assert output.count(note) == 1, output
    second = toy.pages()
    assert {name: second[name] for name in first} == first
    assert set(second) == {*first, "20_b-again"}

    (tmp_path / "runs/toy/a").unlink()  # a missing file is made again, with all that depends on it
    code, output = toy.run("--dry-run")
    assert code == 0
    assert not (tmp_path / "runs/toy/done/10_a").exists()
    assert "10_a" in output
    assert toy.pages() == second


GRID = {
    "runs": "runs/{model}",
    "report": "reports/{model}",
    "axes": {"branch": ["good", "bad"]},
    "models": {"toy": None, "big": {"gpu": True}},
    "experiment": {
        "10_{branch}-{seed}": {
            "notebook": "10_a",
            "gpu": True,
            "leaves": ["runs/{model}/{branch}-{seed}"],
            "parameters": {"name": "runs/{model}/{branch}-{seed}", "seed": "{seed}"},
        }
    },
}
NEXT = {
    "20_{branch}-{seed}": {
        "notebook": "20_b",
        "after": ["10_{branch}-{seed}"],
        "parameters": {"name": "{branch}"},
    }
}
GRID_PARAMETERS = 'name: str = ""  # a word\nseed: int = 0  # a number'
FAIL = """import os
assert not name.endswith('bad-0'), 'asked to fail'
os.makedirs(os.path.dirname(name), exist_ok=True)
open(name, 'w').write(str(seed))"""
WAIT_FOR_OTHER = """import os, pathlib, time
place = pathlib.Path(name)
place.parent.mkdir(parents=True, exist_ok=True)
place.write_text(os.environ['CUDA_VISIBLE_DEVICES'])
began = time.time()
while len(list(place.parent.glob('*-0'))) < 2 and time.time() < began + 200:
    time.sleep(0.1)"""


def test_a_failed_cell_stops_its_branch_only_and_a_dry_run_writes_nothing(tmp_path, monkeypatch):
    config = GRID | {"experiment": GRID["experiment"] | NEXT}
    notebooks = {"10_a": [FAIL], "20_b": ["print(name)"]}
    command = write_experiment(tmp_path, config, GRID_PARAMETERS, **notebooks)
    command.insert(command.index("--configfile"), "--keep-going")
    snakemake = [str(Path(sys.executable).parent / "snakemake"), *command[3:]]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))

    def dry_run(seeds):
        return str(forecast([*snakemake, "--config", "model=toy", f"seeds={seeds}"]))

    before, values = tree(tmp_path), ["--config", "model=toy", "seeds=0"]
    dry = [sys.executable, "-m", "mu.notebooks.forecast", *snakemake, *values]
    code, output = run(tmp_path, dry)
    assert code == 0, output
    assert "4 notebooks, about 1 minutes on" in output
    assert "with 2 at a time" in output
    assert tree(tmp_path) == before
    assert "8 notebooks" in dry_run("0 1"), "twice as many seeds"
    assert tree(tmp_path) == before
    with pytest.raises(ValueError, match="seeds must be whole numbers.*got 'none'"):
        dry_run("none")

    code, output = run(tmp_path, [*command, *values])
    made = {file.stem for file in (tmp_path / "reports/toy/notebooks").glob("*.html")}
    assert code
    assert made == {"10_good-0", "20_good-0"}
    assert "AssertionError: asked to fail" in output
    assert "stopped early: reports/toy/notebooks/10_bad-0.unfinished.ipynb" in output
    before = tree(tmp_path)
    assert "2 notebooks" in dry_run("0"), "only what is missing"
    assert tree(tmp_path) == before


def test_concurrent_notebooks_have_a_gpu_each(tmp_path):
    command = write_experiment(tmp_path, GRID, GRID_PARAMETERS, **{"10_a": [WAIT_FOR_OTHER]})
    flags = ["--resources", "gpu=2", "--config", "model=big", "seeds=0"]
    code, output = run(tmp_path, [*command, *flags], CUDA_VISIBLE_DEVICES="7,9")
    assert code == 0, output
    assert {file.read_text() for file in (tmp_path / "runs/big").glob("*-0")} == {"7", "9"}
