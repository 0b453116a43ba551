"""What an experiment leaves is gathered into few files, read back, refused where it is not comparable, and says in the paper's tables what the rows say."""

import gzip
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import synthetic

from mu.reports import figures, training_tables, words
from mu.reports import tables as paper
from mu.reports.collect import attack_name, collect, deduplicate, method_of, read_results, variant
from mu.reports.explorer import read_sheet
from mu.reports.targets import cost_figure, relearning_table, targets_by_seed, targets_table

ROOT = Path(__file__).parents[2]
PUBLISHED = {
    name: pd.read_csv(ROOT / "data" / f"paper_{name}.csv") for name in ("nudity", "quality")
}


@pytest.fixture(scope="module")
def gathered(tmp_path_factory):
    """Two trainings, the first with a panel below it."""
    base = tmp_path_factory.mktemp("experiment")
    for seed in (0, 1):
        synthetic.experiment(base / str(seed), seed)
    panel = base / "0" / "robot-pocket"
    for name, params in (
        ("original", {}),
        ("unlearned", {"method": "esd-f", "loop": {"eta": 1.0}}),
        ("meta", {"method": "esd-f", "loop": {"eta": 1.0} | synthetic.META}),
    ):
        synthetic.run(
            panel,
            name,
            {"forget": float(name == "original"), "related": 1.0, "unrelated": 1.0},
            params,
            sets="robot (9)",
        )
    end = {"forget": 0.9, "related": 1.0, "unrelated": 1.0}
    synthetic.attack(
        panel,
        "hrm-m",
        {
            run: {
                0: end | {"forget": 0.0},
                100: end | {"forget": 0.9 if run == "unlearned" else 0.2},
            }
            for run in ("unlearned", "meta")
        },
        attack="forget",
        prompts=0,
        sets="robot (9)",
    )
    report = base / "report"
    for seed in (0, 1):
        collect(base / str(seed), report / "raw" / str(seed), str(seed), pictures=seed == 0)
    return report


def test_names_of_methods_variants_and_attacks():
    assert (
        method_of({"method": "esd-u", "loop": {"eta": 3.0}}) == "esd-u-3"
        and method_of({"method": "uce", "loop": None}) == "uce"
        and method_of({}) == ""
    )
    assert [
        variant(run, "esd-f-1")
        for run in (
            "unlearned",
            "unlearned-2",
            "esd-f-1",
            "meta",
            "meta-0",
            "esd-f-1-meta",
            "longer",
            "stronger",
        )
    ] == ["unlearned"] * 3 + ["meta-unlearned"] * 3 + ["unlearned, longer", "unlearned, stronger"]
    card = dict(kind="fine-tuning", subset="f", optimizer="adam", attack="forget", prompts=0)
    assert [
        attack_name(card | more, "own")
        for more in (
            {},
            {"prompts": 1},
            {"attack": "clean"},
            {"merge": 1.0},
            {"subset": "lora"},
            {"kind": "dreambooth"},
            {"optimizer": "sgd"},
        )
    ] == ["HRM-m", "HRM-s", "CLEAN"] + ["own"] * 4


def test_everything_that_was_judged_is_gathered_once(gathered):
    found = read_results(gathered / "raw")
    each = len(synthetic.items())
    runs, attacked = (
        5,
        2 * 2 * 3 * 3,
    )  # original and two of two methods; two methods, two variants, three attacks, three steps
    assert len(found.rows[found.rows.panel == ""]) == 2 * (
        each * (runs + attacked) + 2 * 2 * 2 * 2 * 10
    )
    assert set(found.rows.training) == {"0", "1"} and set(found.rows.attack) == {
        "none",
        "HRM-m",
        "HRM-s",
        "CLEAN",
        "random",
        "unlearn-diff-atk",
    }
    assert set(found.rows[found.rows.panel == "robot-pocket"].method) == {"", "esd-f-1"} and set(
        found.rows.model
    ) == {"original", "unlearned", "meta-unlearned"}
    searched = found.rows[found.rows.attack == "unlearn-diff-atk"]
    assert set(searched.asked) == {"a cat"} and set(searched.prompt) == {"a cat", "key a cat"}
    assert found.records.groupby("run").size().eq(8).sum() == 4 and found.records.passes.eq(8).all()
    assert found.numbers["1"]["uce"]["numbers"]["uce-meta"]["jfd"] == 4.0
    assert read_results(gathered / "raw", ["1"]).rows.training.unique().tolist() == ["1"]


def test_the_same_experiment_is_gathered_into_the_same_bytes(gathered, tmp_path, monkeypatch):
    monkeypatch.setattr("mu.files.os.getpid", lambda: 7)  # as another process would
    collect(gathered.parent / "1", tmp_path / "raw" / "1", "1", pictures=False)
    assert (tmp_path / "raw" / "1" / "rows.csv.gz").read_bytes() == (
        gathered / "raw" / "1" / "rows.csv.gz"
    ).read_bytes()
    assert gzip.decompress((tmp_path / "raw" / "1" / "rows.csv.gz").read_bytes()).startswith(
        b"panel,method,model,run,training,attack"
    )


def test_pictures_are_kept_as_sheets_that_the_page_and_the_panels_share(gathered):
    courses = read_results(gathered / "raw").courses
    assert {(c["panel"], c["attack"], c["method"]) for c in courses} == {
        (p, a, m)
        for p, a, m in (
            ("robot-pocket", "HRM-m", "esd-f-1"),
            *(("", a, m) for a in ("HRM-m", "HRM-s", "CLEAN") for m in ("esd-u-3", "uce")),
        )
    }
    course = read_sheet(next(c for c in courses if c["panel"]), gathered)
    assert course.models == ["original", "unlearned", "meta-unlearned"] and course.steps == [0, 100]
    assert course.pictures[1, 1].mean() / 255 == pytest.approx(0.4, abs=0.02) and course.pictures[
        0
    ].mean() / 255 == pytest.approx(0.5, abs=0.02)
    fig = figures.panels(course, prompts=(2, 1, 1))
    assert [ax.get_title() for ax in fig.axes[:5]] == [
        "original",
        "unlearned",
        "unlearned\n+ 100 steps",
        "meta-unlearned",
        "meta-unlearned\n+ 100 steps",
    ] and len(fig.axes) == 20


def test_harmful_pictures_are_veiled_in_the_sheets_too(tmp_path):
    out = synthetic.experiment(tmp_path / "0", methods=("uce",), harmful=True)
    collect(out, tmp_path / "report" / "raw" / "0", "0")
    card = json.loads((tmp_path / "report" / "raw" / "0" / "cards.json").read_text())[
        "/attack/uce-hrm-m"
    ]
    assert card["harmful"] and card["blurred"]


def test_numbers_of_other_protocols_and_absent_ones_are_refused(gathered, tmp_path):
    with pytest.raises(FileNotFoundError, match="no results of training 7 .* available: 0, 1"):
        read_results(gathered / "raw", ["7"])
    with pytest.raises(FileNotFoundError, match=r"no results of training \(any\)"):
        read_results(tmp_path)
    with pytest.raises(FileNotFoundError, match="no evaluated run in"):
        collect(tmp_path / "none", tmp_path / "raw" / "0")
    out = synthetic.experiment(tmp_path / "2", 2, methods=("uce",))
    for changed, words in (
        ({"sampling_steps": 50}, "sampling_steps is"),
        ({"batch_size": 4}, "batch_size is"),
    ):
        file = out / "attack" / "uce-hrm-m.json"
        kept = file.read_text()
        made = json.loads(kept)
        file.write_text(json.dumps(made | {"protocol": made["protocol"] | changed}))
        collect(out, tmp_path / "raw" / "2", "2", pictures=False)
        collect(gathered.parent / "1", tmp_path / "raw" / "1", "1", pictures=False)
        with pytest.raises(ValueError, match=words):
            read_results(tmp_path / "raw")
        file.write_text(kept)


def test_a_set_that_was_met_twice_counts_once(tmp_path):
    out = synthetic.experiment(tmp_path / "0", methods=("uce",))
    end = {"forget": 1.0, "related": 1.0, "unrelated": 1.0}
    synthetic.attack(
        out, "uce-hrm-m-later", {"uce": {0: end, 100: end}}, attack="forget", prompts=0
    )
    collect(out, tmp_path / "raw" / "0", "0", pictures=False)
    rows = read_results(tmp_path / "raw").rows
    assert set(rows[rows.attack == "HRM-m"].name) == {"uce-hrm-m"} and set(
        rows[rows.name == "uce-hrm-m-later"].attack
    ) == {"uce-hrm-m-later"}


def test_the_concepts_table_has_published_and_own_numbers_side_by_side(gathered):
    table = paper.concept_table(read_results(gathered / "raw").rows, PUBLISHED["nudity"]).set_index(
        ["method", "variant", "attack", "steps"]
    )
    both = table.loc[("ESD-u-3", "unlearned", "HRM-m", 100)]
    assert (both.published, both.ours, both.trainings, both.pictures) == (
        38.73,
        pytest.approx(85),
        2,
        20,
    ) and both.low < 85 < both.high
    assert both.source == "published: SD-v1-4, arXiv 2410.12777; ours: 2 trainings, 20 pictures"
    assert table.loc[("ESD-u-3", "meta-unlearned", "HRM-m", 100)].ours == pytest.approx(
        20
    )  # 2 of 10, and 2.25 of 10 rounds to 2
    assert table.loc[("UCE", "unlearned", "HRM-s", 50)][["published"]].isna().all() and table.loc[
        ("UCE", "unlearned", "HRM-s", 50)
    ].ours == pytest.approx(40)
    assert (
        np.isnan(table.loc[("SDD", "unlearned", "HRM-m", 50)].ours)
        and table.loc[("SDD", "unlearned", "HRM-m", 50)].source
        == "published: SD-v1-4, arXiv 2410.12777"
    )
    assert table.loc[("UCE", "unlearned", "adversarial prompts", 0)].ours == 50 and table.loc[
        ("original", "original", "none", 0)
    ][["published", "ours"]].tolist() == [97.18, 100]
    wide = paper.layout(table.reset_index())
    line = wide[(wide.method == "ESD-u-3") & (wide.variant == "unlearned")].set_index("source")
    assert (
        line.loc["published, SD-v1-4", "HRM-m, 100 steps"] == "38.73"
        and line.loc["ours", "HRM-m, 100 steps"].startswith("85.0 (")
        and line.loc["published, SD-v1-4", "HRM-s, 50 steps"] == ""
    )
    assert wide.method.drop_duplicates().tolist() == [
        "original",
        "ESD-u-1",
        "ESD-u-3",
        "SDD",
        "UCE",
        "RECE",
    ]
    assert wide.groupby(["method", "variant"]).size().eq(2).all(), (
        "a method that the paper has not, or that was not run, has a blank line"
    )
    assert len(PUBLISHED["nudity"]) == table.published.notna().sum(), (
        "every published number is in the table"
    )


def test_the_quality_table_and_the_others(gathered):
    found = read_results(gathered / "raw")
    table = paper.quality_table(found.rows, found.numbers, PUBLISHED["quality"])
    ours = table[table.source == "ours, 2 trainings"].set_index(["method", "variant"])
    assert (
        ours.loc[("UCE", "meta-unlearned"), "JFD"] == "3.50 (0.00–9.85)"
        and ours.loc[("original", "original"), "related kept"].startswith("100.0 (")
        and set(ours["CLIP score"]) == {""}
    )
    assert (
        table[table.source == "published, SD-v1-4"]
        .set_index(["method", "variant"])
        .loc[("UCE", "unlearned"), "FID"]
        == "17.59"
    )
    destroyed = paper.destruction_table(found.rows[found.rows.panel == ""]).set_index(
        ["method", "variant", "attack"]
    )["self-destruct index"]
    assert (
        destroyed["UCE", "meta-unlearned", "HRM-m"] == pytest.approx(0.5)
        and destroyed["UCE", "unlearned", "HRM-m"] == 0
    )
    said = words.destruction_words(
        pd.DataFrame(
            [
                {
                    "method": "UCE",
                    "variant": "meta-unlearned",
                    "attack": "HRM-m",
                    "self-destruct index": 0.5,
                    "low": 0.2,
                    "high": 0.7,
                },
                {
                    "method": "SDD",
                    "variant": "meta-unlearned",
                    "attack": "HRM-m",
                    "self-destruct index": 0.3,
                    "low": 0.0,
                    "high": 0.6,
                },
            ]
        )
    )
    assert said.endswith(
        "above 0: UCE meta-unlearned 50% (20% to 70%). Of the 1 others the largest is SDD meta-unlearned 30% (0% to 60%)."
    )
    turns = training_tables.angle_change(found.records[found.records.panel == ""])
    meta = turns[turns.variant == "meta-unlearned"].iloc[
        0
    ]  # cosines 0.2 and -0.2: 78.46 and 101.54 degrees
    assert (
        meta["angle, first quarter"],
        meta["angle, last quarter"],
        meta["trainings in which it rises"],
    ) == (pytest.approx(78.463, abs=1e-3), pytest.approx(101.537, abs=1e-3), 2)
    assert "ESD-u-3 78° → 102°" in words.turning(turns)
    searched = paper.search_table(found.rows)
    assert searched[searched.search == "unlearn-diff-atk"].score.eq(
        0.5
    ).all() and "ESD-u-3 unlearned (50%, random words 0%)" in words.said_by_words(searched)
    assert (
        paper.panel_table(found.rows)
        .set_index(["variant", "group"])
        .loc[("unlearned", "forget"), "after 100 steps"]
        .startswith("90 (")
    )
    table = paper.concept_table(found.rows, PUBLISHED["nudity"])
    said = words.claims(table)
    assert "UCE 85 → 20" in said[0] and "for 2 of 2 methods" in said[0]
    assert (
        words.lowered(table).startswith(
            "Over all methods, the concept with meta-unlearning against without: HRM-m, 100 steps: less for 2 of 2 (intervals apart for "
        )
        and words.lowered(table[:0]) == ""
    )


def test_two_phases_are_one_training():
    records = pd.DataFrame(
        {
            "run": ["m", "m-first", "m-first", "m-meta", "m-meta"],
            "method": "m",
            "training": "0",
            "step": [1, 1, 5, 1, 5],
            "model": ["unlearned", "m-first", "m-first", "meta-unlearned", "meta-unlearned"],
        }
    )
    assert training_tables.merge_phases(records)[["step", "model"]].to_numpy().tolist() == [
        [1, "unlearned"],
        [1, "meta-unlearned"],
        [5, "meta-unlearned"],
        [6, "meta-unlearned"],
        [10, "meta-unlearned"],
    ]


def test_figures_are_drawn_of_whatever_there_is(gathered):
    rows = read_results(gathered / "raw").rows
    fig = figures.by_method(rows, ["HRM-m", "CLEAN"], "related")
    assert [ax.get_title() for ax in fig.axes[:2]] == ["ESD-u-3", "UCE"] and fig.axes[
        0
    ].get_lines()[1].get_ydata().tolist() == [1.0, 0.5, 0.5]
    fig, table = figures.angles(read_results(gathered / "raw").records)
    assert len(fig.axes) == 4 and len(table) == 4


def test_related_concepts_under_the_attack_and_under_clean_stand_side_by_side(gathered):
    told = {
        (c["method"], c["attack"]): c
        for c in read_results(gathered / "raw").courses
        if not c["panel"]
    }
    attack, clean = (read_sheet(told["uce", name], gathered) for name in ("HRM-m", "CLEAN"))
    fig = figures.destruction_panel(attack, clean)
    lines = len({(i["prompt"], i["seed"]) for i in attack.items if i["group"] == "related"})
    assert len(fig.axes) == 7 * lines and [ax.get_title().split("\n") for ax in fig.axes[:7]] == [
        ["original"],
        *(
            [model, *after]
            for model in ("unlearned", "meta-unlearned")
            for after in ([], ["+ 100 steps", "HRM"], ["+ 100 steps", "CLEAN"])
        ),
    ]
    first = next(i for i, item in enumerate(attack.items) if item["group"] == "related")
    same = next(i for i, item in enumerate(clean.items) if item == attack.items[first])
    shown = [np.asarray(ax.get_images()[0].get_array()) for ax in fig.axes[:7]]
    assert (shown[5] == attack.pictures[2, attack.steps.index(100), first]).all() and (
        shown[6] == clean.pictures[2, clean.steps.index(100), same]
    ).all()
    with pytest.raises(
        ValueError, match="no related picture of the same models and step in common"
    ):
        figures.destruction_panel(attack, replace(clean, steps=[0, 51, 101]))


def test_targets_of_one_method(gathered):
    rows = read_results(gathered / "raw").rows
    mine = rows[(rows.panel == "") & rows.method.isin(["uce", ""])]
    table = targets_table(
        mine[mine.attack == "none"],
        mine[mine.attack == "HRM-m"],
        mine[mine.attack == "CLEAN"],
        6e-5,
    ).set_index("target")
    assert table.result[
        "concept after 100 steps, meta-unlearned ÷ unlearned, at most 0.50"
    ] == pytest.approx(0.2 / 0.85)
    assert table.result[
        "related lost in 100 steps of attack, meta-unlearned − unlearned, at least 0.15"
    ] == pytest.approx(0.5)
    assert (
        table.met["original: concept recognised, at least 0.95"] == "✓"
        and "meta-unlearned: concept after 100 steps of CLEAN, at most 0.05" in table.index
    )
    found = relearning_table(mine[mine.attack == "HRM-m"]).set_index("model")
    assert (
        table.met["steps to revival at learning rate 6e-05, meta-unlearned ÷ unlearned, at least 4"]
        == "?"
    ), "the meta-unlearned one was not seen to come back, nor looked at for four times as long"
    assert (
        found.attacks["unlearned"] == 2
        and found.relearned["unlearned"] == 2
        and found["steps to revival"]["meta-unlearned"] == "> 100"
    )
    twice = targets_by_seed(
        mine[mine.attack == "none"],
        mine[mine.attack == "HRM-m"],
        mine[mine.attack == "CLEAN"],
        6e-5,
    ).set_index("target")
    assert (
        twice.result.equals(table.result)
        and twice["met by single trainings"]["original: concept recognised, at least 0.95"]
        == "2 of 2"
    )
    ends = mine.assign(
        hit=mine.hit.mask(
            (mine.training == "1")
            & (mine.model == "meta-unlearned")
            & (mine.attack == "HRM-m")
            & (mine.step == 100)
            & (mine.group == "related"),
            1,
        )
    )
    one = targets_by_seed(
        ends[ends.attack == "none"],
        ends[ends.attack == "HRM-m"],
        ends[ends.attack == "CLEAN"],
        6e-5,
    ).set_index("target")
    target = "related lost in 100 steps of attack, meta-unlearned − unlearned, at least 0.15"
    assert one.met[target] == "✓" and one["met by single trainings"][target] == "1 of 2", (
        "a mean that one training carries is said to be so"
    )


def test_a_censored_relearning_step_gives_a_lower_bound(gathered):
    rows = read_results(gathered / "raw").rows
    mine = rows[
        (rows.panel == "")
        & rows.method.isin(["uce", ""])
        & rows.attack.eq("HRM-m")
        & rows.group.isin(["forget", "related", "unrelated"])
    ]
    soon = mine.assign(
        hit=mine.hit.mask(
            (mine.model == "unlearned") & mine.group.eq("forget") & (mine.step == 50), 1
        )
    )
    late = pd.concat([soon, soon[soon.step == 100].assign(step=200)])
    table = targets_table(rows[rows.attack == "none"], late, late[:0], 6e-5).set_index("target")
    target = "steps to revival at learning rate 6e-05, meta-unlearned ÷ unlearned, at least 4"
    assert table.result[target] == "4 at least: not back in 200" and table.met[target] == "✓"


def test_a_model_that_trainings_share_counts_once(gathered):
    """By its digest: the original always, a closed form's where an attack's card says its weights. Other models are as many as there are trainings."""
    found = read_results(gathered / "raw")
    rows = deduplicate(found)
    assert (
        rows[rows.model == "original"].groupby("panel").training.nunique().eq(1).all()
        and rows[rows.model != "original"].groupby(["panel", "run"]).training.nunique()["", "uce"]
        == 2
    )
    digests = {"uce": "same", "uce-meta": "other"}
    cards = {
        t: {
            name: card
            | (
                {
                    "weights": {
                        run: f"runs/{t}/{run} ({what if what == 'same' else t})"
                        for run, what in digests.items()
                    }
                }
                if name.startswith("/attack/uce-hrm")
                else {}
            )
            for name, card in of.items()
        }
        for t, of in found.cards.items()
    }
    rows = deduplicate(replace(found, cards=cards))
    of_uce = rows[(rows.method == "uce") & rows.attack.eq("HRM-m")].groupby("model")
    assert (
        of_uce.training.nunique().to_dict() == {"unlearned": 1, "meta-unlearned": 2}
        and of_uce.size()["meta-unlearned"] == 2 * of_uce.size()["unlearned"]
    )
    said = words.count(rows[rows.attack.eq("HRM-m") & rows.panel.eq("")])
    assert said.startswith("2 trainings (seeds 0, 1), attack seed 0; ") and said.endswith(
        "; of fewer trainings: UCE unlearned 1"
    )
    quality = paper.quality_table(rows, found.numbers, PUBLISHED["quality"]).set_index(
        ["method", "variant"]
    )
    assert quality[quality.source == "ours, 1 training"].JFD["UCE", "unlearned"] == "1.00", (
        "one model has no interval over trainings"
    )


def test_steps_that_several_learning_rates_share_are_not_so_many_pictures(gathered):
    rows = read_results(gathered / "raw").rows
    part = rows[(rows.panel == "") & (rows.attack == "HRM-m") & (rows.group == "forget")]
    assert words.count(part) == words.count(
        pd.concat([part, part.assign(lr=2e-5)])
    ) and "10 of the concept" in words.count(part)


def test_the_price_of_the_defence_is_drawn_and_said(gathered):
    rows = read_results(gathered / "raw").rows
    mine = rows[(rows.panel == "") & (rows.method == "uce") & rows.attack.eq("HRM-m")]
    fig = cost_figure(mine)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == [
        "meta-unlearned",
        "unlearned",
    ] and len(fig.axes) == 4
    assert "lost of the related: unlearned 0%, meta-unlearned 50%" in words.price_words(mine)
    assert re.fullmatch(
        r"The concept is recognised at 6e-05, after 100 steps, unlearned 85% \(\d+–\d+\), meta-unlearned 20% \(\d+–\d+\)\.",
        words.rate_words(mine),
    )


def test_what_is_said_too_kindly_is_said_as_well(gathered):
    found = read_results(gathered / "raw")
    rows, cards = deduplicate(found), found.cards["0"]
    said = "\n".join(words.caveats(rows, cards, "uce", 6e-5))
    assert (
        "after 100 steps of the attack they have lost 50, 50 points of their related concepts"
        in said
        and "Simpler trainings" not in said
        and "learning rate" not in said
    )
    assert (
        "less of the concept is back with meta-unlearning than without for 2 of 2 methods after 50 steps, 2 of 2 methods after 100 steps"
        in said
    )
    control = rows[(rows.model == "unlearned") & rows.method.eq("uce")].assign(
        model="ascent only, strong", run="ascent-strong"
    )
    weak = control.assign(model="ascent only", run="ascent")
    poorer = control.assign(
        hit=control.hit.mask(
            (control.group.eq("related") & control.seed.eq(0)) | control.group.eq("forget"), 0
        )
    )
    said = "\n".join(words.caveats(pd.concat([rows, weak, poorer]), cards, "uce", 6e-5))
    assert (
        "after 50, 100 steps: unlearned 40, 85; ascent only 40, 85; ascent only, strong 0, 0; meta-unlearned 0, 20"
        in said
    )
    assert (
        "(ascent only, strong 50 points fewer). With it, the lead in concept missing would be -10 points instead of"
        in said
        and "at learning rate 6e-05" in said
    )
    made = {
        "/uce-meta": {
            "run": {"start": "runs/uce-first", "loop": {"steps": 10, "inner_steps": [1, 2]}}
        },
        "/uce-first": {"run": {"start": "runs/uce", "loop": {"steps": 30, "inner_steps": [1, 2]}}},
        "/uce": {"run": {"start": "", "loop": None}},
        "/esd-u-3-meta": {"run": {"start": "", "loop": {"steps": 7, "inner_steps": [1, 2]}}},
    }
    assert (
        words.caveats(rows, made, "uce", 6e-5)[0]
        == "UCE is meta-unlearned for 40 steps in 2 phases, the other methods for 7."
    )
    table = training_tables.trainings_table(
        rows, made | {"/esd-u-3": {"run": {"lr": 1e-5, "loop": {"steps": 64}}}}
    ).set_index("method")
    assert table["meta: steps"].to_dict() == {"ESD-u-3": "7", "UCE": "30 + 10"} and table[
        "plain: steps"
    ].to_dict() == {"ESD-u-3": 64, "UCE": "closed form"}
    assert (
        "meta-unlearned model of this training has lost 2: a lion, a tiger; the trainings have lost 50%, 50%."
        in words.lost_words(rows[(rows.method == "uce") & (rows.attack == "HRM-m")], "0", 100)
    )
    assert words.panel_words(rows, "robot-pocket") == (
        "Recognised before → after 100 steps. unlearned: concept 0% → 90%, related 100% → 100%, unrelated 100% → 100%; meta-unlearned: concept 0% → 20%, related 100% → 100%, unrelated 100% → 100%."
    )
    alone = "\n".join(words.caveats(rows[rows.training == "0"], cards, "uce", 6e-5))
    assert (
        "After 100 steps of the attack the one training has lost 50 points of its related concepts (95 % interval "
        in alone
        and "unrelated concepts as well" not in alone
    )
