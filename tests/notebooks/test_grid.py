"""Grids: expansion, refusals, and the grids of the repository."""

import copy
from collections import Counter
from pathlib import Path

import pytest
import yaml

from mu.notebooks.grid import expand, read_experiment
from mu.notebooks.run import check_parameters, effective

ROOT = Path(__file__).parents[2]
NOTEBOOKS, PROFILES = ROOT / "notebooks", ROOT / "notebooks" / "profiles"
FILES = {file.stem: yaml.safe_load(file.read_text()) for file in sorted(PROFILES.glob("*.yaml"))}
GRIDS = {name: grid for name, grid in FILES.items() if "models" in grid}
CASES = [(name, model) for name, grid in GRIDS.items() for model in grid["models"]]
STEP_KEYS = {"notebook", "after", "threads", "priority", "gpu", "runtime", "shows", "leaves"}
GRID = {
    "runs": "runs/{model}",
    "report": "reports/{model}",
    "models": {
        "small": {
            "sets": "data/cat",
            "methods": {"esd": {"meta": {"eta": 3.0, "steps": 9}}, "uce": None},
            "quiet": False,
        },
        "large": {"gpu": True, "methods": ["sdd"], "sets": "data/dog"},
    },
    "axes": {"method": "model.methods", "attack": ["hrm", "clean"]},
    "experiment": {
        "10_prepare": {"leaves": ["runs/{model}/{seed}"]},
        "20_{method}-{seed}": {
            "notebook": "20_unlearn",
            "after": ["10_prepare"],
            "gpu": True,
            "threads": 2,
            "parameters": [
                {"steps": 1, "sets": "{model.sets}"},
                "method.meta",
                {"name": "{method}", "seed": "{seed}", "out": "runs/{model}/{seed}"},
            ],
        },
        "30_{method}-{attack}": {
            "notebook": "30_attack",
            "after": ["20_{method}-{seed}"],
            "parameters": {
                "runs": "{method},{method}-meta",
                "models": "{method}-{seed}",
                "seeds": "{seed}",
            },
        },
        "90_figures": {"after": ["30_{method}-{attack}"]},
    },
}


def with_steps(steps):
    """Return the grid with other or further steps."""
    grid = copy.deepcopy(GRID)
    grid["experiment"].update(steps)
    return grid


def test_a_pattern_makes_one_step_per_combination():
    experiment = expand(GRID, "small", "1 0")
    assert list(experiment) == [
        "10_prepare",
        *(f"20_{m}-{s}" for m in ("esd", "uce") for s in (0, 1)),
        *(f"30_{m}-{a}" for m in ("esd", "uce") for a in ("hrm", "clean")),
        "90_figures",
    ]
    assert experiment["20_esd-1"]["notebook"] == "20_unlearn"
    assert experiment["20_esd-1"]["threads"] == 2
    assert experiment["10_prepare"]["notebook"] == "10_prepare"
    assert experiment["20_uce-0"]["parameters"] == {
        "steps": 1,
        "sets": "data/cat",
        "name": "uce",
        "seed": 0,
        "out": "runs/small/0",
    }


def test_a_text_of_one_field_keeps_the_type_of_its_value():
    texts = {"quiet": "{model.quiet}", "facts": "{model.methods.esd.meta}"}
    experiment = expand(with_steps({"10_prepare": {"parameters": texts}}), "small", 0)
    found = experiment["10_prepare"]["parameters"]
    assert found == {"quiet": False, "facts": {"eta": 3.0, "steps": 9}}
    seed = expand(GRID, "small", "4")["20_esd-4"]["parameters"]["seed"]
    assert seed == 4, "a number, not a text"


def test_later_parameters_win_and_an_axis_without_facts_adds_nothing():
    experiment = expand(GRID, "small", 0)
    assert experiment["20_esd-0"]["parameters"]["steps"] == 9
    assert experiment["20_esd-0"]["parameters"]["eta"] == 3.0
    assert "eta" not in experiment["20_uce-0"]["parameters"]
    assert "eta" not in expand(GRID, "large", 0)["20_sdd-0"]["parameters"]


def test_an_axis_that_is_not_chosen_stands_for_all_its_values():
    experiment = expand(GRID, "small", "0 1")
    assert experiment["30_esd-hrm"]["after"] == ["20_esd-0", "20_esd-1"]
    assert experiment["10_prepare"]["leaves"] == ["runs/small/0", "runs/small/1"]
    attacks = ["30_esd-hrm", "30_esd-clean", "30_uce-hrm", "30_uce-clean"]
    assert experiment["90_figures"]["after"] == attacks
    expected = {"runs": "esd,esd-meta", "models": "esd-0,esd-1", "seeds": "0,1"}
    assert experiment["30_esd-hrm"]["parameters"] == expected, "separated by commas"
    one_seed = expand(GRID, "small", 7)["30_esd-hrm"]["parameters"]["seeds"]
    assert one_seed == "7", "a list of one value is a text too"


@pytest.mark.parametrize("seeds", [0, "0", "1 0 1", "0,1", " 1, 0 "])
def test_seeds_are_separated_by_spaces_or_commas(seeds):
    found = {name[-1] for name in expand(GRID, "small", seeds) if name.startswith("20_esd")}
    assert found == set(str(seeds)) & {"0", "1"}


def test_a_gpu_needs_a_step_and_a_model_that_ask_for_one():
    assert [step["gpu"] for step in expand(GRID, "small", 0).values()] == [0] * 8
    assert {name: step["gpu"] for name, step in expand(GRID, "large", 0).items()} == {
        "10_prepare": 0,
        "20_sdd-0": 1,
        "30_sdd-hrm": 0,
        "30_sdd-clean": 0,
        "90_figures": 0,
    }


def test_an_experiment_that_is_written_out_is_kept():
    step = {"notebook": "20_b", "parameters": {"n": 1}}
    first = {"notebook": "10_a", "parameters": {}, "threads": 2}
    found = read_experiment({"experiment": {"10_a": {"threads": 2}, "b": step}})
    assert found == ("pocket", {"10_a": first, "b": step})
    model, experiment = read_experiment(GRID | {"model": "large", "seeds": "3"})
    assert model == "large"
    assert "20_sdd-3" in experiment


@pytest.mark.parametrize(
    "model, seeds, message",
    [
        ("lage", 0, "unknown model 'lage': choose small, large"),
        ("small", "", r'seeds must be whole numbers with spaces, as in "0 1 2"; got '),
        ("small", "0 one", "got '0 one'"),
        ("small", "-1", "got '-1'"),
        ("small", None, "got None"),
    ],
)
def test_wrong_models_and_seeds_are_refused(model, seeds, message):
    with pytest.raises(ValueError, match=message):
        expand(GRID, model, seeds)


@pytest.mark.parametrize(
    "pattern, step, message",
    [
        (
            "40_{colour}",
            {},
            r"40_\{colour\}: unknown axis 'colour': choose model, seed, method, attack",
        ),
        ("40_x", {"after": ["20_{colour}"]}, "40_x: unknown axis 'colour'"),
        ("40_x", {"parameters": {"runs": "{colour.name}"}}, "40_x: unknown axis 'colour'"),
        (
            "40_x",
            {"parameters": ["method.meta"]},
            "method.meta: no value of 'method' is chosen here, only of model",
        ),
        (
            "40_x",
            {"after": ["21_{method}"]},
            "40_x waits for 21_esd, which is no step of this experiment",
        ),
    ],
)
def test_wrong_steps_are_refused(pattern, step, message):
    with pytest.raises(ValueError, match=message):
        expand(with_steps({pattern: step}), "small", 0)


def read_grid(name, model, seeds="0 1 2"):
    """Return a grid of the repository, and its experiment."""
    return GRIDS[name], read_experiment(GRIDS[name] | {"model": model, "seeds": seeds})[1]


def repeated(places):
    return [place for place, count in Counter(places).items() if count > 1]


def test_the_paper_has_a_grid_for_the_pocket_model():
    assert "pocket" in GRIDS["paper"]["models"]


@pytest.mark.parametrize("name, model", CASES)
def test_a_grid_fits_its_notebooks(name, model):
    grid, experiment = read_grid(name, model)
    places = tuple(grid[key].format(model=model) for key in ("runs", "report"))
    places += (f"reports/methods-{model}",)
    leaves = []
    for step in experiment.values():
        check_parameters(NOTEBOOKS / f"{step['notebook']}.ipynb", step["parameters"])
        assert set(step) <= STEP_KEYS | {"parameters"}
        assert set(step["after"]) <= set(experiment)
        leaves += step["leaves"]
    assert all(file.startswith(places) and "{" not in file for file in leaves)
    assert not repeated(leaves)


@pytest.mark.parametrize("name, model", CASES)
def test_each_step_of_a_grid_writes_into_its_own_folder(name, model):
    grid, experiment = read_grid(name, model)
    folders = {"20": "", "21": "", "30": "attack", "31": "attack/searches", "50": ""}
    written = []
    for step_name, step in experiment.items():
        kind = step_name[:2]
        if kind in folders:
            notebook = NOTEBOOKS / f"{step['notebook']}.ipynb"
            p = effective(notebook, changes=step["parameters"])
            own = p["place" if kind == "50" else "name"]
            assert own or kind == "31"  # its files are named after the searches
            assert p["out"].startswith(grid["runs"].format(model=model))
            written.append((p["out"], folders[kind], own))
    assert not repeated(written)


@pytest.mark.parametrize("name, model", CASES)
def test_a_report_shows_the_learning_rate_of_its_attacks(name, model):
    _, experiment = read_grid(name, model)
    for step in experiment.values():
        if step["notebook"] != "90_figures":
            continue
        notebook = NOTEBOOKS / "30_attack_finetune.ipynb"
        main = [other for other in step["after"] if other.endswith(("-hrm-m-0", "-clean-0"))]
        attacks = [effective(notebook, changes=experiment[o]["parameters"]) for o in main]
        shown = effective(NOTEBOOKS / "90_figures.ipynb", changes=step["parameters"])
        assert {p["lr"] for p in attacks} == {shown["lr"]}


SEEDED = [(name, model) for name, model in CASES if "{seed}" in str(GRIDS[name]["experiment"])]


def test_only_the_attacks_have_one_training():
    assert {name for name, _ in CASES} - {name for name, _ in SEEDED} == {"attacks"}


@pytest.mark.parametrize("name, model", SEEDED)
def test_three_seeds_repeat_all_trainings(name, model):
    one, three = (
        Counter(step["notebook"] for step in read_grid(name, model, seeds)[1].values())
        for seeds in ("0", "0 1 2")
    )
    assert all(three[kind] in (n, 3 * n) for kind, n in one.items())
    assert three["21_meta_unlearn"] == 3 * one["21_meta_unlearn"]
