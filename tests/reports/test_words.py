"""Generated sentences report the numbers of the tables and rows."""

import re

import pandas as pd
import pytest

from mu.reports import captions, tables, training_tables, words
from mu.reports.caveats import caveats
from mu.reports.collect import deduplicate


@pytest.fixture
def rows(results):
    return deduplicate(results)


@pytest.fixture
def cards(results):
    return results.cards["0"]


def caveats_text(rows, cards):
    return "\n".join(caveats(rows, cards, "uce", 6e-5))


def test_self_destruction_is_ordered_by_certainty():
    facts = {"variant": "meta-unlearned", "attack": "HRM-m"}
    index = "self-destruct index"
    table = pd.DataFrame(
        [
            facts | {"method": "UCE", index: 0.5, "low": 0.2, "high": 0.7},
            facts | {"method": "SDD", index: 0.3, "low": 0.0, "high": 0.6},
        ]
    )
    assert words.destruction_words(table).endswith(
        "above 0: UCE meta-unlearned 50% (20% to 70%). "
        "Of the 1 others the largest is SDD meta-unlearned 30% (0% to 60%)."
    )


def test_angle_and_search(results):
    change = training_tables.angle_change(results.records[results.records.panel == ""])
    assert "ESD-u-3 78° → 102°" in words.turning(change)
    search = words.search_words(tables.search_table(results.rows))
    assert "ESD-u-3 unlearned (50%, random words 0%)" in search


def test_methods_are_compared(results, published):
    table = tables.concept_table(results.rows, published["nudity"])
    claim = words.claims(table)[0]
    assert "UCE 85 → 20" in claim
    assert "for 2 of 2 methods" in claim
    assert words.lowered(table).startswith(
        "Over all methods, the concept with meta-unlearning against without: "
        "HRM-m, 100 steps: less for 2 of 2 (intervals apart for "
    )
    assert words.lowered(table[:0]) == ""


def test_images_at_several_learning_rates_are_counted_once(results):
    rows = results.rows
    part = rows[(rows.panel == "") & (rows.attack == "HRM-m") & (rows.group == "forget")]
    count = captions.count(part)
    assert count == captions.count(pd.concat([part, part.assign(lr=2e-5)]))
    assert "10 of the concept" in count


def test_cost_and_learning_rates(results):
    rows = results.rows
    attacked = rows[(rows.panel == "") & (rows.method == "uce") & rows.attack.eq("HRM-m")]
    cost = words.cost_words(attacked)
    assert "lost of the related: unlearned 0%, meta-unlearned 50%" in cost
    assert re.fullmatch(
        r"The concept is recognised at 6e-05, after 100 steps, "
        r"unlearned 85% \(\d+–\d+\), meta-unlearned 20% \(\d+–\d+\)\.",
        words.rate_words(attacked),
    )


def test_caveats_of_two_trainings(rows, cards):
    text = caveats_text(rows, cards)
    assert (
        "after 100 steps of the attack they have lost 50, 50 points of their related concepts"
    ) in text
    assert "Simpler trainings" not in text
    assert "learning rate" not in text
    assert (
        "less of the concept is back with meta-unlearning than without "
        "for 2 of 2 methods after 50 steps, 2 of 2 methods after 100 steps"
    ) in text


def test_caveats_of_one_training(rows, cards):
    text = caveats_text(rows[rows.training == "0"], cards)
    assert (
        "After 100 steps of the attack the one training has lost 50 points "
        "of its related concepts (95 % interval "
    ) in text
    assert "unrelated concepts as well" not in text


def test_caveats_of_controls(rows, cards):
    plain = rows[(rows.model == "unlearned") & rows.method.eq("uce")]
    equal = plain.assign(model="ascent only", run="ascent")
    lost = (plain.group.eq("related") & plain.seed.eq(0)) | plain.group.eq("forget")
    poorer = plain.assign(
        model="ascent only, strong", run="ascent-strong", hit=plain.hit.mask(lost, 0)
    )
    text = caveats_text(pd.concat([rows, equal, poorer]), cards)
    assert (
        "after 50, 100 steps: unlearned 40, 85; ascent only 40, 85; "
        "ascent only, strong 0, 0; meta-unlearned 0, 20"
    ) in text
    assert (
        "(ascent only, strong 50 points fewer). With it, the lead in concept missing "
        "would be -10 points instead of"
    ) in text
    assert "at learning rate 6e-05" in text


def test_caveats_name_the_phases(rows, two_phases):
    assert caveats(rows, two_phases, "uce", 6e-5)[0] == (
        "UCE is meta-unlearned for at most 40 steps in 2 phases, with simulated attackers that "
        "persist; the other methods for 7, with attackers that start anew at each step."
    )


def test_lost_concepts_are_named(rows):
    attacked = rows[(rows.method == "uce") & (rows.attack == "HRM-m")]
    assert (
        "meta-unlearned model of this training has lost 2: a lion, a tiger; "
        "the trainings have lost 50%, 50%."
    ) in words.lost_words(attacked, "0", 100)


def test_a_panel_is_described(rows):
    assert captions.panel_words(rows, "robot-pocket") == (
        "Recognised before → after 100 steps. "
        "unlearned: concept 0% → 90%, related 100% → 100%, unrelated 100% → 100%; "
        "meta-unlearned: concept 0% → 20%, related 100% → 100%, unrelated 100% → 100%."
    )
