"""Requirements of every notebook and every profile of the repository."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import yaml

from mu.notebooks.book import faults
from mu.notebooks.run import check_parameters, effective, read_profile

ROOT = Path(__file__).parents[2]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
PROFILES = ROOT / "notebooks" / "profiles"
FOLDERS = sorted(f for f in PROFILES.iterdir() if f.is_dir())
EXPERIMENTS = {f.stem: yaml.safe_load(f.read_text()) for f in sorted(PROFILES.glob("*.yaml"))}
WRITTEN_OUT = [name for name, profile in EXPERIMENTS.items() if "models" not in profile]
TRAINING, ATTACK = ["20_unlearn", "21_meta_unlearn"], ["30_attack_finetune", "31_attack_prompts"]


def test_there_are_notebooks():
    assert {p.name[:2] for p in NOTEBOOKS} >= {"00", "10", "20", "21", "30", "90"}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_notebook_has_its_parts(path):
    assert faults(path) == []


def is_parameters(cell):
    return "parameters" in cell.metadata.get("tags", [])


def code_cells(notebook):
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [cell for cell in cells if not is_parameters(cell)]


def remove(old, new="", cell=slice(None)):
    """Return a change that replaces a text in the cells of a notebook that have it."""

    def change(notebook):
        cells = [c for c in notebook.cells[cell] if old in c.source]
        assert cells
        for c in cells:
            c.source = c.source.replace(old, new)

    return change


def remove_description(notebook):
    cell = next(filter(is_parameters, notebook.cells))
    cell.source = re.sub(r"  #.*", "", cell.source, count=1)


def add_unread_parameter(notebook):
    next(filter(is_parameters, notebook.cells)).source += "\nx = 1"


def remove_most_text(notebook):
    def is_needed(cell):
        checked = ("You should see", "## Checks")
        return cell.cell_type == "code" or any(part in cell.source for part in checked)

    notebook.cells[1:-1] = filter(is_needed, notebook.cells[1:-1])


CHANGES = {
    "goes-in": remove("**Goes in:**"),
    "comes-out": remove("**Comes out:**"),
    "needs": remove("**Needs:**"),
    "limits": remove("**Limits.**"),
    "next": remove("**Next"),
    "what-this-showed": remove("What this showed"),
    "you-should-see": remove("You should see"),
    "checks": remove("## Checks"),
    "question": remove("?", ".", slice(1)),
    "heading": lambda nb: nb.cells[0].update(source=nb.cells[0].source.removeprefix("# ")),
    "outputs": lambda nb: code_cells(nb)[1].update(execution_count=3),
    "long": lambda nb: code_cells(nb)[1].update(source="x = 1\n" * 21),
    "untagged": lambda nb: next(filter(is_parameters, nb.cells)).metadata.pop("tags"),
    "description": remove_description,
    "unread": add_unread_parameter,
    "minutes": lambda nb: nb.metadata.mu.pop("minutes"),
    "text": remove_most_text,
}
MESSAGES = {
    "long": "a cell has 21 lines, more than 20: x = 1",
    "limits": "the last cell lacks **Limits.**",
    "minutes": "the metadata lack mu.minutes",
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_missing_part_is_one_fault(tmp_path, name):
    notebook = nbformat.read(ROOT / "notebooks" / "35_compare_attacks.ipynb", 4)
    CHANGES[name](notebook)
    nbformat.write(notebook, tmp_path / "changed.ipynb")
    found = faults(tmp_path / "changed.ipynb")
    assert len(found) == 1, found
    assert found == [MESSAGES.get(name, found[0])]


def run_book(*arguments):
    command = [sys.executable, "-m", "mu.notebooks.book", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_the_notebooks_are_up_to_date():
    checked = run_book("--check")
    assert checked.returncode == 0, checked.stderr


def test_a_mistyped_option_writes_nothing():
    before = {path: path.stat().st_mtime_ns for path in [*NOTEBOOKS, ROOT / "README.md"]}
    wrong = run_book("--chekc")
    assert wrong.returncode == 2
    assert "--chekc" in wrong.stderr
    assert before == {path: path.stat().st_mtime_ns for path in before}


def test_there_are_profiles():
    assert {f.name for f in FOLDERS} >= {"pocket", "colab-t4", "paper-sd-v1-4", "paper-sdxl"}


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda f: f.name)
def test_a_profile_covers_the_experiment_and_fits_its_notebooks(folder):
    names = {file.stem for file in folder.iterdir()}
    expected = {"15_preflight", *TRAINING, *ATTACK, "50_evaluate"}
    assert names - {"86_benchmark_large"} == expected
    outputs = []
    for file in folder.iterdir():
        notebook = ROOT / "notebooks" / f"{file.stem}.ipynb"
        parameters = read_profile(folder.name, notebook)
        assert parameters
        assert parameters == yaml.safe_load(file.read_text())
        check_parameters(notebook, parameters)
        if file.stem == "86_benchmark_large":
            continue
        outputs.append(parameters["out"])
        if file.stem != "15_preflight" and folder.name.startswith("paper"):
            assert "published" in file.read_text(), "which values the paper gives"
    assert len(set(outputs)) == 1, "one experiment, one folder"


@pytest.mark.parametrize("file", sorted(PROFILES.glob("*/86_*")), ids=lambda f: f.parent.name)
def test_a_benchmark_is_kept_and_long_enough(file):
    profile = file.parent.name
    parameters = yaml.safe_load(file.read_text())
    assert parameters["out"] == f"reports/measured/{profile}"
    assert parameters["profile"] == profile
    training = effective(ROOT / "notebooks" / "21_meta_unlearn.ipynb", profile)
    assert parameters["steps"] > training["trajectory_reuse"]


def test_an_unknown_profile_is_refused():
    notebook = ROOT / "notebooks" / "20_unlearn.ipynb"
    choices = "choose colab-t4, paper-sd-v1-4, paper-sdxl, pocket"
    message = f"20_unlearn.ipynb has no profile 'collab': {choices}"
    with pytest.raises(FileNotFoundError, match=message):
        read_profile("collab", notebook)
    assert read_profile("", notebook) == {}


@pytest.mark.parametrize("name", WRITTEN_OUT)
def test_an_experiment_fits_its_notebooks(name):  # for grids see test_grid.py
    profile = EXPERIMENTS[name]
    required = {"runs", "report", "experiment"}
    assert required <= set(profile) <= required | {"common"}
    for step_name, step in profile["experiment"].items():
        notebook = ROOT / "notebooks" / f"{step.get('notebook', step_name)}.ipynb"
        check_parameters(notebook, step.get("parameters", {}))
        assert set(step) <= {"notebook", "after", "threads", "leaves", "parameters"}
        assert set(step.get("after", [])) <= set(profile["experiment"])
        values = effective(notebook, changes=step.get("parameters", {}))
        assert values.get("out", profile["runs"]) == profile["runs"]
        assert values.get("report", profile["report"]) == profile["report"]
        places = (profile["runs"], profile["report"])
        assert all(file.startswith(places) for file in step.get("leaves", []))
