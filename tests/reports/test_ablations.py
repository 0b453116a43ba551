"""What the questions of the ablations compare, and that their answers say the differences with their intervals."""

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
    base_choice,
    plain_runs,
    choices_figure,
    choices_table,
    attacked_runs,
    under_attack,
)
from mu.reports.collect import collect, read_results

ROOT = Path(__file__).parents[2]
HIGH = {"forget": 1.0, "related": 1.0, "unrelated": 1.0}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Two trainings of four runs, of which the rows are gathered."""
    base = tmp_path_factory.mktemp("ablations")
    ends = {
        "plain": (1.0, 1.0),
        "base": (0.4, 0.5),
        "zeta0": (0.4, 1.0),
        "relearn8": (0.2, 0.5),
    }  # concept and related, after 100 steps
    for seed in (0, 1):
        out = base / str(seed)
        for run, (forget, related) in ends.items():
            params = dict(
                method="esd-f", loop={"eta": 1.0} | ({} if run == "plain" else synthetic.META)
            )
            synthetic.run(out, run, HIGH | {"forget": 0.0}, params, [0.1])
            synthetic.attack(
                out,
                run,
                {
                    run: {
                        0: HIGH | {"forget": 0.0},
                        100: HIGH | {"forget": forget, "related": related},
                    }
                },
                attack="forget",
                prompts=0,
            )
        synthetic.attack(
            out,
            "attack-fast",
            {
                run: {0: HIGH | {"forget": 0.0}, 100: HIGH | {"forget": 1.0}}
                for run in ("plain", "base")
            },
            lr=1e-3,
            attack="forget",
            prompts=0,
        )
        collect(out, base / "report" / "raw" / str(seed), str(seed), pictures=False)
    return base


@pytest.fixture(scope="module")
def results(base):
    return read_results(base / "report" / "raw")


def test_a_line_a_choice_with_differences_from_the_base(results):
    entry = {"question": "ζ?", "factor": "ζ", "runs": {"0": "zeta0", "30 (base)": "base"}}
    table = choices_table(results.rows, results.records, entry).set_index("choice")
    assert (
        table["concept under attack"].tolist() == [pytest.approx(0.2)] * 2
    )  # trapezoid from 0 to 0.4
    assert table["related lost"].tolist() == [0, pytest.approx(0.5)] and table[
        "related lost: difference"
    ].tolist() == [pytest.approx(-0.5), 0]
    assert (
        table.trainings.eq(2).all()
        and table["forget before"].eq(0).all()
        and table["passes a step"].eq(8).all()
    )
    assert (
        table["concept under attack: plain"].eq(0.5).all()
        and table["related lost: plain"].eq(0).all()
    )
    said = answer(table.reset_index(), entry)
    assert said.startswith(
        "Of the concept, 20 % comes back with “30 (base)” (mean over the attack): not clearly different with any, 0 (within ±16); "
    )
    assert (
        "of the related concepts, 50 % are lost to it: not clearly different with “0” -50 (" in said
    )
    fig = choices_figure(table.reset_index(), "ζ")
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == ["0", "30 (base)"] and fig.axes[
        0
    ].get_xlabel() == "concept under attack"


def test_other_attacks_on_the_base(results):
    entry = {
        "question": "Faster?",
        "factor": "attack",
        "attacks": {"as rehearsed": "base", "fast": "attack-fast"},
    }
    assert attacked_runs(entry) == {"as rehearsed": ("base", "base"), "fast": ("base", "attack-fast")}
    assert plain_runs(entry) == {
        "as rehearsed": ("plain", "plain"),
        "fast": ("plain", "attack-fast"),
    }
    table = choices_table(results.rows, results.records, entry).set_index("choice")
    assert (
        table["concept under attack"].tolist() == [pytest.approx(0.2), pytest.approx(0.5)]
        and table["concept under attack: plain"].eq(0.5).all()
    )
    assert table["concept under attack: difference"].tolist() == [pytest.approx(-0.3), 0], (
        "from the plainly unlearned model under the same attack"
    )
    assert answer(table.reset_index(), entry).startswith(
        "Of the concept, against what comes back to the plainly unlearned model under the same attack (means over it): "
    )
    with pytest.raises(
        ValueError, match="zeta0 has no attack attack-fast; available: before, zeta0"
    ):
        under_attack(results.rows, "zeta0", "attack-fast")


def test_the_notebook_answers_what_was_run_and_says_what_was_not(base, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT), prepend=os.pathsep)
    report = tmp_path / "report"
    options = dict(
        out=str(base),
        report=str(report),
        questions=str(ROOT / "notebooks" / "profiles" / "ablations.yaml"),
    )
    with pytest.raises(RuntimeError, match="there is no question 'colour'"):
        execute(
            ROOT / "notebooks" / "40_ablations.ipynb",
            tmp_path / "wrong.ipynb",
            options | {"ask": "colour"},
        )
    with pytest.raises(
        RuntimeError, match="no question could be answered"
    ):  # each asks for a run that is not there
        execute(ROOT / "notebooks" / "40_ablations.ipynb", tmp_path / "none.ipynb", options)
    (tmp_path / "mine.yaml").write_text(
        yaml.safe_dump(
            {
                "questions": {
                    "zeta": {
                        "question": "What does ζ do?",
                        "factor": "ζ",
                        "runs": {"0": "zeta0", "30": "base"},
                    },
                    "more": {
                        "question": "More?",
                        "factor": "x",
                        "runs": {"1": "nowhere", "2": "base"},
                    },
                }
            }
        )
    )
    assert execute(
        ROOT / "notebooks" / "40_ablations.ipynb",
        tmp_path / "40.ipynb",
        options | {"questions": str(tmp_path / "mine.yaml")},
    )
    answers = json.loads((report / "answers.json").read_text())
    assert (
        [a["question"] for a in answers] == ["What does ζ do?"]
        and (report / answers[0]["figure"]).is_file()
        and "2 trainings (seeds 0, 1)" in answers[0]["caption"]
    )
    assert "1 of 2 questions answered; not run: more" in (tmp_path / "40.html").read_text()


def test_every_question_of_the_file_asks_for_runs_that_there_are():
    asked = yaml.safe_load((ROOT / "notebooks" / "profiles" / "ablations.yaml").read_text())
    for model, facts in asked["models"].items():
        runs, attacks = (
            {"plain", *facts["variants"]},
            {"plain", *facts["variants"], *(f"attack-{name}" for name in facts["mismatches"])},
        )
        for name, entry in asked["questions"].items():
            assert {run for run, _ in attacked_runs(entry).values()} <= runs and {
                attack for _, attack in attacked_runs(entry).values()
            } <= attacks, (model, name)
            assert set(entry) <= {"question", "factor", "runs", "attacks", "base"}, (
                f"{name}: a comma without quotes?"
            )
            assert (
                base_choice(entry) in attacked_runs(entry)
                and entry["question"].endswith("?")
                and entry["factor"]
            ), name
        used = {key for entry in asked["questions"].values() for _, key in attacked_runs(entry).values()}
        assert attacks - used <= {"plain"}, f"trained and never asked about: {attacks - used}"


def table_of(**columns):
    """A table of two choices, the base and another, all of whose differences are 0 but those that are said."""
    lines = [{"choice": "base"}, {"choice": "other"}]
    for line in lines:
        line |= {"related before": 1.0, "unrelated before": 1.0}
        for name in ("concept under attack", "related lost"):
            line |= {
                name: 0.5,
                f"{name}, low": 0.4,
                f"{name}, high": 0.6,
                f"{name}: plain": 0.5,
            } | {
                f"{name}: difference{end}": far
                for end, far in (("", 0.0), (", low", -0.1), (", high", 0.1))
            }
    lines[1] |= columns
    return pd.DataFrame(lines)


@pytest.mark.parametrize(
    "low, high, said",
    [
        (0.1, 0.3, "clearly more with “other” +20 (+10 to +30)"),
        (-0.1, 0.5, "not clearly different with “other” +20 (-10 to +50)"),
        (0.0, 0.4, "not clearly different with “other” +20 (+0 to +40)"),
    ],
)
def test_only_an_interval_without_0_is_a_clear_difference(low, high, said):
    entry = {"runs": {"base": "base", "other": "x"}}
    table = table_of(
        **{
            "concept under attack: difference": 0.2,
            "concept under attack: difference, low": low,
            "concept under attack: difference, high": high,
        }
    )
    assert (
        answer(table, entry)
        == f"Of the concept, 50 % comes back with “base” (mean over the attack): {said}; of the related concepts, 50 % are lost to it: not clearly different with any, 0 (within ±10)."
    )
    assert answer(table_of(**{"unrelated before": 0.9}), entry).endswith(
        "of less quality even before the attack: other (related 100 %, unrelated 90 %)."
    )


def test_what_is_gained_has_its_interval_below_0_and_is_not_cut_off():
    """Related concepts that a model draws only after the attack: the share lost is negative, and so is its interval."""
    rows = pd.DataFrame(
        [
            dict(
                run=run,
                name=run,
                training="0",
                group=group,
                asked=f"a {group} {i}",
                seed=i,
                attack_seed=0,
                step=step,
                hit=int(group == "forget" or step > 0 or run == "plain"),
            )
            for run in ("plain", "base")
            for group in ("forget", "related")
            for i in range(4)
            for step in (0, 10)
        ]
    )
    table = choices_table(
        rows,
        pd.DataFrame({"run": ["base"], "passes": [1], "seconds": [1.0]}),
        {"runs": {"base": "base"}},
    )
    line = table.iloc[0]
    assert (
        line["related lost"] == -1
        and line["related lost, low"] == -1
        and -1 < line["related lost, high"] < -0.3
    )
    left, right = choices_figure(table, "x").axes[1].get_xlim()
    assert left < -1 and right > 1


@pytest.mark.parametrize(
    "entry, words",
    [
        (
            {"question": "Which?", "runs": {"0": "a", "1": "b"}},
            "Which\\?: no base; choices: 0, 1",
        ),
        (
            {"question": "Which?", "base": "2", "runs": {"0": "a"}},
            "Which\\?: unknown base '2'; choices: 0",
        ),
    ],
)
def test_a_question_without_a_base_is_refused(entry, words):
    with pytest.raises(ValueError, match=words):
        base_choice(entry)
