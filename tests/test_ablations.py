"""What the questions of the ablations compare, and that their answers say the differences with their intervals."""

import json
import os
from pathlib import Path

import pytest
import synthetic
import yaml

from mu.ablations import answer, base_of, choices_figure, choices_table, pairs, under_attack
from mu.notebooks import execute
from mu.results import collect, read_results

ROOT = Path(__file__).parent.parent
HIGH = {"forget": 1.0, "related": 1.0, "unrelated": 1.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two trainings of four runs, of which the rows are gathered."""
    base = tmp_path_factory.mktemp("ablations")
    ends = {"plain": (1.0, 1.0), "base": (0.4, 0.5), "zeta0": (0.4, 1.0), "relearn8": (0.2, 0.5)}  # concept and related, after 100 steps
    for seed in (0, 1):
        out = base / str(seed)
        for run, (forget, related) in ends.items():
            params = dict(method="esd-f", loop={"eta": 1.0} | ({} if run == "plain" else synthetic.META))
            synthetic.run(out, run, HIGH | {"forget": 0.0}, params, [0.1])
            synthetic.attack(out, run, {run: {0: HIGH | {"forget": 0.0}, 100: HIGH | {"forget": forget, "related": related}}}, attack="forget", prompts=0)
        synthetic.attack(out, "attack-fast", {run: {0: HIGH | {"forget": 0.0}, 100: HIGH | {"forget": 1.0}} for run in ("plain", "base")}, lr=1e-3, attack="forget", prompts=0)
        collect(out, base / "report" / "raw" / str(seed), str(seed), pictures=False)
    return base


@pytest.fixture(scope="module")
def results(base):
    return read_results(base / "report" / "raw")


def test_a_line_a_choice_with_differences_from_the_base(results):
    entry = {"question": "ζ?", "factor": "ζ", "runs": {"0": "zeta0", "30 (base)": "base"}}
    table = choices_table(results.rows, results.records, entry).set_index("choice")
    assert table["concept under attack"].tolist() == [pytest.approx(0.2)] * 2  # trapezoid from 0 to 0.4
    assert table["related lost"].tolist() == [0, pytest.approx(0.5)] and table["related lost: difference"].tolist() == [pytest.approx(-0.5), 0]
    assert table.trainings.eq(2).all() and table["forget before"].eq(0).all() and table["passes a step"].eq(8).all()
    said = answer(table.reset_index(), base_of(entry))
    assert said.startswith("Concept coming back (mean over the attack): 20 % with “30 (base)”; clearly different, in points: none; not clearly: all others, 0 (within ±16); ")
    assert "related concepts lost to it: 50 % with “30 (base)”; clearly different, in points: none; not clearly: “0” -50 (" in said
    fig = choices_figure(table.reset_index(), "ζ", {"concept under attack": 0.5, "related lost": 0.0})
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["0", "30 (base)"] and fig.axes[0].get_xlabel() == "concept under attack"


def test_other_attacks_on_the_base(results):
    entry = {"question": "Faster?", "factor": "attack", "attacks": {"as rehearsed": "base", "fast": "attack-fast"}}
    assert pairs(entry) == {"as rehearsed": ("base", "base"), "fast": ("base", "attack-fast")}
    table = choices_table(results.rows, results.records, entry).set_index("choice")
    assert table["concept under attack: difference"].tolist() == [0, pytest.approx(0.3)]
    assert under_attack(results.rows, "plain", "attack-fast")[0].area.mean() == pytest.approx(0.5)
    with pytest.raises(ValueError, match="zeta0 was not attacked as attack-fast; there are: before, zeta0"):
        under_attack(results.rows, "zeta0", "attack-fast")


def test_the_notebook_answers_what_was_run_and_says_what_was_not(base, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    report = tmp_path / "report"
    options = dict(out=str(base), report=str(report), questions=str(ROOT / "notebooks" / "profiles" / "ablations.yaml"))
    with pytest.raises(RuntimeError, match="there is no question 'colour'"):
        execute(ROOT / "notebooks" / "40_ablations.ipynb", tmp_path / "wrong.ipynb", options | {"ask": "colour"})
    with pytest.raises(RuntimeError, match="no question could be answered"):  # each asks for a run that is not there
        execute(ROOT / "notebooks" / "40_ablations.ipynb", tmp_path / "none.ipynb", options)
    (tmp_path / "mine.yaml").write_text(yaml.safe_dump({"questions": {
        "zeta": {"question": "What does ζ do?", "factor": "ζ", "runs": {"0": "zeta0", "30": "base"}}, "more": {"question": "More?", "factor": "x", "runs": {"1": "nowhere", "2": "base"}}}}))
    assert execute(ROOT / "notebooks" / "40_ablations.ipynb", tmp_path / "40.ipynb", options | {"questions": str(tmp_path / "mine.yaml")})
    answers = json.loads((report / "answers.json").read_text())
    assert [a["question"] for a in answers] == ["What does ζ do?"] and (report / answers[0]["figure"]).is_file() and "2 trainings (seeds 0, 1)" in answers[0]["caption"]
    assert "1 of 2 questions answered; not run: more" in (tmp_path / "40.html").read_text()


def test_every_question_of_the_file_asks_for_runs_that_there_are():
    asked = yaml.safe_load((ROOT / "notebooks" / "profiles" / "ablations.yaml").read_text())
    for model, facts in asked["models"].items():
        runs, attacks = {"plain", *facts["variants"]}, {"plain", *facts["variants"], *(f"attack-{name}" for name in facts["mismatches"])}
        for name, entry in asked["questions"].items():
            assert {run for run, _ in pairs(entry).values()} <= runs and {attack for _, attack in pairs(entry).values()} <= attacks, (model, name)
            assert base_of(entry) in pairs(entry) and entry["question"].endswith("?") and entry["factor"], name
        used = {key for entry in asked["questions"].values() for _, key in pairs(entry).values()}
        assert attacks - used <= {"plain"}, f"trained and never asked about: {attacks - used}"
