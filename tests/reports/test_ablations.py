"""Ablation questions compare runs or attacks, and report differences with their intervals."""

import json
import os
from pathlib import Path

import pandas as pd
import pytest
import synthetic
import yaml

from mu.notebooks.run import execute
from mu.reports.ablations import (
    answer,
    attacked_runs,
    base_choice,
    choices_figure,
    choices_table,
    plain_runs,
    under_attack,
)
from mu.reports.collect import collect, read_results

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "notebooks" / "40_ablations.ipynb"
QUESTIONS = ROOT / "notebooks" / "profiles" / "ablations.yaml"
UNLEARNED = synthetic.ALL | {"forget": 0.0}
FORGET = {"attack": "forget", "prompts": 0}
ZETA = {"question": "What does ζ do?", "factor": "ζ", "runs": {"0": "zeta0", "30 (base)": "base"}}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two trainings of four runs, and their collected rows."""
    base = tmp_path_factory.mktemp("ablations")
    ends = {  # concept and related, after 100 steps
        "plain": (1.0, 1.0),
        "base": (0.4, 0.5),
        "zeta0": (0.4, 1.0),
        "relearn8": (0.2, 0.5),
    }
    fast = {0: UNLEARNED, 100: synthetic.ALL}
    for seed in (0, 1):
        out = base / str(seed)
        for run, (forget, related) in ends.items():
            weights = {} if run == "plain" else synthetic.META
            params = {"method": "esd-f", "loop": {"eta": 1.0} | weights}
            synthetic.run(out, run, UNLEARNED, params, [0.1])
            end = synthetic.ALL | {"forget": forget, "related": related}
            synthetic.attack(out, run, {run: {0: UNLEARNED, 100: end}}, **FORGET)
        synthetic.attack(out, "attack-fast", {"plain": fast, "base": fast}, lr=1e-3, **FORGET)
        collect(out, base / "report" / "raw" / str(seed), str(seed), pictures=False)
    return base


@pytest.fixture(scope="module")
def results(base):
    return read_results(base / "report" / "raw")


def test_runs_are_compared_with_the_base(results):
    table = choices_table(results.rows, results.records, ZETA).set_index("choice")
    # the mean height of a curve from 0 to 0.4
    assert table["concept under attack"].tolist() == [pytest.approx(0.2)] * 2
    assert table["related lost"].tolist() == [0, pytest.approx(0.5)]
    assert table["related lost: difference"].tolist() == [pytest.approx(-0.5), 0]
    assert table.trainings.eq(2).all()
    assert table["forget before"].eq(0).all()
    assert table["passes a step"].eq(8).all()
    assert table["concept under attack: plain"].eq(0.5).all()
    assert table["related lost: plain"].eq(0).all()
    text = answer(table.reset_index(), ZETA)
    assert text.startswith(
        "Of the concept, 20 % comes back with “30 (base)” (mean over the attack): "
        "not clearly different with any, 0 (within ±16); "
    )
    assert (
        "of the related concepts, 50 % are lost to it: not clearly different with “0” -50 ("
    ) in text


def test_the_figure_has_one_row_per_choice(results):
    fig = choices_figure(choices_table(results.rows, results.records, ZETA), "ζ")
    labels = [text.get_text() for text in fig.axes[0].get_yticklabels()]
    assert labels == ["0", "30 (base)"]
    assert fig.axes[0].get_xlabel() == "concept under attack"


def test_attacks_are_compared_with_the_plain_model(results):
    attacks = {"as rehearsed": "base", "fast": "attack-fast"}
    entry = {"question": "Faster?", "factor": "attack", "attacks": attacks}
    expected = {"as rehearsed": ("base", "base"), "fast": ("base", "attack-fast")}
    assert attacked_runs(entry) == expected
    expected = {"as rehearsed": ("plain", "plain"), "fast": ("plain", "attack-fast")}
    assert plain_runs(entry) == expected
    table = choices_table(results.rows, results.records, entry).set_index("choice")
    assert table["concept under attack"].tolist() == [pytest.approx(0.2), pytest.approx(0.5)]
    assert table["concept under attack: plain"].eq(0.5).all()
    differences = table["concept under attack: difference"].tolist()
    assert differences == [pytest.approx(-0.3), 0]
    assert answer(table.reset_index(), entry).startswith(
        "Of the concept, against what comes back to the plainly unlearned model "
        "under the same attack (means over it): "
    )


def test_a_run_without_the_attack_is_refused(results):
    message = "zeta0 has no attack attack-fast; available: before, zeta0"
    with pytest.raises(ValueError, match=message):
        under_attack(results.rows, "zeta0", "attack-fast")


def run_notebook(base, report, questions, **more):
    options = {"out": str(base), "report": str(report), "questions": str(questions)} | more
    return execute(NOTEBOOK, report.with_suffix(".ipynb"), options)


def test_the_notebook_refuses_questions_without_runs(base, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    with pytest.raises(RuntimeError, match="there is no question 'colour'"):
        run_notebook(base, tmp_path / "wrong", QUESTIONS, ask="colour")
    with pytest.raises(RuntimeError, match="no question could be answered"):
        run_notebook(base, tmp_path / "none", QUESTIONS)


def test_the_notebook_answers_the_questions_that_were_run(base, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    missing = {"question": "More?", "factor": "x", "runs": {"1": "nowhere", "2": "base"}}
    questions = tmp_path / "mine.yaml"
    questions.write_text(yaml.safe_dump({"questions": {"zeta": ZETA, "more": missing}}))
    report = tmp_path / "report"
    assert run_notebook(base, report, questions)
    answers = json.loads((report / "answers.json").read_text())
    assert [a["question"] for a in answers] == ["What does ζ do?"]
    assert (report / answers[0]["figure"]).is_file()
    assert "2 trainings (seeds 0, 1)" in answers[0]["caption"]
    page = report.with_suffix(".html").read_text()
    assert "1 of 2 questions answered; not run: more" in page


def test_every_question_of_the_profile_names_its_runs():
    profile = yaml.safe_load(QUESTIONS.read_text())
    for model, facts in profile["models"].items():
        runs = {"plain", *facts["variants"]}
        attacks = runs | {f"attack-{name}" for name in facts["mismatches"]}
        used = set()
        for name, entry in profile["questions"].items():
            keys = attacked_runs(entry)
            used |= {attack for _, attack in keys.values()}
            assert {run for run, _ in keys.values()} <= runs, (model, name)
            assert {attack for _, attack in keys.values()} <= attacks, (model, name)
            known = {"question", "factor", "runs", "attacks", "base"}
            assert set(entry) <= known, f"{name}: a comma without quotes?"
            assert base_choice(entry) in keys, name
            assert entry["question"].endswith("?"), name
            assert entry["factor"], name
        assert attacks - used <= {"plain"}, f"trained but not compared: {attacks - used}"


def two_choices(**columns):
    """A table of a base and another choice whose differences are 0, except for `columns`."""
    base = {"choice": "base", "related before": 1.0, "unrelated before": 1.0}
    for name in ("concept under attack", "related lost"):
        base |= {name: 0.5, f"{name}, low": 0.4, f"{name}, high": 0.6, f"{name}: plain": 0.5}
        for end, value in (("", 0.0), (", low", -0.1), (", high", 0.1)):
            base[f"{name}: difference{end}"] = value
    return pd.DataFrame([base, base | {"choice": "other"} | columns])


@pytest.mark.parametrize(
    "low, high, text",
    [
        (0.1, 0.3, "clearly more with “other” +20 (+10 to +30)"),
        (-0.1, 0.5, "not clearly different with “other” +20 (-10 to +50)"),
        (0.0, 0.4, "not clearly different with “other” +20 (+0 to +40)"),
    ],
)
def test_a_clear_difference_has_an_interval_without_0(low, high, text):
    difference = "concept under attack: difference"
    columns = {difference: 0.2, f"{difference}, low": low, f"{difference}, high": high}
    entry = {"runs": {"base": "base", "other": "x"}}
    assert answer(two_choices(**columns), entry) == (
        f"Of the concept, 50 % comes back with “base” (mean over the attack): {text}; "
        "of the related concepts, 50 % are lost to it: "
        "not clearly different with any, 0 (within ±10)."
    )


def test_a_choice_of_lower_quality_is_named():
    entry = {"runs": {"base": "base", "other": "x"}}
    assert answer(two_choices(**{"unrelated before": 0.9}), entry).endswith(
        "of less quality even before the attack: other (related 100 %, unrelated 90 %)."
    )


def test_a_gain_has_a_negative_interval_that_is_drawn_whole():
    """Related concepts that a model draws only after the attack count as a negative loss."""
    rows = [
        {
            **{"run": run, "name": run, "training": "0", "group": group, "seed": seed},
            **{"asked": f"a {group} {seed}", "attack_seed": 0, "step": step},
            "hit": int(group == "forget" or step > 0 or run == "plain"),
        }
        for run in ("plain", "base")
        for group in ("forget", "related")
        for seed in range(4)
        for step in (0, 10)
    ]
    records = pd.DataFrame({"run": ["base"], "passes": [1], "seconds": [1.0]})
    table = choices_table(pd.DataFrame(rows), records, {"runs": {"base": "base"}})
    line = table.iloc[0]
    assert line["related lost"] == -1
    assert line["related lost, low"] == -1
    assert -1 < line["related lost, high"] < -0.3
    left, right = choices_figure(table, "x").axes[1].get_xlim()
    assert left < -1
    assert right > 1


@pytest.mark.parametrize(
    "entry, message",
    [
        ({"runs": {"0": "a", "1": "b"}}, "Which\\?: no base; choices: 0, 1"),
        ({"base": "2", "runs": {"0": "a"}}, "Which\\?: unknown base '2'; choices: 0"),
    ],
)
def test_a_question_without_a_base_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        base_choice({"question": "Which?"} | entry)
