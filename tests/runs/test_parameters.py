"""Every default has one home: notebooks, launcher and dataclasses agree."""

import ast
import dataclasses
import json

import papermill
import pytest

from mu import ROOT
from mu.objective import META, PLAIN, Objective
from mu.runs.parameters import FLAT, Training, describe, flatten, make_objective, make_phases


def cell(notebook):
    """Return the values of a notebook's parameter cell."""
    found = papermill.inspect_notebook(str(ROOT / "notebooks" / f"{notebook}.ipynb"))
    return {name: ast.literal_eval(p["default"]) for name, p in found.items()}


@pytest.mark.parametrize("notebook, recipe", [("20_unlearn", PLAIN), ("21_meta_unlearn", META)])
def test_a_notebook_has_the_defaults_of_its_recipe(notebook, recipe):
    written, expected = cell(notebook), flatten(recipe)
    shared = written.keys() & expected.keys()
    assert len(shared) >= 8
    assert {name: written[name] for name in shared} == {name: expected[name] for name in shared}


def test_notebooks_and_launcher_have_the_same_defaults_of_a_training():
    plain, meta = cell("20_unlearn"), cell("21_meta_unlearn")
    fields = {f.name: f.default for f in dataclasses.fields(Training)}
    for name in fields.keys() & plain.keys() - {"model", "sets"}:
        assert plain[name] == fields[name], name
    own = {"name", "steps", "lr", "retain", "ema"}  # of the recipe of meta-unlearning
    for name in plain.keys() & meta.keys() - own:
        assert plain[name] == meta[name], name


def test_every_parameter_of_the_objective_is_one_of_the_meta_notebook():
    assert set(FLAT) <= set(cell("21_meta_unlearn"))


@pytest.mark.parametrize("recipe", [PLAIN, META, Objective()])
def test_flat_parameters_come_back(recipe):
    assert make_objective(flatten(recipe)) == recipe
    assert make_objective(json.loads(json.dumps(flatten(recipe)))) == recipe


def test_unknown_keys_of_a_validation_are_refused():
    with pytest.raises(ValueError, match="unknown key 'step' of validation: choose every, depths"):
        make_phases({"steps": 1, "validation": {"step": 50}}, "esd", 1e-4)


def test_unknown_parameters_and_losses_are_refused():
    with pytest.raises(ValueError, match="unknown parameter 'retian': choose unlearn, retain"):
        make_objective({"retian": 1.0})
    with pytest.raises(ValueError, match="unknown loss 'uce': choose esd, sdd"):
        make_objective({}, "uce")


def test_after_a_closed_form_the_meta_terms_train_alone():
    assert make_objective(flatten(META), None).weights.unlearn == 0


def test_a_closed_form_without_meta_terms_has_no_loop():
    plain, _ = describe(cell("20_unlearn") | {"method": "uce"}, {"forget": ["cat"]})
    assert plain["loop"] is None and plain["closed_form"] == {"forget": ["cat"]}
    meta, runtime = describe(cell("21_meta_unlearn") | {"method": "uce"}, {"forget": ["cat"]})
    names = [phase["name"] for phase in meta["loop"]["phases"]]
    assert names == ["ascend", "grow", "spread", "settle"]
    assert meta["closed_form"] == {"forget": ["cat"]}
    assert meta["loop"]["unlearn"] == 0
    assert runtime["frozen_dtype"] == "same" and "runtime" not in meta
    esd, _ = describe(cell("20_unlearn"), {"forget": ["cat"]})
    assert esd["closed_form"] is None and esd["loop"]["eta"] == 1.0


@pytest.mark.parametrize("method", ["esd-f", "uce"])
def test_without_steps_and_phases_a_run_is_what_it_starts_from(method):
    given = cell("21_meta_unlearn") | {"method": method, "start": "", "steps": 0, "phases": []}
    assert describe(given)[0]["loop"] is None
    phase = {"name": "only", "steps": 2}
    assert describe(given | {"phases": [phase]})[0]["loop"]["phases"] == [phase]
