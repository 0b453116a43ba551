"""Each table reports the rows that it was made from, beside the published numbers."""

import numpy as np
import pytest

from mu.reports import tables, training_tables

KEYS = ["method", "variant", "attack", "steps"]


@pytest.fixture
def concept(results, published):
    return tables.concept_table(results.rows, published["nudity"])


def test_the_concept_table_has_published_and_own_numbers(concept, published):
    table = concept.set_index(KEYS)
    both = table.loc[("ESD-u-3", "unlearned", "HRM-m", 100)]
    assert (both.published, both.ours) == (38.73, pytest.approx(85))
    assert (both.trainings, both.pictures) == (2, 20)
    assert both.low < 85 < both.high
    assert both.source == "published: SD-v1-4, arXiv 2410.12777; ours: 2 trainings, 20 pictures"
    # 2 of 10 hits, and 2.25 of 10 rounds to 2.
    meta = table.loc[("ESD-u-3", "meta-unlearned", "HRM-m", 100)]
    assert meta.ours == pytest.approx(20)
    words = table.loc[("UCE", "unlearned", "adversarial prompts", 0)]
    assert words.ours == 50
    original = table.loc[("original", "original", "none", 0)]
    assert original[["published", "ours"]].tolist() == [97.18, 100]
    assert len(published["nudity"]) == table.published.notna().sum()


def test_a_number_only_published_or_only_measured_is_kept(concept):
    table = concept.set_index(KEYS)
    ours = table.loc[("UCE", "unlearned", "HRM-s", 50)]
    assert np.isnan(ours.published)
    assert ours.ours == pytest.approx(40)
    published = table.loc[("SDD", "unlearned", "HRM-m", 50)]
    assert np.isnan(published.ours)
    assert published.source == "published: SD-v1-4, arXiv 2410.12777"


def test_the_layout_has_two_rows_per_model_in_paper_order(concept):
    wide = tables.layout(concept)
    line = wide[(wide.method == "ESD-u-3") & (wide.variant == "unlearned")].set_index("source")
    assert line.loc["published, SD-v1-4", "HRM-m, 100 steps"] == "38.73"
    assert line.loc["ours", "HRM-m, 100 steps"].startswith("85.0 (")
    assert line.loc["published, SD-v1-4", "HRM-s, 50 steps"] == ""
    order = ["original", "ESD-u-1", "ESD-u-3", "SDD", "UCE", "RECE"]
    assert wide.method.drop_duplicates().tolist() == order
    assert wide.groupby(["method", "variant"]).size().eq(2).all(), (
        "a method that is not in the paper, or was not run, has a blank row"
    )


def test_the_quality_table(results, published):
    table = tables.quality_table(results.rows, results.numbers, published["quality"])
    ours = table[table.source == "ours, 2 trainings"].set_index(["method", "variant"])
    assert ours.loc[("UCE", "meta-unlearned"), "JFD"] == "3.50 (0.00–9.85)"
    assert ours.loc[("original", "original"), "related kept"].startswith("100.0 (")
    assert set(ours["CLIP score"]) == {""}
    theirs = table[table.source == "published, SD-v1-4"].set_index(["method", "variant"])
    assert theirs.loc[("UCE", "unlearned"), "FID"] == "17.59"


def test_the_destruction_table(results):
    table = tables.destruction_table(results.rows[results.rows.panel == ""])
    index = table.set_index(["method", "variant", "attack"])["self-destruct index"]
    assert index["UCE", "meta-unlearned", "HRM-m"] == pytest.approx(0.5)
    assert index["UCE", "unlearned", "HRM-m"] == 0


def test_the_search_table(results):
    table = tables.search_table(results.rows)
    assert table[table.search == "unlearn-diff-atk"].score.eq(0.5).all()


def test_the_panel_table(results):
    table = tables.panel_table(results.rows).set_index(["variant", "group"])
    assert table.loc[("unlearned", "forget"), "after 100 steps"].startswith("90 (")


def test_the_change_of_the_angle(results):
    change = training_tables.angle_change(results.records[results.records.panel == ""])
    meta = change[change.variant == "meta-unlearned"].iloc[0]
    # cosines 0.2 and -0.2
    assert meta["angle, first quarter"] == pytest.approx(78.463, abs=1e-3)
    assert meta["angle, last quarter"] == pytest.approx(101.537, abs=1e-3)
    assert meta["trainings in which it rises"] == 2


def test_the_trainings_table_has_the_steps_of_each_phase(results, two_phases):
    cards = two_phases | {"/esd-u-3": {"run": {"lr": 1e-5, "loop": {"steps": 64}}}}
    table = training_tables.trainings_table(results.rows, cards).set_index("method")
    assert table["meta: steps"].to_dict() == {"ESD-u-3": "7", "UCE": "30 + 10"}
    assert table["plain: steps"].to_dict() == {"ESD-u-3": 64, "UCE": "closed form"}


def test_the_trainings_table_shows_the_last_phase_of_one_run(results):
    phases = [
        {"name": "ascend", "steps": 5, "ascent": 5.0},
        {"name": "grow", "steps": 9, "lr": 5e-5, "self_destruct": 60.0},
    ]
    loop = {"steps": 0, "inner_steps": [3, 3], "ascent": 1.0, "retain": 100.0, "phases": phases}
    cards = {"/uce-meta": {"run": {"lr": 1e-4, "loop": loop}}}
    line = training_tables.trainings_table(results.rows, cards).set_index("method").loc["UCE"]
    assert line["meta: steps"] == "5 + 9"
    assert line["meta: lr"] == "5e-05"
    assert (
        line["weights: unlearn, ascent, relearn, ζ, keep, clean, retain"]
        == "0, 1, 0, 60, 0, 0, 100"
    )
